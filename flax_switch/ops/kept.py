"""What a function keeps for the backward pass: its arguments, where JAX would keep what it computed on the way."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array


def keep_arguments(function: Callable[..., Array], *arguments: Any) -> Array:
    """Returns `function(*arguments)`; the backward pass calls it again.

    It must not refer to traced arrays that are no arguments. It pays for what is cheap beside the arrays it makes: in a scan over
    layers every array that JAX keeps is there once for each layer, in the dtype it was computed in.
    """
    return _kept(function, *arguments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kept(function: Callable[..., Array], *arguments: Any) -> Array:
    return function(*arguments)


def _forward(function: Callable[..., Array], *arguments: Any) -> tuple[Array, tuple[Any, ...]]:
    return function(*arguments), arguments


def _backward(function: Callable[..., Array], arguments: tuple[Any, ...], gradient: Array) -> tuple[Any, ...]:
    return jax.vjp(function, *arguments)[1](gradient)


_kept.defvjp(_forward, _backward)
