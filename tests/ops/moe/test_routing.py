"""Routers against flaxformer's outputs and against a plain loop written from the papers' definitions."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_switch.config import SwitchConfig
from flax_switch.ops.moe import routing
from flax_switch.ops.moe.executors import einsum_masks
from flax_switch.ops.moe.groups import make_grouping
from flax_switch.ops.moe.routing import report
from flax_switch.ops.moe.routing import route as route_eagerly

GOLDENS = Path(__file__).parents[2] / "goldens"
MASKED = np.load(GOLDENS / "routers_masked.npz")
EXPERTS_CHOOSE = np.load(GOLDENS / "routers_experts_choose.npz")


SEEDS = st.integers(0, 999)

tokens_choose = jax.jit(routing.tokens_choose, static_argnames=("num_selected", "capacity", "batch_prioritized", "normalize"))
route = jax.jit(route_eagerly, static_argnames=("config", "causal", "deterministic", "dtype"))
experts_choose = jax.jit(routing.experts_choose, static_argnames="capacity")


def cases(file):
    return sorted({key.split("/")[0] for key in file.files})


def probabilities(rng, *shape):
    unnormalised = np.exp(rng.normal(size=shape)).astype(np.float32)
    return unnormalised / unnormalised.sum(-1, keepdims=True)


@pytest.mark.parametrize("case", cases(MASKED))
def test_tokens_choose_reproduces_flaxformers_masked_router(case):
    golden = {key.split("/")[1]: MASKED[key] for key in MASKED.files if key.startswith(case + "/")}
    G, S, E, C = golden["dispatch_mask"].shape
    config = SwitchConfig(
        num_experts=E,
        num_selected_experts=int(case[1]),
        batch_prioritized_routing="bpr1" in case,
        ignore_padding_tokens="ignored" in case,
        capacity_mode="fixed",
        expert_capacity=C,
    )
    real = np.abs(golden["token_inputs"]).sum(-1) > 0
    logits = routing.router_logits(jnp.asarray(golden["token_inputs"]), jnp.asarray(golden["router_kernel"]))
    routed = route(logits, config=config, causal=False, mask=jnp.asarray(real) if "ignored" in case else None)
    mask, weights = einsum_masks(routed.plan, jnp.uint8)
    np.testing.assert_array_equal(mask, golden["dispatch_mask"])
    np.testing.assert_allclose(weights, golden["combine_array"], atol=1e-6)
    output = jax.jit(report, static_argnames="with_logits")(routed, make_grouping(config, G, S), with_logits=True)
    np.testing.assert_allclose(output.load_balancing_loss, golden["auxiliary_loss"], rtol=1e-6)
    np.testing.assert_allclose(output.z_loss, golden["router_z_loss"], rtol=1e-6)
    np.testing.assert_allclose(output.logits, golden["router_logits"], atol=1e-5)


@pytest.mark.parametrize("case", cases(EXPERTS_CHOOSE))
def test_experts_choose_reproduces_flaxformers_router(case):
    golden = {key.split("/")[1]: EXPERTS_CHOOSE[key] for key in EXPERTS_CHOOSE.files if key.startswith(case + "/")}
    logits = routing.router_logits(jnp.asarray(golden["token_inputs"]), jnp.asarray(golden["router_kernel"]))
    plan = routing.experts_choose(jax.nn.softmax(logits), capacity=int(golden["capacity"]))
    mask, weights = einsum_masks(plan, jnp.uint8)
    np.testing.assert_array_equal(mask, golden["dispatch_mask"])
    np.testing.assert_allclose(weights, golden["combine_array"], atol=1e-6)


def tokens_choose_loop(probs, num_selected, capacity, routed, batch_prioritized):
    """One group: {(token, choice): (expert, slot)} of what is kept."""
    S, E = probs.shape
    tokens = [s for s in range(S) if routed[s]]
    if batch_prioritized:
        tokens.sort(key=lambda s: -probs[s].max())
    choices = [np.argsort(-p, kind="stable") for p in probs]
    queues, kept = [0] * E, {}
    for n in range(num_selected):
        for s in tokens:
            expert = choices[s][n]
            if capacity is None or queues[expert] < capacity:
                kept[s, n] = expert, queues[expert]
            queues[expert] += 1
    return kept


# Sizes come from a short list, because every new shape is compiled; values and masks are drawn freely.
SIZES = [(1, 5, 2, 1), (7, 1, 1, 3), (11, 4, 1, 2), (11, 4, 3, 6), (11, 4, 2, None), (6, 9, 2, 1)]  # S, E, N, C


@settings(deadline=None, max_examples=50)
@given(size=st.sampled_from(SIZES), prioritized=st.booleans(), ties=st.booleans(), seed=SEEDS)
def test_tokens_choose_equals_a_plain_loop(size, prioritized, ties, seed):
    S, E, N, capacity = size
    rng = np.random.default_rng(seed)
    probs = probabilities(rng, 2, S, E)
    if ties:
        probs = np.round(probs, 1)
    routed = rng.random((2, S)) < 0.7
    plan = tokens_choose(probs, num_selected=N, capacity=capacity, routed=routed, batch_prioritized=prioritized)
    expert, slot, weight = np.asarray(plan.expert), np.asarray(plan.slot), np.asarray(plan.weight)
    for g in range(2):
        want = tokens_choose_loop(probs[g], N, capacity, routed[g], prioritized)
        got = {(s, n): (expert[g, s, n], slot[g, s, n]) for s, n in np.argwhere(plan.kept[g]).tolist()}
        assert got == want
        for (s, n), (chosen, _) in want.items():
            assert weight[g, s, n] == probs[g, s, chosen]


@settings(deadline=None, max_examples=20)
@given(size=st.sampled_from([(1, 1, 1), (12, 3, 5), (9, 6, 9), (7, 5, 1)]), seed=SEEDS)
def test_experts_choose_equals_a_plain_loop(size, seed):
    S, E, capacity = size
    probs = probabilities(np.random.default_rng(seed), 2, S, E)
    plan = experts_choose(probs, capacity=capacity)
    want = np.full((2, S, E), -1)
    for g in range(2):
        for e in range(E):
            for slot, s in enumerate(np.argsort(-probs[g, :, e], kind="stable")[:capacity]):
                want[g, s, e] = slot
    np.testing.assert_array_equal(np.where(plan.kept, plan.slot, -1), want)
    np.testing.assert_array_equal(plan.expert, np.broadcast_to(np.arange(E), plan.expert.shape))
    assert plan.kept.sum() == 2 * E * capacity


def test_experts_choose_prefers_real_tokens_and_never_keeps_padding():
    probs = probabilities(np.random.default_rng(0), 1, 6, 3)
    real = jnp.asarray([[True, True, False, False, True, False]])
    plan = routing.experts_choose(jnp.asarray(probs), capacity=4, routed=real)
    np.testing.assert_array_equal(plan.kept.sum(1), 3)  # the three real tokens, by every expert
    assert not plan.kept[0, np.array([2, 3, 5])].any()


@pytest.mark.parametrize("choice", [dict(num_selected_experts=1), dict(num_selected_experts=3)])
def test_no_two_choices_share_a_slot_and_every_choice_within_capacity_is_kept(choice):
    config = SwitchConfig(num_experts=5, capacity_mode="fixed", expert_capacity=4, **choice)
    plan = route(jnp.asarray(np.random.default_rng(1).normal(size=(3, 17, 5)), jnp.float32), config=config, causal=False).plan
    plan = jax.tree.map(np.asarray, plan)
    places = {(g, int(plan.expert[g, s, n]), int(plan.slot[g, s, n])) for g, s, n in np.argwhere(plan.kept).tolist()}
    assert len(places) == plan.kept.sum()
    assert max(slot for _, _, slot in places) < 4
    demand = np.asarray([[np.sum(plan.expert[g] == e) for e in range(5)] for g in range(3)])
    assert plan.kept.sum() == np.minimum(demand, 4).sum()


def test_batch_prioritised_routing_drops_the_least_certain_and_only_in_the_encoder():
    logits = jnp.asarray([[[1.0, 0.0], [3.0, 0.0], [2.0, 0.0]]])  # all choose expert 0; certainty rises 0, 2, 1
    config = SwitchConfig(num_experts=2, capacity_mode="fixed", expert_capacity=2, batch_prioritized_routing=True)
    kept = lambda stack: route(logits, config=config, causal=stack == "decoder").plan.kept[0, :, 0].tolist()  # noqa: E731
    assert kept("encoder") == [False, True, True]
    assert kept("decoder") == [True, True, False]


def test_slots_are_those_of_evaluation_unless_a_step_of_training_is_asked_for():
    config = SwitchConfig(
        num_experts=2, capacity_mode="factor", capacity_factor=1.0, eval_capacity_factor=1.5, min_expert_capacity=1
    )
    kept = [
        int(route(jnp.zeros((1, 8, 2)), config=config, **how).plan.kept.sum())
        for how in ({}, {"deterministic": True}, {"deterministic": False})
    ]
    assert kept == [6, 6, 4]  # of eight tokens that all choose the first expert


def test_a_decoder_lets_tokens_choose_even_where_experts_choose_in_the_encoder():
    config = SwitchConfig(num_experts=3, router_type="experts_choose", num_selected_experts=2)
    logits = jnp.zeros((1, 8, 3))
    assert not route(logits, config=config, causal=False).plan.tokens_choose
    assert route(logits, config=config, causal=True).plan.expert.shape == (1, 8, 2)


def test_normalised_weights_sum_to_one_and_raw_ones_are_probabilities():
    probs = jnp.asarray(probabilities(np.random.default_rng(2), 2, 7, 5))
    raw = routing.tokens_choose(probs, num_selected=2, capacity=None)
    normal = routing.tokens_choose(probs, num_selected=2, capacity=None, normalize=True)
    np.testing.assert_allclose(raw.weight, jnp.sort(probs, axis=-1)[..., :-3:-1], rtol=1e-6)
    np.testing.assert_allclose(normal.weight.sum(-1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(normal.weight[..., 0] / normal.weight[..., 1], raw.weight[..., 0] / raw.weight[..., 1], rtol=1e-5)


def test_scatter_padding_takes_slots_of_the_first_expert_and_masked_padding_takes_none():
    logits = jnp.asarray([[[5.0, 0.0], [0.0, 5.0], [5.0, 0.0], [5.0, 0.0]]])
    mask = jnp.asarray([[True, False, True, True]])
    config = SwitchConfig(num_experts=2, capacity_mode="fixed", expert_capacity=3)
    kept = {}
    for semantics in ("masked", "scatter"):
        routed = route(logits, config=config.replace(padding_semantics=semantics), causal=False, mask=mask)
        kept[semantics] = routed.plan.kept[0, :, 0].tolist()
    assert kept["masked"] == [True, False, True, True]
    assert kept["scatter"] == [True, True, True, False]
    assert routed.plan.expert[0, 1, 0] == 0
    assert routed.plan.weight[0, 1, 0] == 0.0


@pytest.mark.parametrize("semantics", ["masked", "scatter"])
def test_tokens_left_behind_counts_real_tokens_only_where_padding_is_ignored(semantics):
    config = SwitchConfig(
        num_experts=2, num_selected_experts=2, capacity_mode="fixed", expert_capacity=3, padding_semantics=semantics
    )
    mask = jnp.asarray([[True] * 4 + [False] * 4])
    routed = route(jnp.zeros((1, 8, 2)), config=config, causal=False, mask=mask)
    metrics = routing.routing_metrics(routed.plan, routed.probs, routed.real)
    assert metrics["fraction_tokens_left_behind"] == 0.25  # of four real tokens, three found a slot


def test_probabilities_cast_to_bfloat16_choose_as_hugging_face_does_but_the_loss_judges_float32():
    logits = jnp.asarray([[[1.0, 1.0005]]])  # a tie in bfloat16, which goes to the lower index
    config = SwitchConfig(num_experts=2, cast_router_probs=True)
    routed = route(logits, config=config, causal=False, dtype=jnp.bfloat16)
    assert routed.plan.expert[0, 0, 0] == 0
    assert routed.plan.weight[0, 0, 0] == jax.nn.softmax(logits)[0, 0, 0].astype(jnp.bfloat16)
    np.testing.assert_array_equal(routed.chose[0, 0], [0.0, 1.0])


@pytest.mark.parametrize(
    "choose", [lambda p: routing.tokens_choose(p, num_selected=2, capacity=3), lambda p: routing.experts_choose(p, capacity=3)]
)
def test_weights_are_float32_whatever_type_the_probabilities_have(choose):
    probs = jnp.asarray(probabilities(np.random.default_rng(0), 1, 6, 4), jnp.bfloat16)
    assert choose(probs).weight.dtype == jnp.float32


def test_indices_stay_integers_beyond_256_experts_in_bfloat16():
    E = 700
    logits = 20.0 * jax.nn.one_hot(jnp.arange(E), E)[None]
    config = SwitchConfig(num_experts=E, cast_router_probs=True, capacity_mode="fixed", expert_capacity=2)
    mask = jnp.arange(E)[None] % 3 > 0
    plan = route(logits, config=config, causal=False, dtype=jnp.bfloat16, mask=mask).plan
    np.testing.assert_array_equal(plan.expert[0, :, 0], np.arange(E))
    np.testing.assert_array_equal(plan.kept[0, :, 0], mask[0])
    assert plan.expert.dtype == plan.slot.dtype == jnp.int32


@pytest.mark.parametrize(
    ("settings_", "tokens", "deterministic", "capacity"),
    [
        (dict(capacity_factor=1.25), 512, False, 80),
        (dict(capacity_factor=1.25, eval_capacity_factor=2.0), 512, True, 128),
        (dict(capacity_factor=1.0), 20, False, 4),  # 2.5 rounds to the even 2, then the minimum
        (dict(capacity_factor=1.0, min_expert_capacity=1), 20, False, 2),
        (dict(capacity_factor=1.0, min_expert_capacity=1), 28, False, 4),  # 3.5 rounds to the even 4
        (dict(capacity_factor=1.25), 3, False, 3),  # no expert can be sent more than the group
        (dict(capacity_mode="fixed", expert_capacity=64), 512, True, 64),
        (dict(capacity_mode="dropless"), 512, True, None),
    ],
)
def test_capacity_follows_the_configs_rule(settings_, tokens, deterministic, capacity):
    assert routing.expert_capacity(SwitchConfig(num_experts=8, **settings_), tokens, deterministic=deterministic) == capacity


def test_the_load_balancing_loss_is_one_when_uniform_and_E_when_all_go_to_one_expert():
    uniform = jnp.full((3, 4), 0.25)
    one = jax.nn.one_hot(jnp.zeros(3, int), 4)
    assert routing.load_balancing_loss(uniform, uniform) == 1.0
    assert routing.load_balancing_loss(one, one) == 4.0


def test_places_that_fill_a_group_change_no_loss_and_no_metric():
    rng = np.random.default_rng(3)
    logits = jnp.asarray(rng.normal(size=(1, 10, 4)), jnp.float32)
    filled = jnp.concatenate([logits, jnp.full((1, 3, 4), 9.0)], axis=1)
    config = SwitchConfig(num_experts=4, capacity_mode="fixed", expert_capacity=2, num_selected_experts=2, routing_group="tokens")
    counted = (jnp.arange(13) < 10)[None]
    plain = report(route(logits, config=config, causal=False), make_grouping(config, 1, 10))
    grouping = make_grouping(config, 1, 10).replace(group_size=13)
    padded = report(route(filled, config=config, causal=False, counted=counted), grouping)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), plain, padded)


def test_jitter_multiplies_inputs_within_its_bounds_and_needs_a_generator():
    x, eye = jnp.ones((1, 50, 4)), jnp.eye(4)
    noisy = routing.router_logits(x, eye, jitter=0.1, jitter_rng=jax.random.key(0))
    assert 0.9 <= noisy.min() < 0.95 < 1.05 < noisy.max() <= 1.1
    np.testing.assert_array_equal(routing.router_logits(x, eye, jitter=0.1), x)


def test_router_bias_is_added_to_the_logits():
    bias = jnp.asarray([1.0, -2.0])
    np.testing.assert_array_equal(routing.router_logits(jnp.zeros((1, 3, 2)), jnp.eye(2), bias)[0, 0], bias)


def test_the_routers_gradient_reaches_only_the_chosen_probability_through_the_weight():
    probs = probabilities(np.random.default_rng(4), 1, 5, 3)
    gradient = jax.grad(lambda p: tokens_choose(p, num_selected=1, capacity=None).weight.sum())(probs)
    np.testing.assert_array_equal(gradient, jax.nn.one_hot(probs.argmax(-1), 3))


def test_masking_leaves_choices_out_unscaled_in_training_and_counts_on_it_in_evaluation():
    probs = jax.nn.softmax(jnp.asarray(np.random.default_rng(0).normal(size=(8, 64, 4)), jnp.float32), axis=-1)
    plan = tokens_choose(probs, num_selected=2, capacity=None, normalize=True)
    trained = routing.masked(plan, 0.2, jax.random.key(0), deterministic=False).weight
    left_out = np.asarray(trained == 0.0)
    assert 0.16 < left_out.mean() < 0.24 and not (left_out[..., 0] == left_out[..., 1]).all()
    np.testing.assert_array_equal(np.asarray(trained)[~left_out], np.asarray(plan.weight)[~left_out])
    np.testing.assert_allclose(routing.masked(plan, 0.2, None, deterministic=True).weight, 0.8 * plan.weight, rtol=1e-6)
    assert routing.masked(plan, 0.0, None, deterministic=False) is plan
