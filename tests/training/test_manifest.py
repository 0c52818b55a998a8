"""A checkpoint is used as it was written or not at all: any damage is named, and the newest whole one is taken."""

import dataclasses
import json
import os
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_switch.cli import main
from flax_switch.config import ConfigError, ExperimentConfig, SwitchConfig
from flax_switch.convert import convert, open_checkpoint
from flax_switch.convert.tensors import CheckpointError
from flax_switch.host.files import write_text
from flax_switch.host.manifest import MANIFEST, damage
from flax_switch.parallel.mesh import create_mesh
from flax_switch.training.checkpoint import Checkpoints, claim_workdir
from flax_switch.training.state import TrainState, build_run, init_state

CONFIG = ExperimentConfig(
    model=SwitchConfig(
        vocab_size=32, d_model=8, num_heads=2, d_kv=4, d_ff=16, num_encoder_layers=1, num_decoder_layers=1,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=2,
    ),
)  # fmt: skip
STEPS = (2, 4, 6)


def at_step(state, step):
    """A state whose parameters tell its step."""
    params = jax.tree.map(lambda leaf: leaf + step, state.params)
    return dataclasses.replace(state, step=jnp.int32(step), params=params)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run's folder with three checkpoints, the abstract state and the state of step 0."""
    workdir = claim_workdir(tmp_path_factory.mktemp("saved") / "run", CONFIG)
    run = build_run(CONFIG, create_mesh(CONFIG.mesh, jax.devices()[:1]))
    state = init_state(run)
    checkpoints = Checkpoints(workdir)
    for step in STEPS:
        checkpoints.save(at_step(state, step), {"next_batch": step})
    checkpoints.close()
    return workdir, run.abstract_state, state


@pytest.fixture
def copy(saved, tmp_path):
    """A copy of that folder, to damage."""
    shutil.copytree(saved[0], tmp_path / "run")
    return tmp_path / "run"


def restored(workdir, abstract, **options):
    """The step that is restored, what was said, and the state, which is that step's to the bit."""
    said: list[str] = []
    checkpoints = Checkpoints(workdir)
    state, position = checkpoints.restore(abstract, say=said.append, **options)
    checkpoints.close()
    assert position == {"next_batch": int(state.step)}
    return int(state.step), said, state


def files_of(step):
    return sorted(str(path.relative_to(step)) for path in Path(step).rglob("*") if path.is_file())


def flip(path, bit=0):
    """Turns one bit in the middle of a file, and leaves size and time as they were."""
    status, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1 << bit
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


def largest(step):
    return max((step / "params" / "ocdbt.process_0" / "d").iterdir(), key=lambda path: path.stat().st_size)


def test_a_whole_checkpoint_is_restored_to_the_bit_and_in_silence(saved):
    step, said, state = restored(saved[0], saved[1])
    assert (step, said) == (6, [])
    expected = at_step(saved[2], 6)
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state, state.rng), (
        expected.params, expected.opt_state, expected.rng))  # fmt: skip


def test_one_flipped_bit_in_any_file_is_noticed(copy):
    step = copy / "checkpoints" / "6"
    assert damage(step) is None
    names = files_of(step)
    assert MANIFEST in names and "meta/metadata" in names and len(names) > 15
    for number, name in enumerate(names):
        whole = (step / name).read_bytes()
        flip(step / name, bit=number % 8)
        assert damage(step) == f"the contents of {name} have changed"
        (step / name).write_bytes(whole)
    assert damage(step) is None


def test_a_file_that_is_missing_is_noticed_whichever_it_is(copy):
    step = copy / "checkpoints" / "6"
    for name in files_of(step):
        (step / name).rename(copy / "away")
        assert damage(step) == f"{name} is missing"
        (copy / "away").rename(step / name)


@pytest.mark.parametrize("harm", [flip, cut, zero, Path.unlink])
def test_a_damaged_newest_checkpoint_is_named_and_set_aside_and_the_one_before_is_used(saved, copy, harm):
    newest = copy / "checkpoints" / "6"
    harm(largest(newest))
    step, (sentence,), state = restored(copy, saved[1])
    assert step == 4
    assert sentence.startswith("The checkpoint of step 6 is damaged (") and "step 4 is used" in sentence
    jax.tree.map(np.testing.assert_array_equal, state.params, at_step(saved[2], 4).params)
    assert sorted(path.name for path in newest.parent.iterdir()) == ["2", "4", "6.damaged"]
    assert restored(copy, saved[1])[:2] == (4, []), "it is named once"


def test_of_several_damaged_ones_each_is_named(saved, copy):
    for step in (4, 6):
        shutil.rmtree(copy / "checkpoints" / str(step) / "opt_state")
    step, said, _ = restored(copy, saved[1])
    assert step == 2 and [sentence.split(" is ")[0] for sentence in said] == [f"The checkpoint of step {n}" for n in (6, 4)]


