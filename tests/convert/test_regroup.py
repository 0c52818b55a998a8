"""Fewer or more experts: what is kept has the same bits, copies compute the same, like units are averaged, scales restore sums."""

import dataclasses

import numpy as np
import pytest

from flax_switch import ConfigError, SwitchConfig, load_pretrained, save_pretrained
from flax_switch.convert import open_checkpoint
from flax_switch.convert.canonical import canonical_shapes
from flax_switch.convert.regroup import Groups, combine_weights, expert_layers, grouped, with_fewer, with_more
from flax_switch.workflows.regroup import more

CONFIG = SwitchConfig(
    vocab_size=40, d_model=16, num_heads=2, d_kv=8, d_ff=24, num_encoder_layers=2, num_decoder_layers=2, num_experts=4,
    num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, mlp_activations=("gelu_new", "linear"), capacity_mode="dropless",
)  # fmt: skip
IDS = dict(
    input_ids=np.random.default_rng(1).integers(2, 40, (2, 9)), decoder_input_ids=np.random.default_rng(2).integers(2, 40, (2, 6))
)
LAYERS = ["encoder/layers_1/mlp", "decoder/layers_1/mlp"]


def saved(folder, config=CONFIG, seed=0, change=lambda params: None):
    rng = np.random.default_rng(seed)
    params = {path: rng.normal(0, 0.3, shape).astype(np.float32) for path, shape in canonical_shapes(config).items()}
    change(params)
    save_pretrained(folder, config, params, format="flax_switch")
    return folder


def logits_of(path):
    return np.asarray(load_pretrained(path)(**IDS).logits)


