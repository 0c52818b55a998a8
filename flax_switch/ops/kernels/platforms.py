"""How an operation picks one of its implementations: the one asked for, or the one for the platform a program is compiled for."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import TypeVar

import jax
from jax import lax

from flax_switch.config import one_of
from flax_switch.host.compilers import can_compile_for

T = TypeVar("T")

# Other accelerators' branches need not be traced.
POSSIBLE = ("cpu", *(platform for platform in ("tpu", "cuda") if can_compile_for(platform)))

_TARGET: ContextVar[str | None] = ContextVar("target", default=None)


@contextlib.contextmanager
def compiled_for(platform: str) -> Iterator[None]:
    """Has what is traced meanwhile be for a platform ("cpu", "gpu" or "tpu") that need not be here, as a plan's programs are."""
    token = _TARGET.set(platform)
    try:
        yield
    finally:
        _TARGET.reset(token)


def target() -> str:
    """Returns the platform that a program being traced is most likely for, where shapes are chosen by it."""
    return _TARGET.get() or jax.default_backend()


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
