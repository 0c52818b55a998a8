"""A new user's first hour, from the wheel in a fresh environment: every command is run, and the transcript is docs/first_hour.md.

    python scripts/first_hour.py                  # builds the wheel, downloads what it needs, and writes docs/first_hour.md
    python scripts/first_hour.py --beside         # packages come from this environment, with the wheel alone installed: no network
    python scripts/first_hour.py --output FILE    # keeps the transcript elsewhere

Install, look around, pre-train, generate, read the report, fine-tune on one's own csv, generate with that, convert, and open the
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
LONGEST = 100  # lines of an output that the transcript shows
MAKE = """\
people = "Anna Ben Carla David Emma Felix Greta Hugo Ida Jonas Klara Leo Maria Nils Olga Paul Rosa Simon Tina Victor"
places = "garden kitchen office library station market school museum harbour theatre bakery forest river bridge tower hotel"
print("text,place")
for person in people.split():
    for place in places.split():
        print(f"{person} went to the {place} today.,{place}")
"""
OPEN = """\
from transformers import AutoTokenizer, SwitchTransformersForConditionalGeneration

model = SwitchTransformersForConditionalGeneration.from_pretrained("exported")
tokenizer = AutoTokenizer.from_pretrained("exported")
text = "where: Otto went to the lighthouse today."  # transformers does not add the prefix
output = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=20)
print("transformers says:", tokenizer.decode(output[0], skip_special_tokens=True))
"""
COLUMNS = "--config.data.train=places.csv --config.data.inputs=text --config.data.targets=place --config.data.prefix='where: '"
GENERATE = "flax-switch generate --checkpoint"
STEPS = (  # what is typed, why, and what its output must hold
    ("flax-switch --version", "It is installed.", "flax_switch"),
    ("flax-switch doctor", "What is here, and does it compute what it should?", "All is well"),
    (
        "flax-switch recipes",
        "A recipe is a file of settings: model, data, optimiser. Which come with it?",
        "Begin with tiny",
    ),
    ("flax-switch recipes tiny", "What does the recipe `tiny` do?", "Hardware"),
    (
        "flax-switch pretrain --config tiny --workdir runs/tiny --dry-run",
        "What would it do? A dry run keeps nothing, so the next command prepares the data again.",
        "Dry run",
    ),
    (
        "flax-switch pretrain --config tiny --workdir runs/tiny",
        "Pre-train. It makes a model that fills in gaps; it is small, so its words are often other ones than the text had.",
        "Report, a page:",
    ),
    (
        f"echo 'Return the number of <extra_id_0> in the list.' | {GENERATE} runs/tiny --num-beams 4 --format plain",
        "Fill a gap, `<extra_id_0>`. The whole text comes back.",
        "Return the number of",
    ),
    (
        f"echo 'Returns True if the <extra_id_0> is empty.' | {GENERATE} runs/tiny --num-beams 4",
        "Another sentence, quicker, because compiled programs were kept. Without `--format plain` it is a line of JSON, "
        "as always where the output is not a terminal.",
        "outputs",
    ),
    (
        "flax-switch report runs/tiny",
        "The run wrote a report, a page for a browser; it can be written again at any time.",
        "report.html",
    ),
    ("cat make_places.py", "Now a task of one's own: where did somebody go? Save this as make_places.py.", "places"),
    ("python make_places.py > places.csv; head -3 places.csv", "It makes 320 examples.", "text,place"),
    (
        f"flax-switch finetune --config finetune_small --init runs/tiny --workdir runs/places {COLUMNS}",
        "Fine-tune the model on them. Two of the settings name the columns, one what is put before every text.",
        "Model:",
    ),
    (
        f"echo 'Otto went to the lighthouse today.' | {GENERATE} runs/places/best --format plain",
        "Neither Otto nor a lighthouse was in the examples: it has learnt where to look. `generate` adds the prefix by itself.",
        "lighthouse",
    ),
    ("flax-switch convert runs/places/best exported --to huggingface", "Take it to transformers.", "Converted"),
    ("cat open_it.py", "Save this as open_it.py.", "from_pretrained"),
    ("python open_it.py", "It opens there, and says the same.", "transformers says: lighthouse"),
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
    typed = f"python -m venv env; . env/bin/activate; pip install 'dist/{wheel.name}[eval]' {' '.join(OTHERS)}"
    why = (
        "Install the wheel, which `python -m build` makes from a checkout, in an environment of its own. `[eval]` adds BLEU, chrF "
        "and ROUGE; torch and transformers are for the last step alone."
    )
    told = [(typed, why, "", time.monotonic() - began)]
    (place / "make_places.py").write_text(MAKE)
    (place / "open_it.py").write_text(OPEN)
    shell = {**os.environ, "HOME": str(folder), "XDG_CACHE_HOME": str(folder / ".cache"), "JAX_PLATFORMS": "cpu", "COLUMNS": "100"}
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
    for path, shown in ((folder / "place", ""), (folder, "~/")):
        output = output.replace(f"{path.resolve()}/", shown).replace(f"{path}/", shown)
    shown = re.sub(r"\x1b\[[\d;]*[A-Za-z]", "", output)
    return "\n".join(line for line in shown.splitlines() if "it/s]" not in line).strip("\n")  # without bars of progress


def page(told: list[tuple[str, str, str, float]], seconds: float, computed: float) -> str:
    """The transcript as a page."""
    cpus, python = os.cpu_count(), platform.python_version()
    took = f"{seconds / 60:.0f} minutes on {cpus} CPU cores ({computed / 60:.0f} minutes of CPU time)"
    lines = [
        "# The first hour",
        "",
        "<!-- written by scripts/first_hour.py, which runs every command again -->",
        f"What a newcomer types and reads: {took}, no GPU, Python {python}. Seconds in brackets are what a command took; the",
        "rest of the hour is reading.",
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
    lines += [
        "",
        "What now? [The tutorial](tutorial.md) does it in Python and looks inside; [pre-training](pretraining.md),",
        "[fine-tuning](finetuning.md) and [generation](generation.md) say all that there is to set.",
    ]
    return "\n".join(lines) + "\n"


def shortened(output: str) -> list[str]:
    """The beginning and the end of an output."""
    whole = ("{", "people", "places")  # what can be copied, as it is
    lines = [
        part
        for line in output.splitlines()
        for part in ([line] if line.startswith(whole) else textwrap.wrap(line, WIDTH, **WHOLE) or [""])
    ]
    half = LONGEST // 2
    return lines if len(lines) <= LONGEST else [*lines[:half], f"... {len(lines) - 2 * half} more lines ...", *lines[-half:]]


if __name__ == "__main__":
    if shutil.which("bash") is None:
        raise SystemExit("this needs bash")
    sys.exit(main())
