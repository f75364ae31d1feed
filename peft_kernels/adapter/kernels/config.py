"""Tile sizes and paths of the bottleneck adapter kernels: frozen values from pure functions of problem and hardware.

Each branch says what it assumes, which is a model where no measurement is named; docs/design/adapter.md has the
arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from peft_kernels._core.device import Hardware
from peft_kernels._core.triton_tools import cdiv, next_power_of_2, split_count

Path = Literal["fused", "split"]

# Assumption: up to here (BLOCK_M, r) in registers and both weights' tiles fit a program.
FUSED_LIMIT = 128
_LEAST_ROWS = 16

# The CUDA kernel's architecture, its tile, and the largest cluster that every such GPU can schedule.
CUDA_ARCH = 90
CUDA_BLOCK = 64
CUDA_MAX_CLUSTER = 8


@dataclass(frozen=True)
class BottleneckConfig:
    """Both products of a block of rows in one program: the first reduces over BLOCK_C columns at a time, the second
    writes BLOCK_O columns at a time."""

    BLOCK_M: int
    BLOCK_C: int
    BLOCK_O: int
    BLOCK_R: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class NarrowProductConfig:
    """The product into the bottleneck, alone; its reduction in ``splits`` ranges."""

    BLOCK_M: int
    BLOCK_C: int
    BLOCK_R: int
    num_warps: int
    num_stages: int
    splits: int


@dataclass(frozen=True)
class WideProductConfig:
    """The product out of the bottleneck, alone."""

    BLOCK_M: int
    BLOCK_C: int
    BLOCK_R: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class ReduceRowsConfig:
    """A weight's gradient: a product of (M, r) and (M, C) over ``splits`` ranges of rows."""

    BLOCK_M: int
    BLOCK_C: int
    BLOCK_R: int
    num_warps: int
    num_stages: int
    splits: int


@dataclass(frozen=True)
class CopyConfig:
    """Rows without an adapter, copied BLOCK_C columns at a time."""

    BLOCK_M: int
    BLOCK_C: int
    num_warps: int


@dataclass(frozen=True)
class CudaForwardConfig:
    """The CUDA kernel's only choice: how many CTAs share a block of rows."""

    CLUSTER: int


def product_path(m: int, r: int, hardware: Hardware) -> Path:
    """Whether one program makes both products of its rows, or two launches share them out.

    Args:
        m: tokens. r: width of the bottleneck.
    """
    if r > FUSED_LIMIT:
        # Assumption: there the weights, which every block of rows reads again, outweigh a second read of x, and a
        # block of rows that is narrow enough for the registers would read them too often.
        return "split"
    # With fewer blocks of rows than this most multiprocessors would idle, and few would stream all of the weights.
    return "fused" if 4 * cdiv(m, _LEAST_ROWS) >= 3 * hardware.sm_count else "split"


def bottleneck_config(
    m: int,
    r: int,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    out_dtype: torch.dtype,
    aligned: bool,
    hardware: Hardware,
) -> BottleneckConfig:
    """As many rows as leave three quarters of the multiprocessors a block: each block reads both weights once.

    Args:
        dtype, out_dtype: of the activations that the first product reads and that the second writes.
        aligned: all rows start at multiples of 16 bytes.
    """
    float32 = torch.float32
    block_r = max(16, next_power_of_2(r))
    # 64 rows of 4096 bfloat16 on 132 multiprocessors are 69 MB, of which an L2 of 50 MB keeps the columns that were
    # read last; the second product begins with these. 128 rows would leave it two fifths.
    block_m = 64
    while block_m > _LEAST_ROWS and 4 * cdiv(m, block_m) < 3 * hardware.sm_count:
        block_m //= 2
    # Columns at a time: as many as ahead-of-time compiles show no spill for. In a product without tensor cores a thread
    # holds whole operands; unaligned matrices are loaded in two-byte pieces, each with an address of its own.
    block_c = 32 if float32 in (dtype, adapter_dtype) else 64
    if adapter_dtype == float32 and block_r > 64 and float32 in (dtype, out_dtype):
        block_c = 16
    elif dtype != adapter_dtype == out_dtype == float32 and block_r <= 64 and hardware.arch >= 100:
        # With 32 the compiler keeps this one to 64 registers there, and spills two.
        block_c = 64
    block_o = 128 if aligned and (adapter_dtype != float32 or block_r == 16) else 64
    if adapter_dtype == float32 and (out_dtype == float32 or block_r > 64):
        block_o = 32
    return BottleneckConfig(
        BLOCK_M=block_m,
        BLOCK_C=block_c,
        BLOCK_O=block_o,
        BLOCK_R=block_r,
        num_warps=4 if block_m <= 32 else 8,
        num_stages=3,
    )


def bottleneck_by_slot_config(
    m: int,
    r: int,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    out_dtype: torch.dtype,
    aligned: bool,
    hardware: Hardware,
) -> BottleneckConfig:
    """As ``bottleneck_config``, where a program's rows are a slot's: on sm_90 a third stage of float32 spills."""
    chosen = bottleneck_config(m, r, dtype, adapter_dtype, out_dtype, aligned, hardware)
    return replace(chosen, num_stages=2) if dtype == torch.float32 and hardware.arch == 90 else chosen


