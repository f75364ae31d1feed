"""Prompt tuning on Triton, backward: sums of a part of dy over the batch or over the prompts, in a fixed order.

Equation  dprompts[n] = sum over b of dy[n B + b, :P];  dtokens[b] = sum over n of dy[n B + b, P:]
Tensors   dy (N B, P + L, D): any strides; gradients contiguous
Tiles     a program owns BLOCK_T positions and BLOCK_D dimensions of one prompt, or row of tokens, and walks the others;
          it alone writes its tile, and adds in order, so two runs give the same bits
Bound     one read of the part of dy
Refused   as triton_fwd.py
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_kernels._core.launch import Launcher
from peft_kernels._core.triton_tools import cdiv
from peft_kernels.prompt.kernels.config import SumConfig


@triton.jit(do_not_specialize=("TERMS",))
def sum_terms_kernel(
    # pointers
    dy_ptr, out_ptr,
    # free
    TERMS,
    # specialized
    T, D, stride_owner, stride_term, stride_t, stride_d,
    # constexprs
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    blocks_t, blocks_d = tl.cdiv(T, BLOCK_T), tl.cdiv(D, BLOCK_D)
    pid_d, rest = tl.program_id(0) % blocks_d, tl.program_id(0) // blocks_d
    pid_t, owner = rest % blocks_t, (rest // blocks_t).to(tl.int64)
    offs_t = (pid_t * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    offs_d = (pid_d * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    mask = (offs_t < T)[:, None] & (offs_d < D)[None, :]
    tile = dy_ptr + owner * stride_owner + offs_t[:, None] * stride_t + offs_d[None, :] * stride_d
    acc = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    lost = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for _ in range(TERMS):
        # Kahan's sum: a batch of any size is rounded about once, as in torch's tree.
        value = tl.load(tile, mask=mask, other=0.0).to(tl.float32) - lost
        total = acc + value
        lost = (total - acc) - value
        acc = total
        tile += stride_term
    out = out_ptr + (owner * T + offs_t[:, None]) * D + offs_d[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask)


_launch_sum_terms = Launcher(sum_terms_kernel, flags=())


def sum_terms(part: Tensor, dtype: torch.dtype, config: SumConfig) -> Tensor:
    """Launch the sum of a part of dy, (owners, terms, T, D), over its terms and return it, (owners, T, D)."""
    owners, terms, positions, d = part.shape
    out = torch.empty(owners, positions, d, dtype=dtype, device=part.device)
    if out.numel() == 0:
        return out

    programs = cdiv(d, config.BLOCK_D) * cdiv(positions, config.BLOCK_T) * owners
    _launch_sum_terms((programs, 1, 1), (part, out), (terms,), (positions, d, *part.stride()), (), config)
    return out
