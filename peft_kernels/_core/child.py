"""A child process that checks kernels, and its parent: a kernel that hangs or traps takes the child with it.

The child is a fresh interpreter, because a process that has touched CUDA must not fork; ``peft_kernels.judge`` is its
other half. It reads one JSON request, and writes a JSON line when it begins a problem and when it has finished one, so
that where it ends, the problem at which it ended is known. The parent then starts another for the parts that are left.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple

import torch

Progress = Callable[[int, int, str], None]
OnVerdict = Callable[[str, dict[str, Any]], None]

# The parent's place among the processes of a launch, which its child must not take.
_OF_A_LAUNCH = re.compile(
    r"(RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|NODE_RANK|(GROUP|ROLE)_(RANK|NAME|WORLD_SIZE)|MASTER_(ADDR|PORT)"
    r"|TORCHELASTIC_.*|TORCH_NCCL_.*|OMPI_.*|PMI_.*|PMIX_.*|PEFT_KERNELS_(BACKEND|QUALIFY))"
)
_START = "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); from peft_kernels.judge import child; child()"
_LEAVE_S = 10.0

NOT_HERE = "it does not run here"
"""How the reason begins where there is no verdict because there is nothing to judge."""


class Wanted(NamedTuple):
    """A part that is to be checked.

    Attributes:
        key: of its verdict.
        operator, implementation, part: their names.
        module: what declares the operator.
        alone: whether the implementation gets a child of its own.
    """

    key: str
    operator: str
    implementation: str
    part: str
    module: str
    alone: bool


class Limits(NamedTuple):
    """How long a child may take to have the device, for a problem, and all of them together, in seconds."""

    start_s: float
    problem_s: float
    total_s: float


@dataclass
class Outcome:
    """What was found out: entries of a record by key, and for the other keys why there is no verdict."""

    verdicts: dict[str, dict[str, Any]] = field(default_factory=dict)
    unanswered: dict[str, str] = field(default_factory=dict)

    def has(self, key: str) -> bool:
        return key in self.verdicts or key in self.unanswered


def why_no_child() -> str | None:
    """Reason why this process can start no interpreter, or None."""
    if getattr(sys, "frozen", False) or not sys.executable:
        return "no process can be started from a frozen application, which has no Python interpreter"
    if multiprocessing.current_process().daemon:
        return "a daemonic process must start none, because it may be ended without notice"
    return None


def check(
    wanted: Sequence[Wanted],
    device: torch.device,
    limits: Limits,
    progress: Progress | None = None,
    on_verdict: OnVerdict | None = None,
) -> Outcome:
    """Check parts in child processes, one after another, and return a verdict or a reason for each.

    Args:
        wanted: the parts.
        device: where they are checked.
        limits: what a child may take.
        progress: called with how many are done, of how many, and the key of the one that is next.
        on_verdict: called with each verdict as soon as it is known, so that what ends the parent loses one.
    """
    outcome, deadline = Outcome(), time.monotonic() + limits.total_s
    groups: dict[object, list[Wanted]] = {}
    for each in wanted:
        groups.setdefault((each.operator, each.implementation) if each.alone else None, []).append(each)
    for group in groups.values():
        left = group
        while left:
            reason = why_no_child() or ("time was up" if time.monotonic() >= deadline else None)
            if reason is None:
                reason = _Run(left, device, limits, deadline, outcome, len(wanted), progress, on_verdict).run()
            if reason is not None:
                outcome.unanswered.update({each.key: reason for each in left if not outcome.has(each.key)})
            settled = [each for each in left if outcome.has(each.key)]
            if not settled:
                outcome.unanswered.update({each.key: "the child said nothing of it" for each in left})
            left = [each for each in left if not outcome.has(each.key)]
    return outcome


class _Run:
    """One child, from its start to its end."""

    def __init__(
        self,
        wanted: Sequence[Wanted],
        device: torch.device,
        limits: Limits,
        deadline: float,
        outcome: Outcome,
        total: int,
        progress: Progress | None,
        on_verdict: OnVerdict | None,
    ) -> None:
        self.wanted, self.device, self.limits, self.deadline = wanted, device, limits, deadline
        self.outcome, self.total, self.progress, self.on_verdict = outcome, total, progress, on_verdict
        self.lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.said: deque[str] = deque(maxlen=20)
        self.is_ready = self.has_found = False
        self.at: dict[str, Any] | None = None

    def run(self) -> str | None:
        """Start it and follow it; returns why the parts without a verdict get none, or None where others may go on."""
        try:
            process = subprocess.Popen(
                [sys.executable, "-c", _START, json.dumps(sys.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, env=_environment(self.device), text=True, encoding="utf-8", errors="replace",
            )  # fmt: skip
        except OSError as error:
            return f"no process can be started ({type(error).__name__}: {error})"
        readers = [
            threading.Thread(target=self._read, args=(process.stdout,), daemon=True),
            threading.Thread(target=self._listen, args=(process.stderr,), daemon=True),
        ]
        for reader in readers:
            reader.start()
        try:
            self._ask(process)
            ended = self._follow()
        except BaseException:
            _end(process, patience_s=0.0)
            raise
        else:
            # Who has closed its output is ending, which takes a while where a core is dumped.
            status = _end(process, patience_s=_LEAVE_S if ended is None else 0.5)
        finally:
            for reader, stream in zip(readers, (process.stdout, process.stderr), strict=True):
                reader.join(_LEAVE_S)
                if not reader.is_alive() and stream is not None:
                    stream.close()
        return self._conclude(ended, status)

    def _ask(self, process: subprocess.Popen[str]) -> None:
        """Send the request; the pipe stays open, and its end tells the child that its parent is gone."""
        request = {
            "wanted": self.wanted,
            "device": "cpu" if self.device.type != "cuda" else "cuda:0",
            "seconds": max(1.0, self.deadline - time.monotonic() + _LEAVE_S),
        }
        with contextlib.suppress(BrokenPipeError):
            assert process.stdin is not None
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()

    def _follow(self) -> str | None:
        """Take the child's lines until it ends (None), or a limit is reached (its name)."""
        while True:
            limit = self.limits.problem_s if self.is_ready else self.limits.start_s
            left = self.deadline - time.monotonic()
            try:
                line = self.lines.get(timeout=max(0.0, min(limit, left)))
            except queue.Empty:
                return "total" if left < limit else "problem"
            if line is None:
                return None
            self._take(line)

    def _take(self, line: dict[str, Any]) -> None:
        event = line.pop("event")
        self.is_ready = True
        if event == "begin":
            self.at = line
        elif event == "end":
            self.at = None
        elif event == "verdict":
            self.at = None
            self._found(line["key"], line["verdict"])
        elif event == "none":
            self.at, self.has_found = None, True
            self.outcome.unanswered[line["key"]] = line["reason"]
        elif event == "nothing":
            self.outcome.unanswered.update(
                {each.key: line["reason"] for each in self.wanted if not self.outcome.has(each.key)}
            )
        done = len(self.outcome.verdicts) + len(self.outcome.unanswered)
        if self.progress is not None and ((event == "begin" and line["done"] == 0) or done == self.total):
            self.progress(done, self.total, line.get("key", ""))

    def _conclude(self, ended: str | None, status: int | None) -> str | None:
        """Give the problem at which the child ended its verdict."""
        if all(self.outcome.has(each.key) for each in self.wanted):
            return None
        if ended == "total":
            return f"time was up after {self.limits.total_s:.0f} s"
        how, said = _status_text(status), " | ".join(self.said)
        tail = f" ({said[-400:]})" if said else ""
        if not self.is_ready:
            late = f"the child had no device after {self.limits.start_s:.0f} s"
            return late if ended else f"{how} at its start{tail}"
        if self.at is None:
            # A fault that takes the device along ends a child; then the next one goes on.
            return None if self.has_found else f"{how}, at no problem{tail}"
        if ended is None and status == -getattr(signal, "SIGKILL", 9):
            # The operating system ends a process when memory runs out: nobody says that the kernel is wrong.
            self.outcome.unanswered[self.at["key"]] = f"{how} at {self.at['problem']}{tail}"
            return None
        kind, reason = ("hung", f"not ready after {self.limits.problem_s:.0f} s") if ended else ("crashed", how + tail)
        seconds = self.limits.problem_s if ended else 0.0
        verdict = {"kind": kind, "problems": self.at["done"], "error": self.at["error"], "seconds": seconds}
        self._found(self.at["key"], {**verdict, "problem": self.at["problem"], "reason": reason})
        return None

    def _found(self, key: str, verdict: dict[str, Any]) -> None:
        self.has_found = True
        self.outcome.verdicts[key] = verdict
        if self.on_verdict is not None:
            self.on_verdict(key, verdict)

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            try:
                content = json.loads(line)
            except ValueError:
                continue
            if isinstance(content, dict) and "event" in content:
                self.lines.put(content)
        self.lines.put(None)

    def _listen(self, stream: IO[str]) -> None:
        self.said.extend(line.strip() for line in stream if line.strip())


