"""English prose out of documentation text: reST markup, code, tables and parameter lists are left behind."""

from __future__ import annotations

import re
import unicodedata

# Sections of numpydoc and Google docstrings that hold no prose. They last until the next heading.
_SKIPPED_SECTIONS = re.compile(
    r"(args|arguments|parameters|other parameters|returns?|yields?|raises|attributes|methods|see also|references|examples?|"
    r"usage|warns|example usage|type parameters|keyword arguments|kwargs|citation|bibliography)\s*:{0,2}$",
    re.IGNORECASE,
)
_UNDERLINE = re.compile(r"([-=~*^\"'#+.])\1{2,}$")
_CODE_LINE = re.compile(
    r"(>>>|\.\.\.( |$)|\$ |\$>|%|#|@\w|\.\. |:\w[^:]*:|[-*+|] ?[-=+|]{2,}|\w+\s*=[^=]|\||import |from \w+ import )"
)
_BULLET = re.compile(r"^([-*+]|\(?\d+[.)]|\[\d+\])\s+")
_SENTENCE_END = (".", "!", "?", ".)", '."', ".'")

_INLINE = (
    (re.compile(r"(?::[\w+.-]+)+:`~?!?([^`<]*?)\s*(?:<[^`>]*>)?`"), r"\1"),  # :role:`text <target>`
    (re.compile(r"`([^`<]+?)\s*<[^`>]*>`_{0,2}"), r"\1"),  # `text <url>`_
    (re.compile(r"``([^`]*)``"), r"\1"),
    (re.compile(r"`([^`]*)`_{0,2}"), r"\1"),
    (re.compile(r"\*\*([^*]+)\*\*"), r"\1"),
    (re.compile(r"(?<![\w*])\*([^*\s](?:[^*]*[^*\s])?)\*(?![\w*])"), r"\1"),
    (re.compile(r"\s*\[[\w#*-]+\]_"), ""),  # footnote and citation marks
    (re.compile(r"::(?=\s|$)"), ":"),
    (re.compile(r"\s+"), " "),
)
_ASCII = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": " - ", "\u2212": "-"})
_WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?[,.;:!?)\"']*$|\([A-Za-z]+[,.;:!?)\"']*$|-$|\d+[,.;:)]*$")


def plain(text: str) -> str:
    """Returns a paragraph without inline reST markup, on one line, in ASCII where an equivalent exists."""
    text = unicodedata.normalize("NFKC", text).translate(_ASCII)
    for pattern, replacement in _INLINE:
        text = pattern.sub(replacement, text)
    return text.strip()


def is_prose(paragraph: str) -> bool:
    """Returns whether a plain paragraph reads as English sentences: mostly dictionary-like words, a capital, a full stop."""
    if not paragraph.isascii() or not (paragraph[:1].isupper() or paragraph[:1] in "\"'(") or "\\" in paragraph:
        return False
    if not paragraph.endswith(_SENTENCE_END) or "://" in paragraph or "::=" in paragraph or "->" in paragraph:
        return False
    words = paragraph.split()
    plain_words = sum(1 for word in words if _WORD.match(word))
    return len(words) >= 6 and plain_words >= 0.8 * len(words)


def _blocks(text: str) -> list[list[str]]:
    """Runs of lines between blank lines, each also broken where the indentation changes or a list item begins."""
    blocks: list[list[str]] = [[]]
    indent, hanging = None, False
    for line in text.expandtabs().splitlines():
        stripped = line.strip()
        here = len(line) - len(line.lstrip())
        bullet = bool(_BULLET.match(stripped))
        if not stripped or bullet or (indent is not None and here != indent and not hanging):
            blocks.append([])
        hanging = bullet or stripped.startswith(".. [")  # the lines under a bullet or footnote are indented more than it is
        indent = here if stripped else None
        if stripped:
            blocks[-1].append(line.rstrip())
    return [block for block in blocks if block]


def paragraphs(text: str) -> list[str]:
    """Returns the paragraphs of prose in a documentation text, in order, plain, each on one line."""
    found = []
    skipping_deeper_than = None  # indentation of the heading of a skipped section
    for block in _blocks(text):
        indent = len(block[0]) - len(block[0].lstrip())
        lines = [line.strip() for line in block]
        underlined = len(lines) >= 2 and _UNDERLINE.match(lines[1])
        if underlined:  # a heading: numpydoc's or reST's
            skipping_deeper_than = indent - 1 if _SKIPPED_SECTIONS.match(lines[0]) else None
            lines = lines[2:]
        elif _SKIPPED_SECTIONS.match(lines[0]) and lines[0].endswith(":"):  # Google's
            skipping_deeper_than = indent
            continue
        elif skipping_deeper_than is not None and indent <= skipping_deeper_than:
            skipping_deeper_than = None
        if skipping_deeper_than is not None or not lines or any(_CODE_LINE.match(line) for line in lines):
            continue
        paragraph = plain(_BULLET.sub("", " ".join(lines), count=1))
        if is_prose(paragraph):
            found.append(paragraph)
    return found
