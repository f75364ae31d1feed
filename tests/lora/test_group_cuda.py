"""``lora_group`` on the CUDA backend: ``lora_linear``'s kernels for each member; device bodies run in the emulator."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import peft_kernels as pk
from peft_kernels._core.device import Hardware
from peft_kernels.lora.group import cuda_impl
from peft_kernels.lora.group.op import Update, group_call
from peft_kernels.lora.group.problem import Inputs, make_problem
from peft_kernels.lora.linear import cuda_impl as linear
from peft_kernels.lora.linear import problem as linear_problem
from tests.lora import emulated_extension
from tests.lora.emulated_extension import EmulatedExtension
from tests.lora.group_cases import OPERATOR, Case, make, members
from tests.lora.test_cuda_decode import HALVES

pytestmark = pytest.mark.cpu_only

CPU = torch.device("cpu")


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> EmulatedExtension:
    return emulated_extension.install(monkeypatch)


@pytest.mark.slow
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("dtype", "adapter"), HALVES)
def test_close_to_the_oracle(emulated: EmulatedExtension, dtype: torch.dtype, adapter: torch.dtype | None) -> None:
    case = Case(m=9, n=(40, 24), k=72, r=(5, 16), dtype=dtype, adapter_dtypes=(adapter,) * 2)
    OPERATOR.check_budget(case, CPU, functools.partial(OPERATOR.run_ours, variant="cuda"))
    assert len(emulated.calls) % 2 == 0 and emulated.calls


def test_an_output_that_nobody_uses_costs_no_launch(emulated: EmulatedExtension) -> None:
    case = Case(m=4, n=(40, 24), k=72, r=(5, 16), dtype=torch.bfloat16, adapter_dtypes=(None,) * 2)
    leaves = OPERATOR.leaves(make(case, CPU))
    _, second = pk.lora_group(leaves.x, members(leaves, case.scales), backend="cuda")
    launched = len(emulated.reduce.calls)
    second.sum().backward()
    alone = len(emulated.reduce.calls) - launched
    assert leaves.lora_a_0.grad is None and leaves.weight_0.grad is None
    assert all(leaf.grad is not None for leaf in (leaves.x, leaves.lora_a_1, leaves.lora_b_1, leaves.weight_1))
    (y,) = pk.lora_group(leaves.x, members(leaves, case.scales)[1:], backend="cuda")
    before = len(emulated.reduce.calls)
    y.sum().backward()
    assert len(emulated.reduce.calls) - before == alone > 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"m": 17}, r"members\[0\]: decode: it takes at most 16 tokens, got 17"),
        ({"p": 0.1}, r"members\[0\]: decode: it has no dropout"),
        ({"k": 68}, r"members\[0\]: .*K must be a multiple of 8, got 68"),
        ({"dtype": torch.float32}, "got torch.float32"),
    ],
    ids=str,
)
def test_refusals(emulated: EmulatedExtension, change: dict[str, Any], reason: str) -> None:
    given = {"m": 4, "n": (20, 8), "k": 64, "r": (4, 4), "dtype": torch.bfloat16, "adapter_dtypes": (None, None)}
    case = Case(**(given | change))
    tensors = make(case, CPU)
    with pytest.raises(pk.UnsupportedError, match=f"'cuda' cannot run this problem: .*{reason}"):
        pk.lora_group(tensors.x, members(tensors, 1.0), dropout_p=case.p, backend="cuda")
    assert not emulated.calls


def test_a_lane_of_its_own_is_refused(emulated: EmulatedExtension, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel itself has dropout, as the Hopper one."""
    monkeypatch.setattr(linear, "why_not", lambda problem: None)
    described = _described(
        Case(m=64, n=(16, 8), k=64, r=(4, 4), dtype=torch.bfloat16, p=0.1, adapter_dtypes=(None,) * 2)
    )
    assert cuda_impl.why_not(described) == "its masks are those of lane 0, got lane 1"


def test_several_updates_of_a_member_are_refused(emulated: EmulatedExtension) -> None:
    tensors = make(Case(m=4, n=(16, 8), k=64, r=(4, 4), dtype=torch.bfloat16, adapter_dtypes=(None,) * 2), CPU)
    update = Update(0, tensors.lora_a_0, tensors.lora_b_0, 1.0, 0.0, 0)
    with pytest.raises(pk.UnsupportedError, match=r"one weight and one update, got updates of the members \(0, 0\)"):
        group_call(tensors.x, (tensors.weight_0,), (None,), [update, update._replace(lane=1)], backend="cuda")


def test_checks_are_those_of_lora_linear(emulated: EmulatedExtension) -> None:
    """A call of every member's kind has asked for the same parts."""
    ours, theirs = cuda_impl.IMPLEMENTATION.qualification, linear.IMPLEMENTATION.qualification
    assert ours is not None and theirs is not None
    assert ours.family is theirs.family and ours.parts == theirs.parts
    part = theirs.parts[0]
    call, _ = theirs.family.make(theirs.cases(part, Hardware(arch=90, sm_count=4))[0], torch.device("meta"), 0)
    alone = linear_problem.make_problem(call)
    group = make_problem(
        Inputs(
            call.x,
            (call.weight,),
            (call.bias,),
            (call.lora_a,),
            (call.lora_b,),
            (call.scale,),
            (0,),
            (0.0,),
            (0,),
            None,
        )
    )
    assert group.linears == (alone,)
    assert ours.touched(group) == theirs.touched(alone) == (part,)


def _described(case: Case) -> Any:
    tensors = make(case, CPU)
    given = members(tensors, 1.0)
    return make_problem(
        Inputs(
            tensors.x,
            tuple(member.weight for member in given),
            (None,) * len(given),
            tuple(member.lora_a for member in given),
            tuple(member.lora_b for member in given),
            (1.0,) * len(given),
            tuple(range(len(given))),
            (case.p,) * len(given),
            tuple(range(len(given))),
            torch.tensor(0),
        )
    )
