"""A run on several languages: every one's held-out loss in metrics, progress and report, against the loss on its text alone."""

import contextlib
import io
import json
import re

import numpy as np
import pytest

from flax_switch.config import DataConfig, ExperimentConfig, OptimizerConfig, SourceConfig, SwitchConfig, TrainConfig
from flax_switch.training.evaluate import describe, losses_of_sources, mean_metrics
from flax_switch.training.metrics import read_metrics
from flax_switch.training.step import compile_eval_step
from flax_switch.workflows.pretrain import pretrain
from flax_switch.workflows.report import write_report

EVALUATION = {
    "cross_entropy": 4.25, "perplexity": 70.1, "accuracy": 0.125, "text_cross_entropy": 4.5, "unigram_entropy": 5.0,
    "en/cross_entropy": 4.125, "fi/cross_entropy": 4.75,
}  # fmt: skip


def test_an_evaluation_tells_the_loss_of_every_source():
    assert losses_of_sources(EVALUATION) == {"en": 4.125, "fi": 4.75}
    assert "  held-out loss by source: en 4.125, fi 4.750" in describe(EVALUATION).splitlines()
    alone = {name: value for name, value in EVALUATION.items() if "/" not in name}
    assert losses_of_sources(alone) == {} and "by source" not in describe(alone)


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_on_two_languages_tells_both_losses(tmp_path, streaming):
    words = {"en": ["the", "and", "of", "with", "router", "model"], "fi": ["ja", "se", "on", "malli", "reititin", "ei"]}
    generator = np.random.default_rng(0)
    for name, count in (("en", 120), ("fi", 40)):
        lines = [" ".join(generator.choice(words[name], size=generator.integers(5, 20))) for _ in range(count)]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    config = ExperimentConfig(
        model=SwitchConfig(
            vocab_size=128, d_model=8, num_heads=2, d_kv=4, d_ff=8, num_encoder_layers=1, num_decoder_layers=1,
            num_sparse_encoder_layers=1, num_sparse_decoder_layers=0, num_experts=2, init_scale=1.0,
        ),
        data=DataConfig(
            mixture=tuple(SourceConfig(name=name, source=str(tmp_path / f"{name}.txt")) for name in words), mixing_temperature=2.0,
            vocabulary_size=30, num_sentinels=16, inputs_length=24, targets_length=12, batch_size=8, heldout_fraction=0.3,
            cache_dir=str(tmp_path / "cache"), streaming=streaming, shuffle_buffer=20,
        ),
        optimizer=OptimizerConfig(name="adamw", schedule="constant", learning_rate=1e-3, warmup_steps=1),
        train=TrainConfig(steps=4, log_every=2, eval_every=4, eval_batches=6, checkpoint_every=4, sample_spans=0, log_to=()),
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        result = pretrain(config, tmp_path / "run")
    last = [line for line in read_metrics(tmp_path / "run") if line["kind"] == "eval"][-1]
    step, found = compile_eval_step(result.run), {}
    for number, name in enumerate(words):
        batches = result.prepared.heldout_batches(3, text=number)
        found[name] = mean_metrics(result.run, step, result.state.params, batches, result.prepared.vocabulary)["cross_entropy"]
    assert losses_of_sources(last) == pytest.approx(found) and found["en"] != found["fi"]
    assert f"held-out loss by source: en {found['en']:.3f}, fi {found['fi']:.3f}" in printed.getvalue()
    page = write_report(tmp_path / "run").read_text()
    for name, loss in found.items():
        assert f'<tr><td>held-out cross-entropy, {name}, nats/token</td><td class="number" data-name="">{loss:.3f}</td>' in page
    charts = [json.loads(text) for text in re.findall(r'<script type="application/json" id="[^"]*">(.*?)</script>', page)]
    (chart,) = [chart for chart in charts if chart["title"] == "Held-out cross-entropy by source"]
    assert [one["name"] for one in chart["series"]] == ["en", "fi"]
    rate = result.prepared.rates[0]
    assert f"en ({100 * float(rate):.1f} % of the rows), {tmp_path}/en.txt" in page
