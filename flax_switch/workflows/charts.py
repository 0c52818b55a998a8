"""The curves and maps of reports, of one run or of several."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from flax_switch.config.finetuning import LOSS, FinetuneConfig
from flax_switch.pages.page import SCALE, curves, heat
from flax_switch.training.evaluate import losses_of_sources
from flax_switch.training.findings import sparse_layer_names
from flax_switch.workflows.record import RunRecord

FEW = 8  # layers that a chart of curves tells apart


def series(lines: Sequence[dict[str, Any]], metric: str, name: str, scale: float = 1.0, **options: Any) -> dict[str, Any]:
    """Returns the curve of a metric over the lines that have it."""
    having = [line for line in lines if metric in line]
    return {"name": name, "x": [line["step"] for line in having], "y": [line[metric] * scale for line in having], **options}


def run_charts(record: RunRecord) -> str:
    """Returns the curves of one run."""
    train, evals = record.train, record.evals
    drawn = [
        _cross_entropy(record),
        _loss_of_sources(record),
        _loss_parts(record),
        curves("Scores of generated text", "%", [series(evals, name, name, points=True) for name in record.scores]),
        curves("Learning rate", "", [series(train, "learning_rate", "learning rate")], zero=True),
        curves("Gradient norm", "before clipping, logarithmic", [series(train, "grad_norm", "gradient norm")], log=True),
        curves("Throughput", "tokens per second", [series(train, "tokens_per_second", "tokens per second")], zero=True),
        curves("Waiting for data", "% of a step", [series(train, "data_wait_fraction", "data wait", 100)], zero=True),
    ]
    return f'<div class="charts">{"".join(drawn)}</div>'


def _cross_entropy(record: RunRecord) -> str:
    train, evals = record.train, record.evals
    lines = [series(train, LOSS, "training", color=5), series(evals, LOSS, "held-out", points=True, color=0)]
    top = {}
    if evals and "unigram_entropy" in evals[-1]:
        lines.append(series(evals, "text_cross_entropy", "held-out, text targets", points=True, color=1))
        entropy = evals[-1]["unigram_entropy"]
        ends = [train[0]["step"], train[-1]["step"]]
        lines.append(
            {"name": f"unigram entropy of the text, {entropy:.2f}", "x": ends, "y": [entropy] * 2, "dash": True, "color": 6}
        )
        top = {"top": max(entropy, *(line["text_cross_entropy"] for line in evals)) + 0.5}
    return curves("Cross-entropy", "nats per token", lines, wide=True, height=300, **top)


def _loss_of_sources(record: RunRecord) -> str:
    names = losses_of_sources(record.evals[-1]) if record.evals and record.config.kind != FinetuneConfig.kind else ()
    return curves(
        "Held-out cross-entropy by source", "nats per token", [series(record.evals, f"{n}/{LOSS}", n, points=True) for n in names]
    )


def _loss_parts(record: RunRecord) -> str:
    """Draws the parts that add up to the loss, each times its coefficient; one that is nothing throughout is left out."""
    model = record.config.model
    parts = (
        ("loss", "all", 1.0),
        (LOSS, "cross-entropy", 1.0),
        ("load_balancing_loss", "load balancing", model.load_balancing_loss_coef),
        ("router_z_loss", "routers' z-loss", model.router_z_loss_coef),
        ("z_loss", "z-loss", 1.0),
    )
    found = [series(record.train, metric, name, scale) for metric, name, scale in parts]
    return curves("Loss by part", "as it is added up, logarithmic", [one for one in found if any(one["y"])], log=True)


def routing(record: RunRecord) -> str:
    """Returns how loaded every expert was, layer by layer and step by step, and how sure the routers are; '' for a dense model."""
    layers = sparse_layer_names(record.config.model)
    lines = [line for line in record.train if "routers/tokens_per_expert" in line]
    if not layers or not lines:
        return ""
    steps, experts = [line["step"] for line in lines], record.config.model.num_experts
    loads = np.asarray([line["routers/tokens_per_expert"] for line in lines])  # [time, layer, expert]
    shares = loads / np.maximum(loads.sum(-1, keepdims=True), 1.0) * experts
    names = [str(expert) for expert in range(experts)]
    maps = [
        heat(name, "expert", names, steps, shares[:, i].T.tolist(), high=2, unit="times the even share", tall=12)
        for i, name in enumerate(layers)
    ]
    return (
        f"<h2>Tokens each expert processed</h2><p class=soft>By step and expert; 1 is an even share.</p>"
        f"{SCALE.format(low='none', high='twice its share, or more')}"
        f'<div class="maps">{"".join(maps)}</div>'
        f"<h2>How the routers decide</h2>{_routers(lines, layers, experts)}"
    )


def _routers(lines: list[dict[str, Any]], layers: list[str], experts: int) -> str:
    steps, even = [line["step"] for line in lines], math.log(experts) or 1.0
    entropy = list(zip(*(line["routers/router_entropy"] for line in lines), strict=True))
    entropies = heat("Router entropy by layer", "layer", layers, steps, entropy, high=even, unit="nats", tall=26)

    def by_layer(title: str, unit: str, metric: str, scale: float = 1.0) -> str:
        values = np.asarray([line[f"routers/{metric}"] for line in lines]) * scale
        shown = [{"name": layer, "x": steps, "y": values[:, i].tolist()} for i, layer in enumerate(layers)]
        if len(layers) > FEW:
            shown = [{"name": f"{word} layer", "x": steps, "y": how(values, 1).tolist()} for word, how in _ACROSS]
        return curves(title, unit, shown, zero=True)

    return (
        f"{SCALE.format(low='0: always sure', high=f'{even:.2f} nats: any expert')}"
        f'<div class="charts">{entropies}{by_layer("Router entropy", "nats", "router_entropy")}'
        f"{by_layer('Router confidence', 'probability of the first choice', 'router_confidence')}"
        f"{by_layer('Tokens left to no expert', '%', 'fraction_tokens_left_behind', 100)}</div>"
    )


_ACROSS = (("highest", np.max), ("median", np.median), ("lowest", np.min))


def comparison(records: dict[str, RunRecord]) -> str:
    """Returns the curves of several runs, each in one colour, over each other."""

    def overlaid(title: str, unit: str, metric: str, kind: str = "train", scale: float = 1.0, **options: Any) -> str:
        points = {"points": True} if kind == "evals" else {}
        lines = [
            series(getattr(record, kind), metric, name, scale, color=i, **points)
            for i, (name, record) in enumerate(records.items())
        ]
        return curves(title, unit, lines, **options)

    scores = dict.fromkeys(name for record in records.values() for name in record.scores)
    drawn = [
        overlaid("Held-out cross-entropy", "nats per token", LOSS, "evals", wide=True, height=300),
        overlaid("Training cross-entropy", "nats per token", LOSS, wide=True, height=300),
        *(overlaid(name, "%", name, "evals") for name in scores),
        overlaid("Learning rate", "", "learning_rate", zero=True),
        overlaid("Gradient norm", "before clipping, logarithmic", "grad_norm", log=True),
        overlaid("Throughput", "tokens per second", "tokens_per_second", zero=True),
        overlaid("Waiting for data", "% of a step", "data_wait_fraction", scale=100, zero=True),
    ]
    return f'<div class="charts">{"".join(drawn)}</div>'
