"""`flax-switch` with a pause after every line of metrics, so that a signal finds a short run under way: for test_resume."""

import sys
import time

from flax_switch import cli
from flax_switch.training.metrics import MetricsWriter

PAUSE = 0.3  # seconds


def main():
    write = MetricsWriter.write

    def write_and_pause(self, *line):
        write(self, *line)
        time.sleep(PAUSE)

    MetricsWriter.write = write_and_pause
    return cli.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
