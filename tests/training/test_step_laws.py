"""What a step draws, clips, reports and keeps apart: generators by step and micro-batch, packed segments, norms before clipping."""

import functools

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from flax_switch.config import DataConfig, ExperimentConfig, MeshConfig, OptimizerConfig, SwitchConfig, TrainConfig
from flax_switch.ops.losses import seq2seq_loss
from flax_switch.parallel.mesh import create_mesh
from flax_switch.training import state as states
from flax_switch.training.state import build_run, init_state
from flax_switch.training.step import compile_train_step, eval_step, loss_and_grads, train_step
from flax_switch.training.stepper import build_stepper

MODEL = SwitchConfig(
    vocab_size=40, d_model=16, num_heads=2, d_kv=8, d_ff=16, num_encoder_layers=1, num_decoder_layers=1,
    num_sparse_encoder_layers=0, num_sparse_decoder_layers=1, num_experts=2, dropout_rate=0.0, init_scale=1.0,
    capacity_mode="dropless", ignore_padding_tokens=True, load_balancing_loss_coef=0.0, z_loss_coef=0.0, loss_normalizer=1.0,
)  # fmt: skip
CONFIG = ExperimentConfig(
    model=MODEL, data=DataConfig(batch_size=4), train=TrainConfig(steps=10),
    optimizer=OptimizerConfig(name="adamw", schedule="constant", learning_rate=1e-20, warmup_steps=0),
)  # fmt: skip
DROPPING = CONFIG.replace(model=MODEL.replace(dropout_rate=0.3, num_sparse_decoder_layers=0))


def run_on(config, devices=1):
    return build_run(config, create_mesh(config.mesh, jax.devices()[:devices]))


def repeated_row(rows, source=5, target=4):
    """One example, `rows` times."""
    random = np.random.default_rng(1)
    ids, labels = random.integers(3, 40, (1, source)), random.integers(3, 40, (1, target))
    batch = {
        "input_ids": ids, "attention_mask": np.ones_like(ids), "labels": labels,
        "decoder_input_ids": np.concatenate([[[0]], labels[:, :-1]], 1), "decoder_attention_mask": np.ones_like(labels),
    }  # fmt: skip
    return {name: np.repeat(x, rows, 0).astype(np.int32) for name, x in batch.items()}


def logits_by_piece(config, batch):
    """The logits that every micro-batch's loss was taken of."""
    run, seen = run_on(config), []

    def loss_of(output, piece, divisor):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), output.head.logits())
        return seq2seq_loss(output, piece["labels"], config.model, divisor=divisor)

    step = functools.partial(loss_and_grads, run, loss_of=loss_of)
    jax.block_until_ready(jax.jit(step)(init_state(run).params, batch, jax.random.key(0)))
    jax.effects_barrier()
    return seen


def test_micro_batches_and_the_examples_in_them_draw_their_own_dropout():
    pieces = logits_by_piece(DROPPING.replace(train=TrainConfig(steps=10, microbatches=2)), repeated_row(4))
    rows = [row for piece in pieces for row in piece]
    assert len(pieces) == 2 and len(rows) == 4
    for i in range(4):
        for j in range(i):
            assert np.abs(rows[i] - rows[j]).max() > 0.05, (i, j)


def test_every_step_draws_anew_and_repeating_a_step_repeats_its_draws():
    run, batch = run_on(DROPPING), repeated_row(4)
    step = jax.jit(functools.partial(train_step, run))
    state = init_state(run)
    losses = []
    for _ in range(3):
        losses.append(float(step(state, batch)[1]["loss"]))
        assert float(step(state, batch)[1]["loss"]) == losses[-1]
        state = step(state, batch)[0]  # the rate is so small that no parameter changes
    assert len({round(loss, 3) for loss in losses}) == 3
    other = init_state(run_on(DROPPING.replace(train=TrainConfig(steps=10, seed=1))))
    other = state.replace(rng=other.rng, step=state.step)
    assert abs(float(step(other, batch)[1]["loss"]) - float(step(state, batch)[1]["loss"])) > 1e-3


def test_the_devices_of_a_pmap_draw_their_own_dropout():
    """Two devices with the same rows: were their draws the same, their mean loss would be that of one."""
    losses = []
    for devices in (1, 2):
        config = DROPPING.replace(data=DataConfig(batch_size=2 * devices), mesh=MeshConfig(mode="pmap"))
        config = config.replace(model=config.model.replace(loss_normalizer="real_target_tokens"))
        run = run_on(config, devices)
        stepper = build_stepper(run)
        _, metrics = stepper.step(stepper.hold(init_state(run)), repeated_row(2 * devices))
        losses.append(float(metrics["loss"]))
    assert abs(losses[0] - losses[1]) > 1e-3


