"""Prefix attention in two pieces on Triton: the prefix's part, added to what another operator made of the sequence.

Equation  forward: the online softmax of triton_fwd.py goes on from top = log2(e) lse, total = 1, acc = y, those of the
          sequence alone; y = acc / total, lse2 = top + log2(total), in units of log2
          backward: dq += scale dz prefix_k, with p = 2^(z - lse2), dz = p (dy prefix_v^T - delta): dq is there for the
          sequence's keys, made from the merged y and lse (docs/design/prefix.md)
Tensors   as triton_fwd.py; y and dq any strides but a contiguous last dimension, changed in place; lse (B, H, S)
          float32 contiguous, natural; stats (2, B, H, S) float32: lse2, and the sum over all keys of 2^(z - lse2),
          which differs from 1 by lse2's rounding; triton_bwd.py takes them as top and total
Tiles     as triton_fwd.py's and grad_q's, with the prefix's keys alone
Bound     reads q and y, writes y: 3 B H S D elements; backward q, dy, dq: 4 of them. P D keys and values come from L2
Refused   as triton_fwd.py; rows that see no key of the sequence and have no finite lse
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_kernels._core.launch import Launcher
from peft_kernels._core.triton_tools import cdiv, dot_precision
from peft_kernels.prefix.kernels.attention import Attention, Segment
from peft_kernels.prefix.kernels.config import AddPrefixConfig
from peft_kernels.prefix.kernels.triton_bwd import Rows, grad_q_over
from peft_kernels.prefix.kernels.triton_fwd import attend_to
from peft_kernels.prefix.kernels.triton_rows import load_queries, row_index, store_queries


@triton.jit
def add_prefix_kernel(
    # pointers
    q_ptr, prefix_k_ptr, prefix_v_ptr, lse_ptr, y_ptr, top_ptr, total_ptr,
    # free
    scale_log2,
    # specialized
    H_KV, S, P,
    stride_qb, stride_qh, stride_qs, stride_pkb, stride_pkh, stride_pkp, stride_pvb, stride_pvh, stride_pvp,
    stride_yb, stride_yh, stride_ys,
    # constexprs
    PRECISION: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    LOG2_E: tl.constexpr = 1.4426950408889634
    rows = GROUP * S
    blocks_m = tl.cdiv(rows, BLOCK_M)
    pid_m, pid_bh = tl.program_id(0) % blocks_m, tl.program_id(0) // blocks_m
    b, h = (pid_bh // H_KV).to(tl.int64), (pid_bh % H_KV).to(tl.int64)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < rows
    q_group = q_ptr + b * stride_qb + h * GROUP * stride_qh
    y_group = y_ptr + b * stride_yb + h * GROUP * stride_yh
    q = load_queries(q_group, offs_m, stride_qh, stride_qs, rows, GROUP, D, BLOCK_D)
    y = load_queries(y_group, offs_m, stride_yh, stride_ys, rows, GROUP, D, BLOCK_D)
    head_rows = (b * H_KV + h) * rows
    index = row_index(offs_m, S, GROUP)
    top = tl.load(lse_ptr + head_rows + index, mask=mask_m, other=0.0) * LOG2_E
    total = tl.full((BLOCK_M,), 1.0, tl.float32)

    acc, total, top = attend_to(
        q, y.to(tl.float32), total, top,
        prefix_k_ptr + b * stride_pkb + h * stride_pkh, prefix_v_ptr + b * stride_pvb + h * stride_pvh,
        b, h, stride_pkp, stride_pvp, q_ptr, 0, offs_m, 0, P, P, 0, scale_log2,
        False, False, False, True, PRECISION, GROUP, D, BLOCK_D, BLOCK_P,
    )  # fmt: skip
    lse2 = top + tl.log2(total)
    tl.store(top_ptr + head_rows + index, lse2, mask=mask_m)
    # Nearly 1: what lse2 lost when it was rounded, as a factor.
    tl.store(total_ptr + head_rows + index, total * tl.exp2(top - lse2), mask=mask_m)
    y = (acc / total[:, None]).to(y_ptr.dtype.element_ty)
    store_queries(y_group, offs_m, y, stride_yh, stride_ys, rows, GROUP, D, BLOCK_D)


@triton.jit
def add_prefix_grad_q_kernel(
    # pointers
    q_ptr, prefix_k_ptr, prefix_v_ptr, dy_ptr, top_ptr, total_ptr, delta_ptr, dq_ptr,
    # free
    scale, scale_log2,
    # specialized
    H_KV, S, P,
    stride_qb, stride_qh, stride_qs, stride_pkb, stride_pkh, stride_pkp, stride_pvb, stride_pvh, stride_pvp,
    stride_dyb, stride_dyh, stride_dys, stride_dqb, stride_dqh, stride_dqs,
    # constexprs
    PRECISION: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    rows = GROUP * S
    blocks_m = tl.cdiv(rows, BLOCK_M)
    pid_m, pid_bh = tl.program_id(0) % blocks_m, tl.program_id(0) // blocks_m
    b, h = (pid_bh // H_KV).to(tl.int64), (pid_bh % H_KV).to(tl.int64)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < rows
    q_group = q_ptr + b * stride_qb + h * GROUP * stride_qh
    dy_group = dy_ptr + b * stride_dyb + h * GROUP * stride_dyh
    dq_group = dq_ptr + b * stride_dqb + h * GROUP * stride_dqh
    q = load_queries(q_group, offs_m, stride_qh, stride_qs, rows, GROUP, D, BLOCK_D)
    dy = load_queries(dy_group, offs_m, stride_dyh, stride_dys, rows, GROUP, D, BLOCK_D)
    head_rows = (b * H_KV + h) * rows
    index = row_index(offs_m, S, GROUP)
    top = tl.load(top_ptr + head_rows + index, mask=mask_m, other=float("inf"))
    share = 1.0 / tl.load(total_ptr + head_rows + index, mask=mask_m, other=1.0)
    delta = tl.load(delta_ptr + head_rows + index, mask=mask_m, other=0.0)

    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dq = grad_q_over(
        q, dy, top, share, delta, dq,
        prefix_k_ptr + b * stride_pkb + h * stride_pkh, prefix_v_ptr + b * stride_pvb + h * stride_pvh,
        stride_pkp, stride_pvp, q_ptr, 0, offs_m, 0, P, P, 0, scale_log2,
        False, False, True, PRECISION, GROUP, D, BLOCK_D, BLOCK_P,
    )  # fmt: skip
    given = load_queries(dq_group, offs_m, stride_dqh, stride_dqs, rows, GROUP, D, BLOCK_D)
    dq = (given.to(tl.float32) + dq * scale).to(dq_ptr.dtype.element_ty)
    store_queries(dq_group, offs_m, dq, stride_dqh, stride_dqs, rows, GROUP, D, BLOCK_D)


_FLAGS = ("PRECISION", "GROUP", "D")
_launch_add_prefix = Launcher(add_prefix_kernel, flags=_FLAGS)
_launch_add_prefix_grad_q = Launcher(add_prefix_grad_q_kernel, flags=_FLAGS)


def add_prefix(
    attention: Attention, q: Tensor, prefix: Segment, y: Tensor, lse: Tensor, config: AddPrefixConfig
) -> Tensor:
    """Launch the prefix's part, which changes y in place, and return stats (2, B, H, S) float32."""
    stats = torch.empty(2, *q.shape[:3], dtype=torch.float32, device=q.device)

    h_kv, s, p = attention.h_kv, attention.s, attention.p
    _launch_add_prefix(
        (cdiv(attention.group * s, config.BLOCK_M) * attention.b * h_kv, 1, 1),
        (q, prefix.k, prefix.v, lse, y, *stats),
        (attention.scale_log2,),
        (h_kv, s, p, *q.stride()[:3], *prefix.strides(), *y.stride()[:3]),
        (dot_precision(q.dtype), attention.group, attention.d),
        config,
    )
    return stats


def add_prefix_grad_q(attention: Attention, rows: Rows, prefix: Segment, dq: Tensor, config: AddPrefixConfig) -> None:
    """Launch the prefix's part of dq, which is added in place."""
    q, h_kv, s, p = rows.q, attention.h_kv, attention.s, attention.p
    _launch_add_prefix_grad_q(
        (cdiv(attention.group * s, config.BLOCK_M) * attention.b * h_kv, 1, 1),
        (q, prefix.k, prefix.v, rows.dy, *rows.stats, rows.delta, dq),
        (float(attention.scale), attention.scale_log2),
        (h_kv, s, p, *q.stride()[:3], *prefix.strides(), *rows.dy.stride()[:3], *dq.stride()[:3]),
        (dot_precision(q.dtype), attention.group, attention.d),
        config,
    )
