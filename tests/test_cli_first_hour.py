"""What a newcomer types and reads: mistyped words, bare flags, help, looking before a run, the doctor, completion, terminals."""

import contextlib
import dataclasses
import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
from unittest.mock import Mock

import numpy as np
import pytest
from rich.console import Console

from flax_switch import cli
from flax_switch.commands import doctor, fields, generate, options
from flax_switch.config import ConfigError, OptimizerConfig
from flax_switch.config.flops import train_flops
from flax_switch.config.generation import GenerationConfig
from flax_switch.config.presets import PRESETS
from flax_switch.config.recipes import load_recipe
from flax_switch.data import Vocabulary, prepare
from flax_switch.host.peaks import PEAK_FLOPS, peak_flops
from flax_switch.ops.kernels import checks
from flax_switch.training import loop, progress
from flax_switch.training.profile import Profile
from flax_switch.training.state import Run
from flax_switch.workflows.predictions import Prediction
from flax_switch.workflows.start import open_start

RECIPE = ["pretrain", "--config", "tiny", "--workdir", "{tmp}/run"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["pretrian", "--config", "tiny"], "there is no command 'pretrian'. Did you mean pretrain?"),
        (["recipe"], "Did you mean recipes?"),
        (["xyzzy"], "there is no command 'xyzzy'. flax-switch --help lists them."),
        (["pretrain", "--config", "tinny", "--workdir", "{tmp}"], "Did you mean --config tiny?"),
        ([*RECIPE, "--dry_runn"], "did you mean --dry-run?"),
        ([*RECIPE, "--config.model.num_expert=4"], "Did you mean 'num_experts'?"),
        ([*RECIPE, "--config.modle.num_experts=4"], "Did you mean 'model'?"),
        (["recipes", "tinny"], "Did you mean 'tiny'?"),
        (["completion", "bsh"], "Did you mean 'bash'?"),
        (["generate", "--checkpoint", "x", "--do-smaple"], "did you mean --do-sample?"),
        ([*RECIPE, "--profile", "-3"], "--profile takes a number of steps"),
        (["--verson"], "there is no option '--verson'. Did you mean --version?"),
        (
            ["pretrain"],
            "pretrain: --workdir DIR is missing: where the run lives; the same one continues it. See flax-switch pretrain",
        ),
        (["convert", "x"], "DST is missing: a new folder; it appears when the conversion is complete. --to FORMAT is missing"),
        (["pretrain", "tiny", "--workdir", "{tmp}/run"], "Unknown argument 'tiny'; did you mean --config tiny?"),
        ([*RECIPE, "train.steps=5"], "did you mean --config.train.steps?"),
        ([*RECIPE, "--config.steps=5"], "--config.steps lacks the field's section; did you mean --config.train.steps?"),
        (
            ["generate", "--checkpoint", "x", "--max_length", "5"],
            "--max-length is no control: it counts the start token; set max_new",
        ),
        (["generate", "--checkpoint", "switch-tiny"], "'switch-tiny' is a preset: a shape without weights"),
    ],
)
def test_every_mistyped_word_is_told_the_nearest(argv, message, tmp_path, capsys):
    with contextlib.suppress(SystemExit):  # of argparse
        assert cli.main([a.format(tmp=tmp_path) for a in argv]) == 2
    error = capsys.readouterr().err
    assert message in error and "usage:" not in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("argv", [[], ["help"]])
