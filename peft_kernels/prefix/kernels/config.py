"""Block sizes of the kernels: frozen values from pure functions of the attention and the hardware.

All of it is assumed where no measurement is named. Kernels have the sizes that compile without spills and fit the
shared memory of sm_80, 89, 90 and 100 (tests/codegen); docs/design/prefix.md has the arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from peft_kernels._core.device import Hardware
from peft_kernels._core.tma import TMA_ALIGNMENT
from peft_kernels._core.triton_tools import cdiv, next_power_of_2, split_count
from peft_kernels.prefix.kernels.attention import Attention


@dataclass(frozen=True)
class ForwardConfig:
    """y and the softmax's statistics, or ``splits`` parts of them; with USE_TMA k and v through tensor descriptors."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_P: int
    BLOCK_D: int
    USE_TMA: bool
    num_warps: int
    num_stages: int
    splits: int


@dataclass(frozen=True)
class MergeConfig:
    """y and the statistics from their parts, of which BLOCK_S are loaded at once."""

    BLOCK_S: int
    BLOCK_D: int
    num_warps: int


@dataclass(frozen=True)
class AddPrefixConfig:
    """The prefix's part of y, or of dq, beside another operator's of the sequence."""

    BLOCK_M: int
    BLOCK_P: int
    BLOCK_D: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class DeltaConfig:
    """delta."""

    BLOCK_M: int
    BLOCK_D: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class GradQConfig:
    """dq."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_P: int
    BLOCK_D: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class GradKVConfig:
    """dk and dv."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_D: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class GradPrefixConfig:
    """dprefix_k and dprefix_v, over ``splits`` ranges of rows."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_D: int
    num_warps: int
    num_stages: int
    splits: int


def forward_config(attention: Attention, hardware: Hardware) -> ForwardConfig:
    """Blocks by head size; few rows (decoding) take a small block, whose other rows would be masked."""
    block_d = _block_d(attention.d)
    if attention.dtype == torch.float32:
        # On sm_80 16 rows of 256 dimensions spill where causal, and 32 where padded alone (ahead-of-time compiles).
        block_m, block_n = (32, 16) if block_d <= 128 or (hardware.arch == 80 and attention.causal) else (16, 16)
    elif block_d > 128:
        block_m, block_n = 64, 32
    elif block_d <= 64 and hardware.arch != 90:
        # 128 rows spill with four warps.
        block_m, block_n = 64, 64
    else:
        # With the padding mask's loads 64 keys spill on sm_80 and 89.
        block_m, block_n = 128, 32 if attention.padded and hardware.arch < 90 else 64
    block_m = _rows_at_most(attention, block_m)
    if hardware.arch < 90 and min(block_m, block_d) <= 32:
        # The assembler keeps these small tiles to 96 or 128 registers, and a few of 64 keys' spill.
        block_n = min(block_n, 32)
    return ForwardConfig(
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_P=_keys_at_most(attention.p, block_n),
        BLOCK_D=block_d,
        USE_TMA=False,
        num_warps=_forward_warps(attention, block_m, block_d, hardware.arch),
        num_stages=2,
        splits=_splits(attention, block_m, block_n, hardware.sm_count),
    )


def takes_wide_blocks(attention: Attention, hardware: Hardware) -> bool:
    """Whether ``wide_forward_config`` is for an attention: its blocks fit, are filled, and lie as TMA reads them."""
    fits = hardware.arch == 90 and attention.dtype.itemsize == 2 and _block_d(attention.d) == 128
    is_aligned = attention.d * attention.dtype.itemsize % TMA_ALIGNMENT == 0
    return fits and is_aligned and attention.group * attention.s >= 128 and attention.l >= 256


def wide_forward_config(attention: Attention, hardware: Hardware) -> ForwardConfig:
    """Blocks of 128 keys by TMA, three of them in flight, 225 KiB; a multiprocessor has one program either way.

    Half as many rescalings and barriers a key, and up to 64 masked keys more at the causal border: whether that is
    faster is for the clock to say.
    """
    narrow = forward_config(attention, hardware)
    splits = _splits(attention, narrow.BLOCK_M, 128, hardware.sm_count)
    return replace(narrow, BLOCK_N=128, USE_TMA=True, num_stages=3, splits=splits)


def _splits(attention: Attention, block_m: int, block_n: int, sm_count: int) -> int:
    """Ranges of the sequence where half of the multiprocessors or more would have no program (assumed).

    A range has at least four blocks of keys, so that its part, written and read once as float32, is little beside it.
    """
    tiles = cdiv(attention.group * attention.s, block_m) * attention.b * attention.h_kv
    return max(1, min(sm_count // tiles, attention.l // (4 * block_n))) if 2 * tiles <= sm_count else 1


def merge_config(d: int, splits: int) -> MergeConfig:
    """All parts of a row at once up to 8192 elements, 64 a thread: one wait for memory, not one for each part.

    Fewer than eight are masked off: a cache that grows goes through all counts, and should not compile for each.
    """
    block_d = _block_d(d)
    block_s = min(max(8, next_power_of_2(splits)), max(2, 8192 // block_d))
    return MergeConfig(BLOCK_S=block_s, BLOCK_D=block_d, num_warps=4)


def _forward_warps(attention: Attention, block_m: int, block_d: int, arch: int) -> int:
    if attention.dtype == torch.float32:
        # Where sm_90 has the other number, the assembler keeps causal kernels to 80 and 128 registers, and they spill.
        few = block_d == 64 if arch == 90 else block_d > 128 and block_m < 32
        return 4 if few else 8
    return 8 if block_m * block_d >= 128 * 128 else 4


def add_prefix_config(attention: Attention, hardware: Hardware) -> AddPrefixConfig:
    """As the forward kernel."""
    like = forward_config(attention, hardware)
    return AddPrefixConfig(like.BLOCK_M, like.BLOCK_P, like.BLOCK_D, like.num_warps, like.num_stages)


def add_prefix_grad_q_config(attention: Attention, hardware: Hardware) -> AddPrefixConfig:
    """As the kernel of dq."""
    like = grad_q_config(attention, hardware)
    return AddPrefixConfig(like.BLOCK_M, like.BLOCK_P, like.BLOCK_D, like.num_warps, like.num_stages)


def delta_config(d: int) -> DeltaConfig:
    """A tile of 4096 elements, 32 a thread."""
    block_d = _block_d(d)
    return DeltaConfig(BLOCK_M=4096 // block_d, BLOCK_D=block_d, num_warps=4, num_stages=1)


def grad_q_config(attention: Attention, hardware: Hardware) -> GradQConfig:
    """As the forward kernel, with dy beside q and two products of a block before the third."""
    block_d = _block_d(attention.d)
    if attention.dtype == torch.float32:
        block_m, block_n = (32, 32) if block_d <= 128 else (16, 16)
    elif block_d > 128:
        # With 32 keys it takes 100 KiB where sm_89 has 99.
        block_m, block_n = 64, 16 if hardware.arch == 89 else 32
    else:
        # Beside a mask of bytes 64 keys spill on sm_100 (ahead-of-time compiles).
        block_m, block_n = 64, 32 if attention.padded and block_d > 64 and hardware.arch >= 100 else 64
    # Four warps hold 64 rows of 128 dimensions in sm_90's registers alone.
    takes_four_warps = attention.dtype != torch.float32 and block_d <= (128 if hardware.arch == 90 else 64)
    return GradQConfig(
        BLOCK_M=_rows_at_most(attention, block_m),
        BLOCK_N=block_n,
        BLOCK_P=_keys_at_most(attention.p, block_n),
        BLOCK_D=block_d,
        num_warps=4 if takes_four_warps else 8,
        num_stages=2,
    )


def grad_kv_config(attention: Attention, hardware: Hardware) -> GradKVConfig:
    """Two accumulators of keys, and two products of a block of rows before the other two."""
    block_d = _block_d(attention.d)
    block_m, block_n = _keys_blocks(attention.dtype, block_d, hardware.arch)
    return GradKVConfig(
        BLOCK_M=_rows_at_most(attention, block_m),
        BLOCK_N=_keys_at_most(attention.l, block_n),
        BLOCK_D=block_d,
        num_warps=8,
        num_stages=2,
    )


def grad_prefix_config(attention: Attention, hardware: Hardware) -> GradPrefixConfig:
    """As dk and dv; rows are split until there is a program per multiprocessor (assumed: a prefix has few blocks)."""
    block_d = _block_d(attention.d)
    block_m, block_n = _keys_blocks(attention.dtype, block_d, hardware.arch)
    if attention.prefix_dtype != attention.dtype:
        # The pieces of the float32 operands live in registers.
        block_m, block_n = (32, 32) if block_d <= 128 else (16, 32)
        if hardware.arch >= 100 and attention.dtype == torch.float16 and block_d == 128 and attention.p <= 16:
            # The assembler keeps 32 rows by 16 keys to 128 registers, and they spill.
            block_m = 64
    elif attention.dtype == torch.float32 and block_d == 128:
        # 16 rows by 32 keys spill with Triton 3.8, 32 by 32 with 3.6.
        block_m, block_n = 32, 16
    block_m, block_n = _rows_at_most(attention, block_m), _keys_at_most(attention.p, block_n)
    owners, batches = (1, attention.b) if attention.shared else (attention.b, 1)
    tiles = max(1, cdiv(attention.p, block_n) * attention.h_kv * owners)
    blocks_m = batches * cdiv(attention.group * attention.s, block_m)
    return GradPrefixConfig(
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        num_warps=8,
        num_stages=2,
        splits=split_count(blocks_m, tiles, hardware),
    )


def _block_d(d: int) -> int:
    """tl.dot takes powers of two of at least 16; columns past D are masked."""
    return max(16, next_power_of_2(d))


def _rows_at_most(attention: Attention, block_m: int) -> int:
    return min(block_m, max(16, next_power_of_2(attention.group * attention.s)))


def _keys_at_most(keys: int, block_n: int) -> int:
    """No larger than the keys that there are."""
    return min(block_n, max(16, next_power_of_2(keys)))


def _keys_blocks(dtype: torch.dtype, block_d: int, arch: int) -> tuple[int, int]:
    """Rows and keys of a block of the kernels that sum over rows."""
    if dtype == torch.float32:
        return (16, 32) if block_d <= 128 else (16, 16)
    if block_d <= 128:
        return 64, 64
    # Keys are the rows of these products, and sm_90's instruction multiplies 64 of them; 64 by 64 spill.
    return (32, 64) if arch == 90 else (32, 32)
