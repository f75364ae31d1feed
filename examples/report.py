"""What the demo leaves behind: tables (printed, and in Markdown), all numbers in JSON, and a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from examples.checks import Check
from examples.switching import SwitchRow

TABLE_FILE = "table.md"
NUMBERS_FILE = "results.json"
PICTURE_FILE = "demo.png"

_HEADINGS = (
    "method",
    "trained parameters",
    "training loss",
    "held-out loss",
    "held-out accuracy",
    "ms a step",
    "ms a forward",
    "peak memory",
    "fused / unfused: step, forward, memory",
)
_SWITCH_HEADINGS = ("to have the other task's model", "ms")
_NONE = "-"


@dataclass(frozen=True)
class Row:
    """One line of the table; None is what a method does not have.

    Attributes:
        method: its name, and who made its layers, or what is served in its place.
        member_accuracy: of an ensemble, whose ``accuracy`` is that of its vote, the mean over the members.
        milliseconds: of a step: forward, backward, optimizer.
        forward_milliseconds: of a forward pass alone, without a graph.
        peak_bytes: of a forward and a backward pass.
        time_ratio, forward_ratio, memory_ratio: as parts of those of the unfused model.
    """

    method: str
    parameters: int | None
    train_loss: float | None
    test_loss: float
    accuracy: float
    member_accuracy: float | None = None
    milliseconds: float | None = None
    forward_milliseconds: float | None = None
    peak_bytes: int | None = None
    time_ratio: float | None = None
    forward_ratio: float | None = None
    memory_ratio: float | None = None

    def cells(self) -> tuple[str, ...]:
        """Format the row for the table."""
        ratios = (self.time_ratio, self.forward_ratio, self.memory_ratio)
        members = "" if self.member_accuracy is None else f" (members {self.member_accuracy:.2%})"
        return (
            self.method,
            _NONE if self.parameters is None else f"{self.parameters:,}",
            _number(self.train_loss, 4),
            _number(self.test_loss, 4),
            f"{self.accuracy:.2%}{members}",
            _number(self.milliseconds, 1),
            _number(self.forward_milliseconds, 1),
            _NONE if self.peak_bytes is None else f"{self.peak_bytes / 2**20:.1f} MiB",
            _NONE if ratios == (None, None, None) else ", ".join(_number(ratio, 2) for ratio in ratios),
        )


def _number(value: float | None, digits: int) -> str:
    return _NONE if value is None else f"{value:.{digits}f}"


@dataclass
class Report:
    """Everything that a run of the demo found out.

    Attributes:
        facts: environment, data and settings, for whoever reads the files later.
        rows: of the first task; second_rows of the second.
        switch_rows: times of changing between them.
        curves: losses by method, then by "fused" and "unfused".
    """

    facts: dict[str, object]
    rows: list[Row] = field(default_factory=list)
    second_rows: list[Row] = field(default_factory=list)
    switch_rows: list[SwitchRow] = field(default_factory=list)
    curves: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every check was met; a report without checks proves nothing."""
        return bool(self.checks) and all(check.passed for check in self.checks)


def tables(report: Report) -> list[str]:
    """Lay the report's rows out as Markdown tables."""
    return [
        table(_HEADINGS, [row.cells() for row in report.rows]),
        # Only what the second task has: it was trained once, fused, and not timed.
        table(("second task", *_HEADINGS[1:5]), [row.cells()[:5] for row in report.second_rows]),
        table(_SWITCH_HEADINGS, [(row.way, _number(row.milliseconds, 3)) for row in report.switch_rows]),
    ]


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay cells out as a Markdown table whose columns stand under each other in a terminal too."""
    lines = [headings, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]

    def lay(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([lay(lines[0]), rule, *map(lay, lines[1:])])


def write(report: Report, folder: Path) -> list[Path]:
    """Write the three files into an existing folder."""
    from examples.picture import draw

    paths = [folder / name for name in (TABLE_FILE, NUMBERS_FILE, PICTURE_FILE)]
    facts = "\n".join(f"- {name}: {plain(value)}" for name, value in report.facts.items())
    checks = "\n".join(f"- {check}" for check in report.checks)
    paths[0].write_text("\n\n".join([*tables(report), facts, checks]) + "\n", encoding="utf-8")
    numbers = {**asdict(report), "passed": report.passed}
    paths[1].write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    draw(report, paths[2])
    return paths


def plain(value: object) -> str:
    """Write a fact for a reader: mappings and lists without brackets."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {plain(inner)}" for name, inner in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
