"""The state of a run, and how to make one straight into its shardings."""

import dataclasses
import math
from typing import Any, Self

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import unflatten_dict

from flax_switch.config import ExperimentConfig, SwitchConfig
from flax_switch.config.adapter import ADAPTER, AdapterConfig
from flax_switch.config.finetuning import FinetuneConfig
from flax_switch.nn.adapter import adapted, adapter_parts, init_adapter
from flax_switch.nn.fields import shown
from flax_switch.nn.heads import build_model
from flax_switch.nn.init import abstract_params, init_params, logical_axes
from flax_switch.nn.transformer import SwitchEncoder
from flax_switch.ops.kernels.on_disk import check_in_memory
from flax_switch.ops.mlp import expert_dtype
from flax_switch.parallel.gathering import boxed
from flax_switch.parallel.mesh import AnyMesh, tree_shardings
from flax_switch.parallel.placement import placed_on
from flax_switch.training.freezing import trainable_part
from flax_switch.training.optimizer import build_optimizer, optimizer_state_axes
from flax_switch.training.rounding import check_rounding, in_float32


@flax.struct.dataclass
class TrainState:
    """Everything the train step reads and writes."""

    step: jax.Array  # int32: updates made so far
    params: Any
    opt_state: Any
    rng: jax.Array  # raw key data; each step folds its number in, so that resuming repeats nothing and skips nothing

    @classmethod
    def create(cls, params: Any, optimizer: optax.GradientTransformation, key: jax.Array | None = None) -> Self:
        """Returns the state of step 0 for parameters and an optimiser; `key` is what dropout and jitter draw from."""
        check_in_memory(params, "A training state")
        key = jax.random.key(0) if key is None else key
        data = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
        return cls(jnp.zeros((), jnp.int32), params, optimizer.init(params), data)

    def __repr__(self) -> str:
        counts = [sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)) for tree in (self.params, self.opt_state)]
        return f"TrainState(step={shown(self.step)}, {counts[0]:,} parameters, {counts[1]:,} numbers of the optimiser's)"


@flax.struct.dataclass
class Run:
    """What a run is made of besides its state: fixed for its whole life."""

    config: ExperimentConfig | FinetuneConfig = flax.struct.field(pytree_node=False)
    model: SwitchEncoder = flax.struct.field(pytree_node=False)
    optimizer: optax.GradientTransformationExtraArgs = flax.struct.field(pytree_node=False)
    mesh: AnyMesh = flax.struct.field(pytree_node=False)
    abstract_state: TrainState  # shapes, dtypes and shardings

    def in_use(self, params: Any, rng: jax.Array | None = None) -> Any:
        """Returns a run's parameters as the model takes them: with their adapter, if they have one, at the kernels it is for.

        rng: in training, for the adapter's dropout.
        """
        if ADAPTER not in params:
            return params
        adapter, base = adapter_of(self.config), {name: leaf for name, leaf in params.items() if name != ADAPTER}
        return adapted(base, params[ADAPTER], adapter.scale(), dropout=adapter.dropout, rng=rng)

    def for_model(self, params: Any, rng: jax.Array | None = None) -> Any:
        """Returns parameters `in_use` as a step's program hands them to the model: those that lie in parts know it.

        Scanned experts come in the dtype that they compute in: XLA copies stacks to bring layers first, and holds their gradients.
        """
        if ADAPTER in params:
            return self.in_use(params, rng)
        params = narrow_experts(params, self.config.model) if self.config.model.scan_layers else params
        return boxed(params, state_shardings(self).params) if self.config.mesh.fsdp else params


def narrow_experts(params: Any, config: SwitchConfig) -> Any:
    """Returns parameters with the experts' in the dtype that these compute in, where it is narrower."""
    dtype = expert_dtype(config)

    def narrow(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        experts = any(getattr(key, "key", "") == "expert" for key in path)
        return x.astype(dtype) if experts and config.weights == "float" and x.dtype.itemsize > dtype.itemsize else x

    return jax.tree_util.tree_map_with_path(narrow, params)


def adapter_of(config: ExperimentConfig | FinetuneConfig) -> AdapterConfig:
    """Returns the settings of a run's adapter; one of rank 0 is none."""
    return config.adapter if isinstance(config, FinetuneConfig) else AdapterConfig()


def build_run(config: ExperimentConfig | FinetuneConfig, mesh: AnyMesh) -> Run:
    """Returns model, optimiser and the abstract state with its shardings, without allocating an array."""
    check_rounding(config)
    model = build_model(config.model, devices=placed_on(mesh, fsdp=config.mesh.fsdp))
    axes = logical_axes(model)
    if adapter_of(config).rank:
        parts = adapter_parts(model, adapter_of(config))
        axes = {**axes, ADAPTER: unflatten_dict({path: part.axes for path, part in parts.items()}, sep="/")}
    trained_axes = trainable_part(axes, config.optimizer.trainable)
    optimizer = build_optimizer(config.optimizer, trained_axes, config.train.steps)
    optimizer = in_float32(optimizer) if config.optimizer.stochastic_rounding else optimizer
    abstract = jax.eval_shape(lambda params: _fresh(config, model, optimizer, params), abstract_params(model))
    trained = trainable_part(abstract.params, config.optimizer.trainable)
    state_axes = dataclasses.replace(
        abstract,
        step=(),
        params=axes,
        opt_state=optimizer_state_axes(abstract.opt_state, trained, trained_axes, config.optimizer),
        rng=(None,),
    )
    shardings = tree_shardings(state_axes, abstract, mesh, fsdp=config.mesh.fsdp)
    abstract = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings)
    return Run(config, model, optimizer, mesh, abstract)


def init_state(run: Run, params: Any = None) -> TrainState:
    """Returns a fresh state, each array made where it belongs: no device ever holds a whole parameter that is sharded.

    Given parameters (of a checkpoint, laid out by `state_shardings(run).params`) stay where they are.
    """
    shardings = state_shardings(run)
    if params is None:
        return jax.jit(lambda: _fresh(run.config, run.model, run.optimizer), out_shardings=shardings)()
    without = lambda state: dataclasses.replace(state, params=_others(state.params, params))  # noqa: E731
    make = jax.jit(lambda p: without(_fresh(run.config, run.model, run.optimizer, p)), out_shardings=without(shardings))
    rest = make(params)
    return dataclasses.replace(rest, params={**params, **rest.params})


def _others(tree: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    return {name: leaf for name, leaf in tree.items() if name not in given}


def state_shardings(run: Run) -> TrainState:
    """Returns the shardings of a run's state."""
    return jax.tree.map(lambda leaf: leaf.sharding, run.abstract_state)


def is_split(leaf: jax.ShapeDtypeStruct) -> bool:
    """Returns whether a leaf of the abstract state is cut by experts, so that different devices hold different ones."""
    return "expert" in leaf.sharding.spec


def _fresh(
    config: ExperimentConfig | FinetuneConfig, model: SwitchEncoder, optimizer: optax.GradientTransformation, params: Any = None
) -> TrainState:
    init_rng, step_rng = jax.random.split(jax.random.key(config.train.seed))
    params = init_params(model, init_rng) if params is None else params
    if adapter_of(config).rank:
        params = {**params, ADAPTER: init_adapter(model, adapter_of(config), params, init_rng)}
    opt_state = optimizer.init(trainable_part(params, config.optimizer.trainable))
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, jax.random.key_data(step_rng))
