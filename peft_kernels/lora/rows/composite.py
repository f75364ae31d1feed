"""LoRA by rows by torch's differentiable operations, for torch.func, tracers, dispatch modes and tensor subclasses.

Each slot takes its rows; where the host may read no tensor, it takes all rows, of which those of others are zero.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _get_tracing_state
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from peft_kernels.lora.kernels import dropout
from peft_kernels.lora.rows.problem import FIRST, RANK, THRESHOLD, Inputs, LoraRowsProblem


def composite(problem: LoraRowsProblem, call: Inputs) -> tuple[Tensor, ...]:
    """Return y_j (..., N_j) of each member."""
    ys = [F.linear(call.x, weight, bias) for weight, bias in zip(call.weights, call.biases, strict=True)]
    return updated(problem, call, ys)


def updated(problem: LoraRowsProblem, call: Inputs, ys: list[Tensor]) -> tuple[Tensor, ...]:
    """Return y_j (..., N_j) of each member and its updates, in y_j's dtype; where there are none y_j itself."""
    rows = _rows_of_slots(call) if _is_readable(call) else None
    for index, member in enumerate(problem.members):
        x = call.x.to(problem.adapter_dtypes[index])
        if problem.has_dropout and problem.m:
            x = _dropped(problem, call, index, x)
        for t in range(problem.slots):
            if rows is None:
                update = _of_all_rows(problem, call, index, t, x)
                ys[member] = ys[member] + update.to(ys[member].dtype)
            elif t in rows and int(call.host_tables[index][RANK, t]):
                mine = torch.tensor(rows[t], device=problem.device)
                update = _of_its_rows(problem, call, index, t, x.reshape(problem.m, problem.k)[mine])
                flat = ys[member].reshape(problem.m, problem.n[member])
                ys[member] = flat.index_add(0, mine, update.to(flat.dtype)).reshape(ys[member].shape)
    return tuple(ys)


def _is_readable(call: Inputs) -> bool:
    """Whether the host may read the plan: it has it, and nothing traces what is read."""
    if call.runs is None or torch.compiler.is_compiling() or _get_tracing_state() is not None:
        return False
    read = (call.runs, *call.host_tables)
    modes = _get_current_dispatch_mode_stack()
    is_traced = any(isinstance(mode, (FakeTensorMode, ProxyTorchDispatchMode)) for mode in modes)
    return not is_traced and all(type(each) is Tensor and not is_functorch_wrapped_tensor(each) for each in read)


def _rows_of_slots(call: Inputs) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    assert call.runs is not None
    for slot, first, count in call.runs.tolist():
        if count:
            found.setdefault(slot, []).extend(range(first, first + count))
    return found


def _of_its_rows(problem: LoraRowsProblem, call: Inputs, index: int, t: int, x: Tensor) -> Tensor:
    """The update of a slot's rows x (rows, K)."""
    first, rank = (int(call.host_tables[index][row, t]) for row in (FIRST, RANK))
    a, b = call.lora_a[index][first : first + rank], call.lora_b[index][:, first : first + rank]
    return F.linear(F.linear(x, a), b) * call.scales[index][t].detach().to(x.dtype)


def _of_all_rows(problem: LoraRowsProblem, call: Inputs, index: int, t: int, x: Tensor) -> Tensor:
    """The update of a slot on x (..., K), zero on others' rows.

    Selected before and after: neither values nor gradients of others' rows meet this slot's factors.
    """
    mine, first = (call.slot == t).reshape(*x.shape[:-1], 1), call.tables[index][FIRST, t]
    rank = torch.arange(problem.r[index], device=problem.device)
    is_mine = (rank >= first) & (rank < first + call.tables[index][RANK, t])
    a = torch.where(is_mine.unsqueeze(1), call.lora_a[index], 0.0)
    b = torch.where(is_mine, call.lora_b[index], 0.0)
    update = F.linear(F.linear(torch.where(mine, x, 0.0), a), b) * call.scales[index][t].detach()
    return torch.where(mine, update, 0.0)


def _dropped(problem: LoraRowsProblem, call: Inputs, index: int, x: Tensor) -> Tensor:
    """Each row under its slot's threshold; those without one are in no update."""
    assert call.seed is not None
    of_row = call.tables[index][THRESHOLD][call.slot.clamp(0, problem.slots - 1).long()].unsqueeze(1)
    keep = dropout.keep_mask(call.seed, problem.m, problem.k, of_row, problem.lanes[index])
    factor = (dropout.LEVELS / (dropout.LEVELS - of_row)).to(x.dtype).reshape(*x.shape[:-1], 1)
    return torch.where(keep.reshape(x.shape), x * factor, 0.0)
