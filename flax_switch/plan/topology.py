"""Describes machines by name: `v5p:8x8x8`, `h100:8`, `cpu:8`. What a chip has, and devices to compile for without having them."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from typing import Any

from flax_switch.config import ConfigError, check
from flax_switch.host.compilers import can_compile_for
from flax_switch.host.peaks import PEAK_FLOPS

GIB, KIB = 2**30, 2**10
GPUS_OF_A_HOST = 8


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What XLA wants to know of a GPU to compile for it."""

    capability: tuple[int, int]
    multiprocessors: int
    fpus: int  # float32 units of a multiprocessor
    shared_memory: int  # bytes of a multiprocessor; a block may have 1 KiB less
    cache: int  # level 2, in bytes
    bandwidth: int  # of the memory, bytes per second
    clock_ghz: float
    device_kind: str


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of device. `memory` is what a program may use of it, in bytes; None where that is the host's."""

    name: str
    platform: str  # "tpu", "gpu" or "cpu"
    memory: int | None
    peak_flops: float | None  # bfloat16, per second
    dimensions: int = 1  # of a slice's shape
    gpu: Gpu | None = None


# SXM modules, by their data sheets.
AMPERE = Gpu((8, 0), 108, 64, 164 * KIB, 40 * KIB**2, 2_039 * 10**9, 1.41, "NVIDIA A100-SXM4-80GB")
HOPPER = Gpu((9, 0), 132, 128, 228 * KIB, 50 * KIB**2, 3_352 * 10**9, 1.98, "NVIDIA H100 80GB HBM3")
HOPPER_HBM3E = dataclasses.replace(HOPPER, bandwidth=4_800 * 10**9, device_kind="NVIDIA H200")

