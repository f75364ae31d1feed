"""The picture: what each method reaches and costs, that fused and unfused are one curve, what a switch takes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING

from examples import labels
from examples.checks import loss_tolerance

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from examples.report import Report, Row
    from examples.switching import SwitchRow

_COLUMNS = 4
_SMOOTHED = 20
# Bars that are this much longer than the middle one end at the edge, with an arrow.
_OUTLIER = 2.0
_DARK, _LIGHT, _GREY, _RED = "#1d3557", "#f4a259", "#8d99ae", "#c1121f"


def draw(report: Report, path: Path) -> None:
    """Draw the report's rows, curves and switches into a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # The curves' panels, and one for the switch.
    lines = math.ceil((len(report.curves) + 1) / _COLUMNS)
    figure = plt.figure(figsize=(19.0, 6.0 + 3.4 * lines), layout="constrained")
    figure.suptitle(report.title, fontsize="large")
    grid = figure.add_gridspec(1 + lines, _COLUMNS, height_ratios=(1.6, *[1.0] * lines))
    colors = {name: plt.get_cmap("tab10")(number) for number, name in enumerate(report.curves)}

    accuracy = figure.add_subplot(grid[0, :2])
    named, rivals = _draw_accuracy(accuracy, report.rows, colors)
    _draw_ratios(figure.add_subplot(grid[0, 2]), report.rows)
    _draw_differences(figure.add_subplot(grid[0, 3]), report.curves, colors)
    panels = [figure.add_subplot(grid[1 + number // _COLUMNS, number % _COLUMNS]) for number in range(_COLUMNS * lines)]
    _draw_curves(panels, report.curves)
    used = len(report.curves)
    if report.switch_rows:
        _draw_switch(panels[used], report.switch_rows)
        used += 1
    for panel in panels[used:]:
        panel.set_visible(False)
    # Labels need to know where the points are.
    figure.draw_without_rendering()
    labels.place(accuracy, [*rivals, *named], [point for point, _ in named])
    _save(figure, path)
    plt.close(figure)


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=100)


def _method(row: Row) -> str:
    return row.method.partition(",")[0]


def _draw_accuracy(
    axes: Axes, rows: Sequence[Row], colors: Mapping[str, object]
) -> tuple[list[labels.Label], list[labels.Label]]:
    """Show accuracy against trained parameters, fused where that exists, for unfused is the same.

    Returns:
        Labels of the points, and those of what has no point.
    """
    axes.set_title("held-out accuracy against trained parameters")
    # The last of a method's trained rows is the fused one, where there is one.
    best = {_method(row): row for row in rows if row.milliseconds is not None and row.parameters is not None}
    named = []
    for name, row in best.items():
        color = colors.get(name, _DARK)
        axes.plot(row.parameters, row.accuracy, "o", color=color, markersize=10)
        named.append(((row.parameters, row.accuracy), f"{name} {row.accuracy:.1%}"))
        if row.member_accuracy is not None:
            axes.plot(row.parameters, row.member_accuracy, "o", color=color, fillstyle="none", markersize=8)
            named.append(((row.parameters, row.member_accuracy), f"its members {row.member_accuracy:.1%}"))
    if named:
        axes.set_xscale("log")
        parameters, values = zip(*(point for point, _ in named), strict=True)
        room = 0.3 * max(0.02, max(values) - min(values))
        axes.set_xlim(min(parameters) / 4, 8 * max(parameters))
        axes.set_ylim(min(values) - room, max(values) + room)
    rivals = _draw_rivals(axes, [row for row in rows if _method(row) not in colors])
    axes.set_xlabel("trained parameters, the classifier's included")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.1%}")
    axes.grid(alpha=0.25)
    return named, rivals


def _draw_rivals(axes: Axes, rows: Sequence[Row]) -> list[labels.Label]:
    """A line for each, on which its label stands. One far below would press the others together: it has none."""
    low, high = axes.get_ylim()
    line = 0.035 * (high - low)
    right, at = axes.get_xlim()[1], low + line
    named = []
    for row in rows:
        inside = low < row.accuracy < high
        if inside:
            axes.axhline(row.accuracy, color=_GREY, linestyle=":", linewidth=1.2)
        text = f"{row.method} {row.accuracy:.1%}" + ("" if inside else ": outside of this panel")
        named.append(((right, row.accuracy + line if inside else at), text))
        at += 0 if inside else 2 * line
    return named


def _across(axes: Axes) -> object:
    """x in parts of the panel, y in data."""
    return axes.get_yaxis_transform()


def _draw_ratios(axes: Axes, rows: Sequence[Row]) -> None:
    axes.set_title("fused as a part of unfused\n(left of the line: less)")
    compared = [row for row in rows if row.time_ratio is not None]
    kinds = (("time_ratio", "step", _DARK), ("forward_ratio", "forward", _GREY), ("memory_ratio", "memory", _LIGHT))
    longest = longest_bar([getattr(row, field) for row in compared for field, _, _ in kinds])
    for number, (field, label, color) in enumerate(kinds):
        values = [getattr(row, field) for row in compared]
        heights = [place + 0.27 * (number - 1) for place in range(len(compared))]
        bars = axes.barh(heights, [min(value, longest) for value in values], height=0.25, color=color, label=label)
        texts = [f" {value:.2f}" if value <= longest else f" \u2192 {value:.2f}" for value in values]
        axes.bar_label(bars, texts, fontsize="small")
    axes.axvline(1.0, color=_RED, linewidth=1.2)
    axes.set_xlim(0.0, 1.2 * longest)
    axes.set_yticks(range(len(compared)), [_method(row) for row in compared])
    axes.invert_yaxis()
    axes.legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, -0.2), ncols=3, frameon=False)


