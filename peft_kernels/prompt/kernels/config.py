"""Block sizes of the prompt tuning kernels, all of them assumed."""

from __future__ import annotations

from dataclasses import dataclass

from peft_kernels._core.triton_tools import next_power_of_2


@dataclass(frozen=True)
class ConcatenateConfig:
    """y."""

    BLOCK_T: int
    BLOCK_D: int
    num_warps: int


@dataclass(frozen=True)
class SumConfig:
    """A gradient."""

    BLOCK_T: int
    BLOCK_D: int
    num_warps: int


def concatenate_config(d: int) -> ConcatenateConfig:
    """Tiles of 4096 elements, 32 a thread: enough loads in flight to hide a memory access (assumed)."""
    block_d = _block_d(d)
    return ConcatenateConfig(BLOCK_T=max(1, 4096 // block_d), BLOCK_D=block_d, num_warps=4)


def sum_config(d: int) -> SumConfig:
    """Tiles of 1024 elements: a prompt is small, and its sum over the batch is the program's own."""
    block_d = min(512, _block_d(d))
    return SumConfig(BLOCK_T=max(1, 1024 // block_d), BLOCK_D=block_d, num_warps=4)


def _block_d(d: int) -> int:
    return min(1024, max(16, next_power_of_2(d)))
