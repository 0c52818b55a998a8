"""A new user's first hour, from the wheel in a fresh environment: every command is run, and the transcript is docs/first_hour.md.

    python scripts/first_hour.py                  # builds the wheel, downloads what it needs, and writes docs/first_hour.md
    python scripts/first_hour.py --beside         # packages come from this environment, with the wheel alone installed: no network
    python scripts/first_hour.py --output FILE    # keeps the transcript elsewhere

Install, look around, pre-train, read the report, generate, fine-tune on one's own csv, generate with that, convert, and open the
result in transformers. It takes at most 15 minutes on two cores, and fails where it takes longer or a command does not do what it
says.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import wheel_test  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "first_hour.md"
LIMIT = 15 * 60  # seconds on two cores
OTHERS = ("torch==2.13.0", "transformers")  # for the last step alone
WIDTH, WHOLE = 120, dict(break_long_words=False, break_on_hyphens=False, replace_whitespace=False)
LONGEST = 48  # lines of an output that the transcript shows
OPEN = """\
from transformers import AutoTokenizer, SwitchTransformersForConditionalGeneration
model = SwitchTransformersForConditionalGeneration.from_pretrained("exported")
tokenizer = AutoTokenizer.from_pretrained("exported")
inputs = tokenizer("add: 3 plus 4", return_tensors="pt")
print("transformers says", tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0], skip_special_tokens=True))
"""
TINY = "--config.train.steps=200 --config.train.eval_every=100 --config.train.eval_batches=10 --config.train.log_every=20"
TUNE = (
    "--config.train.steps=60 --config.train.eval_every=30 --config.train.log_every=15 --config.data.batch_tokens=None "
    "--config.data.batch_size=16 --config.data.packing=false --config.data.inputs_length=32 --config.data.targets_length=8 "
    "--config.evaluation.max_examples=8"
)
COLUMNS = "--config.data.inputs=question --config.data.targets=answer --config.data.prefix='add: '"
GENERATE = "flax-switch generate --checkpoint runs/tiny"
STEPS = (  # what is typed, why, and what its output must hold
    ("flax-switch --version", "It is installed.", "flax_switch"),
    ("flax-switch doctor", "What is here, and does it compute what it should?", "fine"),
    ("flax-switch recipes", "Which recipes come with it?", "tiny"),
    ("flax-switch recipes tiny", "What does the recipe `tiny` do?", "Hardware"),
    (
        "flax-switch pretrain --config tiny --workdir runs/tiny --dry-run",
        "What would it do? Nothing is kept, so the next run prepares the data again.",
        "Dry run",
    ),
    (f"flax-switch pretrain --config tiny --workdir runs/tiny {TINY}", "Pre-train, for 200 of its 1,000 steps.", "Report:"),
    ("flax-switch report runs/tiny", "The report can be written at any time.", "report.html"),
    (
        f"echo 'Return the <extra_id_0> of the list.' | {GENERATE}",
        "Fill a gap. The whole text comes back; after so few steps it is not a good one.",
        "extra_id_0",
    ),
    (
        f"echo 'Return the <extra_id_0> of a list.' | {GENERATE}",
        "Again, with another text: compiled programs were kept, so it is quicker.",
        "outputs",
    ),
    ("head -3 sums.csv", "Now a task of one's own: a csv file of 400 sums, made beforehand.", "question,answer"),
    (
        "flax-switch finetune --config finetune_question_answering --init runs/tiny --workdir runs/sums "
        f"--config.data.train=sums.csv {COLUMNS} {TUNE}",
        "Fine-tune on it. Columns and prefix say what is read; all else makes it short: few steps, short texts, small batches.",
        "Model:",
    ),
    (
        "echo '3 plus 4' | flax-switch generate --checkpoint runs/sums/best",
        "The model puts its prefix, `add: `, before what it is given. After 60 steps most sums are wrong.",
        "outputs",
    ),
    ("flax-switch convert runs/sums/best exported --to huggingface", "Take it to transformers.", "Converted"),
    ("cat open_it.py", "Five lines for transformers.", "from_pretrained"),
    ("python open_it.py", "It opens there.", "transformers says"),
)  # fmt: skip


def main() -> int:
    """Runs the hour and writes its transcript; exit status 1 where it took too long."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--beside", action="store_true", help="take packages from this environment, and install the wheel alone")
    parser.add_argument("--output", type=Path, default=PAGE)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        started = time.monotonic()
        told = hour(folder, args.beside)
        seconds, used = time.monotonic() - started, os.times()
    computed = used.children_user + used.children_system
    args.output.write_text(page(told, seconds, computed), encoding="utf-8")
    print(f"{seconds:.0f} s, {computed:.0f} s of CPU time; transcript: {args.output}")
    return 0 if seconds <= LIMIT else 1


