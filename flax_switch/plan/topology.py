"""Machines by name: `v5p:8x8x8`, `h100:8`, `cpu:8`. What a chip has, and devices to compile for without having them."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

from flax_switch.config import ConfigError, check

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of device. `memory` is what a program may use of it, in bytes; None where that is the host's."""

    name: str
    platform: str  # "tpu", "gpu" or "cpu"
    memory: int | None
    peak_flops: float | None  # bfloat16, per second
    dimensions: int = 1  # of a slice's shape


# Of TPUs the memory that XLA says is available; of GPUs the data sheet's. Peaks are of the data sheets, without sparsity.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "tpu", int(15.75 * GIB), 197e12, 2),
        Chip("v6e", "tpu", int(31.25 * GIB), 918e12, 2),
        Chip("v5p", "tpu", int(95.74 * GIB), 459e12, 3),
        Chip("a100", "gpu", 80 * 10**9, 312e12),
        Chip("h100", "gpu", 80 * 10**9, 989e12),
        Chip("h200", "gpu", 141 * 10**9, 989e12),
        Chip("cpu", "cpu", None, None),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """So many chips of a kind, for TPUs in a grid."""

    name: str
    chip: Chip
    num_devices: int


class CannotCompile(Exception):
    """Programs for this topology cannot be compiled here; the message says what it would take."""


def parse_topology(name: str) -> Topology:
    """The topology called `name`: a chip, a colon, and a grid (v5e and v6e 4x4, v5p 4x4x8) or a number of devices.

    Raises `ConfigError` that names the chips known and the form expected.
    """
    chip_name, colon, shape = name.partition(":")
    chip = CHIPS.get(chip_name.lower())
    known = ", ".join(_example(c) for c in CHIPS.values())
    check(chip is not None, f"There is no topology {name!r}: {chip_name!r} is no chip known here. Write one like {known}.")
    form = f"{chip.name} topologies are written like {_example(chip)}"
    check(bool(colon) and re.fullmatch(r"\d+(x\d+)*", shape) is not None, f"{form}; this is {name!r}.")
    sizes = [int(size) for size in shape.split("x")]
    check(
        len(sizes) == chip.dimensions and min(sizes) >= 1,
        f"{form}, with {chip.dimensions} size(s) of at least 1; {name!r} has {len(sizes)}.",
    )
    return Topology(f"{chip.name}:{shape}", chip, math.prod(sizes))


def _example(chip: Chip) -> str:
    return f"{chip.name}:{'x'.join(['4'] * chip.dimensions) if chip.platform == 'tpu' else 8}"


def compile_devices(topology: Topology) -> list[Any]:
    """Devices that programs can be compiled for: described ones of a TPU, the machine's own of a GPU or processor.

    Raises `CannotCompile` where there are none, and `ConfigError` where libtpu knows no such slice.
    """
    chip = topology.chip
    return _described_tpus(topology) if chip.platform == "tpu" else _local_devices(topology)


def _described_tpus(topology: Topology) -> list[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise CannotCompile(
            "libtpu, the compiler for TPUs, is not installed; it needs no TPU: pip install 'flax_switch[tpu]' (on Linux)."
        )
    # Nothing here is a TPU host: without these, libtpu asks the network who it is, and says at length that no one answered.
    for variable, value in {
        "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_HOST_BOUNDS": "1,1,1", "TPU_MIN_LOG_LEVEL": "3", "TF_CPP_MIN_LOG_LEVEL": "3", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():  # fmt: skip
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=topology.name)
    except Exception as error:  # JaxRuntimeError or NotImplementedError, by version
        raise ConfigError(
            f"libtpu knows no slice {topology.name!r}; sizes are powers of two or multiples of four. "
            f"It says: {str(error).splitlines()[0]}"
        ) from error
    return list(description.devices)


def _local_devices(topology: Topology) -> list[Any]:
    import jax

    chip, count = topology.chip, topology.num_devices
    try:
        devices = [d for d in jax.devices(chip.platform) if chip.platform == "cpu" or chip.name in d.device_kind.lower()]
    except RuntimeError:  # no such backend
        devices = []
    if len(devices) >= count:
        return devices[:count]
    if chip.platform == "cpu":
        raise CannotCompile(
            f"this process sees {len(devices)} processor device(s); start it with "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count} NPROC=32 to see {count}."
        )
    raise CannotCompile(
        f"GPU programs are compiled for GPUs at hand, and this machine shows {len(devices)} {chip.name} to JAX; run the same "
        f"command where there are {count} (pip install 'flax_switch[cuda]')."
    )
