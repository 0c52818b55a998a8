"""What a model makes of its inputs: held-out loss with another row's inputs in place of its own, and masked text filled in.

A decoder can learn its language and leave the encoder alone for thousands of steps, while every loss looks fine. The loss with
another row's inputs tells: where it is no higher, the encoder is worth nothing.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from flax_switch.data import Prepared, text_token_mask
from flax_switch.data.objectives import OBJECTIVES
from flax_switch.data.statistics import most_frequent_share, unigram_entropy
from flax_switch.ops.kernels.head_loss import Terms, head_loss
from flax_switch.parallel.mesh import batch_rows, batch_sharding, replicated, shard_batch
from flax_switch.training.metrics import plain
from flax_switch.training.state import Run, state_shardings
from flax_switch.training.step import Batch, forward


def probe_step(run: Run, params: Any, batch: Batch) -> dict[str, jax.Array]:
    """Sums cross-entropy and hits over classes of targets, and counts masked spans whose every token is right.

    batch["classes"]: [B, T, C], 1 where a target is of a class; batch["span"]: [B, T], the number of the masked span that a
    target is in, from 1, or 0.
    """
    output = forward(run.model, run.for_model(params), batch, None)
    targets = jnp.maximum(batch["labels"], 0)
    assert output.head is not None  # a model that is trained has its head
    losses = head_loss(output.head, targets, jnp.ones(targets.shape), Terms(with_hits=True))
    cross_entropy, hits = losses.cross_entropy, losses.hits
    assert hits is not None  # asked for
    classes, span = batch["classes"], batch["span"]
    most = span.shape[1] // 2 + 1  # spans in a row: each but the last needs a place after it
    of_span = jax.nn.one_hot(span, most + 1)[:, :, 1:]  # [B, T, spans]
    missed = jnp.einsum("BT,BTS->BS", 1 - hits, of_span)
    there = of_span.any(1)
    return {
        "cross_entropy": jnp.einsum("BT,BTC->C", cross_entropy, classes),
        "hits": jnp.einsum("BT,BTC->C", hits, classes),
        "tokens": classes.sum((0, 1)),
        "spans": there.sum().astype(jnp.float32),
        "exact_spans": (there & (missed == 0)).sum().astype(jnp.float32),
    }


def compile_probe_step(run: Run) -> Callable[[Any, Batch], dict[str, jax.Array]]:
    """Returns `probe_step` jitted over the run's mesh."""
    return jax.jit(
        functools.partial(probe_step, run),
        in_shardings=(state_shardings(run).params, batch_sharding(run.mesh)),
        out_shardings=replicated(run.mesh),
    )


@dataclasses.dataclass(frozen=True)
class Probe:
    """Probes parameters on the first `batches` held-out batches, always the same."""

    run: Run
    prepared: Prepared
    step: Callable[[Any, Batch], dict[str, jax.Array]]
    batches: int

    @functools.cached_property
    def masked_counts(self) -> np.ndarray:
        """How often each piece occurs among the masked text of all processes' batches."""
        counts = np.zeros(self.prepared.vocabulary.num_pieces, np.int64)
        for own, _ in self.prepared.heldout_probes(self.batches):
            masked = self._with_classes(own)["classes"][:, :, -1] > 0
            counts += np.bincount(own["labels"][masked], minlength=len(counts))
        return counts

    @classmethod
    def of(cls, run: Run, prepared: Prepared) -> Self:
        """Takes a quarter of the evaluation's batches: differences between equal targets vary little."""
        return cls(run, prepared, compile_probe_step(run), -(-run.config.train.eval_batches // 4))

    @property
    def classes(self) -> list[str]:
        """The objectives of the mixture, and `masked`: text that has to be made up, where others can be copied."""
        return [*self.prepared.mixture.rates, "masked"]

    def __call__(self, params: Any) -> dict[str, float]:
        """Measures; all in nats a text token, sentinels and EOS left out.

        encoder_gain/NAME: cross-entropy with the inputs of another row of the same objective minus cross-entropy with the right
        ones, for every objective and over masked text alone. masked_...: of masked text, its cross-entropy, how far that lies
        below the text's own unigram entropy, the share of tokens and of whole spans that come out right given the right text
        before them, and the share that the most frequent piece would get. Nothing of a decoder alone, which has no encoder to leave
        unused.
        """
        if self.run.config.model.decoder_only:
            return {}
        rows = batch_rows(self.run.mesh, self.run.config.data.batch_size)
        totals: dict[str, dict[str, np.ndarray]] = {"own": {}, "other": {}}
        for own, other in self.prepared.heldout_probes(self.batches, rows):
            for name, batch in (("own", own), ("other", other)):
                ready = self._with_classes(batch)
                sums = plain(self.step(params, shard_batch(ready, self.run.mesh)))
                totals[name] = {key: totals[name].get(key, 0.0) + np.asarray(value) for key, value in sums.items()}
        own, other = totals["own"], totals["other"]
        if not own:
            return {}
        tokens = np.maximum(own["tokens"], 1.0)
        gains = dict(zip(self.classes, ((other["cross_entropy"] - own["cross_entropy"]) / tokens).tolist(), strict=True))
        masked = float(own["cross_entropy"][-1] / tokens[-1])
        return {
            **{f"encoder_gain/{name}": gain for name, gain in gains.items()},
            "masked_cross_entropy": masked,
            "masked_nats_below_unigram": unigram_entropy(self.masked_counts) - masked,
            "masked_accuracy": float(own["hits"][-1] / tokens[-1]),
            "masked_accuracy_of_most_frequent": most_frequent_share(self.masked_counts),
            "masked_spans_exact": float(own["exact_spans"] / max(own["spans"], 1.0)),
        }

    def _with_classes(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Adds the classes of targets and the numbers of masked spans."""
        vocabulary, labels = self.prepared.vocabulary, batch["labels"]
        text = text_token_mask(labels, vocabulary.num_pieces, vocabulary.eos_id)
        objective = batch["objective"][:, None]
        names = self.classes[:-1]
        number = list(OBJECTIVES).index
        masked = text & (batch["masked"] > 0) & (objective == number("infilling" if "infilling" in names else names[0]))
        classes = [text & (objective == number(name)) for name in names]
        begins = masked & ~np.pad(masked, ((0, 0), (1, 0)))[:, :-1]
        span = np.where(masked, np.cumsum(begins, axis=1), 0).astype(np.int32)
        rest = {name: array for name, array in batch.items() if name not in ("objective", "masked")}
        return {**rest, "classes": np.stack([*classes, masked], axis=-1).astype(np.float32), "span": span}


def describe(probed: dict[str, float]) -> str:
    """Returns what a probe found in lines; '' where nothing was probed."""
    gains = {name.removeprefix("encoder_gain/"): gain for name, gain in probed.items() if name.startswith("encoder_gain/")}
    if not gains:
        return ""
    named = {"masked": "in gaps alone"}
    listed = ", ".join(f"{named.get(name, name.replace('_', ' '))} {gain:.2f}" for name, gain in gains.items())
    return (
        f"  does it use its input? with another text's the loss rises by: {listed}\n"
        f"  in gaps alone {100 * probed['masked_accuracy']:.1f} % of tokens are right (always the most frequent one: "
        f"{100 * probed['masked_accuracy_of_most_frequent']:.1f} %), and {100 * probed['masked_spans_exact']:.1f} % of whole gaps"
    )
