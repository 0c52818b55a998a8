"""Executors against an oracle that sends every token through every expert: equal values, and equal gradients everywhere."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_switch.config import EXECUTORS, ConfigError, SwitchConfig
from flax_switch.ops.kernels import choice
from flax_switch.ops.mlp import mlp
from flax_switch.ops.moe import executors
from flax_switch.ops.moe.block import ROUTERS, MoEParams, execute, moe_block
from flax_switch.ops.moe.groups import make_grouping
from flax_switch.ops.moe.routing import route as route_eagerly

D, F = 8, 12
route = jax.jit(route_eagerly, static_argnames=("config", "causal", "deterministic", "dtype"))
CONFIG = SwitchConfig(d_model=D, d_ff=F, num_experts=4, dropout_rate=0.0, min_expert_capacity=1, capacity_factor=1.0)
TOP2 = dict(num_selected_experts=2, mlp_activations=("gelu_new", "linear"))
CASES = {  # config, (batch, length), what the router's kernel is multiplied by
    "top-1, some dropped": (CONFIG, (2, 8), 1.0),
    "top-2, gated, some dropped": (CONFIG.replace(**TOP2), (2, 8), 1.0),
    "top-2, dropless": (CONFIG.replace(capacity_mode="dropless", **TOP2), (2, 8), 1.0),
    "experts choose": (CONFIG.replace(router_type="experts_choose", capacity_factor=1.5), (2, 8), 1.0),
    "hash, some dropped": (CONFIG.replace(router_type="hash", vocab_size=50, hash_seed=1), (2, 8), 1.0),
    "all to one of 20 experts": (CONFIG.replace(num_experts=20, capacity_mode="dropless"), (1, 9), None),
    "odd token groups": (
        CONFIG.replace(num_experts=5, routing_group="tokens", group_size=7, ignore_padding_tokens=True),
        (3, 5),
        1.0,
    ),
    "biases, some dropped": (CONFIG.replace(use_bias=True, num_selected_experts=2), (2, 8), 1.0),
    "a single token": (CONFIG.replace(capacity_mode="dropless", normalize_router_weights=True, **TOP2), (1, 1), 1.0),
}


def inputs(config, shape, sharpness, dtype):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    E = config.num_experts
    names = ("wi_0", "wi_1") if config.is_gated else ("wi",)
    expert = {**{name: draw(E, D, F) for name in names}, "wo": draw(E, F, D)}
    if config.use_bias:
        expert |= {f"{name}_bias": draw(E, 1, D if name == "wo" else F) for name in (*names, "wo")}
    router = draw(D, E).astype(jnp.float32)
    bias = jnp.zeros(E).at[E // 2].set(100.0) if sharpness is None else None
    router = router if config.learned_router else None
    mask = jnp.arange(shape[1])[None] < jnp.asarray([shape[1], shape[1] - 2, 1])[: shape[0], None]
    return MoEParams(router, bias, expert), draw(*shape, D), draw(*shape, D), mask


def ids(config, shape):
    """Token ids, where routing goes by them."""
    return None if config.learned_router else jnp.asarray(np.random.default_rng(1).integers(0, config.vocab_size, shape))


def oracle(params, x, config, mask):
    grouping = make_grouping(config, *x.shape[:2])
    tokens = grouping.group(x)
    token_ids = None if config.learned_router else grouping.group(ids(config, x.shape[:2]))
    logits = ROUTERS[config.router_type](params, tokens, token_ids, config, None)
    mask = grouping.group(mask) if config.ignore_padding_tokens else None
    plan = route(logits, config=config, causal=False, counted=grouping.counted(), mask=mask, deterministic=False).plan
    every = functools.partial(mlp, activations=config.mlp_activations, matmul=jnp.matmul)
    answers = jax.vmap(lambda kernels: every(tokens, kernels))(params.expert)  # [E, G, S, D]
    share = jnp.where(plan.kept, plan.weight, 0.0)[..., None] * jax.nn.one_hot(plan.expert, config.num_experts)
    return grouping.ungroup(jnp.einsum("GSNE,EGSD->GSD", share, answers))


def values_and_gradients(function, params, x, cotangent):
    def loss(params, x):
        y = function(params, x)
        return jnp.vdot(y.astype(jnp.float32), cotangent.astype(jnp.float32)), y

    (_, y), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, x)
    router = {} if params.router_kernel is None else {"router": gradients[0].router_kernel}
    return {"output": y, "input": gradients[1], **router, **gradients[0].expert}


@functools.cache
def wanted(case, dtype):
    """The oracle's results in float32, from inputs that `dtype` can hold."""
    config, shape, sharpness = CASES[case]
    *arrays, mask = inputs(config, shape, sharpness, dtype)
    params, x, cotangent = jax.tree.map(lambda a: a.astype(jnp.float32), arrays)
    return values_and_gradients(lambda p, x: oracle(p, x, config, mask), params, x, cotangent)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_equal_the_oracles(case, dtype, executor):
    config, shape, sharpness = CASES[case]
    config = config.replace(moe_executor=executor, dtype=dtype)
    params, x, cotangent, mask = inputs(config, shape, sharpness, dtype)
    block = functools.partial(
        moe_block, config=config, causal=False, padding_mask=mask, deterministic=False, token_ids=ids(config, shape)
    )
    got = values_and_gradients(lambda p, x: block(p, x)[0], params, x, cotangent)
    want = wanted(case, dtype)
    for name in want:
        assert got[name].dtype == ("float32" if name == "router" else dtype)
        error = np.linalg.norm(np.float64(got[name]) - np.float64(want[name]))
        scale = np.linalg.norm(np.float64(want[name]))
        assert error <= (2e-6 if dtype == "float32" else 2e-2) * scale + 1e-6, name


