"""What runs, and in which sizes: frozen values from pure functions of the problem and the hardware.

No branch here has been measured on a GPU. Kernels have the sizes that compile without spills and fit the shared memory
of sm_80, 89, 90 and 100 (tests/codegen); docs/design/prefix.md has the arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from peft_kernels._core.device import Hardware
from peft_kernels._core.triton_tools import next_power_of_2
from peft_kernels.prefix.problem import PrefixAttentionProblem


@dataclass(frozen=True)
class ForwardConfig:
    """y and the softmax's statistics, or SPLIT parts of them."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_P: int
    BLOCK_D: int
    SPLIT: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class MergeConfig:
    """y and the statistics from their parts, of which BLOCK_S are loaded at once."""

    BLOCK_S: int
    BLOCK_D: int
    num_warps: int


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
class GradKeysConfig:
    """dk and dv."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_D: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class GradPrefixConfig:
    """dprefix_k and dprefix_v."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_D: int
    SPLIT: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class TorchConfig:
    """What each pass of the torch backend is made of.

    "blocks": products and a softmax of its own (torch_blocks.py). "fused": one call of torch's fused attention;
    "ranges": one for each range of queries (torch_fused.py).
    """

    forward: Literal["blocks", "ranges", "fused"]
    backward: Literal["blocks", "fused"]


# What padding adds to a row where there can be no mask: 16 bytes of half precision, so that rows stay aligned.
PADDING_COLUMNS = 8

# A padded key's score is -8 * 2^30 * scale on that path (torch_fused.py): with this scale -2^21.
LEAST_SCALE = 2.0**-12


def forward_config(problem: PrefixAttentionProblem, hardware: Hardware) -> ForwardConfig:
    """Blocks by head size; few rows (decoding) take a small block, whose other rows would be masked."""
    block_d = _block_d(problem.d)
    if problem.dtype == torch.float32:
        block_m, block_n = (32, 16) if block_d <= 128 else (16, 16)
    elif block_d > 128:
        block_m, block_n = 64, 32
    elif block_d <= 64 and hardware.arch != 90:
        # 128 rows spill with four warps.
        block_m, block_n = 64, 64
    else:
        # With the padding mask's loads 64 keys spill on sm_80 and 89.
        block_m, block_n = 128, 32 if problem.padded and hardware.arch < 90 else 64
    block_m = _rows_at_most(problem, block_m)
    if hardware.arch < 90 and min(block_m, block_d) <= 32:
        # The assembler keeps these small tiles to 96 or 128 registers, and a few of 64 keys' spill.
        block_n = min(block_n, 32)
    return ForwardConfig(
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_P=_keys_at_most(problem.p, block_n),
        BLOCK_D=block_d,
        SPLIT=_splits(problem, block_m, block_n, hardware.sm_count),
        num_warps=_forward_warps(problem, block_m * block_d),
        num_stages=2,
    )


