"""A run in a notebook: a curve that grows, then the result as curves, as a report inline, as a model."""

import html
import re
import sys
import types
import xml.etree.ElementTree as ElementTree

import matplotlib.figure
import numpy as np
import pytest

import flax_switch as fs
from flax_switch.config import DataConfig, ExperimentConfig, OptimizerConfig, SwitchConfig, TrainConfig
from flax_switch.training.live import LiveCurve, draw, notebook_display
from flax_switch.training.metrics import read_metrics

STEPS = 4


class Handle:
    def __init__(self):
        self.shown = []

    def update(self, curve):
        self.shown.append(curve._repr_html_())


class Notebook:
    """What of IPython a run uses: a shell with a kernel, and `display`."""

    def __init__(self):
        self.handles = []

    def display(self, curve, display_id):
        assert display_id is True
        self.handles.append(Handle())
        self.handles[-1].update(curve)
        return self.handles[-1]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """(result, notebook, workdir) of a run of a few steps, with the curve that a notebook saw."""
    folder, notebook = tmp_path_factory.mktemp("run"), Notebook()
    rng = np.random.default_rng(0)
    words = [f"{a}{b}" for a in "bklmn" for b in "aeiou"]
    (folder / "text.txt").write_text("\n".join(" ".join(rng.choice(words, 12)) + "." for _ in range(120)))
    config = ExperimentConfig(
        model=SwitchConfig(
            vocab_size=128, d_model=16, num_heads=2, d_kv=8, d_ff=16, num_encoder_layers=1, num_decoder_layers=1,
            num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=2, dropout_rate=0.0, init_scale=1.0,
        ),
        data=DataConfig(
            source=str(folder / "text.txt"), vocabulary_size=32, num_sentinels=16, inputs_length=24, targets_length=12,
            batch_size=8, heldout_fraction=0.15, cache_dir=str(folder / "cache"),
        ),
        optimizer=OptimizerConfig(name="adamw", schedule="constant", learning_rate=3e-3, warmup_steps=0),
        train=TrainConfig(steps=STEPS, log_every=1, eval_every=2, eval_batches=2, checkpoint_every=STEPS, sample_spans=0),
    )  # fmt: skip
    shell = types.SimpleNamespace(kernel=object())
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
        patch.setitem(sys.modules, "IPython.display", types.SimpleNamespace(display=notebook.display))
        result = fs.pretrain(config, folder / "workdir")
    return result, notebook, folder / "workdir"


def test_the_curve_grows_in_one_place_with_every_line(ran):
    _, notebook, workdir = ran
    (handle,) = notebook.handles
    lines = [line for line in read_metrics(workdir) if "cross_entropy" in line]
    assert len(handle.shown) == len(lines) == STEPS + STEPS // 2
    assert len(set(handle.shown)) == len(lines)
    assert f"training {lines[-2]['cross_entropy']:.3f}" in handle.shown[-1]
    assert f"held-out {lines[-1]['cross_entropy']:.3f}" in handle.shown[-1]
    assert ElementTree.fromstring(handle.shown[-1]).tag.endswith("svg")


def test_outside_of_a_notebook_there_is_no_curve(monkeypatch):
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert notebook_display() is None
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: object()))  # a terminal's shell
    assert notebook_display() is None


def test_a_curve_skips_what_has_no_number_and_stays_in_its_frame():
    notebook = Notebook()
    curve = LiveCurve(notebook.display)
    for step, value in enumerate([float("nan"), 2.0, 9.0, 4.0]):
        curve.add(step, "train", {"cross_entropy": value})
    curve.add(3, "eval", {"bleu": 1.0})
    curve.add(3, "final", {"cross_entropy": 1.0})
    assert curve.points == {"train": [(1, 2.0), (2, 9.0), (3, 4.0)], "eval": []}
    svg = ElementTree.fromstring(curve._repr_html_())
    (line,) = svg.iter("{http://www.w3.org/2000/svg}polyline")
    places = [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]
    assert all(0 <= x <= 640 and 0 <= y <= 220 for x, y in places)
    assert places[1][1] < places[2][1] < places[0][1]  # 9 is highest, 2 lowest
    assert draw({"train": [], "eval": []}) == "" and "step 0" in draw({"train": [(0, 1.0)]})


def test_the_plot_is_a_figure_of_the_metrics_that_a_notebook_can_show(ran):
    result, _, workdir = ran
    figure = result.plot()
    assert isinstance(figure, matplotlib.figure.Figure)
    training, heldout = figure.axes[0].lines
    lines = read_metrics(workdir)
    assert training.get_xydata().tolist() == [[m["step"], m["cross_entropy"]] for m in lines if m["kind"] == "train"]
    assert heldout.get_xydata().tolist() == [[m["step"], m["cross_entropy"]] for m in lines if m["kind"] == "eval"]
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_the_report_is_shown_in_a_frame_and_lies_on_disk(ran):
    result, _, workdir = ran
    report = result.report()
    assert report.path == workdir / "report.html" and report.path.exists()
    page = re.fullmatch(r'<iframe srcdoc="([^"]*)" style="[^"]*"></iframe>', report._repr_html_())[1]
    assert html.unescape(page) == report.path.read_text(encoding="utf-8")


def test_a_result_is_a_line_and_in_a_notebook_its_curves(ran):
    result, _, workdir = ran
    assert repr(result) == f"{workdir}: finished at step {STEPS} of {STEPS}"
    assert "<svg" in result._repr_html_() and "held-out" in result._repr_html_()


def test_a_results_model_is_what_the_workdir_holds(ran):
    result, _, workdir = ran
    loaded = fs.load_pretrained(workdir)
    assert result.model.config == loaded.config
    assert result.model.generate("ba ke", max_new_tokens=3).texts == loaded.generate("ba ke", max_new_tokens=3).texts
