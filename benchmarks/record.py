"""One measurement is one line of ``results/<device>/<family>.jsonl``. Lines are appended, never changed."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

SCHEMA = 1
RESULTS = Path(__file__).resolve().parent / "results"
STATUSES = ("ok", "skipped", "failed")
MODES = ("forward", "backward", "both")

_NONE = type(None)
_NUMBER = (int, float)

# Always there. `run` is the start of the run: only providers of one run are compared with each other.
_COMMON: dict[str, tuple[type, ...]] = {
    "schema": (int,),
    "family": (str,),
    "run": (str,),
    "date": (str,),
    "commit": (str, _NONE),
    "dirty": (bool, _NONE),
    "device": (dict,),
    "versions": (dict,),
    "ceilings": (dict,),
    "problem": (dict,),
    "provider": (str,),
    "role": (str,),
    "mode": (str,),
    "status": (str,),
    "reason": (str, _NONE),
}

# Not there in the oldest records, which are of no sources of today.
_LATER: dict[str, tuple[type, ...]] = {"sources": (str,)}

# There exactly when the status is ok.
_MEASURED: dict[str, tuple[type, ...]] = {
    "timing": (str,),
    "timing_note": (str, _NONE),
    "repetitions": (int,),
    "calls": (int,),
    "median_us": _NUMBER,
    "p20_us": _NUMBER,
    "p80_us": _NUMBER,
    "bytes": (int,),
    "flops": (int,),
    "roofline_us": _NUMBER,
    "roofline_fraction": _NUMBER,
    "peak_memory_bytes": (int,),
    "error": (dict,),
}


def check(record: Mapping[str, Any]) -> None:
    """Hold a record against the schema.

    Raises:
        ValueError: naming every field that is missing, unknown or wrong.
    """
    measured = record.get("status") == "ok"
    later = {name: types for name, types in _LATER.items() if name in record}
    expected = {**_COMMON, **later, **(_MEASURED if measured else {})}
    wrong = [f"{name} is missing" for name in expected if name not in record]
    wrong += [f"{name} is unknown" for name in record if name not in expected]
    for name, types in expected.items():
        # bool is an int to isinstance, and no measurement is a bool.
        if name in record and type(record[name]) not in types:
            wrong.append(f"{name} is {record[name]!r}")
    if not wrong:
        wrong = _wrong_values(record, measured)
    if wrong:
        raise ValueError(f"benchmark record: {'; '.join(wrong)}")


def key(record: Mapping[str, Any]) -> str:
    """Identity of a record's problem."""
    return json.dumps(record["problem"], sort_keys=True)


def path(folder: Path, device_slug: str, family: str) -> Path:
    return folder / device_slug / f"{family}.jsonl"


def append(target: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Check all records, then add them in one write, so that a run that is killed leaves whole problems behind."""
    records = list(records)
    for record in records:
        check(record)
    append_lines(target, records)


def append_lines(target: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Add lines in one write: all or, where that raises, none; never to a line that a killed run left torn."""
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines).encode()
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("a+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        torn = file.read(1) not in (b"", b"\n")
        try:
            text = b"\n" * torn + text
            if file.write(text) != len(text):
                raise OSError(f"{target} could not be written to its end")
        except OSError:
            file.truncate(size)
            raise


def read_lines(source: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read a file of JSON objects with their line numbers; warns of a torn line and leaves it out.

    Raises:
        ValueError: a line is JSON, but no object; says which.
    """
    for number, text in enumerate(source.read_text(errors="replace").splitlines(), start=1):
        try:
            line = json.loads(text)
        except ValueError as error:
            warnings.warn(f"{source}:{number}: torn, left out ({error})", stacklevel=2)
            continue
        if not isinstance(line, dict):
            raise ValueError(f"{source}:{number}: a record must be an object, got {text[:80]}")
        yield number, line


def load(source: Path) -> list[dict[str, Any]]:
    """Read a file of records; warns of a torn line and leaves it out.

    Raises:
        ValueError: a line is whole and no record; says which.
    """
    records = []
    for number, record in read_lines(source):
        try:
            check(record)
        except ValueError as error:
            raise ValueError(f"{source}:{number}: {error}") from error
        records.append(record)
    return records


def _wrong_values(record: Mapping[str, Any], measured: bool) -> list[str]:
    wrong = []
    if record["schema"] != SCHEMA:
        wrong.append(f"schema is {record['schema']}, this code reads {SCHEMA}")
    if record["status"] not in STATUSES:
        wrong.append(f"status is {record['status']!r}, must be one of {', '.join(STATUSES)}")
    if record["mode"] not in MODES:
        wrong.append(f"mode is {record['mode']!r}, must be one of {', '.join(MODES)}")
    if measured != (record["reason"] is None):
        wrong.append("a reason belongs to what was not measured, and only there")
    if measured and not 0 < record["p20_us"] <= record["median_us"] <= record["p80_us"]:
        wrong.append("times are not 0 < p20 <= median <= p80")
    return wrong
