"""One decision on every device: a loss that is no number on one device, or in one micro-batch, skips the update of all."""

import math

import jax
import numpy as np
import pytest
from poison import BAD, poison_loss, poison_steps

from flax_switch.cli import main
from flax_switch.config import DataConfig, ExperimentConfig, MeshConfig, OptimizerConfig, SwitchConfig, TrainConfig
from flax_switch.parallel.mesh import create_mesh
from flax_switch.training.checkpoint import Checkpoints
from flax_switch.training.metrics import read_metrics
from flax_switch.training.skipped import NotFiniteError, all_finite
from flax_switch.training.state import build_run, init_state
from flax_switch.training.stepper import build_stepper
from flax_switch.workflows.pretrain import pretrain

MODEL = SwitchConfig(
    vocab_size=128, d_model=8, num_heads=2, d_kv=4, d_ff=16, num_encoder_layers=1, num_decoder_layers=1,
    num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=4, dropout_rate=0.0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("microbatches", "mesh"),
    [
        (2, MeshConfig(data=1)),
        (1, MeshConfig(data=2, expert=2)),
        (1, MeshConfig(data=2, expert=2, mode="pmap")),
        pytest.param(2, MeshConfig(data=1, expert=2, mode="pmap"), marks=pytest.mark.slow),
        pytest.param(1, MeshConfig(data=4, mode="pmap"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_what_is_no_number_in_a_part_of_the_batch_changes_nothing_anywhere(monkeypatch, microbatches, mesh):
    poison_loss(monkeypatch)
    devices = jax.devices()[: math.prod(max(getattr(mesh, name), 1) for name in ("data", "expert", "model"))]
    config = ExperimentConfig(
        model=MODEL,
        data=DataConfig(batch_size=8),
        optimizer=OptimizerConfig(schedule="linear", learning_rate=0.01, warmup_steps=3, min_dim_size_to_factor=4),
        mesh=mesh,
        train=TrainConfig(steps=20, microbatches=microbatches),
    )
    run = build_run(config, create_mesh(config.mesh, devices))
    ids = np.random.default_rng(0).integers(2, 32, (8, 6), dtype=np.int32)
    good = dict(input_ids=ids, decoder_input_ids=ids, labels=ids) | dict.fromkeys(
        ("attention_mask", "decoder_attention_mask"), np.ones_like(ids)
    )
    bad = good | {"labels": ids.copy()}
    bad["labels"][-1, 0] = BAD
    stepper = build_stepper(run)

    def state_after(*batches):
        state, skipped = stepper.hold(init_state(run)), []
        for batch in batches:
            state, metrics = stepper.step(state, batch)
            skipped.append(int(metrics["skipped"]))
        return jax.device_get(stepper.release(state)), skipped, state

    before, none, _ = state_after(good)
    after, one, held = state_after(good, bad)
    assert (none, one, after.step) == ([0], [0, 1], 2)
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.opt_state), (before.params, before.opt_state))
    for leaf in jax.tree.leaves(held.params):  # on every device, not the first alone
        assert all(np.isfinite(np.asarray(shard.data)).all() for shard in leaf.addressable_shards)
    further, flags, _ = state_after(good, bad, good)
    assert flags == [0, 1, 0] and all_finite(further.params)
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (further.params, before.params)), strict=True))


@pytest.fixture
def config(tmp_path):
    generator = np.random.default_rng(0)
    words = ["switch", "router", "expert", "token", "capacity", "layer", "sparse", "dense", "batch", "mesh"]
    (tmp_path / "text.txt").write_text("\n".join(" ".join(generator.choice(words, 12)) for _ in range(300)))
    return ExperimentConfig(
        model=MODEL,
        data=DataConfig(
            source=str(tmp_path / "text.txt"), vocabulary_size=30, num_sentinels=10, inputs_length=16, targets_length=8,
            batch_size=8, heldout_fraction=0.1, cache_dir=str(tmp_path / "cache"),
        ),
        optimizer=OptimizerConfig(warmup_steps=4, min_dim_size_to_factor=4),
        train=TrainConfig(
            steps=7, log_every=1, eval_every=100, eval_batches=1, checkpoint_every=1, keep_last=20, sample_spans=0,
            max_nonfinite_steps=2,
        ),
    )  # fmt: skip


def kept_steps(config, workdir):
    """The kept checkpoints, each of which is restored and must be finite."""
    run = build_run(config, create_mesh(config.mesh))
    checkpoints = Checkpoints(workdir)
    steps = checkpoints.steps()
    for step in steps:
        state, position = checkpoints._read(run.abstract_state, step)
        assert position["next_batch"] == state.step == step
        assert all_finite(state.params) and all_finite(state.opt_state)
    checkpoints.close()
    return steps


@pytest.mark.slow
def test_with_a_checkpoint_at_every_step_the_run_goes_on_or_ends_with_finite_ones_and_can_continue(config, tmp_path, monkeypatch):
    single = int(np.random.default_rng().integers(1, 8))
    print("poisoned step:", single)
    with monkeypatch.context() as patch:
        poison_steps(patch, single)
        pretrain(config, tmp_path / "one")
    assert [line.get("skipped_steps", 0) for line in read_metrics(tmp_path / "one") if line["kind"] == "train"] == [
        int(step >= single) for step in range(1, 8)
    ]
    assert kept_steps(config, tmp_path / "one") == [*range(1, 8)]
    with monkeypatch.context() as patch:
        poison_steps(patch, 4, 5, 6, 7)
        with pytest.raises(NotFiniteError, match="Up to step 5 2 updates in a row .* the same command with a lower"):
            pretrain(config, tmp_path / "many")
    assert kept_steps(config, tmp_path / "many") == [1, 2, 3, 4]
    result = pretrain(config.replace(optimizer=config.optimizer.replace(learning_rate=0.001)), tmp_path / "many")
    assert result.finished and kept_steps(config, tmp_path / "many") == [*range(1, 8)]


def test_the_command_says_it_in_one_message(config, tmp_path, monkeypatch, capsys):
    (tmp_path / "recipe.py").write_text(
        "from flax_switch.config import ExperimentConfig\nfrom flax_switch.config.recipes import to_config_dict\n\n"
        f"def get_config():\n    return to_config_dict(ExperimentConfig.from_dict({config.to_dict()!r}))\n"
    )
    poison_steps(monkeypatch, *range(8))
    assert main(["pretrain", "--config", str(tmp_path / "recipe.py"), "--workdir", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "Run the same command with a lower optimizer.learning_rate" in said and "Traceback" not in said
