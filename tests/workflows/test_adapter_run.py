"""A run with an adapter trains and keeps the adapter alone: the model stays to the bit, and the run resumes as any other."""

import json
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import flax_switch as fs
from flax_switch import cli
from flax_switch.config import ConfigError
from flax_switch.config.adapter import AdapterConfig
from flax_switch.config.finetuning import FinetuneConfig
from flax_switch.convert import CheckpointError
from flax_switch.convert.training_run import read_params
from flax_switch.nn.init import init_params
from flax_switch.training.metrics import read_metrics
from flax_switch.training.state import build_run
from flax_switch.workflows.finetune import evaluate_checkpoint, finetune

SETTINGS = AdapterConfig(rank=2, alpha=4.0, router=True, dropout=0.1)
IDS = [[5, 6, 7, 9], [8, 9, 10, 1]]


def lines_of(workdir):
    timing = ("seconds_per_step", "tokens_per_second", "data_wait_fraction")
    return [{k: v for k, v in line.items() if k not in timing} for line in read_metrics(workdir)]


def assert_it_learns(workdir):
    first, last = (line["cross_entropy"] for line in lines_of(workdir) if line["kind"] == "eval")
    assert last < first - 0.05


def logits(model):
    return np.asarray(model(input_ids=IDS, decoder_input_ids=IDS).logits)


@pytest.fixture(scope="module")
def adapting(recipe):
    return recipe.replace(adapter=SETTINGS, train=recipe.train.replace(keep_last=5))


@pytest.fixture(scope="module")
def result(adapting, checkpoint, mesh, tmp_path_factory):
    return finetune(adapting, tmp_path_factory.mktemp("run") / "run", init=checkpoint, mesh=mesh)


@pytest.fixture(scope="module")
def run(result):
    return result.workdir


def test_the_model_stays_to_the_bit_and_the_adapter_learns(result, checkpoint):
    base = fs.load_pretrained(checkpoint)
    jax.tree.map(np.testing.assert_array_equal, {k: v for k, v in result.state.params.items() if k != "adapter"}, base.params)
    parts = flatten_dict(result.state.params["adapter"], sep="/")
    assert all(np.abs(leaf).max() > 0 for path, leaf in parts.items() if path.endswith("/b"))
    assert_it_learns(result.workdir)


def test_checkpoints_and_the_optimiser_hold_the_adapter_alone(result, run):
    held = read_params(run / "checkpoints" / "4" / "params")
    assert held and all(name.startswith("adapter/") for name in held)
    size = sum(leaf.size for leaf in jax.tree.leaves(result.state.params["adapter"]))
    assert sum(leaf.size for leaf in jax.tree.leaves(result.state.opt_state)) < 2 * size + 10
    files = sorted(path.name for path in (run / "best").iterdir())
    assert files == ["adapter.safetensors", "flax_switch_adapter.json", "generation_config.json"]


def test_a_run_and_its_best_are_adapters_that_a_model_takes(result, run, checkpoint):
    base = fs.load_pretrained(checkpoint)
    found = base.with_adapter(run)
    np.testing.assert_allclose(logits(found), logits(result.model), atol=1e-6)
    adapter = fs.load_adapter(run / "best", base)
    assert adapter.config == SETTINGS and adapter.base == checkpoint
    with pytest.raises(CheckpointError, match=f"has an adapter alone, of the model {checkpoint}.*--merge"):
        fs.load_pretrained(run)
    other = base.replace(params=init_params(base.config, jax.random.key(9)))
    with pytest.raises(CheckpointError, match="is an adapter of another model"):
        fs.load_adapter(run, other)


def test_a_killed_run_continues_with_every_bit(result, run, adapting, checkpoint, mesh, tmp_path):
    again = tmp_path / "run"
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoints" / "4")
    resumed = finetune(adapting, again, init=checkpoint, mesh=mesh)
    assert lines_of(again) == lines_of(run)
    jax.tree.map(np.testing.assert_array_equal, resumed.state, result.state)


def test_a_run_that_resumes_on_another_model_is_refused(run, adapting, checkpoint, mesh, tmp_path):
    again, moved = tmp_path / "run", tmp_path / "model"
    shutil.copytree(run, again)
    base = fs.load_pretrained(checkpoint)
    fs.save_pretrained(moved, base.config, init_params(base.config, jax.random.key(9)), base.vocabulary, "flax_switch")
    config = json.loads((again / "config.json").read_text())
    (again / "config.json").write_text(json.dumps({**config, "init": str(moved)}))
    with pytest.raises(ConfigError, match="is another model than the one that this run's adapter is trained on"):
        finetune(adapting.replace(train=adapting.train.replace(steps=6)), again, init=str(moved), mesh=mesh)


