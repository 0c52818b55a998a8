"""The mathematics of an MLP, dense or expert, written once for every executor."""

import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from flax_switch.config import SwitchConfig
from flax_switch.config.weights import BIAS
from flax_switch.ops.dropout import dropout, relu_dropout
from flax_switch.ops.kept import keep_arguments
from flax_switch.ops.kernels.quantized import Kernel

# {"wi" | "wi_0", "wi_1": [E, D, F], "wo": [E, F, D]}, with biases as "wi_bias": [E, 1, F] and so on; or of experts that only
# project {"kernel": [E, D, F]}
ExpertKernels = Mapping[str, Kernel]

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "linear": lambda x: x,
    "tanh": jnp.tanh,
}


def activation(name: str) -> Callable[[Array], Array]:
    """Returns the activation function called `name` in a config: "gelu" is exact, "gelu_new" its tanh approximation."""
    return _ACTIVATIONS[name]


def hidden_units(
    branches: Sequence[Array],
    activations: tuple[str, ...],
    *,
    dropout_rate: float = 0.0,
    dropout_rng: PRNGKeyArray | None = None,
    broadcast_axes: tuple[int, ...] = (),
) -> Array:
    """Returns the product of the branches' activations, dropped; keeps the branches for the backward pass, of a ReLU its result."""
    if activations == ("relu",):
        return relu_dropout(branches[0], dropout_rate, dropout_rng, broadcast_axes=broadcast_axes)

    def compute(rng: PRNGKeyArray | None, *branches: Array) -> Array:
        active = [activation(name)(branch) for name, branch in zip(activations, branches, strict=True)]
        return dropout(functools.reduce(operator.mul, active), dropout_rate, rng, broadcast_axes=broadcast_axes)

    return keep_arguments(compute, dropout_rng, *branches)


def mlp(
    x: Array,
    kernels: ExpertKernels,
    activations: tuple[str, ...],
    matmul: Callable[[Array, Any], Array],
    *,
    dropout_rate: float = 0.0,
    dropout_rng: PRNGKeyArray | None = None,
) -> Array:
    """Computes `act(x wi) wo`, or `(act(x wi_0) * act(x wi_1)) wo` where `activations` names two, with biases where there are some.

    `matmul(x, kernel)` multiplies rows by experts' kernels: a batched product over an expert axis, a grouped GEMM over sorted rows,
    or a plain one; so every executor shares these lines. Everything is computed in x's dtype. Dropout draws every
    element by itself: flaxformer shares one draw among all tokens of an expert, which drops a unit for the whole batch.
    """

    def layer(x: Array, name: str) -> Array:
        product, bias = matmul(x, kernels[name].astype(x.dtype)), kernels.get(f"{name}{BIAS}")
        # A kernel of one row gives every row the bias of its expert, however the product sorts rows by experts.
        return product if bias is None else product + matmul(jnp.ones_like(x[..., :1]), bias.astype(x.dtype))

    names = ("wi",) if len(activations) == 1 else ("wi_0", "wi_1")
    branches = [layer(x, name) for name, _ in zip(names, activations, strict=True)]
    return layer(hidden_units(branches, activations, dropout_rate=dropout_rate, dropout_rng=dropout_rng), "wo")


def expert_dtype(config: SwitchConfig) -> jnp.dtype:
    """Returns the dtype that experts compute in, and that tokens travel in."""
    return jnp.dtype(config.expert_dtype or config.dtype)


def projection(x: Array, kernels: ExpertKernels, matmul: Callable[[Array, Any], Array]) -> Array:
    """Computes `x kernel`, in x's dtype: what an expert of a fused layer's projection does."""
    return matmul(x, kernels["kernel"].astype(x.dtype))


def expert_function(config: SwitchConfig, dropout_rng: PRNGKeyArray | None, names: Iterable[str] = ()) -> Callable[..., Array]:
    """Returns `mlp` with every argument bound but rows, kernels and `matmul`; for kernels of such `names`, `projection`."""
    if "kernel" in names:
        return projection
    rate = config.expert_dropout
    return functools.partial(mlp, activations=config.mlp_activations, dropout_rate=rate, dropout_rng=dropout_rng)
