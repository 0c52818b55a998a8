"""The main path in a minute: pre-train a few steps, resume, generate, convert to Hugging Face and back."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

ROOT = Path(__file__).parents[1]
SMALL = [
    "--config.model.d_model=32", "--config.model.d_ff=64", "--config.model.num_heads=2", "--config.model.d_kv=16",
    "--config.data.batch_size=8", "--config.train.log_every=2", "--config.train.eval_batches=1",
    "--config.train.checkpoint_every=2", "--config.train.sample_spans=1",
]  # fmt: skip


def flax_switch(*args: str, stdin: str | None = None) -> str:
    """Runs a command of the command line and returns what it printed."""
    command = [sys.executable, "-m", "flax_switch.cli", *args]
    result = subprocess.run(command, input=stdin, capture_output=True, text=True, cwd=ROOT)
    if result.returncode:
        sys.exit(f"{' '.join(command)} failed with status {result.returncode}:\n{result.stdout}\n{result.stderr}")
    return result.stdout


def main() -> None:
    """Runs it all in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        run, exported, back = (str(Path(folder) / name) for name in ("run", "exported", "back"))
        recipe = ["pretrain", "--config", "configs/tiny.py", "--workdir", run, *SMALL]
        flax_switch(*recipe, "--config.train.steps=4")
        resumed = flax_switch(*recipe, "--config.train.steps=6")
        assert "from step 4" in resumed, resumed
        assert (Path(run) / "report.html").stat().st_size > 10_000
        generated = flax_switch("generate", "--checkpoint", run, "--max-new-tokens", "8", stdin="Return the <extra_id_0> list.\n")
        assert generated.strip(), "generate printed nothing"
        flax_switch("convert", run, exported, "--to", "huggingface")
        flax_switch("convert", exported, back, "--to", "flax_switch")
        assert "huggingface" in flax_switch("inspect", exported)
        compare(run, back)
        decoder_alone(str(Path(folder) / "decoder"))
    print("The main path works: pre-train, resume, report, generate, convert to Hugging Face and back to the bit; a decoder alone.")


def decoder_alone(run: str) -> None:
    """Pre-trains a decoder-only model, resumes, and has it continue a text."""
    small = [
        *SMALL,
        "--config.model.layer_form=fused",
        "--config.model.num_decoder_layers=1",
        "--config.model.num_sparse_decoder_layers=1",
    ]
    recipe = ["pretrain", "--config", "configs/tiny_decoder.py", "--workdir", run, *small]
    flax_switch(*recipe, "--config.train.steps=2")
    resumed = flax_switch(*recipe, "--config.train.steps=3")
    assert "from step 2" in resumed, resumed
    generated = flax_switch("generate", "--checkpoint", run, "--max-new-tokens", "4", stdin="Returns True if the\n")
    assert "Returns True if the" in generated, generated


def compare(first: str, second: str) -> None:
    """Raises unless two checkpoints hold the same parameters."""
    import flax_switch as fs

    trees = [fs.load_pretrained(path).params for path in (first, second)]
    jax.tree.map(np.testing.assert_array_equal, *trees)


if __name__ == "__main__":
    main()