def narrow_product_config(
    m: int, c: int, r: int, dtype: torch.dtype, exact: bool, hardware: Hardware
) -> NarrowProductConfig:
    """A tile per multiprocessor: rows are halved, then the reduction is split, until there is one.

    Args:
        c: length of the reduction.
    """
    # The pieces of a float32 weight's tile live in registers beside it.
    block_r = min(64 if exact else 128, max(16, next_power_of_2(r)))
    block_m = 128 if dtype != torch.float32 and not exact else 64
    while block_m > _LEAST_ROWS and cdiv(m, block_m) * cdiv(r, block_r) < hardware.sm_count:
        block_m //= 2
    block_c = 32 if dtype == torch.float32 or exact else 64
    return NarrowProductConfig(
        BLOCK_M=block_m,
        BLOCK_C=block_c,
        BLOCK_R=block_r,
        num_warps=4 if block_m <= 32 else 8,
        num_stages=3,
        splits=split_count(cdiv(c, block_c) // 4, cdiv(m, block_m) * cdiv(r, block_r), hardware),
    )


def wide_product_config(m: int, r: int, dtype: torch.dtype, exact: bool, hardware: Hardware) -> WideProductConfig:
    """The width is walked in blocks, so that any takes the same registers."""
    block_m = 64
    while block_m > _LEAST_ROWS and block_m >= 2 * m:
        block_m //= 2
    return WideProductConfig(
        BLOCK_M=block_m,
        BLOCK_C=64 if dtype == torch.float32 or exact else 128,
        BLOCK_R=min(32, max(16, next_power_of_2(r))),
        num_warps=4 if block_m <= 32 else 8,
        num_stages=3,
    )


def reduce_rows_config(m: int, c: int, r: int, dtype: torch.dtype, exact: bool, hardware: Hardware) -> ReduceRowsConfig:
    """Rows are split until there is a program per multiprocessor; widths beyond 64 take further programs.

    Args:
        c: columns of the (M, C) operand.
    """
    # Without tensor cores 128 columns spill on sm_80.
    block_r, block_c = min(64, max(16, next_power_of_2(r))), 64 if dtype == torch.float32 else 128
    # Rows and warps by ahead-of-time compiles: the others spill somewhere on that architecture.
    wide = dtype == torch.float32 or exact
    block_m = 32 if wide or hardware.arch < 89 else 64
    return ReduceRowsConfig(
        BLOCK_M=block_m,
        BLOCK_C=block_c,
        BLOCK_R=block_r,
        num_warps=4 if wide and hardware.arch >= 100 else 8,
        num_stages=3,
        splits=split_count(cdiv(m, block_m), cdiv(c, block_c) * cdiv(r, block_r), hardware),
    )


def reduce_by_slot_config(
    m: int, c: int, width: int, slots: int, dtype: torch.dtype, exact: bool, hardware: Hardware
) -> ReduceRowsConfig:
    """As ``reduce_rows_config``, where each slot has programs of its own: so many fewer ranges of rows."""
    one = reduce_rows_config(m, c, width, dtype, exact, hardware)
    tiles = cdiv(c, one.BLOCK_C) * cdiv(width, one.BLOCK_R) * slots
    return replace(one, splits=split_count(cdiv(m, one.BLOCK_M * slots), tiles, hardware))


def copy_config(c: int) -> CopyConfig:
    """Few rows a program, so that most of them find that all of theirs have adapters."""
    return CopyConfig(BLOCK_M=16, BLOCK_C=min(256, max(16, next_power_of_2(c))), num_warps=4)


def cuda_forward_config(m: int, k: int, n: int, hardware: Hardware) -> CudaForwardConfig:
    """As few CTAs as leave a multiprocessor two, of which one computes while the other waits for memory.

    Args:
        m, k, n: tokens, in-features, out-features.
    """
    chunks = cdiv(max(k, n), CUDA_BLOCK)
    cluster = 1
    # Eight chunks of x, 64 KB, are what lets two CTAs of a width up to 64 into a multiprocessor's shared memory.
    while cluster < CUDA_MAX_CLUSTER and cdiv(chunks, cluster) > 8:
        cluster *= 2
    # Assumption: a multiprocessor without a CTA costs more than an exchange with more peers.
    while cluster < min(CUDA_MAX_CLUSTER, chunks) and cdiv(m, CUDA_BLOCK) * cluster < hardware.sm_count:
        cluster *= 2
    return CudaForwardConfig(CLUSTER=min(cluster, CUDA_MAX_CLUSTER))


def torch_rows_per_block(width: int, device_type: str) -> int:
    """Rows that the torch backend casts at a time.

    On a CPU a block of float32 values should stay in a core's L2 cache; on a GPU it should be worth its launches and
    small beside the activations.
    """
    elements = 1 << 17 if device_type == "cpu" else 1 << 24
    return max(1, elements // max(1, width))


def torch_turns(m: int, r: int, dtype: torch.dtype, device_type: str) -> bool:
    """Whether the torch backend's products into the bottleneck are made turned, (r, M).

    In bf16 on a CPU that took 0.45 to 0.65 of the time with 8 or 16 columns and few rows, and up to 1.3 times as long
    with more of either (one thread of an AMD EPYC with AVX-512 BF16, 128 to 2048 rows).
    """
    return device_type == "cpu" and dtype == torch.bfloat16 and r <= 16 and m * r <= 1 << 14
