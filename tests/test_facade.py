"""`import flax_switch` costs next to nothing, and its names are there when they are asked for."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import flax_switch as fs

ROOT = Path(__file__).parents[1]


def test_importing_is_cheap_and_starts_no_jax():
    """As -X importtime says; the best of three, since a busy machine is slow for any import."""
    seconds = []
    for _ in range(3):
        command = [sys.executable, "-X", "importtime", "-c", "import flax_switch"]
        said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stderr
        assert not re.search(r"\| +(jax|flax|numpy|torch)$", said, re.MULTILINE)
        seconds.append(int(re.search(r"(\d+) \| flax_switch$", said, re.MULTILINE)[1]) / 1e6)
    assert min(seconds) < 0.3


@pytest.mark.parametrize("name", ["SwitchConfig", "PRESETS", "load_recipe"])
def test_configs_start_no_jax(name):
    code = f"import sys, flax_switch; flax_switch.{name}; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("name", fs.__all__)
def test_every_public_name_is_there_and_says_what_it_is(name):
    value = getattr(fs, name)
    assert name in dir(fs)
    assert name == "__version__" or isinstance(value, dict) or value.__doc__


def test_a_name_that_is_not_there_names_the_nearest():
    with pytest.raises(AttributeError, match="has no attribute 'load_pretraned'. Did you mean 'load_pretrained'"):
        _ = fs.load_pretraned
