"""How a run ended, with a view of it for notebooks: its curves, its report inline, its model."""

import dataclasses
import functools
import html
import io
from typing import Any, Self

from etils import epath

from flax_switch.config.adapter import ADAPTER
from flax_switch.convert.canonical import architecture_of
from flax_switch.pages.plots import drawing
from flax_switch.parallel.placement import ONE_DEVICE
from flax_switch.pretrained import Pretrained
from flax_switch.training.live import STYLES, draw
from flax_switch.training.loop import RunResult
from flax_switch.training.metrics import read_metrics
from flax_switch.workflows.predictions import trained_adapter
from flax_switch.workflows.report import write_report

Lines = list[dict[str, Any]]  # of metrics.jsonl


@dataclasses.dataclass(frozen=True)
class Inline:
    """A page on disk that a notebook shows in a frame of its own."""

    path: epath.Path

    def _repr_html_(self) -> str:
        page = html.escape(self.path.read_text(encoding="utf-8"))
        return f'<iframe srcdoc="{page}" style="width: 100%; height: 720px; border: 0"></iframe>'


@dataclasses.dataclass(frozen=True, repr=False)
class Result(RunResult):
    """What `pretrain`, `finetune` and `distill` return. A notebook shows it as its curves."""

    workdir: epath.Path

    @classmethod
    def of(cls, result: RunResult, workdir: epath.PathLike) -> Self:
        """Returns a result with the place of its run."""
        return cls(**vars(result), workdir=epath.Path(workdir))

    @property
    def model(self) -> Pretrained:
        """The model as it is at the end, with its vocabulary: to call, to generate with, to save."""
        model = self.run.model.clone(devices=ONE_DEVICE)  # called as any other: nothing is sent through bounded buffers
        config = self.run.config.model
        params = {name: leaf for name, leaf in self.state.params.items() if name != ADAPTER}
        found = Pretrained(config, model, params, self.prepared.vocabulary, architecture_of(config))
        return found.with_adapter(trained_adapter(self.run, self.state.params)) if ADAPTER in self.state.params else found

    def plot(self) -> Any:
        """Returns matplotlib's figure of training and held-out cross-entropy by step. Needs the extra `plots`."""
        figure = curves_figure(*self._lines(), self.workdir.name)
        figure._repr_png_ = functools.partial(png, figure)  # without pyplot no notebook knows how to show a figure
        return figure

    def report(self) -> Inline:
        """Writes the run's report anew and returns it; a notebook shows it inline."""
        return Inline(write_report(self.workdir))

    def _lines(self) -> tuple[Lines, Lines]:
        lines = read_metrics(self.workdir)
        train, evals = ([line for line in lines if line["kind"] == kind] for kind in ("train", "eval"))
        return train, evals

    def __repr__(self) -> str:
        steps = self.run.config.train.steps
        return f"{self.workdir}: {'finished' if self.finished else 'stopped'} at step {self.step:,} of {steps:,}"

    def _repr_html_(self) -> str:
        return f"<div>{html.escape(repr(self))}</div>{draw(dict(zip(('train', 'eval'), map(_points, self._lines()), strict=True)))}"


def curves_figure(train: Lines, evals: Lines, name: str) -> Any:
    """Returns matplotlib's figure of the cross-entropy of a run's lines by step."""
    with drawing(8, 3.4) as figure:
        axis = figure.subplots()
        for lines, kind, style in ((train, "train", "-"), (evals, "eval", "o-")):
            color, label = STYLES[kind]
            if points := _points(lines):
                axis.plot(*zip(*points, strict=True), style, ms=3, lw=1.2, color=color, label=label)
        axis.set(xlabel="step", ylabel="nats per token", title=f"Cross-entropy of {name}")
        axis.legend()
    return figure


def png(figure: Any) -> bytes:
    """Returns matplotlib's figure as a picture."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _points(lines: Lines) -> list[tuple[int, float]]:
    return [(line["step"], line["cross_entropy"]) for line in lines if "cross_entropy" in line]
