"""A pytest plugin for machines that are lent by the minute: tests in slices, each recorded as soon as it has run.

    python -m pytest tests -p tests.slices --slices DIR [--budget-s 540]
    python -m tests.slices tests --slices DIR ...    the same in a process of its own, whose death is no end

DIR/<device>/tests/tests.jsonl gets a line when a test starts and one when it ends. A run leaves out what has an end
there, from the same commit, sources, versions and device. It starts no test that would end after the budget, going by
what the test took before, in whatever state of the sources, and else by the longest test of this run.

When the budget is spent the process ends, whatever it is at. The test that it was at is the first one of the next
run, and a failure only if it had nearly all of a slice. A test that started and has no end took its process down, or
somebody ended both: it is tried once more, as the last one, and is a failure then. After an error that a CUDA context
does not survive, the run stops, because every later test would fail for it.

Beside it, summary.md and summary.json count what has passed, failed and been skipped over all runs, with every reason.
Exit status: 0 all recorded tests passed or were skipped, 1 some failed, 75 there are more to run; else pytest's own.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import record

RECORDS = "tests.jsonl"
MORE = 75
SUMMARY = "summary"
STARTED, CRASHED, OVERRAN = "started", "crashed", "overran"
_FAILURES = ("failed", CRASHED, OVERRAN)
# Of a slice: who had that much of one and did not end needs more than a slice.
_ALL = 0.8
# Beyond the budget, for a process whose interpreter does not run.
_GRACE_S = 10.0
# What torch and the driver say where the context is lost.
_LOST = (
    "illegal memory access",
    "unspecified launch failure",
    "misaligned address",
    "device-side assert",
    "CUDA error:",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("slices")
    group.addoption("--slices", type=Path, metavar="DIR", help="record every test in DIR, and leave out those it has")
    group.addoption("--budget-s", type=float, metavar="N", help="start no test that would end after N seconds")


def pytest_configure(config: pytest.Config) -> None:
    folder = config.getoption("--slices")
    if folder is not None:
        header, slug = where()
        config.pluginmanager.register(Slices(folder / slug / "tests", config.getoption("--budget-s"), header))


def where() -> tuple[dict[str, Any], str]:
    """Describe what a test's result belongs to, and name the device's folder."""
    import torch

    from benchmarks import environment

    commit, dirty = environment.commit()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    header = {"commit": commit, "dirty": dirty, "sources": environment.sources()}
    header |= {"versions": environment.versions(), "device": device}
    return header, environment.slug(device)


class Slices:
    """The hooks of one run.

    Args:
        folder: of the records.
        budget_s: seconds from now; None is no end.
        header: which records count as this run's.
    """

    def __init__(
        self,
        folder: Path,
        budget_s: float | None,
        header: Mapping[str, Any],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder, self.budget_s, self.header, self.now = folder, budget_s, dict(header), now
        self.began = self.started = now()
        self.seconds = durations(folder)
        self.longest = 0.0
        self.left = 0
        self.stopped = False
        self.session: pytest.Session | None = None
        self.running: str | None = None
        self.following: pytest.Item | None = None
        self.outcome: dict[str, Any] = {}
        self.uncollected: dict[str, str] = {}
        self.ended = threading.Event()
        self.lock = threading.Lock()
        # Later pytest reads what is written to the standard one.
        self.errors = os.fdopen(os.dup(2), "w")
        folder.mkdir(parents=True, exist_ok=True)

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self.session = session
        if self.budget_s is not None:
            threading.Thread(target=self._end_in_time, args=(self.budget_s,), daemon=True).start()
            faulthandler.dump_traceback_later(self.budget_s + _GRACE_S, exit=True, file=self.errors)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.uncollected[report.nodeid] = f"not collected: {_last_line(report.longreprtext)}"

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        known = latest(self.folder, self.header)
        again, first = set(), []
        for test, line in known.items():
            if line["outcome"] == STARTED and line["tries"] > 1:
                self._write(test, CRASHED, "started twice, and took its process down")
            elif line["outcome"] == STARTED:
                again.add(test)
            elif line["outcome"] == OVERRAN and not self._had_all(line["seconds"]):
                first.append(test)
        done = known.keys() - again - set(first)
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
        first.sort(key=lambda test: -known[test]["seconds"])
        places = {test: place - len(first) for place, test in enumerate(first)} | dict.fromkeys(again, 1)
        items[:] = sorted(
            (item for item in items if item.nodeid not in done), key=lambda item: places.get(item.nodeid, 0)
        )
        self.left = len(items)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> None:
        self.following = nextitem

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        with self.lock:
            self.started = self.now()
            self.outcome = {"outcome": "passed", "reason": None}
            self._write(nodeid, STARTED, None)
            self.running = nodeid

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            text = report.longreprtext
            self.outcome = {"outcome": "failed", "reason": _last_line(text)}
            if any(words in text for words in _LOST):
                self._stop("the CUDA context is lost; run again, in a new process")
        elif report.skipped and self.outcome["outcome"] == "passed":
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
            self.outcome = {"outcome": "skipped", "reason": reason.removeprefix("Skipped: ")}

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        with self.lock:
            self.running = None
            self._write(nodeid, **self.outcome)
            self.left -= 1
        self.longest = max(self.longest, self.now() - self.started)
        if self.budget_s is None or self.following is None:
            return
        expected = self.seconds.get(self.following.nodeid, self.longest)
        if self.now() - self.began + expected > self.budget_s:
            self._stop(f"budget spent, {self.left} tests left; run again to go on")

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        self.ended.set()
        faulthandler.cancel_dump_traceback_later()
        results = self._sum_up()
        nothing_left = exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and results
        if self.stopped and self.left:
            session.exitstatus = MORE
        elif self.stopped or nothing_left or exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            failed = any(line["outcome"] in _FAILURES for line in results.values())
            session.exitstatus = pytest.ExitCode.TESTS_FAILED if failed else pytest.ExitCode.OK

    def _had_all(self, seconds: float) -> bool:
        return self.budget_s is not None and seconds >= _ALL * self.budget_s

    def _end_in_time(self, budget_s: float) -> None:
        """End the process when the budget is spent: a test may hang where no exception reaches it."""
        if self.ended.wait(max(0.0, budget_s - (self.now() - self.began))):
            return
        if self.stopped and self.ended.wait(_GRACE_S):
            return
        with self.lock:
            if self.running is not None:
                self._write(self.running, OVERRAN, f"not ready after {self.now() - self.started:.0f} s")
            self._sum_up()
            print(f"\nbudget spent at {self.running}, {self.left} tests left; run again to go on", file=self.errors)
            self.errors.flush()
            os._exit(MORE)

    def _sum_up(self) -> dict[str, dict[str, Any]]:
        failed = {"outcome": "failed"}
        results = latest(self.folder, self.header)
        results |= {name: {**failed, "reason": reason} for name, reason in self.uncollected.items()}
        write_summary(self.folder, self.header, results, self.left)
        return results

    def _stop(self, reason: str) -> None:
        self.stopped = True
        if self.session is not None:
            self.session.shouldstop = reason

    def _write(self, test: str, outcome: str, reason: str | None) -> None:
        line = {**self.header, "test": test, "outcome": outcome, "reason": reason}
        line["seconds"] = round(self.now() - self.started, 3)
        record.append_lines(self.folder / RECORDS, [line])


def latest(folder: Path, header: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Read the last line of each test that belongs to the header, with how often the test was started."""
    found: dict[str, dict[str, Any]] = {}
    tries: Counter[str] = Counter()
    for line in _lines(folder):
        if all(line.get(name) == value for name, value in header.items()):
            tries[line["test"]] += line["outcome"] == STARTED
            found[line["test"]] = {**line, "tries": tries[line["test"]]}
    return found


