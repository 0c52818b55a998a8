"""Where the model drops, how much, and that no two draws are the same: every place of dropout is seen from outside.

A layer's kernels are made so that one branch alone adds to the residual, and that what it adds is 1 without dropout: with it, what
is added factors into the masks along the branch. Each mask is then judged by what T5 and flaxformer say of it: its rate, its scale
1 / (1 - rate), one draw for all positions of a sequence (but inside experts), and draws of its own for everything else.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_switch.config import SwitchConfig
from flax_switch.nn.init import init_params
from flax_switch.nn.layer import Layer, LayerInputs
from flax_switch.nn.transformer import SwitchTransformer

B, L, D, H, F, RATE = 96, 4, 32, 4, 16, 0.3
CONFIG = SwitchConfig(
    vocab_size=8, d_model=D, num_heads=H, d_kv=D // H, d_ff=F, num_encoder_layers=1, num_decoder_layers=1, num_experts=1,
    num_sparse_encoder_layers=0, num_sparse_decoder_layers=0, dropout_rate=RATE, capacity_mode="dropless", extra_mlp=True,
    layer_norm_epsilon=1e-30, moe_executor="ragged",
)  # fmt: skip


def near(values, mean, variance, why):
    """Within 4.5 standard deviations of a mean of independent values: once in 150,000."""
    assert abs(np.mean(values) - mean) < 4.5 * np.sqrt(variance / np.size(values)), why


def unrelated(a, b, why):
    """Two masks (or counts) correlate no more than independent ones do."""
    a, b = np.ravel(a), np.ravel(b)
    assert a.std() > 0 and b.std() > 0, why
    assert abs(np.corrcoef(a, b)[0, 1]) < 4.5 / np.sqrt(a.size), why


def check_mask(kept, rate, why):
    """A mask [B, units] keeps a unit with probability 1 - rate, rows and units draw for themselves."""
    near(kept, 1 - rate, rate * (1 - rate), why)
    unrelated(kept[1:], kept[:-1], f"{why}: examples share draws")
    unrelated(kept[:, 1:], kept[:, :-1], f"{why}: units share draws")


def check_counts(counts, units, rate, why):
    """How many of `units` were kept, once for each example (and head or position): binomial, and each with draws of its own."""
    np.testing.assert_allclose(counts, np.round(counts), atol=1e-3, err_msg=f"{why}: not scaled by 1 / (1 - rate)")
    near(counts / units, 1 - rate, rate * (1 - rate) / units, why)
    spread = np.var(counts) / (units * rate * (1 - rate))
    assert abs(spread - 1) < 4.5 * np.sqrt(2 / counts.size), f"{why}: the number kept varies as {spread:.2f} of a binomial's"
    unrelated(counts[1:], counts[:-1], f"{why}: examples share draws")


def kernels(paths_and_shapes, active):
    """Norms of 1; of the branch named `active` (a part of the path) kernels that make it add 1; all others zero."""

    def kernel(path, shape):
        if path.endswith("scale"):
            return jnp.ones(shape)
        if active not in f"/{path}":
            return jnp.zeros(shape)
        if path.endswith("out/kernel"):
            return jnp.eye(*shape)
        if path.endswith(("value/kernel", "wi/kernel", "wo/kernel")):
            return jnp.full(shape, 1 / F if path.endswith("wo/kernel") else 1 / D)
        return jnp.zeros(shape)

    flat = flatten_dict(paths_and_shapes, sep="/")
    return unflatten_dict({path: kernel(path, leaf.shape) for path, leaf in flat.items()}, sep="/")


def added(stack, sparse, active, config=CONFIG, seed=0, deterministic=False):
    """What a layer adds to a residual of ones, [B, L, D]."""
    layer = Layer(config, getattr(config, stack), sparse=sparse)
    x = jnp.ones((B, L, D))
    inputs = LayerInputs(
        bias=jnp.zeros((1, H, L, L)), mask=None, padding_mask=None, encoded=jnp.ones((B, 6, D)), deterministic=deterministic
    )
    shapes = jax.eval_shape(lambda: nn.unbox(layer.init(jax.random.key(0), x, inputs.replace(deterministic=True))))
    run = jax.jit(lambda v, rng: layer.apply(v, x, inputs, rngs={"dropout": rng})[0])
    return np.asarray(run(kernels(shapes, f"/{active}/"), jax.random.key(seed)) - x, np.float64)


# stack, whether sparse, the branch's name, and over how many units its inner mask goes: keys of attention, F of an MLP
ATTENTION = [("encoder", "attention", L), ("decoder", "self_attention", L), ("decoder", "encoder_decoder_attention", 6)]
MLPS = [("encoder", False, "mlp"), ("decoder", False, "mlp"), ("encoder", True, "extra_mlp"), ("decoder", True, "extra_mlp")]


@pytest.mark.parametrize(("stack", "branch", "keys"), ATTENTION)
def test_attention_drops_keys_for_all_queries_of_a_head_and_then_features_for_all_positions(stack, branch, keys):
    y = added(stack, False, branch)
    np.testing.assert_allclose(y, np.broadcast_to(y[:, :1], y.shape), rtol=1e-5, err_msg="positions have draws of their own")
    y = y[:, 0] * (1 - RATE) ** 2  # [B, D]
    by_head = y.reshape(B, H, D // H)
    share = by_head.max(-1)  # of the keys, kept by each head, wherever a feature was kept
    kept = by_head > 0
    seen = share > 0
    np.testing.assert_allclose(by_head[kept], np.broadcast_to(share[..., None], kept.shape)[kept], rtol=1e-5)
    check_mask(kept[seen.all(1)].reshape(-1, D), RATE, "the attention's output")
    counts = share * keys  # of a head whose features are all dropped 0, too; that happens once in 15,000
    check_counts(counts, keys, RATE, "attention's probabilities")
    unrelated(counts[:, 0], counts[:, 1], "heads share draws")


@pytest.mark.parametrize(("stack", "sparse", "branch"), MLPS)
def test_a_dense_mlp_drops_hidden_units_and_then_features_for_all_positions(stack, sparse, branch):
    y = added(stack, sparse, branch)
    np.testing.assert_allclose(y, np.broadcast_to(y[:, :1], y.shape), rtol=1e-5, err_msg="positions have draws of their own")
    y = y[:, 0] * (1 - RATE) ** 2
    check_mask(y > 0, RATE, "the MLP's output")
    check_counts(y.max(-1) * F, F, RATE, "the MLP's hidden units")


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
@pytest.mark.parametrize(("branch", "expert_rate"), [("expert", None), ("expert", 0.6), ("shared_expert", 0.6)])
def test_experts_drop_every_elements_hidden_units_by_their_own_rate(stack, branch, expert_rate):
    y = added(stack, True, branch, CONFIG.replace(expert_dropout_rate=expert_rate, shared_expert=True, extra_mlp=False))
    inner = RATE if expert_rate is None else expert_rate
    y = y * (1 - RATE) * (1 - inner)  # [B, L, D]
    kept = (y > 0).any(1)
    check_mask(kept, RATE, "the sparse MLP's output")
    counts = y.max(-1) * F
    check_counts(counts.reshape(-1), F, inner, "the experts' hidden units")
    unrelated(counts[:, 1:], counts[:, :-1], "positions share draws")


def test_a_shared_expert_and_the_routed_ones_do_not_drop_alike():
    config = CONFIG.replace(shared_expert=True, extra_mlp=False)
    both = [added("encoder", True, branch, config) * (1 - RATE) ** 2 * F for branch in ("expert", "shared_expert")]
    unrelated(*(np.round(y.max(-1)) for y in both), "the shared expert draws as the routed one does")


def test_an_experts_dropout_can_be_off_alone():
    y = added("encoder", True, "expert", CONFIG.replace(expert_dropout_rate=0.0))
    np.testing.assert_allclose(y[y > 0], 1 / (1 - RATE), rtol=1e-5)
    assert (y == 0).any()


def test_the_sublayers_of_a_layer_and_their_hidden_units_draw_for_themselves():
    """The same generator for all: what each branch adds alone is what it adds beside the others."""
    branches = ("self_attention", "encoder_decoder_attention", "mlp", "extra_mlp")
    sparse = {"self_attention": True, "encoder_decoder_attention": True, "mlp": False, "extra_mlp": True}
    masks = {branch: added("decoder", sparse[branch], branch)[:, 0] > 0 for branch in branches}
    masks["sparse mlp"] = (added("decoder", True, "expert") > 0).any(1)
    names = list(masks)
    for i, one in enumerate(names):
        for other in names[:i]:
            if {one, other} != {"mlp", "sparse mlp"}:  # the same place in two kinds of layers
                unrelated(masks[one], masks[other], f"{one} and {other} share draws")


def whole_model(config, active, seed=0, deterministic=False):
    """The model whose branches named `active` add 1, on embeddings of ones."""
    model = SwitchTransformer(config)
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    params = kernels(shapes, active)
    params["token_embedder"] = {"embedding": jnp.ones((8, D))}
    ids = jnp.ones((B, L), jnp.int32)
    run = functools.partial(model.apply, {"params": params}, ids, ids, output_hidden_states=True, deterministic=deterministic)
    return jax.jit(lambda rng: run(rngs={"dropout": rng}))(jax.random.key(seed))


def test_embeddings_and_the_normalised_outputs_are_dropped_by_the_sequence_in_both_stacks():
    output = whole_model(CONFIG, "nothing")
    masks = []
    for states in (output.encoder_hidden_states, output.decoder_hidden_states):
        embedded, last = (np.asarray(s, np.float64) for s in (states[0], states[-1]))
        for x in (embedded, last):
            np.testing.assert_allclose(x, np.broadcast_to(x[:, :1], x.shape), rtol=1e-5, err_msg="positions draw for themselves")
        embedded, last = embedded[:, 0], last[:, 0]
        first = embedded > 0
        np.testing.assert_allclose(embedded[first], 1 / (1 - RATE), rtol=1e-6)
        check_mask(first, RATE, "embeddings")
        # The norm makes what the first mask kept as large as its number demands; the second drops of that again.
        normed = np.where(first, np.sqrt(D / first.sum(1, keepdims=True)), 0.0)
        second = last > 0
        np.testing.assert_allclose(last[second], normed[second] / (1 - RATE), rtol=1e-5)
        assert not second[~first].any()
        near(second[first], 1 - RATE, RATE * (1 - RATE), "the normalised output")
        masks += [first, second]
    for i, j in ((2, 0), (2, 1), (3, 0), (3, 1)):
        unrelated(masks[i], masks[j], "encoder and decoder share draws")
    unrelated(masks[1][1:], masks[1][:-1], "the normalised output: examples share draws")
    again, other = whole_model(CONFIG, "nothing"), whole_model(CONFIG, "nothing", seed=1)
    np.testing.assert_array_equal(again.decoder_last_hidden_state, output.decoder_last_hidden_state)
    unrelated(np.asarray(other.decoder_last_hidden_state[:, 0] > 0), masks[3], "generators share draws")


@pytest.mark.parametrize("scan", [False, True])
def test_every_layer_draws_for_itself_unrolled_or_scanned(scan):
    config = CONFIG.replace(num_encoder_layers=3, num_decoder_layers=3, scan_layers=scan)
    output = whole_model(config, "/mlp/")
    for states in (output.encoder_hidden_states, output.decoder_hidden_states):
        # hidden states: the embeddings, after layer 0, after layer 1; the last is normalised
        states = [np.asarray(state, np.float64)[:, 0] for state in states[:3]]
        steps = [(b - a) / (a.mean(1) / np.sqrt((a**2).mean(1)))[:, None] for a, b in zip(states[:2], states[1:], strict=True)]
        masks = [step > 1e-6 for step in steps]
        for mask in masks:
            check_mask(mask, RATE, "an MLP's output")
        unrelated(*masks, "layers share draws")
        unrelated(*(step.max(-1) for step in steps), "layers' hidden units share draws")


def test_without_training_or_without_a_rate_nothing_is_dropped():
    for active in ("/mlp/", "attention/"):
        still = whole_model(CONFIG, active, deterministic=True)
        without = whole_model(CONFIG.replace(dropout_rate=0.0), active)
        for a, b in zip(jax.tree.leaves(still), jax.tree.leaves(without), strict=True):
            np.testing.assert_array_equal(a, b)
        assert (np.asarray(still.decoder_last_hidden_state) > 0).all()
    np.testing.assert_allclose(added("encoder", True, "expert", CONFIG, deterministic=True), 1.0, rtol=1e-5)
    np.testing.assert_allclose(added("decoder", False, "self_attention", CONFIG, deterministic=True), 1.0, rtol=1e-5)