def test_an_adapter_of_a_model_that_is_drawn_is_refused(adapting, checkpoint, mesh, tmp_path):
    with pytest.raises(ConfigError, match="draws a model that no file holds"):
        finetune(adapting, tmp_path / "run", init=f"random:{checkpoint}", mesh=mesh)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes",
    [
        dict(weights="int8"),
        pytest.param(dict(param_dtype="bfloat16"), marks=pytest.mark.slow),
        pytest.param(dict(scan_layers=True), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_model_may_be_rounded_or_scanned(changes, adapting, checkpoint, mesh, tmp_path):
    recipe = adapting.replace(model=changes, adapter=SETTINGS.replace(use_dora=True))
    result = finetune(recipe, tmp_path / "run", init=checkpoint, mesh=mesh)
    assert_it_learns(tmp_path / "run")
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(result.state.params["adapter"]))
    dtype, others = changes.get("param_dtype"), {name: value for name, value in changes.items() if name != "param_dtype"}
    as_trained = dict(kernels="integers") if "weights" in changes else {}
    found = fs.load_pretrained(checkpoint, dtype=dtype, **as_trained, **others).with_adapter(tmp_path / "run")
    np.testing.assert_allclose(logits(found), logits(result.model), atol=2e-2 if dtype else 1e-5)


def test_commands_generate_inspect_convert_and_report_it(run, checkpoint, tmp_path, capsys):
    call = lambda *arguments: cli.main([*map(str, arguments)])  # noqa: E731
    (tmp_path / "texts.txt").write_text("first: ba ke\n")
    for adapter in (run, run / "best"):
        assert call("generate", "--checkpoint", checkpoint, "--adapter", adapter, "--input", tmp_path / "texts.txt") == 0
        assert len(json.loads(capsys.readouterr().out)["outputs"]) == 1
        assert call("inspect", adapter) == 0
        out = capsys.readouterr().out
        assert "rank            2, alpha 4, scaled by alpha / rank, dropout 0.1" in out and f"model           {checkpoint}" in out
    look = ("inspect", checkpoint, "--adapter", run)
    assert call(*look, "--text", "first: ba ke", "--target", "ba", "--json") == 0
    assert json.loads(capsys.readouterr().out)["num_experts"] == 2
    assert call(*look) == 2 and "--adapter are for running the model; give a --text" in capsys.readouterr().err
    assert call("convert", run, tmp_path / "merged", "--base", checkpoint, "--merge", "--to", "flax_switch", "--no-progress") == 0
    merged = fs.load_pretrained(tmp_path / "merged")
    np.testing.assert_allclose(logits(merged), logits(fs.load_pretrained(checkpoint).with_adapter(run)), atol=1e-5)
    assert merged.prefixes == ("first: ",) and merged.vocabulary is not None
    assert call("report", run) == 0
    assert "LoRA of rank 2, alpha 4, on all: " in (run / "report.html").read_text()
    assert call("convert", run, tmp_path / "whole", "--to", "huggingface") == 2
    assert "has an adapter alone" in capsys.readouterr().err


def test_beside_its_model_it_scores_what_the_run_says(result, run, adapting, checkpoint, mesh):
    scores = evaluate_checkpoint(adapting, checkpoint, mesh=mesh, adapter=run)[1]
    assert scores == result.evaluation


@pytest.mark.slow
def test_evaluated_on_all_devices_it_scores_what_the_run_says(result, run, checkpoint, tmp_path):
    """The recipe is that of the adapter's run."""
    assert cli.main(["evaluate", "--checkpoint", checkpoint, "--adapter", str(run), "--output", str(tmp_path)]) == 0
    scores = json.loads((tmp_path / "metrics.json").read_text())
    assert scores["accuracy"] == result.evaluation["accuracy"]
    assert scores["cross_entropy"] == pytest.approx(result.evaluation["cross_entropy"], rel=1e-5)
    assert cli.main(["evaluate", "--checkpoint", str(run), "--output", str(tmp_path)]) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(name="muon"), "optimizer.name='muon' moves a parameter by its size, and an adapter's b begins at zero"),
        (dict(trainable="router"), "adapter.rank=2 trains the adapter alone; leave optimizer.trainable='router' out"),
    ],
)
def test_settings_that_contradict_an_adapter_are_named(changes, message):
    with pytest.raises(ConfigError) as error:
        FinetuneConfig.from_dict({"adapter": {"rank": 2}, "optimizer": changes})
    assert message in str(error.value)


def test_adafactor_of_an_adapter_moves_what_begins_at_zero():
    config = FinetuneConfig.from_dict({"adapter": {"rank": 2}})
    assert config.optimizer.name == "adafactor" and not config.optimizer.multiply_by_parameter_scale
    assert FinetuneConfig.from_dict(config.to_dict()) == config


@pytest.mark.slow
def test_on_a_mesh_a_run_has_the_losses_of_one_device(adapting, checkpoint, result, tmp_path):
    from flax_switch.config import MeshConfig
    from flax_switch.parallel.mesh import create_mesh

    mesh = create_mesh(MeshConfig(data=2, expert=2), jax.devices()[:4])
    recipe = adapting.replace(mesh=MeshConfig(data=2, expert=2))
    spread = finetune(recipe, tmp_path / "run", init=checkpoint, mesh=mesh)
    one, four = ([line["loss"] for line in lines_of(w) if line["kind"] == "train"] for w in (result.workdir, tmp_path / "run"))
    np.testing.assert_allclose(four, one, rtol=1e-3)
    shardings = {path: leaf.sharding.spec for path, leaf in flatten_dict(spread.state.params["adapter"], sep="/").items()}
    assert all(("expert" in spec) == ("/expert/" in path) for path, spec in shardings.items())
    assert build_run(spread.run.config, mesh).abstract_state.params["adapter"].keys() == {"encoder", "decoder"}
