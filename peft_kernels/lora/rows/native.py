"""LoRA by rows by torch's own operators, without a graph, where the host's time is most of a call's: decoding.

    y = x W^T + bias;  x' = x[order];  u_t = scale_t (x'_t A_t^T) B_t^T of each slot;  y[order] += u

Two products for each slot, and three operations for all of them: rows are gathered and added once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels._core.torch_products import FEW_ROWS, is_slow
from peft_kernels.lora.linear.native import is_host_bound
from peft_kernels.lora.rows.problem import Inputs, LoraRowsProblem


def native(problem: LoraRowsProblem, call: Inputs, records: bool) -> Callable[[Inputs], tuple[Tensor, ...]] | None:
    """The form for calls like this, or None where the torch implementation is as fast, rounds less or keeps less.

    Refused are what a GPU runs, whose scales the host may not read; graphs, dropout, float32 adapters beside half
    precision, and plans of which the host knows nothing.
    """
    if records or problem.has_dropout or problem.device.type != "cpu" or call.runs is None:
        return None
    if any(dtype != problem.dtype for dtype in problem.adapter_dtypes):
        return None
    if is_slow(problem.dtype, problem.device.type) and problem.m > FEW_ROWS:
        return None
    if not all(is_host_bound(problem.m, n, problem.k) for n in problem.n):
        return None
    return lambda call: _unrecorded(problem, call)


def _unrecorded(problem: LoraRowsProblem, call: Inputs) -> tuple[Tensor, ...]:
    assert call.runs is not None
    ys = [F.linear(call.x, weight, bias) for weight, bias in zip(call.weights, call.biases, strict=True)]
    counts = [0] * problem.slots
    for slot, _, count in call.runs.tolist():
        counts[slot] += count
    total = sum(counts)
    if total:
        # The rows of no slot come first.
        order = call.order[problem.m - total :]
        rows = call.x.reshape(problem.m, problem.k).index_select(0, order).split(counts)
        for index, member in enumerate(problem.members):
            update = _update(problem, call, index, rows, total)
            ys[member].view(problem.m, problem.n[member]).index_add_(0, order, update)
    # Of an x with several leading dimensions they are views, which could not be changed in place within a graph.
    return tuple([y.data if y._is_view() else y for y in ys])


def _update(problem: LoraRowsProblem, call: Inputs, index: int, rows: tuple[Tensor, ...], total: int) -> Tensor:
    """An update of all slots' rows, in their order."""
    firsts, ranks, _ = call.host_tables[index].tolist()
    lora_a, lora_b, scales = call.lora_a[index], call.lora_b[index], call.scales[index].tolist()
    update = torch.empty(total, problem.n[problem.members[index]], dtype=problem.dtype, device=problem.device)
    parts = update.split([x.shape[0] for x in rows])
    for x, part, first, rank, scale in zip(rows, parts, firsts, ranks, scales, strict=True):
        if not x.shape[0]:
            continue
        if not rank:
            part.fill_(-0.0)  # the only number that changes no bit of what it is added to
            continue
        s = torch.mm(x, lora_a[first : first + rank].t())
        up = lora_b[:, first : first + rank].t()
        if problem.dtype in (torch.float32, torch.float64):
            torch.addmm(part, s, up, beta=0, alpha=scale, out=part)
        else:
            # BLAS may round each term of a product in half precision that it adds to something.
            torch.mm(s, up, out=part)
            part.mul_(scale)
    return update
