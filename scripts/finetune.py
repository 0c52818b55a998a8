"""flax-switch finetune, as a script."""

import sys

from flax_switch.cli import main

if __name__ == "__main__":
    sys.exit(main(["finetune", *sys.argv[1:]]))