def test_no_command_at_all_shows_those_there_are(argv, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(argv)
    text = capsys.readouterr().out
    assert ended.value.code == 0 and all(f"\n    {command}" in text for command in cli.COMMANDS)


def test_a_mistyped_preset_is_told_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean random:switch-base-8?"):
        open_start("random:switch-bas-8", {})


@pytest.mark.parametrize("spelled", ["--do-sample", "--do_sample", "--do-sample=true", "--do-sample True", "--do_sample=True"])
def test_a_flag_of_generation_may_be_bare_or_have_a_value(spelled):
    args, rest = cli.parse_known(["generate", "--checkpoint", "x", *spelled.split(), "--top-p", "0.9"])
    generate.take_overrides(args, rest)
    assert args.controls == {"do_sample": True, "top_p": 0.9}


def test_a_flag_that_ends_the_line_is_bare_and_a_number_is_not_swallowed():
    args, rest = cli.parse_known(["generate", "--checkpoint", "x", "--early-stopping", "never", "--output-scores"])
    generate.take_overrides(args, rest)
    assert args.controls == {"early_stopping": "never", "output_scores": True}
    with pytest.raises(ConfigError, match="--num-beams needs a value"):
        generate.take_overrides(args, ["--num-beams"])


def test_a_field_that_is_true_or_false_may_be_bare():
    args, rest = cli.parse_known(["pretrain", "--config", "tiny", "--workdir", "x", "--config.data.packing", "--config.mesh.fsdp"])
    options.take_overrides(args, rest)
    assert args.overrides == ["data.packing=true", "mesh.fsdp=true"]
    assert options.load_config(args).data.packing
    args, rest = cli.parse_known(["pretrain", "--config", "tiny", "--workdir", "x", "--config.train.steps"])
    options.take_overrides(args, rest)
    with pytest.raises(ConfigError, match="has no '='"):
        options.load_config(args)


def help_of(command, capsys, monkeypatch, columns=80):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    return capsys.readouterr().out


def test_help_lists_every_control_by_group_with_its_default(capsys, monkeypatch):
    text = help_of("generate", capsys, monkeypatch)
    for field in dataclasses.fields(GenerationConfig):
        assert f"--{field.name.replace('_', '-')} " in text or f"--{field.name.replace('_', '-')}\n" in text
    flat = " ".join(text.split())
    assert "0: all; of contrastive search the candidates (default: 50)" in flat
    assert [flat.index(f" {group}: --") for group in ("length", "beams", "sampling", "what may be said")]


@pytest.mark.parametrize("command", ["pretrain", "finetune", "distill"])
def test_help_lists_every_field_by_section_with_its_default(command, capsys, monkeypatch):
    text = help_of(command, capsys, monkeypatch)
    parser = cli.subparser(command)
    taken = parser.get_default("overrides_taken").values()
    assert len(taken) > 60
    for option in taken:
        assert re.search(rf"^    {re.escape(option)}(\s|$)", text, re.M), option
    flat = " ".join(text.split())
    default = {field.name: field.default for field in dataclasses.fields(OptimizerConfig)}["warmup_steps"]
    assert f"linear from 0 (default: {default})" in flat or command == "finetune"


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_fits_80_columns_and_breaks_at_words(command, capsys, monkeypatch):
    text = help_of(command, capsys, monkeypatch)
    assert [line for line in text.splitlines() if len(line) > 80 and " " in line.strip()] == []


def test_comments_of_fields_are_those_of_their_source_lines():
    found = {field.name: field for field in fields.described(GenerationConfig)}
    assert found["top_k"] == fields.Described("sampling", "top_k", 50, "0: all; of contrastive search the candidates", False)
    assert found["do_sample"].is_bool


@dataclasses.dataclass
class Commented:
    # --- a group; and more
    first: int = 1  # beside it
    # above it,
    # in two lines
    second: bool = False
    third: int = 3


def test_a_comment_may_stand_beside_its_field_or_above_it():
    assert [field.comment for field in fields.described(Commented)] == ["beside it", "above it, in two lines", ""]
    assert {field.group for field in fields.described(Commented)} == {"a group"}


def test_the_effective_config_is_printed_and_nothing_is_made(tmp_path, capsys):
    argv = [a.format(tmp=tmp_path) for a in RECIPE]
    assert cli.main([*argv, "--print-config", "--config.train.steps=77"]) == 0
    text = capsys.readouterr().out
    config = load_recipe("tiny", ["train.steps=77"])
    for section, values in config.to_dict().items():
        for name, value in values.items() if isinstance(values, dict) else ():
            assert re.search(rf"^{section}\.{name} = {re.escape(repr(value))}(  # not|$)", text, re.M)
    assert "train.steps = 77  # not 524288" in text
    assert not (tmp_path / "run").exists()
    assert cli.main(["finetune", "--config", "finetune_summarization", "--init", "none", "--workdir", "x", "--print-config"]) == 0
    assert "evaluation.metrics = " in capsys.readouterr().out


def test_a_printed_config_can_be_given_back(tmp_path, capsys):
    cli.main([*[a.format(tmp=tmp_path) for a in RECIPE], "--print-config", "--config.model.num_experts=16"])
    lines = re.findall(r"^(\w+\.\w+) = (.*?)(?:  # not .*)?$", capsys.readouterr().out, re.M)
    assert load_recipe("tiny", [f"{name}={value}" for name, value in lines]) == load_recipe("tiny", ["model.num_experts=16"])


SMALL = [
    "--config.model.d_model=16", "--config.model.num_heads=2", "--config.model.d_kv=8", "--config.model.d_ff=32",
    "--config.model.num_encoder_layers=1", "--config.model.num_decoder_layers=1", "--config.model.num_sparse_encoder_layers=1",
    "--config.model.num_sparse_decoder_layers=0", "--config.data.batch_size=8", "--config.data.inputs_length=24",
    "--config.data.targets_length=28", "--config.train.log_every=2", "--config.train.eval_batches=1",
    "--config.train.sample_spans=0",
    "--config.data.vocabulary_size=80", "--config.data.num_sentinels=16", "--config.model.vocab_size=128",
]  # fmt: skip


@pytest.fixture
def small(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"the quick brown fox {i} jumps over the lazy dog {i * 7}\n" for i in range(300)))
    argv = ["pretrain", "--config", "tiny", "--workdir", str(tmp_path / "run"), "--no-compile-cache", *SMALL]
    return [*argv, f"--config.data.source={tmp_path / 'text.txt'}", f"--config.data.cache_dir={tmp_path / 'cache'}"]


