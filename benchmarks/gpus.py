"""Which GPUs are on record: those whose checks the package ships, and those on which something was timed.

What is said of it anywhere else would have to be changed by hand with every run.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SHIPPED = Path(__file__).resolve().parent.parent / "peft_kernels" / "records"
BEGIN = "<!-- gpus:begin -->"
END = "<!-- gpus:end -->"

Results = Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]


def load(folder: Path) -> list[dict[str, Any]]:
    """Read the records of checks that are shipped; there may be none."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def render(results: Results, shipped: Sequence[Mapping[str, Any]]) -> str:
    """State what is on record, GPU by GPU.

    Args:
        results: measurements by device and family.
        shipped: as ``load`` returns them.
    """
    timed: dict[str, Counter[str]] = {}
    for (_, family), records in results.items():
        for line in records:
            if line["device"]["type"] == "cuda" and line["status"] == "ok":
                timed.setdefault(line["device"]["name"], Counter())[family] += 1
    checked = {record["signature"]["gpu"]: record for record in shipped}
    names = sorted({*timed, *checked})
    if not names:
        return (
            "No GPU is on record: neither a check of the kernels, as `python -m peft_kernels.qualify` makes it, nor a "
            "measurement. What is said of speed on GPUs anywhere in here is a model or an assumption."
        )
    rows = [
        "| GPU | checked with | parts of kernels that were right | that were not | measurements |",
        "| --- | --- | --- | --- | --- |",
    ]
    return "\n".join([*rows, *(_row(name, checked.get(name), timed.get(name, Counter())) for name in names)])


def _row(name: str, record: Mapping[str, Any] | None, timed: Counter[str]) -> str:
    measured = ", ".join(f"{family} {count}" for family, count in sorted(timed.items())) or "none"
    if record is None:
        return f"| {name} | not checked | - | - | {measured} |"
    made, kinds = record["signature"], Counter(verdict["kind"] for verdict in record["verdicts"].values())
    failed = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()) if kind != "right") or "0"
    with_ = f"driver {made['driver']}, torch {made['torch']}, triton {made['triton']}, sources {made['sources']}"
    return f"| {name} (sm_{made['arch']}) | {with_} | {kinds['right']} | {failed} | {measured} |"
