"""The routing of a run is followed through its checkpoints, printed and drawn."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from flax_switch.cli import main
from flax_switch.config import DataConfig, ExperimentConfig, SwitchConfig, TrainConfig
from flax_switch.inspection.routing_page import write_page
from flax_switch.inspection.run_routing import RunRouting, Tokens, follow, measure, render
from flax_switch.workflows.pretrain import pretrain

sys.path.insert(0, str(Path(__file__).parents[1] / "pages"))
from browser import Browser  # noqa: E402

MODEL = SwitchConfig(
    vocab_size=128, d_model=16, num_heads=2, d_kv=8, d_ff=16, num_encoder_layers=1, num_decoder_layers=2,
    num_sparse_encoder_layers=1, num_sparse_decoder_layers=2, num_experts=4, dropout_rate=0.0, init_scale=1.0,
)  # fmt: skip


def made_up():
    """Two layers of a decoder: experts by token, then by the expert before; at step 1 half of the choices were others."""
    random = np.random.default_rng(0)
    ids, kinds = random.integers(0, 32, 4000), random.integers(0, 2, 4000)
    first = ids % 4
    early = np.where(np.arange(4000) % 2 == 0, first, (first + 1) % 4)
    last = {("decoder", 0): first[:, None], ("decoder", 1): (3 - first)[:, None]}
    chosen = {2: last, 1: {("decoder", 0): early[:, None], ("decoder", 1): last["decoder", 1]}}
    return RunRouting(4, ["a", "b"], {"decoder": Tokens(ids, kinds)}, {i: f"t{i}" for i in range(32)}, chosen)


def test_the_figures_of_a_made_up_run_are_those_it_was_made_with():
    measured = measure(made_up())
    found = measured["decoder 0"]
    assert found["saturation"] == {1: 0.5, 2: 1.0}
    assert found["token_bits"] == pytest.approx(2.0, abs=0.05) and found["kind_bits"] < 0.01
    assert found["next"][0] == 1.0 and found["next"][1] < 0.4
    assert found["co_activation"] is None and sum(found["share"]) == pytest.approx(1.0)
    assert set(found["likes"][1]) == {f"t{i}" for i in range(1, 32, 4)}
    assert measured["decoder 1"]["next"] is None and measured["decoder 1"]["saturation"][1] == 1.0
    assert "50%" in render(measured)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    random = np.random.default_rng(0)
    for name, letters in (("left", "abcd"), ("right", "efgh")):
        words = ["".join(random.choice(list(letters), random.integers(1, 6))) for _ in range(80)]
        (folder / f"{name}.txt").write_text("\n".join(" ".join(random.choice(words, 20)) for _ in range(300)))
    (folder / "empty.txt").write_text("\n")
    data = DataConfig(
        source=str(folder / "*.txt"), vocabulary_size=90, num_sentinels=20, inputs_length=24,
        targets_length=28, batch_size=8, heldout_fraction=0.2, cache_dir=str(folder / "cache"), infilling_rate=1.0,
    )  # fmt: skip
    train = TrainConfig(steps=2, log_every=1, eval_every=2, eval_batches=1, checkpoint_every=1)
    pretrain(ExperimentConfig(model=MODEL, data=data, train=train), folder / "run")
    return folder / "run"


@pytest.mark.slow  # as the next: the run compiles for half a minute
def test_a_run_is_followed_over_its_checkpoints_and_kinds_are_its_files(run):
    routing = follow(run)
    assert sorted(routing.chosen) == [1, 2] and routing.kinds == ["left.txt", "right.txt"]
    assert list(routing.last) == [("encoder", 0), ("decoder", 0), ("decoder", 1)]
    for (stack, _), chosen in routing.last.items():
        tokens = routing.tokens[stack]
        assert chosen.shape == (len(tokens.ids), 1) == (len(tokens.kinds), 1)
        assert (tokens.ids != 0).all() or stack == "decoder"  # no padding; a decoder begins with 0
    tokens = routing.tokens["encoder"]
    for kind, letters in enumerate(("abcd", "efgh")):
        names = [routing.names[i] for i in np.unique(tokens.ids[tokens.kinds == kind])]
        assert {c for name in names if "<" not in name for c in name} <= {*letters, "\u2581"}


@pytest.mark.slow
def test_the_command_prints_and_draws(run, capsys):
    assert main(["routing", str(run)]) == 0
    assert "encoder 0" in capsys.readouterr().out
    assert '"rows":["left.txt","right.txt"]' in (run / "routing.html").read_text()
    assert main(["routing", str(run), "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["layers"]) == ["encoder 0", "decoder 0", "decoder 1"]


def test_the_page_maps_a_layer_to_the_next_and_kinds_to_experts(tmp_path):
    routing = made_up()
    page = write_page(routing, measure(routing), tmp_path / "routing.html").read_text()
    charts = [json.loads(data) for data in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page)]
    maps = {chart["title"]: chart for chart in charts if "rows" in chart}
    assert list(maps) == [
        "decoder 0: experts of a kind of document", "decoder 0: experts of the next sparse layer",
        "decoder 1: experts of a kind of document",
    ]  # fmt: skip
    following = maps["decoder 0: experts of the next sparse layer"]
    np.testing.assert_array_equal(following["values"], np.eye(4)[::-1])  # the made-up 3 - first
    assert following["rows"] == ["0", "1", "2", "3"]
    for name in ("decoder 0", "decoder 1"):
        kinds = maps[f"{name}: experts of a kind of document"]
        assert kinds["rows"] == ["a", "b"]
        np.testing.assert_allclose(kinds["values"], 0.25, atol=0.04)  # kinds were drawn apart from tokens


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_fits_its_window_and_shows_each_layer(width, dark, tmp_path):
    routing = dataclasses.replace(made_up(), kinds=["a/very/long/name/of/a/file/of/text.txt", "<b>"])
    page = write_page(routing, measure(routing), tmp_path / "routing.html")
    with Browser() as browser:
        browser.show(page, width, dark)
        assert browser.value("document.documentElement.scrollWidth") <= width
        titles = json.loads(browser.value('JSON.stringify([...document.querySelectorAll("figure h3")].map((e) => e.innerText))'))
        assert [title.partition(":")[2] for title in titles[1:]] == [
            " experts of a kind of document", " experts of the next sparse layer", " experts of a kind of document",
        ]  # fmt: skip
        assert browser.value('document.querySelectorAll("figure svg, figure canvas").length') == len(titles)
        box = json.loads(
            browser.value("""(() => { const plot = document.querySelectorAll("figure .plot")[2];
            plot.scrollIntoView({block: "center"}); return JSON.stringify(plot.getBoundingClientRect()); })()""")
        )
        browser.point(box["x"] + box["width"] - 5, box["y"] + 5)
        shown = browser.value('document.querySelectorAll("figure .tip")[2].innerText')
        assert "next layer's expert 3" in shown and "expert 0: 1 of its tokens" in shown  # the made-up 3 - first
        assert browser.complaints() == []


def test_what_is_no_run_is_one_sentence(tmp_path, capsys):
    assert main(["routing", str(tmp_path)]) == 2
    assert "is no workdir of a run" in capsys.readouterr().err
