"""Preparing data starts neither JAX nor Flax."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import flax_switch.data

FORBIDDEN = {"jax", "jaxlib", "flax", "optax", "torch", "tensorflow", "transformers"}


def run(script: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_and_its_data_modules_brings_in_neither_jax_nor_flax():
    modules = run("import flax_switch, flax_switch.data, flax_switch.config, sys; print('\\n'.join(sys.modules))").split()
    assert "flax_switch.data.pipeline" in modules
    assert not FORBIDDEN & set(modules)


def test_the_whole_pipeline_works_where_jax_and_flax_cannot_be_imported(config):
    script = """
import json, sys
for name in ("jax", "jaxlib", "flax"):
    sys.modules[name] = None  # importing them is an ImportError now
from flax_switch.config import DataConfig
from flax_switch.data import prepare
prepared = prepare(DataConfig.from_dict(json.loads(sys.argv[1])), quiet=True)
print(next(prepared.train_iterator())["input_ids"].shape, round(prepared.heldout_unigram_entropy(), 1))
"""
    assert run(script, json.dumps(config.to_dict())).startswith("(8, 32) ")


def test_data_modules_import_only_config_and_host_of_the_rest_of_the_package():
    for path in Path(flax_switch.data.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                assert name.split(".")[0] not in FORBIDDEN, path
                if name.split(".")[0] == "flax_switch":
                    assert name.split(".")[1] in ("config", "data", "host"), (path, name)


def test_public_names_are_found_when_first_used():
    import flax_switch

    assert set(flax_switch.__all__) <= set(dir(flax_switch))
    assert all(getattr(flax_switch, name) is not None for name in ("SwitchConfig", "PRESETS", "ConfigError"))