def test_the_gradient_norm_is_reported_before_clipping_and_the_rate_is_that_of_the_update():
    batch, results = repeated_row(4), {}
    schedule = dict(name="adamw", schedule="linear", learning_rate=0.1, warmup_steps=4, eps=1.0)
    for limit in (None, 1e-3):
        dense = MODEL.replace(num_sparse_decoder_layers=0)
        run = run_on(CONFIG.replace(model=dense, optimizer=OptimizerConfig(**schedule, clip_global_norm=limit)))
        state = init_state(run)
        before = jax.device_get(state.params)
        step = compile_train_step(run)
        if limit is None:
            grads, _ = jax.jit(functools.partial(loss_and_grads, run))(before, batch, jax.random.key(0))
            norm = np.sqrt(sum((np.float64(g) ** 2).sum() for g in jax.tree.leaves(grads)))
        state, metrics = step(state, batch)
        moved = max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (state.params, before)), strict=True))
        results[limit] = moved
        assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)
        rates = [float(metrics["learning_rate"])]
        for _ in range(3):
            state, metrics = step(state, batch)
            rates.append(float(metrics["learning_rate"]))
        assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1], rel=1e-6)
    assert norm > 1e-2
    assert results[1e-3] < 0.05 * results[None]


def packed(first, second):
    """A row of two segments and some padding, and its parts alone; a segment is (source, labels)."""

    def lay(parts, width, fill):
        flat = [x for part in parts for x in part]
        return np.array([[*flat, *([fill] * (width - len(flat)))]], np.int32)

    def segments(parts, width):
        return lay([[i + 1] * len(part) for i, part in enumerate(parts)], width, 0)

    sources, labels = zip(first, second, strict=True)
    shifted = [[0, *part[:-1]] for part in labels]
    batch = {
        "input_ids": lay(sources, 12, 0), "labels": lay(labels, 9, -100), "decoder_input_ids": lay(shifted, 9, 0),
        "input_segment_ids": segments(sources, 12), "decoder_segment_ids": segments(labels, 9),
    }  # fmt: skip
    batch["attention_mask"] = (batch["input_segment_ids"] > 0).astype(np.int32)
    batch["decoder_attention_mask"] = (batch["decoder_segment_ids"] > 0).astype(np.int32)
    return batch


FIRST, SECOND, OTHER = ([5, 6, 7, 1], [9, 8, 1]), ([11, 12, 13, 14, 1], [21, 22, 23, 1]), ([31, 12, 37, 18, 1], [33, 34, 35, 1])


@pytest.fixture(scope="module")
def run():
    return run_on(CONFIG.replace(model=MODEL.replace(num_selected_experts=2)))


@pytest.fixture(scope="module")
def params(run):
    return init_state(run).params


@pytest.fixture(scope="module")
def step(run, params):
    """`loss_and_grads` and `eval_step` of a batch, compiled once for all tests of packing."""
    both = jax.jit(lambda p, batch, text: (loss_and_grads(run, p, batch, jax.random.key(0)), eval_step(run, p, batch | text)))
    return lambda batch, text_mask: both(params, batch, {"text_mask": text_mask})


def of_segment(step, batch, segment):
    """Gradients of one segment's loss, the loss, and its cross-entropy in evaluation, the others' labels left out."""
    kept = np.where(batch["decoder_segment_ids"] == segment, batch["labels"], -100).astype(np.int32)
    (grads, metrics), sums = step({**batch, "labels": kept}, np.ones(kept.shape, np.float32))
    return flatten_dict(grads, sep="/"), float(metrics["loss"]), float(sums["cross_entropy"])


