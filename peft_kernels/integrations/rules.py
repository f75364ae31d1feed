"""Why something is not fused, each reason stated once: for the code that decides, and for docs/integrations.md.

``python -m peft_kernels.integrations.rules docs/integrations.md`` writes the tables there.
"""

from __future__ import annotations

import importlib
import re
import sys
from dataclasses import dataclass, field
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
    """What a file fuses, and its rules, which are made here so that none is left out of the table.

    Attributes:
        title: of the table.
        fused: what is, one case a line.
        rules: in the order that they are asked.
    """

    title: str
    fused: tuple[str, ...] = ()
    rules: list[Rule] = field(default_factory=list)

    def rule(self, case: str, text: str) -> Rule:
        """Make the next rule."""
        self.rules.append(Rule(case, text))
        return self.rules[-1]


def support_table() -> str:
    """Return Markdown tables of what is fused of other libraries' models, and what falls back with which reason.

    Written from the rules that the code asks. Imports every file that has some, and with them peft and transformers.
    """
    folder, supports = Path(__file__).parent, []
    for path in folder.rglob("*.py"):
        text = path.read_text()
        names = re.findall(r"^(\w+) = Support\(", text, re.MULTILINE)
        # A file may add a rule to another one's.
        if names or re.search(r"^\w+ = \w+\.rule\(", text, re.MULTILINE):
            dotted = ".".join(("peft_kernels.integrations", *path.relative_to(folder).with_suffix("").parts))
            module = importlib.import_module(dotted)
            supports += [getattr(module, name) for name in names]
    return "\n\n".join(map(_table, sorted(supports, key=lambda support: support.title))) + "\n"


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
