"""What people give a model: ids and masks as lists, single rows or the arrays of any library, made arrays and checked once."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int

from flax_switch.config import ConfigError, SwitchConfig, check
from flax_switch.host.foreign_arrays import from_torch, is_torch
from flax_switch.ops import AnyArray
from flax_switch.ops.ids import check_ids
from flax_switch.ops.losses import IGNORED_LABEL

if TYPE_CHECKING:

    class SupportsArray(Protocol):
        """An array of jax, numpy, torch or another library."""

        def __array__(self, *arguments: Any, **named: Any) -> np.ndarray[Any, Any]: ...

    TokenIds = SupportsArray | Sequence[int] | Sequence[Sequence[int]]  # rows of tokens, or one row
else:
    SupportsArray = TokenIds = Any  # checked here, in words of our own


def as_array(name: str, value: Any) -> AnyArray:
    """Returns numbers as an array: a jax or numpy array itself, lists and other libraries' arrays as numpy.

    Raises `ConfigError` for text, and for rows of different lengths.
    """
    if isinstance(value, (jax.Array, np.ndarray)):
        return value
    check(
        not isinstance(value, str) and not (isinstance(value, (list, tuple)) and value and isinstance(value[0], str)),
        f"{name} is text, where a model takes ids; call it with **model.vocabulary(text, padding=True), or `model.generate(text)`.",
    )
    if is_torch(value):
        return from_torch(value)
    try:
        return np.asarray(value)
    except ValueError as error:  # numpy's words speak of an inhomogeneous shape
        raise ConfigError(
            f"{name} has rows of different lengths; pad them to one and say in attention_mask which tokens are real, as "
            "vocabulary(texts, padding=True) does."
        ) from error


def as_ids(name: str, value: Any, config: SwitchConfig, *, ignored: bool = False) -> Int[AnyArray, "B L"]:
    """Returns ids as an int32 array [rows, tokens] with at least one of each; a single row [tokens] becomes one of a batch.

    Args:
      value: lists, or an array of any library. Values that are traced, or that lie on other processes' devices, are not looked at.
      ignored: whether -100 may stand for "no id", as it does in labels.

    Raises:
      ConfigError: naming what is wrong: the shape, the dtype, or the first value that is no id.
    """
    ids = as_array(name, value)
    ids = ids[None] if ids.ndim == 1 else ids
    check(
        ids.ndim == 2 and ids.size > 0,
        f"{name} must be an array [rows, tokens], or one row [tokens], with at least one of each; its shape is "
        f"{list(np.shape(value))}. An empty text still has an EOS token.",
    )
    check(np.issubdtype(ids.dtype, np.integer), f"{name} must hold integers; its dtype is {ids.dtype}.")
    check_ids(name, ids, config.vocab_size, besides=IGNORED_LABEL if ignored else None)
    return ids.astype(np.int32)


def as_mask(name: str, value: Any, shape: Sequence[int], of: str = "input_ids") -> AnyArray:
    """Returns a mask as booleans, True at tokens, in the shape of what it is a mask `of`; raises `ConfigError` for another one."""
    mask = as_array(name, value)
    mask = mask[None] if mask.ndim == 1 else mask
    check(mask.shape == tuple(shape), f"{name} must have the shape of {of}, {list(shape)}; it is {list(mask.shape)}.")
    return mask.astype(bool)


def check_alive(name: str, tree: Any, instead: str) -> None:
    """Raises `ConfigError` for arrays that a step took over, whose memory is its result's; `instead` says what to use."""
    first = next(iter(jax.tree.leaves(tree)), None)
    used = isinstance(first, jax.Array) and not isinstance(first, Tracer) and first.is_deleted()
    check(not used, f"{name} were used up by a train step, which writes its result in their place; {instead}.")


def as_embeddings(name: str, value: Any, config: SwitchConfig) -> AnyArray:
    """Returns embeddings as an array of floats [rows, tokens, D]; raises `ConfigError` for another shape or kind."""
    embeds = as_array(name, value)
    check(
        embeds.ndim == 3 and embeds.shape[2] == config.d_model and jnp.issubdtype(embeds.dtype, np.floating),
        f"{name} must be an array of floats [rows, tokens, d_model={config.d_model}]; it is {embeds.dtype}{list(embeds.shape)}.",
    )
    return embeds


def shift_right(labels: Int[AnyArray, "B L"], config: SwitchConfig) -> Int[Array, "B L"]:
    """Returns decoder inputs for labels: the start token, then the labels but the last; -100 becomes padding."""
    labels = jnp.asarray(labels)
    start = jnp.full_like(labels[:, :1], config.decoder_start_token_id)
    shifted = jnp.concatenate([start, labels[:, :-1]], axis=1)
    return jnp.where(shifted == IGNORED_LABEL, config.pad_token_id, shifted)
