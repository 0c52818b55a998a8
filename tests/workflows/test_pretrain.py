"""A whole run in a few seconds: its held-out metrics, checkpoints, progress and report, each against figures made otherwise."""

import contextlib
import html
import io
import json
import math
import re

import jax
import numpy as np
import pytest

from flax_switch.config import DataConfig, ExperimentConfig, OptimizerConfig, SwitchConfig, TrainConfig
from flax_switch.data.span_corruption import restore
from flax_switch.training import loop, progress
from flax_switch.training.checkpoint import Checkpoints
from flax_switch.training.evaluate import Evaluator, describe, perplexity
from flax_switch.training.metrics import read_metrics
from flax_switch.training.step import compile_eval_step
from flax_switch.workflows.finish import finish
from flax_switch.workflows.pretrain import pretrain

STEPS = 8
SYLLABLES = ["ba", "ke", "lo", "mi", "nu", "ra", "se", "ti", "vo", "zu"]


def documents(count):
    """A made-up language, in which common words are common."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(SYLLABLES, size=rng.integers(1, 4))) for _ in range(300)]
    weights = 1 / np.arange(1, len(words) + 1)
    return [" ".join(rng.choice(words, size=rng.integers(3, 40), p=weights / weights.sum())) + "." for _ in range(count)]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """(result, workdir, what was printed) of a run of eight steps."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text("\n".join(documents(150)))
    config = ExperimentConfig(
        model=SwitchConfig(
            vocab_size=128, d_model=16, num_heads=2, d_kv=8, d_ff=16, num_encoder_layers=1, num_decoder_layers=1,
            num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=2, dropout_rate=0.1, init_scale=1.0,
        ),
        data=DataConfig(
            source=str(folder / "text.txt"), vocabulary_size=80, num_sentinels=16, inputs_length=24, targets_length=12,
            batch_size=8, heldout_fraction=0.15, cache_dir=str(folder / "cache"), prefix_lm_rate=1.0,
        ),
        optimizer=OptimizerConfig(name="adamw", schedule="linear", learning_rate=3e-3, final_learning_rate=1e-3, warmup_steps=2),
        train=TrainConfig(
            steps=STEPS, log_every=2, eval_every=3, eval_batches=100, checkpoint_every=1, keep_last=2, keep_every=3, sample_spans=3
        ),
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "slow_dtype", lambda model: f"{model.dtype} is slow here")
        result = pretrain(config, folder / "workdir")
        finish(result, folder / "workdir")
    return result, folder / "workdir", printed.getvalue()


def test_what_is_said_of_the_models_dtype_is_said_before_the_first_step(ran):
    _, _, printed = ran
    assert "float32 is slow here" in printed.split("step 2/8")[0]


def lines(workdir, kind):
    return [line for line in read_metrics(workdir) if line["kind"] == kind]


@pytest.fixture(scope="module")
def judged(ran):
    """Every held-out target's negative log-probability and hit, in float64 from the model's logits, and which targets are text."""
    result, _, _ = ran
    nats, hits, text, by_batch, ids = [], [], [], [], []
    apply = jax.jit(lambda params, *arrays: result.run.model.apply({"params": params}, *arrays).logits)
    for batch in result.prepared.heldout_batches():
        names = ("input_ids", "decoder_input_ids", "attention_mask", "decoder_attention_mask")
        logits = apply(result.state.params, *(batch[name] for name in names))
        logits = np.float64(logits)
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        by_batch.append([])
        for row, labels in enumerate(batch["labels"]):
            for place, label in enumerate(labels):
                if label == -100:
                    continue
                nats.append(-log_probs[row, place, label])
                hits.append(logits[row, place].argmax() == label)
                text.append(2 <= label < result.prepared.vocabulary.num_pieces)  # neither EOS (1) nor a sentinel
                ids.append(label)
                by_batch[-1].append(nats[-1])
    return *map(np.array, (nats, hits, text, ids)), by_batch


