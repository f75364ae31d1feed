"""Products of the torch backends against exact ones, in blocks of every size."""

from __future__ import annotations

import pytest
import torch

from peft_kernels._core import torch_products

pytestmark = [pytest.mark.cpu_only, pytest.mark.usefixtures("poison")]


@pytest.mark.parametrize("elements", [1, 40, 10**6])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("m", "k", "n"), [(5, 7, 9), (1, 3, 1), (0, 3, 2), (4, 3, 0), (2, 0, 3)])
def test_float16_by_float32_is_rounded_once(
    m: int, k: int, n: int, bias: bool, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eighths, whose sums float32 holds exactly: the result is the exact one, rounded; of either order of memory."""
    monkeypatch.setattr(torch_products, "_CAST_ELEMENTS", elements)
    generator = torch.Generator().manual_seed(0)
    left, right, term = (
        torch.randint(-2000, 2000, size, generator=generator).half() / 8 for size in ((m, k), (k, n), (n,))
    )
    exact = left.double() @ right.double() + (term.double() if bias else 0.0)
    for factor in (right, right.t().contiguous().t()):
        got = torch_products.product_in_float32(left, factor, term if bias else None)
        assert got.dtype == torch.float16
        assert torch.equal(got, exact.half())


def test_a_bias_brings_a_sum_back_into_range() -> None:
    """As in F.linear, nothing is rounded before it is added."""
    left, right = torch.full((1, 4), 150.0).half(), torch.full((4, 1), 150.0).half()
    assert torch_products.product_in_float32(left, right).item() == torch.inf
    assert torch_products.product_in_float32(left, right, torch.tensor([-60000.0]).half()).item() == 30000


@pytest.mark.parametrize(
    ("dtype", "device", "expected"),
    [(torch.float16, "cpu", True), (torch.bfloat16, "cpu", False), (torch.float16, "meta", False)],
)
def test_who_gains(dtype: torch.dtype, device: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_products, "_casts_float16", lambda: True)
    assert torch_products.is_slow(dtype, device) is expected
    monkeypatch.setattr(torch_products, "_casts_float16", lambda: False)
    assert not torch_products.is_slow(dtype, device)
