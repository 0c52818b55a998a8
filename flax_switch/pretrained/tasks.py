"""What models with the head of a task say of texts: classes, numbers, tags, spans, and of any model with an encoder embeddings."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from flax_switch.config import SwitchConfig, check
from flax_switch.config.heads import HEADS, head_of
from flax_switch.data.words import encode_context, encode_words, words_of
from flax_switch.generation.text import encode_sources, pad_sources, prefixed
from flax_switch.nn.inputs import as_ids
from flax_switch.ops import AnyArray
from flax_switch.ops.ids import is_known
from flax_switch.ops.pooling import mean_of_tokens, normalized

if TYPE_CHECKING:
    from flax_switch.pretrained.model import Pretrained

LONGEST_SPAN = 64  # tokens of an answer


class Classified(NamedTuple):
    """The most probable class of a text, its probability, and those of all classes by name."""

    label: str
    score: float
    scores: dict[str, float]


class Labelled(NamedTuple):
    """The classes of a text, those of probability 1/2 or more, and the probabilities of all by name."""

    labels: tuple[str, ...]
    scores: dict[str, float]


class Tagged(NamedTuple):
    """A word with its most probable tag and the tag's probability."""

    word: str
    label: str
    score: float


class Answer(NamedTuple):
    """A span of a context, where in it (in characters) it stands, and its probability among all spans that were looked at."""

    text: str
    start: int
    end: int
    score: float


def check_kind(pretrained: Pretrained, head: str, doing: str) -> None:
    """Raises `ConfigError` for a model without such a head, and says how to open it with one."""
    own = pretrained.config.head
    if own == head:
        return
    labels = ", labels=[...]" if HEADS[head].labelled else ""
    has = "a language model" if own == "language_model" else f"a model with a head for {own}"
    check(
        False,
        f"{doing} needs a head for {head}; this is {has}. Load a checkpoint that has one, or give this one a new head to train: "
        f"load_pretrained(PATH, head={head!r}{labels}).",
    )


def check_ends(ids: AnyArray, config: SwitchConfig) -> None:
    """Raises `ConfigError` where a row has no EOS and its state at the EOS is what is classified."""
    if head_of(config).huggingface != "ForSequenceClassification" or not is_known(ids):
        return
    check(
        bool((np.asarray(ids) == config.eos_token_id).any(axis=1).all()),
        f"A row of input_ids has no EOS ({config.eos_token_id}), whose state is what is classified; close every row with one.",
    )


def checked_texts(pretrained: Pretrained, texts: Any, called: str = "texts") -> list[str]:
    """Returns texts as a list; raises `ConfigError` where they are none or there is no vocabulary."""
    check(
        pretrained.vocabulary is not None,
        "The model has no vocabulary to tokenise text with; put its spiece.model into the folder, or call the model with ids.",
    )
    texts = [texts] if isinstance(texts, str) else texts
    check(
        isinstance(texts, (list, tuple)) and len(texts) > 0 and all(isinstance(text, str) for text in texts),
        f"{called} must be a text or a list of texts, at least one; it is {type(texts).__name__} {str(texts)[:60]}.",
    )
    prefix = pretrained.prefixes[0] if len(pretrained.prefixes) == 1 else ""
    return [prefixed(text, prefix) for text in texts]


def classify(pretrained: Pretrained, texts: Any, batch_size: int) -> list[Classified]:
    """Returns the class of each text."""
    check_kind(pretrained, "classification", "classify")
    labels = pretrained.config.labels
    rows = _probabilities(_logits(pretrained, _encoded(pretrained, texts), batch_size))
    best = [(row, int(row.argmax())) for row in rows]
    return [Classified(labels[i], float(row[i]), dict(zip(labels, map(float, row), strict=True))) for row, i in best]


def label(pretrained: Pretrained, texts: Any, batch_size: int) -> list[Labelled]:
    """Returns the classes of each text."""
    check_kind(pretrained, "multi_label_classification", "label")
    labels = pretrained.config.labels
    rows = [jax.nn.sigmoid(row).tolist() for row in _logits(pretrained, _encoded(pretrained, texts), batch_size)]
    scores = [dict(zip(labels, row, strict=True)) for row in rows]
    return [Labelled(tuple(name for name, score in each.items() if score >= 0.5), each) for each in scores]


def regress(pretrained: Pretrained, texts: Any, batch_size: int) -> Float[np.ndarray, " B"]:
    """Returns a number for each text."""
    check_kind(pretrained, "regression", "regress")
    return np.array([row[0] for row in _logits(pretrained, _encoded(pretrained, texts), batch_size)], np.float32)


