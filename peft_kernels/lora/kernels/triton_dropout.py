"""The keep-mask of dropout.py, recomputed in registers for one tile."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def keep_tile(seed, offs_m, first_col, threshold, BLOCK_COLS: tl.constexpr):
    """Decide on a tile's elements.

    Args:
        seed: 64-bit key.
        offs_m: (BLOCK_M,) row indices below 2^31, so the counter's high row word is 0.
        first_col: the tile's first column, a multiple of 8.
        threshold: a 16-bit draw below it drops its element.

    The counters stay a row and a column until the rounds mix them. The joins put the eight decisions of a call side by
    side in one thread, in the order of the columns, which is also how a 16-byte load lays out half-precision x.
    """
    group = (first_col // 8 + tl.arange(0, BLOCK_COLS // 8)).to(tl.uint32)[None, :]
    row = offs_m.to(tl.uint32)[:, None]
    zero = tl.zeros((1, 1), tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, group, row, zero, zero, 7)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # (BLOCK_M, BLOCK_COLS / 8, 2, 2): word 2 i + j at [i, j]
    halves = tl.join(words & 0xFFFF, words >> 16)
    # Halves are below 2^16; signed, they compare with a threshold that Triton may have turned into a constant.
    return tl.reshape(halves, (offs_m.shape[0], BLOCK_COLS)).to(tl.int32) >= threshold