def test_heldout_metrics_are_means_over_tokens_of_what_the_logits_say(ran, judged):
    result, workdir, _ = ran
    nats, hits, text, ids, by_batch = judged
    assert len({len(batch) for batch in by_batch}) > 1  # batches of unequal numbers of tokens
    over_batches = np.mean([np.mean(batch) for batch in by_batch])
    assert abs(over_batches - nats.mean()) > 1e-4  # so that a mean over batches would show
    _, counts = np.unique(ids[text], return_counts=True)
    unigram = -(counts / counts.sum() * np.log(counts / counts.sum())).sum()
    want = {
        "cross_entropy": nats.mean(), "accuracy": hits.mean(), "text_cross_entropy": nats[text].mean(),
        "perplexity": np.exp(nats.mean()), "text_perplexity": np.exp(nats[text].mean()), "unigram_entropy": unigram,
        "nats_below_unigram": unigram - nats[text].mean(),
    }  # fmt: skip
    assert 0 < hits.mean() < 1 and text.sum() < len(text)
    for evaluation in (result.evaluation, lines(workdir, "eval")[-1]):
        assert {name: evaluation[name] for name in want} == pytest.approx(want, rel=1e-5)


def test_an_evaluation_reads_as_many_batches_as_it_is_told_and_so_does_its_unigram_entropy(ran):
    result, _, _ = ran
    run = result.run.replace(config=result.run.config.replace(train=result.run.config.train.replace(eval_batches=1)))
    evaluation = Evaluator.of(run, result.prepared, compile_eval_step(run))(result.state.params)
    assert evaluation["unigram_entropy"] == result.prepared.heldout_unigram_entropy(1) != result.evaluation["unigram_entropy"]
    assert evaluation["cross_entropy"] != result.evaluation["cross_entropy"]


def test_an_evaluation_in_words_has_the_metrics_numbers(ran):
    result, _, printed = ran
    sentence = describe(result.evaluation)
    e = result.evaluation
    assert re.findall(r"-?\d+\.\d+", " ".join(sentence.split("\n")[:2])) == [
        f"{e['cross_entropy']:.3f}", f"{math.exp(e['cross_entropy']):.2f}", f"{100 * e['accuracy']:.1f}",
        f"{e['text_cross_entropy']:.3f}", f"{e['unigram_entropy']:.3f}",
    ]  # fmt: skip
    assert printed.count(sentence) == 1  # after its step
    assert perplexity(0.0) == 1.0 and perplexity(1e9) == math.inf


def test_the_last_checkpoints_stay_and_those_at_every_so_many_steps_for_good(ran):
    _, workdir, _ = ran
    assert sorted(int(p.name) for p in (workdir / "checkpoints").iterdir()) == [3, 6, 7, 8]
    checkpoints = Checkpoints(workdir)
    assert checkpoints.latest_step() == STEPS
    checkpoints.close()


def test_steps_are_logged_and_evaluated_as_often_as_the_config_says_and_at_the_end(ran):
    _, workdir, printed = ran
    train, evals = lines(workdir, "train"), lines(workdir, "eval")
    assert [line["step"] for line in train] == [2, 4, 6, 8]
    assert [line["step"] for line in evals] == [3, 6, 8]
    # The rate of update number n, counted from 0: two steps of warm-up, then down to the final rate at step 8.
    rates = [1.5e-3, 3e-3, *(3e-3 - 2e-3 * n / 6 for n in range(6))]
    assert [line["learning_rate"] for line in train] == pytest.approx([rates[s - 1] for s in (2, 4, 6, 8)], rel=1e-6)
    shown = re.findall(r"step (\d+)/8  loss (\S+)  (\S+) tokens/s  \S+ [kMGTP]?FLOP/s  data wait (\S+) %", printed)
    assert shown == [
        (f"{m['step']}", f"{m['loss']:.3f}", f"{m['tokens_per_second']:,.0f}", f"{100 * m['data_wait_fraction']:.1f}")
        for m in train
    ]


def test_rates_count_the_real_tokens_of_source_and_target(ran):
    result, workdir, _ = ran
    batches = result.prepared.train_iterator()
    some = [next(batches) for _ in range(STEPS)]
    batches.close()
    tokens = [int((b["input_ids"] != 0).sum() + (b["labels"] != -100).sum()) for b in some]
    for line in lines(workdir, "train"):
        # The first step compiles and is not timed.
        window = tokens[1:2] if line["step"] == 2 else tokens[line["step"] - 2 : line["step"]]
        assert line["tokens_per_second"] * line["seconds_per_step"] == pytest.approx(np.mean(window), rel=1e-6)
        assert 0 <= line["data_wait_fraction"] < 1


