"""What mkdocs does besides: files of the repository that a page links to are put on the site, and the links point there.

Pages are read in the repository as well, where `../configs/tiny.py` is right; a folder's link leads to the reference.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\(((?:\.\./)+[\w./-]+)\)")
FOLDER = "source"
PICTURES = (".png", ".svg")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Returns a page with its links to the repository's files turned into links to the site's copies of them."""
    from mkdocs.structure.files import File

    here = Path(config["docs_dir"], page.file.src_uri).parent
    up = "../" * page.file.src_uri.count("/")

    def replaced(match: re.Match[str]) -> str:
        target = (here / match[1]).resolve()
        if target.is_relative_to(config["docs_dir"]):
            return match[0]
        if target.is_dir():
            return f"]({up}reference.md)"
        picture = target.suffix in PICTURES
        name = f"{FOLDER}/{target.relative_to(ROOT).as_posix()}{'' if picture else '.txt'}"  # which a browser shows
        if files.get_file_from_path(name) is None:
            files.append(File.generated(config, name, content=target.read_bytes()))
        return f"]({up}{name})"

    return LINK.sub(replaced, markdown)
