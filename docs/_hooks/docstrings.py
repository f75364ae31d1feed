"""An extension of griffe: docstrings are plain text, and what builds the pages reads Markdown and Google's style."""

from __future__ import annotations

import re
from typing import Any

import griffe

CODE = re.compile(r"(``[^`]*``|`[^`]*`)")


class Docstrings(griffe.Extension):
    """Renames the section that Google's style calls "Examples", which is shown as code, and escapes stars before it."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text, section, example = obj.docstring.value.partition("\nExample:\n")
            parts = CODE.split(text)  # code stands at the odd places
            parts[::2] = [part.replace("*", r"\*") for part in parts[::2]]
            obj.docstring.value = "".join(parts) + section.replace("Example", "Examples") + example
