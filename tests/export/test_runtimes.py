"""What another runtime says of an exported model is what `generate` says, or the export is refused with the way out."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from models import MODELS, Model
from runtimes import NEEDS, RUNTIMES, stablehlo

from flax_switch.config import ConfigError
from flax_switch.export import FORMATS
from flax_switch.export.folder import export

PAGE = Path(__file__).parents[2] / "docs/export.md"
SAME, REFUSED = "same tokens", "refused"


def documented():
    """The table of docs/export.md: what it says of each model and format."""
    rows = [
        [cell.strip() for cell in line.strip("|\n").split("|")] for line in PAGE.read_text().splitlines() if line.startswith("| ")
    ]
    head = next(row for row in rows if tuple(row[1:]) == FORMATS)
    return {
        (row[0], to): cell for row in rows[rows.index(head) + 1 :][: len(MODELS)] for to, cell in zip(FORMATS, row[1:], strict=True)
    }


TABLE = documented()
QUICK = {("experts", "stablehlo"), ("dense (T5)", "gguf-ready"), ("dense (T5)", "onnx"), ("dense (T5)", "ctranslate2")}
CELLS = [
    pytest.param(*cell, marks=() if cell in QUICK or said == REFUSED else pytest.mark.slow) for cell, said in TABLE.items()
]  # fmt: skip


def outcome(name, to, place, count):
    """Exports a model and compares tokens; returns what the table says of it."""
    model = Model(name, place)
    try:
        folder = export(model.folder, place / "out", to=to)
    except ConfigError as error:
        assert "istil" in str(error), "a refusal says what to do"
        assert not (place / "out").exists()
        return REFUSED
    sources = list(model.sources(count))
    wanted = [model.tokens(*source) for source in sources]
    assert len(np.unique(np.concatenate(wanted), axis=0)) > count / 4, "the model says different things"
    for ours, theirs in zip(wanted, RUNTIMES[to](folder, sources, place), strict=True):
        np.testing.assert_array_equal(theirs, ours)
    return SAME


def test_the_table_has_every_model_and_format():
    assert TABLE.keys() == {(name, to) for name in MODELS for to in FORMATS} and set(TABLE.values()) == {SAME, REFUSED}


@pytest.mark.filterwarnings("ignore")  # of other projects
@pytest.mark.parametrize(("name", "to"), CELLS)
def test_a_runtime_says_what_the_table_says_of_a_model(name, to, tmp_path):
    if TABLE[name, to] == SAME and importlib.util.find_spec(NEEDS[to]) is None:
        pytest.skip(f"needs {NEEDS[to]}: see docs/export.md")
    assert outcome(name, to, tmp_path, count=100) == TABLE[name, to]


def installed(folder, *packages):
    """Installs packages into an environment of its own, whose Python it returns."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--retries", "0", *packages]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no index to install {', '.join(packages)} from: {done.stderr[-300:]}")
    return python


@pytest.mark.slow
def test_a_fresh_environment_with_jax_and_flatbuffers_alone_says_the_same(tmp_path, capfd):
    pytest.importorskip("flatbuffers")
    model = Model("experts", tmp_path)
    folder, sources = export(model.folder, tmp_path / "out", to="stablehlo"), list(model.sources(100))
    python = installed(tmp_path / "fresh", f"jax=={jax.__version__}")
    with pytest.raises(subprocess.CalledProcessError):
        stablehlo(folder, sources, tmp_path, python)
    assert "Please install 'flatbuffers'" in capfd.readouterr().err, "what docs/export.md says is wanted beside JAX"
    python = installed(tmp_path / "fresh", "flatbuffers")
    for (ids, mask), found in zip(sources, stablehlo(folder, sources, tmp_path, python), strict=True):
        np.testing.assert_array_equal(found, model.tokens(ids, mask))
    frozen = subprocess.run([python, "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True, check=True).stdout
    assert "flax" not in frozen.lower()
