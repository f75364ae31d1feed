"""``lora_linear`` with a gain beyond the contract: what it is, what it multiplies and moves, and what it refuses."""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import peft_kernels as pk
from benchmarks.counts import Traffic, bytes_of
from peft_kernels._core.triton_tools import why_not_environment
from peft_kernels.lora.gain import torch_impl
from peft_kernels.lora.gain.problem import Inputs, Needs, make_problem
from peft_kernels.lora.gain.triton_impl import _kernels as gain_kernels
from peft_kernels.lora.linear import triton_impl
from python_ref import lora as oracle
from tests.contract.draw import Draw

M, N, K, R = 37, 24, 40, 5
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
needs_triton = pytest.mark.skipif(why_not_environment() is not None, reason=str(why_not_environment()))


def _drawn(dtype: torch.dtype = FP64, m: int = M) -> dict[str, Tensor]:
    """Tensors of a call, all of which want gradients."""
    draw = Draw(0)
    values = {
        "x": draw.normal(m, K),
        "weight": draw.normal(N, K, std=K**-0.5),
        "lora_a": draw.normal(R, K, std=K**-0.5),
        "lora_b": draw.normal(N, R, std=R**-0.5),
        "gain": draw.normal(N),
        "bias": draw.normal(N),
    }
    return {name: value.to(dtype).requires_grad_() for name, value in values.items()}


def test_dora_is_a_linear_layer_of_normed_rows() -> None:
    """Rows of W + s B A of the length that the magnitudes say."""
    given, magnitude = _drawn(), Draw(1).normal(N)
    factors = given["weight"], given["lora_a"], given["lora_b"]
    given["gain"] = pk.dora_gain(*factors, 0.75, magnitude)
    rows = factors[0] + 0.75 * factors[2] @ factors[1]
    rows = magnitude[:, None] * rows / rows.norm(dim=1, keepdim=True)
    y = pk.lora_linear(**given, scale=0.75)
    torch.testing.assert_close(y, F.linear(given["x"], rows, given["bias"]), rtol=1e-12, atol=1e-12)


def test_a_gain_of_ones_is_none() -> None:
    given = _drawn()
    plain = {name: value for name, value in given.items() if name != "gain"}
    y = pk.lora_linear(**plain, gain=torch.ones(N, dtype=FP64), scale=0.75, dropout_p=0.3, seed=7)
    torch.testing.assert_close(y, pk.lora_linear(**plain, scale=0.75, dropout_p=0.3, seed=7), rtol=1e-12, atol=1e-12)


def test_rows_have_no_gain() -> None:
    given = _drawn()
    rows = pk.Rows.of([0] * M, known=1)
    with pytest.raises(pk.UnsupportedError, match="lora_linear: a gain and rows"):
        pk.lora_linear(**given, rows=rows, ranks=(R,))


@pytest.mark.parametrize("m", [M, K + 5])
def test_no_more_is_multiplied_than_without_a_gain(m: int) -> None:
    """Whichever of dY and W it multiplies on the way to dX."""

    def flops(names: tuple[str, ...]) -> int:
        given = _drawn(m=m)
        y = pk.lora_linear(
            **{name: given[name] for name in ("x", "weight", "lora_a", "lora_b", *names)}, backend="torch"
        )
        wanted = [given[name] for name in ("x", "lora_a", "lora_b", *names)]
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(y, wanted, torch.ones_like(y))
        return counter.get_total_flops()

    assert flops(("gain", "bias")) == flops(("bias",)) > 0


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
def test_a_small_gain_beside_a_large_bias_has_its_gradient(backend: str) -> None:
    """Of y, which is the bias but for its last bits, nothing could be had."""
    given = _drawn(BF16)
    with torch.no_grad():
        given["gain"].mul_(2.0**-12)
        given["bias"].mul_(64.0)
    y = pk.lora_linear(**given, backend=backend)
    dy = Draw(1).normal(M, N).to(BF16)
    (found,) = torch.autograd.grad(y, given["gain"], dy)
    exact = {name: value.detach().double() for name, value in given.items() if name != "bias"}
    wanted = oracle.gain_backward(dy.double(), **exact).gain
    assert (found.double() - wanted).norm() < 0.01 * wanted.norm()


@needs_triton
@pytest.mark.parametrize(("r", "expected"), [(R, [1, 1, 1, 1, 1]), (40, [2, 1, 1, 1, 2])])
def test_launches(r: int, expected: list[int]) -> None:
    """y and the pass over dY are a launch each, but for ranks of which passes of their own are cheaper."""
    fwd, bwd = triton_impl._kernels()
    names = ["narrow_product", "gain_rank_product", "gain_narrow_and_reduce", "rank_product", "reduce_rows"]
    counts = dict.fromkeys(names, 0)

    def counting(module: Any, name: str) -> Any:
        function = getattr(module, name)

        def counted(*arguments: Any, **named: Any) -> Any:
            counts[name] += 1
            return function(*arguments, **named)

        return mock.patch.object(module, name, counted)

    given = _drawn(BF16)
    draw = Draw(3)
    given["lora_a"] = draw.normal(r, K).to(BF16).requires_grad_()
    given["lora_b"] = draw.normal(N, r).to(BF16).requires_grad_()
    with contextlib.ExitStack() as stack:
        for module, name in zip((fwd, gain_kernels(), gain_kernels(), fwd, bwd), names, strict=True):
            stack.enter_context(counting(module, name))
        y = pk.lora_linear(**given, backend="triton")
        torch.autograd.grad(y, list(given.values()), torch.ones_like(y))
    assert list(counts.values()) == expected


@pytest.mark.cpu_only
@pytest.mark.parametrize(("dtype", "adapter"), [(BF16, FP32), (BF16, BF16), (FP32, FP32)], ids=str)
def test_less_is_moved_than_by_peft_s_formulas(dtype: torch.dtype, adapter: torch.dtype) -> None:
    """Passes over an activation on meta tensors, which take the way of CUDA tensors."""
    m, size, rank = 4096, 512, 8

    def make(*shape: int, to: torch.dtype = FP32) -> Tensor:
        return torch.empty(shape, dtype=to, device="meta")

    inputs = Inputs(
        make(m, size, to=dtype),
        make(size, size, to=dtype),
        make(rank, size, to=adapter),
        make(size, rank, to=adapter),
        make(size),
        2.0,
        None,
        0.0,
        None,
    )
    dy = make(m, size, to=dtype)
    with Traffic() as forward:
        y, s, product = torch_impl.forward(make_problem(inputs), inputs)
    with Traffic() as backward:
        torch_impl.backward(make_problem(inputs), inputs, s, product, dy, Needs(True, False, True, True, True, False))
    leaves = [value.detach().requires_grad_() for value in (inputs.x, *inputs[2:5])]
    # As PEFT has it: a magnitude over a norm in the adapters' dtype.
    leaves[3] = leaves[3].detach().to(adapter).requires_grad_()
    with Traffic() as forward_of_peft:
        y = oracle.eager_gain(leaves[0], inputs.weight, *leaves[1:], 2.0)
    with Traffic() as backward_of_peft:
        torch.autograd.grad(y, leaves, dy)
    for ours, theirs, share in ((forward, forward_of_peft, 0.6), (backward, backward_of_peft, 0.85)):
        print(f"{ours.bytes / bytes_of(dy):.1f} of {theirs.bytes / bytes_of(dy):.1f} passes")
        assert ours.bytes < share * theirs.bytes
