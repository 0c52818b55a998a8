"""Compiled programs that are kept: what is read is what was written, and whatever is wrong with an entry costs a compilation."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flax_switch import cli
from flax_switch.host import compile_cache
from flax_switch.host.compile_cache import CompileCache

ROOT = Path(__file__).parents[2]
KEY = "jit_f-0123"


def entry(folder):
    (file,) = folder.glob("*.xla")
    return file


def test_what_was_put_is_found_again_also_by_another_process(tmp_path):
    CompileCache(tmp_path).put(KEY, b"program")
    assert CompileCache(tmp_path).get(KEY) == b"program"
    assert CompileCache(tmp_path).get("jit_f-0124") is None


def damaged(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def of_another_key(file):
    CompileCache(file.parent).put("jit_f-9", b"other")
    (other,) = set(file.parent.glob("*.xla")) - {file}
    file.write_bytes(other.read_bytes())


def a_folder(file):
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize(
    "spoil", [damaged, of_another_key, a_folder, lambda file: file.write_bytes(b""), lambda file: os.truncate(file, 35), os.unlink]
)
def test_an_entry_that_is_not_whole_is_not_there_and_nothing_is_raised(spoil, tmp_path):
    cache = CompileCache(tmp_path)
    cache.put(KEY, b"program")
    spoil(entry(tmp_path))
    assert cache.get(KEY) is None
    cache.put(KEY, b"program")
    assert cache.get(KEY) == (None if spoil is a_folder else b"program")  # a damaged one is replaced


def test_programs_of_other_users_and_other_machines_are_not_run(tmp_path, monkeypatch):
    CompileCache(tmp_path).put(KEY, b"program")
    with monkeypatch.context() as other:
        other.setattr(os, "geteuid", lambda: 12345)
        assert CompileCache(tmp_path).get(KEY) is None
    with monkeypatch.context() as other:
        other.setattr(compile_cache, "machine", lambda: {"flags": "a CPU without AVX"})
        assert CompileCache(tmp_path).get(KEY) is None
    assert CompileCache(tmp_path).get(KEY) == b"program"


def test_a_locked_or_full_folder_costs_the_entry_and_nothing_else(tmp_path, monkeypatch):
    cache = CompileCache(tmp_path)
    cache.put(KEY, b"program")

    def refuse(*args, **options):
        raise PermissionError(13, "held by another program")

    monkeypatch.setattr("builtins.open", refuse)
    assert cache.get(KEY) is None
    cache.put("jit_f-2", b"program")
    monkeypatch.undo()
    assert cache.get("jit_f-2") is None
    assert cache.get(KEY) == b"program"


def test_the_least_recently_used_make_room_and_what_was_abandoned_goes(tmp_path):
    cache = CompileCache(tmp_path, limit=6 * (1000 + 32))
    for i, name in enumerate("abcdef"):
        before = set(tmp_path.iterdir())
        cache.put(f"jit_f-{name}", name.encode() * 1000)
        (new,) = set(tmp_path.iterdir()) - before
        os.utime(new, (i + 1, i + 1))
    assert cache.get("jit_f-a") == b"a" * 1000  # used just now
    (tmp_path / ".x.tmp-1-2").write_bytes(b"half")
    os.utime(tmp_path / ".x.tmp-1-2", (1, 1))
    for name in "ghi":
        cache.put(f"jit_f-{name}", name.encode() * 1000)
    assert [name for name in "abcdefghi" if cache.get(f"jit_f-{name}") is not None] == list("aefghi")
    assert not list(tmp_path.glob(".*tmp*"))
    cache.put("jit_f-z", b"z" * 10_000)  # more than all may hold
    assert cache.get("jit_f-z") is None
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 6 * 1032


PROGRAM = """
import sys, warnings
import numpy as np
warnings.simplefilter("error")
from flax_switch.host.compile_cache import use_compile_cache
print(use_compile_cache())
import jax
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name) if name.endswith("cache_hits") else None)
print(np.asarray(jax.jit(lambda x: jax.numpy.sin(x) @ x.T)(np.arange(12, dtype=np.float32).reshape(3, 4))).tobytes().hex())
print(len(hits))
"""


def python(code, cache, **environment):
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("JAX_", "XLA_")) and name != compile_cache.ENVIRONMENT
    }
    clean |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), compile_cache.ENVIRONMENT: str(cache)} | environment
    done = subprocess.run([sys.executable, *code], capture_output=True, text=True, env=clean, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stderr
    return done


def test_a_second_process_reads_what_the_first_compiled_and_a_damaged_entry_is_compiled_again(tmp_path):
    cache = tmp_path / "cache"
    first = python(["-c", PROGRAM], cache).stdout.split()
    assert (first[0], first[2]) == (str(cache), "0")
    assert cache.stat().st_mode & 0o777 == 0o700
    assert python(["-c", PROGRAM], cache).stdout.split() == [*first[:2], "1"]
    damaged(entry(cache))
    assert python(["-c", PROGRAM], cache).stdout.split() == first
    assert python(["-c", PROGRAM], cache).stdout.split() == [*first[:2], "1"]
    assert python(["-c", PROGRAM], tmp_path / "x", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "y")).stdout.split()[0] == "None"
    assert not (tmp_path / "x").exists()


def test_the_folder_is_the_users_cache_unless_the_environment_names_one(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(compile_cache.ENVIRONMENT, raising=False)
    if sys.platform == "linux":
        assert compile_cache.compile_cache_folder() == tmp_path / "flax_switch" / "xla"
    monkeypatch.setenv(compile_cache.ENVIRONMENT, str(tmp_path / "mine"))
    assert compile_cache.compile_cache_folder() == tmp_path / "mine"


@pytest.mark.parametrize("command", ["pretrain", "finetune", "distill", "evaluate", "generate", "inspect"])
def test_every_command_that_compiles_can_do_without_the_cache(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    assert "--no-compile-cache" in capsys.readouterr().out


SMALL = [
    "pretrain", "--config", "tiny", "--config.model.d_model=16", "--config.model.num_heads=2", "--config.model.d_kv=8",
    "--config.model.d_ff=32", "--config.model.num_encoder_layers=1", "--config.model.num_decoder_layers=1",
    "--config.data.batch_size=4", "--config.data.inputs_length=24", "--config.data.targets_length=28", "--config.train.log_every=1",
    "--config.train.eval_every=99", "--config.train.eval_batches=1", "--config.train.checkpoint_every=2",
    "--config.optimizer.schedule=constant", "--config.train.sample_spans=0",
    "--config.model.num_sparse_encoder_layers=1", "--config.model.num_sparse_decoder_layers=0",
]  # fmt: skip


@pytest.mark.slow
def test_a_run_that_is_resumed_with_programs_from_the_cache_has_the_same_bits(tmp_path):
    """The control is compiled anew and never stopped."""
    shared = f"--config.data.cache_dir={tmp_path / 'text'}"

    def train(name, steps, *more):
        python(
            ["-m", "flax_switch", *SMALL, shared, "--workdir", str(tmp_path / name), f"--config.train.steps={steps}", *more],
            tmp_path / "xla",
        )

    train("whole", 4, "--no-compile-cache")
    assert not (tmp_path / "xla").exists()
    train("resumed", 2)
    steps = {file: file.read_bytes() for file in (tmp_path / "xla").glob("jit_train_step-*")}
    train("resumed", 4)
    assert steps == {file: file.read_bytes() for file in (tmp_path / "xla").glob("jit_train_step-*")} != {}  # read, not made again

    def losses(name):
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        timed = ("seconds_per_step", "tokens_per_second", "data_wait_fraction")
        return {line["step"]: {k: v for k, v in line.items() if k not in timed} for line in lines if line["kind"] == "train"}

    assert losses("resumed") == losses("whole")


def seconds(code, cache, *argv):
    """Seconds of CPU, which are what one waits for where nobody else computes."""
    before = os.times()
    python([*code, *argv], cache)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


@pytest.mark.slow
def test_the_second_use_of_generate_is_quick(tmp_path):
    """In under 4 s, or twice a bare import of JAX and Flax on this machine; the best of three."""
    from flax_switch.config.presets import PRESETS
    from flax_switch.convert.canonical import canonical_shapes, unflatten
    from flax_switch.data.vocabulary import Vocabulary
    from flax_switch.pretrained import save_pretrained

    vocabulary = Vocabulary.train([f"the quick brown fox {i} jumps over it" for i in range(500)], 40)
    config = PRESETS["switch-tiny"].replace(vocab_size=vocabulary.padded_size)
    draw = np.random.default_rng(0).standard_normal
    tree = {path: 0.05 * draw(shape).astype(np.float32) for path, shape in canonical_shapes(config).items()}
    save_pretrained(tmp_path / "model", config, unflatten(tree), vocabulary, format="flax_switch")
    (tmp_path / "in.txt").write_text("the quick brown\n")
    argv = ["-m", "flax_switch", "generate", "--checkpoint", str(tmp_path / "model"), "--input", str(tmp_path / "in.txt")]
    seconds(argv, tmp_path / "xla")
    second = min(seconds(argv, tmp_path / "xla") for _ in range(3))
    bare = min(seconds(["-c", "import jax, flax"], tmp_path / "xla") for _ in range(3))
    assert second < max(4.0, 2 * bare), f"{second:.1f} s; import jax, flax takes {bare:.1f} s"


def test_help_and_the_bare_import_are_quick(tmp_path):
    """The control is bare Python; the best of three."""
    bare = min(seconds(["-c", "pass"], tmp_path) for _ in range(3))
    imported = min(seconds(["-c", "import flax_switch"], tmp_path) for _ in range(3))
    shown = min(seconds(["-m", "flax_switch", "--help"], tmp_path) for _ in range(3))
    assert imported - bare < 0.3, f"{imported - bare:.2f} s over the {bare:.2f} s of bare Python"
    assert shown < 0.5 or shown < 6 * bare, f"{shown:.2f} s; bare Python takes {bare:.2f} s"
