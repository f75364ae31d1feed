"""Pictures of recorded results: time, share of the roofline and memory of each problem, one line of dots a provider."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import record, tables
from benchmarks.family import Family

_MARKERS = "osD^vP"
# A page holds this many problems; a record may have hundreds, which the tables list.
MOST_ROWS = 60


def name(family: str, device: str, mode: str) -> str:
    """File name of the picture of one family on one device in one mode."""
    return f"{family}-{device}-{mode}.png"


def draw(
    results: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]], families: Mapping[str, Family], folder: Path
) -> list[Path]:
    """Draw each device, family and mode that has something to compare; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for (device, family), records in results.items():
        baselines = families[family].names("baseline")
        comparisons = tables.compare(records)
        for mode in record.MODES:
            rows = [
                comparison
                for comparison in comparisons
                if comparison.mode == mode and any(comparison.speed_up(baseline) is not None for baseline in baselines)
            ]
            if rows:
                title = f"{family}, {mode}, on {records[-1]['device']['name']}"
                path = folder / name(family, device, mode)
                _draw_one(rows[:MOST_ROWS], families[family], title, path)
                drawn.append(path)
    return drawn


def _draw_one(rows: Sequence[tables.Comparison], family: Family, title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (time, roofline, memory) = pyplot.subplots(
        1, 3, figsize=(13, 1.6 + 0.22 * len(rows)), sharey=True, layout="constrained"
    )
    everybody = family.names("limit", "baseline", "ours")
    # A provider looks the same in all three.
    looks = {provider: (_MARKERS[index % len(_MARKERS)], f"C{index % 10}") for index, provider in enumerate(everybody)}
    baselines = {provider: looks[provider] for provider in family.names("baseline")}
    _dots(time, rows, baselines, lambda row, baseline: row.speed_up(baseline))
    _dots(roofline, rows, looks, lambda row, provider: row.roofline_fraction(provider))
    _dots(memory, rows, baselines, lambda row, baseline: row.memory_ratio(baseline))
    for axes, text in (
        (time, "time of the baseline / ours (right of 1: ours is faster)"),
        (roofline, "share of the roofline (1 is the model's limit)"),
        (memory, "peak memory, ours / baseline (left of 1: ours is less)"),
    ):
        axes.axvline(1.0, color="grey", linewidth=1)
        axes.set_xlim(0.0, 1.05 * max(1.0, axes.dataLim.x1))
        axes.set_xlabel(text, fontsize=8)
        axes.legend(fontsize=7)
    time.set_yticks(list(range(len(rows))), [tables.label(row.problem) for row in rows], fontsize=7)
    time.invert_yaxis()
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _dots(
    axes: Any,
    rows: Sequence[tables.Comparison],
    looks: Mapping[str, tuple[str, str]],
    value: Callable[[tables.Comparison, str], float | None],
) -> None:
    """One marker for each provider and row that has a value."""
    for provider, (marker, colour) in looks.items():
        points = [(x, height) for height, row in enumerate(rows) if (x := value(row, provider)) is not None]
        if points:
            heights = [height for _, height in points]
            axes.plot([x for x, _ in points], heights, marker, color=colour, label=provider, markersize=4)
