"""How an operation picks one of its implementations: the one asked for, or the one for the platform a program is compiled for."""

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
from jax import lax

from flax_switch.config import one_of
from flax_switch.host.compilers import can_compile_for

T = TypeVar("T")

# Other accelerators' branches need not be traced.
POSSIBLE = ("cpu", *(platform for platform in ("tpu", "cuda") if can_compile_for(platform)))


@runtime_checkable
class Gpu(Protocol):
    """An NVIDIA GPU, as kernels for it are picked and made: one that is here, or one that a plan describes."""

    @property
    def device_kind(self) -> str:
        """Its name."""
        ...

    @property
    def capability(self) -> tuple[int, int]:
        """Its generation, as NVIDIA numbers them: (9, 0) is Hopper."""
        ...

    @property
    def multiprocessors(self) -> int:
        """How many it has."""
        ...


class GpuHere(NamedTuple):
    """The first GPU of this process."""

    device_kind: str
    capability: tuple[int, int]
    multiprocessors: int


_TARGET: ContextVar[tuple[str, Gpu | None] | None] = ContextVar("target", default=None)


@contextlib.contextmanager
def compiled_for(platform: str, gpu: Gpu | None = None) -> Iterator[None]:
    """Has what is traced meanwhile be for a platform ("cpu", "gpu" or "tpu") that need not be here, as a plan's programs are."""
    token = _TARGET.set((platform, gpu))
    try:
        yield
    finally:
        _TARGET.reset(token)


def target() -> str:
    """Returns the platform that a program being traced is most likely for, where shapes are chosen by it."""
    described = _TARGET.get()
    return described[0] if described else jax.default_backend()


def gpu() -> Gpu | None:
    """Returns the NVIDIA GPU that a program being traced is for; None where it is for none, or nothing is known of it."""
    described = _TARGET.get()
    return described[1] if described else _gpu_here()


@functools.cache
def _gpu_here() -> GpuHere | None:
    if jax.default_backend() != "gpu":
        return None
    device = jax.local_devices()[0]
    capability = re.fullmatch(r"(\d+)\.(\d+)", str(device.compute_capability))  # other vendors write letters
    if capability is None:
        return None
    return GpuHere(device.device_kind, (int(capability[1]), int(capability[2])), device.core_count)


def run(implementations: Mapping[str, Callable[..., T]], default: Mapping[str, str], implementation: str | None, *args) -> T:
    """Calls the implementation of this name, or for None the one that `default` names for the program's platform.

    default: a name for some of "cpu", "tpu" and "cuda", and for "other".
    """
    if implementation is not None:
        one_of("implementation", implementation, tuple(implementations))
        return implementations[implementation](*args)
    here = {platform: implementations[name] for platform, name in default.items() if platform in POSSIBLE}
    other = implementations[default["other"]]
    return lax.platform_dependent(*args, default=other, **here) if here else other(*args)
