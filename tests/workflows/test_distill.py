"""Distillation: the loss against a loop, who learns and who does not, what is copied, and a run from the command line."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_switch import cli
from flax_switch.config import ConfigError, SwitchConfig
from flax_switch.config.distillation import DistillationConfig, DistillConfig
from flax_switch.convert.canonical import canonical_shapes
from flax_switch.convert.checkpoint import open_checkpoint
from flax_switch.data import Vocabulary
from flax_switch.nn.outputs import ModelOutput
from flax_switch.ops.kernels.head_loss import Head
from flax_switch.ops.losses import seq2seq_loss
from flax_switch.parallel.placement import ONE_DEVICE
from flax_switch.pretrained import load_pretrained, save_pretrained
from flax_switch.training.checkpoint import read_config
from flax_switch.training.metrics import read_metrics
from flax_switch.workflows.distill import check_teacher, copied_weights, distill

STUDENT = SwitchConfig(
    vocab_size=128, d_model=16, num_heads=2, d_kv=8, d_ff=16, num_encoder_layers=2, num_decoder_layers=2,
    num_sparse_encoder_layers=0, num_sparse_decoder_layers=0, num_experts=4, init_scale=1.0, dropout_rate=0.1,
)  # fmt: skip
TEACHER = STUDENT.replace(num_sparse_encoder_layers=1, num_sparse_decoder_layers=1)
random = np.random.default_rng(0)
LOGITS, TEACHERS = random.normal(0, 2, (2, 2, 3, 11)).astype(np.float32)
LABELS = np.array([[4, 7, -100], [2, -100, -100]])
WEIGHTS = (LABELS >= 0).astype(np.float32)


def losses(logits, teacher_logits, weight):
    """The mixed loss of arrays, without z-loss and routers."""
    head, teacher = (Head(jnp.asarray(x), jnp.eye(11), 11, 1.0, True, ONE_DEVICE) for x in (logits, teacher_logits))
    output = ModelOutput(logits=None, decoder_last_hidden_state=None, head=head)
    config = STUDENT.replace(vocab_size=11, z_loss_coef=0.0)
    return seq2seq_loss(output, LABELS, config, teacher=teacher, teacher_weight=weight)


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_the_loss_is_the_cross_entropy_against_the_mixture_of_the_truth_and_the_teachers_distribution(weight):
    total = 0.0
    for b, position in zip(*np.nonzero(WEIGHTS), strict=True):
        student, teacher = LOGITS[b, position].astype(np.float64), TEACHERS[b, position].astype(np.float64)
        target = weight * np.exp(teacher) / np.exp(teacher).sum()  # all of the distribution, at temperature 1
        target[LABELS[b, position]] += 1 - weight
        total += -(target * (student - np.log(np.exp(student).sum()))).sum()
    loss = losses(LOGITS, TEACHERS, weight)
    assert float(loss.loss) == pytest.approx(total / 3, rel=1e-5)
    assert float(loss.cross_entropy) == pytest.approx(float(losses(LOGITS, TEACHERS, 0.0).cross_entropy))


def test_no_gradient_reaches_the_teacher_and_a_student_that_agrees_with_it_has_none_from_it():
    student, teacher = jax.grad(lambda s, t: losses(s, t, 0.25).loss, argnums=(0, 1))(LOGITS, TEACHERS)
    assert not np.any(teacher)
    assert np.all(np.any(student, axis=-1) == (WEIGHTS > 0))
    agreeing = jax.grad(lambda s: losses(s, TEACHERS, 1.0).loss)(TEACHERS)
    np.testing.assert_allclose(agreeing, 0, atol=1e-6)


# --- checkpoints
@pytest.fixture(scope="module")
def vocabulary():
    words = [f"{a}{b}" for a in ("ba", "do", "ki", "mu", "re") for b in ("lan", "ter", "so", "vi", "nok", "pa")]
    documents = [" ".join(np.random.default_rng(i).choice(words, 30)) for i in range(60)]
    return documents, Vocabulary.train(documents, 50, 40)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, vocabulary):
    path = tmp_path_factory.mktemp("teacher") / "teacher"
    draw = np.random.default_rng(1)
    params = {name: draw.normal(0, 0.3, shape).astype(np.float32) for name, shape in canonical_shapes(TEACHER).items()}
    return save_pretrained(path, TEACHER, params, vocabulary[1], format="flax_switch")


def test_everything_is_copied_but_what_lies_in_the_teachers_expert_layers(teacher):
    opened = open_checkpoint(teacher)
    copied = copied_weights(opened, STUDENT)
    fresh = {f"{stack}/layers_1/mlp/{name}/kernel" for stack in ("encoder", "decoder") for name in ("wi", "wo")}
    assert canonical_shapes(STUDENT).keys() - copied.keys() == fresh
    for path, tensor in copied.items():
        np.testing.assert_array_equal(tensor.numpy(), opened.tensors[path].numpy())
    half = STUDENT.replace(num_encoder_layers=1, num_decoder_layers=1)
    assert all("layers_1" not in path for path in copied_weights(opened, half))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"d_ff": 24}, r"layers_0/mlp/wi/kernel has the shape \(16, 24\), the teacher's has \(16, 16\)"),
        ({"num_encoder_layers": 3}, "encoder/layers_2/.* does not exist"),
    ],
)
def test_a_student_of_other_sizes_cannot_start_from_the_teachers_weights(teacher, changes, words):
    with pytest.raises(ConfigError, match=words):
        copied_weights(open_checkpoint(teacher), STUDENT.replace(**changes))


def test_a_teacher_with_other_tokens_or_without_a_head_is_refused():
    config = DistillConfig(model=STUDENT, teacher="there")
    with pytest.raises(ConfigError, match="one vocabulary.*set model.vocab_size=256"):
        check_teacher(config, TEACHER.replace(vocab_size=256))
    with pytest.raises(ConfigError, match="eos_token_id is 2"):
        check_teacher(config, TEACHER.replace(eos_token_id=2))
    with pytest.raises(ConfigError, match="encoder model"):
        check_teacher(config, TEACHER, "encoder")
    with pytest.raises(ConfigError, match="teacher_weight must lie in"):
        DistillationConfig(teacher_weight=1.5)


# --- a run
SETTINGS = [
    "data.vocabulary_size=50", "data.num_sentinels=40", "data.inputs_length=16", "data.targets_length=8", "data.batch_size=8",
    "data.heldout_fraction=0.2", "train.steps=4", "train.log_every=1", "train.eval_every=4", "train.eval_batches=1",
    "train.checkpoint_every=2", "train.sample_spans=0", "optimizer.warmup_steps=2",
]  # fmt: skip


@pytest.fixture
def argv(tmp_path, vocabulary, teacher, monkeypatch):
    devices = jax.devices()[:1]  # one compiles faster than eight
    monkeypatch.setattr(jax, "devices", lambda: devices)
    (tmp_path / "text.txt").write_text("\n".join(vocabulary[0]))
    model = {
        name: value for name, value in STUDENT.to_dict().items() if isinstance(value, int | float) and name != "label_smoothing"
    }
    model |= {"num_encoder_layers": 1, "num_decoder_layers": 1}  # compiles in half the time; the teacher's first layers are dense
    settings = [*SETTINGS, *(f"model.{name}={value}" for name, value in model.items()), f"data.source={tmp_path / 'text.txt'}"]
    settings.append(f"data.cache_dir={tmp_path / 'cache'}")
    start = ["distill", "--config", "configs/distill_tiny.py", "--teacher", str(teacher), "--workdir", str(tmp_path / "run")]
    return [*start, *(f"--config.{setting}" for setting in settings)]


def computed(workdir):
    timing = ("seconds_per_step", "tokens_per_second", "data_wait_fraction")
    return [{k: v for k, v in line.items() if k not in timing} for line in read_metrics(workdir)]


def test_a_student_is_trained_from_the_command_line(argv, tmp_path, teacher, vocabulary):
    assert cli.main(argv) == 0
    run = tmp_path / "run"
    lines = [line for line in computed(run) if line["kind"] == "train"]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["loss"] != pytest.approx(line["cross_entropy"], rel=1e-5) for line in lines)
    student = load_pretrained(run)
    assert student.config.num_sparse_encoder_layers == 0 and student.vocabulary.fingerprint == vocabulary[1].fingerprint
    assert json.loads((run / "config.json").read_text())["teacher"] == str(teacher)


@pytest.mark.slow
def test_a_run_cut_short_repeats_what_it_lost(argv, tmp_path):
    assert cli.main(argv) == 0
    run = tmp_path / "run"
    first = computed(run)
    shutil.rmtree(run / "checkpoints" / "4")
    result = distill(read_config(run), run)
    assert result.finished and result.step == 4
    assert computed(run) == first


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--config.model.vocab_size=256"], "set model.vocab_size=128"),
        (["--config.distillation.teacher_wait=0.5"], "Did you mean 'teacher_weight'"),
        (["--config.data.vocabulary={tmp}/other.model"], "Leave data.vocabulary out"),
        (["--teacher", "{tmp}/nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_distilled_is_one_clear_message(argv, more, words, tmp_path, vocabulary, capsys):
    (tmp_path / "other.model").write_bytes(Vocabulary.train(vocabulary[0], 45, 40).model)
    assert cli.main([*argv, *(text.format(tmp=tmp_path) for text in more)]) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error
