"""Parts of a model are trained alone: the rest has no statistics and does not change."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from flax_switch.config import ConfigError, ExperimentConfig, OptimizerConfig, SwitchConfig
from flax_switch.nn.init import init_params
from flax_switch.nn.transformer import SwitchTransformer
from flax_switch.parallel.mesh import create_mesh
from flax_switch.training.freezing import PRESETS, merged, trainable_part
from flax_switch.training.state import build_run

MODEL = SwitchConfig(
    vocab_size=32, d_model=8, num_heads=2, d_kv=4, d_ff=8, num_encoder_layers=2, num_decoder_layers=1,
    num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def params():
    return jax.eval_shape(lambda: init_params(SwitchTransformer(MODEL), jax.random.key(0)))


def paths(tree):
    return set(flatten_dict(tree, sep="/"))


def test_presets_name_the_parts_of_a_sparse_model(params):
    parts = {name: paths(trainable_part(params, name)) for name in PRESETS}
    assert parts["router"] == {
        "encoder/layers_1/mlp/router/router_weights/w/kernel",
        "decoder/layers_0/mlp/router/router_weights/w/kernel",
    }
    assert parts["experts"] == {
        f"{s}/mlp/expert/{w}/kernel" for s in ("encoder/layers_1", "decoder/layers_0") for w in ("wi", "wo")
    }
    assert parts["all"] == paths(params) == parts["experts"] | parts["all_but_experts"]
    assert not parts["experts"] & parts["all_but_experts"]
    assert parts["moe"] == parts["router"] | parts["experts"]
    assert parts["attention"] and all("attention/" in path for path in parts["attention"])


def test_a_part_and_the_whole_come_together_again(params):
    ones = jax.tree.map(lambda p: np.ones(1), params)
    twos = jax.tree.map(lambda p: 2 * np.ones(1), trainable_part(ones, "decoder/.*norm"))
    flat = flatten_dict(merged(ones, twos), sep="/")
    assert flat.keys() == paths(params)
    assert {path for path, value in flat.items() if value == 2} == {p for p in flat if p.startswith("decoder") and "norm" in p}


@pytest.mark.parametrize("name", ["adafactor", "adamw"])
@pytest.mark.parametrize("trainable", ["router", "experts", "all_but_experts", "layers_0/.*norm"])
def test_frozen_parameters_have_no_statistics(name, trainable, params):
    optimizer = OptimizerConfig(name=name, trainable=trainable, clip_global_norm=1.0)
    run = build_run(ExperimentConfig(model=MODEL, optimizer=optimizer), create_mesh(ExperimentConfig().mesh))
    trained = trainable_part(params, trainable)
    statistics = [node for node in jax.tree.leaves(run.abstract_state.opt_state) if node.ndim]
    each = 3 if name == "adafactor" else 2
    assert len(statistics) == each * len(jax.tree.leaves(trained))
    if name == "adamw":
        assert sum(s.size for s in statistics) == 2 * sum(p.size for p in jax.tree.leaves(trained))
    assert all(leaf.sharding is not None for leaf in statistics)


def test_patterns_that_cannot_be_are_clear_errors(params):
    with pytest.raises(ConfigError, match=r"'ruoter' matches no parameter; a path looks like .*router, experts, all_but_experts"):
        trainable_part(params, "ruoter")
    with pytest.raises(ConfigError, match=r"'\(' is no regular expression"):
        trainable_part(params, "(")
