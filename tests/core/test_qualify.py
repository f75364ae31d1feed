"""The check of kernels: what starts one, what it runs, what the command says."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_kernels import judge, qualify
from peft_kernels._core import child, dispatch, records, triton_tools, verdicts
from peft_kernels._core.child import NOT_HERE, Limits, Outcome, Wanted
from peft_kernels._core.device import INTERPRETER, Hardware
from peft_kernels._core.dispatch import Implementation
from peft_kernels._core.operator import OPERATORS, Operator
from peft_kernels._core.qualification import LARGEST_BYTES, dtype_name, dtypes_of
from peft_kernels._core.records import Signature
from peft_kernels._core.triton_tools import why_not_environment
from peft_kernels._core.verdicts import RIGHT, WRONG, Verdict

MACHINE = Signature("Toy GPU", 90, 132, "1.0", "2.0", "3.0", "0" * 16)
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")

CHECKED = [(operator, implementation) for operator in OPERATORS.values() for implementation in operator.to_check]
each_checked = pytest.mark.parametrize(
    "operator, implementation", CHECKED, ids=[f"{operator.name}-{each.name}" for operator, each in CHECKED]
)


@dataclasses.dataclass(frozen=True)
class Problem:
    device: torch.device


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """A machine of the test's own, whose checks are noted and find everything right."""
    monkeypatch.setenv(records.DIRECTORY_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv(verdicts.POLICY_VARIABLE, raising=False)
    for module, name in ((verdicts, "_known"), (verdicts, "_unanswered"), (records, "_unsaved")):
        monkeypatch.setattr(module, name, {})
    for module in (records, dispatch):
        monkeypatch.setattr(module, "_said", set())
    verdicts._warn_of_policy.cache_clear()
    monkeypatch.setattr(records, "signature", lambda device: MACHINE)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    asked: list[list[str]] = []

    def check(wanted: list[Wanted], device: torch.device, limits: Limits, *rest: Any) -> Outcome:
        asked.append([each.key for each in wanted])
        for each in wanted:
            if rest[1:]:
                rest[1](each.key, verdicts.as_entry(Verdict(RIGHT, 2, 0.5, 1.0)))
        return Outcome({each.key: verdicts.as_entry(Verdict(RIGHT, 2, 0.5, 1.0)) for each in wanted})

    monkeypatch.setattr(child, "check", check)
    return asked


def _implementation(*parts: str) -> Implementation:
    qualification = dataclasses.replace(CHECKED[0][1].qualification, touched=lambda problem: parts)  # type: ignore
    return Implementation("triton", lambda: None, lambda: None, qualification=qualification)


def _why_not(*parts: str, device: torch.device = CUDA) -> str | None:
    return _implementation(*parts).why_not_auto(Problem(device))


def _key(part: str) -> str:
    assert CHECKED[0][1].qualification is not None
    return verdicts.key(CHECKED[0][1].qualification.family.operator, "triton", part)


def test_only_what_is_touched_and_unknown_is_checked(toy: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    assert _why_not("a", "b") is None
    assert _why_not("b", "c") is None
    # What is known takes no lock and reads no file.
    monkeypatch.setattr(verdicts, "obtain", lambda *arguments: pytest.fail("looked again"))
    monkeypatch.setattr(records, "read", lambda machine: pytest.fail("read again"))
    assert _why_not("c", "a") is None
    assert toy == [[_key("a"), _key("b")], [_key("c")]]


def test_a_record_answers_in_another_process(toy: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts.store(MACHINE, {_key("a"): verdicts.as_entry(Verdict(RIGHT, 2))})
    wrong = Verdict(WRONG, 1, 0.4, 2.0, "m37", "dlora_a: too large")
    verdicts.store(MACHINE, {_key("b"): verdicts.as_entry(wrong)})
    monkeypatch.setattr(verdicts, "_known", {})
    assert _why_not("a") is None
    expected = "it was wrong: m37: dlora_a: too large (on this machine; `python -m peft_kernels.qualify --full` checks"
    assert str(_why_not("a", "b")).startswith(expected)
    assert not toy


@pytest.mark.parametrize(
    "entry",
    [
        3,
        {},
        {"kind": "right"},
        {**verdicts.as_entry(Verdict(RIGHT)), "kind": "fine"},
        {**verdicts.as_entry(Verdict(RIGHT)), "problems": "2"},
        {**verdicts.as_entry(Verdict(RIGHT)), "reason": ["x"]},
        {**verdicts.as_entry(Verdict(RIGHT)), "more": 1},
    ],
    ids=str,
)
def test_entry_that_is_no_verdict_is_found_out_again(entry: object, toy: list[list[str]]) -> None:
    records.update(MACHINE, "verdicts", {_key("a"): entry})
    assert _why_not("a") is None
    assert toy == [[_key("a")]]


def test_never_reads_records_alone(toy: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(verdicts.POLICY_VARIABLE, "never")
    expected = "it has not been checked on this machine (PEFT_KERNELS_QUALIFY=never); `python -m peft_kernels.qualify`"
    assert str(_why_not("a")).startswith(expected)
    verdicts.store(MACHINE, {_key("a"): verdicts.as_entry(Verdict(RIGHT))})
    assert _why_not("a") is None
    assert not toy


def test_unknown_policy_is_never_and_said_once(
    toy: list[list[str]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(verdicts.POLICY_VARIABLE, "0")
    for _ in range(2):
        assert "has not been checked" in str(_why_not("a"))
    assert caplog.messages == ["PEFT_KERNELS_QUALIFY must be 'auto' or 'never', got '0', which is taken for 'never'"]
    monkeypatch.setenv(verdicts.POLICY_VARIABLE, "")
    assert verdicts.policy() == "auto"


def test_nothing_waits_in_a_capture(toy: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "a CUDA graph is being captured" in str(_why_not("a"))
    assert not toy
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert _why_not("a") is None


def test_a_traced_call_is_checked_too(toy: list[list[str]]) -> None:
    """The shapes of what is kept depend on the choice, and a graph's run must make the one with which it was traced."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert _why_not("a") is None
    assert _why_not("a") is None
    assert toy == [[_key("a")]]


def test_on_a_cpu_nothing_is_asked(toy: list[list[str]]) -> None:
    verdicts.store(MACHINE, {_key("a"): verdicts.as_entry(Verdict(RIGHT))})
    assert _why_not("a", device=CPU) == "on a CPU it runs in Triton's interpreter, which is for tests"
    assert not toy


def test_a_busy_lock_is_no_verdict(toy: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(start_s=0.1, problem_s=1.0, total_s=0.1)
    wanted = [Wanted(_key("a"), "x", "triton", "a", "peft_kernels", False)]
    with records.locked(verdicts.lock_path(tmp_path / "cache", MACHINE), 5.0) as refusal:
        assert refusal is None
        reason = verdicts.why_not_parts(MACHINE, wanted, CUDA, limits)
    assert "could not be checked on this machine: another process has held" in str(reason)
    # It holds for the process: no later call waits once more.
    monkeypatch.setattr(verdicts, "obtain", lambda *arguments: pytest.fail("waits again"))
    assert verdicts.why_not_parts(MACHINE, wanted, CUDA, limits) == reason
    assert not toy


def test_without_a_cache_directory_the_process_remembers(toy: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "directory", lambda: (None, "there is no cache directory"))
    assert _why_not("a") is None
    assert _why_not("a") is None
    assert len(toy) == 1


@pytest.mark.parametrize(
    ("owner", "name", "value", "why"),
    [
        (sys, "frozen", True, "a frozen application"),
        (sys, "executable", "", "a frozen application"),
        (multiprocessing.current_process(), "_config", {"daemon": True}, "a daemonic process"),
        (sys, "executable", "/nowhere/python", "no process can be started (FileNotFoundError"),
    ],
    ids=["frozen", "no-executable", "daemonic", "gone"],
)
def test_where_no_process_can_be_started(
    owner: object, name: str, value: object, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(owner, name, value, raising=False)
    wanted = [Wanted(each, "x", "triton", each, "peft_kernels", False) for each in "ab"]
    found = child.check(wanted, CPU, Limits(10.0, 10.0, 10.0))
    assert not found.verdicts and set(found.unanswered) == {"a", "b"}
    assert all(why in reason for reason in found.unanswered.values())


def test_child_takes_no_place_in_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID",
                 "GROUP_RANK", "PEFT_KERNELS_BACKEND"):  # fmt: skip
        monkeypatch.setenv(name, "1")
    for name in ("TRITON_CACHE_DIR", "CUDA_DEVICE_ORDER", "MY_RANK", "PEFT_KERNELS_CACHE_DIR"):
        monkeypatch.setenv(name, "kept")
    given = child._environment(CPU)
    assert set(os.environ) - set(given) == {
        "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "GROUP_RANK",
        "PEFT_KERNELS_BACKEND",
    }  # fmt: skip
    assert given["PEFT_KERNELS_QUALIFY"] == "never"


@pytest.mark.parametrize(
    ("visible", "index", "name"),
    [
        (None, 1, "GPU-uuid-1"),
        ("3,5", 1, "GPU-uuid-1"),
        (None, 2, "MIG-uuid-2"),
        ("MIG-a, MIG-b", 1, "MIG-b"),
        ("GPU-x", 0, "GPU-x"),
    ],
    ids=str,
)
def test_child_has_the_device_of_its_parent(
    visible: str | None, index: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    properties = [SimpleNamespace(uuid=f"uuid-{i}", name=f"A100{' MIG 1g.5gb' * (i == 2)}") for i in range(3)]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties[index])
    assert child._environment(torch.device("cuda", index))["CUDA_VISIBLE_DEVICES"] == name


@pytest.mark.parametrize("was_on", [False, True])
def test_allocations_are_filled_and_settings_put_back(was_on: bool) -> None:
    """Memory that nobody wrote may hold what a right result holds."""
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    try:
        settings.fill_uninitialized_memory = was_on
        with judge._poisoned():
            assert torch.empty(1000).isnan().all() and torch.empty(1000, dtype=torch.bfloat16).isnan().all()
            assert (torch.empty(1000, dtype=torch.int64) == 2**63 - 1).all()
        assert settings.fill_uninitialized_memory == was_on
        assert torch.are_deterministic_algorithms_enabled() == before[0]
    finally:
        settings.fill_uninitialized_memory = before[1]


def test_dtypes_have_names() -> None:
    bf16, fp32 = torch.bfloat16, torch.float32
    names = {(bf16, bf16): "bfloat16", (bf16, fp32): "bfloat16+float32", (fp32, fp32): "float32"}
    for dtypes, name in names.items():
        assert dtype_name(*dtypes) == name
        assert dtypes_of(name) == dtypes
    with judge._precision("tf32 r16"):
        names = {(fp32,): "tf32", (bf16, fp32): "bfloat16+tf32", (bf16,): "bfloat16"}
        assert [dtype_name(*dtypes) for dtypes in names] == list(names.values())
    assert dtype_name(fp32) == "float32"
    assert dtypes_of("tf32") == (fp32, fp32)


def _cases(implementation: Implementation, hardware: Hardware) -> Iterator[tuple[str, Any]]:
    qualification = implementation.qualification
    assert qualification is not None
    for part in qualification.parts:
        yield from ((part, case) for case in qualification.cases(part, hardware))


@each_checked
def test_problems_touch_their_part_and_have_names(operator: Operator, implementation: Implementation) -> None:
    """A part that no problem touches would be right without a check; ``str`` tells its problems apart."""
    qualification = implementation.qualification
    assert qualification is not None
    assert set(qualification.quick) <= set(qualification.parts) and qualification.quick
    assert len(set(qualification.parts)) == len(qualification.parts)
    names: dict[str, set[str]] = {}
    for part, case in _cases(implementation, INTERPRETER):
        assert str(case) not in names.setdefault(part, set())
        names[part].add(str(case))
        if implementation.name == "cuda" and operator.name == "lora_linear":
            continue  # what it touches depends on a device: tests/lora has it
        with judge._precision(part):
            call, _ = qualification.family.make(case, torch.device("meta"), 0)
            problem = dataclasses.replace(operator.make_problem(call), device=CPU)
            assert part in qualification.touched(problem)
            assert set(qualification.touched(problem)) <= set(qualification.parts)
    assert names.keys() == set(qualification.parts)


@each_checked
def test_problems_fit_beside_a_training_run(operator: Operator, implementation: Implementation) -> None:
    """On the largest GPU there is: the tensors of a run, of eager torch and of the oracle, in turn and twice over."""
    assert implementation.qualification is not None
    for part, case in _cases(implementation, Hardware(arch=100, sm_count=160)):
        call, dy = implementation.qualification.family.make(case, torch.device("meta"), 0)
        tensors = [x for x in operator.signature.spread((*call, dy)) if isinstance(x, torch.Tensor)]
        # Each has a gradient or is one; two of ours, one of eager's, and two of the oracle's in float64 with its input.
        total = sum(x.numel() * (4 * x.element_size() + 2 * 8) for x in tensors)
        assert total <= LARGEST_BYTES, (part, str(case), total)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "implementation", "part"),
    [
        ("lora_linear", "triton", "bfloat16+float32 r16 dropout"),
        pytest.param("lora_group", "triton", "bfloat16+float32 r32 dropout", marks=pytest.mark.thorough),
        pytest.param("lora_rows", "triton", "bfloat16+float32 r32 dropout", marks=pytest.mark.thorough),
        pytest.param("bottleneck_adapter", "triton", "bfloat16 wide r16", marks=pytest.mark.thorough),
        pytest.param("prefix_attention", "triton", "bfloat16+float32 d16", marks=pytest.mark.thorough),
        pytest.param("lora_update", "triton", "bfloat16+float32 r32 dropout", marks=pytest.mark.thorough),
        pytest.param("lora_update_rows", "triton", "bfloat16+float32 r32 dropout", marks=pytest.mark.thorough),
        pytest.param("lora_gain", "triton", "bfloat16+float32 r16", marks=pytest.mark.thorough),
        ("prompt_tuning", "triton", "bfloat16+float32"),
        ("four_bit_dequantize", "triton", "nf4 bfloat16"),
    ],
)
def test_triton_qualifies(name: str, implementation: str, part: str, device: torch.device) -> None:
    """In bfloat16, for which tests mend Triton's interpreter; the command has the other dtypes there."""
    if reason := why_not_environment():
        pytest.skip(reason)
    operator = OPERATORS[name]
    chosen = next(each for each in operator.implementations if each.name == implementation)
    *_, (event, content) = judge.check_part(operator, chosen, part, device)
    assert event == "verdict"
    assert content["verdict"]["kind"] == RIGHT, content
    assert 0.0 < content["verdict"]["error"] < 1.0


@pytest.fixture
def on_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command's machine, whatever this one has."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if reason := why_not_environment():
        pytest.skip(reason)


@pytest.mark.usefixtures("on_interpreter")
def test_command_checks_shows_and_forgets(toy: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert qualify.main(["--family", "prompt", "--quick"]) == 0
    assert toy == [["prompt_tuning/triton/float32", "prompt_tuning/triton/float16+float32"]]
    out = capsys.readouterr().out
    assert re.search(r"^prompt_tuning/triton/float32 +right +2 +0.50 +1.0$", out, re.MULTILINE)
    assert "interpreter cannot compute in bfloat16" in out
    # What is left, then nothing, then all of it.
    assert [qualify.main(["--family", "prompt_tuning"]) for _ in range(2)] == [0, 0]
    assert toy[1:] == [["prompt_tuning/triton/float16"]]
    assert qualify.main(["--family", "prompt", "--full"]) == 0
    assert len(toy[2]) == 3
    capsys.readouterr()
    assert qualify.main(["--show"]) == 0
    assert capsys.readouterr().out.count(" right ") == 3
    assert qualify.main(["--forget"]) == 0 and "forgot" in capsys.readouterr().out
    assert qualify.main(["--show"]) == 0
    assert " right " not in capsys.readouterr().out
    assert len(toy) == 3


@pytest.mark.usefixtures("on_interpreter")
@pytest.mark.parametrize(
    ("outcome", "status", "line"),
    [
        (
            Outcome({"prompt_tuning/triton/float32": verdicts.as_entry(Verdict(WRONG, 1, 0.5, 1.0, "n1", "y is off"))}),
            1,
            "prompt_tuning/triton/float32 was wrong: n1: y is off",
        ),
        (Outcome({}, {"prompt_tuning/triton/float32": "no card"}), 3, "prompt_tuning/triton/float32: no card"),
        (Outcome({}, {"prompt_tuning/triton/float32": f"{NOT_HERE}: it is old"}), 0, f"{NOT_HERE}: it is old"),
    ],
    ids=["wrong", "unknown", "not-here"],
)
def test_command_s_status(
    outcome: Outcome, status: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(child, "check", lambda *arguments: outcome)
    assert qualify.main(["--family", "prompt", "--quick"]) == status
    assert line in capsys.readouterr().out


def test_command_without_anything_to_check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(triton_tools, "interpreting", lambda: False)
    monkeypatch.setattr(triton_tools, "why_not_environment", lambda: "torch sees no CUDA device")
    assert qualify.main([]) == qualify.UNKNOWN
    assert "there is nothing to check: torch sees no CUDA device" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert qualify.main(["--device", "2"]) == qualify.UNKNOWN
    assert "--device must be below 2" in capsys.readouterr().err


@pytest.mark.usefixtures("on_interpreter")
def test_unknown_family_is_named() -> None:
    with pytest.raises(SystemExit, match=r"--family must be one of .*\badapter, .*\blora, .*got 'dora'"):
        qualify.main(["--family", "dora"])
