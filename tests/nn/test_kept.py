"""What a layer keeps for the backward pass: in a scan over layers each of these arrays is there once for every layer."""

import collections

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from flax_switch.config import SwitchConfig
from flax_switch.nn.layer import Layer, LayerInputs

B, L, D, F, H, E = 2, 21, 16, 48, 2, 4
CONFIG = SwitchConfig(
    vocab_size=8, d_model=D, num_heads=H, d_kv=D // H, d_ff=F, num_encoder_layers=2, num_decoder_layers=0, num_experts=E,
    num_sparse_encoder_layers=1, num_sparse_decoder_layers=0, dropout_rate=0.1, router_jitter_noise=0.01, dtype="bfloat16",
)  # fmt: skip


def kept(sparse, **changes):
    """The arrays that the backward pass of an encoder layer is given, beside parameters: how many of a dtype and size."""
    config = CONFIG.replace(**changes)
    layer = Layer(config, config.encoder, sparse=sparse)
    x = jax.ShapeDtypeStruct((B, L, D), jnp.bfloat16)

    def inputs(deterministic):
        bias, mask = jnp.zeros((1, H, L, L)), jnp.ones((B, 1, 1, L), bool)
        return LayerInputs(bias=bias, mask=mask, padding_mask=None, encoded=None, deterministic=deterministic)

    rngs = {"dropout": jax.random.key(0), "jitter": jax.random.key(1)}
    params = jax.eval_shape(lambda x: nn.unbox(layer.init(jax.random.key(0), x, inputs(True))), x)["params"]

    def residuals(params, x):
        run = lambda params, x: layer.apply({"params": params}, x, inputs(False), rngs=rngs)[0]  # noqa: E731
        return jax.tree.leaves(jax.vjp(run, params, x)[1])

    found = collections.Counter((leaf.dtype.name, leaf.size) for leaf in jax.eval_shape(residuals, params, x))
    of_parameters = {leaf.size for leaf in jax.tree.leaves(params)}
    return {(dtype, size): n for (dtype, size), n in found.items() if size >= B * L * D and size not in of_parameters}


GATED = ("gelu_new", "linear")


@pytest.mark.parametrize("activations", [("relu",), ("silu",), GATED], ids="_".join)
@pytest.mark.parametrize(("sparse", "capacity_mode"), [(False, "factor"), (True, "factor"), (True, "dropless")])
def test_a_layer_keeps_no_mask_and_nothing_wider_than_it_computes_in(sparse, capacity_mode, activations):
    found = kept(sparse, capacity_mode=capacity_mode, mlp_activations=activations)
    with_keys = L * L  # plain attention's probabilities
    assert not {(dtype, size) for dtype, size in found if dtype != "bfloat16" and size % with_keys}
    slots = B * L if not sparse or capacity_mode == "dropless" else B * E * round(CONFIG.capacity_factor * L / E)
    # Hidden units as they come out of the activations and, but for a ReLU, as they go in.
    assert found["bfloat16", slots * F] == 1 + (len(activations) if activations != ("relu",) else 0)
    # Its input and what the norm makes of that, queries, keys, values, what attention makes of them, the same two of the MLP; rows
    # to experts and back.
    rows = collections.Counter({B * L * D: 8}) + collections.Counter({slots * D: 2 if sparse else 0})
    assert {size: n for (dtype, size), n in found.items() if dtype == "bfloat16" and size != slots * F} == rows
