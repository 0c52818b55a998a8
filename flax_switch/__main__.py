"""python -m flax_switch: the command line, where the script flax-switch is not on the path."""

import sys

from flax_switch.cli import main

if __name__ == "__main__":
    sys.exit(main())
