"""Rounding to four bits with an eye on what a model is given: how its outputs change counts, not how its weights do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from flax_switch.config import SwitchConfig, check
from flax_switch.config.heads import LANGUAGE_MODEL
from flax_switch.config.weights import SCALE
from flax_switch.convert.canonical import flatten, unflatten, weights_of
from flax_switch.convert.compensated import compensated
from flax_switch.convert.tensors import LazyTensor, from_array
from flax_switch.ops.kernels.observed import Observed
from flax_switch.pretrained.adapter import mesh_of

if TYPE_CHECKING:
    from flax_switch.pretrained.model import Pretrained

Calibration = Sequence[str] | Sequence[Mapping[str, Any]]

ROWS = 16  # texts that go through the model together
LONGEST = 512  # tokens of a text that are read
NEW_TOKENS = 64  # that the model says to a text
MOMENTS_BYTES = 2**29  # of second moments that are gathered at a time; more kernels wait for a further pass


def calibrated(
    pretrained: Pretrained, config: SwitchConfig, tensors: Mapping[str, LazyTensor], calibration: Calibration
) -> dict[str, LazyTensor]:
    """Returns the canonical tensors of an int4 model with its kernels of four bits rounded anew, for what `calibration` asks of it.

    Args:
      pretrained: the float model.
      config, tensors: the int4 model's, as `convert.quantize.with_weights` makes them.
      calibration: see `quantize`.

    Raises:
      ConfigError: for a calibration that holds nothing, and for a model over a mesh.
    """
    check(mesh_of(pretrained.params) is None, "Calibration runs on one device; load the model without a mesh to quantise it.")
    pretrained = _unscanned(pretrained)
    batches = _batches(pretrained, calibration)
    kernels, result = flatten(dict(pretrained.params)), dict(tensors)
    for paths in _groups({path: kernels[path].shape for path in kernels if weights_of(path, config) == "int4"}):
        for path, moments in _moments(pretrained, batches, paths).items():
            values, scale = compensated(path, np.asarray(kernels[path], np.float32), moments)
            result[path], result[path + SCALE] = from_array(values), from_array(scale)
    return result


def _unscanned(pretrained: Pretrained) -> Pretrained:
    """Returns the model with layers that are not scanned, each with kernels of its own."""
    from flax_switch.pretrained.loading import built_of
    from flax_switch.pretrained.saving import unscanned

    config = pretrained.config
    if not config.scan_layers:
        return pretrained
    return built_of(pretrained, config.replace(scan_layers=False), unscanned(config, pretrained.params))


def _batches(pretrained: Pretrained, calibration: Calibration) -> list[Mapping[str, Any]]:
    """Returns the arguments of calls, of which texts make some."""
    check(
        not isinstance(calibration, (str, bytes, Mapping)) and len(calibration) > 0,
        "calibration is a list of texts, or of the model's arguments: some hundred texts like those it will be given.",
    )
    texts = [isinstance(one, str) for one in calibration]
    check(all(texts) or not any(texts), "calibration holds texts and arguments of the model; give the one or the other.")
    if not all(texts):
        for one in calibration:
            check(
                isinstance(one, Mapping), f"calibration holds texts, or dicts of the model's arguments, not {type(one).__name__}."
            )
        return list(calibration)  # type: ignore[arg-type]
    return list(_of_texts(pretrained, [str(text) for text in calibration]))


def _of_texts(pretrained: Pretrained, texts: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
    """Yields calls with texts, and with what the model says to them greedily."""
    from flax_switch.generation.text import generate_batches, prefixed, source_ids

    config, vocabulary = pretrained.config, pretrained.vocabulary
    check(vocabulary is not None, "calibration holds texts, and the model has no vocabulary; give dicts of its arguments.")
    prefix = pretrained.prefixes_in_use[0] if len(pretrained.prefixes_in_use) == 1 else ""
    sources = [source_ids(prefixed(text, prefix), vocabulary, config) for text in texts]
    sources = [ids if len(ids) <= LONGEST else [*ids[: LONGEST - 1], ids[-1]] for ids in sources]
    if config.head != LANGUAGE_MODEL or pretrained.architecture != "full":
        check(pretrained.architecture != "headless", "This model has no head to answer texts with; give dicts of its arguments.")
        yield from (_call(batch, (), config) for batch in _by_length(sources))
        return
    said = generate_batches(
        pretrained.model,
        pretrained.params,
        enumerate(sources),
        batch_size=ROWS,
        longest=LONGEST,
        only_new=True,
        num_beams=1,
        max_new_tokens=NEW_TOKENS,
    )
    for numbers, rows, _ in said:
        first = 0 if config.decoder_only else 1  # what a decoder begins with is no answer
        answers = [[int(token) for token in row[0, first:] if token != config.pad_token_id] for row in rows]
        inputs = [sources[number] for number in numbers]
        if config.decoder_only:
            inputs, answers = [ids + answer for ids, answer in zip(inputs, answers, strict=True)], []
        yield _call(inputs, answers, config)


def _call(inputs: Sequence[list[int]], answers: Sequence[list[int]], config: SwitchConfig) -> dict[str, np.ndarray]:
    """Returns the arguments of a call in one of few shapes, as each is compiled: rows that fill it up have nothing that counts."""
    from flax_switch.generation.text import pad_sources

    filling = ROWS - len(inputs) if config.head == LANGUAGE_MODEL else 0  # other heads' outputs of a row all count
    ids, mask = pad_sources([*inputs, *[[config.eos_token_id]] * filling])
    if not answers:
        mask[len(inputs) :] = 0
        return dict(input_ids=ids, attention_mask=mask)
    labels = np.full((ROWS, NEW_TOKENS), -100)
    for row, answer in zip(labels, answers, strict=False):
        answer = answer or [config.eos_token_id]  # who says nothing, says that it is the end
        row[: len(answer)] = answer
    return dict(input_ids=ids, attention_mask=mask, labels=labels, decoder_attention_mask=labels >= 0)


def _by_length(sources: Sequence[list[int]]) -> Iterator[list[list[int]]]:
    ordered = sorted(sources, key=len)
    return (ordered[start : start + ROWS] for start in range(0, len(ordered), ROWS))


def _groups(shapes: Mapping[str, tuple[int, ...]]) -> Iterable[list[str]]:
    """Returns kernels in groups whose second moments fit into MOMENTS_BYTES, if more than one does."""
    groups: list[list[str]] = [[]]
    room = MOMENTS_BYTES
    for path, shape in shapes.items():
        size = 4 * math.prod(shape[:-1]) * shape[-2]
        if groups[-1] and size > room:
            groups.append([])
            room = MOMENTS_BYTES
        groups[-1].append(path)
        room -= size
    return groups


def _moments(
    pretrained: Pretrained, batches: Sequence[Mapping[str, Any]], paths: Sequence[str]
) -> dict[str, Float[np.ndarray, "... D D"]]:
    """Returns the second moments of the rows that kernels multiply, weighted by what the loss says of them, of all batches."""
    kernels = flatten(dict(pretrained.params))

    def loss(zeros: Mapping[str, Array], batch: Mapping[str, Any], rng: PRNGKeyArray) -> Array:
        params = {**kernels, **{path: Observed(kernels[path], zero) for path, zero in zeros.items()}}
        output = pretrained.replace(params=unflatten(params))(**batch)
        return _sampled_loss(output, batch, pretrained.config.head, rng)

    zeros = {path: jnp.zeros((*kernels[path].shape[:-1], kernels[path].shape[-2])) for path in paths}
    total = zeros
    for number, batch in enumerate(batches):
        total = jax.tree.map(jnp.add, total, jax.grad(loss)(zeros, batch, jax.random.key(number)))
    return {path: np.asarray(moments) for path, moments in total.items()}


def _sampled_loss(output: Any, batch: Mapping[str, Any], head: str, rng: PRNGKeyArray) -> Float[Array, ""]:
    """Returns a loss whose gradients' squares are in the mean what a change of the outputs costs (Fisher's information).

    For the logits of a language model it is the cross-entropy of tokens that are drawn from them (1412.1193, section 5), for all
    else the product with normal numbers, as of squared errors.
    """
    logits = getattr(output, "logits", None)
    found = output.last_hidden_state if logits is None else logits
    if logits is not None and head == LANGUAGE_MODEL:
        drawn = jax.random.categorical(rng, jax.lax.stop_gradient(logits))[..., None]
        lost = -jnp.take_along_axis(jax.nn.log_softmax(logits), drawn, -1)[..., 0]
    else:
        lost = (found * jax.random.normal(rng, found.shape)).sum(-1)
    mask = _counted(batch, head)
    return lost.sum() if mask is None or np.shape(mask) != lost.shape else jnp.where(jnp.asarray(mask) > 0, lost, 0).sum()


def _counted(batch: Mapping[str, Any], head: str) -> Any:
    """Returns the mask of the outputs that count, of the last stack that a call runs; None where all do."""
    if head == LANGUAGE_MODEL and batch.get("labels") is not None:
        return np.asarray(batch["labels"]) >= 0
    of_decoder = any(name.startswith("decoder_") for name in batch)
    return batch.get("decoder_attention_mask" if of_decoder else "attention_mask")
