"""Muon (github.com/KellerJordan/Muon): the momentum of a matrix, made orthogonal, is its update.

`optax.contrib.muon` does the work. What is decided here is which parameters are matrices: attention's and the MLPs' kernels, each
expert's and each scanned layer's by itself. Embeddings, relative biases, norms and routers take Adam's updates.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from flax_switch.training.parameter_scale import own_axes, parameter_scale

NOT_MATRICES = ("vocab", "relpos_buckets", "unmodeled")  # axes of tables and routers
UPDATE_RMS = 0.2  # of a matrix: about Adam's, so that one rate suits both (2502.16982, section 2.2)
ATTENTION = 2.0  # its kernels go at twice the rate: what is copied through cross-attention is learned earlier
NORMS = 0.3  # at the full rate, some shrink until their layer is switched off
BIASES = 0.5  # relative biases are added to logits: their own size, small at first, is no measure for a step


def matrix_axes(names: tuple[str, ...]) -> optax.contrib.MuonDimensionNumbers | None:
    """Returns the axes of the matrices in a parameter with these logical axes, in and out; None where it holds none."""
    own = own_axes(names)
    if len(own) < 2 or set(names) & set(NOT_MATRICES):
        return None
    if len(own) == 2:
        return optax.contrib.MuonDimensionNumbers(*own)
    first = own[:1] if names[own[0]] == "embed" else own[:-1]  # a fused layer's kernels have heads apart from their features
    return optax.contrib.MuonDimensionNumbers(first, own[len(first) :])


def scale_by_muon(axes: Any, b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Turns gradients into directions: Muon's with momentum 0.95 for matrices, Adam's with b1, b2 and eps for the rest."""
    is_names = lambda x: type(x) is tuple  # noqa: E731
    return optax.contrib.muon(
        -1.0,  # no rate: what comes out points along the gradient
        eps=eps,
        adam_b1=b1,
        adam_b2=b2,
        consistent_rms=UPDATE_RMS,
        muon_weight_dimension_numbers=jax.tree.map(matrix_axes, axes, is_leaf=is_names),
    )


def muon_scale(param: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """Returns the factor of a direction besides the rate: the parameter's RMS, but for relative biases, times a share by kind."""
    if "relpos_buckets" in names:
        return jnp.float32(BIASES)
    share = ATTENTION if "joined_kv" in names else NORMS if len(own_axes(names)) == 1 else 1.0
    return share * parameter_scale(param, names)
