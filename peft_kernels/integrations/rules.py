"""Why something is not fused, each reason stated once: for the code that decides, and for docs/integrations.md.

``python -m peft_kernels.integrations.rules docs/integrations.md`` writes the tables there.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path

BEGIN, END = "<!-- support:begin -->", "<!-- support:end -->"


@dataclass(frozen=True)
class Rule:
    """A reason for which another library's own code runs.

    Attributes:
        case: what it applies to, as the table says it.
        text: the reason that reports give; values stand in braces.
    """

    case: str
    text: str

    def __call__(self, **values: object) -> str:
        """Return the reason."""
        return self.text.format(**values)


@dataclass(frozen=True)
class Support:
    """What a file fuses, and its rules.

    Attributes:
        title: of the table.
        fused: what is, one case a line.
        rules: in the order that they are asked.
    """

    title: str
    fused: tuple[str, ...]
    rules: tuple[Rule, ...]


def support_table() -> str:
    """Return Markdown tables of what is fused of other libraries' models, and what falls back with which reason.

    Written from the rules that the code asks. Imports peft and transformers.
    """
    files = ("peft.layers", "peft.prompts", "peft.prefixes", "transformers.prefix_model", "adapterhub.rules")
    supports = [importlib.import_module(f"peft_kernels.integrations.{file}").SUPPORT for file in files]
    return "\n\n".join(_table(support) for support in supports) + "\n"


def _table(support: Support) -> str:
    rows = [f"| {case} | fused |" for case in support.fused]
    rows += [f"| {rule.case} | {_escaped(rule.text)} |" for rule in support.rules]
    return "\n".join(
        [f"### {support.title}", "", "| case | fused, or the reason in the report |", "| --- | --- |", *rows]
    )


def _escaped(text: str) -> str:
    """Values in braces as <values>, in code."""
    return "`" + text.replace("{", "<").replace("}", ">") + "`"


def with_tables(text: str) -> str:
    """Return a document with the tables between its two marks."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{support_table()}{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    document = Path(sys.argv[1])
    document.write_text(with_tables(document.read_text()))
