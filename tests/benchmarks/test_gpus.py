"""The block that says which GPUs are on record, and that nothing else says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import gpus, report

ROOT = Path(__file__).resolve().parents[2]

MADE = {"gpu": "NVIDIA H200", "arch": 90, "multiprocessors": 132, "driver": "580.65", "torch": "2.13.0",
        "triton": "3.8.0", "sources": "0123456789abcdef"}  # fmt: skip


def _measured(name: str, kind: str = "cuda", status: str = "ok") -> dict[str, Any]:
    return {"device": {"type": kind, "name": name}, "status": status}


def test_nothing_on_record_is_said() -> None:
    cpu = {("cpu", "lora_linear"): [_measured("Some CPU", "cpu")], ("h", "x"): [_measured("H200", status="skipped")]}
    for results in ({}, cpu):
        assert gpus.line(results, []).startswith("No GPU is on record")
        assert gpus.table(results, []) == gpus.line(results, [])


def test_what_is_on_record_is_counted(tmp_path: Path) -> None:
    kinds = {"a": "right", "b": "right", "c": "hung", "d": "wrong", "e": "wrong"}
    record = {"signature": MADE, "verdicts": {key: {"kind": kind} for key, kind in kinds.items()}}
    (tmp_path / "nvidia-h200.json").write_text(json.dumps(record))
    results = {("h", "lora_linear"): [_measured("NVIDIA H200")] * 3, ("l", "prompt_tuning"): [_measured("NVIDIA L4")]}
    assert gpus.line(results, gpus.load(tmp_path)) == (
        "On record: checks of the kernels on NVIDIA H200; measurements on NVIDIA H200, NVIDIA L4."
    )
    assert gpus.line({}, gpus.load(tmp_path)).endswith("on NVIDIA H200; measurements on none.")
    assert gpus.table(results, gpus.load(tmp_path)).splitlines()[2:] == [
        "| NVIDIA H200 (sm_90) | driver 580.65, torch 2.13.0, triton 3.8.0, sources 0123456789abcdef | 2 "
        "| 1 hung, 2 wrong | lora_linear 3 |",
        "| NVIDIA L4 | not checked | - | - | prompt_tuning 1 |",
    ]
    assert gpus.load(tmp_path / "nowhere") == []


def test_statements_by_hand_are_gone() -> None:
    """They would be wrong on the day of the first run, all thirty of them."""
    said = (
        "no gpu yet",
        "run by no gpu",
        "no gpu has run",
        "run on a gpu yet",
        "on none yet",
        "on one yet",
        "on a gpu yet",
    )
    folders = ("peft_kernels", "docs", "csrc", "README.md", "CHANGELOG.md")
    files = [
        path for name in folders for path in ([ROOT / name] if (ROOT / name).is_file() else (ROOT / name).rglob("*"))
    ]
    texts = {path: path.read_text() for path in files if path.suffix in (".py", ".md", ".cuh", ".cu", ".h")}
    found = {str(path.relative_to(ROOT)): each for path, text in texts.items() for each in said
             if each in " ".join(text.lower().replace("|", " ").split())}  # fmt: skip
    assert not found


def test_blocks_stand_in_the_files() -> None:
    arguments = report.load_results(ROOT / "benchmarks" / "results"), gpus.load(gpus.SHIPPED)
    assert gpus.line(*arguments) in (ROOT / report.README).read_text()
    assert gpus.table(*arguments) in (ROOT / report.DETAILS).read_text()
