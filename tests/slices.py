"""A pytest plugin for machines that are lent by the minute: tests in slices, each recorded as soon as it has run.

    python -m pytest tests -p tests.slices --slices DIR [--budget-s 540]

DIR/<device>/tests/tests.jsonl gets a line when a test starts and one when it ends. A run leaves out what has an end
there, from the same commit, state of the tree, versions and device, and stops before the budget ends. A test that
started and never ended took its process down: it is a failure, and not tried again. After an error that a CUDA context
does not survive, the run stops, because every later test would fail for it.

Beside it, summary.md and summary.json count what has passed, failed and been skipped over all runs, with every reason.
Exit status: 0 all recorded tests passed or were skipped, 1 some failed, 75 there are more to run; else pytest's own.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

RECORDS = "tests.jsonl"
MORE = 75
SUMMARY = "summary"
STARTED, CRASHED = "started", "crashed"
_FAILURES = ("failed", CRASHED)
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
    header = {"commit": commit, "dirty": dirty, "versions": environment.versions(), "device": device}
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
        self.longest = 0.0
        self.left = 0
        self.stopped = False
        self.session: pytest.Session | None = None
        self.outcome: dict[str, Any] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self.session = session

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        known = latest(self.folder, self.header)
        for test, line in known.items():
            if line["outcome"] == STARTED:
                self._write(test, CRASHED, "started, and took its process down")
        done = [item for item in items if item.nodeid in known]
        config.hook.pytest_deselected(items=done)
        items[:] = [item for item in items if item.nodeid not in known]
        self.left = len(items)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.started = self.now()
        self.outcome = {"outcome": "passed", "reason": None}
        self._write(nodeid, STARTED, None)

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
        self._write(nodeid, **self.outcome)
        self.left -= 1
        self.longest = max(self.longest, self.now() - self.started)
        over = self.budget_s is not None and self.now() - self.began + self.longest > self.budget_s
        if over and self.left:
            self._stop(f"budget spent, {self.left} tests left; run again to go on")

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        results = latest(self.folder, self.header)
        write_summary(self.folder, self.header, results, self.left)
        nothing_left = exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and results
        if self.stopped and self.left:
            session.exitstatus = MORE
        elif self.stopped or nothing_left or exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            failed = any(line["outcome"] in _FAILURES for line in results.values())
            session.exitstatus = pytest.ExitCode.TESTS_FAILED if failed else pytest.ExitCode.OK

    def _stop(self, reason: str) -> None:
        self.stopped = True
        if self.session is not None:
            self.session.shouldstop = reason

    def _write(self, test: str, outcome: str, reason: str | None) -> None:
        line = {**self.header, "test": test, "outcome": outcome, "reason": reason}
        line["seconds"] = round(self.now() - self.started, 3)
        with (self.folder / RECORDS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def latest(folder: Path, header: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Read the last line of each test that belongs to the header."""
    path = folder / RECORDS
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    return {line["test"]: line for line in lines if all(line[name] == value for name, value in header.items())}


def write_summary(folder: Path, header: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]], left: int) -> None:
    """Write counts, failures and reasons of skips, once to read and once to parse."""
    counts = Counter(line["outcome"] for line in results.values())
    failures = {test: line["reason"] for test, line in results.items() if line["outcome"] in _FAILURES}
    skips = Counter(line["reason"] for line in results.values() if line["outcome"] == "skipped")
    numbers = {**header, "counts": dict(counts), "not run": left, "failures": failures, "skips": dict(skips)}
    (folder / f"{SUMMARY}.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    parts = [
        f"{header['device']}, commit {header['commit']}{' with changes' if header['dirty'] else ''}",
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
