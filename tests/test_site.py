"""The documentation's site: every page is in its menu, every public name in the reference, every link leads somewhere."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from documented.notebooks import NOTEBOOKS, cells, run_notebook

import flax_switch as fs

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for pattern in ("*.md", "*.ipynb") for path in DOCS.rglob(pattern))


class Loader(yaml.SafeLoader):
    """Reads mkdocs.yml, whose tag for a Python name is mkdocs' own."""


Loader.add_multi_constructor("tag:yaml.org,2002:python/name:", lambda loader, suffix, node: suffix)
SETTINGS = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)


def pages_of(menu):
    if isinstance(menu, str):
        return [menu]
    entries = menu.values() if isinstance(menu, dict) else menu
    return [page for entry in entries for page in pages_of(entry)]


def test_the_menu_has_every_page_once():
    assert sorted(pages_of(SETTINGS["nav"])) == PAGES


def test_the_reference_has_every_public_name():
    identifiers = re.findall(r"^::: ([\w.]+)$", (DOCS / "reference.md").read_text(encoding="utf-8"), re.MULTILINE)
    named = {identifier.rpartition(".")[2] for identifier in identifiers}
    assert set(fs.__all__) - {"__version__"} <= named
    for identifier in identifiers:
        module, _, name = identifier.rpartition(".")
        found = importlib.util.find_spec(identifier) if module.count(".") == 1 and name.islower() else None
        assert found or hasattr(importlib.import_module(module), name), identifier


LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)(?:#[\w-]+)?\)")


@pytest.mark.parametrize("page", [*PAGES, "../README.md"])
def test_links_lead_to_files(page):
    path = DOCS / page
    texts = cells(path, "markdown") if path.suffix == ".ipynb" else [path.read_text(encoding="utf-8")]
    for link in (link for text in texts for link in LINK.findall(text)):
        assert (path.parent / link).exists(), f"{page}: {link}"


def test_the_readme_names_every_page_that_a_user_looks_for():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [
        page for page in PAGES if page.startswith(("coming", "t5", "tutorial", "custom")) and f"docs/{page}" not in readme
    ] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_small_and_holds_no_outputs(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert path.stat().st_size < 20_000
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
    for text in cells(path, "code"):
        compile(text, path.name, "exec")


@pytest.mark.slow
def test_the_first_notebook_runs_and_its_models_learn(tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    names = run_notebook(DOCS / "notebooks" / "first_mixture.ipynb", tmp_path)
    for history in (names["history"], names["twin_history"]):
        assert history[-1]["cross_entropy"] < 0.5 * history[0]["cross_entropy"]


@pytest.mark.slow
def test_the_notebook_on_routing_runs_and_says_what_is_so(tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    names = run_notebook(DOCS / "notebooks" / "routing.ipynb", tmp_path)
    assert float(names["metrics"]["cross_entropy"]) < 1.0
    assert names["dropped"]["encoder"] > 0  # the last factor, 0.5, has no room for all
    assert sum(names["drops"]) == 0  # dropless
    assert names["counts"].sum() == sum(len(names["vocabulary"].encode(text)) for text in names["sentences"][:40])


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("mkdocstrings") is None:
        pytest.skip("mkdocs is not installed: pip install 'flax_switch[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
