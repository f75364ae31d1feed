"""Bytes that the torch backend moves on a GPU, beside PEFT's own layer: every operator's inputs and outputs.

Counted on meta tensors, which take the code that CUDA tensors take. A mask kernel counts as what it reads and writes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import counts
from benchmarks.counts import bytes_of
from peft_kernels.lora.kernels import masks
from peft_kernels.lora.kernels.dropout import Rows
from peft_kernels.lora.linear import torch_impl, torch_steps
from peft_kernels.lora.linear.problem import Inputs, Needs, make_problem

pytestmark = pytest.mark.cpu_only

SIZE, RANK, SCALE = 1024, 16, 0.5
BF16, FP32 = torch.bfloat16, torch.float32
PAIRS = [(BF16, FP32), (BF16, BF16), (FP32, FP32)]
ALL = Needs(x=True, weight=False, lora_a=True, lora_b=True, bias=False)


class Traffic(counts.Traffic):
    """Apart from that, the bytes that no base product hides: those of all other operators."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = 0

    @property
    def exposed(self) -> int:
        return self.bytes - self.hidden

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.bytes
        result = super().__torch_dispatch__(function, types, args, kwargs)
        if is_base_product(function.overloadpacket.__name__, args, result):
            self.hidden += self.bytes - before
        return result


def is_base_product(name: str, args: Any, result: Any) -> bool:
    """Whether no dimension of a product is the rank."""
    return name in ("mm", "addmm", "addmm_") and min(*result.shape, args[-1].shape[0]) > RANK


def kernel_of(traffic: Traffic) -> type[masks.Mask]:
    """A mask kernel that only counts: x and out, and out once more where it is added to."""

    class CountedMask:
        def __init__(self, part: Rows) -> None:
            self.part = part

        def drop(self, x: Tensor, dtype: torch.dtype, factor: float) -> Tensor:
            out = torch.empty(x.shape, dtype=dtype, device=x.device)
            assert x.shape == (self.part.rows, self.part.cols)
            traffic.add(bytes_of(x, out))
            return out

        def add_dropped(self, out: Tensor, product: Tensor, factor: float) -> None:
            assert out.shape == product.shape == (self.part.rows, self.part.cols)
            traffic.add(bytes_of(out, product, out))

        def keep(self) -> Tensor:
            raise NotImplementedError

    return CountedMask


def bytes_mask_of(traffic: Traffic) -> type[masks.Mask]:
    """Written bytes, by which torch selects."""

    class CountedByteMask(masks.ByteMask):
        def __init__(self, part: Rows) -> None:
            self.mask = torch.empty(part.rows, part.cols, dtype=torch.bool, device="meta")
            traffic.add(bytes_of(self.mask))

    return CountedByteMask


def inputs_of(dtype: torch.dtype, adapter: torch.dtype, p: float, m: int = SIZE) -> Inputs:
    def make(*shape: int, to: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=to, device="meta")

    return Inputs(
        x=make(m, SIZE, to=dtype),
        weight=make(SIZE, SIZE, to=dtype),
        lora_a=make(RANK, SIZE, to=adapter),
        lora_b=make(SIZE, RANK, to=adapter),
        scale=SCALE,
        bias=None,
        dropout_p=p,
        seed=make(to=torch.int64) if p else None,
    )


