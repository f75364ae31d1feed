"""``python -m benchmarks.report [--check] [--images]``: tables and pictures from the recorded results.

The README has counts, and a line for each of those that people compare with; docs/design/lora.md has more counts, of
groups. docs/benchmarks.md has every measurement, and every problem on which a baseline is faster.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import counts, gpus, pictures, record, tables
from benchmarks.family import Family, discover

ROOT = Path(__file__).resolve().parent.parent
README = "README.md"
DESIGN = "docs/design/lora.md"
DETAILS = "docs/benchmarks.md"
IMAGES = "docs/images"
BEGIN = "<!-- benchmarks:begin -->"
END = "<!-- benchmarks:end -->"
# Those that people compare with, as the README calls them.
COMPARED = {"peft": "PEFT", "eager": "eager PyTorch", "addmm": "the frozen product, then `addmm_`"}

Records = Sequence[Mapping[str, Any]]
Results = Mapping[tuple[str, str], Records]


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite the tables; with --check only say whether they are what the records give."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Write tables from the records.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a table is out of date")
    parser.add_argument("--images", action="store_true", help=f"also draw {IMAGES}")
    parser.add_argument("--results", type=Path, default=record.RESULTS, help="folder of the records")
    parser.add_argument("--checks", type=Path, default=gpus.SHIPPED, help="folder of the records of checks")
    parser.add_argument("--root", type=Path, default=ROOT, help=f"folder of {README}, {DESIGN} and {DETAILS}")
    options = parser.parse_args(arguments)

    families = discover()
    results = load_results(options.results)
    readme, design, details = (options.root / name for name in (README, DESIGN, DETAILS))
    if options.images:
        for path in pictures.draw(results, families, options.root / IMAGES):
            print(path)
    written: dict[Path, str] = {}
    try:
        text = replace_part(readme.read_text(), render_summary(results, families))
        checks = gpus.load(options.checks)
        text = replace_part(text, gpus.line(results, checks), gpus.BEGIN, gpus.END)
        written[readme] = replace_part(text, counts.render(), counts.BEGIN, counts.END)
        marks = counts.BEGIN_GROUPS, counts.END_GROUPS
        written[design] = replace_part(design.read_text(), counts.render_groups(), *marks)
    except (ImportError, ValueError) as error:
        print(f"{design if readme in written else readme}: {error}", file=sys.stderr)
        return 1
    on_record = gpus.table(results, checks)
    written[details] = render_details(results, families, options.root / IMAGES, on_record)
    stale = [path for path, text in written.items() if not path.exists() or path.read_text() != text]
    if options.check:
        for path in stale:
            print(f"{path} is not what the records give; `make report` writes it", file=sys.stderr)
        return int(bool(stale))
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(written[path])
    return 0


def load_results(folder: Path) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Read every file of records, by device and family; GPUs come before CPUs."""
    found = {(path.parent.name, path.stem): record.load(path) for path in sorted(folder.glob("*/*.jsonl"))}
    return dict(sorted(found.items(), key=lambda item: (not _is_cuda(item[1]), item[0])))


def replace_part(text: str, part: str, begin: str = BEGIN, end: str = END) -> str:
    """Put a part between the two marks of a text.

    Raises:
        ValueError: the marks are not there once each, in this order.
    """
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"needs {begin} and, after it, {end}, once each")
    head, rest = text.split(begin)
    _, tail = rest.split(end)
    return f"{head}{begin}\n{part.strip()}\n{end}{tail}"


def render_summary(results: Results, families: Mapping[str, Family]) -> str:
    """Lay out the README's part: for each device a line for each of those that are compared."""
    devices: dict[str, dict[str, Records]] = {}
    for (device, family), records in results.items():
        if records:
            devices.setdefault(device, {})[family] = records
    if not devices:
        return "No measurements are recorded yet."
    return "\n\n".join(_summary(of_families, families) for of_families in devices.values())


def render_details(results: Results, families: Mapping[str, Family], images: Path, on_record: str = "") -> str:
    """Lay out docs/benchmarks.md.

    Args:
        images: folder whose pictures of these results, where there are any, are shown.
        on_record: which GPUs were checked and measured.
    """
    parts = [
        "# Benchmarks",
        "Every measurement on record, written by `make report` from `benchmarks/results`. The README sums up.",
        "All providers of a problem are timed in one process and in turns. Ours is the fastest backend of this "
        "package. A quotient above 1 means that ours takes less time. A CPU has no kernels: there the torch backend is "
        "timed, on a reduced grid.",
        *([on_record] if on_record else []),
    ]
    for (device, family), records in results.items():
        if records:
            shown = [path for mode in record.MODES if (path := images / pictures.name(family, device, mode)).exists()]
            parts += _details(records, families[family], [f"{images.name}/{path.name}" for path in shown])
    return "\n\n".join(parts) + "\n"


