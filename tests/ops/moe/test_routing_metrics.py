"""What a sparse layer reports, against a loop over its tokens: with padding counted and ignored, in every kind of routing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_switch.config import SwitchConfig
from flax_switch.ops.moe import routing
from flax_switch.ops.moe.block import ROUTERS
from flax_switch.ops.moe.groups import make_grouping
from flax_switch.ops.moe.routing import report, route

B, L, E = 3, 8, 4
MASK = np.arange(L) < np.array([[8], [5], [2]])
LOGITS = (2.0 * np.random.default_rng(0).normal(size=(B, L, E))).astype(np.float32)
CASES = {
    "padding counted": dict(capacity_mode="fixed", expert_capacity=2),
    "padding ignored": dict(capacity_mode="fixed", expert_capacity=2, ignore_padding_tokens=True),
    "top-2, padding ignored": dict(
        capacity_mode="fixed", expert_capacity=3, num_selected_experts=2, ignore_padding_tokens=True, normalize_router_weights=True
    ),
    "top-2, prioritised": dict(capacity_mode="fixed", expert_capacity=2, num_selected_experts=2, batch_prioritized_routing=True),
    "dropless, padding ignored": dict(capacity_mode="dropless", ignore_padding_tokens=True),
    "scattered padding": dict(capacity_mode="fixed", expert_capacity=2, ignore_padding_tokens=True, padding_semantics="scatter"),
    "experts choose": dict(router_type="experts_choose", capacity_mode="fixed", expert_capacity=3, ignore_padding_tokens=True),
    "hash": dict(router_type="hash", capacity_mode="fixed", expert_capacity=2),
    "hash, padding ignored": dict(router_type="hash", capacity_mode="dropless", ignore_padding_tokens=True),
}


def logits_of(config):
    ids = jnp.asarray(np.random.default_rng(1).integers(0, config.vocab_size, (B, L)))
    return LOGITS if config.learned_router else np.asarray(ROUTERS["hash"](None, None, ids, config, None))


def by_loop(config):
    """Losses and metrics of the layer, told token by token. Every sequence is a group."""
    given = logits_of(config)
    ignoring, scatter = config.ignore_padding_tokens, config.padding_semantics == "scatter"
    N, C = config.num_selected_experts, config.expert_capacity if config.capacity_mode == "fixed" else L
    kept_weights, entropies, left, z, load, balance = [], [], [], [], np.zeros(E), []
    for b in range(B):
        probs = np.exp(np.float64(given[b])) / np.exp(np.float64(given[b])).sum(-1, keepdims=True)
        real = MASK[b] if ignoring else np.ones(L, bool)
        judged = np.where(real[:, None], probs, 0.0)  # ignored padding has no probability
        takes_part = np.ones(L, bool) if scatter else real
        taken, fraction = [[] for _ in range(L)], np.zeros(E)
        if config.router_type == "experts_choose":
            for e in range(E):
                for s in np.argsort(-judged[:, e], kind="stable")[:C]:
                    if real[s]:
                        taken[s].append((e, judged[s, e]))
        else:
            choosing = judged if scatter else probs
            order = np.argsort(-choosing.max(-1), kind="stable") if config.batch_prioritized_routing else range(L)
            queue = np.zeros(E, int)
            choices = [np.argsort(-choosing[s], kind="stable")[:N] for s in range(L)]
            for n in range(N):
                for s in (s for s in order if takes_part[s]):
                    e = choices[s][n]
                    fraction[e] += 1 / L
                    if queue[e] < C:
                        share = choosing[s, choices[s]].sum() if config.normalize_router_weights else 1.0
                        taken[s].append((e, choosing[s, e] / share))
                    queue[e] += 1
            balance.append(E**2 * np.mean(fraction * judged.mean(0)))
        for s in range(L):
            for e, weight in taken[s]:
                load[e] += 1
                kept_weights.append(weight)
            if real[s]:
                left.append(not taken[s])
                entropies.append(-sum(p * np.log(p) for p in probs[s] if p > 0))
            logits = given[b, s] if real[s] else np.zeros(E)
            z.append(np.log(np.exp(np.float64(logits)).sum()) ** 2)
    full = config.capacity_mode == "dropless" or config.router_type == "experts_choose"
    return {
        "fraction_tokens_left_behind": np.mean(left),
        "router_confidence": np.mean(kept_weights),
        "router_entropy": np.mean(entropies),
        "expert_usage": 1.0 if full else len(kept_weights) / (B * E * C),
        "tokens_per_expert": load,
        "choices_overflowed": 0.0,
        "load_balancing_loss": np.mean(balance) if balance else 0.0,
        "router_z_loss": np.mean(z),
    }


@pytest.mark.parametrize("case", CASES)
def test_losses_and_metrics_are_those_of_a_loop_over_tokens(case):
    config = SwitchConfig(num_experts=E, **CASES[case])

    @jax.jit
    def run(logits, mask):
        routed = route(logits, config=config, causal=False, mask=mask if config.ignore_padding_tokens else None)
        return report(routed, make_grouping(config, B, L))

    output = run(logits_of(config), MASK)
    got = {**output.metrics, "load_balancing_loss": output.load_balancing_loss, "router_z_loss": output.z_loss}
    want = by_loop(config)
    assert got.keys() == want.keys() and output.logits is None
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=2e-5, atol=1e-6, err_msg=name)


def test_a_certain_router_has_no_entropy_and_an_undecided_one_the_logarithm_of_the_experts():
    config = SwitchConfig(num_experts=E, capacity_mode="dropless")
    for logits, entropy in ((jnp.zeros((1, L, E)), np.log(E)), (1000.0 * jax.nn.one_hot(jnp.arange(L) % E, E)[None], 0.0)):
        routed = route(logits, config=config, causal=False)
        metrics = routing.routing_metrics(routed.plan, routed.probs, None)
        np.testing.assert_allclose(metrics["router_entropy"], entropy, atol=1e-6)


def test_more_capacity_leaves_fewer_tokens_behind_until_none_is():
    left = []
    for capacity in range(1, L + 1):
        config = SwitchConfig(num_experts=E, capacity_mode="fixed", expert_capacity=capacity)
        routed = route(jnp.asarray(LOGITS), config=config, causal=False)
        left.append(float(routing.routing_metrics(routed.plan, routed.probs, None)["fraction_tokens_left_behind"]))
    assert left[0] > left[1] > left[-1] == 0.0 and left == sorted(left, reverse=True)
