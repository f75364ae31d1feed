"""Prefix attention with torch alone, exact and by blocks of queries: every problem, mask, dtype and device.

Equation  p = 2^(z - top) / total, z = scale log2(e) q k'^T, top = max z, total = sum 2^(z - top); y = p v'
          dp = dy v'^T; dz = p (dp - sum p dp); dq = scale dz k'; dk' = scale dz^T q; dv' = p^T dy
          with k' = [prefix_k; k], v' = [prefix_v; v]
Tensors   as problem.Inputs; results contiguous
Saved     nothing: a block holds whole rows of z, from which the backward pass has top and total again
Temporary a block of z (torch_block), and keys and values of its heads, in the wide dtype
Refused   nothing
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels.prefix.problem import Gradients, Inputs, Needs, PrefixAttentionProblem
from peft_kernels.prefix.torch_config import torch_block

# 2^x as e^(x ln 2): torch's exp2 takes nine times as long as exp on a CPU (2^18 float32 values, one core of a Xeon).
_LN_2 = math.log(2)


class _Heads(NamedTuple):
    """Some heads of some batch rows: key heads, and the query heads that read them."""

    batch: slice
    keys: slice
    queries: slice


class _Block(NamedTuple):
    """Queries ``rows`` of some heads against the first ``visible`` keys of the sequence."""

    rows: slice
    visible: int


def forward(problem: PrefixAttentionProblem, inputs: Inputs) -> Tensor:
    """Return y (B, H, S, D)."""
    y = _new(problem, inputs.q)
    for heads in _head_blocks(problem):
        keys, values = _joined(problem, inputs, heads)
        for block in _query_blocks(problem):
            weights, total = _weights(problem, inputs, heads, block, keys)
            seen = problem.p + block.visible
            _put(y, heads, block, torch.bmm(weights, values[:, :seen]).div_(total))
    return y


def backward(problem: PrefixAttentionProblem, inputs: Inputs, dy: Tensor, needs: Needs) -> Gradients:
    """Return the gradients that ``needs`` asks for."""
    q, p = inputs.q, problem.p
    dq, dk, dv = (
        _new(problem, like) if need else None for like, need in zip((q, inputs.k, inputs.v), needs[:3], strict=True)
    )
    # Wide sums, over the batch too where the prefix is shared.
    dprefix_k, dprefix_v = (
        torch.zeros(like.shape, dtype=problem.wide_dtype, device=like.device) if need else None
        for like, need in zip((inputs.prefix_k, inputs.prefix_v), needs[3:], strict=True)
    )
    for heads in _head_blocks(problem):
        keys, values = _joined(problem, inputs, heads)
        dkeys = torch.zeros_like(keys) if needs.k or needs.prefix_k else None
        dvalues = torch.zeros_like(values) if needs.v or needs.prefix_v else None
        for block in _query_blocks(problem):
            dq_rows = _grad_block(problem, inputs, heads, block, dy, (keys, values, dkeys, dvalues))
            if dq is not None:
                _put(dq, heads, block, dq_rows)
        for sums, into, prefix in ((dkeys, dk, dprefix_k), (dvalues, dv, dprefix_v)):
            if sums is None:
                continue
            by_row = sums.unflatten(0, (-1, heads.keys.stop - heads.keys.start))
            if into is not None:
                into[heads.batch, heads.keys] = by_row[:, :, p:]
            if prefix is not None and problem.shared:
                prefix[heads.keys] += by_row[:, :, :p].sum(0)
            elif prefix is not None:
                prefix[heads.batch, heads.keys] += by_row[:, :, :p]
    return Gradients(
        q=dq,
        k=dk,
        v=dv,
        prefix_k=None if dprefix_k is None else dprefix_k.to(problem.prefix_dtype),
        prefix_v=None if dprefix_v is None else dprefix_v.to(problem.prefix_dtype),
    )


def _grad_block(
    problem: PrefixAttentionProblem,
    inputs: Inputs,
    heads: _Heads,
    block: _Block,
    dy: Tensor,
    sums: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
) -> Tensor:
    """Add a block's share to dk' and dv', and return its dq."""
    keys, values, dkeys, dvalues = sums
    seen = problem.p + block.visible
    p, total = _weights(problem, inputs, heads, block, keys)
    p.div_(total)
    dy_rows = _taken(problem, dy, heads, block, keys.dtype)
    if dvalues is not None:
        dvalues[:, :seen] += _sum_over_rows(problem, p, dy_rows)
    dz = torch.bmm(dy_rows, values[:, :seen].transpose(1, 2))
    # sum dy y is the same number, but y was rounded to its dtype.
    delta = torch.linalg.vecdot(p, dz).unsqueeze(-1)
    dz.sub_(delta).mul_(p).mul_(problem.scale)
    if dkeys is not None:
        q_rows = _taken(problem, inputs.q, heads, block, keys.dtype)
        dkeys[:, :seen] += _sum_over_rows(problem, dz, q_rows)
    return torch.bmm(dz, keys[:, :seen])


