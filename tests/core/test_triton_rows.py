"""The tiles of a plan of rows, as a kernel finds them."""

from __future__ import annotations

import pytest
import torch

from peft_kernels import Rows
from peft_kernels._core.triton_tools import cdiv, next_power_of_2, why_not_environment

if why_not_environment() is not None:
    pytest.skip(str(why_not_environment()), allow_module_level=True)

import triton
import triton.language as tl

from peft_kernels._core.triton_rows import tile_of_plan

BLOCK = 16


@triton.jit
def tiles_kernel(first_ptr, out_ptr, T, BLOCK_M: tl.constexpr, SLOTS: tl.constexpr):
    index = tl.program_id(0)
    slot, start, end = tile_of_plan(first_ptr, index, T, BLOCK_M, SLOTS)
    tl.store(out_ptr + 3 * index, slot)
    tl.store(out_ptr + 3 * index + 1, start)
    tl.store(out_ptr + 3 * index + 2, end)


@pytest.mark.parametrize(
    ("slots", "known"),
    [
        ([0] * 40, 1),
        ([2] * 17 + [-1] * 3 + [0] * 16 + [2] * 15 + [4] * 33, 5),
        ([-1] * 20, 3),
        ([1], 7),
        (list(range(9)) * 4, 9),
        ([], 2),
    ],
    ids=["one", "ragged", "none", "last", "many", "empty"],
)
def test_tiles_are_each_slot_s_rows(slots: list[int], known: int, device: torch.device) -> None:
    rows = Rows.of(slots, known=known, device=device)
    most = cdiv(len(slots), BLOCK) + min(known, len(slots)) + 1
    out = torch.empty(most, 3, dtype=torch.int32, device=device)
    tiles_kernel[(most,)](rows.first, out, known, BLOCK_M=BLOCK, SLOTS=next_power_of_2(known))

    first = rows.first.tolist()
    expected = [
        [slot, start, min(start + BLOCK, first[slot + 1])]
        for slot in range(known)
        for start in range(first[slot], first[slot + 1], BLOCK)
    ]
    found = out.tolist()
    assert found[: len(expected)] == expected and len(expected) < most
    # Past the last there is no slot, and no place that a mask would let through.
    assert all(slot >= known and end <= start for slot, start, end in found[len(expected) :])
