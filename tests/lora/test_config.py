"""The pure functions that choose configs: bounds that hold for every problem, and the branches' edges."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import aot
from peft_kernels.lora.kernels import config

sizes, ranks = st.integers(1, 1 << 20), st.integers(1, 512)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
chips = st.sampled_from(list(aot.HARDWARE.values()))


@given(sizes, sizes, ranks, dtypes, st.booleans(), chips)
def test_blocks_cover_and_splits_are_never_empty(m, k, r, dtype, exact, hardware):
    narrow = config.narrow_product_config(m, k, r, dtype, exact, hardware)
    assert narrow.BLOCK_R * -(-r // narrow.BLOCK_R) >= r
    assert 1 <= narrow.splits <= max(1, -(-k // narrow.BLOCK_K))
    reduce = config.reduce_rows_config(m, k, r, dtype, exact, hardware)
    assert 1 <= reduce.splits <= -(-m // reduce.BLOCK_M)
    for chosen in (narrow, reduce):
        for size in (chosen.BLOCK_M, chosen.BLOCK_K, chosen.BLOCK_R):
            assert size >= 16 and size & (size - 1) == 0, "tl.dot needs powers of two, at least 16"
        assert chosen.BLOCK_K % 8 == 0, "the mask is drawn for eight columns at a time"


@given(sizes, sizes, st.integers(1, 32), dtypes, st.booleans(), chips)
def test_one_pass_over_dy_holds_all_ranks(m, n, r, dtype, exact, hardware):
    assert config.reads_dy_once(r)
    assert r <= config.narrow_and_reduce_config(m, n, r, dtype, exact, hardware).BLOCK_R


@pytest.mark.parametrize(
    ("dtype", "adapter", "has_bias", "expected"),
    [
        (torch.bfloat16, torch.float32, True, True),
        (torch.float32, torch.float32, True, True),
        (torch.float16, torch.float16, False, True),
        (torch.float16, torch.float16, True, False),
        (torch.float16, torch.float32, False, False),
    ],
)
def test_writes_update_first(dtype, adapter, has_bias, expected):
    assert config.writes_update_first(dtype, adapter, has_bias) == expected


@given(st.integers(1, 1 << 24), st.sampled_from(["cpu", "cuda"]))
def test_torch_blocks_have_rows(width, device_type):
    assert config.torch_rows_per_block(width, device_type) >= 1


@given(sizes, sizes, ranks, st.integers(1, config.MOST_SLOTS), dtypes, st.booleans(), chips)
def test_tiles_of_rows_are_no_taller_than_a_slot_needs(m, k, r, slots, dtype, exact, hardware):
    narrow = config.rows_narrow_product_config(m, k, r, slots, dtype, exact, hardware)
    added = config.rows_rank_product_config(m, slots, dtype, hardware)
    both = config.rows_narrow_and_reduce_config(m, k, min(r, 32), slots, dtype, exact, hardware)
    reduce = config.rows_reduce_config(m, k, r, slots, dtype, exact, hardware)
    for chosen in (narrow, added, both, reduce):
        assert chosen.BLOCK_M >= 16 and chosen.BLOCK_M & (chosen.BLOCK_M - 1) == 0, "tl.dot needs powers of two"
        assert chosen.BLOCK_M == 16 or 2 * -(-m // slots) > chosen.BLOCK_M
    assert 1 <= narrow.splits <= max(1, -(-k // narrow.BLOCK_K))
    for chosen in (both, reduce):
        assert 1 <= chosen.splits <= -(-m // chosen.BLOCK_M)