def tag(pretrained: Pretrained, texts: Any, batch_size: int) -> list[list[Tagged]]:
    """Returns for each text its words with their tags; a word has the tag of its first token."""
    check_kind(pretrained, "token_classification", "tag")
    whole = [text if isinstance(text, str) else " ".join(text) for text in ([texts] if isinstance(texts, str) else texts)]
    words = [[word.text for word in words_of(text)] for text in checked_texts(pretrained, whole)]
    encoded = [encode_words(one, pretrained.vocabulary) for one in words]
    rows = [[*(token for ids in one for token in ids), pretrained.config.eos_token_id] for one in encoded]
    result = []
    for found, ids, one in zip(_probabilities(_logits(pretrained, rows, batch_size)), encoded, words, strict=True):
        firsts = np.cumsum([0, *map(len, ids)])[:-1]
        result.append([_tagged(word, found[first], pretrained.config.labels) for word, first in zip(one, firsts, strict=True)])
    return result


def _tagged(word: str, probabilities: np.ndarray, labels: Sequence[str]) -> Tagged:
    best = int(probabilities.argmax())
    return Tagged(word, labels[best], float(probabilities[best]))


def answer(pretrained: Pretrained, questions: Any, contexts: Any, batch_size: int) -> list[Answer]:
    """Returns the best span of each context for its question."""
    check_kind(pretrained, "question_answering", "answer")
    questions, contexts = checked_texts(pretrained, questions, "question"), [contexts] if isinstance(contexts, str) else contexts
    check(
        len(questions) == len(contexts) and all(words_of(context) for context in contexts),
        f"Each question has a context of its own, which is not empty; there are {len(questions)} questions and {len(contexts)} "
        "contexts.",
    )
    encoded = [encode_context(*pair, pretrained.vocabulary) for pair in zip(questions, contexts, strict=True)]
    rows = [[*one.ids, pretrained.config.eos_token_id] for one in encoded]
    found = _logits(pretrained, rows, batch_size)
    return [span(*one) for one in zip(found, (e.characters for e in encoded), contexts, strict=True)]


def span(logits: Float[np.ndarray, "S 2"], characters: Sequence[tuple[int, int]], context: str) -> Answer:
    """Returns the span of the context, at most LONGEST_SPAN tokens, whose start and end have the largest sum of logits.

    characters: of the context that each token stands for, (-1, -1) for others; tokens beyond the logits were cut off.
    """
    places = [i for i, (start, _) in enumerate(characters[: len(logits)]) if start >= 0]
    if not places:  # the question alone filled the row
        return Answer("", 0, 0, 0.0)
    first, last = places[0], places[-1] + 1
    sums = logits[first:last, None, 0] + logits[None, first:last, 1]
    length = np.arange(last - first)
    sums = np.where((length[None] >= length[:, None]) & (length[None] < length[:, None] + LONGEST_SPAN), sums, -np.inf)
    start, end = np.unravel_index(sums.argmax(), sums.shape)
    a, b = characters[first + int(start)][0], characters[first + int(end)][1]
    return Answer(context[a:b], a, b, float(_softmax(sums.ravel()).max()))


def embed(pretrained: Pretrained, texts: Any, batch_size: int) -> Float[np.ndarray, "B D"]:
    """Returns the mean of the encoder's states over each text's tokens, made of length 1."""
    check(not pretrained.config.decoder_only, "embed needs an encoder; this model is a decoder alone.")
    return np.stack(_rows(pretrained, _embed, _encoded(pretrained, texts), batch_size))


def _encoded(pretrained: Pretrained, texts: Any) -> list[list[int]]:
    texts = checked_texts(pretrained, texts)
    ids, mask = encode_sources(texts, pretrained.vocabulary, pretrained.config)
    return [row[:length].tolist() for row, length in zip(ids, mask.sum(1), strict=True)]


def _logits(pretrained: Pretrained, rows: Sequence[Sequence[int]], batch_size: int) -> list[np.ndarray]:
    return _rows(pretrained, _apply, rows, batch_size)


def _rows(pretrained: Pretrained, program: Any, rows: Sequence[Sequence[int]], batch_size: int) -> list[np.ndarray]:
    """Returns what a program makes of each row, in batches of rows of like length."""
    check(batch_size >= 1, f"batch_size must be at least 1; it is {batch_size}.")
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    result: dict[int, np.ndarray] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        ids, mask = pad_sources([rows[i] for i in batch])
        made = np.asarray(pretrained.run(program, as_ids("texts", ids, pretrained.config), mask.astype(bool)))
        result |= dict(zip(batch, made, strict=True))
    return [result[i] for i in range(len(rows))]


@functools.partial(jax.jit, static_argnums=0)
def _apply(model, params, ids, mask):
    return model.apply({"params": params}, ids, mask).logits


@functools.partial(jax.jit, static_argnums=0)
def _embed(model, params, ids, mask):
    return embeddings(model, {"params": params}, ids, mask)


def embeddings(model, variables, ids, mask):
    """Returns the normalised means [B, D] of the states of a model's encoder over the tokens of each row."""
    states = model.apply(variables, ids, mask, method="encode").last_hidden_state
    return normalized(mean_of_tokens(states, mask))


def _softmax(logits: np.ndarray) -> np.ndarray:
    return np.asarray(jax.nn.softmax(jnp.asarray(logits, jnp.float32), axis=-1))


def _probabilities(rows: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [_softmax(row) for row in rows]
