"""What a run's workdir tells: its config, its curves, how and on what it ran; reports are drawn from it."""

import dataclasses
import datetime
from functools import cached_property
from typing import Any, NamedTuple, Self

import numpy as np
from etils import epath

from flax_switch.config import ConfigError
from flax_switch.config.finetuning import LOSS, FinetuneConfig
from flax_switch.config.kinds import RunConfig
from flax_switch.host.files import read_bytes
from flax_switch.host.json_text import parse_json
from flax_switch.training.checkpoint import flat_fields, read_config
from flax_switch.training.evaluate import losses_of_sources, perplexity
from flax_switch.training.metrics import METRICS_FILE, read_metrics
from flax_switch.training.sessions import read_sessions

SAMPLES_FILE = "samples.json"


class Result(NamedTuple):
    """A figure that a run ends with, how it is printed, and whether more is better."""

    name: str
    value: float
    form: str
    more: bool


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """All that a report says of a run, finished or not."""

    workdir: epath.Path
    config: RunConfig
    train: list[dict[str, Any]]  # the lines of metrics.jsonl, by step
    evals: list[dict[str, Any]]  # those with a held-out loss; fine-tuning may have nothing to evaluate on
    samples: list[dict[str, Any]]
    sessions: list[dict[str, Any]]

    @classmethod
    def read(cls, workdir: epath.PathLike) -> Self:
        """Reads a workdir. Raises `ConfigError` where there is no run, or no metrics of it yet."""
        workdir = epath.Path(workdir)
        config, lines = read_config(workdir), read_metrics(workdir)
        train = [line for line in lines if line.get("kind") == "train"]
        if not train:
            raise ConfigError(f"{workdir} has no metrics yet; the first come after train.log_every={config.train.log_every} steps.")
        path = workdir / SAMPLES_FILE
        samples = parse_json(read_bytes(path), str(path)) if path.exists() else []
        evals = [line for line in lines if line.get("kind") == "eval" and LOSS in line]
        return cls(workdir, config, train, evals, samples, read_sessions(workdir))

    @cached_property
    def scores(self) -> list[str]:
        """The scores of generated text that a fine-tuning run measured; of pre-training none."""
        if not isinstance(self.config, FinetuneConfig) or not self.evals:
            return []
        return [name for name in self.config.scores if name in self.evals[-1]]

    @cached_property
    def started(self) -> str | None:
        """When the run started, as '2026-01-31 12:00 UTC'; a run of an earlier version does not say."""
        return _clock(self.sessions[0]["time"]) if self.sessions else None

    @cached_property
    def seconds(self) -> float:
        """How long the run has trained, evaluations and compilation included; where no session says so, its steps alone."""
        total, began = 0.0, None
        for line in self.sessions:
            at = datetime.datetime.fromisoformat(line["time"])
            if line["event"] == "end" and began is not None:
                total += (at - began).total_seconds()
            began = at if line["event"] == "start" else None
        if began is not None:  # goes on, or was killed: until the last figures
            stamp = epath.Path(self.workdir / METRICS_FILE).stat().mtime
            total += max(0.0, stamp - began.timestamp())
        return total or float(sum(m["seconds_per_step"] for m in self.train) * self.train[-1]["step"] / len(self.train))

    def median(self, name: str) -> float:
        """Returns the median of a metric over the training lines."""
        return float(np.median([line[name] for line in self.train]))

    def results(self) -> list[Result]:
        """Returns the figures of the last evaluation, and of speed."""
        found, last = [], self.evals[-1] if self.evals else {}
        if LOSS in last:
            found += [Result("held-out cross-entropy, nats/token", last[LOSS], ".3f", False)]
            found += [Result("held-out perplexity", perplexity(last[LOSS]), ".2f", False)]
        if isinstance(self.config, FinetuneConfig):
            found += [Result(f"{name}, at the end", last[name], ".2f", True) for name in self.scores]
            found += [self._best(self.config.best)] if self.evals else []
        else:
            found += [
                Result(title, last[name] * scale, form, more) for name, title, scale, form, more in _PRETRAINING if name in last
            ]
            found += [
                Result(f"held-out cross-entropy, {name}, nats/token", loss, ".3f", False)
                for name, loss in losses_of_sources(last).items()
            ]
        gains = [
            (name.partition("/")[2].replace("_", " "), gain) for name, gain in last.items() if name.startswith("encoder_gain/")
        ]
        found += [Result(f"what the encoder is worth, {name}, nats/token", gain, ".3f", True) for name, gain in gains]
        found += [Result("training cross-entropy, nats/token", self.train[-1][LOSS], ".3f", False)]
        return [*found, Result("tokens per second, median", self.median("tokens_per_second"), ",.0f", True)]

    def _best(self, chosen: str) -> Result:
        down = chosen == LOSS
        best = (min if down else max)(line[chosen] for line in self.evals)
        return Result(f"best {chosen}", best, ".3f" if down else ".2f", not down)

    def differing(self) -> dict[str, tuple[Any, Any]]:
        """Returns the fields that differ from the library's defaults: 'section.field' -> (value, default)."""
        base = flat_fields(type(self.config)())
        return {name: (value, base[name]) for name, value in flat_fields(self.config).items() if base[name] != value}


# What pre-training's evaluation may hold: metric, its name for people, its scale, its form, whether more is better.
_PRETRAINING = (
    ("text_cross_entropy", "held-out cross-entropy, text targets, nats/token", 1, ".3f", False),
    ("unigram_entropy", "unigram entropy of the same text, nats/token", 1, ".3f", False),
    ("nats_below_unigram", "below the unigram entropy, nats/token", 1, ".3f", True),
    ("accuracy", "held-out accuracy, %", 100, ".1f", True),
    ("masked_nats_below_unigram", "masked text below its unigram entropy, nats/token", 1, ".3f", True),
    ("masked_accuracy", "masked tokens right, %", 100, ".1f", True),
    ("masked_accuracy_of_most_frequent", "masked tokens right, by the most frequent, %", 100, ".1f", True),
    ("masked_spans_exact", "masked spans right as a whole, %", 100, ".1f", True),
)


def _clock(time: str) -> str:
    return datetime.datetime.fromisoformat(time).astimezone(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
