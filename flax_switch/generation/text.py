"""Text in, text out: lines are tokenised, batched by length buckets so that few programs compile, and returned in order."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from flax_switch.config import ConfigError, SwitchConfig, check, one_of
from flax_switch.generation.defaults import with_defaults
from flax_switch.generation.generate import check_seeds, generate
from flax_switch.host.json_text import json_object, valid_text

SMALLEST_BUCKET = 16


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of input: its number from 1, its text, and what is wrong with it, if anything."""

    number: int
    text: str = ""
    error: str | None = None


def read_lines(lines: Iterable[str | bytes], field: str = "text") -> list[Line]:
    """Reads text lines, or JSON lines (those that begin with '{') whose `field` is the text; blank lines are left out.

    A byte order mark at the beginning is no text. A line that cannot be used says why in its place, and costs no other.
    """
    read = [_line(number, raw, field) for number, raw in enumerate(lines, 1)]
    return [line for line in read if line.error or line.text.strip()]


def _line(number: int, raw: str | bytes, field: str) -> Line:
    try:
        text = raw.decode("utf-8") if isinstance(raw, bytes) else valid_text(raw)
    except UnicodeDecodeError as problem:
        return Line(number, error=f"byte {problem.start + 1} (0x{problem.object[problem.start]:02x}) is not UTF-8")
    text = text.rstrip("\r\n").removeprefix("\ufeff" if number == 1 else "")
    if not text.lstrip().startswith("{"):
        return Line(number, text)
    try:
        values = json_object(text, "malformed JSON")
    except ConfigError as problem:
        return Line(number, error=str(problem).removesuffix("."))
    if isinstance(values.get(field), str):
        return Line(number, values[field])
    return Line(number, error=f"there is no text under {field!r}; the fields are: {', '.join(values) or 'none'}")


def bucket_of(length: int, longest: int) -> int:
    """Returns the length that a source of `length` tokens is padded to: a power of two, or `longest`."""
    bucket = SMALLEST_BUCKET
    while bucket < length:
        bucket *= 2
    return min(bucket, longest)


def generate_lines(
    pretrained: Any,
    lines: Sequence[Line],
    *,
    batch_size: int = 8,
    max_source_length: int = 512,
    prefix: str = "",
    on_batch: Callable[[int, int], None] = lambda lines, tokens: None,
    on_results: Callable[[list[dict[str, Any]]], None] = lambda results: None,
    **controls: Any,
) -> list[dict[str, Any]]:
    """Returns a result for each line, in order: {"line", "input", "outputs", "scores"}, or {"line", "error"} for a bad one.

    `prefix` is put before every text that does not begin with it already; results show the text as it was.

    Sources are sorted into length buckets and every batch is filled up to `batch_size`, so that a program compiles once per bucket.
    `on_batch(lines, tokens)` is called after each batch with the numbers it finished, `on_results` with its results and, first of
    all, with those of lines that cannot be used. With sampling, what a line draws depends on the seed and its number, not on the
    batch it fell into. Raises `ConfigError` for a checkpoint without a vocabulary and for controls that cannot be.
    """
    vocabulary, config = pretrained.vocabulary, pretrained.config
    controls = with_defaults(getattr(pretrained, "generation_defaults", {}), controls)
    _check_vocabulary(vocabulary)
    results: dict[int, dict[str, Any]] = {}
    sources: list[tuple[int, list[int]]] = []
    for i, line in enumerate(lines):
        ids, error = _source(line, prefix, max_source_length, vocabulary, config)
        if error:
            results[i] = {"line": line.number, "error": error}
        else:
            sources.append((i, ids))
    if results:
        on_results(list(results.values()))
    if not sources:
        return [results[i] for i in range(len(lines))]
    for batch, rows, scores in generate_batches(
        pretrained.model,
        pretrained.params,
        sources,
        batch_size=batch_size,
        longest=max_source_length,
        draw_of=lambda i: lines[i].number,
        **controls,
    ):
        for row, i in enumerate(batch):
            outputs = texts_of(rows[row], vocabulary, config)
            results[i] = {"line": lines[i].number, "input": lines[i].text, "outputs": outputs}
            if scores is not None:
                results[i]["scores"] = [float(score) for score in scores[row]]
        on_results([results[i] for i in batch])
        on_batch(len(batch), int((rows != config.pad_token_id).sum()))
    return [results[i] for i in range(len(lines))]


