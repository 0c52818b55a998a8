"""Reports as a browser shows them: they fit phone and desk, light and dark, ask nothing of a network, and can be hovered."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from flax_switch import cli
from flax_switch.config.finetuning import FinetuneConfig
from flax_switch.config.presets import PRESETS
from flax_switch.config.recipes import load_recipe
from flax_switch.training.checkpoint import write_config
from flax_switch.workflows.model_card import model_card
from flax_switch.workflows.record import RunRecord
from flax_switch.workflows.report import write_report

sys.path.insert(0, str(Path(__file__).parents[1] / "pages"))
from browser import Browser  # noqa: E402


def make_run(workdir, *, config=None, steps=60, seed=0, entropy=0.4, sessions=True, long_name="word " * 40):
    """A workdir as a run leaves it, with made-up figures."""
    config = config or load_recipe("tiny")
    rng, layers, experts = np.random.default_rng(seed), 2, config.model.num_experts
    workdir.mkdir(parents=True)
    write_config(workdir, config)

    def routers():
        return {
            "routers/tokens_per_expert": rng.integers(100, 200, (layers, experts)).tolist(),
            "routers/router_entropy": [entropy] * layers,
            "routers/router_confidence": [0.8] * layers,
            "routers/fraction_tokens_left_behind": [0.01] * layers,
        }

    found = []
    for step in range(20, 20 * steps + 1, 20):
        loss = float(5 * step**-0.1 + rng.normal() * 0.02)
        parts = {"loss": loss + 0.04, "cross_entropy": loss, "load_balancing_loss": 1.1, "router_z_loss": 3.0, "z_loss": 0.004}
        speed = {"tokens_per_second": 12345.0, "data_wait_fraction": 0.2, "seconds_per_step": 0.1}
        found.append({"step": step, "kind": "train", **parts, **speed, "grad_norm": 1.0, "learning_rate": 0.01, **routers()})
        if step % 200 == 0:
            if isinstance(config, FinetuneConfig):
                found.append({"step": step, "kind": "eval", "cross_entropy": loss, **dict.fromkeys(config.scores, step / 20)})
                continue
            scores = {"accuracy": 0.4, "text_cross_entropy": loss + 0.1, "unigram_entropy": 4.5, "nats_below_unigram": 1.0}
            found.append({"step": step, "kind": "eval", "cross_entropy": loss + 0.05, **scores, **routers()})
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))
    pieces = [
        "Return the <extra_id_6>",
        {"model": "a" * 90, "text": "value"},
        f"of {long_name} <b>&",
        {"model": "", "text": long_name},
    ]
    if isinstance(config, FinetuneConfig):
        pieces = ["in", {"model": "said", "text": "right"}]
    (workdir / "samples.json").write_text(json.dumps([{"pieces": pieces}] * 3))
    if sessions:
        about = {"devices": 8, "device": "cpu", "processes": 1, "host": "a CPU", "python": "3.11", "versions": {"jax": "0.10.2"}}
        data = [{"source": ["/very/long/path" * 12], "train": {"documents": 1000, "tokens": 10**6}}]
        start = {
            "event": "start",
            "step": 0,
            "time": "2026-03-01T10:00:00+00:00",
            "command": "flax-switch pretrain " + "--x=y " * 30,
        }
        end = {"event": "end", "step": 600, "time": "2026-03-01T10:10:00+00:00"}
        more = [{**start, **about, "data": data, "step": 600, "time": "2026-03-01T11:00:00+00:00"}]
        more += [{"event": "end", "step": 1200, "time": "2026-03-01T11:02:30+00:00"}]
        lines = [{**start, **about, "data": data}, end, *more]
        (workdir / "sessions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return workdir


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A report of a run, of one of an earlier version, and a comparison of the two with a third."""
    folder = tmp_path_factory.mktemp("runs")
    wide = load_recipe("tiny", ["model.num_experts=64", "model.d_model=64", "train.seed=3"])
    first, second = make_run(folder / "first"), make_run(folder / "second", config=wide, seed=1, sessions=False, entropy=4.15)
    third = make_run(folder / "third", seed=2)
    compared = folder / "compared.html"
    assert cli.main(["report", str(first), str(second), str(third), "--output", str(compared)]) == 0
    return {"run": write_report(first), "earlier": write_report(second), "compared": compared}