def test_in_a_packed_step_other_segments_change_nothing_in_ones_loss_and_gradient(step):
    grads, loss, evaluated = of_segment(step, packed(FIRST, SECOND), 1)
    changed, changed_loss, changed_evaluated = of_segment(step, packed(FIRST, OTHER), 1)
    alone, alone_loss, _ = of_segment(step, packed(FIRST, ([], [])), 1)
    assert loss == pytest.approx(changed_loss, rel=1e-6) == pytest.approx(alone_loss, rel=1e-5)
    assert evaluated == pytest.approx(changed_evaluated, rel=1e-6) == pytest.approx(loss, rel=1e-5)
    for path, grad in grads.items():
        np.testing.assert_allclose(grad, changed[path], rtol=1e-5, atol=1e-6, err_msg=path)
        np.testing.assert_allclose(grad, alone[path], rtol=1e-4, atol=1e-5, err_msg=path)
    assert np.abs(grads["token_embedder/embedding"]).sum() > 1e-3
    # The second one is as it would be at the beginning of a row.
    second, second_loss, _ = of_segment(step, packed(FIRST, SECOND), 2)
    moved, moved_loss, _ = of_segment(step, packed(SECOND, ([], [])), 1)
    assert second_loss == pytest.approx(moved_loss, rel=1e-5)
    for path, grad in second.items():
        np.testing.assert_allclose(grad, moved[path], rtol=1e-4, atol=1e-5, err_msg=path)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_where_sequences_count_alike_so_do_packed_segments(run, params, step, microbatches):
    parts = [packed(FIRST, SECOND), packed(OTHER, FIRST)]
    batch = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    tokens = {}
    for row, part in enumerate(parts):
        for segment in (1, 2):
            count = int((part["decoder_segment_ids"] == segment).sum())
            tokens[row, segment] = of_segment(step, part, segment)[1] / count  # the mean over the segment's tokens
    config = run.config.replace(
        model=run.config.model.replace(loss_normalizer="average_per_sequence"),
        train=TrainConfig(steps=10, microbatches=microbatches),
        data=DataConfig(batch_size=2),
    )
    _, metrics = jax.jit(functools.partial(loss_and_grads, run_on(config)))(params, batch, jax.random.key(0))
    assert float(metrics["cross_entropy"]) == pytest.approx(np.mean(list(tokens.values())), rel=1e-5)
    assert float(metrics["target_tokens"]) == 3 + 4 + 4 + 3


def test_evaluation_sums_count_text_apart_from_all_targets(run, params, step):
    batch = packed(FIRST, SECOND)
    text = np.zeros(batch["labels"].shape, np.float32)
    text[0, 1] = text[0, 4] = 1.0
    text[0, 8] = 1.0  # at padding: it does not count
    names = ("input_ids", "decoder_input_ids", "attention_mask", "decoder_attention_mask")
    segments = {"segment_ids": batch["input_segment_ids"], "decoder_segment_ids": batch["decoder_segment_ids"]}
    apply = jax.jit(lambda p, *arrays, **segments: run.model.apply({"params": p}, *arrays, **segments).logits)
    logits = np.float64(apply(params, *(batch[name] for name in names), **segments)[0])
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    labels = batch["labels"][0]
    _, sums = step(batch, text)
    assert (float(sums["tokens"]), float(sums["text_tokens"])) == (7.0, 2.0)
    assert float(sums["text_cross_entropy"]) == pytest.approx(-log_probs[1, labels[1]] - log_probs[4, labels[4]], rel=1e-5)
    assert float(sums["cross_entropy"]) == pytest.approx(-sum(log_probs[i, labels[i]] for i in range(7)), rel=1e-5)
    assert float(sums["hits"]) == sum(log_probs[i].argmax() == labels[i] for i in range(7))
    _, all_right = step({**batch, "labels": np.where(batch["labels"] < 0, -100, log_probs.argmax(-1)).astype(np.int32)}, text)
    assert float(all_right["hits"]) == 7.0


SCANNED = CONFIG.replace(model=MODEL.replace(dtype="bfloat16", scan_layers=True))


def test_scanned_experts_enter_a_step_in_the_dtype_that_they_compute_in():
    run = run_on(SCANNED)
    dtypes = {path: str(x.dtype) for path, x in flatten_dict(run.for_model(init_state(run).params), sep="/").items()}
    assert {dtype for path, dtype in dtypes.items() if "/expert/" in path} == {"bfloat16"}
    assert {dtype for path, dtype in dtypes.items() if "/expert/" not in path} == {"float32"}


@pytest.mark.slow
def test_experts_that_enter_in_their_own_dtype_leave_the_gradients_as_they_are_to_the_bit(monkeypatch):
    run, batch, key = run_on(SCANNED), repeated_row(4), jax.random.key(0)
    params = init_state(run).params
    narrow = jax.jit(lambda *arrays: loss_and_grads(run, *arrays))(params, batch, key)
    monkeypatch.setattr(states, "narrow_experts", lambda params, config: params)
    wide = jax.jit(lambda *arrays: loss_and_grads(run, *arrays))(params, batch, key)
    for a, b in zip(jax.tree.leaves(narrow[0]), jax.tree.leaves(wide[0]), strict=True):
        assert a.dtype == b.dtype == np.float32
        np.testing.assert_array_equal(a, b)