def test_without_a_whole_checkpoint_nothing_is_moved_and_the_message_says_what_helps(saved, copy):
    for step in STEPS:
        flip(copy / "checkpoints" / str(step) / "_CHECKPOINT_METADATA")
    before = files_of(copy)
    with pytest.raises(ConfigError, match=r"No checkpoint in .* is whole: 6 \(.*\); 4 \(.*\); 2 \(.*\)\. .*--no-verify"):
        restored(copy, saved[1])
    assert files_of(copy) == before
    assert restored(copy, saved[1], verify=False)[:2] == (6, [])


orbax_leaves_readers_behind = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@orbax_leaves_readers_behind
def test_without_verifying_what_cannot_be_read_is_still_passed_over(saved, copy):
    shutil.rmtree(copy / "checkpoints" / "6" / "params" / "d")
    step, (sentence,), _ = restored(copy, saved[1], verify=False)
    assert step == 4 and "it cannot be read" in sentence


def of_0_1_0(step):
    """Makes a checkpoint what 0.1.0 wrote, which had no manifest."""
    (step / MANIFEST).unlink()
    meta = step / "meta" / "metadata"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"version": 1}))


@orbax_leaves_readers_behind
def test_checkpoints_without_a_manifest_are_those_of_0_1_0_alone(saved, copy):
    newest = copy / "checkpoints" / "6"
    of_0_1_0(newest)
    assert restored(copy, saved[1])[:2] == (6, [])
    (newest / "meta" / "metadata").unlink()  # one of 0.1.0 that was being deleted when the kill came
    assert restored(copy, saved[1])[0] == 4


def test_readers_of_a_run_take_the_newest_whole_checkpoint_and_no_verify_takes_the_newest(copy, caplog, capsys):
    newest = copy / "checkpoints" / "6"
    flip(newest / "opt_state" / "_METADATA")  # of which they read nothing
    assert open_checkpoint(copy).path == newest
    flip(largest(newest))
    assert open_checkpoint(copy).path == newest.with_name("4")
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"The checkpoint {newest} is damaged (the contents of params/") and said.endswith(
        f"{newest.parent}/4 is used."
    )
    assert newest.is_dir(), "readers move nothing"
    assert open_checkpoint(copy, verify=False).path == newest
    with pytest.raises(CheckpointError, match="No checkpoint is whole"):
        open_checkpoint(newest)
    assert main(["inspect", str(newest)]) == 2 and "--no-verify" in capsys.readouterr().err
    assert main(["inspect", str(newest), "--no-verify"]) == 0
    assert main(["convert", str(newest), str(copy.parent / "out"), "--to", "flax_switch"]) == 2
    with pytest.raises(CheckpointError, match="No checkpoint is whole"):
        convert(newest, copy.parent / "out", to="flax_switch")
    assert not (copy.parent / "out").exists()


def test_what_a_kill_left_is_removed_and_nothing_else(copy):
    steps = copy / "checkpoints"
    for name in ("8.saving", "8.saving.orbax-checkpoint-tmp", "7.orbax-checkpoint-tmp-17", "0.deleting"):
        shutil.copytree(steps / "2", steps / name)
    (copy / ".config.json.tmp-4711-0123abcd").write_text("{")
    mine = {
        "checkpoints/notes.txt",
        "checkpoints/8.saving.txt",
        "checkpoints/old/x",
        ".config.json.tmp-mine",
        "checkpoints/3.damaged/x",
    }
    for name in mine:
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text("the user's")
    checkpoints = Checkpoints(copy)
    assert checkpoints.steps() == list(STEPS)
    checkpoints.remove_strays()
    checkpoints.close()
    assert sorted(path.name for path in steps.iterdir()) == ["2", "3.damaged", "4", "6", "8.saving.txt", "notes.txt", "old"]
    assert mine <= set(files_of(copy)) and ".config.json.tmp-4711-0123abcd" not in files_of(copy)


def test_nothing_is_deleted_before_its_replacement_has_its_manifest(saved, tmp_path, monkeypatch):
    from flax_switch.training import checkpoint

    checkpoints = Checkpoints(tmp_path, keep_last=1)
    state: TrainState = saved[2]
    checkpoints.save(at_step(state, 1), {})
    checkpoints.wait()

    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_manifest", fails)
    checkpoints.save(at_step(state, 2), {})
    with pytest.raises(ConfigError, match="No space left"):
        checkpoints.wait()
    assert checkpoints.steps() == [1] and damage(tmp_path / "checkpoints" / "1") is None
    monkeypatch.undo()
    checkpoints.save(at_step(state, 2), {})
    checkpoints.close()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]


def test_files_that_killed_writers_left_go_when_they_are_old_and_a_users_stay(tmp_path):
    hours_ago = time.time() - 7200
    left, young, users = tmp_path / ".a.txt.tmp-12-0123abcd", tmp_path / ".a.txt.tmp-13-0123abcd", tmp_path / ".a.txt.tmp-mine"
    others = tmp_path / ".b.txt.tmp-12-0123abcd"
    for path in (left, young, users, others):
        path.write_text("half")
    for path in (left, users, others):
        os.utime(path, (hours_ago, hours_ago))
    write_text(tmp_path / "a.txt", "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["a.txt", young.name, users.name, others.name])
    assert (tmp_path / "a.txt").read_text() == "whole"
