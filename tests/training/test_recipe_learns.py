"""The quickstart's recipe, trained for long enough to see that it learns what the model is for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STEPS = 700


@pytest.mark.slow
def test_the_quickstarts_model_uses_its_encoder(tmp_path):
    settings = [f"--config.train.{name}={STEPS}" for name in ("steps", "eval_every", "checkpoint_every")]
    settings += ["--config.model.num_encoder_layers=2", "--config.model.num_decoder_layers=2"]  # three of each take a third longer
    # A process as a user starts it: the compiler's hurry in tests would make every step five times as slow.
    plain = {name: value for name, value in os.environ.items() if name not in ("NPROC", "XLA_FLAGS")}
    command = [sys.executable, "-m", "flax_switch", "pretrain", "--config", "tiny", "--workdir", str(tmp_path / "run"), *settings]
    done = subprocess.run(
        command, env={**plain, "PYTHONPATH": str(ROOT)}, cwd=tmp_path, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = [line for line in map(json.loads, lines) if line["kind"] == "eval"][-1]
    assert found["step"] == STEPS
    assert found["encoder_gain/infilling"] >= 0.5
    assert found["encoder_gain/masked"] > 0.05
    assert found["masked_accuracy"] > 2 * found["masked_accuracy_of_most_frequent"]
    assert max(found["routers/fraction_tokens_left_behind"]) < 0.05
