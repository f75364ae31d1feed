"""Block sizes of the decoder, all of them assumed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DecodeConfig:
    """W.

    Attributes:
        BLOCK_BYTES: of codes that a program reads.
        enable_fp_fusion: False, because a fused multiply-add leaves out a rounding that the format has.
    """

    BLOCK_BYTES: int
    num_warps: int
    enable_fp_fusion: bool = False


def decode_config() -> DecodeConfig:
    """16 bytes of codes a thread, which one load reads, and 32 elements."""
    return DecodeConfig(BLOCK_BYTES=2048, num_warps=4)
