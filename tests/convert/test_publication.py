"""A destination holds the old model or the new one, whole, and one conversion at a time: whoever is killed, whatever was there."""

import errno
import functools
import itertools
import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from flax_switch import CheckpointError, ConfigError, SwitchConfig, save_pretrained
from flax_switch.convert import convert, folder, open_checkpoint
from flax_switch.convert.canonical import canonical_shapes, unflatten
from flax_switch.convert.upcycle import upcycle
from flax_switch.host import swap

SMALL = SwitchConfig(
    vocab_size=32, d_model=8, num_heads=2, d_kv=4, d_ff=8, num_encoder_layers=2, num_decoder_layers=2, num_sparse_encoder_layers=1,
    num_sparse_decoder_layers=1, num_experts=2, capacity_mode="fixed",
)  # fmt: skip
DENSE = SMALL.replace(num_sparse_encoder_layers=0, num_sparse_decoder_layers=0)


def params(config: SwitchConfig = SMALL, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return unflatten({name: rng.standard_normal(shape, dtype=np.float32) for name, shape in canonical_shapes(config).items()})


def model(path: Path, format: str = "huggingface", config: SwitchConfig = SMALL, seed: int = 0, **options) -> Path:
    return save_pretrained(path, config, params(config, seed), format=format, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _slow_conversion(source: Path, destination: Path, far, go_on) -> None:
    def wait(count: int) -> None:
        far.set()
        go_on.wait(60)

    convert(source, destination, to="flax_switch", on_bytes=wait)


def test_a_second_conversion_into_a_destination_is_refused_and_the_first_is_not_disturbed(tmp_path):
    source = model(tmp_path / "source")
    context = multiprocessing.get_context("spawn")
    far, go_on = context.Event(), context.Event()
    first = context.Process(target=_slow_conversion, args=(source, tmp_path / "out", far, go_on))
    first.start()
    assert far.wait(60)
    for other in (
        lambda: convert(source, tmp_path / "out", to="flax_switch", overwrite=True),
        lambda: upcycle(source, tmp_path / "out", num_experts=2),
        lambda: model(tmp_path / "out"),
    ):
        with pytest.raises(ConfigError, match=f"out is in use.*pid {first.pid} "):
            other()
    go_on.set()
    first.join(60)
    assert first.exitcode == 0
    assert contents(tmp_path / "out") == contents(convert(source, tmp_path / "alone", to="flax_switch"))
    assert sorted(os.listdir(tmp_path)) == ["alone", "out", "source"]


def test_a_conversion_that_fails_leaves_no_lock(tmp_path):
    with pytest.raises(ConfigError):
        convert(tmp_path / "nothing", tmp_path / "out", to="flax_switch")
    assert not any(tmp_path.iterdir())
    open_checkpoint(model(tmp_path / "out"))


class Killed(BaseException):
    """What a SIGKILL is to the code: nothing catches it, nothing is cleaned up after it."""


OPERATIONS = ((Path, "rename"), (Path, "unlink"), (Path, "rmdir"), (shutil, "rmtree"), (swap, "_exchange_at_once"))


def killed_at(at: int, monkeypatch, action) -> bool:
    """Runs the action, killed before its file operation number `at`; returns whether there was one."""
    count = [0]

    def counted(original):
        def operation(*args, **options):
            if not str(args[0]).endswith(".lock"):
                count[0] += 1
                if count[0] == at + 1:
                    raise Killed
            return original(*args, **options)

        return operation

    with monkeypatch.context() as patch:
        for owner, name in OPERATIONS:
            patch.setattr(owner, name, counted(getattr(owner, name)))
        try:
            action()
        except Killed:
            return True
    return False


def digest(folder: Path) -> dict:
    return {name: tensor.numpy().tobytes() for name, tensor in open_checkpoint(folder).tensors.items()}


@pytest.mark.parametrize("place", ["other", "itself"])
@pytest.mark.parametrize("to", ["huggingface", "flax_switch"])
@pytest.mark.parametrize("atomic", [True, False])
def test_a_kill_at_any_file_operation_leaves_the_old_model_or_the_new_one(tmp_path, monkeypatch, place, to, atomic):
    if not atomic:
        monkeypatch.setattr(swap, "_exchange_at_once", lambda new, old: False)
    for at in itertools.count():
        base = tmp_path / str(at)
        source = model(base / "source", max_shard_size="4KB")
        destination = source if place == "itself" else model(base / "out", seed=1, max_shard_size="4KB")
        (destination / "notes").mkdir()
        (destination / "notes" / "mine.txt").write_text("a user's own")
        old, new = digest(destination), digest(source)

        action = functools.partial(convert, source, destination, to=to, overwrite=True)
        killed = killed_at(at, monkeypatch, action)
        if destination.exists():
            assert digest(destination) in (old, new)
        else:
            assert not atomic and digest(destination.with_name(destination.name + ".replaced")) == old
            with pytest.raises(ConfigError, match="Run that again; the old model is in"):
                open_checkpoint(destination)
        action()
        assert digest(destination) == new
        assert (destination / "notes" / "mine.txt").read_text() == "a user's own"
        assert not (destination / "conversion.json").exists()
        assert sorted(os.listdir(base)) == (["source"] if place == "itself" else ["out", "source"])
        if not killed:
            break
    assert at > 5


def test_what_a_killed_conversion_left_is_cleared_away_even_where_the_next_one_is_refused(tmp_path, monkeypatch):
    source, out = model(tmp_path / "source"), model(tmp_path / "out", "flax_switch", seed=1)
    (out / "mine.txt").write_text("a user's own")
    monkeypatch.setattr(folder, "_finish", lambda old, new: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        convert(source, out, to="huggingface", overwrite=True)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="holds a model already"):
        convert(source, out, to="huggingface")
    assert digest(out) == digest(source)
    assert (out / "mine.txt").exists() and not (out / "flax_switch.json").exists()
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]


def test_saving_over_a_model_leaves_none_of_its_files_and_all_others(tmp_path):
    out = model(tmp_path / "out", max_shard_size="4KB")
    for name in (*folder.COMPANIONS, "pytorch_model.bin", "flax_model.msgpack"):
        (out / name).write_text("stale")
    (out / "README.md").write_text("a user's own")
    model(out, "flax_switch", seed=1)
    assert sorted(os.listdir(out)) == ["README.md", "flax_switch.json", "params.safetensors"]


def test_a_folder_without_a_model_keeps_all_that_is_in_it(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "spiece.model").write_text("a user's own")
    out.chmod(0o750)
    model(out)
    assert sorted(os.listdir(out)) == ["config.json", "model.safetensors", "spiece.model"]
    assert os.name == "nt" or out.stat().st_mode & 0o777 == 0o750


def test_a_training_run_and_a_t5x_checkpoint_are_never_overwritten(tmp_path):
    run, t5x = tmp_path / "run", tmp_path / "t5x"
    for path in (run, t5x):
        path.mkdir()
    (run / "config.json").write_text('{"model": {}, "train": {}}')
    (t5x / "checkpoint").write_bytes(b"precious")
    for path in (run, t5x):
        before = contents(path)
        with pytest.raises(CheckpointError, match="training run or a T5X checkpoint"):
            model(path)
        assert contents(path) == before


@pytest.mark.parametrize("at", range(6))
def test_a_full_disk_ends_in_one_sentence_and_nothing_good_is_lost(tmp_path, monkeypatch, at):
    source, out = model(tmp_path / "source", max_shard_size="4KB"), model(tmp_path / "out", seed=1)
    before, flushes, fsync = contents(out), [0], os.fsync

    def full(file):
        flushes[0] += 1
        if flushes[0] > at:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"out cannot be written: No space left on device.*Free some space"):
        convert(source, out, to="flax_switch", overwrite=True, max_shard_size="4KB")
    assert contents(out) == before
    monkeypatch.undo()
    assert digest(convert(source, out, to="flax_switch", overwrite=True, max_shard_size="4KB")) == digest(source)


def test_the_destination_may_be_the_folder_one_stands_in_or_a_link_to_a_folder(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert digest(model(tmp_path / "link")) == digest(tmp_path / "real")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    model(Path("."))
    assert digest(tmp_path / "here") == digest(tmp_path / "real")