@pytest.fixture(scope="module")
def browser():
    with Browser() as opened:
        yield opened


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("name", ["run", "earlier", "compared"])
def test_a_page_fits_its_window_and_nothing_complains(name, width, dark, pages, browser, tmp_path):
    browser.show(pages[name], width, dark)
    assert browser.value("document.documentElement.scrollWidth") <= width
    outside = f"""[...document.querySelectorAll("h1,h2,h3,p,figure,.card,td,dd,svg,canvas,button")]
        .filter((e) => !e.closest(".scroll") && e.getClientRects().length && e.getBoundingClientRect().right > {width + 1})
        .length"""
    assert browser.value(outside) == 0
    charts = browser.value('document.querySelectorAll("figure[data-chart]").length')
    assert charts == browser.value('document.querySelectorAll("figure svg, figure canvas").length') > 5
    ground = browser.value("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground))) < 200) == dark
    browser.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 20_000
    assert browser.complaints() == []


def test_text_is_read_on_its_ground_in_light_and_dark(pages, browser):
    """A contrast of at least 4.5, as WCAG's level AA has it, for every text of the page."""
    script = """(() => {
      const parse = (c) => c.match(/[\\d.]+/g).map(Number);
      const light = ([r, g, b]) => [r, g, b].map((c) => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
      const ground = (e) => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor);
        if (c.length < 4 || c[3] > 0) return c; } return [255, 255, 255]; };
      const low = [];
      for (const e of document.querySelectorAll("h1,h2,h3,p,span,b,dt,dd,td,th,li,mark,del,button,summary,code,text")) {
        if (!e.textContent.trim() || !e.getClientRects().length || e.getAttribute("aria-pressed") === "false") continue;
        const style = getComputedStyle(e), a = light(parse(e.tagName === "text" ? style.fill : style.color)), b = light(ground(e));
        const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        if (contrast < 4.5) low.push([e.tagName, e.className, e.textContent.slice(0, 30), contrast]);
      }
      return JSON.stringify(low);
    })()"""
    for dark in (False, True):
        browser.show(pages["run"], 1400, dark)
        assert json.loads(browser.value(script)) == []


def test_a_curve_that_is_hovered_tells_its_values_and_a_legend_hides_one(pages, browser):
    browser.show(pages["run"], 1400)
    browser.value('document.querySelector("figure .plot").scrollIntoView({block: "center"})')
    box = json.loads(browser.value('JSON.stringify(document.querySelector("figure .plot").getBoundingClientRect())'))
    browser.point(box["x"] + box["width"] - 21, box["y"] + 50)
    shown = browser.value('document.querySelector("figure .tip").innerText')
    assert "step 1,200" in shown
    last = json.loads((pages["run"].parent / "metrics.jsonl").read_text().splitlines()[-1])
    value = float(f"{last['cross_entropy']:.4g}")
    assert f"held-out {value}" in shown
    before = browser.value('document.querySelectorAll("figure svg")[0].querySelectorAll("path").length')
    browser.value('document.querySelector("figure .legend button").click()')
    assert browser.value('document.querySelectorAll("figure svg")[0].querySelectorAll("path").length') == before - 1
    assert browser.complaints() == []


def test_how_long_a_run_took_leaves_out_the_time_between_its_parts(pages):
    record = RunRecord.read(pages["run"].parent)
    assert record.seconds == 600 + 150
    assert "12 min 30 s, in 2 parts" in pages["run"].read_text()
    assert "2026-03-01 10:00 UTC" in pages["run"].read_text()


def test_of_a_run_that_says_no_times_the_steps_are_counted(pages):
    record = RunRecord.read(pages["earlier"].parent)
    assert not record.sessions and record.seconds == pytest.approx(0.1 * record.train[-1]["step"])


def test_masked_text_is_shown_as_text_with_its_gaps(pages):
    page = pages["run"].read_text()
    gap = lambda n: f'<span class="gap">{n}</span>'  # noqa: E731
    assert f"Return the {gap(7)} {gap(1)} of " in page  # a sentinel that the text itself has is a gap as well
    assert "&lt;b&gt;&amp;" in page and "<b>&" not in page and "extra_id" not in page


def test_a_models_card_has_held_out_figures_alone_as_its_results(pages):
    record = RunRecord.read(pages["run"].parent)
    head = yaml.safe_load(model_card("ada/mine", record.config.model, licence="mit", record=record).split("---")[1])
    found = {one["name"]: one["value"] for one in head["model-index"][0]["results"][0]["metrics"]}
    assert found["held-out cross-entropy, nats/token"] == round(record.evals[-1]["cross_entropy"], 4)
    assert not any("second" in name or "training" in name for name in found), "speed and the loss in training are no results"
    assert len(found) == len(record.results()) - 2


def test_faults_are_told_in_plain_words(pages):
    page = pages["earlier"].read_text()
    assert "The router of encoder 1 has not specialised: its entropy is 4.15 of 4.16 nats" in page
    assert "A step waits for data 20 % of its time; raise data.num_workers" in page
    assert "has not specialised" not in pages["run"].read_text()


def test_the_config_is_folded_and_no_page_holds_json_to_read(pages):
    page = pages["run"].read_text()
    assert "<pre>{" not in page and "&quot;model&quot;" not in page
    assert page.count("<details>") == 2
    assert page.index("<details>") > page.index("<h2>Settings</h2>")


def test_runs_are_compared_by_what_differs(pages):
    page = pages["compared"].read_text()
    table = page[page.index("What differs in the configs") :]
    assert re.findall(r"<tr><td[^>]*><code>([\w.]+)</code>", table) == ["model.d_model", "model.num_experts", "train.seed"]
    rows = {
        title: re.findall(r'<td class="number( best)?" data-name="(\w+)">([^<]*)', row)
        for title, row in re.findall(r"<tr><td>([^<]*)</td>(.*?)</tr>", page)
    }
    values = {name: float(value) for _, name, value in rows["held-out cross-entropy, nats/token"]}
    assert list(values) == ["first", "second", "third"]
    assert [name for best, name, _ in rows["held-out cross-entropy, nats/token"] if best] == [min(values, key=values.get)]
    charts = [json.loads(text) for text in re.findall(r'type="application/json" id="[^"]*">(.*?)</script>', page)]
    assert all([one["name"] for one in chart["series"]] == ["first", "second", "third"] for chart in charts)


def test_a_run_compared_with_itself_and_a_folder_without_a_run_are_one_sentence(pages, tmp_path, capsys):
    run = str(pages["run"].parent)
    assert cli.main(["report", run, run]) == 2
    assert "A run is compared with others, not with itself" in capsys.readouterr().err
    assert cli.main(["report", run, str(tmp_path)]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_the_report_of_a_fine_tuned_run_shows_predictions_beside_references(tmp_path):
    config = load_recipe("finetune_summarization").resolve(PRESETS["switch-tiny"])
    page = write_report(make_run(tmp_path / "tuned", config=config)).read_text()
    assert "Fine-tuning" in page
    assert "<mark>said</mark>" in page and "<del>right</del>" in page
    assert re.search(r"best rougeL</td><td[^>]*>60.00<", page)
    assert "Scores of generated text" in page


def test_open_shows_the_page_in_the_systems_browser(pages, monkeypatch, capsys):
    shown = []
    monkeypatch.setattr("webbrowser.open", shown.append)
    assert cli.main(["report", str(pages["run"].parent), "--open"]) == 0
    assert shown == [pages["run"].as_uri()]
    assert f"Report: {pages['run']}" in capsys.readouterr().out