def durations(folder: Path) -> dict[str, float]:
    """What each test took the last time that it came to an end or overran a budget, in any state of the sources."""
    return {line["test"]: line["seconds"] for line in _lines(folder) if line["outcome"] not in (STARTED, CRASHED)}


def _lines(folder: Path) -> list[dict[str, Any]]:
    path = folder / RECORDS
    return [line for _, line in record.read_lines(path)] if path.exists() else []


def write_summary(folder: Path, header: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]], left: int) -> None:
    """Write counts, failures and reasons of skips, once to read and once to parse."""
    counts = Counter(line["outcome"] for line in results.values())
    failures = {test: line["reason"] for test, line in results.items() if line["outcome"] in _FAILURES}
    skips = Counter(line["reason"] for line in results.values() if line["outcome"] == "skipped")
    numbers = {**header, "counts": dict(counts), "not run": left, "failures": failures, "skips": dict(skips)}
    (folder / f"{SUMMARY}.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    parts = [
        f"{header['device']}, commit {header['commit']}{' with changes' if header['dirty'] else ''}, "
        f"sources {header['sources']}",
        ", ".join([*(f"{count} {outcome}" for outcome, count in sorted(counts.items())), f"{left} not run"]),
        _listed("Failed", [f"{test}: {reason}" for test, reason in failures.items()]),
        _listed("Skipped", [f"{count}: {reason}" for reason, count in skips.most_common()]),
    ]
    (folder / f"{SUMMARY}.md").write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")


def _listed(title: str, lines: Sequence[str]) -> str:
    return "\n".join([f"{title}:", "", *(f"* {line}" for line in lines)]) if lines else ""


def _last_line(text: str) -> str:
    """The error's own words: pytest marks them with an E."""
    errors = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
    lines = errors or [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:300] if lines else "no message"


def main(arguments: Sequence[str]) -> int:
    """Run pytest with this plugin; returns 75 also where a test took it down before the others were through."""
    status = subprocess.run([sys.executable, "-m", "pytest", "-p", "tests.slices", *arguments], check=False).returncode
    if status in (pytest.ExitCode.OK, MORE):
        return status
    options = argparse.ArgumentParser()
    options.add_argument("--slices", type=Path, required=True)
    folder = options.parse_known_args(arguments)[0].slices
    header, slug = where()
    died = any(line["outcome"] == STARTED for line in latest(folder / slug / "tests", header).values())
    return MORE if died else status


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
