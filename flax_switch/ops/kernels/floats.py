"""The numbers of a tree that have gradients, apart from its integers: what a gradient written by hand adds up in a loop."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


def floats_of(tree: Any) -> tuple[list[Array], Callable[[Sequence[Array]], Any], Callable[[Sequence[Array]], Any]]:
    """Returns a tree's floats, a function that puts others in their places, and one that makes a gradient of the tree of theirs.

    The gradient has None where the tree has integers, as `jax.custom_vjp` takes it.
    """
    leaves, structure = jax.tree.flatten(tree)
    places = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]

    def tree_of(others: Sequence[Any], floats: Sequence[Array]) -> Any:
        filled = list(others)
        for place, value in zip(places, floats, strict=True):
            filled[place] = value
        return jax.tree.unflatten(structure, filled)

    return (
        [leaves[place] for place in places],
        lambda floats: tree_of(leaves, floats),
        lambda floats: tree_of([None] * len(leaves), floats),
    )
