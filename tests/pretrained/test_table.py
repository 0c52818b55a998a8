"""What a person sees of configs, models and states: lines, and a table, not arrays."""

import dataclasses
import re
import xml.etree.ElementTree as ElementTree

import jax
import numpy as np
import pytest

import flax_switch as fs
from flax_switch.config import DataConfig, ExperimentConfig, OptimizerConfig
from flax_switch.config.presets import PRESETS
from flax_switch.config.sizes import count_parameters
from flax_switch.nn.fields import shown
from flax_switch.pretrained import table

SMALL = PRESETS["switch-tiny"].replace(d_model=16, num_heads=2, d_kv=8, d_ff=32)


def model(config):
    return fs.Pretrained(config, fs.SwitchTransformer(config), fs.init_params(config, jax.random.key(0)))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_says_its_name(name):
    assert eval(repr(PRESETS[name])) == PRESETS[name]
    assert len(repr(PRESETS[name])) < 60


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (fs.SwitchConfig(), "SwitchConfig()"),
        (fs.SwitchConfig(num_experts=16), "SwitchConfig(num_experts=16)"),
        (PRESETS["st-moe-32b"].replace(dropout_rate=0.1), "PRESETS['st-moe-32b'].replace(dropout_rate=0.1)"),
        (SMALL, "PRESETS['switch-tiny'].replace(d_model=16, num_heads=2, d_kv=8, d_ff=32)"),
        (OptimizerConfig(name="adamw", b1=0.5), "OptimizerConfig(name='adamw', b1=0.5)"),
        (ExperimentConfig(data=DataConfig(batch_size=8)), "ExperimentConfig(data=DataConfig(batch_size=8))"),
    ],
    ids=str,
)
def test_a_config_is_one_line_that_makes_it_again(config, said):
    assert repr(config) == said
    assert eval(said, {**globals(), "SwitchConfig": fs.SwitchConfig}) == config


def test_a_model_is_a_table_of_its_parameters_with_their_sum():
    said = repr(model(SMALL))
    assert len(said) < 2000 and max(map(len, said.splitlines())) <= 120
    assert repr(SMALL) in said and "vocabulary  none" in said
    counts = [int(number.replace(",", "")) for number in re.findall(r"^(?!config)\S.*?  +([\d,]+)  .*float32$", said, re.MULTILINE)]
    assert counts[-1] == count_parameters(SMALL).total == sum(counts[:-1])
    for part in ("embeddings and head", "encoder experts", "encoder routers", "decoder attention", "decoder dense MLPs"):
        assert f"\n{part} " in said


def test_the_table_counts_bytes_by_dtype():
    params = {"encoder": {"layers_0": {"mlp": {"expert": {"wi": {"kernel": np.zeros((2, 3, 4), np.float16)}}}}}}
    assert table.rows(params) == [("encoder experts", "24", "48 B", "float16"), ("all", "24", "48 B", "float16")]
    assert [table.in_bytes(n) for n in (0, 1023, 1024, 3 * 2**20, 2**30 * 27 + 2**29)] == [
        "0 B", "1023 B", "1.0 KiB", "3.0 MiB", "27.5 GiB",
    ]  # fmt: skip


def test_a_notebook_shows_the_same_as_a_table_of_html():
    small = model(SMALL)
    page = small._repr_html_()
    assert page.count("<tr>") == len(table.rows(small.params)) + 1
    assert "<script" not in page and "&#x27;switch-tiny&#x27;" in page
    assert all(f"<td>{cell}</td>" in page for row in table.rows(small.params) for cell in row)


def test_a_notebook_shows_a_config_as_its_line_over_every_field():
    config = ExperimentConfig(model=SMALL, data=DataConfig(source="<b>.txt", batch_size=8))
    page = config._repr_html_()
    root = ElementTree.fromstring(page)  # tags are closed, and values are no tags
    assert root.find("code").text == repr(config) and "<b>.txt" not in page
    shown = {"".join(row[0].itertext()): row[1] for row in root.iter("tr")}
    for section in (config, config.data, SMALL):
        assert {field.name for field in dataclasses.fields(section)} <= shown.keys()
    assert shown["batch_size"].find("code").text == "8"
    (model,) = [row[1] for row in root.find("details/table") if row[0].find("b") is not None and row[0][0].text == "model"]
    assert model.find(".//code").text == repr(SMALL)
    bold = {"".join(row[0].itertext()) for row in root.iter("tr") if row[0].find("b") is not None}
    assert {"data", "batch_size", "source", "d_model"} <= bold and not {"packing", "optimizer"} & bold


def test_a_linen_module_and_a_state_are_short_too():
    assert len(repr(fs.SwitchTransformer(SMALL))) < 300
    params = fs.init_params(SMALL, jax.random.key(0))
    state = fs.TrainState.create(params, fs.optimizer(SMALL))
    count = count_parameters(SMALL).total
    assert re.fullmatch(rf"TrainState\(step=0, {count:,} parameters, [\d,]+ numbers of the optimiser's\)", repr(state))
    assert len(repr(jax.eval_shape(lambda: state))) < 200


def test_values_are_shown_short():
    assert shown(np.float32(2.0)) == "2" and shown(np.array(2.3456789)) == "2.3457" and shown(7) == "7"
    assert shown((np.zeros(2), np.zeros(3))) == "(float64[2], float64[3])"
    assert shown(("a", "a")) == "('a', 'a')"
