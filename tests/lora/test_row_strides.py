"""S and dS may be columns of a wider matrix, as of several projections' together: the same bits, and nothing beside."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks import aot
from peft_kernels._core.triton_tools import why_not_environment
from peft_kernels.lora.kernels import config
from peft_kernels.lora.kernels.dropout import NO_DROPOUT

if reason := why_not_environment():
    pytest.skip(reason, allow_module_level=True)

from peft_kernels.lora.kernels import triton_bwd, triton_fwd

H100 = aot.HARDWARE[90]
FP32, BF16 = torch.float32, torch.bfloat16
M, R, FIRST, WIDTH = 70, 5, 3, 11


def _drawn(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)


def _columns(of: Tensor) -> Tensor:
    """The same values among nan."""
    wide = torch.full((of.shape[0], WIDTH), torch.nan, device=of.device)
    wide[:, FIRST : FIRST + of.shape[1]] = of
    return wide[:, FIRST : FIRST + of.shape[1]]


def _readers(device: torch.device) -> dict[str, Callable[[Tensor], Tensor]]:
    x, b = _drawn(M, 40, dtype=BF16, device=device), _drawn(40, R, dtype=BF16, device=device)
    rank = config.rank_product_config(BF16, H100)
    reduce = config.reduce_rows_config(M, 40, R, BF16, False, H100)
    both = config.narrow_and_reduce_config(M, 40, R, BF16, False, H100)

    def db(s: Tensor) -> Tensor:
        _, found, _ = triton_bwd.narrow_and_reduce(x, s, None, 0.5, (False, True, False), R, False, both)
        assert found is not None
        return found

    return {
        "rank_product": lambda s: triton_fwd.rank_product(
            triton_fwd.RankProduct(s, b, 0.5), None, NO_DROPOUT, BF16, rank
        ),
        "reduce_rows": lambda s: triton_bwd.reduce_rows(x, s, 0.5, NO_DROPOUT, False, reduce),
        "narrow_and_reduce": db,
    }


def _writers(n: int, splits: int, device: torch.device) -> dict[str, Callable[[Tensor | None], Tensor]]:
    x, a = _drawn(M, n, dtype=BF16, device=device), _drawn(R, n, dtype=BF16, device=device)
    narrow = config.NarrowProductConfig(BLOCK_M=64, BLOCK_K=64, BLOCK_R=16, num_warps=4, num_stages=3, splits=splits)
    both = config.narrow_and_reduce_config(M, n, R, BF16, False, H100)

    def ds(out: Tensor | None) -> Tensor:
        found, *_ = triton_bwd.narrow_and_reduce(x, None, a.t(), 0.5, (True, False, False), R, False, both, out)
        assert found is not None
        return found

    return {
        "narrow_product": lambda out: triton_fwd.narrow_product(x, a, 0.5, NO_DROPOUT, False, narrow, out),
        "narrow_and_reduce": ds,
    }


@pytest.mark.parametrize("name", ["rank_product", "reduce_rows", "narrow_and_reduce"])
def test_read(name: str, device: torch.device) -> None:
    read = _readers(device)[name]
    s = _drawn(M, R, dtype=FP32, device=device)
    assert torch.equal(read(_columns(s)), read(s))


@pytest.mark.parametrize(("n", "splits"), [(128, 1), (264, 3)])
@pytest.mark.parametrize("name", ["narrow_product", "narrow_and_reduce"])
def test_written(name: str, n: int, splits: int, device: torch.device) -> None:
    """With partial sums, and without; two column tiles of dY leave some of dS."""
    write = _writers(n, splits, device)[name]
    wide = torch.full((M, WIDTH), torch.inf, device=device)
    out = wide[:, FIRST : FIRST + R]
    assert write(out).data_ptr() == out.data_ptr()
    assert torch.equal(out, write(None))
    out.fill_(torch.inf)
    assert torch.isinf(wide).all(), "it wrote beside its columns"
