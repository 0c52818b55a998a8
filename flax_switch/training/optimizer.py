"""The optimiser an `OptimizerConfig` describes, and the logical axes of its state."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from flax_switch.config import OptimizerConfig
from flax_switch.parallel.placement import ONE_DEVICE, Placement
from flax_switch.training.adafactor import AdafactorState, adafactor, state_axes
from flax_switch.training.muon import muon_scale, scale_by_muon
from flax_switch.training.parameter_scale import parameter_scale, scale_by_parameter_scale


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns the learning rate by step. `rsqrt` is T5's: learning_rate / sqrt(max(step, warmup_steps))."""
    peak, warmup = config.learning_rate, config.warmup_steps
    if config.schedule == "rsqrt":
        return lambda step: peak * jax.lax.rsqrt(jnp.maximum(jnp.asarray(step, jnp.float32), max(warmup, 1)))
    if config.schedule == "constant":
        after = optax.constant_schedule(peak)
    elif config.schedule == "linear":
        after = optax.linear_schedule(peak, config.final_learning_rate, max(steps - warmup, 1))
    else:
        after = optax.cosine_decay_schedule(peak, max(steps - warmup, 1), alpha=config.final_learning_rate / peak)
    if warmup == 0:
        return after
    # Step 0 already moves: the ramp reaches the peak at step `warmup` - 1.
    return optax.join_schedules([optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1)), after], [warmup])


def build_optimizer(config: OptimizerConfig, axes: Any, steps: int) -> optax.GradientTransformationExtraArgs:
    """Makes the gradient transformation for parameters whose logical axes are `axes`.

    Both are the trained part alone where `config.trainable` leaves parameters out (`freezing.trainable_part`). `update` takes
    `norm`, that of the gradients (`global_norm`); clipping computes it where it is not given.
    """
    schedule = learning_rate_schedule(config, steps)
    if config.name == "adafactor":
        optimizer = adafactor(
            axes,
            schedule,
            decay_rate=config.decay_rate,
            multiply_by_parameter_scale=config.multiply_by_parameter_scale,
            min_dim_size_to_factor=config.min_dim_size_to_factor,
            clipping_threshold=config.clipping_threshold,
        )
    elif config.name == "adamw":
        optimizer = optax.adamw(schedule, config.b1, config.b2, config.eps, weight_decay=config.weight_decay)
    else:
        betas, muon = (config.b1, config.b2, config.eps), config.name == "muon"
        optimizer = optax.chain(
            scale_by_muon(axes, *betas) if muon else optax.scale_by_adam(*betas),
            scale_by_parameter_scale(axes, muon_scale if muon else parameter_scale),
            optax.add_decayed_weights(config.weight_decay),
            optax.scale_by_learning_rate(schedule),
        )
    if config.clip_global_norm is not None:
        optimizer = optax.chain(_clip_by_global_norm(config.clip_global_norm), optimizer)
    return optax.with_extra_args_support(optimizer)


def global_norm(grads: Any, by_expert: Any = None, devices: Placement = ONE_DEVICE) -> jax.Array:
    """Returns the norm of all gradients; under pmap also of those whose experts (`by_expert`: True) other devices hold."""
    by_expert = jax.tree.map(lambda _: False, grads) if by_expert is None else by_expert
    squares = [(_sum_of_squares(g), e) for g, e in zip(jax.tree.leaves(grads), jax.tree.leaves(by_expert), strict=True)]
    own = iter(devices.sum_over_experts([square for square, e in squares if e]))
    return jnp.sqrt(sum(next(own) if e else square for square, e in squares))


def _sum_of_squares(x: jax.Array) -> jax.Array:
    """Sums x**2. XLA must not see that the optimiser squares x too: it would store one square for both, and read it twice."""
    return (x * jax.lax.optimization_barrier(x)).sum()


def _clip_by_global_norm(limit: float) -> optax.GradientTransformationExtraArgs:
    """`optax.clip_by_global_norm`, by the norm that `update` is given."""

    def update(updates: Any, state: Any, params: Any = None, *, norm: jax.Array | None = None, **_: Any) -> tuple[Any, Any]:
        norm = global_norm(updates) if norm is None else norm
        return jax.tree.map(lambda g: jnp.where(norm < limit, g, g / norm.astype(g.dtype) * limit), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def optimizer_state_axes(state: Any, params: Any, axes: Any, config: OptimizerConfig) -> Any:
    """Returns the tree of logical axes of an optimiser's state: statistics are split like the parameter they belong to."""
    # Muon's and Adam's parts of a state leave out each other's parameters, so what a leaf is of is told by the end of its path.
    names = dict(zip(_paths(params), jax.tree.structure(params).flatten_up_to(axes), strict=True))

    def axes_of(path, node):
        if isinstance(node, AdafactorState):
            return _adafactor_axes(node, params, axes, config)
        ends = (path[i:] for i in range(len(path)))
        return next((names[end] for end in ends if end in names), (None,) * len(node.shape))

    return jax.tree_util.tree_map_with_path(axes_of, state, is_leaf=lambda node: isinstance(node, AdafactorState))


def _paths(tree: Any) -> list[tuple]:
    return [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def _adafactor_axes(state: AdafactorState, params: Any, axes: Any, config: OptimizerConfig) -> AdafactorState:
    """Returns the (row, col, full) statistics of each parameter as three trees."""
    parts = jax.tree.map(lambda p, names: state_axes(p.shape, names, config.min_dim_size_to_factor), params, axes)
    leaves = jax.tree.structure(params).flatten_up_to(parts)
    row, col, full = (jax.tree.structure(params).unflatten([leaf[i] for leaf in leaves]) for i in range(3))
    return state._replace(count=(), row=row, col=col, full=full)
