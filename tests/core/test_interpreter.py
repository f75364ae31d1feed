"""The interpreter's arithmetic as conftest mends it: a GPU's, bit for bit, and no library's that picks by processor."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from peft_kernels._core.triton_tools import why_not_environment
from python_ref.compare import assert_bitwise_equal

if reason := why_not_environment():
    pytest.skip(reason, allow_module_level=True)

import triton
import triton.language as tl

pytestmark = pytest.mark.cpu_only

M, K, N = 16, 128, 16


@triton.jit
def _dot(
    a_ptr, b_ptr, acc_ptr, out_ptr, PRECISION: tl.constexpr, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    m, k, n = tl.arange(0, M)[:, None], tl.arange(0, K), tl.arange(0, N)[None, :]
    a, b = tl.load(a_ptr + m * K + k[None, :]), tl.load(b_ptr + k[:, None] * N + n)
    tl.store(out_ptr + m * N + n, tl.dot(a, b, tl.load(acc_ptr + m * N + n), input_precision=PRECISION))


@triton.jit
def _exponentials(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(out_ptr + offs, tl.exp(x))
    tl.store(out_ptr + BLOCK + offs, tl.exp2(x))


def _rounded(exact: Fraction) -> float:
    """The nearest float32 of a number in its normal range, halves to even."""
    if not exact:
        return 0.0
    exponent = abs(exact.numerator).bit_length() - exact.denominator.bit_length()
    exponent -= abs(exact) < Fraction(2) ** exponent
    unit = Fraction(2) ** (exponent - 23)
    return float(round(exact / unit) * unit)


def _summed(a: torch.Tensor, b: torch.Tensor, acc: torch.Tensor, at_a_time: int, chain: int | None) -> torch.Tensor:
    """acc + a b from exact numbers, rounded after each ``at_a_time`` products; chains of them start from zero."""
    out = acc.clone()
    for m in range(M):
        for n in range(N):
            products = [Fraction(x) * Fraction(y) for x, y in zip(a[m].tolist(), b[:, n].tolist(), strict=True)]
            total = acc[m, n].item()
            for first in range(0, K, chain or K):
                part = 0.0 if chain else total
                for k in range(first, first + (chain or K), at_a_time):
                    part = _rounded(Fraction(part) + sum(products[k : k + at_a_time]))
                total = _rounded(Fraction(total) + Fraction(part)) if chain else part
            out[m, n] = total
    return out


@pytest.mark.parametrize(
    ("dtype", "precision", "at_a_time", "chain"),
    [
        (torch.float32, "ieee", 1, 64),
        (torch.float32, "tf32", 8, None),
        (torch.bfloat16, "ieee", 16, None),
        (torch.float16, "ieee", 16, None),
    ],
)
def test_dot_sums_as_the_instructions_of_a_gpu(
    dtype: torch.dtype, precision: str, at_a_time: int, chain: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounded by other steps, these sums have other bits; and none of them comes from numpy's BLAS."""
    for name in ("matmul", "dot", "vdot", "inner", "tensordot", "einsum"):
        monkeypatch.setattr(np, name, lambda *_, name=name, **__: pytest.fail(f"np.{name} was called"))
    generator = torch.Generator().manual_seed(0)
    a, b, acc = (torch.randn(shape, generator=generator) for shape in ((M, K), (K, N), (M, N)))
    a, b, out = a.to(dtype), b.to(dtype), torch.full((M, N), torch.nan)
    _dot[(1,)](a, b, acc, out, precision, M, K, N)
    if precision == "tf32":
        a, b = ((tensor.view(torch.int32) & -8192).view(torch.float32) for tensor in (a, b))
    assert_bitwise_equal("product", out, _summed(a, b, acc, at_a_time, chain))
    assert not torch.equal(out, _summed(a, b, acc, 2 * at_a_time, chain))


def test_dot_keeps_inf_and_nan() -> None:
    a, b, acc = torch.ones(M, K), torch.ones(K, N), torch.zeros(M, N)
    a[0, 0], a[1, 0], a[2, :2] = torch.inf, torch.nan, torch.tensor([torch.inf, -torch.inf])
    a[3], b[:, 0] = 3e38, 2.0
    out = torch.empty(M, N)
    _dot[(1,)](a, b, acc, out, "ieee", M, K, N)
    assert out[0].isposinf().all() and out[1:3].isnan().all() and out[3].isposinf().all()
    assert (out[4:, 0] == 2 * K).all() and (out[4:, 1:] == K).all()


def test_exponentials_are_the_nearest_float32() -> None:
    x = torch.linspace(-80, 80, 1024)
    x[:4] = torch.tensor([torch.inf, -torch.inf, torch.nan, 200.0])
    out = torch.empty(2, 1024)
    _exponentials[(1,)](x, out, BLOCK=1024)
    assert_bitwise_equal("exp", out[0], x.double().exp().float())
    assert_bitwise_equal("exp2", out[1], x.double().exp2().float())
