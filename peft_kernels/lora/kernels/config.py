"""Tile sizes and orders of the LoRA linear kernels: frozen values from pure functions of the problem and the hardware.

Each branch says what it assumes, which is a model where no measurement is named; docs/design/lora.md has the
arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch

from peft_kernels._core.device import Hardware
from peft_kernels._core.triton_tools import cdiv, next_power_of_2, split_count
from peft_kernels.lora.kernels.dropout import Lanes


@dataclass(frozen=True)
class NarrowProductConfig:
    """S = drop(x) A^T: a product with few columns, K in ``splits`` ranges."""

    BLOCK_M: int
    BLOCK_K: int
    BLOCK_R: int
    num_warps: int
    num_stages: int
    splits: int


@dataclass(frozen=True)
class RankProductConfig:
    """S B^T, written or added in place."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_R: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class ProductConfig:
    """A base product by tiles; GROUP_M tiles of rows share the columns that they read."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    GROUP_M: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class NarrowAndReduceConfig:
    """dS = dY B, dB = dY^T S and dbias in one pass over dY, whose rows are in ``splits`` ranges."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_R: int
    num_warps: int
    num_stages: int
    splits: int


@dataclass(frozen=True)
class ReduceRowsConfig:
    """dA = dS^T drop(x), reduced over ``splits`` ranges of rows; also dB^T = S^T dY where dY is read twice."""

    BLOCK_M: int
    BLOCK_K: int
    BLOCK_R: int
    num_warps: int
    num_stages: int
    splits: int


@dataclass(frozen=True)
class SumSpansConfig:
    """Sums of partial gradients over the spans of a slot."""

    BLOCK_R: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class DecodeConfig:
    """At most 16 tokens in one launch (csrc/lora/decode_config.h).

    Attributes:
        SPLITS: of K, for each tile of W.
        DOWN_SPLITS: of K, for each tile of A.
        GRID: blocks, which must be resident together.
    """

    SPLITS: int
    DOWN_SPLITS: int
    GRID: int


# Of kernels by rows: pointers that a kernel has for lanes, and slots whose first rows a program loads.
MOST_LANES = 4
MOST_SLOTS = 4096

# Constants of csrc/lora/decode_config.h: rows of a tile, k that a warp takes at a time, warps of a block that
# share its k, blocks of a multiprocessor.
DECODE_TILE_ROWS = 64
DECODE_CHUNK_K = 64
DECODE_WARPS_OF_K = 4
DECODE_BLOCKS_PER_SM = 2


def writes_update_first(dtype: torch.dtype, adapter_dtype: torch.dtype, has_bias: bool) -> bool:
    """Whether y may begin as bias + s S B^T, rounded to its dtype, to which the base product is added.

    In float16 it may where eager torch rounds the update, and that alone, too: with a bias, or float32 adapters, eager
    may stay finite where y would begin as inf.
    """
    return dtype != torch.float16 or (adapter_dtype == dtype and not has_bias)


def reads_dy_once(r: int) -> bool:
    """Whether one pass over dY makes dS and dB.

    Model: the pass writes and reads 4 r M N / 128 bytes of partial dS beside the 2 M N bytes of dY; at r = 32 these are
    as many bytes as a second read of dY.
    """
    return r <= 32


def _blocks_of_ranks(r: int, lanes: Lanes | None, most: int) -> tuple[int, int]:
    """Size of a block of ranks, which holds the widest lane where the bound lets it, and how many blocks there are."""
    ranks = (r,) if lanes is None else lanes.ranks
    block_r = min(most, max(16, next_power_of_2(max(ranks))))
    return block_r, sum(cdiv(rank, block_r) for rank in ranks)


