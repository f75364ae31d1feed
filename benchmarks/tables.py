"""Comparisons between the providers of one problem, and their tables in Markdown and for the terminal."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import record

_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}


@dataclass(frozen=True)
class Comparison:
    """The records of one problem in one mode, all of one run, by provider."""

    problem: Mapping[str, Any]
    mode: str
    records: Mapping[str, Mapping[str, Any]]

    @property
    def run(self) -> str:
        return next(iter(self.records.values()))["run"]

    def microseconds(self, provider: str) -> float | None:
        found = self.records.get(provider)
        return found["median_us"] if found is not None and found["status"] == "ok" else None

    def best(self, role: str) -> str | None:
        """The provider of a role with the least median, or None where none was measured."""
        measured = {
            name: line["median_us"]
            for name, line in self.records.items()
            if line["role"] == role and line["status"] == "ok"
        }
        return min(measured, key=lambda name: measured[name]) if measured else None

    def speed_up(self, baseline: str) -> float | None:
        """How many times as long a baseline takes as the fastest of our backends."""
        ours, theirs = self.best("ours"), self.microseconds(baseline)
        return None if ours is None or theirs is None else theirs / self.records[ours]["median_us"]

    def roofline_fraction(self, provider: str) -> float | None:
        """The least time that the problem's bytes and operations take over the time that the provider took."""
        return self.records[provider]["roofline_fraction"] if self.microseconds(provider) is not None else None

    def memory_ratio(self, baseline: str) -> float | None:
        """Peak memory of the fastest of our backends over the baseline's."""
        ours = self.best("ours")
        if ours is None or self.microseconds(baseline) is None:
            return None
        theirs = self.records[baseline]["peak_memory_bytes"]
        return self.records[ours]["peak_memory_bytes"] / theirs if theirs > 0 else None


def compare(records: Iterable[Mapping[str, Any]]) -> list[Comparison]:
    """Group records; of a problem that several runs measured, the last run counts."""
    last: dict[str, str] = {}
    groups: dict[tuple[str, str, str], dict[str, Mapping[str, Any]]] = {}
    for line in records:
        identity = record.key(line)
        last[identity] = max(last.get(identity, ""), line["run"])
        groups.setdefault((identity, line["mode"], line["run"]), {})[line["provider"]] = line
    return [
        Comparison(next(iter(group.values()))["problem"], mode, group)
        for (identity, mode, run), group in groups.items()
        if run == last[identity]
    ]


def label(problem: Mapping[str, Any]) -> str:
    """A problem in one line: names as they are, numbers with theirs."""
    return " ".join(_plain(value) if isinstance(value, str) else f"{name}={value:g}" for name, value in problem.items())


def losses(comparisons: Sequence[Comparison]) -> list[tuple[Comparison, str, float]]:
    """Where a baseline takes less time than the fastest of ours: (comparison, baseline, its share of our time)."""
    found = []
    for comparison in comparisons:
        baseline = comparison.best("baseline")
        ratio = comparison.speed_up(baseline) if baseline is not None else None
        if baseline is not None and ratio is not None and ratio < 1.0:
            found.append((comparison, baseline, ratio))
    return sorted(found, key=lambda loss: loss[2])


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for the terminal: the first column to the left, the others to the right."""
    widths = [max(len(line[index]) for line in (header, *rows)) for index in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (header, *rows)
    )


def summary_table(comparisons: Sequence[Comparison], fields: Sequence[str], baselines: Sequence[str]) -> str:
    """Median speed-up, with the least and the largest, for each mode and value of the fields."""
    groups: dict[tuple[str, ...], list[Comparison]] = {}
    for comparison in comparisons:
        values = tuple(_cell(comparison.problem[field]) for field in fields)
        groups.setdefault((comparison.mode, *values), []).append(comparison)
    header = ["mode", *fields, "problems", *(f"time of {name} / ours" for name in baselines), "memory, ours / peft"]
    rows = []
    for group, members in groups.items():
        ratios = [spread([member.speed_up(name) for member in members]) for name in baselines]
        memory = spread([member.memory_ratio("peft") for member in members])
        rows.append([*group, str(len(members)), *ratios, memory])
    return markdown(header, rows)


def problem_table(comparisons: Sequence[Comparison], providers: Sequence[str]) -> str:
    """One row for each problem and mode: the medians in microseconds, the fastest in bold."""
    fields = list(comparisons[0].problem)
    header = [*fields, "mode", *(f"{name} us" for name in providers), "best baseline / ours", "roofline, ours"]
    rows = []
    for comparison in comparisons:
        times = [comparison.microseconds(name) for name in providers]
        fastest = min((value for value in times if value is not None), default=None)
        baseline, ours = comparison.best("baseline"), comparison.best("ours")
        ratio = comparison.speed_up(baseline) if baseline is not None else None
        share = comparison.records[ours]["roofline_fraction"] if ours is not None else None
        rows.append(
            [
                *(_cell(value) for value in comparison.problem.values()),
                comparison.mode,
                *("-" if us is None else f"**{us:.1f}**" if us == fastest else f"{us:.1f}" for us in times),
                "-" if ratio is None else f"{ratio:.2f}",
                "-" if share is None else f"{share:.0%}",
            ]
        )
    return markdown(header, rows)


def terminal_table(records: Sequence[Mapping[str, Any]]) -> str:
    """The records of one problem for the terminal; reasons of what was not timed below."""
    header = ["provider", "mode", "median us", "p20", "p80", "roofline", "peak MiB", "error of y", "timing"]
    rows = [
        [
            line["provider"],
            line["mode"],
            *(f"{line[name]:.1f}" for name in ("median_us", "p20_us", "p80_us")),
            f"{line['roofline_fraction']:.0%}",
            f"{line['peak_memory_bytes'] / 2**20:.1f}",
            "-" if line["error"].get("y") is None else f"{line['error']['y']:.1e}",
            line["timing"],
        ]
        for line in records
        if line["status"] == "ok"
    ]
    reasons = {
        f"{line['provider']} {line['status']}: {line['reason']}": None for line in records if line["status"] != "ok"
    }
    notes = {f"{line['provider']}: {line['timing_note']}": None for line in records if line.get("timing_note")}
    return "\n".join([aligned(header, rows), *(f"  {text}" for text in (*reasons, *notes))])


def spread(values: Iterable[float | None]) -> str:
    """The median, with the least and the largest where there are several."""
    present = [value for value in values if value is not None]
    if not present:
        return "-"
    if len(present) == 1:
        return f"{present[0]:.2f}"
    return f"{statistics.median(present):.2f} ({min(present):.2f} to {max(present):.2f})"


def _cell(value: Any) -> str:
    return _plain(value) if isinstance(value, str) else f"{value:g}"


def _plain(text: str) -> str:
    return _SHORT.get(text, text)
