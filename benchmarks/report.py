"""``python -m benchmarks.report [--check] [--images]``: README.md's tables, and pictures, from the recorded results."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import record, tables
from benchmarks.family import Family, discover

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
IMAGES = ROOT / "docs" / "images"
BEGIN = "<!-- benchmarks:begin -->"
END = "<!-- benchmarks:end -->"


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite the tables; with --check only say whether they are what the records give."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Write tables from the records.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if the README is out of date")
    parser.add_argument("--images", action="store_true", help="also draw docs/images")
    parser.add_argument("--results", type=Path, default=record.RESULTS, help="folder of the records")
    parser.add_argument("--readme", type=Path, default=README)
    options = parser.parse_args(arguments)

    families = discover()
    results = load_results(options.results)
    before = options.readme.read_text()
    try:
        after = replace_part(before, render(results, families))
    except ValueError as error:
        print(f"{options.readme}: {error}", file=sys.stderr)
        return 1
    if options.check:
        if before != after:
            print(f"{options.readme} is not what the records give; run `python -m benchmarks.report`", file=sys.stderr)
        return int(before != after)
    options.readme.write_text(after)
    if options.images:
        for path in draw(results, families, IMAGES):
            print(path)
    return 0


def load_results(folder: Path) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Read every file of records, by device and family."""
    return {(path.parent.name, path.stem): record.load(path) for path in sorted(folder.glob("*/*.jsonl"))}


def replace_part(text: str, part: str) -> str:
    """Put a part between the two marks of a text.

    Raises:
        ValueError: the marks are not there once each, in this order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"needs {BEGIN} and, after it, {END}, once each")
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n{part.strip()}\n{END}{tail}"


def render(results: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]], families: Mapping[str, Family]) -> str:
    """Lay out all results as Markdown, GPUs before CPUs."""
    parts = [
        _render_one(records, families[family])
        for (_, family), records in sorted(results.items(), key=lambda item: (not _is_cuda(item[1]), item[0]))
        if records
    ]
    return "\n\n".join(parts) if parts else "No measurements are recorded yet."


def _render_one(records: Sequence[Mapping[str, Any]], family: Family) -> str:
    comparisons = tables.compare(records)
    used = {comparison.run for comparison in comparisons}
    sessions = {line["run"]: line for line in records if line["run"] in used}
    providers = [provider.name for provider in family.providers]
    baselines = [provider.name for provider in family.providers if provider.role in ("limit", "baseline")]
    latest = sessions[max(sessions)]
    rows = [comparison for comparison in comparisons if comparison.best("limit") is not None]
    return "\n\n".join(
        [
            f"### {family.name} on {latest['device']['name']}",
            "\n".join(f"* {_provenance(sessions[run])}" for run in sorted(sessions)),
            "Ours is the fastest backend of this package; a number above 1 means that ours takes less time. "
            "Medians over the problems, least and largest in brackets.",
            tables.summary_table(comparisons, family.summarize_by, baselines),
            _losses(comparisons),
            f"<details><summary>All {len(rows)} measurements</summary>",
            tables.problem_table(rows, providers) if rows else "None.",
            "</details>",
        ]
    )


def _losses(comparisons: Sequence[tables.Comparison]) -> str:
    lost = tables.losses(comparisons)
    if not lost:
        return "No baseline is faster on any of these problems."
    lines = [
        f"* {tables.label(comparison.problem)}, {comparison.mode}: {baseline} takes {ratio:.2f} of our time"
        for comparison, baseline, ratio in lost
    ]
    return f"A baseline is faster in {len(lost)} of {len(comparisons)} measurements:\n\n" + "\n".join(lines)


def _provenance(line: Mapping[str, Any]) -> str:
    device, versions, ceilings = line["device"], line["versions"], line["ceilings"]
    commit = line["commit"][:12] if line["commit"] is not None else "unknown"
    changed = " with uncommitted changes" if line["dirty"] else ""
    parts = [
        f"{line['run'][:10]}, commit {commit}{changed}",
        f"torch {versions['torch']}",
        *(f"{name} {versions[name]}" for name in ("triton", "peft") if versions[name] is not None),
    ]
    if device["driver"] is not None:
        parts.append(f"driver {device['driver']}")
    if device["sm_clock_mhz"] is not None:
        parts.append(f"{device['sm_clock_mhz']:.0f} of {device['max_sm_clock_mhz']:.0f} MHz under load")
    rates = ", ".join(f"{name} {rate / 1e12:.2f}" for name, rate in ceilings["matmul_flops_per_s"].items())
    parts.append(f"measured ceilings: copy {ceilings['copy_bytes_per_s'] / 1e12:.3f} TB/s, products {rates} TFLOP/s")
    return "; ".join(parts)


def _is_cuda(records: Sequence[Mapping[str, Any]]) -> bool:
    return any(line["device"]["type"] == "cuda" for line in records)


def draw(
    results: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]], families: Mapping[str, Family], folder: Path
) -> list[Path]:
    """Draw, for each device and family, the speed-up of every problem over every baseline; return the files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for (device, family), records in results.items():
        baselines = [provider.name for provider in families[family].providers if provider.role == "baseline"]
        for mode in record.MODES:
            rows = [
                comparison
                for comparison in tables.compare(records)
                if comparison.mode == mode and any(comparison.speed_up(name) is not None for name in baselines)
            ]
            if not rows:
                continue
            figure, axes = pyplot.subplots(figsize=(9, 1.5 + 0.22 * len(rows)), layout="constrained")
            heights = range(len(rows))
            for name, marker in zip(baselines, "osD^v", strict=False):
                points = [
                    (ratio, height)
                    for row, height in zip(rows, heights, strict=True)
                    if (ratio := row.speed_up(name)) is not None
                ]
                axes.plot([x for x, _ in points], [y for _, y in points], marker, label=name, markersize=5)
            axes.axvline(1.0, color="grey", linewidth=1)
            axes.set_yticks(list(heights), [tables.label(row.problem) for row in rows], fontsize=7)
            axes.invert_yaxis()
            axes.set_xlabel(f"time of the baseline / ours, {mode}")
            axes.set_title(f"{family} on {records[-1]['device']['name']}", fontsize=10)
            axes.legend(fontsize=8)
            path = folder / f"{family}-{device}-{mode}.png"
            figure.savefig(path, dpi=120)
            pyplot.close(figure)
            drawn.append(path)
    return drawn


if __name__ == "__main__":
    sys.exit(main())