def _sum_over_rows(problem: PrefixAttentionProblem, weights: Tensor, rows: Tensor) -> Tensor:
    """weights^T rows, (key heads, keys, D), head by head of a group.

    One product over all rows of a group has that many more terms in one float32 sum: dv of four heads was 1.2 times as
    wrong as torch's math path in the norm and up to 2.6 times in the largest error; this is 1.0 and 1.2 times.
    """
    weights, rows = (x.unflatten(1, (problem.group, -1)) for x in (weights, rows))
    return torch.matmul(weights.transpose(2, 3), rows).sum(1)


def _weights(
    problem: PrefixAttentionProblem, inputs: Inputs, heads: _Heads, block: _Block, keys: Tensor
) -> tuple[Tensor, Tensor]:
    """2^(z - top) of a block and its sum over keys, which is 1 for a query that may attend to nothing."""
    z = _scores(problem, inputs, heads, block, keys)
    top = z.amax(-1, keepdim=True)
    # A row of -inf alone has no largest value to subtract.
    z.sub_(top.masked_fill_(top == -torch.inf, 0.0)).mul_(_LN_2).exp_()
    total = z.sum(-1, keepdim=True)
    return z, total.masked_fill_(total == 0, 1.0)


def _scores(problem: PrefixAttentionProblem, inputs: Inputs, heads: _Heads, block: _Block, keys: Tensor) -> Tensor:
    """z of a block, (heads, group * rows, P + visible), -inf where nothing may be attended to; for powers of two."""
    p, visible = problem.p, block.visible
    q = _taken(problem, inputs.q, heads, block, keys.dtype)
    z = torch.bmm(q, keys[:, : p + visible].transpose(1, 2)).mul_(problem.scale_log2)
    if problem.causal and block.rows.start + problem.shift + 1 < visible:
        i = torch.arange(block.rows.start, block.rows.stop, device=z.device)
        j = torch.arange(visible, device=z.device)
        hidden = (j > (i + problem.shift)[:, None]).repeat(problem.group, 1)
        z[..., p:].masked_fill_(hidden, -torch.inf)
    if inputs.key_padding_mask is not None:
        padding = ~inputs.key_padding_mask[heads.batch, None, None, :visible]
        z.unflatten(0, (padding.shape[0], -1))[..., p:].masked_fill_(padding, -torch.inf)
    return z


def _new(problem: PrefixAttentionProblem, like: Tensor) -> Tensor:
    """A contiguous result; zeros where no block will write it."""
    return (torch.zeros if problem.is_empty else torch.empty)(like.shape, dtype=like.dtype, device=like.device)


def _head_blocks(problem: PrefixAttentionProblem) -> Iterator[_Heads]:
    if problem.is_empty:
        return
    batch, heads, _ = torch_block(problem)
    for row in range(0, problem.b, batch):
        for first in range(0, problem.h_kv, heads):
            last = min(first + heads, problem.h_kv)
            queries = slice(first * problem.group, last * problem.group)
            yield _Heads(slice(row, min(row + batch, problem.b)), slice(first, last), queries)


def _query_blocks(problem: PrefixAttentionProblem) -> Iterator[_Block]:
    _, _, size = torch_block(problem)
    for first in range(0, problem.s, size):
        last = min(first + size, problem.s)
        visible = max(0, min(problem.l, last + problem.shift)) if problem.causal else problem.l
        if problem.p + visible == 0:
            # amax has no value for a row without keys; one masked key stands for none.
            visible = 1
        yield _Block(slice(first, last), visible)


def _joined(problem: PrefixAttentionProblem, inputs: Inputs, heads: _Heads) -> tuple[Tensor, Tensor]:
    """[prefix_k; k] and [prefix_v; v], (batch rows * heads, P + L, D), in the wide dtype."""

    def join(prefix: Tensor, sequence: Tensor) -> Tensor:
        after = sequence[heads.batch, heads.keys].to(problem.wide_dtype)
        if problem.shared:
            before = prefix[heads.keys].expand(after.shape[0], -1, -1, -1)
        else:
            before = prefix[heads.batch, heads.keys]
        return torch.cat((before.to(problem.wide_dtype), after), dim=2).flatten(0, 1)

    return join(inputs.prefix_k, inputs.k), join(inputs.prefix_v, inputs.v)


def _taken(problem: PrefixAttentionProblem, x: Tensor, heads: _Heads, block: _Block, dtype: torch.dtype) -> Tensor:
    """Rows of q or dy as (batch rows * key heads, group * rows, D): one product serves a group."""
    rows = x[heads.batch, heads.queries, block.rows].to(dtype)
    return rows.reshape(-1, problem.group * rows.shape[2], problem.d)


def _put(into: Tensor, heads: _Heads, block: _Block, rows: Tensor) -> None:
    """Write what ``_taken`` shapes it like into y or dq."""
    target = into[heads.batch, heads.queries, block.rows]
    target.copy_(rows.reshape(target.shape))
