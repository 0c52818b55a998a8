"""A decoder without an encoder through a whole run: it trains on any mesh alike, resumes to the bit, generates and is refused where
it cannot go."""

import contextlib
import dataclasses
import io
import json

import jax
import numpy as np
import pytest
from test_pretrain import documents

from flax_switch.cli import main
from flax_switch.config import ConfigError, DataConfig, ExperimentConfig, MeshConfig, OptimizerConfig, SwitchConfig, TrainConfig
from flax_switch.inspection.checkpoint import describe, render
from flax_switch.inspection.routing import explore
from flax_switch.parallel.mesh import create_mesh
from flax_switch.pretrained import load_pretrained
from flax_switch.training.metrics import read_metrics
from flax_switch.training.state import build_run, init_state
from flax_switch.training.stepper import build_stepper
from flax_switch.workflows.finish import finish
from flax_switch.workflows.pretrain import pretrain

MODEL = SwitchConfig(
    architecture="decoder_only", vocab_size=128, d_model=16, num_heads=2, d_kv=8, d_ff=16, num_decoder_layers=2,
    num_sparse_decoder_layers=1, num_experts=4, min_expert_capacity=1, init_scale=1.0, dropout_rate=0.0, router_z_loss_coef=0.01,
)  # fmt: skip
FUSED = dict(
    layer_form="fused", fused_sparse=("q_wi", "kv", "o_wo"), mlp_activations=("swish", "linear"), positions="rotary",
    scale_attention_logits=True, bidirectional_inputs=True,
)  # fmt: skip


