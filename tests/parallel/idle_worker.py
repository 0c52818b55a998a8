"""A process of a run that computes nothing: python idle_worker.py ADDRESS COUNT NUMBER [HEARTBEAT]; says when all have met."""

import sys
import time

from flax_switch.parallel.processes import Connection, session


def main(address, count, number, heartbeat="10"):
    connection = Connection(address, int(count), int(number), heartbeat_timeout=int(heartbeat), connect_timeout=60)
    with session(connection):
        print("met", flush=True)
        time.sleep(300)


if __name__ == "__main__":
    main(*sys.argv[1:])
