"""Which GPUs are on record: those whose checks the package ships, and those on which something was timed.

What is said of it anywhere else would have to be changed by hand with every run.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

SHIPPED = Path(__file__).resolve().parent.parent / "peft_kernels" / "records"
BEGIN = "<!-- gpus:begin -->"
END = "<!-- gpus:end -->"

Results = Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]


def load(folder: Path) -> list[dict[str, Any]]:
    """Read the records of checks that are shipped; there may be none."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def line(results: Results, shipped: Sequence[Mapping[str, Any]]) -> str:
    """State in one line which GPUs are on record.

    Args:
        results: measurements by device and family.
        shipped: as ``load`` returns them.
    """
    checked, timed = _checked(shipped), _timed(results)
    if not checked and not timed:
        return (
            "No GPU is on record: neither a check of the kernels, as `python -m peft_kernels.qualify` makes it, nor a "
            "measurement. What is said of speed on GPUs anywhere in here is a model or an assumption."
        )
    return f"On record: checks of the kernels on {_listed(checked)}; measurements on {_listed(timed)}."


def table(results: Results, shipped: Sequence[Mapping[str, Any]]) -> str:
    """State what is on record, GPU by GPU; without a GPU, what the line says."""
    checked, timed = _checked(shipped), _timed(results)
    names = sorted({*timed, *checked})
    if not names:
        return line(results, shipped)
    rows = [
        "| GPU | checked with | parts of kernels that were right | that were not | measurements |",
        "| --- | --- | --- | --- | --- |",
    ]
    return "\n".join([*rows, *(_row(name, checked.get(name), timed.get(name, Counter())) for name in names)])


def _checked(shipped: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    return {record["signature"]["gpu"]: record for record in shipped}


def _timed(results: Results) -> dict[str, Counter[str]]:
    """Measurements of each family by GPU."""
    timed: dict[str, Counter[str]] = {}
    for (_, family), records in results.items():
        for record in records:
            if record["device"]["type"] == "cuda" and record["status"] == "ok":
                timed.setdefault(record["device"]["name"], Counter())[family] += 1
    return timed


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _row(name: str, record: Mapping[str, Any] | None, timed: Counter[str]) -> str:
    measured = ", ".join(f"{family} {count}" for family, count in sorted(timed.items())) or "none"
    if record is None:
        return f"| {name} | not checked | - | - | {measured} |"
    made, kinds = record["signature"], Counter(verdict["kind"] for verdict in record["verdicts"].values())
    failed = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()) if kind != "right") or "0"
    with_ = f"driver {made['driver']}, torch {made['torch']}, triton {made['triton']}, sources {made['sources']}"
    return f"| {name} (sm_{made['arch']}) | {with_} | {kinds['right']} | {failed} | {measured} |"