def assert_begins_with_the_text(shown):
    """Asserts that the texts of the first batch's rows are there, each by itself, and made of the corpus's words."""
    first = shown[shown.index("The first batch begins with") :]
    rows = [int(texts or 1) for texts in re.findall(r"^row \d+(?:, which (\d+) texts share)?$", first, re.M)]
    texts = re.findall(r"^  (?:inputs: |targets:) (.*)</s>$", first, re.M)
    assert len(rows) == 2 and len(texts) == 2 * sum(rows)
    words = re.findall(r"[a-z]+", re.sub(r"<extra_id_\d+>", " ", " ".join(texts)))
    assert max(map(len, words)) > 2 and all(word in "the quick brown fox jumps over the lazy dog" for word in words)


@pytest.fixture
def compile_cache_as_before():
    import jax

    before = jax.config.jax_enable_compilation_cache
    yield
    jax.config.update("jax_enable_compilation_cache", before)


def test_a_dry_run_shows_shapes_memory_and_text_and_writes_nothing(small, tmp_path, monkeypatch, capsys, compile_cache_as_before):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("FLAX_SWITCH_COMPILE_CACHE", raising=False)
    assert cli.main([one for one in [*small, "--dry-run"] if one != "--no-compile-cache"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
    text = capsys.readouterr().out
    assert re.search(r"encoder/layers_0/mlp/expert/wi/kernel +float32 +\[8, 16, 32\]", text)
    assert re.search(r"input_ids +\[8, 24\]", text)
    assert re.search(r"total +[\d.]+ MiB", text)
    assert_begins_with_the_text(text)
    assert "59% infilling: the whole text comes back" in text and "41% span corruption: the gaps alone" in text


def test_a_dry_run_uses_the_caches_that_are_there(small, tmp_path, monkeypatch, capsys, compile_cache_as_before):
    args, rest = cli.parse_known(small)
    cli.take_rest(args, rest)
    prepare(options.load_config(args).data)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    monkeypatch.setattr(Vocabulary, "train", Mock(side_effect=AssertionError("trained again")))
    monkeypatch.setattr("flax_switch.data.cache._write", Mock(side_effect=AssertionError("tokenised again")))
    assert cli.main([*small, "--dry-run"]) == 0
    assert_begins_with_the_text(capsys.readouterr().out)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == before


def test_a_profile_begins_when_compilation_is_over_and_ends_after_its_steps(monkeypatch, tmp_path):
    called = []
    monkeypatch.setattr("jax.profiler.start_trace", lambda folder: called.append(folder))
    monkeypatch.setattr("jax.profiler.stop_trace", lambda: called.append("stop"))
    profile, seen = Profile(tmp_path, 100, 3), {}
    for step in range(100, 110):
        profile.before(step)
        profile.after(step + 1, np.zeros(1))
        seen[step + 1] = len(called)
    profile.close()
    assert called == [str(tmp_path / "profile"), "stop"]
    assert [step for step, count in seen.items() if count == 1] == [103, 104]  # on after step 102, off after step 105
    none = Profile(tmp_path, 0, 0)
    none.before(2)
    none.close()
    assert len(called) == 2


@pytest.mark.slow
def test_a_profile_traces_steps_and_the_run_goes_on(small, tmp_path, capsys, compile_cache_as_before):
    assert cli.main([*small, "--profile", "2", "--config.train.steps=6"]) == 0
    text = capsys.readouterr().out
    assert f"Profile: {tmp_path / 'run' / 'profile'}" in text
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    assert re.search(r"step 6/6  loss [\d.]+  [\d,]+ tokens/s  [\d.]+ [GM]FLOP/s  data wait", text)
    assert "MFU" not in text  # a CPU has no peak that is known
    assert cli.main([*small, "--config.train.steps=3"]) == 0
    assert "from step 6. That is step 6 of 3: nothing left to do." in " ".join(capsys.readouterr().out.split())


def test_flops_are_shown_and_on_an_accelerator_the_share_of_its_peak(capsys):
    shown = progress.TrainProgress(0, 10, flops=4e12, peak=100e12)
    shown.log(5, {"loss": 2.0, "tokens_per_second": 10.0, "data_wait_fraction": 0.0, "seconds_per_step": 0.1})
    assert "10 tokens/s  40 TFLOP/s  40.0 % MFU  data wait" in capsys.readouterr().out
    assert peak_flops("NVIDIA H100 80GB HBM3") == PEAK_FLOPS["h100"]
    assert (peak_flops("TPU v5 lite"), peak_flops("TPU v5p"), peak_flops("TPU v6 lite")) == (197e12, 459e12, 918e12)
    assert peak_flops("cpu") is None
    config = PRESETS["switch-tiny"]
    assert train_flops(config, 8, 64, 32) == 8 * train_flops(config, 1, 64, 32)


def test_losses_stay_above_the_bar_and_lines_break_at_words(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=screen, force_terminal=True, width=80, highlight=False, markup=False))
    shown = progress.TrainProgress(0, 30)
    for step in (10, 20, 30):
        shown.log(step, {"loss": 1.0 / step, "tokens_per_second": 10.0, "data_wait_fraction": 0.0, "seconds_per_step": 0.1})
    shown.say("held-out " * 30)
    shown.close()
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", screen.getvalue())
    for step in (10, 20, 30):
        assert f"step {step}/30  loss {1 / step:.3f}" in text
    lines = text.replace("\r", "\n").splitlines()
    assert max(len(line) for line in lines if "held-out" in line) <= 80
    assert all(word == "held-out" for line in lines if line.startswith("held-out") for word in line.split())


def test_a_message_breaks_at_words_on_a_terminal_and_is_whole_elsewhere(monkeypatch, capsys):
    message = "flax-switch convert: " + "a sentence of several words that says what to do " * 5
    options.tell(message)
    assert capsys.readouterr().err == message + "\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    options.tell(message)
    lines = capsys.readouterr().err.splitlines()
    assert max(map(len, lines)) <= 80
    assert " ".join(lines) == message.strip()


def test_generation_says_compiling_on_a_terminal_and_is_quiet_elsewhere(monkeypatch, capsys):
    generate._note("compiling")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    generate._note("compiling")
    assert "compiling" in capsys.readouterr().err


def test_the_doctor_checks_kernels_and_says_what_is_here(capsys, monkeypatch, compile_cache_as_before):
    assert cli.main(["doctor", "--json", "--no-compile-cache"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {check["implementation"] for check in found["kernels"]} == {"blocks"}
    assert all(check["error"] < check["tolerance"] for check in found["kernels"])
    assert found["extras"]["eval"] == (importlib.util.find_spec("sacrebleu") is not None)
    assert cli.main(["doctor", "--no-compile-cache"]) == 0
    text = capsys.readouterr().out
    for word in ("Versions", "Devices", "Self-test", "Extras", "Cache", "jax ", "All is well."):
        assert word in text
    found["extras"]["gin"] = False
    assert re.search(r"gin +- +recipes in gin files", doctor.render(found))


def test_a_kernel_that_is_wrong_for_one_expert_is_found_by_its_name(monkeypatch, capsys, compile_cache_as_before):
    right, gradient = checks.grouped.IMPLEMENTATIONS["blocks"]

    def wrong(x, kernel, sizes, *, transpose):
        return right(x, kernel.at[3].multiply(1.01), sizes, transpose=transpose)  # one row of 256

    monkeypatch.setitem(checks.grouped.IMPLEMENTATIONS, "blocks", (wrong, gradient))
    assert cli.main(["doctor", "--no-compile-cache"]) == 1
    text = capsys.readouterr().out
    assert re.search(r"blocks, float32, forward +1\.0e-02  WRONG for expert 3", text)
    assert re.search(r"blocks, float32, gradient of kernels +[\d.e-]+  fine", text)


def test_completion_knows_commands_options_fields_and_recipes(capsys):
    assert cli.main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    if shutil.which("bash"):

        def complete(*words):
            call = "COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _flax_switch; printf '%s\\n' \"${COMPREPLY[@]}\""
            run = f"{script}\nCOMP_WORDS=({' '.join(words)}); {call}"
            return set(subprocess.run(["bash", "-c", run], capture_output=True, text=True, check=True).stdout.split())

        assert complete("flax-switch", "pre") == {"predict", "pretrain", "presets"}
        assert complete("flax-switch", "pretrain", "--config.train.ste") == {"--config.train.steps", "--config.train.step_timeout"}
        assert complete("flax-switch", "generate", "--num-b") == {"--num-beams", "--num-beam-groups"}
        assert complete("flax-switch", "pretrain", "--config", "descr") >= {"descriptions_small"}
    assert cli.main(["completion", "fish"]) == 0
    assert "-l 'num-beams'" in capsys.readouterr().out
    assert cli.main(["completion", "zsh"]) == 0
    assert "bashcompinit" in capsys.readouterr().out


def test_a_run_that_is_done_says_so():
    assert loop._continues("runs/a", 1200, 500).endswith(
        "That is step 1200 of 500: nothing left to do. Raise train.steps to train on."
    )
    assert loop._continues("runs/a", 200, 500) == "Continuing runs/a from step 200."


@pytest.mark.parametrize(("most", "said"), [(None, "3 examples (all there are)"), (50, "3 examples (50 of each task asked for)")])
def test_evaluate_says_how_many_examples_were_asked_for_and_done(most, said, tmp_path, monkeypatch, capsys):
    recipe = load_recipe("finetune_question_answering", [f"evaluation.max_examples={most}"])
    run = Mock(spec=Run, config=recipe.resolve(PRESETS["switch-tiny"]))
    made = [Prediction("task", f"in {i}", "out", ("right",)) for i in range(3)]
    found = (run, {"cross_entropy": 1.0, "exact_match": 50.0, "f1": 60.0}, made)
    monkeypatch.setattr("flax_switch.workflows.finetune.evaluate_checkpoint", lambda *_, **__: found)
    argv = ["evaluate", "--checkpoint", "x", "--config", "finetune_question_answering", "--output", str(tmp_path / "out")]
    assert cli.main(argv) == 0
    assert said in capsys.readouterr().out
