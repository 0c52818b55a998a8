"""Lazy tensors: every view agrees with numpy, whichever block is read."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from flax_switch import SwitchConfig
from flax_switch.convert import stack_layers, tensors, unstack_layers
from flax_switch.convert.canonical import canonical_shapes, flatten, unflatten
from flax_switch.convert.tensors import from_array

ARRAY = np.arange(2 * 3 * 4).reshape(2, 3, 4).astype(np.float32)
VIEWS = {
    "transpose": (lambda t: tensors.transpose(t), ARRAY.T),
    "stack first": (lambda t: tensors.stack([t, t]), np.stack([ARRAY, ARRAY])),
    "stack second": (lambda t: tensors.stack([t, t, t], 1), np.stack([ARRAY] * 3, 1)),
    "take first": (lambda t: tensors.take(t, 1), ARRAY[1]),
    "take second": (lambda t: tensors.take(t, 2, 1), ARRAY[:, 2]),
    "narrow": (lambda t: tensors.narrow(t, 1, 2), ARRAY[1:2]),
    "concatenate": (lambda t: tensors.concatenate([t, tensors.narrow(t, 0, 1), t]), np.concatenate([ARRAY, ARRAY[:1], ARRAY])),
    "repeat": (lambda t: tensors.repeat(t, 3), np.stack([ARRAY] * 3)),
    "join": (lambda t: tensors.join_axes(t, 1), ARRAY.reshape(2, 12)),
    "cast": (lambda t: tensors.cast(t, np.dtype(np.float16)), ARRAY.astype(np.float16)),
    "transposed stack": (lambda t: tensors.stack([tensors.transpose(t)] * 2), np.stack([ARRAY.T] * 2)),
}


def test_all_of_an_array_is_the_array_itself_and_no_copy():
    assert from_array(ARRAY).numpy() is ARRAY


@pytest.mark.parametrize("name", VIEWS)
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_a_block_of_a_view_is_the_block_of_the_array(name, data):
    view, expected = VIEWS[name]
    tensor = view(from_array(ARRAY))
    assert tensor.shape == expected.shape and tensor.dtype == expected.dtype
    index = []
    for size in tensor.shape:
        start = data.draw(st.integers(0, size))
        index.append(slice(start, data.draw(st.integers(start, size))))
    np.testing.assert_array_equal(tensor.read(tuple(index)), expected[tuple(index)])


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4)])
def test_a_tensor_without_elements_is_one_block(shape):
    (block,) = from_array(np.zeros(shape, np.float32)).blocks()
    assert block.shape == shape


def test_blocks_follow_each_other_and_stay_small(monkeypatch):
    monkeypatch.setattr(tensors, "BLOCK_BYTES", 100)
    blocks = list(from_array(np.arange(5 * 3 * 4, dtype=np.float32).reshape(5, 3, 4)).blocks())
    assert [block.shape for block in blocks] == [(2, 3, 4), (2, 3, 4), (1, 3, 4)]
    np.testing.assert_array_equal(np.concatenate(blocks).ravel(), np.arange(60))


def test_equal_bits_means_bits():
    nan = np.array([np.nan, -0.0], np.float32)
    assert tensors.same_bits(from_array(nan), from_array(nan.copy()))
    assert not tensors.same_bits(from_array(nan), from_array(np.array([np.nan, 0.0], np.float32)))
    assert not tensors.same_bits(from_array(nan), from_array(nan.astype(np.float64)))


SCANNED = SwitchConfig(
    vocab_size=7, d_model=4, num_heads=2, d_kv=3, d_ff=5, num_encoder_layers=6, num_decoder_layers=2,
    num_sparse_encoder_layers=2, num_sparse_decoder_layers=2, num_experts=3, relative_attention_per_layer=True,
)  # fmt: skip


@pytest.mark.parametrize("form", ["flat numpy", "nested numpy", "lazy", "jax"])
def test_stacking_layers_and_taking_them_apart_are_inverse(form):
    rng = np.random.default_rng(0)
    flat = {path: rng.random(shape, np.float32) for path, shape in canonical_shapes(SCANNED).items()}
    if form == "lazy":
        flat = {path: from_array(leaf) for path, leaf in flat.items()}
    if form == "jax":
        import jax.numpy as jnp

        flat = {path: jnp.asarray(leaf) for path, leaf in flat.items()}
    tree = unflatten(flat) if form == "nested numpy" else flat
    stacked = flatten(stack_layers(tree, SCANNED))
    assert stacked["encoder/encoder/subblock_2/mlp/expert/wi/kernel"].shape == (3, 2, 4, 5)  # [E, L, D, F]
    assert stacked["encoder/encoder/subblock_0/pre_mlp_layer_norm/scale"].shape == (4, 2)  # [D, L]
    assert stacked["decoder/decoder/subblock_0/relpos_bias/rel_embedding"].shape == (2, 2, 32)
    assert not any("layers_" in path for path in stacked)
    for config in (SCANNED, None):
        back = unstack_layers(stack_layers(tree, SCANNED), config)
        assert any(isinstance(leaf, dict) for leaf in back.values()) == (form == "nested numpy")
        back = flatten(back)
        assert back.keys() == flat.keys()
        for path, leaf in flat.items():
            x, y = (t.numpy() if form == "lazy" else t for t in (back[path], leaf))
            np.testing.assert_array_equal(x, y)


def test_layer_i_is_a_repetition_of_its_subblock():
    flat = {f"encoder/layers_{i}/pre_mlp_layer_norm/scale": np.full(4, i) for i in range(6)}
    stacked = stack_layers(flat, SCANNED)
    np.testing.assert_array_equal(stacked["encoder/encoder/subblock_1/pre_mlp_layer_norm/scale"], [[1, 4]] * 4)


def test_a_layout_that_does_not_repeat_cannot_be_stacked():
    config = SCANNED.replace(sparse_layout="bottom")
    with pytest.raises(ValueError, match="do not repeat"):
        stack_layers({"encoder/layers_0/pre_mlp_layer_norm/scale": np.zeros(4)}, config)
