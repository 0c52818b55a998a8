"""Writes goldens/KIND.PLATFORM.jax-VERSION.hlo.txt: a program of each kind of collective, as the JAX installed here compiles it.

    NPROC=32 python tests/plan/make_goldens.py          # run it once with each supported version of JAX

Programs for TPUs and NVIDIA GPUs are written, too, where their compilers are installed. Metadata and what backends configure are
cut out, but for loops' trip counts.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flax_switch.plan.topology import CannotCompile, compile_devices, parse_topology

FOLDER = Path(__file__).parent / "goldens"
TOPOLOGIES = {"cpu": "cpu:8", "tpu": "v5e:2x4", "cuda": "h100:8"}
ALL = ("data", "expert")


def _ragged(x):
    offsets, sizes = jnp.arange(4, dtype=jnp.int32) * 32, jnp.full(4, 32, jnp.int32)
    return lax.ragged_all_to_all(x, jnp.zeros_like(x), offsets, sizes, offsets, sizes, axis_name="expert")


def _loop(x):
    exchange = lambda y, _: (lax.all_to_all(jnp.sin(y), "expert", 0, 0, tiled=True), None)  # noqa: E731
    return lax.scan(exchange, x, None, length=3)[0]


# Every device holds 128 x 256 float32, 128 KiB, of an array that is cut over all of them.
BODIES = {
    "all-to-all": lambda x: lax.all_to_all(x, "expert", 0, 0, tiled=True),
    "all-to-all-in-a-loop": _loop,
    "all-gather": lambda x: lax.all_gather(x, "expert", tiled=True).reshape(4, 128, 256).sum(0) * x,
    "all-reduce": lambda x: lax.psum(x, "data"),
    "all-reduce-over-all": lambda x: lax.psum(x, ("expert", "data")),
    "reduce-scatter": lambda x: jnp.tile(lax.psum_scatter(x, "expert", tiled=True), (4, 1)),
    "collective-permute": lambda x: lax.ppermute(x, "expert", [(i, (i + 1) % 4) for i in range(4)]),
    "ragged-all-to-all": _ragged,
}


def compiled_text(name: str, devices: list) -> str:
    """The program called `name`, compiled for eight devices in a mesh of 2 x 4."""
    mesh = Mesh(np.array(devices).reshape(2, 4), ALL)
    if name == "parts-of-an-axis":  # GSPMD cuts an axis of eight in two
        mesh = Mesh(np.array(devices), ("all",))
        f = jax.jit(
            lambda x: x.reshape(4, 256, 256).sum(0),
            in_shardings=NamedSharding(mesh, P("all")),
            out_shardings=NamedSharding(mesh, P()),
        )
    else:
        f = jax.jit(jax.shard_map(BODIES[name], mesh=mesh, in_specs=P(ALL), out_specs=P(ALL), check_vma=False))
    x = jax.ShapeDtypeStruct((1024, 256), jnp.float32, sharding=NamedSharding(mesh, P(mesh.axis_names)))
    return f.lower(x).compile().as_text()


def trimmed(text: str) -> str:
    """The program without what no reader of it looks at."""
    text = re.sub(r"\nFileNames\n.*?(?=\n(?:%|ENTRY))", "", text, flags=re.DOTALL)  # tables of source lines
    text = re.sub(
        r", (?:metadata|frontend_attributes|sharding|control-predecessors|origin)=\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}", "", text
    )

    def keep(match: re.Match[str]) -> str:
        found = re.search(r'"known_trip_count":\{"n":"\d+"\}', match.group(0))
        return f", backend_config={{{found.group(0)}}}" if found else ""

    return re.sub(r", backend_config=[^\n]*", keep, text).rstrip() + "\n"


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for platform, topology in TOPOLOGIES.items():
        try:
            devices = compile_devices(parse_topology(topology))
        except CannotCompile as why:
            print(f"{platform}: {why}")
            continue
        for name in (*BODIES, "parts-of-an-axis"):
            if platform == "cpu" and name == "ragged-all-to-all":
                continue  # XLA has none there
            file = FOLDER / f"{name}.{platform}.jax-{jax.__version__}.hlo.txt"
            file.write_text(trimmed(compiled_text(name, devices)), encoding="utf-8")
            print(file.name, file.stat().st_size)


if __name__ == "__main__":
    main()
