"""A run as one HTML page that needs no network, and several runs compared on one."""

import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from flax_switch.config import ConfigError, check, one_line
from flax_switch.config.finetuning import FinetuneConfig
from flax_switch.config.sizes import count_parameters, shorten
from flax_switch.convert.adapter import shapes as adapter_shapes
from flax_switch.host.files import check_writable, write_text
from flax_switch.pages.page import cards, definitions, page, table, text
from flax_switch.training.checkpoint import CONFIG_FILE, flat_fields, read_config
from flax_switch.training.findings import findings, run_findings
from flax_switch.training.metrics import METRICS_FILE
from flax_switch.training.progress import duration
from flax_switch.training.sessions import SESSIONS_FILE
from flax_switch.workflows.charts import comparison, routing, run_charts
from flax_switch.workflows.record import SAMPLES_FILE, Result, RunRecord

__all__ = ["SAMPLES_FILE", "compare_runs", "write_report"]

_KINDS = {"pretraining": "Pre-training", "finetuning": "Fine-tuning", "distillation": "Distillation"}


def write_report(workdir: epath.PathLike, output: epath.PathLike | None = None) -> epath.Path:
    """Writes the report of a run, finished or not, and returns its path.

    Raises `ConfigError` where it cannot be written, the run has no metrics yet, or they are damaged.
    """
    read_config(workdir)
    path = epath.Path(workdir) / "report.html" if output is None else epath.Path(output)
    check_writable(path, reads=_sources(workdir))
    record = RunRecord.read(workdir)
    with _undamaged(workdir):
        body = _report(record)
    write_text(path, page(f"{record.workdir.name} · flax_switch", body))
    return path


def _sources(workdir: epath.PathLike) -> list[epath.Path]:
    """Returns what a report is made from."""
    return [epath.Path(workdir) / name for name in (CONFIG_FILE, METRICS_FILE, SAMPLES_FILE, SESSIONS_FILE)]


def compare_runs(workdirs: Sequence[epath.PathLike], output: epath.PathLike) -> epath.Path:
    """Writes one page on several runs: their curves over each other, and what differs in their configs and results."""
    records = dict(zip(_names(workdirs), map(RunRecord.read, workdirs), strict=True))
    path = epath.Path(output)
    check_writable(path, reads=[file for workdir in workdirs for file in _sources(workdir)])
    with _undamaged(", ".join(records)):
        body = _comparison(records)
    write_text(path, page(f"{' · '.join(records)} · flax_switch", body))
    return path


@contextlib.contextmanager
def _undamaged(runs: object) -> Iterator[None]:
    """Turns what a damaged line of a run's files raises into `ConfigError`."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:  # what a line lacks, or has of another kind
        what = f"{type(error).__name__}: {one_line(error)}"
        raise ConfigError(
            f"{runs}: {METRICS_FILE}, {SAMPLES_FILE} or {SESSIONS_FILE} is damaged ({what}); mend or remove it."
        ) from error


def _names(workdirs: Sequence[epath.PathLike]) -> list[str]:
    """Returns a short name for each run: its folder's, or the whole path where two would have the same."""
    paths = [str(epath.Path(workdir)).rstrip("/") for workdir in workdirs]
    check(len(set(paths)) == len(paths), f"A run is compared with others, not with itself; these are {', '.join(paths)}.")
    short = [path.rpartition("/")[2] for path in paths]
    return [path if short.count(name) > 1 else name for name, path in zip(short, paths, strict=True)]


def _report(record: RunRecord) -> str:
    config = record.config
    step, steps = record.train[-1]["step"], config.train.steps
    done = "finished" if step >= steps else f"{100 * step / steps:.0f} % done"
    said = [*(findings(config.model, record.evals[-1]) if record.evals else []), *run_findings(record.train)]
    warnings = f'<div class="warnings"><h3>Worth knowing</h3><ul>{"".join(f"<li>{text(one)}</li>" for one in said)}</ul></div>'
    size = count_parameters(config.model)
    figures = [(f"of {steps:,} steps, {done}", f"{step:,}"), ("of training", duration(record.seconds))]
    figures += [(one.name, f"{one.value:{one.form}}") for one in record.results()[:1]]
    figures += [(f"parameters, {shorten(size.active)} active per token", shorten(size.total))]
    figures += [("tokens per second, median", f"{record.median('tokens_per_second'):,.0f}")]
    return (
        f'<p class="kind">{_KINDS[config.kind]}</p><h1>{text(record.workdir.name)}</h1>'
        f"<p class=soft>{text(_model(record))}</p>{cards(figures)}{warnings if said else ''}"
        f'<h2>The run</h2><div class="card">{definitions(_facts(record))}</div>'
        f"<h2>Curves</h2>{run_charts(record)}{routing(record)}{_samples(record)}"
        f'<h2>Results</h2><div class="card">{_results({"": record})}</div>'
        f'<h2>Settings</h2><div class="card">{_settings(record)}</div>'
    )


