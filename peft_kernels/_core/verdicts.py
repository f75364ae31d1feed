"""Whether a kernel is right on this machine: what is on record, and when to find it out.

A verdict is found out in a child process, by child.py, once for a machine; ranks that start together leave it to one of
them. What could not be found out is no verdict: it holds for this process alone, and the torch backend runs.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch

from peft_kernels._core import child, records
from peft_kernels._core.child import Limits, Wanted
from peft_kernels._core.qualification import Qualification

POLICY_VARIABLE = "PEFT_KERNELS_QUALIFY"
POLICIES = ("auto", "never")

RIGHT, WRONG, HUNG, CRASHED, UNCOMPILED = KINDS = ("right", "wrong", "hung", "crashed", "does not compile")

COMMAND = "`python -m peft_kernels.qualify`"
# A call waits; a part is some ten compiles, which take seconds each on a machine that trains already.
LIMITS = Limits(start_s=180.0, problem_s=300.0, total_s=900.0)

_log = logging.getLogger("peft_kernels")
_lock = threading.Lock()
_known: dict[records.Signature, dict[str, Verdict]] = {}
_unanswered: dict[records.Signature, dict[str, str]] = {}


@dataclass(frozen=True)
class Verdict:
    """What a machine found out about a part of an implementation.

    Attributes:
        kind: a name of ``KINDS``.
        problems: how many were right.
        error: the largest error in units of the budget, of those that were compared.
        seconds: what it took.
        problem: the one at which it went wrong, or None.
        reason: what went wrong there, or None.
    """

    kind: str
    problems: int = 0
    error: float = 0.0
    seconds: float = 0.0
    problem: str | None = None
    reason: str | None = None

    def __str__(self) -> str:
        if self.kind == RIGHT:
            return f"right on {self.problems} problem{'s' * (self.problems != 1)}"
        return f"{_PAST[self.kind]}: {self.problem}: {self.reason}"


_PAST = {WRONG: "was wrong", HUNG: "hung", CRASHED: "crashed", UNCOMPILED: "did not compile"}
_TYPES: dict[str, Any] = {"kind": str, "problems": int, "error": (int, float), "seconds": (int, float)}


def policy() -> str:
    """What may start a check: "auto", a call; "never", only the command.

    An unknown value is "never", with a warning: whoever set the variable did not want the default, and a mistyped name
    should cost a training run some speed and not the run.
    """
    given = os.environ.get(POLICY_VARIABLE) or "auto"
    if given in POLICIES:
        return given
    _warn_of_policy(given)
    return "never"


@cache
def _warn_of_policy(given: str) -> None:
    _log.warning("%s must be 'auto' or 'never', got %r, which is taken for 'never'", POLICY_VARIABLE, given)


def key(operator: str, implementation: str, part: str) -> str:
    """The name of a verdict in a record."""
    return f"{operator}/{implementation}/{part}"


def of(machine: records.Signature) -> dict[str, Verdict]:
    """The verdicts on record, by key; entries that are none are passed over."""
    found = {name: _verdict(entry) for name, entry in records.read(machine).verdicts.items()}
    return {name: verdict for name, verdict in found.items() if verdict is not None}


def why_not(implementation: str, qualification: Qualification, problem: Any) -> str | None:
    """Reason why ``auto`` does not take an implementation for a problem, or None; may start a check and wait for it."""
    device = problem.device
    if device.type != "cuda":
        where = "Triton's interpreter" if implementation.startswith("triton") else "an emulator"
        return f"on a CPU it runs in {where}, which is for tests"
    machine, parts = records.signature(device), qualification.touched(problem)
    return why_not_parts(machine, [wanted_of(implementation, qualification, part) for part in parts], device)


def wanted_of(implementation: str, qualification: Qualification, part: str) -> Wanted:
    """What a child process is asked for one part."""
    operator = qualification.family.operator
    return Wanted(key(operator, implementation, part), operator, implementation, part, qualification.module,
                  qualification.alone)  # fmt: skip


def why_not_parts(
    machine: records.Signature, wanted: Iterable[Wanted], device: torch.device, limits: Limits = LIMITS
) -> str | None:
    """The same for the parts that are asked for."""
    known = _known.get(machine)
    if known is None:
        known = _known.setdefault(machine, of(machine))
    missing = [each for each in wanted if each.key not in known]
    if missing:
        reason = _why_unknown(machine, missing, device, limits)
        if reason is not None:
            return reason
        known = _known[machine]
    failed = (known[each.key] for each in wanted if known[each.key].kind != RIGHT)
    verdict = next(failed, None)
    return None if verdict is None else f"it {verdict} (on this machine; {COMMAND[:-1]} --full` checks it again)"


def _why_unknown(machine: records.Signature, missing: list[Wanted], device: torch.device, limits: Limits) -> str | None:
    """Find out what is missing, or say why it stays unknown."""
    if policy() == "never":
        return f"it has not been checked on this machine ({POLICY_VARIABLE}=never); {COMMAND} does"
    unanswered = _unanswered.setdefault(machine, {})
    if all(each.key not in unanswered for each in missing):
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            # Not remembered: outside of the capture the next call may wait.
            return "it has not been checked on this machine, and a CUDA graph is being captured, which must not wait"
        with _lock:
            obtain(machine, missing, device, limits)
    reasons = (unanswered[each.key] for each in missing if each.key in unanswered)
    reason = next(reasons, None)
    return None if reason is None else f"it could not be checked on this machine: {reason}"


def obtain(machine: records.Signature, wanted: list[Wanted], device: torch.device, limits: Limits = LIMITS) -> None:
    """Check what nobody has checked; of several processes one does it, and the others wait and read."""
    unanswered = _unanswered.setdefault(machine, {})
    folder, _ = records.directory()
    if folder is None:
        _check(machine, wanted, device, limits)
        return
    with records.locked(lock_path(folder, machine), limits.total_s + limits.start_s) as refusal:
        if refusal is not None and refusal.is_busy:
            unanswered.update({each.key: refusal.reason for each in wanted})
            return
        _known[machine] = of(machine)
        missing = [each for each in wanted if each.key not in _known[machine] and each.key not in unanswered]
        if missing:
            _check(machine, missing, device, limits)


def lock_path(folder: Path, machine: records.Signature) -> Path:
    """The file whose lock whoever checks a machine holds."""
    return folder / f"{machine.file_name}.check"


def _check(machine: records.Signature, wanted: list[Wanted], device: torch.device, limits: Limits) -> None:
    operators = ", ".join(dict.fromkeys(each.operator for each in wanted))
    _tell(
        f"peft_kernels: checks its kernels for {operators} once on this machine ({machine.gpu}), "
        f"for at most {limits.total_s / 60:.0f} min; {POLICY_VARIABLE}=never switches that off"
    )
    progress = show_progress if sys.stderr.isatty() else None
    outcome = child.check(wanted, device, limits, progress, lambda name, entry: store(machine, {name: entry}))
    _known[machine] = of(machine)
    _unanswered.setdefault(machine, {}).update(outcome.unanswered)


def store(machine: records.Signature, found: Mapping[str, Mapping[str, Any]]) -> None:
    """Put verdicts, as a child process reports them, on record."""
    if found:
        records.update(machine, "verdicts", found)
    _known[machine] = of(machine)


def forget(machine: records.Signature) -> None:
    """Drop all verdicts on a machine's record, and what this process remembers."""
    records.update(machine, "verdicts", {}, replace=True)
    _known.pop(machine, None)
    _unanswered.pop(machine, None)


def as_entry(verdict: Verdict) -> dict[str, Any]:
    """A verdict as a record has it."""
    return asdict(verdict)


def _verdict(entry: Any) -> Verdict | None:
    """A record's entry as a verdict; what is none is passed over, and found out again."""
    if not isinstance(entry, dict) or entry.keys() != {each.name for each in fields(Verdict)}:
        return None
    if entry["kind"] not in KINDS or not all(isinstance(entry[name], kind) for name, kind in _TYPES.items()):
        return None
    if not all(isinstance(entry[name], (str, type(None))) for name in ("problem", "reason")):
        return None
    return Verdict(**entry)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def show_progress(done: int, total: int, name: str) -> None:
    """Rewrite one line of a terminal."""
    end = "\n" if done == total else ""
    print(f"\r\033[Kpeft_kernels: {done} of {total} checked  {name[:60]}", end=end, file=sys.stderr, flush=True)
