"""The runner of parts: with commands that fail, hang, die, are not there, are cut short and go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.on_gpu import runner
from tests.on_gpu.runner import MORE, Part, Runner

pytestmark = pytest.mark.cpu_only

HEADER = {"commit": None, "dirty": None, "sources": "0123", "versions": {"torch": "2"}, "device": "Toy"}


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def part(name: str, code: str, timeout_s: float = 60.0, **options: Any) -> Part:
    return Part(name, python(code), timeout_s, **{"least_s": 0.5, **options})


def run(folder: Path, *parts: Part, budget_s: float | None = None, **header: object) -> int:
    return Runner(parts, folder, {**HEADER, **header}, budget_s).run()


def states(folder: Path) -> dict[str, str]:
    return {row["part"]: row["status"] for row in json.loads((folder / "summary.json").read_text())["parts"]}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "PATIENCE_S", 0.5)
    monkeypatch.setattr(runner, "TRIES", 5)


def test_what_one_part_does_stops_no_other(tmp_path: Path) -> None:
    parts = (
        part("good", "print('fine | so far')"),
        part("bad", "print('so wrong'); exit(4)"),
        part("dies", "import os; os.abort()"),
        part("hangs", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(99)", 1.0),
        Part("no program", ("no-such-tool-at-all",), 5.0, least_s=0.5),
        part("no device", "print('Device not supported.'); exit(1)", absent=("not supported",)),
        part("no gpu", "exit(3)", absent=(3,)),
        part("skips", "print('== 3 skipped in 1s ==')", nothing=r"\d+ skipped"),
        part("skips some", "print('== 1 passed, 3 skipped in 1s ==')", nothing=r"\d+ skipped"),
        part("last", f"open({str(tmp_path / 'ran')!r}, 'a').write('x')"),
    )
    began = time.monotonic()
    assert run(tmp_path, *parts) == 1
    assert time.monotonic() - began < 30
    assert states(tmp_path) == {
        "good": "ok", "bad": "failed", "dies": "died", "hangs": "hung", "no program": "not here",
        "no device": "not here", "no gpu": "not here", "skips": "not here", "skips some": "ok", "last": "ok",
    }  # fmt: skip
    summary = (tmp_path / "summary.md").read_text()
    assert "| good | ok | 0 | fine \\| so far |" in summary
    assert "status 4: so wrong" in summary
    assert "so wrong" in (tmp_path / "bad.log").read_text()

    # What has come to an end is not run again, and has still failed; other sources start anew.
    assert run(tmp_path, *parts) == 1
    assert (tmp_path / "ran").read_text() == "x"
    assert run(tmp_path, *parts[-1:], sources="4567") == 0
    assert (tmp_path / "ran").read_text() == "xx"


def test_words_of_absence_excuse_no_success_s_opposite(tmp_path: Path) -> None:
    """A part that only mentions them has still run."""
    assert run(tmp_path, part("a", "print('not supported')", absent=("not supported",))) == 0
    assert states(tmp_path) == {"a": "ok"}


def test_a_budget_cuts_a_part_short_and_the_next_call_goes_on(tmp_path: Path) -> None:
    count = tmp_path / "count"
    slow = f"import time; f = open({str(count)!r}, 'a'); f.write('x'); f.flush(); time.sleep(8)"
    parts = (part("first", "pass"), part("slow", slow), part("last", "pass"))
    assert run(tmp_path, *parts, budget_s=6) == MORE
    assert states(tmp_path) == {"first": "ok", "slow": "cut short", "last": "not begun"}
    assert run(tmp_path, *parts, budget_s=100) == 0
    assert states(tmp_path) == {"first": "ok", "slow": "ok", "last": "ok"}
    assert count.read_text() == "xx"


def test_a_part_that_goes_on_is_called_until_it_is_done(tmp_path: Path) -> None:
    """Also beyond its own limit; one that never gets on is left for the next call."""
    count = tmp_path / "count"
    text = f"import time; f = open({str(count)!r}, 'a+'); f.write('x'); f.flush(); f.seek(0); n = len(f.read())\n"
    assert run(tmp_path, part("slices", f"{text}exit(0 if n == 3 else 75)")) == 0
    assert count.read_text() == "xxx"
    assert run(tmp_path, part("limited", f"{text}time.sleep(0 if n > 4 else 99)", 4.0, goes_on=True)) == 0
    assert len(count.read_text()) >= 5
    assert run(tmp_path, part("stuck", "exit(75)"), part("last", "pass")) == MORE
    assert states(tmp_path) == {"stuck": "more to do", "last": "ok"}


def test_seconds_are_told_and_less_than_a_part_needs_is_not_spent(tmp_path: Path) -> None:
    told = Part("told", (*python("import sys; print(sys.argv[1])"), "{seconds}"), 20.0, least_s=1.0)
    assert run(tmp_path, told, part("long", "pass", least_s=50.0), budget_s=30) == MORE
    assert (tmp_path / "told.log").read_text().strip() == "15"
    assert states(tmp_path) == {"told": "ok", "long": "not begun"}


def test_children_end_with_their_part(tmp_path: Path) -> None:
    code = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)']).pid)"
    assert run(tmp_path, part("leaves one behind", code)) == 0
    assert not _is_running(int((tmp_path / "leaves one behind.log").read_text()))


def test_whoever_ends_the_runner_ends_its_part(tmp_path: Path) -> None:
    program = f"""
import sys, time
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from tests.on_gpu.runner import Part, Runner
code = "import os, time; print(os.getpid(), flush=True); time.sleep(99)"
Runner([Part("waits", (sys.executable, "-c", code), 60)], Path({str(tmp_path)!r}), {HEADER!r}, None).run()
"""
    log = tmp_path / "waits.log"
    for number, status in ((signal.SIGTERM, "cut short"), (signal.SIGKILL, "begun"), (signal.SIGKILL, "begun")):
        log.unlink(missing_ok=True)
        process = subprocess.Popen(python(program))
        for _ in range(300):
            if log.exists() and log.read_text().strip():
                break
            time.sleep(0.1)
        child = int(log.read_text())
        process.send_signal(number)
        process.wait(20)
        lines = [json.loads(line) for line in (tmp_path / "state.jsonl").read_text().splitlines()]
        assert lines[-1]["status"] == status
        if number == signal.SIGKILL:
            os.killpg(child, signal.SIGKILL)
        else:
            assert not _is_running(child)
    # Twice begun without an end: it takes its runner down.
    assert run(tmp_path, part("waits", "pass")) == 1
    assert states(tmp_path) == {"waits": "died"}


def test_a_file_that_a_part_wrote_stands_in_the_summary(tmp_path: Path) -> None:
    shown = tmp_path / "sample.md"
    writes = part("sample", f"open({str(shown)!r}, 'w').write('0.97 of cuBLAS')", shows=shown)
    absent = part("other", "pass", shows=tmp_path / "nowhere.md")
    assert run(tmp_path, writes, absent) == 0
    assert "## sample\n\n0.97 of cuBLAS" in (tmp_path / "summary.md").read_text()


def _is_running(pid: int) -> bool:
    """Soon, too; a zombie, which nobody has waited for, does not run."""
    for _ in range(50):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return False
        if state in ("Z", "X"):
            return False
        time.sleep(0.1)
    return True