def _summary(of_families: Mapping[str, Records], families: Mapping[str, Family]) -> str:
    """What was measured on one device."""
    compared = {family: tables.compare(records) for family, records in of_families.items()}
    device = next(iter(of_families.values()))[-1]["device"]
    where = device["name"]
    if device["type"] == "cpu":
        threads = {line["device"].get("processors") for records in of_families.values() for line in records}
        where += f", {_threads(*threads)}" if len(threads) == 1 and None not in threads else ""
        where += " (a CPU has no kernels: the torch backend is timed)"
    lines = []
    for baseline, called in COMPARED.items():
        phrases = []
        for family, comparisons in compared.items():
            ratios = [each.speed_up(baseline) for each in _whole_steps(comparisons)]
            if any(ratio is not None for ratio in ratios):
                phrases.append(f"`{families[family].name}` {tables.spread(ratios)}")
        if phrases:
            lines.append(f"* {called}: {'; '.join(phrases)}")
    everything = [comparison for comparisons in compared.values() for comparison in comparisons]
    return "\n".join(
        [
            f"On {where}: time of a step, forward and backward, over our time. Medians over the problems; in brackets "
            "the least and the largest.",
            "",
            *lines,
            "",
            f"[{DETAILS}]({DETAILS}) has all {len(everything)} measurements, and lists the "
            f"{len(tables.losses(everything))} in which a baseline is faster.",
        ]
    )


def _whole_steps(comparisons: Sequence[tables.Comparison]) -> Sequence[tables.Comparison]:
    return [comparison for comparison in comparisons if comparison.mode == "both"] or comparisons


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def _details(records: Records, family: Family, images: Sequence[str]) -> list[str]:
    comparisons = tables.compare(records)
    rows = [comparison for comparison in comparisons if comparison.best("limit") or comparison.best("baseline")]
    shown = _whole_steps(comparisons)
    names = [name for name in family.names("limit", "baseline") if any(each.microseconds(name) for each in shown)]
    return [
        f"## {family.name} on {records[-1]['device']['name']}",
        _provenances(records, comparisons),
        *(f"![time, roofline and memory of {family.name}]({image})" for image in images),
        tables.summary_table(shown, family.summarize_by, names),
        _losses(comparisons),
        tables.problem_table(rows, family.names("limit", "baseline", "ours")) if rows else "Nothing was measured.",
    ]


def _losses(comparisons: Sequence[tables.Comparison]) -> str:
    lost = tables.losses(comparisons)
    if not lost:
        return "No baseline is faster on any of these problems."
    lines = [
        f"* {tables.label(comparison.problem)}, {comparison.mode}: {baseline} takes {ratio:.2f} of our time"
        for comparison, baseline, ratio in lost
    ]
    return f"A baseline is faster in {len(lost)} of {len(comparisons)} measurements:\n\n" + "\n".join(lines)


def _provenances(records: Records, comparisons: Sequence[tables.Comparison]) -> str:
    used = {comparison.run for comparison in comparisons}
    sessions = {line["run"]: line for line in records if line["run"] in used}
    return "\n".join(f"* {_provenance(sessions[run])}" for run in sorted(sessions))


def _provenance(line: Mapping[str, Any]) -> str:
    device, versions, ceilings = line["device"], line["versions"], line["ceilings"]
    state = (
        f"commit {line['commit'][:12]}" if line["commit"] is not None else f"sources {line.get('sources', 'unknown')}"
    )
    changed = " with uncommitted changes" if line["dirty"] else ""
    parts = [
        f"{line['run'][:10]}, {state}{changed}",
        f"torch {versions['torch']}",
        *(f"{name} {versions[name]}" for name in ("triton", "peft") if versions[name] is not None),
    ]
    if device["type"] == "cpu" and "processors" in device:
        parts.append(_threads(device["processors"]))
    if device["driver"] is not None:
        parts.append(f"driver {device['driver']}")
    if device["sm_clock_mhz"] is not None:
        parts.append(f"{device['sm_clock_mhz']:.0f} of {device['max_sm_clock_mhz']:.0f} MHz under load")
    rates = ", ".join(f"{name} {rate / 1e12:.2f}" for name, rate in ceilings["matmul_flops_per_s"].items())
    parts.append(f"measured ceilings: copy {ceilings['copy_bytes_per_s'] / 1e12:.3f} TB/s, products {rates} TFLOP/s")
    return "; ".join(parts)


def _is_cuda(records: Records) -> bool:
    return any(line["device"]["type"] == "cuda" for line in records)


if __name__ == "__main__":
    sys.exit(main())