def _model(record: RunRecord) -> str:
    model = record.config.model
    sparse = sum(stack.num_sparse for stack in model.stacks)
    experts = f", {sparse} of them with {model.num_experts} experts each" if sparse else ", dense"
    layers = " and ".join(f"{stack.num_layers} {stack.name}" for stack in model.stacks)
    return f"{layers} layers{experts}; width {model.d_model}, MLP {model.d_ff}."


def _facts(record: RunRecord) -> list[tuple[str, str]]:
    """Returns when, how long, on what, with which command, versions and data; of a run of an earlier version what is known."""
    config, starts = record.config, [line for line in record.sessions if line["event"] == "start"]
    facts = [("When", text(record.started or "not noted")), ("How long", _how_long(record, len(starts)))]
    if starts:
        last = starts[-1]
        where = f"{last['devices']} × {last['device']}" + (f" in {last['processes']} processes" if last["processes"] > 1 else "")
        versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items())
        facts += [("Devices", text(where)), ("Host", text(last["host"])), ("Command", f"<pre>{text(last['command'])}</pre>")]
        facts += [("Versions", text(f"Python {last['python']}, {versions}")), ("Data", "<br>".join(map(_data, last["data"])))]
    else:
        facts += [("Data", _data({"source": getattr(config.data, "source", "") or getattr(config.data, "train", "")}))]
    if isinstance(config, FinetuneConfig) and config.adapter.rank:
        facts += [("Adapter", text(_adapter(config)))]
    origin = getattr(config, "init", "") or getattr(config, "teacher", "")
    return [
        *facts,
        ("Teacher" if config.kind == "distillation" else "Started from", text(origin)),
        ("Folder", f"<code>{text(record.workdir)}</code>"),
    ]


def _adapter(config: FinetuneConfig) -> str:
    """Returns in a line what is trained in place of the model."""
    adapter, size = config.adapter, sum(map(math.prod, adapter_shapes(config.model, config.adapter).values()))
    targets = adapter.targets if isinstance(adapter.targets, str) else ", ".join(adapter.targets)
    kind = "DoRA" if adapter.use_dora else "LoRA"
    return f"{kind} of rank {adapter.rank}, alpha {adapter.alpha:g}, on {targets}: {size:,} parameters are trained"


def _how_long(record: RunRecord, starts: int) -> str:
    wait = f"{100 * record.median('data_wait_fraction'):.1f} % of a step waiting for data"
    again = f", in {starts} parts" if starts > 1 else ""
    return text(f"{duration(record.seconds)}{again}; {record.median('seconds_per_step'):.3g} s a step, {wait}")


def _data(about: dict[str, Any]) -> str:
    """Returns a corpus or a task in a line."""
    source = about.get("source", about.get("task", ""))
    name = ", ".join(map(str, source)) if isinstance(source, list) else str(source)
    name = "the embedded corpus" if name == "default" else name
    name = f"{about['name']} ({100 * about['rate']:.1f} % of the rows), {name}" if "name" in about else name
    parts = []
    for kind, word in (("train", "for training"), ("validation", "for validation"), ("heldout", "held out")):
        numbers = about.get(kind) or {}
        counted = [f"{value:,} {unit}" for unit, value in numbers.items() if isinstance(value, int)]
        parts += [f"{' with '.join(counted)} {word}"] if counted else []
    return text(f"{name}: {'; '.join(parts)}" if parts else name)


def _results(records: dict[str, RunRecord], facts: Sequence[Sequence[str]] = ()) -> str:
    """Returns what came out, below `facts`; of several runs side by side, with the best of each row marked."""
    found = {name: {one.name: one for one in record.results()} for name, record in records.items()}
    rows = [*facts]
    for title in dict.fromkeys(title for results in found.values() for title in results):
        here = {name: results[title] for name, results in found.items() if title in results}
        values = {one.value for one in here.values()}
        best = (max if next(iter(here.values())).more else min)(values) if len(values) > 1 else None
        rows.append([f"<td>{text(title)}</td>", *(_number(here.get(name), best, name) for name in records)])
    return table(["", *records], rows, "stack numbers" if len(records) > 1 else "numbers")


