"""``lora_rows`` on the CUDA backend: the decode kernel for each member; device bodies run in the emulator."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import peft_kernels as pk
from peft_kernels import judge
from peft_kernels._core.device import Hardware
from peft_kernels._core.dispatch import Implementation
from peft_kernels._core.rows import Rows
from peft_kernels.lora.qualification import RowsCase
from peft_kernels.lora.rows import cuda_impl, op
from peft_kernels.lora.rows.problem import make_problem
from python_ref import compare
from python_ref import lora as oracle
from tests.lora import emulated_extension
from tests.lora.emulated_extension import EmulatedExtension
from tests.lora.simt_decode_rows import Case, Tensors, expected, make, make_exact
from tests.lora.test_cuda_decode import HALVES

pytestmark = pytest.mark.cpu_only

CPU = torch.device("cpu")
DIFFERENTIABLE = ("x", "weight", "lora_a", "lora_b", "bias")
MIXED = Case(slots=(2, 0, -1, 2, 1, 3, 0, 2, -1), ranks=(20, 9, 16, 0, 12), n=40, k=72)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> EmulatedExtension:
    return emulated_extension.install(monkeypatch)


def _rows(case: Case, is_known: bool = True) -> Rows:
    rows = Rows.of(torch.tensor(case.slots), known=len(case.ranks))
    return rows if is_known else dataclasses.replace(rows, runs=None)


def _call(case: Case, tensors: Tensors, rows: Rows, scale: Any = None, **more: Any) -> Tensor:
    x, weight, a, b, bias, scales = tensors
    scale = scales if scale is None else scale
    return pk.lora_linear(x, weight, a, b, scale, bias, rows=rows, ranks=case.ranks, backend="cuda", **more)


@pytest.mark.slow
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("is_known", [True, False], ids=["known", "on the device"])
@pytest.mark.parametrize(("dtype", "adapter"), HALVES)
def test_close_to_the_oracle(
    emulated: EmulatedExtension, dtype: torch.dtype, adapter: torch.dtype | None, is_known: bool
) -> None:
    """y and all gradients, where the host knows the slots and where only the device does."""
    case = dataclasses.replace(MIXED, dtype=dtype, adapter_dtype=adapter)
    tensors, rows = make(case), _rows(case, is_known)
    if not is_known:
        # There the torch backend, whose backward pass it is, multiplies factors that no row uses by zeros.
        tensors = Tensors(*map(torch.nan_to_num, tensors))
    dy = torch.randn(case.m, case.n, generator=torch.Generator().manual_seed(7)).to(dtype)
    ours = _with_gradients(lambda leaves: _call(case, leaves, rows), tensors, dy)
    eager = _with_gradients(
        lambda leaves: oracle.eager_rows(leaves.x, leaves.weight, _slots(case, leaves), case.adapters, leaves.bias),
        tensors,
        dy,
    )
    assert len(emulated.calls) == 1
    for name, exact in _exact(case, tensors, dy).items():
        compare.assert_close(f"{case} {name}", ours[name], eager[name], exact)


def _slots(case: Case, tensors: Tensors) -> list[oracle.Slot]:
    """Views of the factors."""
    a, b, scales = tensors.lora_a, tensors.lora_b, tensors.scales.tolist()
    return [oracle.Slot(a[case.of(t)], b[:, case.of(t)], scales[t]) for t in range(len(case.ranks))]


def _with_gradients(function: Callable[[Tensors], Tensor], tensors: Tensors, dy: Tensor) -> dict[str, Tensor]:
    leaves = Tensors(*(tensor.clone() for tensor in tensors))
    wanted = {name: getattr(leaves, name).requires_grad_() for name in DIFFERENTIABLE}
    y = function(leaves)
    return {"y": y.detach(), **dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), dy), strict=True))}


def _exact(case: Case, tensors: Tensors, dy: Tensor) -> dict[str, Tensor]:
    wide = Tensors(*(tensor.double() for tensor in tensors))
    found = oracle.rows_backward(dy.double(), wide.x, wide.weight, _slots(case, wide), case.adapters)
    factors = {"lora_a": torch.cat(found.lora_a), "lora_b": torch.cat(found.lora_b, dim=1)}
    return {"y": expected(case, tensors)[0], "x": found.x, "weight": found.weight, "bias": found.bias, **factors}


def test_a_machine_s_check_passes(emulated: EmulatedExtension) -> None:
    """Two members, slots of several rows, of one and of none: also S as other implementations keep it."""
    case = RowsCase(9, (40, 72), 72, (3, 0, 1, 2), (20, 7, 0, 33), (0.0,) * 4, torch.bfloat16, torch.float32)
    assert judge.check_case(op.OPERATOR, cuda_impl.IMPLEMENTATION, case, CPU) <= 1.0
    assert emulated.calls


def test_a_machine_s_check_sees_s_of_others(emulated: EmulatedExtension) -> None:
    case = RowsCase(9, (40,), 72, (3, 0, 1, 2), (20, 7, 0, 33), (0.0,) * 4, torch.bfloat16, torch.bfloat16)

    def forward(problem: Any, inputs: Any) -> tuple[Tensor, ...]:
        *ys, s = cuda_impl.forward(problem, inputs)
        return *ys, torch.empty_like(s).index_copy_(0, inputs.order.long(), s)

    faulty: Implementation = dataclasses.replace(cuda_impl.IMPLEMENTATION, forward=forward)
    with pytest.raises(AssertionError):
        judge.check_case(op.OPERATOR, faulty, case, CPU)


def test_problems_of_a_check_touch_their_part(emulated: EmulatedExtension) -> None:
    checked = cuda_impl.QUALIFICATION
    for part in checked.parts:
        for case in checked.cases(part, Hardware(arch=90, sm_count=4)):
            described = make_problem(checked.family.make(case, CPU, 0)[0])
            assert cuda_impl.why_not(described) is None
            assert checked.touched(described) == (part,)


def test_strides_reach_the_kernel(emulated: EmulatedExtension) -> None:
    """Wider rows, a transposed B, every second element of a bias, one scale and one slot for all in no more memory."""
    case = dataclasses.replace(MIXED, slots=(2,) * 6)
    tensors = make_exact(case)._replace(scales=torch.full((5,), 0.5))
    wide = torch.cat((tensors.x, tensors.x + 1), dim=1)[:, : case.k]
    weight = torch.cat((tensors.weight, tensors.weight + 1), dim=1)[:, : case.k]
    bias = torch.stack((tensors.bias, tensors.bias + 1), dim=1)[:, 0]
    given = tensors._replace(x=wide, weight=weight, lora_b=tensors.lora_b.t().contiguous().t(), bias=bias)
    rows = dataclasses.replace(_rows(case), slot=torch.tensor([2], dtype=torch.int32).expand(6))
    y = _call(case, given, rows, scale=torch.tensor(0.5))
    assert torch.equal(y.double(), expected(case, tensors)[0])
    (call,) = emulated.calls
    assert (call["x"][1], call["weight"][1], call["lora_b"][1:]) == (144, 144, (1, 40))
    assert (call["slot"][1], call["scales"][1], call["bias"][1]) == (0, 0, 2)


def test_slots_of_several_tiles_of_ranks(emulated: EmulatedExtension) -> None:
    """As many ranks in use as there can be, and a slot more than there are rows."""
    case = dataclasses.replace(MIXED, slots=(2, 0, 3), ranks=(64, 1, 64, 64))
    tensors = make_exact(case)
    assert torch.equal(_call(case, tensors, _rows(case)).double(), expected(case, tensors)[0])
    assert [call["r"] for call in emulated.calls] == [192]


def test_a_member_without_adapters_is_the_frozen_layer(emulated: EmulatedExtension) -> None:
    """One without an update, and one whose slots all have rank 0, are torch's; S is that of the others."""
    tensors, rows = make(MIXED), _rows(MIXED)
    given = [
        op.slots_of_member(1, tensors.lora_a[:0], tensors.lora_b[:, :0], 1.0, (0,) * 5, 0.0, rows),
        op.slots_of_member(2, tensors.lora_a, tensors.lora_b, tensors.scales, MIXED.ranks, 0.0, rows),
    ]
    ys = op.rows_call(tensors.x, (tensors.weight,) * 3, (tensors.bias,) * 3, given, rows, backend="cuda")
    frozen = torch.nn.functional.linear(tensors.x, tensors.weight, tensors.bias)
    compare.assert_bitwise_equal("y", ys[0], frozen)
    compare.assert_bitwise_equal("y", ys[1], frozen)
    compare.assert_bitwise_equal("y", ys[2], _call(MIXED, tensors, rows))
    assert len(emulated.calls) == 2


