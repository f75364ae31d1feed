"""Every way in which a kernel can fail ends as its verdict on record; the caller lives, and torch's backend runs."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from peft_kernels._core import child, dispatch, records, verdicts
from peft_kernels._core.child import Limits, Outcome, Wanted
from peft_kernels._core.dispatch import Implementation
from peft_kernels._core.qualification import Family, Qualification
from peft_kernels._core.records import Signature
from peft_kernels._core.verdicts import CRASHED, HUNG, RIGHT, UNCOMPILED, WRONG

pytestmark = [pytest.mark.slow, pytest.mark.cpu_only]

MACHINE = Signature("Toy GPU", 90, 132, "1.0", "2.0", "3.0", "0" * 16)
CPU = torch.device("cpu")
# A problem takes a hundredth of a second, and a child's first one seconds where others have the processors.
LIMITS = Limits(start_s=120.0, problem_s=60.0, total_s=300.0)
SECOND = "37x40x24 r8 float32"

EXPECTED = {
    "right": (RIGHT, None, None),
    "talking": (RIGHT, None, None),
    "last_tile": (WRONG, "45x40x24 r8 float32", "y: relative error"),
    "unwritten_row": (WRONG, "45x40x24 r8 float32", "elements are inf, -inf, nan or finite where they must not"),
    "s": (WRONG, "45x40x24 r8 float32", "s: relative error"),
    "input": (WRONG, "45x40x24 r8 float32", "an input after the call: 1 of 1080 elements differ"),
    "unsteady": (WRONG, "45x40x24 r8 float32", "y of two runs: 1 of 1800 elements differ"),
    "da": (WRONG, "45x40x24 r8 float32", "dlora_a: relative error"),
    "db": (WRONG, "45x40x24 r8 float32", "dlora_b was not returned"),
    "compile": (UNCOMPILED, SECOND, "CompilationError: at 1:0:"),
    "passes": (UNCOMPILED, SECOND, "PassManager::run failed"),
    "raise": (CRASHED, SECOND, "LookupError: no tile"),
    "device": (CRASHED, SECOND, "an illegal memory access"),
    "abort": (CRASHED, SECOND, "SIGABRT"),
    "segfault": (CRASHED, SECOND, "SIGSEGV"),
    "exit": (CRASHED, SECOND, "the child ended with status 7"),
    "hang": (HUNG, SECOND, "not ready after 20 s"),
}
ENDS_THE_CHILD = ("device", "abort", "segfault", "exit", "hang")
UNANSWERED = {
    "memory": "OutOfMemoryError: CUDA out of memory",
    "killed": "SIGKILL",
    "nowhere": "does not declare it",
}


def _key(what: str) -> str:
    return verdicts.key(f"sabotaged_{what}", "toy", "toy")


def _wanted(what: str) -> Wanted:
    return Wanted(_key(what), f"sabotaged_{what}", "toy", "toy", "tests.core.sabotage", False)


def _checked(whats: Sequence[str]) -> Outcome:
    """One check, the right one last: it has to be reached whatever happens before it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", "3")
        patch.setenv("MASTER_ADDR", "nowhere")
        return child.check([_wanted(what) for what in (*whats, "right")], CPU, LIMITS)


def _says(what: str, found: Outcome) -> None:
    kind, problem, reason = EXPECTED[what]
    verdict = found.verdicts[_key(what)]
    assert (verdict["kind"], verdict["problem"]) == (kind, problem)
    assert (reason is None) == (verdict["reason"] is None)
    assert reason is None or reason in verdict["reason"]
    assert verdict["problems"] == (2 if kind == RIGHT else int(problem == SECOND))
    assert verdict["error"] < 1.0 and (verdict["error"] > 0.0) == (verdict["problems"] > 0)
    # It is what a record holds, and comes back from one.
    assert verdicts._verdict(json.loads(json.dumps(verdict))) == verdicts.Verdict(**verdict)


