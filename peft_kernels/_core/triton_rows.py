"""The plan of rows within a kernel. Import it only from a family's triton_* files."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_of_plan(first_ptr, index, T, BLOCK_M: tl.constexpr, SLOTS: tl.constexpr):
    """Slot, start and end of a tile: at most BLOCK_M places in ``order``, all of one slot.

    Tiles of slot 0 come first; there are at most cdiv(M, BLOCK_M) + min(T, M) of all. An index past the last tile has a
    slot of at least T and no places.

    Args:
        first_ptr: (T + 1,) int32, the plan's. index: of the tile. SLOTS: a power of two, at least T.
    """
    slots = tl.arange(0, SLOTS)
    begin = tl.load(first_ptr + slots, mask=slots < T, other=0)
    end = tl.load(first_ptr + slots + 1, mask=slots < T, other=0)
    # Tiles up to each slot and with it; slots beyond T repeat the last.
    upto = tl.cumsum((end - begin + BLOCK_M - 1) // BLOCK_M, axis=0)
    is_before = upto <= index
    slot = tl.sum(is_before.to(tl.int32), axis=0)
    before = tl.max(tl.where(is_before, upto, 0), axis=0)
    start = tl.load(first_ptr + slot, mask=slot < T, other=0) + (index - before) * BLOCK_M
    last = tl.load(first_ptr + slot + 1, mask=slot < T, other=0)
    return slot, start, tl.minimum(start + BLOCK_M, last)
