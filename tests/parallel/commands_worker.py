"""One process that runs commands one after another: python commands_worker.py COMMANDS.json [alone]

It finds the others by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, unless it is alone. A failure ends it.
"""

import json
import sys
from pathlib import Path

from flax_switch import cli
from flax_switch.parallel import processes


def main(commands_file, alone=""):
    connection = None if alone else processes.Connection.resolved(connect_timeout=120, heartbeat_timeout=300)
    with processes.session(connection):
        for command in json.loads(Path(commands_file).read_text()):
            status = cli.main(command)
            if status:
                raise SystemExit(f"{' '.join(command)}: status {status}")


if __name__ == "__main__":
    main(*sys.argv[1:])
