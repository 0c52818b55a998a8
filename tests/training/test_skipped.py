"""An update that is no number changes nothing, is counted, and ends a run only after several in a row."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_switch.config import DataConfig, ExperimentConfig, MeshConfig, OptimizerConfig, SwitchConfig, TrainConfig
from flax_switch.parallel.mesh import create_mesh, shard_batch
from flax_switch.training.checkpoint import Checkpoints
from flax_switch.training.skipped import Skipped, all_finite
from flax_switch.training.state import build_run, init_state
from flax_switch.training.step import train_step, true_loss

MODEL = SwitchConfig(
    vocab_size=32, d_model=8, num_heads=2, d_kv=4, d_ff=16, num_encoder_layers=2, num_decoder_layers=2, num_sparse_encoder_layers=1,
    num_sparse_decoder_layers=1, num_experts=4, dropout_rate=0.0,
)  # fmt: skip


def setting(optimizer, microbatches, **mesh):
    """A run, its first state, a batch, and a jitted step whose loss is multiplied by a number."""
    config = ExperimentConfig(
        model=MODEL,
        data=DataConfig(batch_size=8),
        optimizer=OptimizerConfig(name=optimizer, schedule="linear", learning_rate=0.01, warmup_steps=3),
        mesh=MeshConfig(**mesh),
        train=TrainConfig(steps=20, microbatches=microbatches),
    )
    run = build_run(config, create_mesh(config.mesh, jax.devices()[: math.prod(mesh.values())]))
    ids = np.random.default_rng(0).integers(2, 32, (8, 6), dtype=np.int32)
    ones = np.ones_like(ids)
    batch = dict(input_ids=ids, attention_mask=ones, decoder_input_ids=ids, decoder_attention_mask=ones, labels=ids)
    loss = true_loss(MODEL)

    @jax.jit
    def step(state, batch, factor):
        def poisoned(*args):
            value = loss(*args)
            return dataclasses.replace(value, loss=value.loss * factor)

        return train_step(run, state, batch, poisoned)

    return run, init_state(run), shard_batch(batch, run.mesh), step


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("optimizer", "microbatches", "mesh"),
    [
        ("adafactor", 1, dict(data=1)), ("adamw", 2, dict(data=1)), ("muon", 1, dict(data=1)), ("adamw_rms", 1, dict(data=1)),
        ("adafactor", 1, dict(data=2, expert=2)),
    ],
)  # fmt: skip
def test_a_bad_update_changes_nothing_but_the_count_of_steps(optimizer, microbatches, mesh, bad):
    run, state, batch, step = setting(optimizer, microbatches, **mesh)
    state, metrics = step(state, batch, 1.0)
    assert metrics["skipped"] == 0
    after, metrics = step(state, batch, bad)
    assert metrics["skipped"] == 1 and after.step == state.step + 1
    old, new = (jax.tree.leaves((one.params, one.opt_state)) for one in (state, after))
    jax.tree.map(np.testing.assert_array_equal, new, old)
    again, metrics = step(after, batch, 1.0)
    expected, _ = step(dataclasses.replace(state, step=after.step), batch, 1.0)
    assert metrics["skipped"] == 0 and np.isfinite(metrics["grad_norm"])
    jax.tree.map(np.testing.assert_array_equal, again.params, expected.params)


def counted(flags, most=3, every=2):
    """How a run ends whose updates are skipped or not, with metrics logged every two steps: the total, or the error."""
    skipped = Skipped(most)
    line = {}
    for step, flag in enumerate(flags, 1):
        skipped.add({"skipped": jnp.float32(flag)})
        if step % every == 0 or step == len(flags):
            line = skipped.read()
            skipped.check(step, saved=4)
    return line


def test_skipped_updates_are_counted_and_end_the_run_only_in_a_row():
    assert counted([0, 0, 0]) == {}
    assert counted([1, 0, 1, 1, 0, 1, 1, 0]) == {"skipped_steps": 5}
    with pytest.raises(FloatingPointError, match=r"Up to step 4 3 updates in a row .* of step 4 .*optimizer.learning_rate"):
        counted([0, 1, 1, 1, 0, 0])
    with pytest.raises(FloatingPointError, match="Up to step 6 3 updates"):  # over several readings, and fine again at the next
        counted([0, 0, 1, 1, 1, 0])


def test_parameters_that_are_no_numbers_are_not_saved(tmp_path):
    run, state, _, _ = setting("adafactor", 1, data=1)
    assert all_finite(state.params)
    broken = dict(state.params)
    broken["token_embedder"] = {"embedding": state.params["token_embedder"]["embedding"].at[3, 1].set(jnp.inf)}
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(FloatingPointError, match="not saved"):
        checkpoints.save(dataclasses.replace(state, params=broken), {"position": 0})
    assert checkpoints.latest_step() is None
    checkpoints.close()
