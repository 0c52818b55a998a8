"""What another runtime says of an exported model is what `generate` says, or the export is refused with the way out."""

import importlib.util

import numpy as np
import pytest
from models import MODELS, Model
from runtimes import NEEDS, RUNTIMES

from flax_switch.config import ConfigError
from flax_switch.export import FORMATS
from flax_switch.export.folder import export

QUICK = {("experts", "stablehlo"), ("dense (T5)", "onnx"), ("dense, gated, untied (T5 1.1)", "ctranslate2"), ("dense (T5)", "gguf-ready")}
CELLS = [
    pytest.param(name, to, marks=() if (name, to) in QUICK else pytest.mark.slow) for name in MODELS for to in FORMATS
]  # fmt: skip
SAME, REFUSED = "same tokens", "refused"


def outcome(name, to, place, count):
    """Exports a model and compares tokens; returns what the table says of it."""
    model = Model(name, place)
    try:
        folder = export(model.folder, place / "out", to=to)
    except ConfigError as error:
        assert "istil" in str(error) or "stablehlo" in str(error), "a refusal says what to do"
        assert not (place / "out").exists()
        return REFUSED
    sources = list(model.sources(count))
    wanted = [model.tokens(*source) for source in sources]
    assert len(np.unique(np.concatenate(wanted), axis=0)) > count / 4, "the model says different things"
    for ours, theirs in zip(wanted, RUNTIMES[to](folder, sources, place), strict=True):
        np.testing.assert_array_equal(theirs, ours)
    return SAME


@pytest.mark.parametrize(("name", "to"), CELLS)
def test_the_table_says_what_a_runtime_makes_of_a_model(name, to, tmp_path):
    if importlib.util.find_spec(NEEDS[to]) is None:
        pytest.skip(f"needs {NEEDS[to]}, which is not installed")
    assert outcome(name, to, tmp_path, count=100) == SAME