def config_of(folder, steps=6, model=MODEL, **settings):
    return ExperimentConfig(
        model=model,
        data=DataConfig(
            source=str(folder / "text.txt"), vocabulary_size=80, num_sentinels=16, inputs_length=24, targets_length=12,
            batch_size=8, heldout_fraction=0.15, cache_dir=str(folder / "cache"), span_corruption_rate=0.0, prefix_lm_rate=1.0,
            causal_lm_rate=1.0, ul2_rate=1.0, packing=True,
        ),
        optimizer=OptimizerConfig(schedule="constant", learning_rate=0.02, warmup_steps=0, min_dim_size_to_factor=8),
        train=TrainConfig(steps=steps, log_every=1, eval_every=3, eval_batches=2, checkpoint_every=3, sample_spans=3),
        **settings,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("decoder")
    (made / "text.txt").write_text("\n".join(documents(150)))
    return made


@pytest.fixture(scope="module")
def ran(folder):
    """(result, workdir, what was printed) of a run of six steps."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        result = pretrain(config_of(folder), folder / "run")
        finish(result, folder / "run")
    return result, folder / "run", printed.getvalue()


def test_a_run_reports_what_it_reads_of_text_and_nothing_of_an_encoder(ran):
    result, workdir, printed = ran
    assert result.evaluation["text_cross_entropy"] > 0 and "nats_below_unigram" in result.evaluation
    assert not [name for name in result.evaluation if name.startswith(("encoder_gain", "masked_"))]
    assert "Held-out text continued" in printed and "gaps" not in printed
    samples = json.loads((workdir / "samples.json").read_text())
    assert len(samples) == 3 and all({"model", "text"} == set(sample["pieces"][1]) for sample in samples)
    page = (workdir / "report.html").read_text()
    assert "Text continued" in page and "2 decoder layers, 1 of them" in page


def test_an_interrupted_run_ends_as_an_undisturbed_one_to_the_bit(ran, folder):
    workdir = folder / "resumed"
    for steps in (3, 6):
        result = pretrain(config_of(folder, steps), workdir)
    timing = ("seconds_per_step", "tokens_per_second", "data_wait_fraction")
    lines = [[{k: v for k, v in line.items() if k not in timing} for line in read_metrics(w)] for w in (ran[1], workdir)]
    assert lines[0] == lines[1]
    jax.tree.map(np.testing.assert_array_equal, *(jax.device_get(r.state.params) for r in (ran[0], result)))


def test_a_workdir_is_a_model_that_continues_text(ran):
    model = load_pretrained(ran[1])
    output = model.generate("ba ke lo", max_new_tokens=4)
    assert output.texts[0].startswith("ba ke lo")
    several = model.generate(["ba ke lo", "mi"], max_new_tokens=4, num_beams=2)
    assert [text.startswith(begin) for text, begin in zip(several.texts, ("ba ke lo", "mi"), strict=True)] == [True, True]
    assert model.generate("", max_new_tokens=2).sequences.shape == (1, 5)  # padding, the start token and two more
    labels = model.vocabulary.encode("ba ke lo")
    with_inputs = model([0, *labels[:-1]]).logits
    np.testing.assert_allclose(model(labels=labels).logits, with_inputs, atol=1e-6)
    assert np.isfinite(float(model(labels=labels, output_router_logits=True).loss))
    with pytest.raises(ConfigError, match="one sequence"):
        model(labels, labels=labels)
    with pytest.raises(ConfigError, match="no encoder"):
        model.encode(labels)


def test_it_is_inspected_and_saved_and_not_exported_to_hugging_face(ran, tmp_path, capsys):
    assert "decoder layers 1" in render(describe(ran[1]))
    explored = explore(load_pretrained(ran[1]), ["ba ke lo"])
    assert [stack.stack for stack in explored.texts[0]] == ["decoder"]
    assert main(["convert", str(ran[1]), str(tmp_path / "ours"), "--to", "flax_switch"]) == 0
    back, model = load_pretrained(tmp_path / "ours"), load_pretrained(ran[1])
    assert back.config == model.config
    jax.tree.map(np.testing.assert_array_equal, back.params, model.params)
    quantised = load_pretrained(tmp_path / "ours", weights="int8")
    assert quantised.generate("ba ke lo", max_new_tokens=2).texts[0].startswith("ba ke lo")
    capsys.readouterr()
    assert main(["convert", str(ran[1]), str(tmp_path / "theirs"), "--to", "huggingface"]) != 0
    said = capsys.readouterr().err
    assert "architecture='decoder_only'" in said and "flax_switch" in said and not (tmp_path / "theirs").exists()


def test_scanned_and_unscanned_parameters_are_one_model(ran, tmp_path):
    config = MODEL.replace(**FUSED, num_decoder_layers=4, num_sparse_decoder_layers=2)
    from flax_switch.nn.init import init_params
    from flax_switch.pretrained import save_pretrained

    params = init_params(config, jax.random.key(0))
    save_pretrained(tmp_path, config, params, format="flax_switch")
    scanned = load_pretrained(tmp_path, scan_layers=True)
    ids = np.arange(12).reshape(2, 6) + 3
    np.testing.assert_allclose(scanned(ids).logits, load_pretrained(tmp_path)(ids).logits, atol=1e-5)
    save_pretrained(tmp_path / "again", scanned.config, scanned.params, format="flax_switch")
    jax.tree.map(np.testing.assert_array_equal, load_pretrained(tmp_path / "again", scan_layers=False).params, params)


MESHES = [
    MeshConfig(data=2, expert=2, model=2), MeshConfig(data=2, expert=4), MeshConfig(data=2, expert=2, model=2, fsdp=True),
    MeshConfig(data=2, expert=4, mode="pmap"),
]  # fmt: skip
MODELS = {
    "sequential": MODEL,
    "fused": MODEL.replace(**FUSED),
    "parallel, dropless": MODEL.replace(
        layer_form="parallel", capacity_mode="dropless", num_selected_experts=2, expert_parallel_buffer_factor=8.0
    ),
    "fused, dropless": MODEL.replace(**FUSED, capacity_mode="dropless", expert_parallel_buffer_factor=8.0),
}


def trained(folder, model, mesh, steps=3, microbatches=1):
    """(parameters, losses) after some steps."""
    config = config_of(folder, model=MODELS[model], mesh=mesh)
    config = config.replace(train=config.train.replace(microbatches=microbatches))
    run = build_run(config, create_mesh(mesh, jax.devices()[: mesh.data * mesh.expert * mesh.model]))
    stepper, losses = build_stepper(run), []
    state = stepper.hold(init_state(run))
    for batch in batches_of(config, steps):
        state, metrics = stepper.step(state, batch)
        losses.append(float(metrics["loss"]))
    return jax.device_get(stepper.release(state).params), losses


def batches_of(config, steps):
    from flax_switch.data import prepare

    iterator = prepare(config.data, quiet=True).train_iterator()
    made = [next(iterator) for _ in range(steps)]
    iterator.close()
    return made


@pytest.mark.parametrize("mesh", [MESHES[0], *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in MESHES[1:])], ids=str)
@pytest.mark.parametrize("model", ["sequential", "fused", *(pytest.param(m, marks=pytest.mark.slow) for m in list(MODELS)[2:])])
def test_eight_devices_train_as_one_does(folder, model, mesh):
    (alone, losses), (together, their_losses) = (trained(folder, model, m) for m in (MeshConfig(data=1), mesh))
    np.testing.assert_allclose(their_losses, losses, rtol=2e-5)
    for (path, a), (_, b) in zip(*(jax.tree_util.tree_leaves_with_path(t) for t in (together, alone)), strict=True):
        np.testing.assert_allclose(a, b, rtol=5e-4, atol=5e-5, err_msg=jax.tree_util.keystr(path))


@pytest.mark.slow
def test_micro_batches_train_alike(folder):
    (whole, losses), (pieces, their_losses) = (trained(folder, "fused", MeshConfig(data=1), microbatches=n) for n in (1, 2))
    np.testing.assert_allclose(their_losses, losses, rtol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=5e-4, atol=5e-5), pieces, whole)


def test_batches_have_the_form_that_the_model_reads(folder):
    config = config_of(folder)
    assert config.data.joined and ExperimentConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match=r"data\.joined=False"):
        config.replace(model=SwitchConfig(vocab_size=128))
    with pytest.raises(ConfigError, match=r"causal_lm_rate .*architecture='decoder_only'"):
        ExperimentConfig(data=DataConfig(causal_lm_rate=1.0))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(router_type="experts_choose"), "router_type='experts_choose'"),
        (dict(batch_prioritized_routing=True), "batch_prioritized_routing=True is not for architecture='decoder_only'"),
        (dict(copying_heads=1), "copying_heads=1"),
        (dict(separate_embeddings=True, tie_word_embeddings=False), "separate_embeddings=True"),
        (dict(layer_form="fused", extra_mlp=True), "extra_mlp=True is not for layer_form='fused'"),
        (dict(layer_form="fused", shared_expert=True), "shared_expert=True"),
        (dict(layer_form="fused", expert_d_ff=8), "expert_d_ff=8"),
        (dict(layer_form="fused", weights="int8"), "weights='int8'"),
        (dict(layer_form="fused", num_heads=3), r"num_heads \(3\) must divide d_ff"),
        (dict(layer_form="fused", fused_sparse=("o_wo", "q_wi")), "in this order"),
        (dict(positions="rotary", d_kv=7), "d_kv must be even"),
        (dict(architecture="encoder_decoder", positions="rotary"), "positions='rotary' is not for architecture='encoder_decoder'"),
        (dict(architecture="encoder_decoder", layer_form="parallel"), "layer_form='parallel'"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_fields_that_do_not_go_together_are_refused_by_name(changes, said):
    with pytest.raises(ConfigError, match=said):
        MODEL.replace(**changes)


def test_every_config_of_before_is_what_it_was():
    values = SwitchConfig().to_dict()
    new = ("architecture", "layer_form", "fused_sparse", "positions", "scale_attention_logits", "bidirectional_inputs")
    assert SwitchConfig.from_dict({k: v for k, v in values.items() if k not in new}) == SwitchConfig()
    assert {*new} <= {field.name for field in dataclasses.fields(SwitchConfig)}


def test_a_task_is_fine_tuned_and_what_is_generated_is_the_answer_alone(recipe, mesh, vocabulary, tmp_path):
    from flax_switch.nn.init import init_params
    from flax_switch.pretrained import save_pretrained
    from flax_switch.workflows.finetune import evaluate_checkpoint, finetune

    config = MODEL.replace(bidirectional_inputs=True)
    save_pretrained(tmp_path / "start", config, init_params(config, jax.random.key(0)), vocabulary, "flax_switch")
    result = finetune(recipe, tmp_path / "run", init=str(tmp_path / "start"), mesh=mesh)
    assert result.evaluation["cross_entropy"] < np.log(128)
    _, again, predictions = evaluate_checkpoint(recipe, str(tmp_path / "run"), mesh=mesh)
    assert again["cross_entropy"] == pytest.approx(result.evaluation["cross_entropy"], rel=1e-5)
    assert len(predictions) == 6 and not any("first:" in p.prediction for p in predictions)


def test_a_student_learns_from_a_teacher_that_has_no_encoder_either(ran, folder, tmp_path):
    from flax_switch.config.distillation import DistillConfig
    from flax_switch.workflows.distill import distill

    own = config_of(folder, 2)
    sections = {name: getattr(own, name) for name in ("data", "optimizer", "mesh", "train")}
    student = DistillConfig(model=MODEL.replace(num_sparse_decoder_layers=0), teacher=str(ran[1]), **sections)
    assert distill(student, tmp_path / "student").step == 2
    with pytest.raises(ConfigError, match=r"Set model\.architecture='decoder_only'"):
        other = SwitchConfig(vocab_size=128, d_model=16, num_heads=2, d_kv=8, d_ff=16)
        distill(student.replace(model=other, data=student.data.replace(joined=False, causal_lm_rate=0.0)), tmp_path / "other")


def test_a_plan_counts_one_sequence(folder):
    from flax_switch.plan.planner import plan

    config = config_of(folder, model=MODEL.replace(**FUSED))
    found = plan(config, "v5e:2x2", MeshConfig(data=2, expert=2), compile=False)
    assert found.tokens == 8 * 36 and set(found.slots_per_token) == {"decoder"} and found.exchange_bound > 0


def test_the_routing_of_a_run_is_followed_and_that_of_fused_layers_refused(ran, tmp_path):
    from flax_switch.inspection.run_routing import follow, measure
    from flax_switch.nn.init import init_params
    from flax_switch.pretrained import save_pretrained

    assert list(measure(follow(ran[1]))) == ["decoder 1"]
    fused = MODEL.replace(**FUSED)
    save_pretrained(tmp_path, fused, init_params(fused, jax.random.key(0)), load_pretrained(ran[1]).vocabulary, "flax_switch")
    with pytest.raises(ConfigError, match="a router for each"):
        explore(load_pretrained(tmp_path), ["ba ke lo"])
