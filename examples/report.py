"""What the demo leaves behind: a table (printed, and in Markdown), all numbers in JSON, and a picture of the curves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from examples.checks import Check, loss_tolerance

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TABLE_FILE = "table.md"
NUMBERS_FILE = "results.json"
PICTURE_FILE = "losses.png"

_HEADINGS = (
    "method",
    "trained parameters",
    "training loss",
    "held-out loss",
    "held-out accuracy",
    "ms a step",
    "peak memory",
    "fused / unfused",
)
_NONE = "-"
_SMOOTHED = 20


@dataclass(frozen=True)
class Row:
    """One line of the table; None is what a method does not have."""

    method: str
    parameters: int
    train_loss: float
    test_loss: float
    accuracy: float
    milliseconds: float | None = None
    peak_bytes: int | None = None
    time_ratio: float | None = None
    memory_ratio: float | None = None

    def cells(self) -> tuple[str, ...]:
        """Format the row for the table."""
        ratios = _NONE
        if self.time_ratio is not None and self.memory_ratio is not None:
            ratios = f"time {self.time_ratio:.2f}, memory {self.memory_ratio:.2f}"
        return (
            self.method,
            f"{self.parameters:,}",
            f"{self.train_loss:.4f}",
            f"{self.test_loss:.4f}",
            f"{self.accuracy:.2%}",
            _NONE if self.milliseconds is None else f"{self.milliseconds:.1f}",
            _NONE if self.peak_bytes is None else f"{self.peak_bytes / 2**20:.1f} MiB",
            ratios,
        )


@dataclass
class Report:
    """Everything that a run of the demo found out.

    Attributes:
        facts: environment, data and settings, for whoever reads the files later.
        curves: losses by method, then by "fused" and "unfused".
    """

    facts: dict[str, object]
    rows: list[Row] = field(default_factory=list)
    curves: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every check was met; a report without checks proves nothing."""
        return bool(self.checks) and all(check.passed for check in self.checks)


def table(rows: Sequence[Row]) -> str:
    """Lay rows out as a Markdown table whose columns stand under each other in a terminal too."""
    lines = [_HEADINGS, *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADINGS))]

    def lay(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([lay(lines[0]), rule, *map(lay, lines[1:])])


def write(report: Report, folder: Path) -> list[Path]:
    """Write the three files into an existing folder."""
    paths = [folder / name for name in (TABLE_FILE, NUMBERS_FILE, PICTURE_FILE)]
    facts = "\n".join(f"- {name}: {plain(value)}" for name, value in report.facts.items())
    checks = "\n".join(f"- {check}" for check in report.checks)
    paths[0].write_text(f"{table(report.rows)}\n\n{facts}\n\n{checks}\n", encoding="utf-8")
    numbers = {**asdict(report), "passed": report.passed}
    paths[1].write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    draw(report.curves, paths[2])
    return paths


def plain(value: object) -> str:
    """Write a fact for a reader: mappings and lists without brackets."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {plain(inner)}" for name, inner in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def draw(curves: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """Draw each method's losses, and below them the difference between fused and unfused with its bound."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        2,
        len(curves),
        figsize=(9.0 * len(curves), 6.0),
        height_ratios=(2.2, 1.0),
        sharex="col",
        squeeze=False,
        layout="constrained",
    )
    for (name, losses), above, below in zip(curves.items(), axes[0], axes[1], strict=True):
        _draw_losses(above, name, losses)
        _draw_difference(below, losses)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_losses(axes: Axes, name: str, losses: Mapping[str, Sequence[float]]) -> None:
    for values in losses.values():
        axes.plot(values, color="#8d99ae", linewidth=0.6, alpha=0.4)
    # One lies on the other: the lower line is broad and light, the upper one thin, dark and broken.
    axes.plot(running_mean(losses["unfused"]), color="#f4a259", linewidth=5.0, alpha=0.8, label="unfused")
    if "fused" in losses:
        dashes = (0, (4, 3))
        axes.plot(running_mean(losses["fused"]), color="#1d3557", linewidth=1.4, linestyle=dashes, label="fused")
    axes.set_title(f"{name}: training loss, mean of {_SMOOTHED} batches (thin grey: each batch)")
    axes.set_ylabel("cross-entropy")
    axes.set_ylim(bottom=0.0)
    axes.grid(alpha=0.25)
    axes.legend()


def running_mean(values: Sequence[float]) -> list[float]:
    """Average each value with those before it, as many as the picture smooths over."""
    windows = (values[max(0, end - _SMOOTHED) : end] for end in range(1, len(values) + 1))
    return [fmean(window) for window in windows]


def _draw_difference(axes: Axes, losses: Mapping[str, Sequence[float]]) -> None:
    axes.set_xlabel("step")
    if "fused" not in losses:
        axes.set_visible(False)
        return
    pairs = list(enumerate(zip(losses["fused"], losses["unfused"], strict=True)))
    # A logarithm has no place for zero: equal losses are counted in the legend instead.
    unequal = [(step, abs(f - u)) for step, (f, u) in pairs if f != u]
    axes.plot(
        [step for step, _ in unequal],
        [difference for _, difference in unequal],
        linestyle="none",
        marker=".",
        markersize=4,
        color="#1d3557",
        label=f"|fused - unfused|; equal to the bit at {len(pairs) - len(unequal)} of {len(pairs)} steps",
    )
    bounds = [loss_tolerance(step) * max(1.0, abs(u)) for step, (_, u) in pairs]
    axes.plot(bounds, color="#c1121f", linewidth=1.2, label="bound: above it the demo fails")
    axes.set_yscale("log")
    axes.set_ylabel("difference")
    axes.grid(alpha=0.25)
    axes.legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
