"""The plan of rows within a kernel. Import it only from a family's triton_* files."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tiles_of_slots(first_ptr, T, rows, SLOTS: tl.constexpr):
    """How many tiles of at most ``rows`` rows each slot has; SLOTS is a power of two, at least T."""
    t = tl.arange(0, SLOTS)
    begin = tl.load(first_ptr + t, mask=t < T, other=0)
    end = tl.load(first_ptr + t + 1, mask=t < T, other=0)
    return tl.where(end > begin, (end - begin - 1) // rows + 1, 0)  # (SLOTS,)


@triton.jit
def owner(index, counts):
    """Where each slot has ``counts`` things: which slot the index-th of all belongs to, and its number there.

    Of what is beyond the last one the slot is as large as the vector.
    """
    ends = tl.cumsum(counts, 0)
    is_before = ends <= index
    return tl.sum(is_before.to(tl.int32), 0), index - tl.max(tl.where(is_before, ends, 0), 0)


@triton.jit
def tile_of_plan(first_ptr, index, T, BLOCK_M: tl.constexpr, SLOTS: tl.constexpr):
    """Slot, start and end of a tile: at most BLOCK_M places in ``order``, all of one slot.

    Tiles of slot 0 come first; there are at most cdiv(M, BLOCK_M) + min(T, M) of all. An index past the last tile has a
    slot of at least T and no places.

    Args:
        first_ptr: (T + 1,) int32, the plan's. index: of the tile. SLOTS: a power of two, at least T.
    """
    slot, tile = owner(index, tiles_of_slots(first_ptr, T, BLOCK_M, SLOTS))
    start = tl.load(first_ptr + slot, mask=slot < T, other=0) + tile * BLOCK_M
    last = tl.load(first_ptr + slot + 1, mask=slot < T, other=0)
    return slot, start, tl.minimum(start + BLOCK_M, last)
