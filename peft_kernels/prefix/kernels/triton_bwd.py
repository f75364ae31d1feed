"""Prefix attention on Triton, backward: four kernels that recompute probabilities from q, the keys and stats.

Equation  p = 2^(z - top) / total; delta = sum dy y; dz = p (dy v'^T - delta); dq = scale dz k'; dk' = scale dz^T q;
          dv' = p^T dy; k' = [prefix_k; k], v' = [prefix_v; v]     (derived in docs/design/prefix.md)
Tensors   as triton_fwd.py; dy any strides but a contiguous last dimension; stats, delta float32, contiguous;
          gradients contiguous; partial dprefix (splits, 1 or B, H_kv, P, D) float32
Tiles     delta: BLOCK_M queries | grad_q: as the forward kernel | grad_kv: BLOCK_N keys of one key head, over all rows
          of its group | grad_prefix: likewise BLOCK_N keys of the prefix, and one of several ranges of the rows of all
          batch rows that share them; ranges are then summed in a fixed order, so two runs give the same bits
Bound     14 B H S (P + L) D flops (7 products, forward has 2), half of the sequence's if causal
Refused   as triton_fwd.py
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_kernels._core.launch import Launcher
from peft_kernels._core.triton_math import dot
from peft_kernels._core.triton_tools import cdiv, dot_precision, shape_of_partials, sum_partials
from peft_kernels.prefix.kernels.attention import Attention, Segment
from peft_kernels.prefix.kernels.config import DeltaConfig, GradKVConfig, GradPrefixConfig, GradQConfig
from peft_kernels.prefix.kernels.triton_rows import (
    attended,
    key_ranges,
    load_queries,
    load_rows,
    row_index,
    store_rows,
)


class Rows(NamedTuple):
    """What the backward pass knows of each query: q and dy (B, H, S, D), stats (2, B, H, S) and delta (B, H, S)."""

    q: Tensor
    dy: Tensor
    stats: Tensor
    delta: Tensor


@triton.jit(do_not_specialize=("S",))
def delta_kernel(
    # pointers
    y_ptr, dy_ptr, delta_ptr,
    # free
    S,
    # specialized
    H, stride_yb, stride_yh, stride_ys, stride_dyb, stride_dyh, stride_dys,
    # constexprs
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    blocks_m = tl.cdiv(S, BLOCK_M)
    pid_m, pid_bh = tl.program_id(0) % blocks_m, tl.program_id(0) // blocks_m
    b, h = (pid_bh // H).to(tl.int64), (pid_bh % H).to(tl.int64)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    y = load_rows(y_ptr + b * stride_yb + h * stride_yh, offs_m, stride_ys, S, True, D, BLOCK_D)
    dy = load_rows(dy_ptr + b * stride_dyb + h * stride_dyh, offs_m, stride_dys, S, True, D, BLOCK_D)
    delta = tl.sum(y.to(tl.float32) * dy.to(tl.float32), axis=1)
    tl.store(delta_ptr + (b * H + h) * S + offs_m, delta, mask=offs_m < S)


@triton.jit
def grad_q_over(
    q, dy, top, share, delta, dq,
    k_ptr, v_ptr, stride_kn, stride_vn, valid_ptr, stride_valid, offs_m, first, last, size, shift, scale_log2,
    CAUSAL: tl.constexpr, PADDED: tl.constexpr, BOUNDED: tl.constexpr, PRECISION: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq + dz k over the keys [first, last) of a segment of ``size`` keys."""
    for n in range(first, last, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, offs_n, stride_kn, size, BOUNDED, D, BLOCK_D)
        v = load_rows(v_ptr, offs_n, stride_vn, size, BOUNDED, D, BLOCK_D)
        z = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        p = tl.exp2(z - top[:, None]) * share[:, None]
        if CAUSAL or PADDED or BOUNDED:
            keep = attended(
                valid_ptr, stride_valid, offs_m, offs_n, size, shift, CAUSAL, PADDED, BOUNDED, GROUP
            )  # fmt: skip
            p = tl.where(keep, p, 0.0)
        dp = tl.dot(dy, tl.trans(v), input_precision=PRECISION)
        dz = p * (dp - delta[:, None])
        dq = tl.dot(dz.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=("L", "shift", "stride_validb"))
