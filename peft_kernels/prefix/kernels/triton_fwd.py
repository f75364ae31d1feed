"""Prefix attention on Triton, forward: one online softmax over two segments of keys that never are joined.

Equation  z = scale log2(e) q [prefix_k; k]^T, -inf where masked; top = max z; total = sum 2^(z - top);
          y = (2^(z - top) / total) [prefix_v; v]
          (Li & Liang 2021, arXiv:2101.00190; a running top and total, rescaled where the top grows)
Tensors   q (B, H, S, D), k, v (B, H_kv, L, D), prefix (H_kv, P, D) or (B, H_kv, P, D): last dimension contiguous;
          y like q, and stats (2, B, H, S) float32, top and total: contiguous; parts of y and stats
          (B H_kv, splits, H / H_kv S, D or nothing) float32
          With USE_TMA k and v of the sequence come through tensor descriptors, and `tma_can_read` them
Tiles     a program owns BLOCK_M rows of one group of query heads (triton_rows.py) and walks all their keys: the prefix
          in blocks of BLOCK_P, then the sequence in blocks of BLOCK_N, of which causal ones end at the border.
          Where such programs are few, each gets one of several ranges of the sequence, the first with the prefix, and
          a program of `merge` for each row adds its parts up in a fixed order: two runs give the same bits
Bound     4 B H S (P + L) D flops at the tensor cores' rate, half of the sequence's if causal; S = 1: one read of k, v
Refused   D > 256; float64; 2^31 queries or keys in all heads (offsets are 64-bit, indices are not)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_kernels._core.launch import Launcher, descriptor
from peft_kernels._core.triton_tools import blocks_of_range, cdiv, dot_precision
from peft_kernels.prefix.kernels.attention import Attention, Segment
from peft_kernels.prefix.kernels.config import ForwardConfig, MergeConfig
from peft_kernels.prefix.kernels.triton_rows import (
    attended,
    key_ranges,
    load_keys,
    load_queries,
    row_index,
    store_rows,
)


@triton.jit
def attend_to(
    q, acc, total, top,
    keys, values, b, h, stride_kn, stride_vn, valid_ptr, stride_valid, offs_m, first, last, size, shift, scale_log2,
    USE_TMA: tl.constexpr, CAUSAL: tl.constexpr, PADDED: tl.constexpr, BOUNDED: tl.constexpr,
    PRECISION: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Go on with the online softmax over the keys [first, last) of a segment of ``size`` keys (``load_keys``)."""
    for n in range(first, last, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        k = load_keys(keys, b, h, n, stride_kn, size, USE_TMA, BOUNDED, D, BLOCK_D, BLOCK_N)
        z = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        if CAUSAL or PADDED or BOUNDED:
            keep = attended(
                valid_ptr, stride_valid, offs_m, offs_n, size, shift, CAUSAL, PADDED, BOUNDED, GROUP
            )  # fmt: skip
            z = tl.where(keep, z, float("-inf"))
        higher = tl.maximum(top, tl.max(z, axis=1))
        # While a row has seen no key its top is -inf, which must not be subtracted from itself.
        anchor = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(z - anchor[:, None])
        decay = tl.exp2(top - anchor)
        total = total * decay + tl.sum(p, axis=1)
        v = load_keys(values, b, h, n, stride_vn, size, USE_TMA, BOUNDED, D, BLOCK_D, BLOCK_N)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
        top = higher
    return acc, total, top


@triton.jit(do_not_specialize=("L", "shift", "splits", "span", "stride_validb"))
def attention_kernel(
    # pointers; of k and v tensor descriptors where USE_TMA
    q_ptr, k_ptr, v_ptr, prefix_k_ptr, prefix_v_ptr, valid_ptr, y_ptr, top_ptr, total_ptr,
    # free
    L, shift, scale_log2, splits, span,
    # specialized, but for the mask's rows, which begin anywhere
    H_KV, S, P,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl,
    stride_pkb, stride_pkh, stride_pkp, stride_pvb, stride_pvh, stride_pvp, stride_validb: tl.int64, stride_validl,
    # constexprs
    CAUSAL: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, IS_SPLIT: tl.constexpr, USE_TMA: tl.constexpr,
):  # fmt: skip
    rows = GROUP * S
    blocks_m = tl.cdiv(rows, BLOCK_M)
    pid_m, pid_bh = tl.program_id(0) % blocks_m, tl.program_id(0) // blocks_m
    split = 0
    if IS_SPLIT:
        split, pid_bh = pid_bh % splits, pid_bh // splits
    if CAUSAL:
        # The longest rows first: the short ones fill the multiprocessors at the end.
        pid_m = blocks_m - 1 - pid_m
    b, h = (pid_bh // H_KV).to(tl.int64), (pid_bh % H_KV).to(tl.int64)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    q_group = q_ptr + b * stride_qb + h * GROUP * stride_qh
    q = load_queries(q_group, offs_m, stride_qh, stride_qs, rows, GROUP, D, BLOCK_D)

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    prefix_end = P
    if IS_SPLIT:
        prefix_end = tl.where(split == 0, P, 0)
    acc, total, top = attend_to(
        q, acc, total, top,
        prefix_k_ptr + b * stride_pkb + h * stride_pkh, prefix_v_ptr + b * stride_pvb + h * stride_pvh,
        b, h, stride_pkp, stride_pvp, valid_ptr, 0, offs_m, 0, prefix_end, P, 0, scale_log2,
        False, False, False, True, PRECISION, GROUP, D, BLOCK_D, BLOCK_P,
    )  # fmt: skip
    whole, visible = key_ranges(pid_m, rows, L, shift, CAUSAL, GROUP, BLOCK_M, BLOCK_N)
    first = 0
    if IS_SPLIT:
        # span and whole are multiples of BLOCK_N; a range past the visible keys is empty.
        first = split * span
        visible = min(visible, first + span)
        whole = max(first, min(whole, first + span))
    k_head, v_head = k_ptr, v_ptr
    if not USE_TMA:
        k_head, v_head = k_ptr + b * stride_kb + h * stride_kh, v_ptr + b * stride_vb + h * stride_vh
    valid_row = valid_ptr
    if PADDED:
        valid_row = valid_ptr + b * stride_validb
    acc, total, top = attend_to(
        q, acc, total, top, k_head, v_head, b, h, stride_kl, stride_vl,
        valid_row, stride_validl, offs_m, first, whole, L, shift, scale_log2,
        USE_TMA, False, PADDED, False, PRECISION, GROUP, D, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    acc, total, top = attend_to(
        q, acc, total, top, k_head, v_head, b, h, stride_kl, stride_vl,
        valid_row, stride_validl, offs_m, whole, visible, L, shift, scale_log2,
        USE_TMA, CAUSAL, PADDED, True, PRECISION, GROUP, D, BLOCK_D, BLOCK_N,
    )  # fmt: skip

    index = row_index(offs_m, S, GROUP)
    mask_m = offs_m < rows
    if IS_SPLIT:
        part = ((b * H_KV + h) * splits + split) * rows
        tl.store(top_ptr + part + index, top, mask=mask_m)
        tl.store(total_ptr + part + index, total, mask=mask_m)
        store_rows(y_ptr + part * D, index, acc, mask_m, D, BLOCK_D)
    else:
        # So a query that may attend to nothing has probabilities 2^(z - inf) / 1 = 0 in the backward pass.
        empty = total == 0.0
        top, total = tl.where(empty, float("inf"), top), tl.where(empty, 1.0, total)
        head_rows = (b * H_KV + h) * rows
        tl.store(top_ptr + head_rows + index, top, mask=mask_m)
        tl.store(total_ptr + head_rows + index, total, mask=mask_m)
        y = (acc / total[:, None]).to(y_ptr.dtype.element_ty)
        store_rows(y_ptr + head_rows * D, index, y, mask_m, D, BLOCK_D)


@triton.jit(do_not_specialize=("rows", "splits"))
def merge_kernel(
    # pointers
    part_ptr, part_top_ptr, part_total_ptr, y_ptr, top_ptr, total_ptr,
    # free
    rows, splits,
    # constexprs
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    first = pid // rows * splits * rows + pid % rows
    top = float("-inf")
    for start in range(0, splits, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        tops = tl.load(part_top_ptr + first + offs_s * rows, mask=offs_s < splits, other=float("-inf"))
        top = tl.maximum(top, tl.max(tops, axis=0))
    # Ranges whose keys are all masked have a top of -inf; where all have, it must not be subtracted from itself.
    anchor = tl.where(top == float("-inf"), 0.0, top)
    offs_d = tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    total = 0.0
    for start in range(0, splits, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        mask_s = offs_s < splits
        offset = first + offs_s * rows
        share = tl.exp2(tl.load(part_top_ptr + offset, mask=mask_s, other=float("-inf")) - anchor)
        total += tl.sum(share * tl.load(part_total_ptr + offset, mask=mask_s, other=0.0), axis=0)
        parts = tl.load(
            part_ptr + offset[:, None] * D + offs_d[None, :], mask=mask_s[:, None] & (offs_d < D)[None, :], other=0.0
        )
        acc += tl.sum(share[:, None] * parts, axis=0)

    # As in the kernel above.
    empty = total == 0.0
    top, total = tl.where(empty, float("inf"), top), tl.where(empty, 1.0, total)
    tl.store(top_ptr + pid, top)
    tl.store(total_ptr + pid, total)
    tl.store(y_ptr + pid * D + offs_d, (acc / total).to(y_ptr.dtype.element_ty), mask=offs_d < D)


_launch_attention = Launcher(attention_kernel, flags=("CAUSAL", "PADDED", "PRECISION", "GROUP", "D", "IS_SPLIT"))
_launch_merge = Launcher(merge_kernel, flags=("D",))


def attend(
    attention: Attention, q: Tensor, prefix: Segment, sequence: Segment, config: ForwardConfig, merge: MergeConfig
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel, and `merge` where it splits; return y (B, H, S, D) and stats (2, B, H, S) float32."""
    y = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    stats = torch.empty(2, *q.shape[:3], dtype=torch.float32, device=q.device)
    if config.splits == 1:
        _attend(attention, q, prefix, sequence, config, y, stats)
        return y, stats
    groups, rows, splits = attention.b * attention.h_kv, attention.group * attention.s, config.splits
    parts = torch.empty(groups, splits, rows, attention.d, dtype=torch.float32, device=q.device)
    part_stats = torch.empty(2, groups, splits, rows, dtype=torch.float32, device=q.device)

    _attend(attention, q, prefix, sequence, config, parts, part_stats)
    _launch_merge((rows * groups, 1, 1), (parts, *part_stats, y, *stats), (rows, splits), (), (attention.d,), merge)
    return y, stats


def _attend(
    attention: Attention, q: Tensor, prefix: Segment, sequence: Segment, config: ForwardConfig, y: Tensor, stats: Tensor
) -> None:
    """Launch the forward kernel; where it splits, into parts of y and stats."""
    valid, valid_strides = sequence.mask_bytes()
    splits, (h_kv, s, length, p) = config.splits, (attention.h_kv, attention.s, attention.l, attention.p)
    span = blocks_of_range(length, config.BLOCK_N, splits) * config.BLOCK_N

    k, v = sequence.k, sequence.v
    if config.USE_TMA:
        k, v = (descriptor(keys, [1, 1, config.BLOCK_N, config.BLOCK_D]) for keys in (k, v))

    _launch_attention(
        (cdiv(attention.group * s, config.BLOCK_M) * attention.b * h_kv * splits, 1, 1),
        (q, k, v, prefix.k, prefix.v, valid, y, *stats),
        (length, attention.shift, attention.scale_log2, splits, span),
        (h_kv, s, p, *q.stride()[:3], *sequence.strides(), *prefix.strides(), *valid_strides),
        (attention.causal, valid is not None, dot_precision(q.dtype), attention.group, attention.d, splits > 1),
        config,
    )