@pytest.mark.parametrize("case", [case for case in CASES if "dropped" in case])
def test_cases_that_are_to_drop_tokens_drop_some(case):
    config, shape, sharpness = CASES[case]
    params, x, _, _ = inputs(config, shape, sharpness, jnp.float32)
    logits = ROUTERS[config.router_type](params, x, ids(config, shape), config, None)
    assert not route(logits, config=config, causal=False, deterministic=False).plan.kept.all()


def test_a_dropped_token_gets_zero_and_an_unused_expert_no_gradient():
    config = CONFIG.replace(capacity_mode="fixed", expert_capacity=2)
    params, x, cotangent, _ = inputs(config, (1, 6), None, jnp.float32)  # all six tokens want expert 2, which takes two
    for executor in ("gather", "ragged"):
        block = functools.partial(
            moe_block, config=config.replace(moe_executor=executor), causal=True, padding_mask=None, deterministic=False
        )
        got = values_and_gradients(lambda p, x, block=block: block(p, x)[0], params, x, cotangent)
        np.testing.assert_array_equal(got["output"][0, 2:], 0)
        assert (jnp.abs(got["output"][0, :2]).sum(-1) > 0).all()
        np.testing.assert_array_equal(jnp.abs(got["wi"]).sum((1, 2)) > 0, [False, False, True, False])


def test_an_empty_slot_holds_zeros_and_a_slot_the_token_that_the_plan_says():
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(2, 9, 3)), jnp.float32)
    config = CONFIG.replace(num_experts=3, num_selected_experts=2, capacity_mode="fixed", expert_capacity=8)
    plan = route(logits, config=config, causal=False).plan
    x = jnp.asarray(np.random.default_rng(2).normal(size=(2, 9, 4)), jnp.float32)
    buffers = jax.jit(lambda plan, x: executors.gather_dispatch(plan, executors.slot_view(plan), x))(plan, x)
    mask = jax.jit(lambda plan: executors.einsum_masks(plan, jnp.float32)[0])(plan)
    plan, x = jax.tree.map(np.asarray, (plan, x))
    want = np.zeros((2, 3, 8, 4), np.float32)
    for g, s, n in np.argwhere(plan.kept).tolist():
        want[g, plan.expert[g, s, n], plan.slot[g, s, n]] = x[g, s]
    np.testing.assert_array_equal(buffers, want)
    np.testing.assert_array_equal(np.einsum("GSEC,GSD->GECD", mask, x), want)


CHOICES = {  # G, S and N, capacity, experts one by one: what runs on CPU, and elsewhere
    "dropless": ((2, 8, 1), None, False, ("ragged", "ragged")),
    "a static capacity": ((2, 8, 1), 2, False, ("gather", "gather")),
    "mostly empty buffers": ((2, 8, 1), 4, False, ("ragged", "gather")),
    "a few single tokens": ((3, 1, 1), None, False, ("ragged", "hit")),
    "a few single tokens, experts one by one": ((3, 1, 1), None, True, ("hit", "hit")),
    "as many single tokens as experts": ((4, 1, 1), None, True, ("hit", "ragged")),
}


@pytest.mark.parametrize("case", CHOICES)
def test_auto_picks_by_shape_and_platform_and_says_so_once(case, caplog):
    groups, capacity, unstacked, expected = CHOICES[case]
    settings = dict(groups=groups, capacity=capacity, num_experts=4, unstacked=unstacked)
    choice._announce.cache_clear()
    with caplog.at_level("INFO"):
        assert choice.choose("auto", **settings) == choice.choose("auto", **settings) == expected
    (record,) = caplog.records
    assert f"{expected[0]!r} on CPU and {expected[1]!r} elsewhere" in record.getMessage()
    usual = "gather" if capacity else "ragged"
    assert choice.choose("auto", **settings, split=True) == (usual, usual), "no device has all experts"


def test_an_executor_asked_for_runs_where_it_can():
    settings = dict(capacity=None, num_experts=4, unstacked=True)
    assert choice.choose("einsum", groups=(3, 1, 1), **settings) == ("einsum", "einsum")
    assert choice.choose("hit", groups=(9, 1, 1), **settings) == ("hit", "hit")
    assert choice.choose("hit", groups=(1, 9, 1), **settings) == ("ragged", "ragged"), "not for whole sequences"


def test_an_unknown_executor_is_an_error_that_names_the_known_ones():
    with pytest.raises(ConfigError, match="Did you mean 'ragged'"):
        CONFIG.replace(moe_executor="raged")


