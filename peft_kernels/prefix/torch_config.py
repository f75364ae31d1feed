"""What the torch backend runs, and in which sizes: chosen by pure functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from peft_kernels.prefix.problem import PrefixAttentionProblem


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


def torch_config(problem: PrefixAttentionProblem) -> TorchConfig:
    """Choose between torch's fused attention and blocks, for each pass.

    CPU. Forward: in eleven shapes side by side (one thread of an AMD EPYC with AVX-512 BF16; float32 and bf16; the
    machine was shared) ranges took 0.25 to 0.7 of the time of blocks in training and prefill, 0.5 to 1.4 in decoding.
    Backward: fused attention recomputes its forward pass and took 0.7 to 1.5 times as long as blocks in training, more
    with few queries; and where heads are grouped it rounds dk and dv of each head to half precision before it adds
    them, 0.85 eps against 0.2.

    CUDA, an assumption: fused in half precision, where torch documents a flash kernel for up to 256
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