def test_no_rows_and_no_ranks_launch_nothing(emulated: EmulatedExtension) -> None:
    tensors, rows = make(MIXED), Rows.of([], known=5)
    assert _call(MIXED, tensors._replace(x=tensors.x[:0]), rows).shape == (0, MIXED.n)
    case = dataclasses.replace(MIXED, ranks=(0,) * 5)
    none = tensors._replace(lora_a=tensors.lora_a[:0], lora_b=tensors.lora_b[:, :0])
    assert _call(case, none, _rows(case)).shape == (9, MIXED.n)
    assert not emulated.calls


@pytest.mark.parametrize(
    ("change", "more", "reason"),
    [
        ({"slots": (0,) * 17}, {}, "it takes at most 16 rows, got 17"),
        ({"dtype": torch.float32}, {}, "it takes bfloat16 and float16, got torch.float32"),
        ({}, {"dropout_p": (0.0, 0.1, 0.0, 0.0, 0.0)}, "it has no dropout"),
        ({"k": 68}, {}, "K must be a multiple of 8, got 68"),
    ],
    ids=str,
)
def test_refusals(emulated: EmulatedExtension, change: dict[str, Any], more: dict[str, Any], reason: str) -> None:
    case = dataclasses.replace(MIXED, **change)
    with pytest.raises(pk.UnsupportedError, match=f"'cuda' cannot run this problem: .*{reason}"):
        _call(case, make(case), _rows(case), **more)
    assert not emulated.calls


@pytest.mark.parametrize("name", ["x", "weight", "lora_a"])
def test_rows_off_boundaries_are_refused(emulated: EmulatedExtension, name: str) -> None:
    tensors = make(MIXED)
    given = getattr(tensors, name)
    shifted = torch.cat((given.flatten()[:1], given.flatten()))[1:].view(given.shape)
    with pytest.raises(pk.UnsupportedError, match="strided or off 16-byte boundaries"):
        _call(MIXED, tensors._replace(**{name: shifted}), _rows(MIXED))


def test_several_updates_of_a_member_are_refused(emulated: EmulatedExtension) -> None:
    tensors, rows = make(MIXED), _rows(MIXED)
    update = op.slots_of_member(0, tensors.lora_a, tensors.lora_b, 1.0, MIXED.ranks, 0.0, rows)
    with pytest.raises(pk.UnsupportedError, match=r"has one update, got updates of the members \(0, 0\)"):
        updates = [update, update._replace(lane=1)]
        op.rows_call(tensors.x, (tensors.weight,), (None,), updates, rows, backend="cuda")


def test_cpu_tensors_are_refused() -> None:
    with pytest.raises(pk.UnsupportedError, match="'cuda' cannot run this problem: CUDA kernels run on CUDA tensors"):
        _call(MIXED, make(MIXED), _rows(MIXED))
