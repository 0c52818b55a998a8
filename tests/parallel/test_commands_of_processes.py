"""Fine-tuning, evaluation, generation and distillation by several processes: what one process with as many devices does."""

import json
import re
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from test_processes import HEARTBEAT, Processes, assert_same_to_rounding, environment, free_port, metrics, wait_for

from flax_switch import cli
from flax_switch.config import SwitchConfig
from flax_switch.config.distillation import DistillConfig
from flax_switch.config.finetuning import (
    EvaluationConfig,
    FinetuneDataConfig,
    FinetuneOptimizerConfig,
    FinetuneRecipe,
    FinetuneTrainConfig,
)
from flax_switch.config.run import DataConfig, MeshConfig, OptimizerConfig, TrainConfig
from flax_switch.convert.safetensors_file import read_safetensors
from flax_switch.convert.tensors import from_array
from flax_switch.data import Vocabulary
from flax_switch.nn.init import init_params
from flax_switch.nn.transformer import SwitchTransformer
from flax_switch.parallel import arrays
from flax_switch.parallel.mesh import create_mesh
from flax_switch.parallel.processes import LOST_ANOTHER
from flax_switch.pretrained import load_pretrained, save_pretrained
from flax_switch.training.metrics import read_metrics

WORKER = str(Path(__file__).with_name("commands_worker.py"))
WORDS = ["ba", "ke", "lo", "mi", "nu", "ra", "se", "ti", "vo", "zu"]
MODEL = SwitchConfig(
    vocab_size=128, d_model=16, num_heads=2, d_kv=8, d_ff=16, num_encoder_layers=1, num_decoder_layers=1,
    num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=2, dropout_rate=0.1, expert_dropout_rate=0.0,
    init_scale=1.0,
)  # fmt: skip
STUDENT = MODEL.replace(num_sparse_encoder_layers=0, num_sparse_decoder_layers=0)