def longest_bar(values: Sequence[float]) -> float:
    """The length at which bars end: the longest of those that are no outliers, and no less than 1."""
    if not values:
        return 1.0
    bound = max(1.0, _OUTLIER * median(values))
    return max(1.0, *(value for value in values if value <= bound))


def _draw_differences(
    axes: Axes, curves: Mapping[str, Mapping[str, Sequence[float]]], colors: Mapping[str, object]
) -> None:
    axes.set_title("|fused - unfused| loss, as a part of its bound\n(above the line the demo fails)")
    for name, losses in curves.items():
        if "fused" not in losses:
            continue
        pairs = list(enumerate(zip(losses["fused"], losses["unfused"], strict=True)))
        # A logarithm has no place for zero: equal losses are counted in the legend instead.
        parts = [(step, abs(f - u) / max(1.0, abs(u)) / loss_tolerance(step)) for step, (f, u) in pairs if f != u]
        axes.plot(
            [step for step, _ in parts],
            [part for _, part in parts],
            linestyle="none",
            marker=".",
            markersize=4,
            color=colors[name],
            label=f"{name}; same bits {len(pairs) - len(parts)} of {len(pairs)}",
        )
    axes.axhline(1.0, color=_RED, linewidth=1.2)
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.grid(alpha=0.25)
    axes.legend(fontsize="x-small", loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)


def _draw_curves(panels: Sequence[Axes], curves: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    top = max((max(running_mean(losses["unfused"])) for losses in curves.values()), default=1.0)
    for axes, (name, losses) in zip(panels, curves.items(), strict=False):
        axes.plot(losses["unfused"], color=_GREY, linewidth=0.6, alpha=0.5)
        # One lies on the other: the lower line is broad and light, the upper one thin, dark and broken.
        axes.plot(running_mean(losses["unfused"]), color=_LIGHT, linewidth=5.0, alpha=0.8, label="unfused")
        if "fused" in losses:
            dashes = (0, (4, 3))
            axes.plot(running_mean(losses["fused"]), color=_DARK, linewidth=1.4, linestyle=dashes, label="fused")
        axes.set_title(name)
        axes.set_xlabel("step")
        axes.set_ylabel(f"loss, mean of {_SMOOTHED}")
        axes.set_ylim(0.0, 1.1 * top)
        axes.grid(alpha=0.25)
        axes.legend(fontsize="small")


def running_mean(values: Sequence[float]) -> list[float]:
    """Average each value with those before it, as many as the picture smooths over."""
    windows = (values[max(0, end - _SMOOTHED) : end] for end in range(1, len(values) + 1))
    return [fmean(window) for window in windows]


def _draw_switch(axes: Axes, rows: Sequence[SwitchRow]) -> None:
    axes.set_title("to have the other task's model, ms")
    bars = axes.barh(range(len(rows)), [row.milliseconds for row in rows], color=_DARK, height=0.35)
    axes.bar_label(bars, [f" {row.milliseconds:.3g}" for row in rows])
    for place, row in enumerate(rows):
        axes.text(0.01, place - 0.32, row.way, transform=_across(axes), fontsize="small")
    axes.set_yticks([])
    axes.set_ylim(len(rows) - 0.5, -0.7)
    axes.set_xscale("log")
    axes.margins(x=0.2)
