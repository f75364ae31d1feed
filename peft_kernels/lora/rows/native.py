"""LoRA by rows by torch's own operators, without a graph, where the host's time is most of a call's: decoding.

    y = x W^T + bias;  x' = x[order];  y[order] += scale_t (x'_t A_t^T) B_t^T, slot by slot

The torch implementation's products, rounded as its are, on rows that are gathered and written once for all slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels._core.torch_products import FEW_ROWS, add_product
from peft_kernels.lora.linear.native import is_host_bound
from peft_kernels.lora.rows.problem import Inputs, LoraRowsProblem


class _Slot(NamedTuple):
    """Its rows, their place among all that are gathered, and its factors."""

    x: Tensor
    begin: int
    end: int
    down: Tensor
    up: Tensor
    scale: float


def native(problem: LoraRowsProblem, call: Inputs, records: bool) -> Callable[[Inputs], tuple[Tensor, ...]] | None:
    """The form for calls like this, or None where the torch implementation is as fast, rounds less or keeps less.

    Refused are what a GPU runs, whose scales the host may not read; graphs, dropout, half precision, and plans of which
    the host knows nothing.
    """
    return (lambda call: _unrecorded(problem, call)) if is_native(problem, call, records) else None


def is_native(problem: LoraRowsProblem, call: Inputs, records: bool) -> bool:
    """Whether there is such a form."""
    if records or problem.has_dropout or problem.device.type != "cpu" or call.runs is None:
        return False
    if problem.dtype not in (torch.float32, torch.float64) or any(d != problem.dtype for d in problem.adapter_dtypes):
        return False
    return all(is_host_bound(problem.m, n, problem.k) for n in problem.n)


def _unrecorded(problem: LoraRowsProblem, call: Inputs) -> tuple[Tensor, ...]:
    ys = [F.linear(call.x, weight, bias) for weight, bias in zip(call.weights, call.biases, strict=True)]
    add_updates(problem, call, ys)
    # Of an x with several leading dimensions they are views, which could not be changed in place within a graph.
    return tuple([y.data if y._is_view() else y for y in ys])


def add_updates(problem: LoraRowsProblem, call: Inputs, ys: Sequence[Tensor]) -> None:
    """Add each row's updates to y_j (..., N_j) of each member, contiguous and in x's dtype, in place."""
    assert call.runs is not None
    counts = [0] * problem.slots
    for slot, _, count in call.runs.tolist():
        counts[slot] += count
    if any(counts):
        # The rows of no slot come first.
        order = call.order[problem.m - sum(counts) :]
        rows = call.x.reshape(problem.m, problem.k).index_select(0, order)
        for index, member in enumerate(problem.members):
            slots = _slots(call, index, rows, counts)
            add = _add_few if max(counts) <= FEW_ROWS else _add_many
            add(ys[member].view(problem.m, problem.n[member]), order, slots)


def _slots(call: Inputs, index: int, rows: Tensor, counts: list[int]) -> list[_Slot]:
    """Those of an update that have rows and ranks."""
    firsts, ranks, _ = call.host_tables[index].tolist()
    lora_a, lora_b, scales = call.lora_a[index], call.lora_b[index], call.scales[index].tolist()
    found, begin = [], 0
    for x, first, rank, scale in zip(rows.split(counts), firsts, ranks, scales, strict=True):
        end = begin + x.shape[0]
        if end > begin and rank:
            of_slot = slice(first, first + rank)
            found.append(_Slot(x, begin, end, lora_a[of_slot].t(), lora_b[:, of_slot].t(), scale))
        begin = end
    return found


def _add_few(y: Tensor, order: Tensor, slots: list[_Slot]) -> None:
    """As ``add_product`` adds a few rows: a sum after the product; one for neighbours of one scale."""
    update = torch.empty(order.shape[0], y.shape[1], dtype=y.dtype, device=y.device)
    for slot in slots:
        torch.mm(slot.x @ slot.down, slot.up, out=update[slot.begin : slot.end])
    # A slot without ranks here leaves a gap, and what lies in it is nobody's.
    gap = 0
    ends = [0, *[slot.end for slot in slots]]
    keys = []
    for slot, before in zip(slots, ends, strict=False):
        gap += slot.begin != before
        keys.append((gap, slot.scale))
    for (_, scale), group in groupby(zip(keys, slots, strict=True), key=lambda each: each[0]):
        some = [slot for _, slot in group]
        mine = slice(some[0].begin, some[-1].end)
        y.index_add_(0, order[mine], update[mine], alpha=scale)


def _add_many(y: Tensor, order: Tensor, slots: list[_Slot]) -> None:
    some = y.index_select(0, order)
    for slot in slots:
        add_product(some[slot.begin : slot.end], slot.x @ slot.down, slot.up, slot.scale)
    y.index_copy_(0, order.long(), some)