def _end(process: subprocess.Popen[str], patience_s: float) -> int | None:
    """Close the pipe, give the child a moment to leave by itself, and end it; None where it does not even die."""
    with contextlib.suppress(OSError):
        assert process.stdin is not None
        process.stdin.close()
    for wait_s in (patience_s, _LEAVE_S):
        try:
            return process.wait(wait_s)
        except subprocess.TimeoutExpired:
            process.kill()
    return process.poll()


def _status_text(status: int | None) -> str:
    if status is None:
        return "the child could not be ended"
    if status >= 0:
        return f"the child ended with status {status}"
    with contextlib.suppress(ValueError):
        return f"the child was ended by {signal.Signals(-status).name}"
    return f"the child was ended by signal {-status}"


def _environment(device: torch.device) -> dict[str, str]:
    """The parent's, without its place in a launch, and with its device as the only one."""
    kept = {name: value for name, value in os.environ.items() if not _OF_A_LAUNCH.fullmatch(name)}
    kept["PEFT_KERNELS_QUALIFY"] = "never"
    if device.type == "cuda":
        kept["CUDA_VISIBLE_DEVICES"] = _visible_name(device)
    return kept


def _visible_name(device: torch.device) -> str:
    """The name by which CUDA_VISIBLE_DEVICES has a device, which does not depend on what else is visible."""
    index = torch.cuda.current_device() if device.index is None else device.index
    given = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    if index < len(given) and not given[index].isdigit():
        return given[index]
    properties = torch.cuda.get_device_properties(index)
    uuid = getattr(properties, "uuid", None)
    if uuid is not None:
        return f"{'MIG' if ' MIG ' in properties.name else 'GPU'}-{uuid}"
    return given[index] if index < len(given) else str(index)
