"""flax-switch pretrain, as a script."""

import sys

from flax_switch.cli import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
