"""The pure functions that choose block sizes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from peft_kernels.prompt.kernels import config


@given(st.integers(1, 1 << 16))
def test_blocks_are_powers_of_two_of_bounded_size(d: int) -> None:
    for chosen in (config.concatenate_config(d), config.sum_config(d)):
        for size in (chosen.BLOCK_T, chosen.BLOCK_D):
            assert size >= 1 and size & (size - 1) == 0
        assert 32 * chosen.num_warps <= chosen.BLOCK_T * chosen.BLOCK_D <= 4096