def grad_q_kernel(
    # pointers
    q_ptr, k_ptr, v_ptr, prefix_k_ptr, prefix_v_ptr, valid_ptr, dy_ptr, top_ptr, total_ptr, delta_ptr, dq_ptr,
    # free
    L, shift, scale, scale_log2,
    # specialized, but for the mask's rows, which begin anywhere
    H_KV, S, P,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl,
    stride_pkb, stride_pkh, stride_pkp, stride_pvb, stride_pvh, stride_pvp, stride_validb: tl.int64, stride_validl,
    stride_dyb, stride_dyh, stride_dys,
    # constexprs
    CAUSAL: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    rows = GROUP * S
    blocks_m = tl.cdiv(rows, BLOCK_M)
    pid_m, pid_bh = tl.program_id(0) % blocks_m, tl.program_id(0) // blocks_m
    if CAUSAL:
        pid_m = blocks_m - 1 - pid_m
    b, h = (pid_bh // H_KV).to(tl.int64), (pid_bh % H_KV).to(tl.int64)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < rows
    q_group = q_ptr + b * stride_qb + h * GROUP * stride_qh
    dy_group = dy_ptr + b * stride_dyb + h * GROUP * stride_dyh
    q = load_queries(q_group, offs_m, stride_qh, stride_qs, rows, GROUP, D, BLOCK_D)
    dy = load_queries(dy_group, offs_m, stride_dyh, stride_dys, rows, GROUP, D, BLOCK_D)
    head_rows = (b * H_KV + h) * rows
    index = row_index(offs_m, S, GROUP)
    # +inf, here and for queries that may attend to nothing, makes every probability of the row zero.
    top = tl.load(top_ptr + head_rows + index, mask=mask_m, other=float("inf"))
    share = 1.0 / tl.load(total_ptr + head_rows + index, mask=mask_m, other=1.0)
    delta = tl.load(delta_ptr + head_rows + index, mask=mask_m, other=0.0)

    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dq = grad_q_over(
        q, dy, top, share, delta, dq,
        prefix_k_ptr + b * stride_pkb + h * stride_pkh, prefix_v_ptr + b * stride_pvb + h * stride_pvh,
        stride_pkp, stride_pvp, valid_ptr, 0, offs_m, 0, P, P, 0, scale_log2,
        False, False, True, PRECISION, GROUP, D, BLOCK_D, BLOCK_P,
    )  # fmt: skip
    whole, visible = key_ranges(pid_m, rows, L, shift, CAUSAL, GROUP, BLOCK_M, BLOCK_N)
    k_head, v_head = k_ptr + b * stride_kb + h * stride_kh, v_ptr + b * stride_vb + h * stride_vh
    valid_row = valid_ptr
    if PADDED:
        valid_row = valid_ptr + b * stride_validb
    dq = grad_q_over(
        q, dy, top, share, delta, dq, k_head, v_head, stride_kl, stride_vl,
        valid_row, stride_validl, offs_m, 0, whole, L, shift, scale_log2,
        False, PADDED, False, PRECISION, GROUP, D, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    dq = grad_q_over(
        q, dy, top, share, delta, dq, k_head, v_head, stride_kl, stride_vl,
        valid_row, stride_validl, offs_m, whole, visible, L, shift, scale_log2,
        CAUSAL, PADDED, True, PRECISION, GROUP, D, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    dq = (dq * scale).to(dq_ptr.dtype.element_ty)
    store_rows(dq_ptr + head_rows * D, index, dq, mask_m, D, BLOCK_D)


@triton.jit
def _add_block(
    k, v, dk, dv, q_ptr, dy_ptr, top_ptr, total_ptr, delta_ptr, block, offs_n, S, shift, scale_log2,
    stride_qh, stride_qs, stride_dyh, stride_dys,
    CAUSAL: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """dk + dz^T q and dv + p^T dy of one block of a group's rows; pointers are at query 0 of the group's head 0.

    Keys past the end and padded ones get numbers that are never stored: no row of the sums reads another.
    """
    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = GROUP * S
    mask_m = offs_m < rows
    q = load_queries(q_ptr, offs_m, stride_qh, stride_qs, rows, GROUP, D, BLOCK_D)
    dy = load_queries(dy_ptr, offs_m, stride_dyh, stride_dys, rows, GROUP, D, BLOCK_D)
    index = row_index(offs_m, S, GROUP)
    top = tl.load(top_ptr + index, mask=mask_m, other=float("inf"))
    share = 1.0 / tl.load(total_ptr + index, mask=mask_m, other=1.0)
    delta = tl.load(delta_ptr + index, mask=mask_m, other=0.0)
    z_t = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2
    p_t = tl.exp2(z_t - top[None, :]) * share[None, :]
    if CAUSAL:
        p_t = tl.where(offs_n[:, None] <= (offs_m // GROUP + shift)[None, :], p_t, 0.0)
    dv = dot(p_t, dy, dv, EXACT, PRECISION)
    dp_t = tl.dot(v, tl.trans(dy), input_precision=PRECISION)
    dz_t = p_t * (dp_t - delta[None, :])
    dk = dot(dz_t, q, dk, EXACT, PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=("L", "shift", "stride_validb"))
def grad_kv_kernel(
    # pointers
    q_ptr, k_ptr, v_ptr, valid_ptr, dy_ptr, top_ptr, total_ptr, delta_ptr, dk_ptr, dv_ptr,
    # free
    L, shift, scale, scale_log2,
    # specialized, but for the mask's rows, which begin anywhere
    H_KV, S,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl,
    stride_validb: tl.int64, stride_validl, stride_dyb, stride_dyh, stride_dys,
    # constexprs
    CAUSAL: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks_n = tl.cdiv(L, BLOCK_N)
    pid_n, pid_bh = tl.program_id(0) % blocks_n, tl.program_id(0) // blocks_n
    b, h = (pid_bh // H_KV).to(tl.int64), (pid_bh % H_KV).to(tl.int64)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = load_rows(k_ptr + b * stride_kb + h * stride_kh, offs_n, stride_kl, L, True, D, BLOCK_D)
    v = load_rows(v_ptr + b * stride_vb + h * stride_vh, offs_n, stride_vl, L, True, D, BLOCK_D)
    q_group = q_ptr + b * stride_qb + h * GROUP * stride_qh
    dy_group = dy_ptr + b * stride_dyb + h * GROUP * stride_dyh
    head_rows = (b * H_KV + h) * GROUP * S

    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    blocks_m = tl.cdiv(GROUP * S, BLOCK_M)
    begin, whole = 0, 0
    if CAUSAL:
        # Before the first block no query sees these keys; from the second on every query sees all of them.
        begin = min(blocks_m, max(0, pid_n * BLOCK_N - shift) * GROUP // BLOCK_M)
        whole = min(blocks_m, tl.cdiv(max(0, pid_n * BLOCK_N + BLOCK_N - 1 - shift) * GROUP, BLOCK_M))
        if BLOCK_N * BLOCK_D > 64 * 128:
            # A loop without the mask besides is more than the registers hold.
            whole = blocks_m
        for block in range(begin, whole):
            dk, dv = _add_block(
                k, v, dk, dv, q_group, dy_group, top_ptr + head_rows, total_ptr + head_rows, delta_ptr + head_rows,
                block, offs_n, S, shift, scale_log2, stride_qh, stride_qs, stride_dyh, stride_dys,
                True, False, PRECISION, GROUP, D, BLOCK_D, BLOCK_M,
            )  # fmt: skip
    for block in range(whole, blocks_m):
        dk, dv = _add_block(
            k, v, dk, dv, q_group, dy_group, top_ptr + head_rows, total_ptr + head_rows, delta_ptr + head_rows,
            block, offs_n, S, shift, scale_log2, stride_qh, stride_qs, stride_dyh, stride_dys,
            False, False, PRECISION, GROUP, D, BLOCK_D, BLOCK_M,
        )  # fmt: skip

    if PADDED:
        valid = tl.load(valid_ptr + b * stride_validb + offs_n.to(tl.int64) * stride_validl, mask=offs_n < L, other=0)
        # Selected, not multiplied: a padded key's probabilities may have overflowed.
        dk, dv = tl.where((valid != 0)[:, None], dk, 0.0), tl.where((valid != 0)[:, None], dv, 0.0)
    start = (b * H_KV + h) * L * D
    store_rows(dk_ptr + start, offs_n, (dk * scale).to(dk_ptr.dtype.element_ty), offs_n < L, D, BLOCK_D)
    store_rows(dv_ptr + start, offs_n, dv.to(dv_ptr.dtype.element_ty), offs_n < L, D, BLOCK_D)


@triton.jit(do_not_specialize=("span",))
def grad_prefix_kernel(
    # pointers
    q_ptr, prefix_k_ptr, prefix_v_ptr, dy_ptr, top_ptr, total_ptr, delta_ptr, dk_ptr, dv_ptr,
    # free
    span, scale, scale_log2,
    # specialized
    H_KV, S, P, OWNERS, BATCHES,
    stride_qb, stride_qh, stride_qs, stride_pkb, stride_pkh, stride_pkp, stride_pvb, stride_pvh, stride_pvp,
    stride_dyb, stride_dyh, stride_dys,
    # constexprs
    EXACT: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks_n = tl.cdiv(P, BLOCK_N)
    pid_n, rest = tl.program_id(0) % blocks_n, tl.program_id(0) // blocks_n
    h, rest = (rest % H_KV).to(tl.int64), rest // H_KV
    # A prefix of its own for each batch row has OWNERS = B and BATCHES = 1; a shared one the reverse.
    owner, split = (rest % OWNERS).to(tl.int64), (rest // OWNERS).to(tl.int64)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k_head = prefix_k_ptr + owner * stride_pkb + h * stride_pkh
    v_head = prefix_v_ptr + owner * stride_pvb + h * stride_pvh
    k = load_rows(k_head, offs_n, stride_pkp, P, True, D, BLOCK_D)
    v = load_rows(v_head, offs_n, stride_pvp, P, True, D, BLOCK_D)

    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    blocks_m = tl.cdiv(GROUP * S, BLOCK_M)
    first = split.to(tl.int32) * span
    for item in range(first, min(first + span, BATCHES * blocks_m)):
        b = owner + item // blocks_m
        head_rows = (b * H_KV + h) * GROUP * S
        dk, dv = _add_block(
            k, v, dk, dv, q_ptr + b * stride_qb + h * GROUP * stride_qh,
            dy_ptr + b * stride_dyb + h * GROUP * stride_dyh,
            top_ptr + head_rows, total_ptr + head_rows, delta_ptr + head_rows,
            item % blocks_m, offs_n, S, 0, scale_log2, stride_qh, stride_qs, stride_dyh, stride_dys,
            False, EXACT, PRECISION, GROUP, D, BLOCK_D, BLOCK_M,
        )  # fmt: skip

    start = ((split * OWNERS + owner) * H_KV + h) * P * D
    store_rows(dk_ptr + start, offs_n, dk * scale, offs_n < P, D, BLOCK_D)
    store_rows(dv_ptr + start, offs_n, dv, offs_n < P, D, BLOCK_D)


_launch_delta = Launcher(delta_kernel, flags=("D",))
_launch_grad_q = Launcher(grad_q_kernel, flags=("CAUSAL", "PADDED", "PRECISION", "GROUP", "D"))
_launch_grad_kv = Launcher(grad_kv_kernel, flags=("CAUSAL", "PADDED", "PRECISION", "GROUP", "D"))
_launch_grad_prefix = Launcher(grad_prefix_kernel, flags=("EXACT", "PRECISION", "GROUP", "D"))


def delta(y: Tensor, dy: Tensor, config: DeltaConfig) -> Tensor:
    """Launch delta = sum over D of dy * y and return it, (B, H, S) float32."""
    b, h, s, d = y.shape
    out = torch.empty(b, h, s, dtype=torch.float32, device=y.device)

    programs = cdiv(s, config.BLOCK_M) * b * h
    _launch_delta((programs, 1, 1), (y, dy, out), (s,), (h, *y.stride()[:3], *dy.stride()[:3]), (d,), config)
    return out


def grad_q(attention: Attention, rows: Rows, prefix: Segment, sequence: Segment, config: GradQConfig) -> Tensor:
    """Launch dq and return it, (B, H, S, D) in q's dtype."""
    q = rows.q
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    valid, valid_strides = sequence.mask_bytes()

    h_kv, s, length, p = attention.h_kv, attention.s, attention.l, attention.p
    _launch_grad_q(
        (cdiv(attention.group * s, config.BLOCK_M) * attention.b * h_kv, 1, 1),
        (q, sequence.k, sequence.v, prefix.k, prefix.v, valid, rows.dy, *rows.stats, rows.delta, dq),
        (length, attention.shift, float(attention.scale), attention.scale_log2),
        (h_kv, s, p, *q.stride()[:3], *sequence.strides(), *prefix.strides(), *valid_strides, *rows.dy.stride()[:3]),
        (attention.causal, valid is not None, dot_precision(q.dtype), attention.group, attention.d),
        config,
    )
    return dq


def grad_kv(attention: Attention, rows: Rows, sequence: Segment, config: GradKVConfig) -> tuple[Tensor, Tensor]:
    """Launch dk and dv and return them, (B, H_kv, L, D) in q's dtype."""
    q, k, v = rows.q, sequence.k, sequence.v
    dk, dv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    valid, valid_strides = sequence.mask_bytes()

    h_kv, length = attention.h_kv, attention.l
    _launch_grad_kv(
        (cdiv(length, config.BLOCK_N) * attention.b * h_kv, 1, 1),
        (q, k, v, valid, rows.dy, *rows.stats, rows.delta, dk, dv),
        (length, attention.shift, float(attention.scale), attention.scale_log2),
        (h_kv, attention.s, *q.stride()[:3], *sequence.strides(), *valid_strides, *rows.dy.stride()[:3]),
        (attention.causal, valid is not None, dot_precision(q.dtype), attention.group, attention.d),
        config,
    )
    return dk, dv


def grad_prefix(attention: Attention, rows: Rows, prefix: Segment, config: GradPrefixConfig) -> tuple[Tensor, Tensor]:
    """Launch dprefix_k and dprefix_v and return them in the prefix's shape, and in ``attention.prefix_dtype``."""
    q, dtype = rows.q, attention.prefix_dtype
    owners, batches = (1, attention.b) if attention.shared else (attention.b, 1)
    size = shape_of_partials(config.splits, *prefix.k.shape)
    dk, dv = (torch.empty(size, dtype=torch.float32, device=q.device) for _ in range(2))

    h_kv, s, p = attention.h_kv, attention.s, attention.p
    span = cdiv(batches * cdiv(attention.group * s, config.BLOCK_M), config.splits)
    _launch_grad_prefix(
        (cdiv(p, config.BLOCK_N) * h_kv * owners * config.splits, 1, 1),
        (q, prefix.k, prefix.v, rows.dy, *rows.stats, rows.delta, dk, dv),
        (span, float(attention.scale), attention.scale_log2),
        (h_kv, s, p, owners, batches, *q.stride()[:3], *prefix.strides(), *rows.dy.stride()[:3]),
        (dtype != q.dtype, dot_precision(q.dtype), attention.group, attention.d),
        config,
    )
    return sum_partials(dk, config.splits).to(dtype), sum_partials(dv, config.splits).to(dtype)