@pytest.mark.parametrize(
    "changes",
    [{}, pytest.param({"normalize_router_weights": True, "router_bias": True}, marks=pytest.mark.slow)],
    ids=["plain", "normalised"],
)
def test_growth_keeps_the_function_and_spreads_tokens_over_copies(changes, tmp_path):
    source = saved(tmp_path / "four", CONFIG.replace(**changes))
    grown = load_pretrained(more(source, tmp_path / "sixteen", num_experts=16).path)
    assert grown.config == load_pretrained(source).config.replace(num_experts=16)
    expected, found = load_pretrained(source)(**IDS, output_router_logits=True), grown(**IDS, output_router_logits=True)
    np.testing.assert_allclose(found.logits, expected.logits, atol=1e-5 * float(np.abs(expected.logits).max()))
    before, after = (np.asarray(o.encoder_router_logits[0]).argmax(-1) for o in (expected, found))
    np.testing.assert_array_equal(after // 4, before)
    assert len(set((after % 4).ravel().tolist())) > 1
    still = with_more(open_checkpoint(source), 8, router_noise=0.0).tensors["encoder/layers_1/mlp/expert/wi_0/kernel"].numpy()
    np.testing.assert_array_equal(still[[0, 2, 4, 6]], still[[1, 3, 5, 7]])


def test_copies_of_an_expert_are_told_apart_by_a_little_noise_of_their_router(tmp_path):
    opened = open_checkpoint(saved(tmp_path / "four"))
    first, again, other, still = (
        {path: x.numpy() for path, x in with_more(opened, 8, **options).tensors.items() if "/router/" in path}
        for options in ({"router_noise": 1e-3}, {"router_noise": 1e-3}, {"router_noise": 1e-3, "seed": 1}, {"router_noise": 0.0})
    )
    noise = [first[path] - still[path] for path in first]
    for path, one in zip(first, noise, strict=True):
        np.testing.assert_array_equal(first[path], again[path])
        assert (first[path] != other[path]).any()
        assert 0.5e-3 < one.std() / still[path].std() < 2e-3
    assert len(noise) == 2 and np.abs(noise[0] - noise[1]).max() > 1e-4  # every layer has its own


def test_experts_that_are_copies_merge_into_one_that_computes_the_same(tmp_path):
    """Each expert once more, with its hidden units in another order, and a router that gives a pair the same score."""
    rng = np.random.default_rng(3)

    def pair(params):
        for path in params:
            if "/expert/" in path:
                for e in (2, 3):
                    order = np.random.default_rng(e).permutation(24)
                    params[path][e] = np.take(params[path][e - 2], order, axis=-2 if "/wo/" in path else -1)
            if "/router/" in path:
                params[path][:, 2:] = params[path][:, :2] + 1e-6 * rng.standard_normal((16, 2))  # each has some tokens

    source = saved(tmp_path / "pairs", change=pair)
    opened = open_checkpoint(source)
    x = rng.normal(size=(200, 16))
    groups = {}
    for layer in expert_layers(opened):
        kernel = opened.tensors[f"{layer}/router/router_weights/w/kernel"].numpy()
        groups[layer] = grouped(x @ kernel, opened.config, 2, merge=True)
        assert {frozenset(members) for members in groups[layer].members} == {frozenset((0, 2)), frozenset((1, 3))}
        assert min(share for shares in groups[layer].shares for share in shares) > 0.2
        np.testing.assert_allclose(groups[layer].scales, 0.5, rtol=1e-4)  # each of a pair had half of what the kept one has now
    made = with_fewer(opened, groups)
    save_pretrained(tmp_path / "merged", made.config, {p: t.numpy() for p, t in made.tensors.items()}, format="flax_switch")
    np.testing.assert_allclose(logits_of(tmp_path / "merged"), logits_of(source), atol=2e-5)


def test_pruning_keeps_kernels_to_the_bit_and_scales_the_last(tmp_path):
    opened = open_checkpoint(saved(tmp_path / "four"))
    groups = {layer: Groups(((3,), (1,)), ((1.0,), (1.0,)), (0.5, 2.0)) for layer in LAYERS}
    made = with_fewer(opened, groups)
    assert made.config == opened.config.replace(num_experts=2)
    for path, tensor in made.tensors.items():
        assert tensor.shape == canonical_shapes(made.config)[path]
        whole = opened.tensors[path].numpy()
        if "/router/" in path:
            whole = whole[:, [3, 1]]
        elif "/expert/" in path:
            whole = whole[[3, 1]] * (np.array([0.5, 2.0], np.float32)[:, None, None] if "/wo/" in path else np.float32(1))
        np.testing.assert_array_equal(tensor.numpy(), whole, err_msg=path)
    block = made.tensors[f"{LAYERS[1]}/expert/wo/kernel"]
    np.testing.assert_array_equal(block.read((slice(1, 2), slice(3, 5), slice(0, 4))), block.numpy()[1:2, 3:5, 0:4])


@pytest.mark.parametrize(
    "changes", [{}, {"num_selected_experts": 2, "normalize_router_weights": True}, {"num_selected_experts": 2}]
)
def test_the_most_used_are_kept_and_scales_restore_the_mean_weight(changes):
    config = CONFIG.replace(num_experts=6, **changes)
    logits = np.random.default_rng(0).normal(size=(500, 6)) + np.array([2, 0, 1, -1, 0, 3.0])
    weights = combine_weights(logits, config)
    assert ((weights > 0).sum(-1) == config.num_selected_experts).all()
    if config.normalize_router_weights:
        np.testing.assert_allclose(weights.sum(-1), 1.0)
    groups = grouped(logits, config, 3, merge=False)
    assert groups.kept == [0, 2, 5] and groups.members == ((0,), (2,), (5,))
    after = combine_weights(logits[:, groups.kept], config)
    if config.num_selected_experts == 1:
        for expert, scale in enumerate(groups.scales):
            mine = after[:, expert] > 0
            np.testing.assert_allclose(scale * after[mine, expert].mean(), weights[mine].sum(-1).mean(), rtol=1e-9)
    elif config.normalize_router_weights:
        np.testing.assert_allclose(groups.scales, 1.0)
    merged = grouped(logits, config, 3, merge=True)
    assert merged.kept == groups.kept and sorted(e for members in merged.members for e in members) == list(range(6))
    for members, shares in zip(merged.members, merged.shares, strict=True):
        usage = weights.sum(0)[list(members)]
        np.testing.assert_allclose(shares, usage / usage.sum())
    drawn = {tuple(grouped(logits, config, 3, merge=False, keep="random", rng=np.random.default_rng(s)).kept) for s in range(8)}
    assert len(drawn) > 1


def test_what_cannot_be_regrouped_is_refused_by_name(tmp_path):
    opened = open_checkpoint(saved(tmp_path / "four"))
    for count, options, why in (
        (6, {}, "must be a multiple of the 4 experts that there are; it is 6"),
        (4, {}, "must be a multiple"),
        (8, {"router_noise": -1.0}, "router_noise must lie in"),
    ):
        with pytest.raises(ConfigError, match=why):
            with_more(opened, count, **options)
    two = dataclasses.replace(opened, config=opened.config.replace(num_selected_experts=2))
    with pytest.raises(ConfigError, match="it chooses 2, which would be copies of the same one"):
        with_more(two, 8)
    dense = SwitchConfig(**{**dataclasses.asdict(CONFIG), "num_sparse_encoder_layers": 0, "num_sparse_decoder_layers": 0})
    with pytest.raises(ConfigError, match="has no sparse layer"):
        expert_layers(open_checkpoint(saved(tmp_path / "dense", dense)))
    hashed = open_checkpoint(saved(tmp_path / "hash", CONFIG.replace(router_type="hash")))
    with pytest.raises(ConfigError, match="by a hash of their ids"):
        expert_layers(hashed)
