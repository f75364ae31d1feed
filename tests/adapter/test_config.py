"""The pure functions that choose configs: bounds that hold for every problem, and the branches' edges."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import aot
from peft_kernels.adapter.kernels import config

H100 = aot.HARDWARE[90]
sizes, widths = st.integers(1, 1 << 20), st.integers(1, 2048)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
chips = st.sampled_from(list(aot.HARDWARE.values()))


def _is_block(size: int) -> bool:
    """tl.dot needs powers of two, at least 16."""
    return size >= 16 and size & (size - 1) == 0


@given(sizes, sizes, widths, dtypes, st.booleans(), chips)
def test_blocks_are_dot_operands_and_splits_are_never_empty(m, c, r, dtype, exact, hardware):
    narrow = config.narrow_product_config(m, c, r, dtype, exact, hardware)
    reduce = config.reduce_rows_config(m, c, r, dtype, exact, hardware)
    wide = config.wide_product_config(m, r, dtype, exact, hardware)
    for chosen in (narrow, reduce, wide):
        assert all(map(_is_block, (chosen.BLOCK_M, chosen.BLOCK_C, chosen.BLOCK_R)))
    assert 1 <= narrow.splits <= max(1, -(-c // narrow.BLOCK_C))
    assert 1 <= reduce.splits <= -(-m // reduce.BLOCK_M)


@given(sizes, st.integers(1, 128), dtypes, dtypes, dtypes, st.booleans(), chips)
def test_fused_block_holds_the_whole_width(m, r, dtype, adapter_dtype, out_dtype, aligned, hardware):
    chosen = config.bottleneck_config(m, r, dtype, adapter_dtype, out_dtype, aligned, hardware)
    assert all(map(_is_block, (chosen.BLOCK_M, chosen.BLOCK_C, chosen.BLOCK_O, chosen.BLOCK_R)))
    assert r <= chosen.BLOCK_R


@pytest.mark.parametrize(
    ("m", "r", "expected"),
    [
        (8192, 64, "fused"),
        (8192, 128, "fused"),
        (8192, 129, "split"),
        (8192, 1024, "split"),
        (1569, 64, "fused"),  # 99 blocks of 16 rows: three quarters of 132
        (1568, 64, "split"),
        (16, 8, "split"),
    ],
)
def test_product_path(m, r, expected):
    assert config.product_path(m, r, H100) == expected


@pytest.mark.parametrize(("m", "block_m"), [(65536, 64), (8192, 64), (4096, 32), (2048, 16)])
def test_fused_rows_give_the_multiprocessors_a_block_each(m, block_m):
    chosen = config.bottleneck_config(m, 64, *[torch.bfloat16] * 3, True, H100)
    assert block_m == chosen.BLOCK_M


@given(sizes, st.integers(1, 128), chips)
def test_fused_path_leaves_no_more_than_a_quarter_idle(m, r, hardware):
    if config.product_path(m, r, hardware) == "fused":
        chosen = config.bottleneck_config(m, r, *[torch.bfloat16] * 3, True, hardware)
        assert 4 * -(-m // chosen.BLOCK_M) >= 3 * hardware.sm_count


@given(st.integers(1, 1 << 24), st.sampled_from(["cpu", "cuda"]))
def test_torch_blocks_have_rows(width, device_type):
    assert config.torch_rows_per_block(width, device_type) >= 1
