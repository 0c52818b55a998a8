"""Constrained decoding: what a function of the prefix allows next. The compiled loop asks it on the host, between two steps.

A program knows a function by a number, which is one of its inputs: one program serves every function.
"""

import itertools
import operator
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from flax_switch.config import ConfigError, check
from flax_switch.config.ranges import shown
from flax_switch.ops import Size

PrefixFunction = Callable[[int, np.ndarray], Iterable[int]]  # (number of the source, its tokens so far) -> ids allowed next

_numbers = itertools.count()
_constraints: weakref.WeakValueDictionary[int, "Constraint"] = weakref.WeakValueDictionary()  # programs outlive them


class Constraint:
    """A `prefix_allowed_tokens_fn` while a program asks it."""

    def __init__(self, function: PrefixFunction, padding: Int[np.ndarray, " B"], vocab_size: int, ends: tuple[int, ...] = ()):
        """Takes the function, and how many places of each source's rows are padding, which it is not shown.

        ends: tokens after which it may allow nothing.
        """
        check(
            callable(function),
            "prefix_allowed_tokens_fn must be a function of a source's number and its tokens so far, which returns the ids allowed "
            f"next; it is {shown(function)}.",
        )
        self.function, self.padding, self.vocab_size, self.ends = function, padding, vocab_size, ends
        self.failure: BaseException | None = None  # what the function raised, or what is wrong with what it returned
        self.number = next(_numbers) % 2**31
        _constraints[self.number] = self

    def check_met(self) -> None:
        """Raises what ended the search, if the function did."""
        if self.failure is not None:
            raise self.failure

    def allowed(self, source: int, tokens: Int[np.ndarray, " length"]) -> np.ndarray:
        """Returns the ids that the function allows after a source's tokens; raises where it allows none, or what is no id."""
        found = self.function(source, tokens)
        where = f"prefix_allowed_tokens_fn, asked for source {source} after the ids {shown(tokens.tolist())},"
        try:
            ids = [operator.index(token) for token in found]
        except TypeError:
            raise ConfigError(f"{where} must return a list of ids; it returned {shown(found)}.") from None
        check(
            len(ids) > 0 or int(tokens[-1]) in self.ends,
            f"{where} allows no token, so that nothing can follow; return at least one id, such as EOS where a sequence is whole.",
        )
        bad = next((token for token in ids if not 0 <= token < self.vocab_size), None)
        check(bad is None, f"{where} allows {bad}, which is no id of the vocabulary of {self.vocab_size}.")
        return np.array(ids, int)


def allowed_tokens(
    number: Int[Array, ""],
    tokens: Int[Array, "R T"],
    length: Int[Array, ""],
    asked: Bool[Array, " R"],
    sources: Size,
    vocab_size: int,
) -> tuple[Bool[Array, "R V"], Bool[Array, ""]]:
    """Returns what the constraint with this number allows after the rows' first `length` tokens, and whether it has failed.

    R is a multiple of `sources`, and rows of a source are neighbours. Nothing is allowed for rows that are not `asked`, and to none
    where the constraint has failed.
    """
    shapes = jax.ShapeDtypeStruct((tokens.shape[0], vocab_size), jnp.bool_), jax.ShapeDtypeStruct((), jnp.bool_)

    def ask(*inputs: Any) -> tuple[np.ndarray, np.bool_]:
        return _ask(sources, vocab_size, *map(np.asarray, inputs))

    return jax.pure_callback(ask, shapes, number, tokens, length, asked)


def _ask(sources: int, vocab_size: int, number, tokens, length, asked) -> tuple[np.ndarray, np.bool_]:
    allowed = np.zeros((len(tokens), vocab_size), bool)
    constraint = _constraints.get(int(number))
    if constraint is None or constraint.failure is not None:
        return allowed, np.bool_(True)
    try:
        for row in np.flatnonzero(asked):
            source = int(row) * sources // len(tokens)
            allowed[row, constraint.allowed(source, tokens[row, constraint.padding[source] : int(length)].copy())] = True
    except BaseException as failure:  # `check_met` raises it where the program was called: JAX would raise one of its own
        constraint.failure = failure
    return allowed, np.bool_(constraint.failure is not None)
