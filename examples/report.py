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
        backends: which backend ran each operation of this package, as ``explain`` says.
    """

    facts: dict[str, object]
    rows: list[Row] = field(default_factory=list)
    second_rows: list[Row] = field(default_factory=list)
    switch_rows: list[SwitchRow] = field(default_factory=list)
    curves: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    backends: dict[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Where it ran, and by which backend: a picture travels without its files."""
        kinds = sorted(set(self.backends.values()))
        ran = ", ".join(f"{name} by {backend}" for name, backend in sorted(self.backends.items()))
        if len(kinds) == 1:
            ran = f"fused runs by the {kinds[0]} backend" + (", without a kernel" if kinds == ["torch"] else "")
        return "; ".join([f"on {self.facts.get('device', 'an unknown device')}", ran or "nothing fused"])

    @property
    def passed(self) -> bool:
        """Whether every check was met; a report without checks proves nothing."""
        return bool(self.checks) and all(check.passed for check in self.checks)


def tables(report: Report) -> list[str]:
    """Lay the report's rows out as Markdown tables; what did not happen has none."""
    parts = [
        (_HEADINGS, [row.cells() for row in report.rows]),
        # Only what the second task has: it was trained once, fused, and not timed.
        (("second task", *_HEADINGS[1:5]), [row.cells()[:5] for row in report.second_rows]),
        (_SWITCH_HEADINGS, [(row.way, _number(row.milliseconds, 3)) for row in report.switch_rows]),
    ]
    return [table(headings, rows) for headings, rows in parts if rows]


# Of the quotient of two medians to the median of quotients: below it nobody looks twice.
_DISAGREEMENT = 0.03


def notes(rows: Sequence[Row]) -> list[str]:
    """Explain each quotient that is another than that of the two medians beside it."""
    found = []
    unfused: dict[str, Row] = {}
    kinds = (("step", "milliseconds", "time_ratio"), ("forward", "forward_milliseconds", "forward_ratio"))
    for row in rows:
        beside = unfused.setdefault(row.method.partition(",")[0], row)
        for name, time, quotient in kinds:
            mine, theirs, shown = getattr(row, time), getattr(beside, time), getattr(row, quotient)
            if mine is None or theirs is None or shown is None:
                continue
            of_medians = mine / theirs
            if abs(of_medians / shown - 1) > _DISAGREEMENT or (of_medians > 1) != (shown > 1):
                found.append(
                    f"{row.method}: its quotient of a {name} is {shown:.2f}, the median over the turns, in which both "
                    f"ran one after the other; the two medians alone would give {of_medians:.2f}. Times changed while "
                    "it ran, and a change falls on both of a turn alike."
                )
    return found


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
    explained = "\n".join(f"- {note}" for note in notes(report.rows))
    parts = [report.title, *tables(report), explained, facts, checks]
    paths[0].write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    numbers = {**asdict(report), "passed": report.passed}
    paths[1].write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    draw(report, paths[2])
    return paths


def plain(value: object) -> str:
    """Write a fact for a reader: mappings and lists without brackets."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {plain(inner)}" for name, inner in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
