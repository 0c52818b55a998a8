"""Runs a flax-switch command in several processes, each an actor of a Ray cluster.

python scripts/launch/ray_run.py --num-processes 4 --num-gpus 8 -- pretrain --config switch_base_128 --workdir /shared/runs/base-128

Needs `pip install ray`, and flax_switch on every node. Ray places the actors, and shows each its own GPUs; the coordinator
is on the first one's node. SIGTERM or Ctrl-C here has all of them save and leave; the exit status is the command's.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


class Process:
    """One process of the run. A failure ends it, as it does without Ray, and Ray tells the driver."""

    def place(self) -> tuple[str, int]:
        """Returns the node that it is on and its process id there."""
        return ray.get_runtime_context().get_node_id(), os.getpid()

    def address(self) -> str:
        """Returns HOST:PORT with a port that is free here."""
        with socket.socket() as free:
            free.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"

    def run(self, command: list[str], address: str, number: int, index: int) -> int:
        """Runs the command as process `index` of `number`; JAX starts here. Returns its exit status."""
        from flax_switch.cli import main

        found = ["--coordinator-address", address, "--num-processes", str(number), "--process-id", str(index)]
        return main([*command, "--distributed", *found])


def stop(node: str, process: int) -> None:
    """Sends SIGTERM to a process of a node; the others hear of it from there."""

    def there() -> None:
        os.kill(process, signal.SIGTERM)

    where = NodeAffinitySchedulingStrategy(node, soft=False)
    ray.get(ray.remote(num_cpus=0, scheduling_strategy=where)(there).remote())


def run(args: argparse.Namespace) -> int:
    """Starts the actors and waits for all of them; returns the command's exit status."""
    options: dict[str, Any] = dict(num_cpus=args.num_cpus, num_gpus=args.num_gpus, scheduling_strategy="SPREAD")
    if args.num_tpus:
        options["resources"] = {"TPU": args.num_tpus}
    actors = [ray.remote(Process).options(**options).remote() for _ in range(args.num_processes)]
    first, address = ray.get([actors[0].place.remote(), actors[0].address.remote()])
    running = [actor.run.remote(args.command, address, args.num_processes, i) for i, actor in enumerate(actors)]
    stopped = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.append(True))
    waiting, status = running, 0
    while waiting:
        done, waiting = ray.wait(waiting, timeout=1)
        if stopped:
            stopped.clear()
            stop(*first)
        for one in done:
            try:
                status = status or ray.get(one)
            except ray.exceptions.RayActorError:  # what it had to say is on the screen
                status = status or 1
    return status


def main() -> int:
    """Reads the arguments, and joins the cluster, or starts one on this machine where there is none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-processes", type=int, required=True, metavar="N", help="actors, each with what follows")
    parser.add_argument("--num-cpus", type=float, default=1, metavar="N", help="of an actor; default: 1")
    parser.add_argument("--num-gpus", type=float, default=0, metavar="N", help="of an actor; default: none")
    parser.add_argument("--num-tpus", type=int, default=0, metavar="N", help="chips of an actor, which is one for each host")
    parser.add_argument("--address", help="of the Ray cluster; default: the one that Ray finds, else one on this machine")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and a command of flax-switch with its arguments")
    args = parser.parse_args()
    args.command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not args.command:
        parser.error("name a command of flax-switch after --")
    ray.init(address=args.address, log_to_driver=True)
    return run(args)


if __name__ == "__main__":
    sys.exit(main())
