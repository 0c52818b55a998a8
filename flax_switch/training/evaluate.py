"""Held-out evaluation: cross-entropy, perplexity and accuracy, over all targets and over text beside its unigram entropy."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, Self

import numpy as np

from flax_switch.config.finetuning import LOSS
from flax_switch.data import Prepared, Vocabulary, text_token_mask
from flax_switch.ops.ids import check_ids
from flax_switch.ops.losses import IGNORED_LABEL
from flax_switch.parallel.mesh import batch_rows, shard_batch
from flax_switch.training.metrics import plain
from flax_switch.training.probe import Probe
from flax_switch.training.probe import describe as describe_probe
from flax_switch.training.state import Run


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Evaluates parameters on the first `batches` held-out batches, always the same."""

    run: Run
    prepared: Prepared
    eval_step: Callable[[Any, Any], dict[str, Any]]
    unigram_entropy: float
    batches: int
    probe: Probe

    @classmethod
    def of(cls, run: Run, prepared: Prepared, eval_step: Callable[[Any, Any], dict[str, Any]]) -> Self:
        """Counts the held-out unigrams once."""
        batches = run.config.train.eval_batches
        return cls(run, prepared, eval_step, prepared.heldout_unigram_entropy(batches), batches, Probe.of(run, prepared))

    def __call__(self, params: Any) -> dict[str, Any]:
        """Returns metrics by name; cross-entropies in nats per token, perplexities e to their power.

        `nats_below_unigram` is how far the cross-entropy over text targets (neither sentinels nor EOS) lies below the entropy of
        the same tokens' unigram distribution, the least that a model without context can reach. `NAME/cross_entropy` is that of a
        source of a mixture.
        """
        rows = batch_rows(self.run.mesh, self.run.config.data.batch_size)
        batches = self.prepared.heldout_batches(self.batches, rows)
        means = mean_metrics(self.run, self.eval_step, params, batches, self.prepared.vocabulary)
        text = means["text_cross_entropy"]
        return {
            **means,
            "text_perplexity": perplexity(text),
            "unigram_entropy": self.unigram_entropy,
            "nats_below_unigram": self.unigram_entropy - text,
            **self._by_source(params, rows),
            **self.probe(params),
        }

    def _by_source(self, params: Any, rows: np.ndarray) -> dict[str, float]:
        """Returns "source/cross_entropy" of each source of a mixture, over an equal share of the batches."""
        texts, found = self.prepared.texts, {}
        for number, text in enumerate(texts if len(texts) > 1 else ()):
            batches = self.prepared.heldout_batches(-(-self.batches // len(texts)), rows, text=number)
            means = mean_metrics(self.run, self.eval_step, params, batches, self.prepared.vocabulary)
            found[f"{text.name}/{LOSS}"] = means[LOSS]
        return found

    def describe(self, evaluation: dict[str, Any]) -> str:
        """Returns an evaluation as a sentence."""
        return describe(evaluation)

    def conclude(self, step: int, params: Any, evaluation: dict[str, Any] | None) -> None:
        """Pre-training goes on to its last step."""


def mean_metrics(
    run: Run,
    eval_step: Callable[[Any, Any], dict[str, Any]],
    params: Any,
    batches: Iterable[dict[str, np.ndarray]],
    vocabulary: Vocabulary,
) -> dict[str, Any]:
    """Returns cross-entropy (nats a token), perplexity and accuracy over all targets, cross-entropy over text, router metrics.

    Of tokens the means are over all batches' tokens, however many each has; routers' means are over batches.
    Raises `ConfigError` for an id that the model has not.
    """
    totals: dict[str, float] = {}
    routers: list[dict[str, Any]] = []
    for batch in batches:
        mask = text_token_mask(batch["labels"], vocabulary.num_pieces, vocabulary.eos_id)
        for name in ("input_ids", "decoder_input_ids"):
            if name in batch:
                check_ids(name, batch[name], run.config.model.vocab_size)
        check_ids("labels", batch["labels"], run.config.model.vocab_size, besides=IGNORED_LABEL)
        batch = {**batch, "text_mask": mask.astype(np.float32)}
        sums = plain(eval_step(params, shard_batch(batch, run.mesh)))
        routers.append({k: np.asarray(v) for k, v in sums.items() if k.startswith("routers/")})
        for name in ("cross_entropy", "hits", "tokens", "text_cross_entropy", "text_tokens"):
            totals[name] = totals.get(name, 0.0) + sums[name]
    tokens, text_tokens = max(totals["tokens"], 1.0), max(totals["text_tokens"], 1.0)
    cross_entropy = totals["cross_entropy"] / tokens
    return {
        "cross_entropy": cross_entropy,
        "perplexity": perplexity(cross_entropy),
        "accuracy": totals["hits"] / tokens,
        "text_cross_entropy": totals["text_cross_entropy"] / text_tokens,
        **{name: np.mean([r[name] for r in routers], axis=0).tolist() for name in (routers[0] if routers else {})},
    }


def perplexity(nats: float) -> float:
    """Returns e to the power of a cross-entropy in nats: the number of equally likely tokens a guess would be among."""
    return math.exp(nats) if nats < 700.0 else math.inf


def describe(evaluation: dict[str, Any]) -> str:
    """Returns an evaluation of pre-training in lines."""
    text, alone = evaluation["text_cross_entropy"], evaluation["unigram_entropy"]
    return (
        f"held-out loss {evaluation['cross_entropy']:.3f} nats a token (perplexity {evaluation['perplexity']:.2f}); "
        f"{100 * evaluation['accuracy']:.1f} % of tokens are right\n"
        f"  held-out loss without special tokens: {text:.3f} (guessing each token by its frequency: {alone:.3f})\n"
        f"{_of_sources(evaluation)}{describe_probe(evaluation)}"
    ).rstrip()


def losses_of_sources(evaluation: dict[str, Any]) -> dict[str, float]:
    """Returns the held-out loss of each source of a mixture by its name; nothing of a single source."""
    return {name.removesuffix(f"/{LOSS}"): value for name, value in evaluation.items() if name.endswith(f"/{LOSS}")}


def _of_sources(evaluation: dict[str, Any]) -> str:
    told = ", ".join(f"{name} {value:.3f}" for name, value in losses_of_sources(evaluation).items())
    return f"  held-out loss by source: {told}\n" if told else ""
