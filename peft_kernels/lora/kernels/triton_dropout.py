"""The keep-mask of dropout.py, recomputed in registers for one tile; which lane a program works on; and dropout alone,
for the torch backend.

Equation  drop: out = f D * x | add_dropped: out += f D * product, in place       (D is the mask, f a number)
Tensors   x, product (rows, cols), any strides; out likewise with contiguous rows: float32, bfloat16 or float16 each
Tiles     a program owns (BLOCK_M, BLOCK_K) elements
Bound     one read of x and one write of out; add_dropped reads out too
Refused   rows or columns >= 2^31 (keep_tile's counter); float64
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_kernels._core.triton_tools import cdiv
from peft_kernels.lora.kernels.dropout import Dropout, Lanes, Rows

BLOCK_M, BLOCK_K = 4, 512  # 16 elements a thread; compiled for aligned rows, 28 to 38 registers


@triton.jit
def keep_tile(seed, lane, offs_m, first_col, threshold, BLOCK_COLS: tl.constexpr):
    """Decide on a tile's elements.

    Args:
        seed: 64-bit key.
        lane: the counter's last word as a signed number, as ``as_int32`` returns it; or a constexpr.
        offs_m: (BLOCK_M,) row indices below 2^31, so the counter's high row word is 0.
        first_col: the tile's first column, a multiple of 8.
        threshold: a 16-bit draw below it drops its element.

    The counters stay a row and a column until the rounds mix them. The joins put the eight decisions of a call side by
    side in one thread, in the order of the columns, which is also how a 16-byte load lays out half-precision x.
    """
    group = (first_col // 8 + tl.arange(0, BLOCK_COLS // 8)).to(tl.uint32)[None, :]
    row = offs_m.to(tl.uint32)[:, None]
    zero = tl.zeros((1, 1), tl.uint32)
    last = tl.full((1, 1), lane, tl.int32).to(tl.uint32, bitcast=True)
    w0, w1, w2, w3 = tl.philox(seed, group, row, zero, last, 7)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # (BLOCK_M, BLOCK_COLS / 8, 2, 2): word 2 i + j at [i, j]
    halves = tl.join(words & 0xFFFF, words >> 16)
    # Halves are below 2^16; signed, they compare with a threshold that Triton may have turned into a constant.
    return tl.reshape(halves, (offs_m.shape[0], BLOCK_COLS)).to(tl.int32) >= threshold


@triton.jit
def columns_of_lane(index, RANKS: tl.constexpr, NUMBERS: tl.constexpr):
    """First rank of a lane and the end of its ranks among those of all lanes, and the lane's number."""
    first, end, number = 0, RANKS[0], NUMBERS[0]
    ranks = RANKS[0]
    for i in tl.static_range(1, len(RANKS)):
        is_here = index >= i
        first = tl.where(is_here, ranks, first)
        ranks += RANKS[i]
        end = tl.where(is_here, ranks, end)
        number = tl.where(is_here, NUMBERS[i], number)
    return first, end, number


@triton.jit
def place_in_lanes(pid, RANKS: tl.constexpr, NUMBERS: tl.constexpr, BLOCK_R: tl.constexpr):
    """What a program of ``grid_of`` works on: its tile, its first rank, and what ``columns_of_lane`` returns beside."""
    total = 0
    for i in tl.static_range(len(RANKS)):
        total += tl.cdiv(RANKS[i], BLOCK_R)
    block = pid % total
    index, lane_s_first, blocks = 0, 0, 0
    for i in tl.static_range(len(RANKS)):
        is_here = block >= blocks
        index = tl.where(is_here, i, index)
        lane_s_first = tl.where(is_here, blocks, lane_s_first)
        blocks += tl.cdiv(RANKS[i], BLOCK_R)
    first, end, number = columns_of_lane(index, RANKS, NUMBERS)
    return pid // total, first + (block - lane_s_first) * BLOCK_R, end, number


# Numbers that no address is made of: special cases of them would only be compiled once more each.
@triton.jit(do_not_specialize=["M", "first_row", "dropout_threshold", "lane"])
def dropout_kernel(
    # pointers
    x_ptr, out_ptr, seed_ptr,
    # sizes
    M, K, first_row, dropout_threshold, factor, lane,
    # strides
    stride_xm, stride_xk, stride_om,
    # constexprs
    ADDS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_col = tl.program_id(1) * BLOCK_K
    offs_k = first_col + tl.arange(0, BLOCK_K)
    mask = (offs_m < M)[:, None] & (offs_k < K)[None, :]
    x_tile = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm + offs_k.to(tl.int64)[None, :] * stride_xk
    out_tile = out_ptr + offs_m.to(tl.int64)[:, None] * stride_om + offs_k[None, :]
    # Lane 0, which is None, has no parameter.
    number = 0 if lane is None else lane
    keep = keep_tile(tl.load(seed_ptr), number, first_row + offs_m, first_col, dropout_threshold, BLOCK_K)
    x = tl.load(x_tile, mask=mask, other=0.0)
    if not ADDS:
        # torch casts first, and multiplies what it has cast.
        x = x.to(out_ptr.dtype.element_ty)
    value = tl.where(keep, x.to(tl.float32) * factor, 0.0)
    if ADDS:
        value += tl.load(out_tile, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_tile, value.to(out_ptr.dtype.element_ty), mask=mask)


def as_int32(lane: int) -> int:
    """The signed number of a lane's 32 bits: Triton has one type for all of them."""
    return lane - (1 << 32) if lane >> 31 else lane


def lane_constants(dropout: Dropout, lanes: Lanes | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What kernels take as RANKS and NUMBERS. One lane has no RANKS; without a mask there is no more than one."""
    if dropout.seed is None:
        return (), (0,)
    if lanes is None:
        return (), (as_int32(dropout.lane),)
    numbers = tuple(map(as_int32, lanes.numbers))
    return (lanes.ranks if len(lanes.ranks) > 1 else ()), numbers


def grid_of(tiles: int, r: int, ranks: tuple[int, ...], block_r: int, splits: int) -> tuple[int, int, int]:
    """Programs of tiles of x, blocks of ranks and ranges of a reduction; ``ranks`` as ``lane_constants`` returns them.

    The blocks of lanes are the fastest: the programs that read one tile of x follow each other. They share an axis with
    the tiles, since only the first has room for all of them.
    """
    if not ranks:
        return tiles, cdiv(r, block_r), splits
    return tiles * sum(cdiv(rank, block_r) for rank in ranks), 1, splits


def drop(x: Tensor, out: Tensor, part: Rows, factor: float) -> None:
    """Launch out = factor * drop(x): x (rows, cols), any strides; out likewise, with contiguous rows."""
    _launch(x, out, part, factor, adds=False)


def add_dropped(out: Tensor, product: Tensor, part: Rows, factor: float) -> None:
    """Launch out += factor * drop(product), in place, rounded once; arguments as in ``drop``."""
    _launch(product, out, part, factor, adds=True)


def _launch(x: Tensor, out: Tensor, part: Rows, factor: float, adds: bool) -> None:
    if part.rows == 0 or part.cols == 0:
        return
    grid = (triton.cdiv(part.rows, BLOCK_M), triton.cdiv(part.cols, BLOCK_K))
    with torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext():
        dropout_kernel[grid](
            x, out, part.seed,
            part.rows, part.cols, part.first_row, part.limit, factor, as_int32(part.lane) if part.lane else None,
            x.stride(0), x.stride(1), out.stride(0),
            ADDS=adds, BLOCK_M=BLOCK_M, BLOCK_K=BLOCK_K,
        )  # fmt: skip