def test_faults_are_verdicts() -> None:
    whats = [*(what for what in EXPECTED if what not in (*ENDS_THE_CHILD, "right")), "segfault"]
    found = _checked(whats)
    for what in (*whats, "right"):
        _says(what, found)


@pytest.mark.thorough
def test_what_ends_the_child_is_a_verdict_or_none() -> None:
    """Each costs another process."""
    faults = [what for what in ENDS_THE_CHILD if what != "hang"]
    found = _checked([*faults, *UNANSWERED])
    for what in faults:
        _says(what, found)
    for what, reason in UNANSWERED.items():
        assert _key(what) not in found.verdicts
        assert reason in found.unanswered[_key(what)]


@pytest.mark.thorough
def test_a_hang_is_a_verdict() -> None:
    """What comes after it goes on in another child."""
    found = child.check([_wanted("hang"), _wanted("slow")], CPU, LIMITS._replace(problem_s=20.0))
    _says("hang", found)
    assert found.verdicts[_key("slow")]["kind"] == RIGHT


@dataclasses.dataclass(frozen=True)
class Problem:
    device: torch.device


@pytest.fixture
def on_a_toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine that claims to have a GPU, whose children compute on the CPU; the file in which they say that they are
    there."""
    monkeypatch.setenv(records.DIRECTORY_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv(verdicts.POLICY_VARIABLE, raising=False)
    monkeypatch.setenv("SABOTAGE_STARTS", str(tmp_path / "starts"))
    for module, name in ((verdicts, "_known"), (verdicts, "_unanswered"), (records, "_unsaved")):
        monkeypatch.setattr(module, name, {})
    for module in (records, dispatch):
        monkeypatch.setattr(module, "_said", set())
    monkeypatch.setattr(records, "signature", lambda device: MACHINE)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    check = child.check
    monkeypatch.setattr(child, "check", lambda wanted, device, limits, *rest: check(wanted, CPU, LIMITS, *rest))
    return tmp_path / "starts"


def _implementation(what: str) -> Implementation:
    family = Family(f"sabotaged_{what}", *[lambda *_: None] * 3)  # type: ignore[arg-type]
    qualification = Qualification(
        family, ("toy",), lambda problem: ("toy",), lambda *_: (), quick=(), module="tests.core.sabotage"
    )
    return Implementation("toy", lambda: None, lambda: None, qualification=qualification)


def _choose(*what: str) -> str:
    torch_ = Implementation("torch", lambda: None, lambda: None)
    implementations = *map(_implementation, what), torch_
    return dispatch.select_backend("toy", implementations, Problem(torch.device("cuda")), "auto").name


def test_call_waits_for_a_check_once(on_a_toy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = dispatch.generation
    assert _choose("right") == "toy"
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1
    assert "sabotaged_right once on this machine (Toy GPU)" in said[0]
    assert "PEFT_KERNELS_QUALIFY=never switches that off" in said[0]
    assert dispatch.generation > before
    assert _choose("right") == "toy"
    verdicts._known.clear()  # as in another process
    assert _choose("right") == "toy"
    assert len(on_a_toy.read_text().splitlines()) == 1
    assert not capfd.readouterr().err


def test_caller_lives_and_torch_runs(on_a_toy: Path) -> None:
    with pytest.warns(UserWarning, match=r"toy: it crashed: 37x40x24 r8 float32: .*SIGSEGV"):
        assert _choose("segfault") == "torch"
    on_record = json.loads((on_a_toy.parent / "cache" / MACHINE.file_name).read_text())["verdicts"]
    assert on_record[_key("segfault")]["kind"] == CRASHED
    # The policy asks for no check of what failed, and none is started.
    assert _choose("segfault") == "torch"
    assert len(on_a_toy.read_text().splitlines()) == 1


def test_without_a_verdict_torch_runs_and_nothing_is_on_record(on_a_toy: Path) -> None:
    with pytest.warns(UserWarning, match="it could not be checked on this machine: OutOfMemoryError"):
        assert _choose("memory") == "torch"
    assert _choose("memory") == "torch"
    assert len(on_a_toy.read_text().splitlines()) == 1
    assert not (on_a_toy.parent / "cache" / MACHINE.file_name).exists()


_ONE_OF_SEVERAL = """
import sys, torch
from peft_kernels._core import records, verdicts
from tests.core.test_qualify_sabotage import CPU, LIMITS, MACHINE, _wanted
print(verdicts.why_not_parts(MACHINE, [_wanted(what) for what in sys.argv[1:]], CPU, LIMITS))
"""


def _start(*what: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _ONE_OF_SEVERAL, *what], stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def test_processes_check_once(on_a_toy: Path) -> None:
    processes = [_start("right", "slow") for _ in range(2)]
    assert [process.communicate(timeout=200)[0] for process in processes] == ["None\n"] * 2
    assert len(on_a_toy.read_text().splitlines()) == 1


def _until(condition: object, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.thorough
def test_a_killed_one_leaves_no_lock_and_no_half_record(on_a_toy: Path) -> None:
    record = on_a_toy.parent / "cache" / MACHINE.file_name
    process = _start("right", "wait")
    try:
        _until(record.exists)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=30)
    assert set(json.loads(record.read_text())["verdicts"]) == {_key("right")}
    assert not list(record.parent.glob("*.tmp"))
    with records.locked(verdicts.lock_path(record.parent, MACHINE), 10.0) as refusal:
        assert refusal is None
    # Its child sees that nobody waits any more.
    (pid,) = map(int, on_a_toy.read_text().split())
    _until(lambda: not Path(f"/proc/{pid}").exists())
    # What it found out is not found out again.
    assert verdicts.why_not_parts(MACHINE, [_wanted("right"), _wanted("slow")], CPU, LIMITS) is None
    assert len(on_a_toy.read_text().splitlines()) == 2


def test_an_alarm_ends_what_its_parent_cannot_tell(on_a_toy: Path) -> None:
    """A hang that holds the interpreter's lock sees no closed pipe."""
    process = subprocess.Popen(
        [sys.executable, "-c", child._START, json.dumps(sys.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        assert process.stdin is not None
        process.stdin.write(json.dumps({"wanted": [_wanted("hang")], "device": "cpu", "seconds": 4}) + "\n")
        process.stdin.flush()
        assert process.wait(60) == -signal.SIGALRM
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("where", ["torch", "peft_kernels"])
def test_child_that_cannot_start_is_no_verdict(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"{where}.py").write_text("raise RuntimeError('this one is broken')")
    monkeypatch.syspath_prepend(tmp_path)
    found = child.check([_wanted("right")], CPU, LIMITS)
    assert not found.verdicts
    assert "ended with status 1 at its start" in found.unanswered[_key("right")]
    assert "this one is broken" in found.unanswered[_key("right")]


def test_child_without_a_device_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "_environment", lambda device: dict(os.environ))
    found = child.check([_wanted("right"), _wanted("slow")], torch.device("cuda", 0), LIMITS)
    if torch.cuda.is_available():
        pytest.skip("here the child has one")
    assert not found.verdicts and len(found.unanswered) == 2
    assert all("could not have the device" in reason for reason in found.unanswered.values())


def test_time_is_bounded() -> None:
    start = time.monotonic()
    found = child.check([_wanted("right"), _wanted("wait")], CPU, Limits(start_s=0.05, problem_s=1.0, total_s=60.0))
    assert "had no device after" in found.unanswered[_key("right")] and len(found.unanswered) == 2
    found = child.check([_wanted("right")], CPU, Limits(start_s=60.0, problem_s=60.0, total_s=0.05))
    assert "time was up" in found.unanswered[_key("right")]
    assert time.monotonic() - start < 60.0