def charts(page):
    """The report's charts by title: what its script draws."""
    found = [json.loads(text) for text in re.findall(r'<script type="application/json" id="[^"]*">(.*?)</script>', page)]
    return {(chart["title"], "values" in chart): chart for chart in found}


def test_the_reports_table_has_the_metrics_files_numbers(ran):
    result, workdir, printed = ran
    page = (workdir / "report.html").read_text()
    assert str(workdir / "report.html") in printed
    table = dict(re.findall(r'<tr><td>([^<]*?)</td><td class="number" data-name="">(.*?)</td></tr>', page))
    last, train = lines(workdir, "eval")[-1], lines(workdir, "train")
    assert table == {
        "held-out cross-entropy, nats/token": f"{last['cross_entropy']:.3f}",
        "held-out perplexity": f"{math.exp(last['cross_entropy']):.2f}",
        "held-out cross-entropy, text targets, nats/token": f"{last['text_cross_entropy']:.3f}",
        "unigram entropy of the same text, nats/token": f"{last['unigram_entropy']:.3f}",
        "below the unigram entropy, nats/token": f"{last['unigram_entropy'] - last['text_cross_entropy']:.3f}",
        "held-out accuracy, %": f"{100 * last['accuracy']:.1f}",
        "training cross-entropy, nats/token": f"{train[-1]['cross_entropy']:.3f}",
        "tokens per second, median": f"{np.median([m['tokens_per_second'] for m in train]):,.0f}",
    } | {name: table[name] for name in table if "masked" in name or "encoder is worth" in name}
    settings = dict(re.findall(r"<dt>(\w+)</dt><dd><code>(.*?)</code></dd>", page))
    for section in ("data", "optimizer", "train"):
        for name, value in result.run.config.to_dict()[section].items():
            assert f"<dt>{name}</dt><dd><code>{html.escape(str(value))}</code></dd>" in page
    assert settings["mode"] == "jit"


def test_the_report_says_when_how_long_on_what_with_which_command_and_on_what_data(ran, monkeypatch):
    result, workdir, _ = ran
    page = (workdir / "report.html").read_text()
    facts = dict(re.findall(r"<dt>([A-Z][\w ]*)</dt><dd>(.*?)</dd>", page, re.DOTALL))
    start, end = [json.loads(line) for line in (workdir / "sessions.jsonl").read_text().splitlines()]
    assert (start["event"], start["step"], end["event"], end["step"]) == ("start", 0, "end", STEPS)
    assert re.fullmatch(r"20\d\d-\d\d-\d\d \d\d:\d\d UTC", facts["When"])
    assert facts["Devices"] == f"{jax.device_count()} × {jax.devices()[0].device_kind}"
    assert f"jax {jax.__version__}" in facts["Versions"]
    assert html.escape(start["command"]) in facts["Command"]
    train, heldout = result.prepared.train, result.prepared.heldout
    assert facts["Data"].endswith(
        f"text.txt: {train.num_documents:,} documents with {train.num_tokens:,} tokens for training; "
        f"{heldout.num_documents:,} documents with {heldout.num_tokens:,} tokens held out"
    )
    assert facts["How long"].startswith(("0 s", "1 s", *(f"{s} s" for s in range(2, 60)), "1 min", "2 min", "3 min"))


