"""The embedded corpus: what is kept of documentation, and what this installation yields."""

import re
import sys
import time
from collections import Counter

import pytest

from flax_switch.config import ConfigError
from flax_switch.data import corpus, prose

DOCSTRING = """Return the *largest* item of :func:`~itertools.chain`, or of a ``deque`` [1]_.

    Two lines of an indented paragraph are joined,
    and “quotes” become plain ones.

.. versionadded:: 3.4

.. [1] The Author of This Footnote. "An article about it", Some Journal,
       Another line of the footnote that reads well enough.

    >>> print("Code is left out of the corpus altogether, prose or not.")
    Its output is left out of the corpus too, even when it reads well.

- A list item keeps its text when the text is a sentence
  that goes on in the next line.
- But not this one

+-------+-------+
| Table | cells |
+-------+-------+

The result is computed as::

    result = function(argument)

Parameters
----------
x : array_like
    The description of a parameter is part of a list and is left out.

Notes
-----
The notes section of a docstring is prose and it is kept.

Examples
--------
The text between examples is left out with them, as it refers to code.
"""

GOOGLE = """Does something that takes one whole sentence to say.

Args:
  first: The first argument has a description of its own.
  second: The second argument has a description, too.

  A second paragraph about the arguments is skipped with them.

Returns:
  What is returned is described here at some length.

The last paragraph stands outside of any section again.
"""


def test_prose_is_kept_and_markup_code_tables_and_parameters_are_not():
    assert prose.paragraphs(DOCSTRING) == [
        "Return the largest item of itertools.chain, or of a deque.",
        'Two lines of an indented paragraph are joined, and "quotes" become plain ones.',
        "A list item keeps its text when the text is a sentence that goes on in the next line.",
        "The notes section of a docstring is prose and it is kept.",
    ]


def test_google_s_sections_are_left_out_until_the_text_is_outdented():
    assert prose.paragraphs(GOOGLE) == [
        "Does something that takes one whole sentence to say.",
        "The last paragraph stands outside of any section again.",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "too short.",
        "lower case begins a fragment of some other sentence here.",
        "A sentence that never comes to its end because it is cut",
        "See https://docs.python.org/3/ for more about this and other things.",
        "x = f(y) + g(z) * 3 - h_1(k_2) / q_3[4:5] == 0 != t.",
        "Der Größe nach geordnete Wörter sind hier kein Englisch.",
        r"The value \alpha of the formula is not a word of English.",
    ],
)
def test_what_does_not_read_as_english_sentences_is_left_out(text):
    assert prose.paragraphs(text) == []


def test_a_paragraph_is_kept_only_where_it_first_stands():
    documents = [
        ["One thing is said.", "Another thing is said."],
        ["ONE thing, is said!"],
        ["A third.", "another Thing is said."],
    ]
    assert corpus.deduplicated(documents) == ["One thing is said. Another thing is said.", "A third."]


@pytest.fixture(scope="module")
def extracted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("default")
    start = time.process_time()
    documents = corpus.default_corpus(folder)
    return documents, time.process_time() - start, folder


def test_the_default_corpus_is_two_megabytes_of_distinct_documents_within_seconds(extracted):
    documents, seconds, _ = extracted
    assert sum(map(len, documents)) > 2_000_000
    assert len(documents) > 8_000 and len(set(documents)) == len(documents)
    assert seconds < 30  # of processor time, and half of that where no others share it


def test_the_default_corpus_reads_as_english(extracted):
    text = "\n".join(extracted[0])
    assert text.isascii()
    letters = sum(character.isalpha() or character == " " for character in text)
    assert letters > 0.93 * len(text)
    common = [word for word, _ in Counter(re.findall(r"[a-z]+", text.lower())).most_common(12)]
    assert {"the", "of", "to", "is", "and", "in"} <= set(common)
    for markup in (">>>", "``", ":func:", "\n..", "-----"):
        assert markup not in text


def test_the_default_corpus_is_extracted_once_and_always_the_same(extracted, monkeypatch):
    documents, _, folder = extracted

    def again():
        raise AssertionError("extracted a second time")

    with monkeypatch.context() as patched:
        patched.setattr(corpus, "extract", again)
        assert corpus.default_corpus(folder) == documents
    topics = [text for text, _ in zip(corpus._texts(), range(200), strict=False)]
    assert topics == [text for text, _ in zip(corpus._texts(), range(200), strict=False)]


def test_one_changed_byte_of_the_kept_corpus_is_noticed(extracted, tmp_path):
    (kept,) = extracted[2].iterdir()
    for place, byte in ((1000, b"\xff"), (1000, b"Q"), (3, b"Q")):
        content = bytearray(kept.read_bytes())
        content[place : place + 1] = byte
        (tmp_path / kept.name).write_bytes(content)
        with pytest.raises(ConfigError, match="have changed; delete that file and it is made anew"):
            corpus.default_corpus(tmp_path)


def test_nothing_is_imported_to_read_documentation(tmp_path, monkeypatch):
    package = tmp_path / "explosive"
    package.mkdir()
    (package / "__init__.py").write_text(
        '"""Reading this docstring runs no code at all.' + " Really." * 9 + '"""\nraise Exception\n'
    )
    (package / "broken.py").write_text('"""This file does not parse, which is no reason to stop."""\ndef (:\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(corpus, "DEPENDENCIES", {"explosive": "explosive", "absent_package": "absent"})
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda _: str(tmp_path / "nowhere"))
    texts = list(corpus._texts())
    assert len(texts) == 1 and texts[0].startswith("Reading this docstring runs no code at all.")
    assert "explosive" not in sys.modules


def test_documentation_is_looked_for_in_packages_only_and_those_that_are_missing_are_passed_over(monkeypatch):
    monkeypatch.setattr(corpus, "DEPENDENCIES", ("json", "bisect", "a_package_that_nobody_has"))
    monkeypatch.setattr(corpus, "_topics", lambda path: [])
    monkeypatch.setattr(corpus, "_docstrings", lambda root: [root.name])
    library, *packages = corpus._texts()
    assert library.startswith("python3") and packages == ["json"]


def test_documents_by_origin_are_those_of_the_corpus_and_a_paragraph_belongs_to_the_first_that_has_it(monkeypatch):
    shared, mine = "A sentence that two packages have in their documentation.", "A sentence that one of the two packages has alone."
    origins = {"one": [shared], "two": [shared, mine]}
    monkeypatch.setattr(corpus, "_origins", lambda: ((name, iter(texts)) for name, texts in origins.items()))
    assert corpus.by_origin() == {"one": [shared], "two": [mine]}
    assert corpus.extract() == [shared, mine]


def test_an_installation_without_documentation_is_an_error_that_points_to_own_files(monkeypatch, tmp_path):
    monkeypatch.setattr(corpus, "_texts", lambda: iter(["A sentence of some few words only."]))
    with pytest.raises(ConfigError, match="almost no documentation .* set data.source"):
        corpus.default_corpus(tmp_path)
    assert list(tmp_path.iterdir()) == []
