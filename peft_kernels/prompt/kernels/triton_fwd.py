"""Prompt tuning on Triton, forward: one write of prompts and tokens, without repeating either.

Equation  y[n B + b] = [prompts[n]; tokens[b]]                                (Lester et al. 2021, arXiv:2104.08691)
Tensors   prompts (N, P, D), tokens (B, L, D): any strides; y (N B, P + L, D): contiguous, in the tokens' dtype
Tiles     a program owns BLOCK_T positions of one row of y and walks D in blocks of BLOCK_D
Bound     one write of y; prompts and tokens are re-read from L2 for each row that they stand in
Refused   float64; 2^31 positions in all rows, or dimensions (offsets are 64-bit, indices are not)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_kernels._core.launch import Launcher
from peft_kernels._core.triton_tools import cdiv
from peft_kernels.prompt.kernels.config import ConcatenateConfig


@triton.jit(do_not_specialize=("B",))
def concatenate_kernel(
    # pointers
    prompts_ptr, tokens_ptr, y_ptr,
    # free
    B,
    # specialized
    P, T, D, stride_pn, stride_pp, stride_pd, stride_tb, stride_tl, stride_td,
    # constexprs
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    blocks_t = tl.cdiv(T, BLOCK_T)
    pid_t, row = tl.program_id(0) % blocks_t, tl.program_id(0) // blocks_t
    offs_t = pid_t * BLOCK_T + tl.arange(0, BLOCK_T)
    is_prompt, is_token = offs_t < P, (offs_t >= P) & (offs_t < T)
    prompt = prompts_ptr + (row // B).to(tl.int64) * stride_pn + offs_t.to(tl.int64) * stride_pp
    token = tokens_ptr + (row % B).to(tl.int64) * stride_tb + (offs_t - P).to(tl.int64) * stride_tl
    out = y_ptr + (row.to(tl.int64) * T + offs_t) * D
    for d in range(0, D, BLOCK_D):
        offs_d = (d + tl.arange(0, BLOCK_D)).to(tl.int64)
        mask_d = (offs_d < D)[None, :]
        from_prompt = tl.load(
            prompt[:, None] + offs_d[None, :] * stride_pd, mask=is_prompt[:, None] & mask_d, other=0.0
        ).to(y_ptr.dtype.element_ty)
        from_token = tl.load(token[:, None] + offs_d[None, :] * stride_td, mask=is_token[:, None] & mask_d, other=0.0)
        value = tl.where(is_prompt[:, None], from_prompt, from_token)
        tl.store(out[:, None] + offs_d[None, :], value, mask=(offs_t < T)[:, None] & mask_d)


_launch_concatenate = Launcher(concatenate_kernel, flags=())


def concatenate(prompts: Tensor, tokens: Tensor, config: ConcatenateConfig) -> Tensor:
    """Launch y and return it, (N B, P + L, D) in the tokens' dtype."""
    (n, p, d), (b, length, _) = prompts.shape, tokens.shape
    rows, positions = n * b, p + length
    y = torch.empty(rows, positions, d, dtype=tokens.dtype, device=tokens.device)

    _launch_concatenate(
        (cdiv(positions, config.BLOCK_T) * rows, 1, 1),
        (prompts, tokens, y),
        (b,),
        (p, positions, d, *prompts.stride(), *tokens.stride()),
        (),
        config,
    )
    return y
