"""Picks the executor of a routing plan by the plan's shape and by the platform that a program is compiled for."""

import functools
import logging
from collections.abc import Callable
from typing import NamedTuple

import jax
from jaxtyping import Array

from flax_switch.ops.kernels import Size

log = logging.getLogger(__name__)


class Choice(NamedTuple):
    """An executor's name for programs that run on CPU, and for those that run elsewhere."""

    cpu: str
    elsewhere: str


def choose(
    executor: str,
    *,
    groups: tuple[Size, ...],
    capacity: int | None,
    num_experts: int,
    unstacked: bool,
    split: bool = False,
) -> Choice:
    """Returns the executor that a config asks for; for "auto" the one that suits the plan's shape, which the log tells once.

    groups: G, S and N of the plan. capacity: None where it is dropless. unstacked: whether experts are arrays of their own, too.
    split: whether experts lie on several devices, none of which can read all.
    """
    G, S, N = groups
    if executor not in ("auto", "hit"):
        return Choice(executor, executor)
    usual = "ragged" if capacity is None else "gather"
    if split:
        return Choice(usual, usual)
    if executor == "hit" and S == 1:
        return Choice("hit", "hit")
    # With more than 1.5 places for each choice buffers are mostly empty, and a CPU does better to sort the tokens. Hugging Face's
    # fixed capacity of 64 tokens is such a case: 8 experts have 512 places for a sequence of 256.
    on_cpu = usual if capacity is None or num_experts * capacity <= 1.5 * S * N else "ragged"
    few = S == 1 and num_experts > G * N
    chosen = Choice("hit" if S == 1 and unstacked else on_cpu, "hit" if few else usual)
    shape = f"{G * N} choices of {num_experts} experts" if S == 1 else "dropless plans" if capacity is None else "a static capacity"
    _announce(executor, chosen, shape)
    return chosen


def run_chosen(choice: Choice, implementation: Callable[[str], Callable[[Array], Array]], x: Array) -> Array:
    """Runs the implementation of the executor that was chosen for the platform, on `x`."""
    cpu, elsewhere = (implementation(name) for name in choice)
    return cpu(x) if choice.cpu == choice.elsewhere else jax.lax.platform_dependent(x, cpu=cpu, default=elsewhere)


def of_buffers(choice: Choice) -> str:
    """Returns which executor fills buffers that travel to other devices: the chosen one, or "gather", which the log tells once."""
    if choice.elsewhere in ("einsum", "gather"):
        return choice.elsewhere
    _replaced(choice.elsewhere)
    return "gather"


@functools.cache
def _announce(asked: str, choice: Choice, shape: str) -> None:
    log.info("moe_executor=%r runs %r on CPU and %r elsewhere, for %s.", asked, *choice, shape)


@functools.cache
def _replaced(asked: str) -> None:
    log.warning("moe_executor=%r has no buffers, in which a static capacity travels between devices: 'gather' runs there.", asked)
