"""The CUDA backend: what it runs and refuses, that its launchers pass on what they are given, gradients, the choice by
``auto``. The device bodies run in the emulator."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import peft_kernels as pk
from peft_kernels._core import dispatch, verdicts
from peft_kernels._core.device import Hardware
from peft_kernels.lora.linear import cuda_impl, problem
from tests.lora import emulated_extension
from tests.lora.cases import OPERATOR, Case, check_budget, make, make_exact, run_oracle
from tests.lora.emulated_extension import EmulatedExtension
from tests.lora.test_cuda_decode import HALVES

pytestmark = pytest.mark.cpu_only

CPU = torch.device("cpu")

_by_cuda = functools.partial(OPERATOR.run_ours, variant="cuda")


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> EmulatedExtension:
    return emulated_extension.install(monkeypatch)


@pytest.mark.slow
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("dtype", "adapter"), HALVES)
@pytest.mark.parametrize("layout", ["rows", "expanded"])
def test_forward_by_cuda_and_gradients(
    emulated: EmulatedExtension, dtype: torch.dtype, adapter: torch.dtype | None, layout: str
) -> None:
    case = Case(m=16, n=72, k=136, r=24, dtype=dtype, adapter_dtype=adapter, layout=layout)
    check_budget(case, CPU, _by_cuda)
    assert emulated.calls


def test_strides_reach_the_kernel(emulated: EmulatedExtension) -> None:
    """Wider rows, a transposed B, every second element of a bias, a scale on the device."""
    case = Case(m=6, n=40, k=64, r=9, dtype=torch.bfloat16)
    tensors, dy = make_exact(case, CPU)
    wide = torch.randn(2, 3, 80, dtype=torch.bfloat16)
    wide[..., 8:72] = tensors.x.view(2, 3, 64)
    weight = torch.cat((tensors.weight, tensors.weight[:, :16]), dim=1)[:, :64]
    lora_b = tensors.lora_b.t().contiguous().t()
    bias = torch.stack((tensors.bias, tensors.bias + 1), dim=1)[:, 0]
    scale = torch.tensor(case.scale, dtype=torch.float64)
    y = pk.lora_linear(wide[..., 8:72], weight, tensors.lora_a, lora_b, scale, bias, backend="cuda")
    assert torch.equal(y.double().view(6, 40), run_oracle(case, tensors, dy).y)
    (call,) = emulated.calls
    assert (call["x"][1], call["weight"][1], call["lora_b"][1:]) == (80, 80, (1, 40))


def test_each_launch_has_its_nonce(emulated: EmulatedExtension) -> None:
    case = Case(m=1, n=8, k=8, r=1, dtype=torch.bfloat16)
    tensors = make(case, CPU)
    for _ in range(3):
        pk.lora_linear(*tensors[:4], backend="cuda")
    nonces = [call["nonce"] for call in emulated.calls]
    assert len(set(nonces)) == 3
    assert all(0 < nonce < 2**64 for nonce in nonces)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"m": 17, "n": 20}, "it takes at most 16 tokens, got 17"),
        ({"dtype": torch.float32}, "it takes bfloat16 and float16, got torch.float32"),
        ({"dtype": torch.float64}, "got torch.float64"),
        ({"p": 0.1, "n": 20}, "it has no dropout"),
        ({"k": 68}, "K must be a multiple of 8, got 68"),
        ({"layout": "columns"}, "rows of x, weight or lora_a are strided or off 16-byte boundaries"),
        ({"layout": "strided"}, "rows of x, weight or lora_a are strided or off 16-byte boundaries"),
    ],
    ids=str,
)
def test_refusals(emulated: EmulatedExtension, change: dict[str, Any], reason: str) -> None:
    case = dataclasses.replace(Case(m=4, n=16, k=64, r=4, dtype=torch.bfloat16), **change)
    tensors = make(case, CPU)
    with pytest.raises(pk.UnsupportedError, match=rf"'cuda' cannot run this problem: decode: .*{reason}.*'auto' can$"):
        pk.lora_linear(*tensors[:4], dropout_p=case.p, backend="cuda")
    assert not emulated.calls


def test_off_boundary_rows_are_refused(emulated: EmulatedExtension) -> None:
    case = Case(m=4, n=16, k=64, r=4, dtype=torch.bfloat16)
    x, weight, lora_a, lora_b, _ = make(case, CPU)
    shifted = torch.cat((lora_a.flatten()[:1], lora_a.flatten()))[1:].view(4, 64)
    with pytest.raises(pk.UnsupportedError, match="off 16-byte boundaries"):
        pk.lora_linear(x, weight, shifted, lora_b, backend="cuda")


def test_tensors_without_addresses_are_described() -> None:
    """As when a graph is traced; where they could be read 16 bytes at a time, nobody launches on them."""
    with FakeTensorMode():
        fake = [torch.empty(shape, dtype=torch.bfloat16, device="cuda") for shape in ((2, 8), (16, 8), (1, 8), (16, 1))]
        described = problem.make_problem(problem.Inputs(*fake, 1.0, None, 0.0, None))
        batched = torch.func.vmap(
            lambda x: x * problem.make_problem(problem.Inputs(x, *fake[1:], 1.0, None, 0.0, None)).m
        )
        assert batched(torch.stack([fake[0]] * 3)).shape == (3, 2, 8)
    assert described.device.type == "cuda" and not described.rows_aligned


def test_cpu_tensors_are_refused() -> None:
    tensors = make(Case(m=1, n=8, k=8, r=1, dtype=torch.bfloat16), CPU)
    with pytest.raises(pk.UnsupportedError, match="'cuda' cannot run this problem: CUDA kernels run on CUDA tensors"):
        pk.lora_linear(*tensors[:4], backend="cuda")


def test_auto_takes_what_is_known_to_be_right(emulated: EmulatedExtension, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = make(Case(m=1, n=8, k=8, r=1, dtype=torch.bfloat16), CPU)
    described = problem.make_problem(problem.Inputs(*tensors[:4], 1.0, None, 0.0, None))
    assert cuda_impl.why_not(described) is None
    assert cuda_impl.IMPLEMENTATION.why_not_auto(described) == "on a CPU it runs in an emulator, which is for tests"
    pk.lora_linear(*tensors[:4])
    assert not emulated.calls
    monkeypatch.setattr(verdicts, "why_not", lambda *_: None)
    dispatch.choices_changed()
    pk.lora_linear(*tensors[:4])
    assert len(emulated.calls) == 1


def test_problems_of_a_check_touch_their_part(emulated: EmulatedExtension) -> None:
    qualification = cuda_impl.IMPLEMENTATION.qualification
    assert qualification is not None
    for part in qualification.parts:
        for case in qualification.cases(part, Hardware(arch=90, sm_count=4)):
            described = problem.make_problem(qualification.family.make(case, torch.device("meta"), 0)[0])
            assert cuda_impl.why_not(described) is None
            first, *others = qualification.touched(described)
            assert first == part
            assert others == ([f"decode {part.split()[1]}"] if part.startswith("gemm") else [])