# Memory: for TPUs what XLA says is available, for GPUs the data sheet's. Peaks are the data sheets', without sparsity.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "tpu", int(15.75 * GIB), PEAK_FLOPS["v5e"], 2),
        Chip("v6e", "tpu", int(31.25 * GIB), PEAK_FLOPS["v6e"], 2),
        Chip("v5p", "tpu", int(95.74 * GIB), PEAK_FLOPS["v5p"], 3),
        Chip("a100", "gpu", 80 * 10**9, PEAK_FLOPS["a100"], 1, AMPERE),
        Chip("h100", "gpu", 80 * 10**9, PEAK_FLOPS["h100"], 1, HOPPER),
        Chip("h200", "gpu", 141 * 10**9, PEAK_FLOPS["h200"], 1, HOPPER_HBM3E),
        Chip("cpu", "cpu", None, None),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A number of chips of one kind, for TPUs in one or more slices, each a grid."""

    name: str
    chip: Chip
    num_devices: int
    slices: int = 1

    @property
    def of_a_slice(self) -> str:
        """The name of one slice."""
        return self.name.rpartition("*")[2]


class CannotCompile(Exception):
    """Programs for this topology cannot be compiled here; the message says what it would take."""


def parse_topology(name: str) -> Topology:
    """Returns the topology called `name`: a chip, a colon, and a grid (v5e and v6e 4x4, v5p 4x4x8) or a number of devices.

    `2*v5e:4x4` is two such slices, joined by the data centre's network. Raises `ConfigError` that names the chips known and the
    form expected.
    """
    many, _, of_a_slice = name.rpartition("*")
    check(not many or (many.isdecimal() and 1 < int(many) <= 10_000), f"Slices are counted as in 2*v5e:4x4; this is {name!r}.")
    chip_name, colon, shape = of_a_slice.partition(":")
    chip = CHIPS.get(chip_name.lower())
    known = ", ".join(_example(c) for c in CHIPS.values())
    if chip is None:
        raise ConfigError(f"There is no topology {name!r}: {chip_name!r} is no chip known here. Write one like {known}.")
    form = f"{chip.name} topologies are written like {_example(chip)}"
    check(bool(colon) and re.fullmatch(r"\d{1,7}(x\d{1,7})*", shape) is not None, f"{form}; this is {name!r}.")
    sizes = [int(size) for size in shape.split("x")]
    check(
        len(sizes) == chip.dimensions and min(sizes) >= 1,
        f"{form}, with {chip.dimensions} size(s) of at least 1; {name!r} has {len(sizes)}.",
    )
    count = math.prod(sizes)
    check(not many or chip.platform == "tpu", f"Only TPUs come in slices; write the number of all devices for {name!r}.")
    check(
        chip.platform != "gpu" or count <= GPUS_OF_A_HOST or count % GPUS_OF_A_HOST == 0,
        f"Hosts have {GPUS_OF_A_HOST} GPUs: {name!r} must have up to {GPUS_OF_A_HOST} of them or a multiple of that.",
    )
    slices = int(many or 1)
    return Topology(f"{f'{slices}*' if many else ''}{chip.name}:{shape}", chip, count * slices, slices)


def _example(chip: Chip) -> str:
    return f"{chip.name}:{'x'.join(['4'] * chip.dimensions) if chip.platform == 'tpu' else 8}"


def compile_devices(topology: Topology) -> list[Any]:
    """Returns devices that programs can be compiled for: described ones for a TPU or GPU, this process's CPU devices for "cpu".

    Raises `CannotCompile` where there are none, and `ConfigError` where there is no such machine.
    """
    describe = {"tpu": _described_tpus, "gpu": _described_gpus, "cpu": _local_cpus}
    return describe[topology.chip.platform](topology)


def _described_tpus(topology: Topology) -> list[Any]:
    if not can_compile_for("tpu"):
        raise CannotCompile(
            "libtpu, the compiler for TPUs, is not installed; it needs no TPU: pip install 'flax_switch[tpu]' (on Linux)."
        )
    # Nothing here is a TPU host: without these, libtpu asks the network who it is, and complains at length that nobody replied.
    for variable, value in {
        "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_HOST_BOUNDS": "1,1,1", "TPU_MIN_LOG_LEVEL": "3", "TF_CPP_MIN_LOG_LEVEL": "3", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():  # fmt: skip
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    try:
        options = {"num_slices": topology.slices} if topology.slices > 1 else {}
        description = topologies.get_topology_desc(platform="tpu", topology_name=topology.of_a_slice, **options)
    except Exception as error:  # JaxRuntimeError or NotImplementedError, by version
        raise ConfigError(
            f"libtpu knows no slice {topology.name!r}; sizes are powers of two or multiples of four. "
            f"It says: {str(error).splitlines()[0]}"
        ) from error
    return list(description.devices)


def _described_gpus(topology: Topology) -> list[Any]:
    if not can_compile_for("cuda"):
        raise CannotCompile(
            "JAX's compiler for NVIDIA GPUs is not installed; it needs no GPU: pip install 'flax_switch[cuda]' (on Linux)."
        )
    from jax.experimental import topologies

    of_a_host = min(topology.num_devices, GPUS_OF_A_HOST)
    shape = f"1x{topology.num_devices // of_a_host}x{of_a_host}"  # slices, hosts, GPUs
    try:
        description = topologies.get_topology_desc(
            platform="cuda", topology_name=topology.name, topology=shape, target_config=_target_config(topology.chip)
        )
    except NotImplementedError as error:  # the plug-in is installed and did not start
        raise CannotCompile(
            f"JAX's compiler for NVIDIA GPUs does not start ({error}): see what it says above, and whether "
            "pip install 'flax_switch[cuda]' mends it."
        ) from error
    return list(description.devices)


def _target_config(chip: Chip) -> str:
    """Returns the chip as XLA's `GpuTargetConfigProto`, in protocol buffers' text format."""
    gpu = chip.gpu
    assert gpu is not None  # of a GPU
    limits = {  # the same for all these generations
        "threads_per_block_limit": 1024, "threads_per_warp": 32, "threads_per_core_limit": 2048,
        "block_dim_limit_x": 2**31 - 1, "block_dim_limit_y": 2**16 - 1, "block_dim_limit_z": 2**16 - 1,
        "registers_per_core_limit": 2**16, "registers_per_block_limit": 2**16, "shared_memory_per_block": 48 * KIB,
    }  # fmt: skip
    own = {
        "core_count": gpu.multiprocessors, "fpus_per_core": gpu.fpus, "shared_memory_per_core": gpu.shared_memory,
        "shared_memory_per_block_optin": gpu.shared_memory - KIB, "l2_cache_size": gpu.cache, "memory_bandwidth": gpu.bandwidth,
        "clock_rate_ghz": gpu.clock_ghz, "device_memory_size": chip.memory,
    }  # fmt: skip
    fields = " ".join(f"{name}: {value}" for name, value in {**limits, **own}.items())
    major, minor = gpu.capability
    return (
        f"gpu_device_info {{ {fields} cuda_compute_capability {{ major: {major} minor: {minor} }} }} "
        f'platform_name: "CUDA" dnn_version_info {{ major: 9 }} device_description_str: "{gpu.device_kind}"'
    )


def _local_cpus(topology: Topology) -> list[Any]:
    import jax

    devices, count = jax.devices("cpu"), topology.num_devices
    if len(devices) >= count:
        return devices[:count]
    raise CannotCompile(
        f"this process sees {len(devices)} CPU device(s); start it with "
        f"XLA_FLAGS=--xla_force_host_platform_device_count={count} NPROC=32 to see {count}."
    )
