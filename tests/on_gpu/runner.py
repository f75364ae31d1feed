"""Parts that run one after another, each a process with a time limit; what one does stops no other.

    state.jsonl   a line when a part begins and one when it ends
    <part>.log    what it printed, try after try
    summary.md, summary.json

A part that has come to an end is not run again for the same sources, versions and device. One that a budget cut short,
or that says that there is more to do, goes on in the next call. One that began and has no end, because somebody ended
all of this, is tried once more.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks import record

MORE = 75

# How often one call runs a part that says that there is more to do, or comes to its limit and goes on.
TRIES = 20

OK, FAILED, DIED, HUNG, ABSENT = "ok", "failed", "died", "hung", "not here"
BEGUN, CUT, LEFT = "begun", "cut short", "more to do"
SETTLED = (OK, FAILED, DIED, HUNG, ABSENT)
BAD = (FAILED, DIED, HUNG)

# A part that is ended gets this long to leave by itself, and as long to be gone when it may not refuse any more: what
# waits for a device that does not answer is never gone.
PATIENCE_S = 5.0
# For importing torch and leaving again, which budgets of tests and benchmarks do not count; at most a quarter.
AROUND_S = 20.0


@dataclass(frozen=True)
class Part:
    """One step.

    Attributes:
        name: of the part and of its log.
        command: ``{seconds}`` in it stands for what it may take once it has started.
        timeout_s: beyond that it hangs.
        least_s: it is not begun with less time left.
        absent: exit status, or words in what it prints, that mean that it cannot be done here: no failure.
        nothing: what its last words look like where it ended well because it had nothing to do here: no success.
        goes_on: whether another try goes on where this one was ended, so that its limit is no hang.
        environment: variables beside those of this process.
        shows: a file whose text belongs into the summary.
    """

    name: str
    command: tuple[str, ...]
    timeout_s: float
    least_s: float = 10.0
    absent: tuple[int | str, ...] = ()
    nothing: str | None = None
    goes_on: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    shows: Path | None = None


class Runner:
    """Runs a table of parts.

    Args:
        folder: of the state, the logs and the summary.
        header: what a part's end belongs to.
        budget_s: seconds from now; None is no end.
    """

    def __init__(self, parts: Sequence[Part], folder: Path, header: Mapping[str, Any], budget_s: float | None) -> None:
        self.parts, self.folder, self.header, self.budget_s = parts, folder, dict(header), budget_s
        self.began = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)

    def run(self) -> int:
        """Run what is left; returns 75 where there is more to do, 1 where a part failed, else 0."""
        with _ended_by_signals():
            try:
                for part in self.parts:
                    for _ in range(TRIES):
                        if not self._is_left(part) or self._left_s() < part.least_s:
                            break
                        self._run(part)
            finally:
                self._sum_up()
        states = self._state()
        if any(self._is_left(part) for part in self.parts):
            return MORE
        return int(any(states[part.name]["status"] in BAD for part in self.parts))

    def _left_s(self) -> float:
        return float("inf") if self.budget_s is None else self.budget_s - (time.monotonic() - self.began)

    def _is_left(self, part: Part) -> bool:
        line = self._state().get(part.name)
        if line is None or line["status"] in (CUT, LEFT):
            return True
        if line["status"] == BEGUN and line["tries"] > 1:
            self._write(part, DIED, "begun twice, and never ended", 0.0)
            return False
        return line["status"] == BEGUN

    def _run(self, part: Part) -> None:
        limit = min(part.timeout_s, self._left_s())
        print(f"== {part.name}: at most {limit:.0f} s", flush=True)
        self._write(part, BEGUN, None, 0.0)
        began = time.monotonic()
        status, words = CUT, "ended from outside"
        try:
            status, words = self._outcome(part, limit)
        finally:
            self._write(part, status, words, time.monotonic() - began)
            print(f"   {part.name}: {status} after {time.monotonic() - began:.0f} s: {words}", flush=True)

    def _outcome(self, part: Part, limit: float) -> tuple[str, str]:
        log = self.folder / f"{part.name}.log"
        seconds = f"{limit - min(AROUND_S, limit / 4):.0f}"
        command = [word.replace("{seconds}", seconds) for word in part.command]
        with log.open("a", encoding="utf-8", errors="replace") as file:
            start = file.seek(0, os.SEEK_END)
            try:
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                    env={**os.environ, **part.environment}, start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                return ABSENT, f"{type(error).__name__}: {error}"
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                gone = _end(process)
        printed = log.read_bytes()[start:].decode(errors="replace")
        words = _last_words(printed)
        if code is None:
            if not gone:
                return HUNG, f"cannot be ended: {words}"
            return (CUT if part.goes_on or limit < part.timeout_s else HUNG), words
        if code in part.absent or (code != 0 and any(isinstance(w, str) and w in printed for w in part.absent)):
            return ABSENT, words
        if code < 0:
            return DIED, f"by signal {-code}: {words}"
        if code == 0 and part.nothing is not None and re.match(part.nothing, words):
            return ABSENT, words
        if code in (0, MORE):
            return (OK if code == 0 else LEFT), words
        return FAILED, f"status {code}: {words}"

    def _write(self, part: Part, status: str, words: str | None, seconds: float) -> None:
        line = {**self.header, "part": part.name, "status": status, "words": words, "seconds": round(seconds, 1)}
        record.append_lines(self.folder / "state.jsonl", [line])

    def _state(self) -> dict[str, dict[str, Any]]:
        """The last line of each part, with how often it was begun since it last said anything, and all its seconds."""
        path = self.folder / "state.jsonl"
        found: dict[str, dict[str, Any]] = {}
        tries: Counter[str] = Counter()
        seconds: Counter[str] = Counter()
        for _, line in record.read_lines(path) if path.exists() else ():
            if all(line.get(name) == value for name, value in self.header.items()):
                name = line["part"]
                tries[name] = tries[name] + 1 if line["status"] == BEGUN else 0
                seconds[name] += line["seconds"]
                found[name] = {**line, "tries": tries[name], "seconds": round(seconds[name], 1)}
        return found

    def _sum_up(self) -> None:
        states = self._state()
        rows = [
            {"part": part.name, **{key: states[part.name][key] for key in ("status", "seconds", "words")}}
            if part.name in states
            else {"part": part.name, "status": "not begun", "seconds": 0.0, "words": None}
            for part in self.parts
        ]
        (self.folder / "summary.json").write_text(json.dumps({**self.header, "parts": rows}, indent=1) + "\n")
        versions = ", ".join(f"{name} {version}" for name, version in self.header["versions"].items() if version)
        text = [
            f"# {self.header['device']}",
            f"commit {self.header['commit']}{' with changes' * bool(self.header['dirty'])}, "
            f"sources {self.header['sources']}; {versions}",
            "\n".join(
                ["| part | status | seconds | its last words |", "|---|---|---|---|"]
                + [f"| {r['part']} | {r['status']} | {r['seconds']:.0f} | {_cell(r['words'] or '')} |" for r in rows]
            ),
        ]
        for part in self.parts:
            if part.shows is not None and part.shows.exists():
                text.append(f"## {part.name}\n\n{part.shows.read_text().strip()}")
        (self.folder / "summary.md").write_text("\n\n".join(text) + "\n")


def _end(process: subprocess.Popen[bytes]) -> bool:
    """End a process and all that it started, whether or not it has ended itself; returns whether it is gone."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        if process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE_S)
    return process.poll() is not None


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """A part has a session of its own, and must not outlive its runner."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _last_words(printed: str) -> str:
    lines = [line.strip() for line in printed.splitlines() if re.search(r"\w", line)]
    return lines[-1].strip("= ")[:200] if lines else "it said nothing"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
