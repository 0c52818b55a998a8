"""Adafactor (1804.04235) as T5X uses it, with experts and scanned layers as batch axes.

`optax.adafactor` factors the two largest axes of a kernel and takes one RMS over all of it. For a stack of experts [E, D, F]
that would mix the statistics of different experts, and make them depend on how many there are. Here every expert (and every
scanned layer) has its own factored second moments, parameter scale and update clipping, as if it were a parameter of its own.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flax_switch.training.parameter_scale import own_axes, parameter_scale, rms

_TINY = 1e-30  # keeps second moments of zero gradients positive


class AdafactorState(NamedTuple):
    """Second moments: `row` and `col` of factored parameters, `full` of the others; (1,) zeros where not used."""

    count: jax.Array
    row: Any
    col: Any
    full: Any


def factored_axes(shape: tuple[int, ...], axes: tuple[str, ...], min_size: int) -> tuple[int, int] | None:
    """Returns the (row, column) axes whose means are kept in place of full second moments, or None.

    Parameters with batch axes factor their two other axes whatever their size; others only where both are at least `min_size`.
    """
    own = own_axes(axes)
    if len(own) != 2:
        return None
    if len(own) == len(axes) and min(shape) < min_size:
        return None
    # The larger axis is the column, as upstream: it decides nothing but the layout of the state.
    row, col = own if len(own) < len(axes) else sorted(own, key=lambda i: shape[i])
    return row, col


def state_axes(shape: tuple[int, ...], axes: tuple[str, ...], min_size: int) -> tuple[tuple, tuple, tuple]:
    """Returns logical axes of a parameter's row, col and full statistics."""
    factors = factored_axes(shape, axes, min_size)
    if factors is None:
        return (None,), (None,), axes
    row, col = factors
    return _without(axes, col), _without(axes, row), (None,)


def adafactor(
    axes: Any,
    learning_rate: optax.Schedule,
    *,
    decay_rate: float = 0.8,
    multiply_by_parameter_scale: bool = True,
    min_dim_size_to_factor: int = 128,
    clipping_threshold: float | None = 1.0,
) -> optax.GradientTransformation:
    """Makes the Adafactor transformation, without momentum.

    Args:
      axes: the tree of logical axis names (tuples) of the parameters, from `logical_axes`.
      learning_rate: of the step, relative to each parameter's RMS where `multiply_by_parameter_scale`.
      decay_rate: second moments decay by 1 - (step + 1)**-decay_rate.
      clipping_threshold: updates whose RMS exceeds it are scaled down to it, each expert on its own; None turns it off.
    """

    def init(params):
        def zeros(part):
            def one(param, names):
                factors = factored_axes(param.shape, names, min_dim_size_to_factor)
                if factors is None:
                    shape = param.shape if part == "full" else (1,)
                else:
                    row, col = factors
                    shape = {"row": _without(param.shape, col), "col": _without(param.shape, row), "full": (1,)}[part]
                return jnp.zeros(shape, jnp.float32)

            return jax.tree.map(one, params, axes)

        return AdafactorState(jnp.zeros((), jnp.int32), zeros("row"), zeros("col"), zeros("full"))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        decay = 1.0 - (state.count.astype(jnp.float32) + 1.0) ** -decay_rate
        step_size = learning_rate(state.count)

        def one(grad, param, names, row, col, full):
            grad = grad.astype(jnp.float32)
            square = jnp.square(grad) + _TINY
            factors = factored_axes(param.shape, names, min_dim_size_to_factor)
            if factors is None:
                full = decay * full + (1 - decay) * square
                update = grad * jax.lax.rsqrt(full)
            else:
                r, c = factors
                row = decay * row + (1 - decay) * square.mean(c)
                col = decay * col + (1 - decay) * square.mean(r)
                row_mean = row.mean(r - (c < r), keepdims=True)
                update = grad * jnp.expand_dims((row / row_mean) ** -0.5, c) * jnp.expand_dims(col**-0.5, r)
            if clipping_threshold is not None:
                update /= jnp.maximum(1.0, rms(update, own_axes(names)) / clipping_threshold)
            scale = jnp.asarray(step_size)
            if multiply_by_parameter_scale:
                scale = scale * parameter_scale(param, names)
            return -scale * update, row, col, full

        results = jax.tree.map(one, updates, params, axes, state.row, state.col, state.full)
        is_result = lambda x: isinstance(x, tuple)  # noqa: E731
        updates, row, col, full = (jax.tree.map(lambda r: r[i], results, is_leaf=is_result) for i in range(4))  # noqa: B023
        return updates, AdafactorState(state.count + 1, row, col, full)

    return optax.GradientTransformation(init, update)


def _without(items: tuple, index: int) -> tuple:
    return items[:index] + items[index + 1 :]