def hour(folder: Path, beside: bool) -> list[tuple[str, str, str, float]]:
    """What was typed, why, what was answered and how long it took, for every step. Raises where a step fails."""
    dist, place = folder / "dist", folder / "place"
    place.mkdir()
    wheel_test.build(wheel_test.copy_of_checkout(folder / "source"), dist, isolated=not beside)
    (wheel,) = dist.glob("*.whl")
    began = time.monotonic()
    needed = (str(wheel),) if beside else (*OTHERS, f"{wheel}[eval]")
    scripts = wheel_test.environment(folder / "environment", needed[-1], not beside, *needed[:-1])
    typed = f"pip install '{wheel.name}[eval]' {' '.join(OTHERS)}"
    told = [(typed, "In a fresh environment.", "", time.monotonic() - began)]
    rows = "".join(f"{a} plus {b},{a + b}\n" for a in range(10) for b in range(40))
    (place / "sums.csv").write_text(f"question,answer\n{rows}")
    (place / "open_it.py").write_text(OPEN)
    shell = {**os.environ, "HOME": str(folder), "XDG_CACHE_HOME": str(folder / "cache"), "JAX_PLATFORMS": "cpu", "COLUMNS": "100"}
    shell = {key: value for key, value in shell.items() if not key.startswith(("PYTHON", "FLAX_SWITCH", "XLA_", "NPROC"))}
    shell["PATH"] = f"{scripts}{os.pathsep}{shell['PATH']}"
    for typed, why, expected in STEPS:
        began = time.monotonic()
        done = subprocess.run(["bash", "-c", typed], cwd=place, env=shell, capture_output=True, text=True)
        output = clean(done.stdout + done.stderr, folder)
        print(f"{time.monotonic() - began:6.1f} s  {typed}", flush=True)
        if done.returncode or expected not in output:
            raise SystemExit(f"{typed} ended with status {done.returncode}; wanted {expected!r} in:\n{output}")
        told.append((typed, why, output, time.monotonic() - began))
    return told


def clean(output: str, folder: Path) -> str:
    """An output without the paths of the place it was made in."""
    for path in (folder / "place", folder):
        output = output.replace(f"{path.resolve()}/", "").replace(f"{path}/", "")
    return re.sub(r"\x1b\[[\d;]*[A-Za-z]", "", output).strip("\n")


def page(told: list[tuple[str, str, str, float]], seconds: float, computed: float) -> str:
    """The transcript as a page."""
    cpus, python = os.cpu_count(), platform.python_version()
    took = f"{seconds / 60:.0f} minutes on {cpus} CPU cores ({computed / 60:.0f} minutes of CPU time)"
    lines = [
        "# The first hour",
        "",
        "<!-- written by scripts/first_hour.py -->",
        f"What a newcomer types and reads, from the wheel in a fresh environment: {took}, Python {python}.",
        "`python scripts/first_hour.py` runs every command again and writes this page; long outputs are shortened.",
    ]
    for typed, why, output, wall in told:
        lines += [
            "",
            f"{why} ({wall:.0f} s)",
            "",
            "```text",
            "$ " + " \\\n    ".join(textwrap.wrap(typed, WIDTH, **WHOLE)),
            *shortened(output),
            "```",
        ]
    return "\n".join(lines) + "\n"


def shortened(output: str) -> list[str]:
    """The beginning and the end of an output."""
    lines = [part for line in output.splitlines() for part in textwrap.wrap(line, WIDTH, **WHOLE) or [""]]
    half = LONGEST // 2
    return lines if len(lines) <= LONGEST else [*lines[:half], f"... {len(lines) - 2 * half} more lines ...", *lines[-half:]]


if __name__ == "__main__":
    if shutil.which("bash") is None:
        raise SystemExit("this needs bash")
    sys.exit(main())
