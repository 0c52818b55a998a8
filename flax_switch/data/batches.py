"""Batches: examples laid out in rows of fixed lengths, as dicts of int32 arrays.

    input_ids, attention_mask                       [B, inputs_length]   mask 1 at tokens, 0 at padding
    decoder_input_ids, decoder_attention_mask       [B, targets_length]  targets shifted right by the start token (pad)
    labels                                          [B, targets_length]  targets; -100 at padding, which has no loss
and with packing
    input_segment_ids                               [B, inputs_length]   segments count from 1, 0 is padding
    decoder_segment_ids                             [B, targets_length]
For a decoder alone inputs and targets are joined to sequences of L = inputs_length + targets_length tokens:
    decoder_input_ids, decoder_attention_mask       [B, L]               the start token, inputs without their EOS, targets
    labels                                          [B, L]               the next tokens that are targets; else -100
    prefix_mask                                     [B, L]               1 at the start token and at inputs
    decoder_segment_ids                             [B, L]               with packing
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Integer

from flax_switch.data.examples import Examples, span_of_each

IGNORED = -100
Batch = dict[str, np.ndarray]


def pad_batch(examples: Examples, inputs_length: int, targets_length: int) -> Batch:
    """Lays out one example a row."""
    mask = _mask(examples.input_lengths, inputs_length)
    decoder_mask = _mask(examples.target_lengths, targets_length)
    targets = _fit(examples.targets, targets_length)
    decoder_input_ids = np.zeros_like(targets)
    decoder_input_ids[:, 1:] = targets[:, :-1]
    return {
        "input_ids": _fit(examples.inputs, inputs_length),
        "decoder_input_ids": decoder_input_ids * decoder_mask,
        "labels": np.where(decoder_mask, targets, np.int32(IGNORED)),
        "attention_mask": mask,
        "decoder_attention_mask": decoder_mask,
    }


def describe_targets(examples: Examples, targets_length: int) -> Batch:
    """Returns what a probe asks of targets laid out by `pad_batch`: each row's `objective`, and which targets are `masked`.

    masked [B, T]: 1 at targets that the inputs do not show; that is all of them but in infilling.
    """
    count = len(examples.target_lengths)
    objective = np.zeros(count, np.int32) if examples.objective is None else examples.objective.astype(np.int32)
    shown = np.ones(examples.targets.shape, bool) if examples.hidden is None else examples.hidden
    return {"objective": objective, "masked": _fit(shown, targets_length) * _mask(examples.target_lengths, targets_length)}


def pack_batch(
    examples: Examples, rows: Integer[np.ndarray, " M"], batch_size: int, inputs_length: int, targets_length: int
) -> Batch:
    """Lays out several examples a row: example m goes to `rows[m]` (ascending), after those already there."""
    input_ids, segment_ids = _lay_out(examples.inputs, examples.input_lengths, rows, (batch_size, inputs_length))
    targets, decoder_segment_ids = _lay_out(examples.targets, examples.target_lengths, rows, (batch_size, targets_length))
    decoder_input_ids = np.zeros_like(targets)
    goes_on = decoder_segment_ids[:, 1:] == decoder_segment_ids[:, :-1]  # each segment starts anew
    decoder_input_ids[:, 1:] = np.where(goes_on, targets[:, :-1], 0)
    decoder_mask = (decoder_segment_ids > 0).astype(np.int32)
    return {
        "input_ids": input_ids,
        "decoder_input_ids": decoder_input_ids,
        "labels": np.where(decoder_mask, targets, np.int32(IGNORED)),
        "attention_mask": (segment_ids > 0).astype(np.int32),
        "decoder_attention_mask": decoder_mask,
        "input_segment_ids": segment_ids,
        "decoder_segment_ids": decoder_segment_ids,
    }


def join_batch(examples: Examples, rows: Integer[np.ndarray, " M"], batch_size: int, length: int, *, packed: bool = False) -> Batch:
    """Lays out each example's inputs and targets as one sequence, in `rows[m]` (ascending) after those already there."""
    inputs, targets = np.maximum(examples.input_lengths - 1, 0), examples.target_lengths  # inputs end with EOS
    example, offset = span_of_each(inputs + targets)
    of_inputs = offset < inputs[example]
    joined = np.zeros((len(inputs), int((inputs + targets).max(initial=0))), np.int32)
    joined[example[of_inputs], offset[of_inputs]] = examples.inputs[example[of_inputs], offset[of_inputs]]
    example, offset, after = example[~of_inputs], offset[~of_inputs], (offset - inputs[example])[~of_inputs]
    joined[example, offset] = examples.targets[example, after]
    ids, segments = _lay_out(joined, inputs + targets, rows, (batch_size, length))
    places = np.broadcast_to(np.arange(joined.shape[1]), joined.shape)
    place, _ = _lay_out(places, inputs + targets, rows, (batch_size, length))
    of_row, _ = _lay_out(np.broadcast_to(inputs[:, None], joined.shape), inputs + targets, rows, (batch_size, length))
    real = segments > 0
    decoder_input_ids = np.where(real & (place > 0), np.pad(ids, ((0, 0), (1, 0)))[:, :-1], 0)
    batch = {
        "decoder_input_ids": decoder_input_ids.astype(np.int32),
        "labels": np.where(real & (place >= of_row), ids, np.int32(IGNORED)),
        "decoder_attention_mask": real.astype(np.int32),
        "prefix_mask": (real & (place <= of_row)).astype(np.int32),
    }
    return {**batch, "decoder_segment_ids": segments} if packed else batch


def _lay_out(values: np.ndarray, lengths: np.ndarray, rows: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns (ids, segment ids) of examples laid one after another in their rows."""
    ids, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    first_of_row = np.searchsorted(rows, rows)  # the index of the first example in each example's row
    before = np.cumsum(lengths) - lengths
    starts = before - before[first_of_row]  # where in its row each example starts
    example, offset = span_of_each(lengths)
    row, column = rows[example], starts[example] + offset
    ids[row, column] = values[example, offset]
    segments[row, column] = (np.arange(len(rows)) - first_of_row + 1)[example]
    return ids, segments


def _mask(lengths: np.ndarray, width: int) -> np.ndarray:
    return (np.arange(width) < lengths[:, None]).astype(np.int32)


def _fit(values: np.ndarray, width: int) -> np.ndarray:
    """Widens with zeros to `width`; examples never are wider."""
    fitted = np.zeros((len(values), width), np.int32)
    fitted[:, : values.shape[1]] = values
    return fitted


def pad_rows(batch: Batch, batch_size: int) -> Batch:
    """Returns the last, smaller batch with rows of padding up to `batch_size`; they have no loss."""
    missing = batch_size - len(batch["labels"])
    if not missing:
        return batch
    fill = {name: IGNORED if name == "labels" else 0 for name in batch}
    width = ((0, missing), (0, 0))
    return {name: np.pad(a, width[: a.ndim], constant_values=fill[name]) for name, a in batch.items()}


def text_token_mask(labels: Integer[np.ndarray, "*dims"], num_pieces: int, eos_id: int = 1) -> Bool[np.ndarray, "*dims"]:
    """Returns which labels are text tokens: neither padding (-100) nor EOS nor a sentinel (ids from `num_pieces` on)."""
    return (labels >= 0) & (labels != 0) & (labels != eos_id) & (labels < num_pieces)