def _number(result: Result | None, best: float | None, name: str) -> str:
    if result is None:
        return f'<td class="number" data-name="{text(name)}">–</td>'
    mark = " best" if result.value == best else ""
    return f'<td class="number{mark}" data-name="{text(name)}">{result.value:{result.form}}</td>'


def _settings(record: RunRecord) -> str:
    """Returns what differs from the defaults, and folded below it all of the config."""
    rows = [
        [f"<code>{text(n)}</code>", f"<code>{text(v)}</code>", f"<code>{text(d)}</code>"]
        for n, (v, d) in record.differing().items()
        if n != "kind"
    ]
    every = "".join(
        f"<h3>{text(section)}</h3>{definitions((name, f'<code>{text(value)}</code>') for name, value in fields.items())}"
        for section, fields in record.config.to_dict().items()
        if isinstance(fields, dict)
    )
    return (
        f"<details{' open' if len(rows) <= 8 else ''}><summary>{len(rows)} settings differ from the defaults</summary>"
        f"{table(['setting', 'here', 'default'], rows, 'stack')}</details><details><summary>All settings</summary>{every}</details>"
    )


def _samples(record: RunRecord) -> str:
    """Returns what the model wrote, in a table: predictions beside references, or the text of masked spans."""
    if not record.samples:
        return ""
    if isinstance(record.config, FinetuneConfig):
        rows = [
            [text(pieces[0]), f"<mark>{text(pieces[1]['model'])}</mark>", f"<del>{text(pieces[1]['text'])}</del>"]
            for pieces in (s["pieces"] for s in record.samples)
        ]
        return f'<h2>Predictions</h2><div class="card">{table(["input", "the model", "should be"], rows, "stack")}</div>'
    rows = [_spans(sample["pieces"]) for sample in record.samples]
    title, shown = ("Text continued", "text") if record.config.model.decoder_only else ("Masked text filled in", "masked text")
    return f'<h2>{title}</h2><div class="card">{table([shown, "the model", "the text"], rows, "stack")}</div>'


def _spans(pieces: list[Any]) -> list[str]:
    """Returns a sample's row: its text with numbered gaps, then what the model and the text have in each."""
    shown, model, true, gap = "", [], [], 0
    several = sum(not isinstance(piece, str) for piece in pieces) > 1
    for piece in pieces:
        if isinstance(piece, str):
            shown += re.sub(r"&lt;extra_id_(\d+)&gt;", lambda match: _gap(int(match.group(1)) + 1), text(piece)) + " "
            continue
        gap += 1
        number = f"{_gap(gap)} " if several else ""
        shown += number
        model.append(f"{number}<mark>{text(piece['model'])}</mark>")
        true.append(f"{number}<del>{text(piece['text'])}</del>")
    return [shown, "<br>".join(model), "<br>".join(true)]


def _gap(number: int) -> str:
    return f'<span class="gap">{number}</span>'


def _comparison(records: dict[str, RunRecord]) -> str:
    configs = {name: {"kind": record.config.kind, **flat_fields(record.config)} for name, record in records.items()}
    fields = dict.fromkeys(field for config in configs.values() for field in config)
    differing = [field for field in fields if len({repr(config.get(field, "–")) for config in configs.values()}) > 1]
    rows = [
        [f"<code>{text(field)}</code>", *(f"<code>{text(config.get(field, '–'))}</code>" for config in configs.values())]
        for field in differing
    ]
    facts = [
        [text(title), *(text(say(record)) for record in records.values())]
        for title, say in (
            ("steps", lambda record: f"{record.train[-1]['step']:,} of {record.config.train.steps:,}"),
            ("parameters", lambda record: shorten(count_parameters(record.config.model).total)),
            ("active per token", lambda record: shorten(count_parameters(record.config.model).active)),
            ("how long", lambda record: duration(record.seconds)),
            ("when", lambda record: record.started or "not noted"),
        )
    ]
    said = [
        f"{name}: {one}"
        for name, record in records.items()
        if record.evals
        for one in findings(record.config.model, record.evals[-1])
    ]
    warnings = f'<div class="warnings"><h3>Worth knowing</h3><ul>{"".join(f"<li>{text(one)}</li>" for one in said)}</ul></div>'
    config = table(["setting", *records], rows, "stack") if rows else "<p>The configs are the same.</p>"
    return (
        f'<p class="kind">Comparison of {len(records)} runs</p><h1>{text(" · ".join(records))}</h1>{warnings if said else ""}'
        f'<h2>Results</h2><div class="card">{_results(records, facts)}</div>'
        f'<h2>Curves</h2>{comparison(records)}<h2>What differs in the configs</h2><div class="card">{config}</div>'
    )