def test_dropout_inside_experts_leaves_the_mean_and_needs_a_generator():
    kernels = {"wi": jnp.ones((1, 1, 4000)), "wo": jnp.ones((1, 4000, 1)) / 4000}
    run = functools.partial(mlp, jnp.ones((1, 1, 1, 1)), kernels, ("relu",), jnp.matmul, dropout_rate=0.4)
    np.testing.assert_allclose(run(), 1.0, rtol=1e-6)
    assert 0.9 < run(dropout_rng=jax.random.key(0)) < 1.1
    assert run(dropout_rng=jax.random.key(0)) != run(dropout_rng=jax.random.key(1))


def test_execute_runs_a_plan_made_by_hand_on_experts_made_by_hand():
    """The seam for other bodies: a plan, rows and kernels in, answers out."""
    plan = route(jnp.eye(4)[None] * 9, config=CONFIG.replace(capacity_mode="dropless"), causal=True).plan
    kernels = {"wi": jnp.arange(1.0, 5.0)[:, None, None], "wo": jnp.ones((4, 1, 1))}
    experts = functools.partial(mlp, activations=("relu",))
    for executor in EXECUTORS:
        run = jax.jit(functools.partial(execute, experts=experts, executor=executor))
        y = run(plan, jnp.ones((1, 4, 1)), kernels)
        np.testing.assert_allclose(y[0, :, 0], plan.weight[0, :, 0] * jnp.arange(1.0, 5.0), rtol=1e-6)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("shared", [False, True])
def test_experts_compute_in_their_own_dtype(executor, shared):
    """1 + 2**-10 is no number of bfloat16: experts that hand on what they are given give 1 there, and it itself in float32."""
    x, one = jnp.full((1, 4, 1), 1 + 2**-10), jnp.ones((1, 1, 1))
    identity = {"wi": one, "wo": one}
    params = MoEParams(jnp.zeros((1, 1)), None, identity, {name: k[0] for name, k in identity.items()} if shared else None)
    got = {}
    for dtype in (None, "bfloat16"):
        config = CONFIG.replace(d_model=1, d_ff=1, num_experts=1, mlp_activations=("linear",), expert_dtype=dtype)
        config = config.replace(moe_executor=executor, capacity_mode="dropless", shared_expert=shared)
        block = functools.partial(moe_block, config=config, causal=False, padding_mask=None, deterministic=True)
        y = jax.jit(lambda p, x, block=block: block(p, x)[0])(params, x)
        assert y.dtype == jnp.float32
        got[dtype] = float(y[0, 0, 0])
    both = 2 if shared else 1
    assert got == {None: both * (1 + 2**-10), "bfloat16": both * 1.0}


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_bfloat16_model_routes_in_float32(executor):
    """The experts' logits differ by less than bfloat16 can tell: rounded they would tie, and the first expert would win."""
    x = jnp.ones((1, 4, 2), jnp.bfloat16)
    router = jnp.asarray([[1.0, 1.0 + 2**-12], [1.0, 1.0]])
    experts = {"wi": jnp.ones((2, 2, 1)), "wo": jnp.stack([jnp.full((1, 2), 1.0), jnp.full((1, 2), 3.0)])}
    config = CONFIG.replace(d_model=2, d_ff=1, num_experts=2, dtype="bfloat16", expert_dtype="bfloat16", capacity_mode="dropless")
    bias = jnp.asarray([1.0 + 2**-11, 1.0])  # turns the choice around, and would be lost likewise
    for given, router_dtype, expected in ((None, "float32", 1), (bias, "float32", 0), (None, "bfloat16", 0)):
        settings = config.replace(router_dtype=router_dtype, moe_executor=executor)
        block = functools.partial(moe_block, config=settings, causal=False, padding_mask=None, deterministic=True)
        y, routed = jax.jit(lambda p, x, block=block: block(p, x, with_logits=True))(MoEParams(router, given, experts), x)
        assert y.dtype == jnp.bfloat16 and routed.logits.dtype == jnp.float32
        np.testing.assert_array_equal(routed.expert_index, expected)
        assert float(y[0, 0, 0]) == (1.0 if expected == 0 else 3.0)  # 2 hidden, half of it: the router's weight is 1/2


@pytest.mark.parametrize("case", ["top-2, gated, some dropped", "experts choose"])
def test_sorted_rows_are_the_kept_choices_by_expert(case):
    config, (batch, length), _ = CASES[case]
    logits = jnp.asarray(np.random.default_rng(3).normal(size=(batch, length, config.num_experts)), jnp.float32)
    plan = route(logits, config=config, causal=False, deterministic=False).plan
    view = executors.sorted_view(plan)
    kept, expert = np.asarray(plan.kept).ravel(), np.asarray(plan.expert).ravel()
    assert 0 < kept.sum() == view.group_sizes.sum()
    choices = np.asarray(view.choice[0])[: kept.sum()]
    assert set(choices) == set(np.flatnonzero(kept)) and (np.diff(expert[choices]) >= 0).all()
    np.testing.assert_array_equal(np.bincount(expert[choices], minlength=config.num_experts), view.group_sizes)
