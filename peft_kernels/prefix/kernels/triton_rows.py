"""How kernels address queries and keys. The query heads of a group are walked as one matrix of GROUP * S rows.

Row m is query m // GROUP of head m % GROUP of the group, so that a block of rows holds neighbouring queries, the
causal border runs through few of its key blocks, and a tile of keys that is loaded once serves every head of the group.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_rows(ptr, offs, stride, size, BOUNDED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows (len(offs), BLOCK_D) of a matrix with contiguous rows of D; zero from row ``size`` and column D on."""
    offs_d = tl.arange(0, BLOCK_D)
    tile = ptr + offs.to(tl.int64)[:, None] * stride + offs_d[None, :]
    if BOUNDED and D < BLOCK_D:
        return tl.load(tile, mask=(offs < size)[:, None] & (offs_d < D)[None, :], other=0.0)
    elif BOUNDED:
        return tl.load(tile, mask=(offs < size)[:, None], other=0.0)
    elif D < BLOCK_D:
        return tl.load(tile, mask=(offs_d < D)[None, :], other=0.0)
    else:
        return tl.load(tile)


@triton.jit
def load_keys(
    keys, b, h, n, stride, size,
    USE_TMA: tl.constexpr, BOUNDED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_N rows from row n on: by ``load_rows`` from a head's pointer, or by TMA, which puts the same zeros.

    ``keys`` is then a descriptor of (batch rows, heads, size, D), in blocks of (1, 1, BLOCK_N, BLOCK_D).
    """
    if USE_TMA:
        return keys.load([b.to(tl.int32), h.to(tl.int32), n, 0]).reshape(BLOCK_N, BLOCK_D)
    else:
        return load_rows(keys, n + tl.arange(0, BLOCK_N), stride, size, BOUNDED, D, BLOCK_D)


@triton.jit
def load_queries(
    ptr, offs_m, stride_h, stride_s, rows, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Rows (len(offs_m), BLOCK_D) of a group, zero from row ``rows`` on; ``ptr`` is at its head 0, query 0."""
    offs_d = tl.arange(0, BLOCK_D)
    starts = (offs_m % GROUP).to(tl.int64) * stride_h + (offs_m // GROUP).to(tl.int64) * stride_s
    mask = (offs_m < rows)[:, None]
    if D < BLOCK_D:
        mask = mask & (offs_d < D)[None, :]
    return tl.load(ptr + starts[:, None] + offs_d[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(ptr, offs, value, mask, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of a contiguous matrix of D columns, where ``mask`` has the row."""
    offs_d = tl.arange(0, BLOCK_D)
    bounds = mask[:, None]
    if D < BLOCK_D:
        bounds = bounds & (offs_d < D)[None, :]
    tl.store(ptr + offs.to(tl.int64)[:, None] * D + offs_d[None, :], value, mask=bounds)


@triton.jit
def store_queries(
    ptr, offs_m, value, stride_h, stride_s, rows, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """What ``load_queries`` loads, stored where it lies."""
    offs_d = tl.arange(0, BLOCK_D)
    starts = (offs_m % GROUP).to(tl.int64) * stride_h + (offs_m // GROUP).to(tl.int64) * stride_s
    mask = (offs_m < rows)[:, None]
    if D < BLOCK_D:
        mask = mask & (offs_d < D)[None, :]
    tl.store(ptr + starts[:, None] + offs_d[None, :], value, mask=mask)


@triton.jit
def row_index(offs_m, S, GROUP: tl.constexpr):
    """Index of a group's row in a contiguous (GROUP, S)."""
    return (offs_m % GROUP) * S + offs_m // GROUP


@triton.jit
def key_ranges(
    pid_m, rows, L, shift, CAUSAL: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Keys below the first number fill blocks without a causal mask; none from the second on are visible."""
    whole, visible = L, L
    if CAUSAL:
        first_query = (pid_m * BLOCK_M) // GROUP
        last_query = (min(pid_m * BLOCK_M + BLOCK_M, rows) - 1) // GROUP
        whole = max(0, min(L, first_query + 1 + shift))
        visible = max(0, min(L, last_query + 1 + shift))
    return whole // BLOCK_N * BLOCK_N, visible


@triton.jit
def attended(
    valid_ptr, stride_valid, offs_m, offs_n, size, shift,
    CAUSAL: tl.constexpr, PADDED: tl.constexpr, BOUNDED: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """(1 or rows, keys): which rows may attend to which keys; call it only where one of the three flags is set."""
    keep = (offs_n >= 0)[None, :]
    if BOUNDED:
        keep = keep & (offs_n < size)[None, :]
    if PADDED:
        valid = tl.load(valid_ptr + offs_n.to(tl.int64) * stride_valid, mask=offs_n < size, other=0)
        keep = keep & (valid != 0)[None, :]
    if CAUSAL:
        keep = keep & (offs_n[None, :] <= (offs_m // GROUP + shift)[:, None])
    return keep
