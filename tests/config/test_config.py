"""Configs validate themselves, name what is wrong, and survive a round trip through plain dicts."""

import dataclasses
import json
from pathlib import Path

import pytest

from flax_switch.config import (
    BatchConfig,
    ConfigError,
    DataConfig,
    ExperimentConfig,
    MeshConfig,
    OptimizerConfig,
    StackConfig,
    SwitchConfig,
    sparse_layers,
)
from flax_switch.config.finetuning import FinetuneDataConfig, TaskConfig
from flax_switch.config.presets import PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_a_round_trip_through_json(name):
    config = PRESETS[name]
    assert SwitchConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_an_experiment_survives_a_round_trip_through_json():
    config = ExperimentConfig(data=DataConfig(source=("a.txt", "b/*.jsonl")), mesh=MeshConfig(expert=4))
    assert ExperimentConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_every_model_of_the_papers_has_a_preset():
    switch = {f"switch-base-{e}" for e in (8, 16, 32, 64, 128, 256)} | {"switch-large-128", "switch-xxl-128", "switch-c-2048"}
    sizes = ("tiny", "small", "base", "large", "xl", "xxl")
    families = {f"{router}-choose-{size}" for router in ("tokens", "experts") for size in sizes}
    assert switch | families | {"st-moe-base", "st-moe-xl", "st-moe-32b", "t5-base", "switch-tiny", "t5-tiny"} <= set(PRESETS)


LAYOUTS = json.loads((Path(__file__).parents[1] / "goldens" / "tables.json").read_text())["layouts"]


@pytest.mark.parametrize("row", LAYOUTS, ids=lambda r: f"{r['layout']}-{r['num_layers']}-{r['num_sparse']}")
def test_layouts_are_flaxformers(row):
    if row["sparse_layers"] is None:
        with pytest.raises(ConfigError, match="does not divide"):
            sparse_layers(row["layout"], row["num_layers"], row["num_sparse"])
        return
    layers = sparse_layers(row["layout"], row["num_layers"], row["num_sparse"])
    assert list(layers) == row["sparse_layers"]
    config = SwitchConfig(
        num_encoder_layers=row["num_layers"], num_sparse_encoder_layers=row["num_sparse"], sparse_layout=row["layout"],
        num_decoder_layers=1, num_sparse_decoder_layers=0,
    )  # fmt: skip
    if row["num_scan_blocks"] is not None:
        assert config.encoder.num_blocks == row["num_scan_blocks"]


def test_a_view_of_a_stack_says_its_layers_and_which_block_repeats():
    config = SwitchConfig(num_encoder_layers=6, num_sparse_encoder_layers=2, num_decoder_layers=4, decoder_sparse_layers=(0, 3))
    assert config.stacks == (config.encoder, config.decoder)
    assert config.encoder == StackConfig("encoder", 6, (2, 5))
    assert (config.encoder.num_sparse, config.encoder.block_size, config.encoder.num_blocks) == (2, 3, 2)
    assert (config.decoder.sparse_layers, config.decoder.block_size, config.decoder.num_blocks) == ((0, 3), None, None)
    dense = config.replace(num_sparse_encoder_layers=0).encoder
    assert (dense.sparse_layers, dense.block_size, dense.num_blocks) == ((), 1, 6)


@pytest.mark.parametrize(
    ("layers", "sparse", "built"), [(12, 5, 6), (12, 8, 12), (3, 2, 3), (12, 6, 6), (2, 3, 0), (12, 0, 1), (1, 0, 1)]
)
def test_the_huggingface_layout_builds_what_transformers_builds(layers, sparse, built):
    assert len(sparse_layers("huggingface", layers, sparse)) == built


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_head": 3}, "Did you mean 'num_heads'"),
        ({"num_heads": "12"}, "must be int; it is '12'"),
        ({"num_heads": 0}, "num_heads must be at least 1"),
        ({"num_sparse_encoder_layers": 5}, "5 does not divide 12"),
        ({"num_sparse_encoder_layers": 13}, "13 sparse layers do not fit a stack of 12"),
        ({"capacity_factor": 0.0}, "capacity_factor must be positive"),
        ({"expert_capacity": 0}, "expert_capacity must be at least 1"),
        ({"num_selected_experts": 9}, "between 1 and num_experts"),
        ({"sparse_layout": "mixd"}, "Did you mean 'mixed'"),
        ({"mlp_activations": ("relu", "gelu", "linear")}, "two for a gated MLP"),
        ({"router_type": "experts_choose", "capacity_mode": "dropless"}, "cannot be dropless"),
        ({"encoder_sparse_layers": (3, 1)}, "ascending"),
        ({"scan_layers": True, "sparse_layout": "top"}, "do not repeat"),
        ({"dropout_rate": 1.0}, r"must lie in \[0, 1\)"),
        ({"eos_token_id": 40_000}, "outside the vocabulary"),
        ({"dtype": "bf16"}, "Did you mean 'bfloat16'"),
    ],
)
def test_impossible_models_are_refused_with_the_reason(changes, message):
    with pytest.raises(ConfigError, match=message):
        SwitchConfig().replace(**changes)


def test_impossible_experiments_are_refused_with_the_reason():
    with pytest.raises(ConfigError, match="at most one of them -1"):
        MeshConfig(data=-1, expert=-1)
    with pytest.raises(ConfigError, match="Did you mean 'cosine'"):
        OptimizerConfig(schedule="cosin")
    with pytest.raises(ConfigError, match="must divide data.batch_size"):
        ExperimentConfig.from_dict({"train": {"microbatches": 3}})
    with pytest.raises(ConfigError, match="Did you mean 'optimizer'"):
        ExperimentConfig.from_dict({"optimiser": {}})


def test_data_of_pretraining_and_finetuning_share_the_fields_of_batches_and_their_checks():
    assert {field.name for field in dataclasses.fields(DataConfig)} & {
        field.name for field in dataclasses.fields(FinetuneDataConfig)
    } == {field.name for field in dataclasses.fields(BatchConfig)} | {"mixing_temperature"}
    assert (DataConfig().targets_length, FinetuneDataConfig().targets_length) == (114, 128)
    for section in (BatchConfig, DataConfig, FinetuneDataConfig):
        for name in ("inputs_length", "targets_length", "batch_size", "prefetch"):
            with pytest.raises(ConfigError, match=f"data.{name} must be at least 1; it is 0"):
                section(**{name: 0})
        with pytest.raises(ConfigError, match="num_workers must not be negative"):
            section(num_workers=-1)
    assert not {field.name for field in dataclasses.fields(TaskConfig)} & {field.name for field in dataclasses.fields(BatchConfig)}
