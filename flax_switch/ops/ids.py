"""Token ids and labels that have values are checked against the vocabulary; XLA clips those outside, which gives wrong numbers."""

import numpy as np
from jax.core import Tracer

from flax_switch.config import ConfigError
from flax_switch.ops import AnyArray


def check_ids(name: str, ids: AnyArray | None, vocab_size: int, *, besides: int | None = None) -> None:
    """Raises `ConfigError` where an id is none of the vocabulary, nor `besides`: the label that does not count.

    Does nothing where ids have no values yet (under jit and other transformations), or are spread over several processes.
    """
    if ids is None or not is_known(ids):
        return
    values = np.asarray(ids)
    outside = (values < 0) | (values >= vocab_size)
    if besides is not None:
        outside &= values != besides
    if outside.any():
        raise ConfigError(f"{name} holds {values[outside].flat[0]}, which is no id of the vocabulary of {vocab_size}.")


def is_known(values: AnyArray) -> bool:
    """Returns whether an array has values here: it is not traced, nor spread over several processes."""
    return not isinstance(values, Tracer) and getattr(values, "is_fully_addressable", True)
