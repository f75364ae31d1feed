"""A hook of mkdocs: links to files of the repository that are no pages become the file's name."""

from __future__ import annotations

import posixpath
import re
from typing import Any

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(((?:\.\./)+[^)\s]*)\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace links that lead out of docs/; they work where the repository is read."""
    folder = posixpath.dirname(page.file.src_uri)

    def named(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[2].partition("#")[0]))
        return match[0] if not target.startswith("..") else f"{match[1]} (`{target.removeprefix('../')}`)"

    return LINK.sub(named, markdown)
