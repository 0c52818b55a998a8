"""The corpus of source code: definitions are documents, copies go, and a part of it is drawn by hash."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "data"))

import source_code  # noqa: E402 - scripts are no package

LONG = "    " + "x + " * 60 + "x"


def test_definitions_are_documents_with_their_decorators_and_without_empty_lines():
    source = f"import a\n\n@cached\ndef f():\n\n{LONG}\n\n\nclass C:\n{LONG}\n\n    def g(self):\n        pass\n"
    assert list(source_code.documents_of(source)) == [
        f"@cached\ndef f():\n{LONG}", f"class C:\n{LONG}\n    def g(self):\n        pass",
    ]  # fmt: skip


def test_a_copy_is_left_out_and_half_of_the_characters_are_drawn():
    documents = [f"def f{i}():\n{LONG}" for i in range(400)]
    assert list(source_code.without_copies(iter([*documents, *documents[:9]]))) == documents
    half = source_code.at_most(documents, sum(map(len, documents)) // 2)
    assert 150 < len(half) < 250 and half == source_code.at_most(documents, sum(map(len, documents)) // 2)
    assert source_code.at_most(documents, None) == documents


def test_the_script_reads_folders_and_leaves_out_what_is_no_text(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.py").write_text(f"def f():\n{LONG}\n\n\ndef g():\n{LONG}\n")
    (tmp_path / "in" / "b.py").write_bytes(b"\xff\xfe" * 400)
    command = [sys.executable, ROOT / "scripts/data/source_code.py", tmp_path / "out", "--folders", tmp_path / "in"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.startswith("2 documents")
    assert (tmp_path / "out" / "code.txt").read_text() == f"def f():\n{LONG}\n\ndef g():\n{LONG}\n"
