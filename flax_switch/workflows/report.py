"""A run as one HTML page: curves, expert load by layer and time, throughput, samples and config."""

import base64
import html
import importlib.util
import json
from typing import Any

import numpy as np
from etils import epath

from flax_switch.config import ConfigError, one_line
from flax_switch.config.finetuning import LOSS, FinetuneConfig
from flax_switch.config.kinds import RunConfig
from flax_switch.host.files import check_writable, read_bytes, write_bytes, write_text
from flax_switch.host.json_text import parse_json
from flax_switch.training.checkpoint import read_config
from flax_switch.training.evaluate import perplexity
from flax_switch.training.findings import findings, sparse_layer_names
from flax_switch.training.metrics import METRICS_FILE, read_metrics

SAMPLES_FILE = "samples.json"

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1, h2 { font-weight: 600; } img { max-width: 100%; } table { border-collapse: collapse; }
td, th { padding: .15rem .8rem .15rem 0; text-align: left; vertical-align: top; } td.number { text-align: right; }
mark { background: #ffe9a8; padding: 0 .15em; } del { background: #f4d4d4; padding: 0 .15em; text-decoration: none; }
ul.findings { background: #fdf3e1; padding: .6rem 1rem .6rem 2rem; }
.sample { border-left: 3px solid #ddd; padding-left: .8rem; margin: .8rem 0; }
pre { background: #f6f6f6; padding: .8rem; overflow: auto; }
"""


def write_report(workdir: epath.PathLike, output: epath.PathLike | None = None) -> epath.Path:
    """Writes the report of a run, finished or not, and returns its path. Needs the extra `plots`.

    Raises `ConfigError` where it cannot be written, the run has no metrics yet, or they are damaged.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("The report's plots need matplotlib: pip install 'flax_switch[plots]'.")
    workdir = epath.Path(workdir)
    path = workdir / "report.html" if output is None else epath.Path(output)
    config = read_config(workdir)
    check_writable(path)
    lines = read_metrics(workdir)
    train = [line for line in lines if line.get("kind") == "train"]
    evals = [line for line in lines if line.get("kind") == "eval" and LOSS in line]  # fine-tuning may have nothing to evaluate on
    if not train:
        raise ConfigError(f"{workdir} has no metrics yet; the first come after train.log_every={config.train.log_every} steps.")
    samples_path = workdir / SAMPLES_FILE
    samples = parse_json(read_bytes(samples_path), str(samples_path)) if samples_path.exists() else []
    try:
        plots = draw_plots(config, train, evals)
        page = _page(workdir, config, train, evals, plots, samples)
    except (LookupError, TypeError, ValueError, AttributeError) as error:  # what a line lacks, or has of another kind
        what = f"{type(error).__name__}: {one_line(error)}"
        raise ConfigError(f"{workdir}: {METRICS_FILE} or {SAMPLES_FILE} is damaged ({what}); mend or remove it.") from error
    for name, png in plots.items():
        write_bytes(workdir / "plots" / f"{name}.png", png)
    write_text(path, page)
    return path


def draw_plots(config: RunConfig, train: list[dict[str, Any]], evals: list[dict[str, Any]]) -> dict[str, bytes]:
    """Returns PNG images by name."""
    import matplotlib

    matplotlib.use("Agg")
    plots = {"loss": _draw_loss(train, evals)}
    scores = scores_of(config, evals)
    if scores:
        plots["scores"] = _draw_scores(evals, scores)
    plots["throughput"] = _draw_throughput(train)
    layers = sparse_layer_names(config.model)
    if layers:
        plots["expert_load"] = _draw_expert_load(train, layers)
        plots["routing"] = _draw_routing(train, layers)
    return plots


def scores_of(config: RunConfig, evals: list[dict[str, Any]]) -> list[str]:
    """Returns the scores of generated text that a fine-tuning run measured; of pre-training none."""
    return [name for name in config.scores if name in evals[-1]] if isinstance(config, FinetuneConfig) and evals else []


def _draw_scores(evals: list[dict[str, Any]], scores: list[str]) -> bytes:
    figure, ((axis,),) = _axes()
    for name in scores:
        axis.plot([m["step"] for m in evals], [m[name] for m in evals], "o-", ms=3, label=name)
    axis.set(xlabel="step", ylabel="per cent", title="Scores of generated text")
    axis.legend(frameon=False)
    return _png(figure)


def _png(figure: Any) -> bytes:
    import io

    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    plt.close(figure)
    return buffer.getvalue()


def _axes(rows: int = 1, columns: int = 1, size: tuple[float, float] = (9, 3.6), **options: Any) -> tuple[Any, Any]:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **options)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, axes


def _draw_loss(train: list[dict[str, Any]], evals: list[dict[str, Any]]) -> bytes:
    figure, ((axis,),) = _axes()
    axis.plot([m["step"] for m in train], [m["cross_entropy"] for m in train], lw=1, color="#9bb7d4", label="training, all targets")
    if evals:
        steps = [m["step"] for m in evals]
        axis.plot(steps, [m["cross_entropy"] for m in evals], "o-", ms=3, color="#1f5a96", label="held-out, all targets")
        if "unigram_entropy" in evals[-1]:
            axis.plot(steps, [m["text_cross_entropy"] for m in evals], "o-", ms=3, color="#c0392b", label="held-out, text targets")
            unigram = evals[-1]["unigram_entropy"]
            axis.axhline(unigram, ls="--", lw=1, color="#c0392b", label=f"text unigram entropy {unigram:.2f}")
            top = max(unigram, *(m["text_cross_entropy"] for m in evals)) + 0.5
            axis.set_ylim(top=min(top, axis.get_ylim()[1]))
    axis.set(xlabel="step", ylabel="nats per token", title="Cross-entropy")
    axis.legend(frameon=False)
    return _png(figure)


def _draw_throughput(train: list[dict[str, Any]]) -> bytes:
    figure, ((left, right),) = _axes(1, 2)
    steps = [m["step"] for m in train]
    left.plot(steps, [m["tokens_per_second"] for m in train], lw=1, color="#1f5a96")
    left.set(xlabel="step", ylabel="tokens per second", title="Throughput", ylim=(0, None))
    right.plot(steps, [100 * m["data_wait_fraction"] for m in train], lw=1, color="#1f5a96")
    right.set(xlabel="step", ylabel="% of the step", title="Time lost waiting for data", ylim=(0, None))
    return _png(figure)


def _draw_expert_load(train: list[dict[str, Any]], layers: list[str]) -> bytes:
    loads = np.asarray([m["routers/tokens_per_expert"] for m in train])  # [time, layer, expert]
    shares = loads / np.maximum(loads.sum(-1, keepdims=True), 1.0) * loads.shape[-1]
    columns = min(len(layers), 4)
    rows = -(-len(layers) // columns)
    figure, axes = _axes(rows, columns, (max(3.0 * columns, 6), 2.4 * rows), sharex=True)
    steps = [m["step"] for m in train]
    for i, axis in enumerate(axes.flat):
        axis.grid(False)
        if i >= len(layers):
            axis.set_visible(False)
            continue
        image = axis.imshow(
            shares[:, i].T,
            aspect="auto",
            origin="lower",
            interpolation="nearest",
            cmap="RdBu_r",
            vmin=0,
            vmax=2,
            extent=(steps[0], steps[-1] if len(steps) > 1 else steps[0] + 1, -0.5, shares.shape[-1] - 0.5),
        )
        axis.set_title(layers[i], fontsize=10)
        axis.set_xlabel("step" if i // columns == rows - 1 else "")
        axis.set_ylabel("expert" if i % columns == 0 else "")
    bar = figure.colorbar(image, ax=axes, shrink=0.9)
    bar.set_label("load, 1 = even share")
    figure.suptitle("Tokens each expert processed")
    return _png(figure)


def _draw_routing(train: list[dict[str, Any]], layers: list[str]) -> bytes:
    figure, axes = _axes(1, 3, (9, 2.8))
    steps = [m["step"] for m in train]
    panels = (
        ("fraction_tokens_left_behind", "Tokens left behind", "fraction"),
        ("router_confidence", "Router confidence", "probability"),
        ("router_entropy", "Router entropy", "nats"),
    )
    for axis, (name, title, unit) in zip(axes.flat, panels, strict=True):
        values = np.asarray([m[f"routers/{name}"] for m in train])
        for i, layer in enumerate(layers):
            axis.plot(steps, values[:, i], lw=1, label=layer if len(layers) <= 8 else None)
        axis.set(xlabel="step", ylabel=unit, title=title, ylim=(0, None))
    if len(layers) <= 8:
        axes.flat[0].legend(frameon=False, fontsize=8)
    return _png(figure)


def _page(
    workdir: epath.Path,
    config: RunConfig,
    train: list[dict[str, Any]],
    evals: list[dict[str, Any]],
    plots: dict[str, bytes],
    samples: list[dict[str, Any]],
) -> str:
    rows = [("steps", f"{train[-1]['step']:,} of {config.train.steps:,}")]
    if evals:
        rows += _evaluation_rows(config, evals)
    rows += [
        ("tokens per second, median", f"{np.median([m['tokens_per_second'] for m in train]):,.0f}"),
        ("data wait, median", f"{100 * np.median([m['data_wait_fraction'] for m in train]):.2f} % of the step"),
    ]
    images = "".join(
        f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode(png).decode()}">' for name, png in plots.items()
    )
    table = "".join(f"<tr><td>{html.escape(k)}</td><td class=number>{html.escape(v)}</td></tr>" for k, v in rows)
    shown = "".join(_sample(sample) for sample in samples)
    if shown:
        title = "Predictions" if isinstance(config, FinetuneConfig) else "Masked spans filled in"
        shown = f"<h2>{title}</h2><p><mark>the model's</mark> in place of <del>the text's</del></p>{shown}"
    name = html.escape(workdir.name)
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{name}</title><style>{_STYLE}</style>"
        f"<h1>{name}</h1><table>{table}</table>{_findings(config, evals)}<h2>Curves</h2>{images}{shown}"
        f"<h2>Config</h2><pre>{html.escape(json.dumps(config.to_dict(), indent=2))}</pre></html>"
    )


def _findings(config: RunConfig, evals: list[dict[str, Any]]) -> str:
    said = findings(config.model, evals[-1]) if evals else []
    return f"<ul class=findings>{''.join(f'<li>{html.escape(s)}</li>' for s in said)}</ul>" if said else ""


def _evaluation_rows(config: RunConfig, evals: list[dict[str, Any]]) -> list[tuple[str, str]]:
    last = evals[-1]
    rows = [
        ("held-out cross-entropy, all targets", f"{last['cross_entropy']:.3f} nats/token"),
        ("held-out perplexity, all targets", f"{perplexity(last['cross_entropy']):.2f}"),
    ]
    if isinstance(config, FinetuneConfig):
        best = (min if config.best == LOSS else max)(evals, key=lambda line: line[config.best])
        rows += [(f"{name}, at the end", f"{last[name]:.2f}") for name in scores_of(config, evals)]
        return [*rows, (f"best {config.best}", f"{best[config.best]:.2f} at step {best['step']:,}")]
    return [
        *rows,
        ("held-out cross-entropy, text targets", f"{last['text_cross_entropy']:.3f} nats/token"),
        ("held-out perplexity, text targets", f"{perplexity(last['text_cross_entropy']):.2f}"),
        ("unigram entropy of the same text", f"{last['unigram_entropy']:.3f} nats/token"),
        ("below the unigram entropy", f"{last['nats_below_unigram']:.3f} nats/token"),
        ("held-out accuracy", f"{100 * last['accuracy']:.1f} %"),
        *_probe_rows(last),
    ]


def _probe_rows(last: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns what the encoder is worth and how much masked text comes out right; nothing for runs that did not measure it."""
    gains = [(name.partition("/")[2], gain) for name, gain in last.items() if name.startswith("encoder_gain/")]
    if not gains:
        return []
    return [
        *((f"what the encoder is worth, {name.replace('_', ' ')}", f"{gain:.3f} nats/token") for name, gain in gains),
        ("masked text below its unigram entropy", f"{last['masked_nats_below_unigram']:.3f} nats/token"),
        ("masked tokens right", f"{100 * last['masked_accuracy']:.1f} %"),
        ("masked tokens right, by the most frequent", f"{100 * last['masked_accuracy_of_most_frequent']:.1f} %"),
        ("masked spans right as a whole", f"{100 * last['masked_spans_exact']:.1f} %"),
    ]


def _sample(sample: dict[str, Any]) -> str:
    parts = []
    for piece in sample["pieces"]:
        if isinstance(piece, str):
            parts.append(html.escape(piece))
        else:
            parts.append(f"<mark>{html.escape(piece['model'])}</mark><del>{html.escape(piece['text'])}</del>")
    return f"<p class=sample>{' '.join(parts)}</p>"