def write_recipe(path, recipe):
    path.write_text(
        "from flax_switch.config.kinds import RECIPES\nfrom flax_switch.config.recipes import to_config_dict\n\n"
        f"def get_config():\n    return to_config_dict(RECIPES[{recipe.kind!r}].from_dict({recipe.to_dict()!r}))\n"
    )
    return str(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a model, examples, texts and recipes."""
    folder = tmp_path_factory.mktemp("made")
    rng = np.random.default_rng(0)
    lists = [" ".join(rng.choice(WORDS, rng.integers(2, 5))) for _ in range(120)]
    for name, texts in (("train", lists[:80]), ("validation", lists[80:91])):  # 11: the last batch is filled up
        rows = [{"list": text, "first": text.split()[0], "label": int(text < "m")} for text in texts]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "texts.txt").write_text("\n".join(f"first: {text}" for text in lists[90:101]))
    (folder / "corpus.txt").write_text("\n".join(" ".join(rng.choice(WORDS, 30)) for _ in range(60)))
    vocabulary = Vocabulary.train([*lists, *("first: " + text for text in lists)], 28, num_sentinels=20)
    params = init_params(SwitchTransformer(MODEL), jax.random.key(0))
    save_pretrained(folder / "model", MODEL, params, vocabulary, "flax_switch")
    recipe = FinetuneRecipe(
        data=FinetuneDataConfig(
            train=str(folder / "train.jsonl"), validation=str(folder / "validation.jsonl"), inputs="list", targets="first",
            prefix="first: ", inputs_length=16, targets_length=4, batch_size=8,
        ),
        optimizer=FinetuneOptimizerConfig(name="adamw", learning_rate=1e-2),
        mesh=MeshConfig(expert=2),
        train=FinetuneTrainConfig(steps=4, log_every=1, eval_every=2, eval_batches=2, checkpoint_every=2, sample_spans=2),
        evaluation=EvaluationConfig(metrics=("accuracy",), batch_size=8, num_beams=2),
    )  # fmt: skip
    write_recipe(folder / "finetune.py", recipe)
    longer = recipe.train.replace(steps=60, eval_every=20, checkpoint_every=10)
    write_recipe(folder / "long_finetune.py", recipe.replace(train=longer))
    student = DistillConfig(
        model=STUDENT,
        data=DataConfig(
            source=str(folder / "corpus.txt"), inputs_length=16, targets_length=8, batch_size=8, num_sentinels=20,
            heldout_fraction=0.2, cache_dir=str(folder / "cache"),
        ),
        optimizer=OptimizerConfig(name="adamw", learning_rate=1e-3, warmup_steps=2),  # Adafactor's first updates enlarge rounding
        train=TrainConfig(steps=4, log_every=1, eval_every=4, eval_batches=1, checkpoint_every=2, sample_spans=2),
    )  # fmt: skip
    write_recipe(folder / "distill.py", student)
    longer = student.train.replace(steps=60, eval_every=30, checkpoint_every=10)
    write_recipe(folder / "long_distill.py", student.replace(train=longer))
    (folder / "many.txt").write_text("\n".join(f"first: {' '.join(rng.choice(WORDS, 3))}" for _ in range(300)))
    return folder


def commands(made, out):
    """Every command that several processes run, into a folder."""
    model, tuned, texts = str(made / "model"), str(out / "tuned"), ["--input", str(made / "texts.txt"), "--batch-size=4"]
    finetune = ["finetune", "--config", str(made / "finetune.py"), "--init", model, "--workdir"]
    generate = ["generate", "--checkpoint", tuned, *texts, "--max-new-tokens=6", "--output"]
    distill = ["distill", "--config", str(made / "distill.py"), "--teacher", model, "--workdir"]
    classes = ["model.head=classification", "model.labels=('late','early')", "data.labels=('late','early')", "data.targets=label"]
    return [
        [*finetune, tuned],
        ["evaluate", "--checkpoint", f"{tuned}/best", "--output", str(out / "scores")],
        [*generate, str(out / "beams.jsonl"), "--mesh=expert=2", "--num-beams=2"],
        [*generate, str(out / "draws.jsonl"), "--mesh=data=-1", "--do-sample"],
        [*finetune, str(out / "adapter"), "--config.adapter.rank=2"],
        [*finetune, str(out / "classes"), *(f"--config.{setting}" for setting in classes)],
        [*distill, str(out / "student")],
        [*distill, str(out / "taught"), f"--config.distillation.cached_teacher={out / 'kept'}", "--config.distillation.top_k=8"],
    ]


def run_commands(made, out, count, devices):
    """Runs them in so many processes with so many devices each."""
    out.mkdir()
    (out / "commands.json").write_text(json.dumps(commands(made, out)))
    one = [sys.executable, WORKER, str(out / "commands.json"), *(["alone"] if count == 1 else [])]
    address = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": str(count)}
    environments = [{**environment(devices), **address, "JAX_PROCESS_ID": str(i)} for i in range(count)]
    with Processes([one] * count, out / "logs", environments) as processes:
        processes.succeed()
    for i in range(1, count):
        assert "step" not in processes.text(i), "process 0 alone reports"
    return out


def texts_left(out):
    """The files of texts that commands left, by name; of generated lines without their scores, which are numbers."""
    patterns = ("*/predictions/*.jsonl", "scores/predictions.jsonl", "*.jsonl", "*/samples.json", "*/tasks.json")
    found = {str(path.relative_to(out)): path.read_text() for pattern in patterns for path in out.glob(pattern)}
    return {name: re.sub(r', "scores": \[.*\]', "", text) if name == "beams.jsonl" else text for name, text in found.items()}


def numbers_left(out):
    """Metrics by command, the scores, and parameters by folder."""
    values = {name: metrics(out / name) for name in ("tuned", "adapter", "classes", "student", "taught")}
    scores = {"step": 0, "kind": "eval", **json.loads((out / "scores" / "metrics.json").read_text())}
    scores["beams"] = [json.loads(line)["scores"] for line in (out / "beams.jsonl").read_text().splitlines()]
    params = {name: load_pretrained(out / name).params for name in ("tuned", "classes/best", "student")}
    return {**values, "scores": [scores]}, params, read_safetensors(out / "adapter" / "best" / "adapter.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_processes_do_what_one_process_with_as_many_devices_does(made, tmp_path, count):
    one, some = (run_commands(made, tmp_path / "one", 1, count), run_commands(made, tmp_path / "some", count, 1))
    texts = texts_left(one)
    assert {"beams.jsonl", "draws.jsonl", "scores/predictions.jsonl", "tuned/predictions/step_4.jsonl"} <= texts.keys()
    assert len(texts["beams.jsonl"].splitlines()) == len(texts["scores/predictions.jsonl"].splitlines()) == 11
    assert texts == texts_left(some)
    (values, params, adapter), (values2, params2, adapter2) = numbers_left(one), numbers_left(some)
    adapter, adapter2 = ({name: tensor.numpy() for name, tensor in found.items()} for found in (adapter, adapter2))
    if count == 2:  # the sum of two numbers is the same in any order
        assert values == values2
        jax.tree.map(np.testing.assert_array_equal, (params, adapter), (params2, adapter2))
        return
    for name in values:
        assert_same_to_rounding(values2[name], values[name])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), (params, adapter), (params2, adapter2))


# --- killed, and started again
def long_commands(made, out):
    """Commands that take long enough to be killed, each with what says how far it is, and how far is far enough."""
    model, steps = str(made / "model"), lambda name: lambda: max((line["step"] for line in read_metrics(out / name)), default=0)
    lines = lambda: len(partial.read_text().splitlines()) if partial.exists() else 0  # noqa: E731
    partial = out / "many.jsonl.partial"
    generate = ["generate", "--checkpoint", model, "--input", str(made / "many.txt"), "--output", str(out / "many.jsonl")]
    return {
        "finetune": (["finetune", "--config", str(made / "long_finetune.py"), "--init", model, "--workdir", str(out / "finetune")],
                     steps("finetune"), 24),
        "distill": (["distill", "--config", str(made / "long_distill.py"), "--teacher", model, "--workdir", str(out / "distill")],
                    steps("distill"), 14),
        "generate": ([*generate, "--do-sample", "--max-new-tokens=8", "--batch-size=2"], lines, 12),
    }  # fmt: skip


def computed(out, name):
    """What a command left of numbers and texts."""
    if name == "generate":
        return (out / "many.jsonl").read_text()
    predictions = {path.name: path.read_text() for path in (out / name).glob("predictions/*")}
    return metrics(out / name), predictions


@pytest.fixture(scope="module")
def undisturbed(made, tmp_path_factory):
    """All of them in one process with two devices."""
    out = tmp_path_factory.mktemp("undisturbed")
    argvs = {name: argv for name, (argv, _, _) in long_commands(made, out).items()}
    argvs["generate"] += ["--mesh=data=2"]
    (out / "commands.json").write_text(json.dumps([*argvs.values()]))
    with Processes([[sys.executable, WORKER, str(out / "commands.json"), "alone"]], out / "logs", [environment(2)]) as processes:
        processes.succeed()
    return out


def started(argv, folder, count=2):
    """A command in so many processes of one device, as a user starts it."""
    command = [sys.executable, "-m", "flax_switch.cli", *argv, "--distributed", f"--coordinator-address=127.0.0.1:{free_port()}"]
    command += [f"--num-processes={count}", f"--heartbeat-timeout={HEARTBEAT}", "--connect-timeout=120"]
    return Processes([[*command, f"--process-id={i}"] for i in range(count)], folder, [environment(1)] * count)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "victim"), [("finetune", 1), ("distill", 0), ("generate", 1)])
def test_what_was_killed_goes_on_to_the_bit(made, undisturbed, tmp_path, name, victim):
    argv, reached, enough = long_commands(made, tmp_path)[name]
    with started(argv, tmp_path / "first") as processes:
        wait_for(lambda: reached() >= enough, processes)
        processes.running[victim].send_signal(signal.SIGKILL)
        assert processes.running[1 - victim].wait(HEARTBEAT + 60) == LOST_ANOTHER, processes.text(1 - victim)
    with started([*argv, *(["--resume"] if name == "generate" else [])], tmp_path / "second") as processes:
        processes.succeed()
    if name != "generate":
        assert re.search(r"from step [1-5]0\.", processes.text(0)), processes.text(0)
    assert computed(tmp_path, name) == computed(undisturbed, name)


# --- what cannot be
@pytest.mark.slow
def test_processes_that_were_started_differently_end_and_name_it(made, tmp_path):
    argv = ["finetune", "--config", str(made / "finetune.py"), "--init", str(made / "model"), "--workdir", str(tmp_path / "run")]
    command = [sys.executable, "-m", "flax_switch.cli", *argv, "--distributed", f"--coordinator-address=127.0.0.1:{free_port()}"]
    command += ["--num-processes=2", "--connect-timeout=120"]
    more = (["--process-id=0"], ["--process-id=1", "--config.evaluation.num_beams=1"])
    with Processes([[*command, *one] for one in more], tmp_path / "logs", [environment(1)] * 2) as processes:
        assert processes.wait() == [2, 2]
    assert "Process 1 differs from process 0: evaluation.num_beams is 1, in process 0 2." in processes.text(1)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generate", "--distributed"], "name a file that all can read with --input"),
        (["generate", "--distributed", "--input=texts.txt", "--stream"], "--stream writes what one process generates"),
        (["generate", "--num-processes=2"], "add --distributed"),
        (["finetune", "--config=finetune_summarization", "--init=x", "--workdir=x", "--num-processes=2"], "add --distributed"),
        (["evaluate", "--config=finetune_summarization", "--process-id=1"], "add --distributed"),
        (["distill", "--config=distill_tiny", "--teacher=x", "--workdir=x", "--num-processes=2"], "add --distributed"),
    ],
)
def test_what_several_processes_cannot_do_is_said_before_anything_is_read(argv, message, capsys):
    argv = argv if argv[0] in ("finetune", "distill") else [*argv, "--checkpoint=nowhere"]
    assert cli.main(argv) == 2
    assert message in capsys.readouterr().err


def test_process_0_reads_arrays_of_all_and_the_others_send_what_it_asks_for(monkeypatch):
    """One process plays both parts, one after another: what process 0 asks for is what the others hear."""
    mesh = create_mesh(MeshConfig(expert=4, data=2))
    x = np.arange(4 * 6 * 10, dtype=np.float32).reshape(4, 6, 10)
    place = lambda a, *axes: jax.device_put(a, NamedSharding(mesh, PartitionSpec(*axes)))  # noqa: E731
    tree = {"experts": place(x, "expert"), "kernel": place(x[0, :, :8], None, "expert"), "scale": np.float32(3)}
    monkeypatch.setattr(arrays, "readable", lambda leaf: not isinstance(leaf, jax.Array))
    said, sent, slicer = [], [], arrays._slicer
    monkeypatch.setattr(
        arrays, "_slicer", lambda mesh, sizes: lambda a, start: sent.append((a, start, sizes)) or slicer(mesh, sizes)(a, start)
    )
    monkeypatch.setattr(arrays.processes, "from_first", said.append)

    def work(found):
        np.testing.assert_array_equal(np.asarray(found["experts"]), x)
        np.testing.assert_array_equal(found["experts"][1:3, 2:5], x[1:3, 2:5])
        np.testing.assert_array_equal(found["experts"][:, 1], x[:, 1])
        np.testing.assert_array_equal(from_array(found["kernel"]).read((slice(2, 4), slice(0, 8))), x[0, 2:4, :8])
        assert found["scale"] == 3

    arrays.let_first_read(tree, work)
    asked, sent[:] = [*sent], []
    assert len(asked) == 4 and said[-1] is None
    heard = iter(said)
    monkeypatch.setattr(arrays.processes, "from_first", lambda value: next(heard))
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    arrays.let_first_read(tree, lambda found: pytest.fail("process 1 does no work"))
    for one, other in zip(asked, sent, strict=True):
        assert one[0] is other[0] and one[2] == other[2] and list(one[1]) == list(other[1])
