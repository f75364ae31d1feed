"""Prefix attention on a CPU: torch's fused kernels over ranges of queries, with the log-sum-exp that they keep.

Equation  as torch_blocks.py; in the backward pass p = exp(scale q k'^T - lse), and no other product is made again
Tensors   as problem.Inputs; y and gradients have the strides that torch's kernels give them, y those of empty_like(q)
Saved     y and lse (B, H, S) in the wide dtype
Temporary of one part, which are all heads where no tensor is cast: [prefix_k; k] and [prefix_v; v], their gradients in
          the backward pass, what is cast; and the mask of one range
Refused   what torch_config.py gives to blocks
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels.prefix.problem import Gradients, Inputs, Needs, PrefixAttentionProblem
from peft_kernels.prefix.torch_config import torch_part, torch_range_rows

# What F.scaled_dot_product_attention runs on a CPU. Called by name, because that returns lse, which its backward pass
# takes as it is for one range of queries too.
attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

# Earlier kernels want as many key heads as query heads.
TAKES_GROUPS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)


class _Part(NamedTuple):
    """Some heads of some batch rows: key heads, and the query heads that read them; ``whole`` is all of all."""

    batch: slice
    keys: slice
    queries: slice
    whole: bool

    def of_queries(self, x: Tensor) -> Tensor:
        """Of q, y, dy or lse."""
        return x if self.whole else x[self.batch, self.queries]

    def of_keys(self, x: Tensor) -> Tensor:
        """Of k or v."""
        return x if self.whole else x[self.batch, self.keys]

    def of_prefix(self, x: Tensor, shared: bool) -> Tensor:
        """Of a prefix (H_kv, P, D), which the batch shares, or (B, H_kv, P, D)."""
        return x[self.keys] if shared else self.of_keys(x)


_ALL = _Part(slice(None), slice(None), slice(None), True)


class _Range(NamedTuple):
    """Queries from ``first`` to ``last``, which sees the first ``seen`` keys; the prefix's come first."""

    first: int
    last: int
    seen: int


