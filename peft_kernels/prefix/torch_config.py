"""What the torch backend runs, and in which sizes: chosen by pure functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from peft_kernels._core.torch_products import is_slow
from peft_kernels.prefix.problem import PrefixAttentionProblem


@dataclass(frozen=True)
class TorchConfig:
    """What each pass of the torch backend is made of.

    "blocks": products and a softmax of its own (torch_blocks.py). "fused": one call of torch's fused attention
    (torch_fused.py); "ranges": one for each range of queries (torch_ranges.py).

    Attributes:
        products: dtype of the products of a forward pass in ranges; a backward pass's are wide.
    """

    forward: Literal["blocks", "ranges", "fused"]
    backward: Literal["blocks", "ranges", "fused"]
    products: torch.dtype


# What padding adds to a row where there can be no mask: 16 bytes of half precision, so that rows stay aligned.
PADDING_COLUMNS = 8

# A padded key's score is -8 * 2^30 * scale on that path (torch_fused.py): with this scale -2^21.
LEAST_SCALE = 2.0**-12

_RANGE_ROWS = 64
_MASK_ELEMENTS = 1 << 20
_PART_ELEMENTS = 1 << 19


def torch_config(problem: PrefixAttentionProblem) -> TorchConfig:
    """Choose between torch's fused attention and blocks, for each pass.

    CPU: ranges, both passes. A forward pass multiplies in its own dtype, but for float16 where the machine has no
    instructions for it: there float32 took half the time of torch's kernel, conversions included. A backward pass is
    always wide: in half precision that kernel rounds dk and dv after each block of queries, 0.6 to 0.9 eps with 8
    blocks and more where one rounding is 0.2, and took 0.9 to 10 times as long. In float32 it is 1.3 times as wrong as
    torch's math path with scores of variance one, within the budget, and twice with a scale half as large again.

    CUDA, an assumption: fused in half precision, where torch documents a flash kernel for up to 256
    dimensions and grouped heads, and blocks would multiply in float32. In float32 torch's fused kernel takes no grouped
    heads and no mask aligned at the lower right: blocks.
    """
    # Alignment at the lower right is ours only while the first query sees a key of the sequence; and what torch gives
    # to a query without a key is not documented.
    unlike = (problem.causal and problem.s > problem.l) or (problem.padded and problem.p == 0)
    if problem.is_empty or unlike:
        return TorchConfig("blocks", "blocks", problem.wide_dtype)
    if problem.device.type == "cpu":
        own = not is_slow(problem.dtype, problem.device.type)
        # Exact to a few units in float32's last place while scores are small, its exponential is not beyond; and sums
        # of few terms have too little error of their own to hide that.
        halves = problem.dtype.itemsize == problem.prefix_dtype.itemsize == 2
        exact = halves or (problem.d >= 32 and abs(problem.scale) <= 1.25 * problem.d**-0.5)
        backward: Literal["blocks", "ranges"] = "ranges" if exact else "blocks"
        return TorchConfig("ranges", backward, problem.dtype if own else problem.wide_dtype)
    columns = problem.d + (PADDING_COLUMNS if problem.padded else 0)
    takes_flash = problem.device.type == "cuda" and problem.dtype.itemsize == 2 and columns <= 256
    # Below this scale padding would show; and kernels that multiply by it after the mask make a negative one nan, as
    # torch's CPU kernel does with is_causal (2.13).
    if takes_flash and problem.scale >= LEAST_SCALE:
        return TorchConfig("fused", "fused", problem.dtype)
    return TorchConfig("blocks", "blocks", problem.wide_dtype)


def torch_range_rows(problem: PrefixAttentionProblem) -> int:
    """Queries of a range.

    A range ends at its last query's last key, so that more of them skip more of a causal square, and cost more calls
    and sums of dk and dv. Of 32 to 256 queries 64 were fastest, or within a twentieth of it, in seven shapes.
    """
    keys = problem.p + problem.l
    if not problem.causal:
        return problem.s
    # Where most keys are before all queries there is little to skip.
    rows = problem.s if 4 * problem.s < keys else _RANGE_ROWS
    return max(1, min(problem.s, rows, _MASK_ELEMENTS // max(1, keys)))


def torch_part(problem: PrefixAttentionProblem, dtype: torch.dtype, threads: int) -> tuple[int, int]:
    """Batch rows and key heads whose tensors are cast to ``dtype`` together; all of them where nothing is.

    What is cast stays in the caches of those who read it, and no cast copy is as large as an activation. With four
    times as much at once a step in bfloat16 took 0.95 to 0.98 of the time, and two to three times the memory of PEFT's
    (S = 512, one core of an AMD EPYC). Only whole batch rows are taken together, and at least a head for each thread.
    """
    if dtype == problem.dtype:
        return problem.b, problem.h_kv
    head = (2 * problem.group * problem.s + 2 * (problem.p + problem.l)) * problem.d
    heads = max(threads, _PART_ELEMENTS * threads // max(1, head))
    return max(1, min(problem.b, heads // problem.h_kv)), min(heads, problem.h_kv)


def torch_block(problem: PrefixAttentionProblem) -> tuple[int, int, int]:
    """Batch rows, key heads and queries of a block of scores.

    On a CPU blocks of 2^18 float32 scores were fastest or within a tenth of it over five shapes (one core of a Xeon
    with 2 MiB of L2, sizes 2^16 to 2^22); on a GPU a block should be worth its launches and small beside the
    activations. Only whole batch rows are taken together.
    """
    elements = 1 << 18 if problem.device.type == "cpu" else 1 << 26
    row = problem.group * max(1, problem.p + problem.l)
    rows = max(1, min(problem.s, elements // row))
    heads = max(1, min(problem.h_kv, elements // (row * rows)))
    whole = heads == problem.h_kv and rows >= problem.s
    return max(1, min(problem.b, elements // (row * rows * heads))) if whole else 1, heads, rows