def narrow_product_config(
    m: int,
    k: int,
    r: int,
    dtype: torch.dtype,
    exact: bool,
    hardware: Hardware,
    lanes: Lanes | None = None,
    row_invariant: bool = False,
) -> NarrowProductConfig:
    """A tile per multiprocessor: rows are halved, then K split, until there is one (assumed: bandwidth needs all).

    Lanes are more programs for each tile of rows, of which they need fewer; a taller one reads A's tiles less often.
    With ``row_invariant`` nothing depends on the rows: K is one range, in which each sum has one order.
    """
    block_r, blocks = _blocks_of_ranks(r, lanes, 128)
    per_tile = 1 if lanes is None else blocks
    block_m = 64
    if row_invariant:
        block_m = 32  # the tile of 8192 rows on 132 multiprocessors
    while not row_invariant and block_m > 16 and cdiv(m, block_m) * per_tile < hardware.sm_count:
        block_m //= 2
    # 32 KiB of a float32 operand's tile and its pieces in registers is what 255 registers a thread hold.
    block_k = 128 if block_r <= 32 else 64
    if exact or dtype == torch.float32:
        block_k //= 2
    # On sm_100 it is the narrow ones that spill with four warps, and the widest with eight; with lanes the other way
    # round (ahead-of-time compiles).
    is_wide = block_r > (64 if hardware.arch >= 100 else 32)
    takes_eight_warps = is_wide if hardware.arch < 100 or lanes is not None else not is_wide
    return NarrowProductConfig(
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        BLOCK_R=block_r,
        num_warps=8 if takes_eight_warps else 4,
        num_stages=3,
        splits=1 if row_invariant else split_count(cdiv(k, block_k) // 4, cdiv(m, block_m) * blocks, hardware),
    )


def product_config(n: int, k: int, dtype: torch.dtype, hardware: Hardware) -> ProductConfig:
    """One tile for all numbers of rows: another one may sum in another order.

    Float32 has no tensor cores unless torch allows TF32: a thread then holds whole operands, and larger tiles spill, as
    this one does with four warps where there is no bias. So do larger ones of half precision where rows are no multiple
    of 16 bytes, and come in pieces of two. Before sm_90 a stage is half as long, since sm_89 has 99 KiB of shared
    memory.
    """
    if dtype == torch.float32 or n % 8 or k % 8:
        warps = 8 if dtype == torch.float32 else 4
        return ProductConfig(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, GROUP_M=8, num_warps=warps, num_stages=3)
    return ProductConfig(
        BLOCK_M=128,
        BLOCK_N=128,
        BLOCK_K=64 if hardware.arch >= 90 else 32,
        GROUP_M=8,
        num_warps=8,
        num_stages=4 if hardware.arch >= 90 else 3,
    )


def rank_product_config(dtype: torch.dtype, hardware: Hardware, lanes: Lanes | None = None) -> RankProductConfig:
    """Wide rows for whole cache lines; the rank is walked in blocks, so any rank takes the same registers.

    Blocks of 32 ranks spill beside float32 adapters on sm_89, and two stages before sm_90 where there is no bias. Lanes
    have a second accumulator; with it rows of 128 take up to 204 registers on sm_90, of which a multiprocessor has room
    for one block, and rows of 64 up to 120, for two.
    """
    return RankProductConfig(
        BLOCK_M=64,
        BLOCK_N=64 if dtype == torch.float32 or lanes is not None else 128,
        BLOCK_R=16,
        num_warps=8,
        num_stages=2 if hardware.arch >= 90 else 1,
    )


def narrow_and_reduce_config(
    m: int, n: int, r: int, dtype: torch.dtype, exact: bool, hardware: Hardware
) -> NarrowAndReduceConfig:
    """Rows are split until there is a program per multiprocessor; ``reads_dy_once`` bounds the rank."""
    block_n = 128
    block_m = 32 if exact or dtype == torch.float32 else 64
    if dtype == torch.float32 and hardware.arch >= 100:
        block_m = 16  # 32 rows spill where there is no dbias
    return NarrowAndReduceConfig(
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_R=max(16, next_power_of_2(r)),
        num_warps=4 if dtype == torch.float32 and hardware.arch >= 100 else 8,
        num_stages=3,
        splits=split_count(cdiv(m, block_m), cdiv(n, block_n), hardware),
    )


def gain_narrow_and_reduce_config(
    m: int, n: int, r: int, dtype: torch.dtype, exact: bool, hardware: Hardware
) -> NarrowAndReduceConfig:
    """As ``narrow_and_reduce_config``; before sm_90 a second activation's tile spills beside float32 operands, and the
    more so where those multiply in pieces.
    """
    chosen = narrow_and_reduce_config(m, n, r, dtype, exact, hardware)
    if hardware.arch >= 90 or not (exact or dtype == torch.float32):
        return chosen
    block_n = 64 if exact else chosen.BLOCK_N
    splits = split_count(cdiv(m, 16), cdiv(n, block_n), hardware)
    return replace(chosen, BLOCK_M=16, BLOCK_N=block_n, splits=splits)


def reduce_rows_config(
    m: int, k: int, r: int, dtype: torch.dtype, exact: bool, hardware: Hardware, lanes: Lanes | None = None
) -> ReduceRowsConfig:
    """As ``narrow_and_reduce_config``; ranks beyond 64 take further programs, which re-read x from L2.

    With lanes a third stage of float32 operands spills on sm_89.
    """
    block_k = 128
    block_r, blocks = _blocks_of_ranks(r, lanes, 64)
    block_m = 32 if exact or dtype == torch.float32 else 64
    return ReduceRowsConfig(
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        BLOCK_R=block_r,
        num_warps=4 if hardware.arch >= 100 else 8,
        num_stages=2 if lanes is not None and exact and hardware.arch < 90 else 3,
        splits=split_count(cdiv(m, block_m), cdiv(k, block_k) * blocks, hardware),
    )


_RANKS_OF_ANY = 64  # a block of ranks where those of a batch's adapters may decide nothing


def _rows_of_tile(m: int, slots: int, most: int) -> int:
    """Rows of a tile of one slot: a slot of average size fills it.

    What is beyond its rows is not read, but masks are drawn for it and tensor cores multiply it.
    """
    return min(most, max(16, next_power_of_2(cdiv(m, slots))))


def rows_narrow_product_config(
    m: int,
    k: int,
    r: int,
    slots: int,
    dtype: torch.dtype,
    exact: bool,
    hardware: Hardware,
    lanes: Lanes | None = None,
    row_invariant: bool = False,
) -> NarrowProductConfig:
    """As ``narrow_product_config``, but for slots of few rows; ``r`` is the greatest rank.

    A third stage of operands in pieces spills on sm_100. With ``row_invariant`` nothing depends on other slots' ranks
    either, from which blocks of K follow.
    """
    if row_invariant:
        r, lanes = _RANKS_OF_ANY, None if lanes is None else lanes._replace(ranks=(_RANKS_OF_ANY,) * len(lanes.ranks))
    chosen = narrow_product_config(m, k, r, dtype, exact, hardware, lanes, row_invariant)
    if row_invariant:
        return replace(chosen, num_stages=2 if exact and hardware.arch >= 100 else chosen.num_stages)
    block_m = _rows_of_tile(m, slots, chosen.BLOCK_M)
    _, blocks = _blocks_of_ranks(r, lanes, chosen.BLOCK_R)
    splits = split_count(cdiv(k, chosen.BLOCK_K) // 4, cdiv(m, block_m) * blocks, hardware)
    stages = 2 if exact and hardware.arch >= 100 else chosen.num_stages
    return replace(chosen, BLOCK_M=block_m, num_stages=stages, splits=splits)


def rows_rank_product_config(
    m: int,
    slots: int,
    dtype: torch.dtype,
    hardware: Hardware,
    lanes: Lanes | None = None,
    row_invariant: bool = False,
) -> RankProductConfig:
    """As ``rank_product_config``; tiles of fewer rows have fewer threads.

    With ``row_invariant`` all have as many rows as those of a slot that has many. Of float32 64 rows spill from sm_90
    on, into the 80 registers that let three blocks be resident, and on sm_89 32 rows of four warps with lanes.
    """
    chosen = rank_product_config(dtype, hardware, lanes)
    most = 32 if dtype == torch.float32 else chosen.BLOCK_M
    block_m = most if row_invariant else _rows_of_tile(m, slots, most)
    return replace(chosen, BLOCK_M=block_m, num_warps=max(2, chosen.num_warps * block_m // most))


def rows_narrow_and_reduce_config(
    m: int, n: int, r: int, slots: int, dtype: torch.dtype, exact: bool, hardware: Hardware
) -> NarrowAndReduceConfig:
    """As ``narrow_and_reduce_config``. Spans are as long as if one slot had all rows: each further one adds one.

    With ranks of no multiple 64 rows spill on sm_100, and in pieces a third stage does on sm_89.
    """
    chosen = narrow_and_reduce_config(m, n, r, dtype, exact, hardware)
    block_m = _rows_of_tile(m, slots, min(chosen.BLOCK_M, 32) if hardware.arch >= 100 else chosen.BLOCK_M)
    splits = split_count(cdiv(m, block_m), cdiv(n, chosen.BLOCK_N), hardware)
    stages = 2 if exact and hardware.arch < 90 else chosen.num_stages
    return replace(chosen, BLOCK_M=block_m, num_stages=stages, splits=splits)


def rows_reduce_config(
    m: int,
    k: int,
    r: int,
    slots: int,
    dtype: torch.dtype,
    exact: bool,
    hardware: Hardware,
    lanes: Lanes | None = None,
) -> ReduceRowsConfig:
    """As ``reduce_rows_config``; spans as ``rows_narrow_and_reduce_config`` has them.

    In pieces a third stage spills on sm_100, and with lanes the second of two does on sm_80.
    """
    chosen = reduce_rows_config(m, k, r, dtype, exact, hardware, lanes)
    block_m = _rows_of_tile(m, slots, chosen.BLOCK_M)
    _, blocks = _blocks_of_ranks(r, lanes, chosen.BLOCK_R)
    splits = split_count(cdiv(m, block_m), cdiv(k, chosen.BLOCK_K) * blocks, hardware)
    stages = 2 if exact and hardware.arch >= 100 else 3 if hardware.arch == 80 else chosen.num_stages
    return replace(chosen, BLOCK_M=block_m, num_stages=stages, splits=splits)


@cache
def decode_config(n: int, k: int, r: int, hardware: Hardware) -> DecodeConfig:
    """As many splits of K as keep all multiprocessors loading, and no more; remembered, as it is asked for every token.

    Model, not measured: the time is that of the blocks with most units; a unit costs a round for each chunk that its
    warps load, and two more for its sums, its flags, and what waits for them.
    """
    chunks, slots = cdiv(k, DECODE_CHUNK_K), DECODE_BLOCKS_PER_SM * hardware.sm_count
    tiles, down_tiles = cdiv(n, DECODE_TILE_ROWS), cdiv(r, DECODE_TILE_ROWS)

    def units(splits: int, down_splits: int) -> int:
        return tiles * splits + down_tiles * down_splits

    def rounds(choice: tuple[int, int]) -> int:
        splits, down_splits = choice
        return cdiv(units(splits, down_splits), slots) * (cdiv(cdiv(chunks, splits), DECODE_WARPS_OF_K) + 2)

    # S had better be there before the first tile of W asks for it, so A's units are half as long, unless that takes
    # another wave of blocks. With fewer chunks to a unit than warps, more splits have nothing to share.
    most = max(1, cdiv(chunks, DECODE_WARPS_OF_K))
    choices = [(splits, min(factor * splits, chunks)) for splits in range(1, most + 1) for factor in (2, 1)]
    splits, down_splits = min(choices, key=rounds)
    return DecodeConfig(SPLITS=splits, DOWN_SPLITS=down_splits, GRID=min(units(splits, down_splits), slots))


def torch_rows_per_block(width: int, device_type: str) -> int:
    """Rows that the torch backend casts or drops at a time.

    On a CPU the words of a mask that torch makes, one for eight elements, must be more than the 32768 that torch leaves
    to one thread; a quarter of it took 1.3 times as long on two. On a GPU a block, at most 256 MB in float32, should be
    worth its launches, of which it has about five.
    """
    elements = 1 << 19 if device_type == "cpu" else 1 << 26
    return max(1, elements // max(1, width))
