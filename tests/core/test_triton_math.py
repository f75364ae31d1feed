"""Device functions that kernels share, in kernels of their own."""

from __future__ import annotations

import pytest
import torch

from peft_kernels._core.triton_tools import why_not_environment

if reason := why_not_environment():
    pytest.skip(reason, allow_module_level=True)

import triton
import triton.language as tl

from peft_kernels._core.triton_math import dot, nearest_tf32, split_float32

SIDE = 32


@triton.jit
def _nearest(in_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, nearest_tf32(tl.load(in_ptr + offs)))


@triton.jit
def _pieces(in_ptr, out_ptr, OTHER: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    high, middle, low = split_float32(tl.load(in_ptr + offs), OTHER)
    tl.store(out_ptr + offs, high.to(tl.float32))
    tl.store(out_ptr + BLOCK + offs, middle.to(tl.float32))
    tl.store(out_ptr + 2 * BLOCK + offs, low.to(tl.float32))


@triton.jit
def _product(a_ptr, b_ptr, out_ptr, EXACT: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    acc = dot(tl.load(a_ptr + offs), tl.load(b_ptr + offs), tl.zeros((BLOCK, BLOCK), tl.float32), EXACT, "ieee")
    tl.store(out_ptr + offs, acc)


def _values(device: torch.device) -> torch.Tensor:
    """Normal values, spread over many exponents."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-30, 30, (1024,), generator=generator)
    return torch.ldexp(torch.randn(1024, generator=generator), exponents).to(device)


def test_nearest_tf32(device: torch.device) -> None:
    """Within half a unit of the tenth stored bit, and representable in ten."""
    values, out = _values(device), torch.full((1024,), torch.nan, device=device)
    _nearest[(1,)](values, out, BLOCK=1024)
    assert ((out - values).abs() <= values.abs() * 2.0**-11).all()
    assert (out.view(torch.int32) & 0x1FFF == 0).all()
    assert (out != values).any()


def test_nearest_tf32_keeps_special_values(device: torch.device) -> None:
    bits = torch.tensor([0x7FFFFFFF, 0x7FC00000, 0x7F800000, -0x00800000, 0, -0x80000000], dtype=torch.int32)
    values = bits.view(torch.float32).repeat(3)[:16].contiguous().to(device)
    out = torch.zeros_like(values)
    _nearest[(1,)](values, out, BLOCK=16)
    torch.testing.assert_close(out, values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("other", "bits"), [(tl.bfloat16, 16), (tl.float16, 13)])
def test_pieces_add_up_to_every_bit(other: tl.dtype, bits: int, device: torch.device) -> None:
    values, out = _values(device), torch.full((3, 1024), torch.nan, device=device)
    _pieces[(1,)](values, out, OTHER=other, BLOCK=1024)
    assert torch.equal(out.double().sum(0), values.double())
    assert (out.view(torch.int32) & ((1 << bits) - 1) == 0).all()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("swap", [False, True])
def test_exact_product_keeps_float32(half: torch.dtype, swap: bool, device: torch.device) -> None:
    """Three pieces reach the error of a float32 product; one rounded operand is hundreds of times worse."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(SIDE, SIDE, generator=generator).to(device) for _ in range(2))
    a, b = (a.to(half), b) if swap else (a, b.to(half))
    expected = a.double() @ b.double()
    out = torch.empty(SIDE, SIDE, device=device)
    errors = {}
    for exact in (True, False):
        _product[(1,)](a, b, out, EXACT=exact, BLOCK=SIDE)
        errors[exact] = ((out - expected).norm() / expected.norm()).item()
    plain = ((a.float() @ b.float() - expected).norm() / expected.norm()).item()
    assert errors[True] <= 2 * plain
    assert errors[False] >= 100 * plain
