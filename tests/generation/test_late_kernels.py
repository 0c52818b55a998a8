"""An encoder's kernels in 16 bits are widened where they are multiplied: the bits of kernels widened at once, in less memory."""

import jax
import numpy as np
import pytest

import flax_switch as fs
from flax_switch.config import EXECUTORS
from flax_switch.config.generation import make_controls, split_numbers
from flax_switch.generation.program import run_program
from flax_switch.ops.kernels import narrow

CONFIG = fs.SwitchConfig(
    vocab_size=64, d_model=64, num_heads=2, d_kv=32, d_ff=128, num_encoder_layers=2, num_decoder_layers=1,
    num_sparse_encoder_layers=1, num_sparse_decoder_layers=0, num_experts=4, param_dtype="bfloat16", init_scale=1.0,
)  # fmt: skip
RICH = dict(
    num_selected_experts=2, mlp_activations=("gelu_new", "linear"), shared_expert=True, extra_mlp=True, router_bias=True,
)  # fmt: skip
CASES = {
    "dropless": {}, "rich": RICH, "float16": dict(param_dtype="float16"), "with biases": dict(use_bias=True, norm="layer"),
    "experts in bfloat16": dict(expert_dtype="bfloat16"), **{executor: dict(moe_executor=executor) for executor in EXECUTORS},
}  # fmt: skip
QUICK = ("rich", "dropless")


@pytest.mark.parametrize("case", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CASES])
def test_kernels_widened_late_give_the_bits_of_those_widened_at_once(case, monkeypatch):
    config = CONFIG.replace(**CASES[case])
    params, ids = fs.init_params(config, jax.random.key(0)), np.random.default_rng(0).integers(3, 64, (5, 30))
    routing = "as_trained" if case in EXECUTORS else "auto"
    options = dict(max_new_tokens=3, output_scores=True, routing=routing)

    def scores(least):
        monkeypatch.setattr(narrow, "LEAST_WEIGHTS", least)
        jax.clear_caches()
        return fs.generate(fs.SwitchTransformer(config), params, ids, **options).step_scores

    np.testing.assert_array_equal(scores(0), scores(2**40))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about products on a CPU")
def test_kernels_are_not_all_held_in_float32():
    config = CONFIG.replace(d_model=512, d_ff=1024, num_heads=1, d_kv=8, num_encoder_layers=4, num_sparse_encoder_layers=2)
    params = jax.eval_shape(lambda: fs.init_params(config, jax.random.key(0)))
    controls, numbers = split_numbers(make_controls(dict(max_new_tokens=2), config))
    ids = np.full((1, 200), 7)
    inputs = ({"params": params}, ids, np.ones_like(ids, bool), np.zeros((1, 1), int), np.zeros((1, 2), np.uint32), numbers)
    held = run_program.lower(config, controls, *inputs).compile().memory_analysis().temp_size_in_bytes
    weights = sum(leaf.size for leaf in jax.tree.leaves(params["encoder"]))
    assert held < 2.6 * weights, "four bytes a weight are those widened at once; two, which jaxlib 0.12 takes, a copy of the stacks"