def forward(problem: PrefixAttentionProblem, inputs: Inputs, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return y (B, H, S, D) and lse (B, H, S), with products of ``dtype``."""
    y: Tensor | None = None
    for part in _parts(problem, dtype):
        attended, sums = _attend_part(problem, inputs, part, dtype)
        if part.whole:
            return attended.to(problem.dtype), sums
        if y is None:
            y, lse = empty_results(problem, inputs.q)
        part.of_queries(y).copy_(attended)
        part.of_queries(lse).copy_(sums)
    if y is None:
        raise ValueError("nothing to attend with")
    return y, lse


def backward(
    problem: PrefixAttentionProblem, inputs: Inputs, y: Tensor, lse: Tensor, dy: Tensor, needs: Needs
) -> Gradients:
    """Return the gradients that ``needs`` asks for."""
    dtypes = *(problem.dtype,) * 3, *(problem.prefix_dtype,) * 2
    into: list[Tensor] = []
    for part in _parts(problem, problem.wide_dtype):
        found = _grad_part(problem, inputs, part, (y, lse, dy))
        if part.whole:
            into = found
            break
        if not into:
            # Sums of a prefix's gradients are wide, over the batch too where it is shared.
            into = [torch.empty_like(x) for x in inputs[:3]]
            into += [torch.zeros(x.shape, dtype=problem.wide_dtype, device=x.device) for x in inputs[3:5]]
        part.of_queries(into[0]).copy_(found[0])
        for place in (1, 2):
            part.of_keys(into[place]).copy_(found[place])
        for place in (3, 4):
            part.of_prefix(into[place], problem.shared).add_(found[place])
    return Gradients(*(x.to(to) if need else None for x, to, need in zip(into, dtypes, needs, strict=True)))


def mask_of_all(problem: PrefixAttentionProblem, inputs: Inputs) -> Tensor | None:
    """What is added to the scores of all queries, as of one range."""
    return _mask(problem, inputs, _ALL, _Range(0, problem.s, problem.p + problem.l), problem.dtype)


def empty_results(problem: PrefixAttentionProblem, like: Tensor) -> tuple[Tensor, Tensor]:
    """Unwritten y and lse beside a q, with the strides that the kernels give them."""
    lse = like.new_empty((problem.b, problem.s, problem.h), dtype=problem.wide_dtype)
    return torch.empty_like(like, dtype=problem.dtype), lse.transpose(1, 2)


def _attend_part(
    problem: PrefixAttentionProblem, inputs: Inputs, part: _Part, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return y in ``dtype`` and lse of a part."""
    q = part.of_queries(inputs.q).to(dtype)
    keys, values = _joined(problem, inputs, part, dtype)
    ranges = _ranges(problem)
    if len(ranges) > 1:
        y = torch.empty_like(q)
        lse = q.new_empty((y.shape[0], y.shape[2], y.shape[1]), dtype=problem.wide_dtype).transpose(1, 2)
    for each in ranges:
        attended, sums = attend(
            _rows(problem, q, each),
            _seen(problem, keys, each),
            _seen(problem, values, each),
            attn_mask=_mask(problem, inputs, part, each, dtype),
            scale=problem.scale,
        )
        if len(ranges) == 1:
            return attended.reshape(q.shape), sums.reshape(q.shape[:-1])
        y[:, :, each.first : each.last] = attended
        lse[:, :, each.first : each.last] = sums
    return y, lse


def _grad_part(
    problem: PrefixAttentionProblem, inputs: Inputs, part: _Part, results: tuple[Tensor, Tensor, Tensor]
) -> list[Tensor]:
    """Return dq, dk, dv, dprefix_k and dprefix_v of a part in the wide dtype, from y, lse and dy."""
    dtype, p = problem.wide_dtype, problem.p
    q = part.of_queries(inputs.q).to(dtype)
    y, lse, dy = (part.of_queries(x).to(dtype) for x in results)
    keys, values = _joined(problem, inputs, part, dtype)
    ranges = _ranges(problem)
    dq = torch.empty_like(q) if len(ranges) > 1 else q
    # The last range sees all keys: the others' gradients are added to its.
    for each in reversed(ranges):
        dq_rows, *seen = _attend_backward(
            _rows(problem, dy, each),
            _rows(problem, q, each),
            _seen(problem, keys, each),
            _seen(problem, values, each),
            _rows(problem, y, each),
            _rows(problem, lse, each),
            0.0,
            False,
            attn_mask=_mask(problem, inputs, part, each, dtype),
            scale=problem.scale,
        )
        if not _has_heads_of_keys(problem):
            seen = [x.unflatten(1, (-1, problem.group)).sum(2) for x in seen]
        if each is ranges[-1]:
            dkeys, dvalues = seen
        else:
            dkeys[:, :, : each.seen] += seen[0]
            dvalues[:, :, : each.seen] += seen[1]
        if len(ranges) == 1:
            dq = dq_rows.reshape(q.shape)
        else:
            dq[:, :, each.first : each.last] = dq_rows
    # Tensors of their own: a registered operator must not return two views of one.
    rows = (x[:, :, :p] for x in (dkeys, dvalues))
    dprefixes = ((x.sum(0) if x.shape[0] > 1 else x[0].clone()) if problem.shared else x.clone() for x in rows)
    return [dq, dkeys[:, :, p:], dvalues[:, :, p:], *dprefixes]


def _parts(problem: PrefixAttentionProblem, dtype: torch.dtype) -> Iterator[_Part]:
    batch, heads = torch_part(problem, dtype, torch.get_num_threads())
    whole = batch >= problem.b and heads >= problem.h_kv
    for row in range(0, problem.b, batch):
        for first in range(0, problem.h_kv, heads):
            last = min(first + heads, problem.h_kv)
            queries = slice(first * problem.group, last * problem.group)
            yield _Part(slice(row, min(row + batch, problem.b)), slice(first, last), queries, whole)


def _ranges(problem: PrefixAttentionProblem) -> list[_Range]:
    size = torch_range_rows(problem)
    lasts = (min(first + size, problem.s) for first in range(0, problem.s, size))
    unseen = problem.s if problem.causal else 0
    return [
        _Range(index * size, last, problem.p + problem.l - max(0, unseen - last)) for index, last in enumerate(lasts)
    ]


def _joined(problem: PrefixAttentionProblem, inputs: Inputs, part: _Part, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[prefix_k; k] and [prefix_v; v] of a part, (batch rows, heads, P + L, D)."""
    return (
        _join(problem, part.of_prefix(inputs.prefix_k, problem.shared), part.of_keys(inputs.k), dtype),
        _join(problem, part.of_prefix(inputs.prefix_v, problem.shared), part.of_keys(inputs.v), dtype),
    )


def _join(problem: PrefixAttentionProblem, prefix: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    if problem.p == 0:
        return rows.to(dtype)
    if rows.dtype == dtype:
        return torch.cat((prefix.expand(rows.shape[0], -1, -1, -1), rows), dim=2)
    joined = rows.new_empty((*rows.shape[:2], problem.p + problem.l, problem.d), dtype=dtype)
    joined[:, :, : problem.p] = prefix
    joined[:, :, problem.p :] = rows
    return joined


def _mask(
    problem: PrefixAttentionProblem, inputs: Inputs, part: _Part, each: _Range, dtype: torch.dtype
) -> Tensor | None:
    """What is added to a range's scores, -inf where nothing may be attended to; broadcast to (B, 1, rows, keys)."""
    mask = None
    # One query sees all keys, with or without a causal mask: causal problems have no more queries than keys here.
    if problem.causal and problem.s > 1:
        mask = torch.full((1, 1, each.last - each.first, each.seen), -torch.inf, dtype=dtype, device=problem.device)
        mask.triu_(problem.p + problem.shift + each.first + 1)
    if inputs.key_padding_mask is not None:
        kept = inputs.key_padding_mask[part.batch, : each.seen - problem.p]
        padding = torch.zeros((kept.shape[0], 1, 1, each.seen), dtype=dtype, device=problem.device)
        padding[:, 0, 0, problem.p :].masked_fill_(~kept, -torch.inf)
        mask = padding if mask is None else mask + padding
    return mask


def _rows(problem: PrefixAttentionProblem, x: Tensor, each: _Range) -> Tensor:
    """Of q, y, dy or lse those of a range. Where there is one query, the heads of a group are its rows."""
    if problem.s == 1 and problem.group > 1:
        return x.reshape(x.shape[0], -1, problem.group, *x.shape[3:])
    return x if each.last - each.first == problem.s else x[:, :, each.first : each.last]


def _seen(problem: PrefixAttentionProblem, x: Tensor, each: _Range) -> Tensor:
    """The keys or values that a range sees."""
    if each.seen < problem.p + problem.l:
        x = x[:, :, : each.seen]
    return x if _has_heads_of_keys(problem) else x.repeat_interleave(problem.group, dim=1)


def _has_heads_of_keys(problem: PrefixAttentionProblem) -> bool:
    """Whether the kernels get, and give gradients of, the key heads that there are."""
    return TAKES_GROUPS or problem.group == 1 or problem.s == 1
