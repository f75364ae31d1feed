"""Tile sizes and paths of the LoRA linear kernels: frozen values from pure functions of the problem and the hardware.

No branch here has been measured on a GPU yet. Each says what it assumes; docs/design/lora_linear.md has the arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from peft_kernels._core.device import Hardware
from peft_kernels._core.triton_tools import next_power_of_2

Path = Literal["fused", "cublas"]


@dataclass(frozen=True)
class DownConfig:
    """S = drop(x) A^T."""

    BLOCK_M: int
    BLOCK_K: int
    BLOCK_R: int
    SPLIT_K: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class GemmConfig:
    """The base product with the low-rank product as its last K step."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    BLOCK_R: int
    GROUP_M: int
    USE_TMA: bool
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class UpConfig:
    """y += S B^T, in place."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_R: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class GradUpConfig:
    """dS, dB and dbias in one pass over dY."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_R: int
    SPLIT_M: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class GradDownConfig:
    """dA = dS^T drop(x); also dB^T = S^T dY where dY is read twice."""

    BLOCK_M: int
    BLOCK_K: int
    BLOCK_R: int
    SPLIT_M: int
    num_warps: int
    num_stages: int


def base_product_path(m: int, n: int, k: int, dtype: torch.dtype, hardware: Hardware) -> Path:
    """Whether the base product runs in the fused kernel or in cuBLAS, with the low-rank term added in place after it.

    Args:
        m, n: size of the result. k: length of the reduction.
    """
    if dtype == torch.float32:
        # Triton's float32 product without TF32 uses no tensor core; nothing to win over cuBLAS.
        return "cublas"
    if -(-m // 128) * -(-n // 256) < hardware.sm_count:
        # Less than one tile per multiprocessor: cuBLAS splits K there, this kernel does not.
        return "cublas"
    # Assumption, not measured: the fused kernel stays within 9 % of cuBLAS, which is the break-even at K = 4096;
    # at 8192 it would have to stay within 4.5 %.
    return "fused" if k <= 4096 else "cublas"


def reads_dy_once(r: int) -> bool:
    """Whether one pass over dY makes dS and dB.

    Model: the pass writes and reads 4 r M N / 128 bytes of partial dS beside the 2 M N bytes of dY; at r = 32 these are
    as many bytes as a second read of dY.
    """
    return r <= 32


def down_config(m: int, k: int, r: int, itemsize: int, hardware: Hardware) -> DownConfig:
    """A tile per multiprocessor: rows are halved, then K is split, until there is one (assumption: bandwidth needs all)."""
    block_r = min(128, max(16, next_power_of_2(r)))
    block_m = 64
    while block_m > 16 and -(-m // block_m) < hardware.sm_count:
        block_m //= 2
    block_k = 128 if itemsize == 2 and block_r <= 32 else 64 if itemsize == 2 or block_r <= 32 else 32
    programs = -(-m // block_m) * -(-r // block_r)
    blocks_k = -(-k // block_k)
    split_k = max(1, min(blocks_k // 4, hardware.sm_count // programs))
    return DownConfig(
        BLOCK_M=block_m, BLOCK_K=block_k, BLOCK_R=block_r, SPLIT_K=split_k, num_warps=4, num_stages=3
    )


def gemm_config(r: int, itemsize: int, has_dropout: bool, hardware: Hardware) -> GemmConfig:
    """Tiles by architecture; sizes are those whose ahead-of-time compile shows no spill (tests/codegen)."""
    block_r = min(64, max(16, next_power_of_2(r)))
    if itemsize == 4:
        return GemmConfig(
            BLOCK_M=128, BLOCK_N=64, BLOCK_K=32, BLOCK_R=min(block_r, 32), GROUP_M=8, USE_TMA=False, num_warps=8, num_stages=3
        )
    if hardware.arch >= 90:
        # Under dropout the masked product has an accumulator of its own, so the tile is half as wide.
        block_n = 128 if has_dropout else 256
        return GemmConfig(
            BLOCK_M=128, BLOCK_N=block_n, BLOCK_K=64, BLOCK_R=block_r, GROUP_M=8, USE_TMA=True, num_warps=8, num_stages=3
        )
    return GemmConfig(
        BLOCK_M=128,
        BLOCK_N=64 if has_dropout else 128,
        BLOCK_K=32,
        BLOCK_R=min(block_r, 32),
        GROUP_M=8,
        USE_TMA=False,
        num_warps=8,
        num_stages=4,
    )


def up_config(r: int, itemsize: int) -> UpConfig:
    """Wide rows for whole cache lines; the rank is walked in blocks, so any rank takes the same registers."""
    block_r = min(64 if itemsize == 2 else 32, max(16, next_power_of_2(r)))
    return UpConfig(BLOCK_M=64, BLOCK_N=128, BLOCK_R=block_r, num_warps=8, num_stages=2)


def grad_up_config(m: int, n: int, r: int, itemsize: int, hardware: Hardware) -> GradUpConfig:
    """Rows are split until there is a program per multiprocessor; ``reads_dy_once`` bounds the rank."""
    block_n, block_m = 128, 64 if itemsize == 2 else 32
    return GradUpConfig(
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_R=max(16, next_power_of_2(r)),
        SPLIT_M=_splits(m, block_m, -(-n // block_n), hardware),
        num_warps=8,
        num_stages=3,
    )


def grad_down_config(m: int, k: int, r: int, itemsize: int, hardware: Hardware) -> GradDownConfig:
    """As ``grad_up_config``; ranks beyond 64 take further programs, which re-read x from L2."""
    block_r = min(64, max(16, next_power_of_2(r)))
    block_k, block_m = 128, 64 if itemsize == 2 else 32
    tiles = -(-k // block_k) * -(-r // block_r)
    return GradDownConfig(
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        BLOCK_R=block_r,
        SPLIT_M=_splits(m, block_m, tiles, hardware),
        num_warps=8,
        num_stages=3,
    )


def torch_rows_per_block(width: int, device_type: str) -> int:
    """Rows that the torch backend casts or drops at a time.

    On a CPU a block of float32 values and of the mask's int64 words should stay in a core's L2 cache; on a GPU it should
    be worth its launches and small beside the activations.
    """
    elements = 1 << 17 if device_type == "cpu" else 1 << 24
    return max(1, elements // max(1, width))


def _splits(m: int, block_m: int, tiles: int, hardware: Hardware) -> int:
    return max(1, min(-(-m // block_m), hardware.sm_count // tiles))