def _splits(problem: PrefixAttentionProblem, block_m: int, block_n: int, sm_count: int) -> int:
    """Ranges of the sequence where half of the multiprocessors or more would have no program (assumed).

    A range has at least four blocks of keys, so that its part, written and read once as float32, is little beside it.
    """
    tiles = _cdiv(problem.group * problem.s, block_m) * problem.b * problem.h_kv
    return max(1, min(sm_count // tiles, problem.l // (4 * block_n))) if 2 * tiles <= sm_count else 1


def merge_config(problem: PrefixAttentionProblem, splits: int) -> MergeConfig:
    """All parts of a row at once up to 8192 elements, 64 a thread: one wait for memory, not one for each part."""
    block_d = _block_d(problem.d)
    return MergeConfig(BLOCK_S=min(next_power_of_2(splits), max(2, 8192 // block_d)), BLOCK_D=block_d, num_warps=4)


def _forward_warps(problem: PrefixAttentionProblem, elements: int) -> int:
    if problem.dtype == torch.float32:
        return 8 if problem.d <= 128 else 4
    return 8 if elements >= 128 * 128 else 4


def delta_config(problem: PrefixAttentionProblem) -> DeltaConfig:
    """A tile of 4096 elements, 32 a thread."""
    block_d = _block_d(problem.d)
    return DeltaConfig(BLOCK_M=4096 // block_d, BLOCK_D=block_d, num_warps=4, num_stages=1)


def grad_q_config(problem: PrefixAttentionProblem, hardware: Hardware) -> GradQConfig:
    """As the forward kernel, with dy beside q and two products of a block before the third."""
    block_d = _block_d(problem.d)
    if problem.dtype == torch.float32:
        block_m, block_n = (32, 32) if block_d <= 128 else (16, 16)
    elif block_d > 128:
        # With 32 keys it takes 100 KiB where sm_89 has 99.
        block_m, block_n = 64, 16 if hardware.arch == 89 else 32
    else:
        block_m, block_n = 64, 64
    # Four warps hold 64 rows of 128 dimensions in sm_90's registers alone.
    takes_four_warps = problem.dtype != torch.float32 and block_d <= (128 if hardware.arch == 90 else 64)
    return GradQConfig(
        BLOCK_M=_rows_at_most(problem, block_m),
        BLOCK_N=block_n,
        BLOCK_P=_keys_at_most(problem.p, block_n),
        BLOCK_D=block_d,
        num_warps=4 if takes_four_warps else 8,
        num_stages=2,
    )


def grad_kv_config(problem: PrefixAttentionProblem, hardware: Hardware) -> GradKeysConfig:
    """Two accumulators of keys, and two products of a block of rows before the other two."""
    block_d = _block_d(problem.d)
    block_m, block_n = _keys_blocks(problem.dtype, block_d)
    return GradKeysConfig(
        BLOCK_M=_rows_at_most(problem, block_m),
        BLOCK_N=_keys_at_most(problem.l, block_n),
        BLOCK_D=block_d,
        num_warps=8,
        num_stages=2,
    )


def grad_prefix_config(problem: PrefixAttentionProblem, hardware: Hardware) -> GradPrefixConfig:
    """As dk and dv; rows are split until there is a program per multiprocessor (assumed: a prefix has few blocks)."""
    block_d = _block_d(problem.d)
    block_m, block_n = _keys_blocks(problem.dtype, block_d)
    if problem.prefix_dtype != problem.dtype:
        # The pieces of the float32 operands live in registers.
        block_m, block_n = (32, 32) if block_d <= 128 else (16, 32)
    elif problem.dtype == torch.float32 and block_d == 128:
        # 16 rows by 32 keys spill with Triton 3.8, 32 by 32 with 3.6.
        block_m, block_n = 32, 16
    block_m, block_n = _rows_at_most(problem, block_m), _keys_at_most(problem.p, block_n)
    owners, batches = (1, problem.b) if problem.shared else (problem.b, 1)
    tiles = _cdiv(problem.p, block_n) * problem.h_kv * owners
    items = batches * _cdiv(problem.group * problem.s, block_m)
    return GradPrefixConfig(
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        SPLIT=max(1, min(items, hardware.sm_count // max(1, tiles))),
        num_warps=8,
        num_stages=2,
    )


def torch_config(problem: PrefixAttentionProblem) -> TorchConfig:
    """Choose between torch's fused attention and blocks, for each pass.

    CPU. Forward: in eleven shapes side by side (one thread of an AMD EPYC with AVX-512 BF16; float32 and bf16; the
    machine was shared) ranges took 0.25 to 0.7 of the time of blocks in training and prefill, 0.5 to 1.4 in decoding.
    Backward: fused attention recomputes its forward pass and took 0.7 to 1.5 times as long as blocks in training, more
    with few queries; and where heads are grouped it rounds dk and dv of each head to half precision before it adds
    them, 0.85 eps against 0.2.

    CUDA, which no GPU has run yet: fused in half precision, where torch documents a flash kernel for up to 256
    dimensions and grouped heads, and blocks would multiply in float32. In float32 torch's fused kernel takes no grouped
    heads and no mask aligned at the lower right: blocks.
    """
    # Alignment at the lower right is ours only while the first query sees a key of the sequence; and what torch gives
    # to a query without a key is not documented.
    unlike = (problem.causal and problem.s > problem.l) or (problem.padded and problem.p == 0)
    if problem.is_empty or unlike:
        return TorchConfig(forward="blocks", backward="blocks")
    if problem.device.type == "cpu":
        return TorchConfig(forward="ranges", backward="blocks")
    columns = problem.d + (PADDING_COLUMNS if problem.padded else 0)
    takes_flash = problem.device.type == "cuda" and problem.dtype.itemsize == 2 and columns <= 256
    # Below this scale padding would show; and kernels that multiply by it after the mask make a negative one nan, as
    # torch's CPU kernel does with is_causal (2.13).
    if takes_flash and problem.scale >= LEAST_SCALE:
        return TorchConfig(forward="fused", backward="fused")
    return TorchConfig(forward="blocks", backward="blocks")


def torch_mask_rows(keys: int) -> int:
    """Queries of a range: 2^17 elements of its mask.

    2^16 to 2^18 differed by less than the noise in most of eleven shapes; with padding, 2^18 was the slowest.
    """
    return max(1, (1 << 17) // max(1, keys))


def torch_block(batch: int, heads: int, group: int, queries: int, keys: int, device_type: str) -> tuple[int, int, int]:
    """Batch rows, key heads and queries of a block of scores on the torch backend.

    On a CPU blocks of 2^18 float32 scores were fastest or within a tenth of it over five shapes (one core of a Xeon
    with 2 MiB of L2, sizes 2^16 to 2^22); on a GPU a block should be worth its launches and small beside the
    activations. Only whole batch rows are taken together.
    """
    elements = 1 << 18 if device_type == "cpu" else 1 << 26
    row = group * max(1, keys)
    rows = max(1, min(max(1, queries), elements // row))
    together = max(1, min(heads, elements // (row * rows)))
    whole = together == heads and rows >= queries
    return max(1, min(batch, elements // (row * rows * heads))) if whole else 1, together, rows


def _block_d(d: int) -> int:
    """tl.dot takes powers of two of at least 16; columns past D are masked."""
    return max(16, next_power_of_2(d))


def _rows_at_most(problem: PrefixAttentionProblem, block_m: int) -> int:
    return min(block_m, max(16, next_power_of_2(problem.group * problem.s)))


def _keys_at_most(keys: int, block_n: int) -> int:
    """No larger than the keys that there are."""
    return min(block_n, max(16, next_power_of_2(keys)))


def _keys_blocks(dtype: torch.dtype, block_d: int) -> tuple[int, int]:
    """Rows and keys of a block of the kernels that sum over rows."""
    if dtype == torch.float32:
        return (16, 32) if block_d <= 128 else (16, 16)
    return (64, 64) if block_d <= 128 else (32, 32)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