def of_peft(inputs: Inputs, p: float) -> tuple[Traffic, Traffic]:
    """PEFT's formulas, which test_reference.py holds against PEFT. On a GPU its dropout is one fused kernel."""

    def layer(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        result = F.linear(x, weight)
        dropped = x.to(lora_a.dtype)
        if p:
            dropped = torch.native_dropout(dropped, p, True)[0]
        return (result + F.linear(F.linear(dropped, lora_a), lora_b) * SCALE).to(result.dtype)

    leaves = [inputs.x, inputs.lora_a, inputs.lora_b]
    x, lora_a, lora_b = (leaf.detach().requires_grad_() for leaf in leaves)
    with Traffic() as forward:
        y = layer(x, inputs.weight, lora_a, lora_b)
    dy = torch.empty_like(y)
    with Traffic() as backward:
        torch.autograd.grad(y, (x, lora_a, lora_b), dy)
    return forward, backward


def of_torch_backend(
    inputs: Inputs, mask: Callable[[Traffic], type[masks.Mask]], monkeypatch: pytest.MonkeyPatch
) -> tuple[Traffic, Traffic]:
    problem = make_problem(inputs)
    dy = torch.empty_like(inputs.x)
    forward, backward = Traffic(), Traffic()
    monkeypatch.setattr(torch_steps, "mask_of", lambda part, device: mask(forward)(part))
    with forward:
        _, s = torch_impl.forward(problem, inputs)
    monkeypatch.setattr(torch_steps, "mask_of", lambda part, device: mask(backward)(part))
    with backward:
        torch_impl.backward(problem, inputs, s, dy, ALL)
    return forward, backward


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize(("dtype", "adapter"), PAIRS, ids=str)
def test_no_more_bytes_than_peft(
    dtype: torch.dtype, adapter: torch.dtype, p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = inputs_of(dtype, adapter, p)
    theirs = of_peft(inputs, p)
    ours = of_torch_backend(inputs, kernel_of, monkeypatch)
    show(inputs, ours, theirs)
    assert ours[0].bytes <= theirs[0].bytes and ours[1].bytes <= theirs[1].bytes


@pytest.mark.parametrize(("dtype", "adapter"), PAIRS, ids=str)
def test_no_more_bytes_than_peft_by_a_written_mask(
    dtype: torch.dtype, adapter: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In both directions together: the backward pass makes anew what PEFT has saved.

    Where 1 / (1 - p) belongs to drop(x), as it does to eager's, it is a pass in place that the launch cannot make.
    """
    inputs = inputs_of(dtype, adapter, 0.1)
    theirs = of_peft(inputs, 0.1)
    ours = of_torch_backend(inputs, bytes_mask_of, monkeypatch)
    show(inputs, ours, theirs)
    scaled = 0 if adapter == torch.bfloat16 else 2 * 2 * inputs.x.numel() * adapter.itemsize
    assert sum(each.bytes for each in ours) <= sum(each.bytes for each in theirs) + scaled


def show(inputs: Inputs, ours: tuple[Traffic, Traffic], theirs: tuple[Traffic, Traffic]) -> None:
    """Print passes over one activation: the numbers of docs/design/lora.md."""
    for direction, us, them in zip(("forward", "backward"), ours, theirs, strict=True):
        one = bytes_of(inputs.x)
        print(f"{direction}: {us.bytes / one:.1f} of {them.bytes / one:.1f} passes, {us.launches} launches")


@pytest.mark.parametrize(("dtype", "adapter"), PAIRS, ids=str)
def test_updates_written_first_expose_a_pass_less(
    dtype: torch.dtype, adapter: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each way: the product reads y0 or dX0 where a sum in place read and wrote y or dX after it."""
    inputs = inputs_of(dtype, adapter, 0.0)
    first = of_torch_backend(inputs, kernel_of, monkeypatch)
    monkeypatch.setattr(torch_steps, "adds_base_last", lambda problem: False)
    last = of_torch_backend(inputs, kernel_of, monkeypatch)
    narrow = SIZE * RANK * 4
    for ours, before in zip(first, last, strict=True):
        print(f"{ours.exposed / bytes_of(inputs.x):.1f} of {before.exposed / bytes_of(inputs.x):.1f} passes exposed")
        assert ours.exposed <= before.exposed - bytes_of(inputs.x) + 2 * narrow
        assert ours.bytes <= before.bytes + 2 * narrow


@pytest.mark.parametrize(("dtype", "adapter"), PAIRS, ids=str)
def test_blocks_of_rows_multiply_no_launches(
    dtype: torch.dtype, adapter: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the activations of most models' layers; from there on a block is more work than its launches."""
    few, many = (
        [each.launches for each in of_torch_backend(inputs_of(dtype, adapter, 0.1, m), kernel_of, monkeypatch)]
        for m in (16, 65536)
    )
    assert many == few


def test_counts_are_of_what_is_moved() -> None:
    """A product, a sum in place, a cast and a view, by hand; and products that write, and that add."""
    x = torch.empty(8, 16, dtype=BF16, device="meta")
    with Traffic() as traffic:
        y = x @ x.t()
        y.add_(y)
        y.float()
    one, square = 8 * 16 * 2, 8 * 8 * 2
    assert traffic.bytes == traffic.exposed == (2 * one + square) + 3 * square + 3 * square
    assert traffic.launches == 3
    x = torch.empty(8, 2 * RANK, dtype=BF16, device="meta")
    y = torch.empty(2 * RANK, 2 * RANK, dtype=BF16, device="meta")
    with Traffic() as traffic:
        y.addmm_(x.t(), x, beta=0)
        y.addmm_(y, y)
    assert traffic.exposed == bytes_of(x, x, y)
    assert traffic.bytes == traffic.exposed + bytes_of(y, y, y, y)