def test_the_reports_curves_are_the_metrics_files_columns(ran):
    result, workdir, _ = ran
    found = charts((workdir / "report.html").read_text())
    train, evals = lines(workdir, "train"), lines(workdir, "eval")
    model = result.run.config.model

    def same(title, name, rows, metric, scale=1.0, layer=None):
        (curve,) = [one for one in found[title, False]["series"] if one["name"] == name]
        assert curve["x"] == [row["step"] for row in rows]
        assert curve["y"] == pytest.approx(
            [(row[metric] if layer is None else row[metric][layer]) * scale for row in rows], rel=1e-4
        )

    same("Cross-entropy", "training", train, "cross_entropy")
    same("Cross-entropy", "held-out", evals, "cross_entropy")
    same("Cross-entropy", "held-out, text targets", evals, "text_cross_entropy")
    same("Learning rate", "learning rate", train, "learning_rate")
    same("Gradient norm", "gradient norm", train, "grad_norm")
    same("Throughput", "tokens per second", train, "tokens_per_second")
    same("Waiting for data", "data wait", train, "data_wait_fraction", 100)
    for i, layer in enumerate(("encoder 0", "decoder 0")):
        same("Router entropy", layer, train, "routers/router_entropy", layer=i)
        same("Router confidence", layer, train, "routers/router_confidence", layer=i)
        same("Tokens left to no expert", layer, train, "routers/fraction_tokens_left_behind", 100, i)
        for t, line in enumerate(train):  # [expert, time], 1 = an even share
            tokens = np.array(line["routers/tokens_per_expert"][i])
            np.testing.assert_allclose(np.array(found[layer, True]["values"])[:, t], tokens / tokens.mean(), rtol=1e-4)
    same("Loss by part", "load balancing", train, "load_balancing_loss", model.load_balancing_loss_coef)
    parts = {one["name"]: np.array(one["y"]) for one in found["Loss by part", False]["series"]}
    np.testing.assert_allclose(parts.pop("all"), sum(parts.values()), rtol=1e-3)


def test_samples_show_the_heldout_text_with_the_models_spans_beside_it(ran):
    result, workdir, printed = ran
    vocabulary, page = result.prepared.vocabulary, (workdir / "report.html").read_text()
    batch = next(result.prepared.heldout_batches(1))
    masked = [row for row, ids in enumerate(batch["input_ids"]) if ids.max() >= vocabulary.num_pieces]
    samples = json.loads((workdir / "samples.json").read_text())
    assert len(samples) == 3 <= len(masked) < len(batch["labels"])  # prefix-LM's examples have no spans to fill in
    for sample, row in zip(samples, masked[:3], strict=True):
        inputs, targets = (ids[ids > 0] for ids in (batch["input_ids"][row], batch["labels"][row]))
        text = vocabulary.decode(restore(inputs, targets, top_sentinel=vocabulary.size - 1, num_sentinels=16))
        shown = "".join(p if isinstance(p, str) else p["text"] for p in sample["pieces"])
        assert "".join(shown.split()) == "".join(text.split())
        spans = [p for p in sample["pieces"] if isinstance(p, dict)]
        assert len(spans) == (inputs >= vocabulary.num_pieces).sum()
        for span in spans:
            assert f"[{span['model']} -> {span['text']}]" in printed
            assert f"<mark>{html.escape(span['model'])}</mark>" in page
            assert f"<del>{html.escape(span['text'])}</del>" in page


def test_a_line_of_progress_says_where_a_run_stands_and_how_long_it_takes():
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        shown = progress.TrainProgress(0, 1000)
        shown.log(400, {"loss": 2.34567, "tokens_per_second": 12345.6, "data_wait_fraction": 0.0321, "seconds_per_step": 0.5})
        shown.close()
    assert printed.getvalue() == "step 400/1000  loss 2.346  12,346 tokens/s  data wait 3.2 %  5 min 00 s of steps left\n"
    written = [progress.duration(s) for s in (0.4, 12.0, 59.6, 200.0, 3599.4, 3600.0, 7500.0)]
    assert written == ["0 s", "12 s", "1 min 00 s", "3 min 20 s", "59 min 59 s", "1 h 00 min", "2 h 05 min"]


def test_a_stopwatch_gives_rates_since_it_was_last_read_and_leaves_out_pauses(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock[0])
    watch = progress.Stopwatch()
    clock[0] += 3.0
    watch.count(0.5, 30.0)
    paused = watch.pause(None)
    clock[0] += 50.0
    watch.resume(paused)
    clock[0] += 1.0
    watch.count(0.3, 10.0)
    assert watch.read() == pytest.approx({"seconds_per_step": 2.0, "tokens_per_second": 10.0, "data_wait_fraction": 0.2})
    clock[0] += 4.0
    watch.count(1.0, 8.0)
    assert watch.read() == pytest.approx({"seconds_per_step": 4.0, "tokens_per_second": 2.0, "data_wait_fraction": 0.25})