def line_inputs(
    pretrained: Any, line: Line, *, max_source_length: int, prefix: str, seed: int
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Returns the ids, mask and seeds [1, ...] with which `generate` says what `generate_lines` says of a line.

    Raises `ConfigError` for a line that cannot be used.
    """
    _check_vocabulary(pretrained.vocabulary)
    ids, error = _source(line, prefix, max_source_length, pretrained.vocabulary, pretrained.config)
    if error is not None:
        raise ConfigError(error)
    return *_pad([(line.number, ids)], bucket_of(len(ids), max_source_length)), [_source_seed(seed, line.number)]


def _source(line: Line, prefix: str, longest: int, vocabulary: Any, config: SwitchConfig) -> tuple[list[int], str | None]:
    """Returns a line's ids, and why it cannot be used, if it cannot."""
    ids = [] if line.error else source_ids(prefixed(line.text, prefix), vocabulary, config)
    if len(ids) > longest:
        return ids, f"its {len(ids)} tokens exceed max_source_length={longest}"
    if any(token >= config.vocab_size for token in ids):
        return ids, f"the vocabulary gives ids past the model's {config.vocab_size}"
    return ids, line.error


def _check_vocabulary(vocabulary: Any) -> None:
    check(vocabulary is not None, "The checkpoint has no vocabulary to tokenise text with; put its spiece.model into the folder.")


def with_languages(
    vocabulary: Any, prefix: str | None, controls: Mapping[str, Any], source: str | None, target: str | None
) -> tuple[str | None, dict[str, Any]]:
    """Returns the prefix and controls with which texts are translated from a language into another, both named by their tokens.

    Raises `ConfigError` for a language that the vocabulary has no token for.
    """
    controls = dict(controls)
    known = {} if vocabulary is None else vocabulary.languages
    for name, language in (("source_language", source), ("target_language", target)):
        if language is not None:
            check(bool(known), f"{name}={language!r}: the model's vocabulary has no tokens for languages; leave it out.")
            one_of(name, language, tuple(known))
    if source is not None:
        check(not prefix, f"source_language={source!r} is put before texts, and so is prefix={prefix!r}; leave one out.")
        prefix = source
    if target is not None:
        check("forced_bos_token_id" not in controls, "target_language and forced_bos_token_id say the same; leave one out.")
        controls["forced_bos_token_id"] = known[target]
    return prefix, controls


def prefixed(text: str, prefix: str) -> str:
    """Returns a text with a prefix before it, once."""
    return text if text.startswith(prefix) else prefix + text


def generate_batches(
    model: Any,
    params: Any,
    sources: Iterable[tuple[int, Sequence[int]]],
    *,
    batch_size: int,
    longest: int,
    seed: int = 0,
    draw_of: Callable[[int], int] = lambda number: number,
    only_new: bool = False,
    **controls: Any,
) -> Iterator[tuple[list[int], Int[np.ndarray, "b n T"], Float[np.ndarray, "b n"] | None]]:
    """Yields (numbers, sequences, scores) of sources given as (number, ids), batch by batch, by length buckets up to `longest`.

    `seed` and `draw_of` of its number decide what a source draws. With `only_new` the inputs that a decoder-only model's sequences
    begin with are left out.
    """
    check_seeds(seed, 1)
    buckets: dict[int, list[tuple[int, Sequence[int]]]] = {}
    for number, ids in sources:
        buckets.setdefault(bucket_of(len(ids), longest), []).append((number, ids))
    for length, same in sorted(buckets.items()):
        for start in range(0, len(same), batch_size):
            batch = same[start : start + batch_size]
            filled = batch + batch[-1:] * (batch_size - len(batch))
            seeds = [_source_seed(seed, draw_of(number)) for number, _ in filled]
            output = generate(model, params, *_pad(filled, length), seed=seeds, **controls)
            inputs = length + 1 if only_new and model.config.decoder_only else 0
            rows = np.asarray(output.sequences).reshape(batch_size, -1, output.sequences.shape[-1])[..., inputs:]
            scores = None if output.scores is None else np.asarray(output.scores).reshape(batch_size, -1)[: len(batch)]
            yield [number for number, _ in batch], rows[: len(batch)], scores


def _source_seed(seed: int, number: int) -> int:
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def _pad(batch: Sequence[tuple[int, Sequence[int]]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids and mask [len(batch), length]."""
    ids, mask = np.zeros((2, len(batch), length), np.int32)
    for row, (_, tokens) in enumerate(batch):
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
    return ids, mask


def texts_of(sequences: Iterable[Sequence[int] | np.ndarray], vocabulary: Any, config: SwitchConfig) -> list[str]:
    """Returns sequences as text, without start token, EOS, padding and languages; sentinels stay, by name."""
    hidden = {config.pad_token_id, config.eos_token_id, config.decoder_start_token_id, *config.extra_eos_token_ids}
    hidden |= {*vocabulary.languages.values()}
    shown = ([int(token) for token in sequence if int(token) not in hidden] for sequence in sequences)
    return [vocabulary.decode(ids, skip_special_tokens=False) for ids in shown]


def source_ids(text: str, vocabulary: Any, config: SwitchConfig) -> list[int]:
    """Returns a text as ids, closed by EOS; not so for a decoder-only model, which continues it."""
    return [*vocabulary.encode_source(text), *([] if config.decoder_only else [config.eos_token_id])]


def encode_sources(texts: Sequence[str], vocabulary: Any, config: SwitchConfig) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids (see `source_ids`) and mask of texts, in rows of a length that many texts share, so that few programs compile."""
    return pad_sources([source_ids(text, vocabulary, config) for text in texts])


def pad_sources(ids: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids and mask of sources, in rows of a length that many sources share."""
    longest = max(1, *map(len, ids))
    return _pad(list(enumerate(ids)), bucket_of(longest, longest * 2))
