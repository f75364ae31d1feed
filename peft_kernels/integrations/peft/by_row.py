"""Which adapter each row of a call uses, by name, and the plan that this is for rows of tokens.

All layers that see the same batch share one plan: it is found again by what it is made of, so that nothing hangs on a
model, a thread or a list object. Names come from the host, so nothing is sorted and the device is never waited for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels._core.cuda_tools import is_capturing
from peft_kernels._core.plans import Cache
from peft_kernels._core.rows import BASE, Rows

# A pass has a few: of the prompt and of one token, of an encoder and a decoder.
_plans: Cache[Rows] = Cache(16)


class ByRow(NamedTuple):
    """The adapters of a call.

    Attributes:
        names: of each batch row, ``BASE`` for none.
        adapters: those that rows use, in the order of their slots, which no order of rows changes.
        offsets: of each batch row, so many of its last tokens an aLoRA adapter changes, None for none of them; or None,
            for no tokens of any row.
        plan: of the batch rows, where it is at hand: then a graph reads no names, and is one for all that are alike.
    """

    names: tuple[str, ...]
    adapters: tuple[str, ...]
    offsets: tuple[int | None, ...] | None
    plan: Rows | None = None

    @staticmethod
    def of(names: Sequence[str], offsets: Sequence[int | None] | None = None) -> ByRow:
        """From what PEFT's calls have."""
        names = tuple(names)
        return ByRow(names, used_in(names), None if offsets is None else tuple(offsets))

    def rows(self, x: Tensor, late: frozenset[str] = frozenset()) -> Rows:
        """The plan for x (B, ..., K), where the adapters in ``late`` change the last tokens of a row alone."""
        length = math.prod(x.shape[1:-1])
        if self.plan is not None and not late:
            return stretched(self.plan.to(x.device), length)
        return plan_of(self.names, self.adapters, self._limits(late, length), length, x.device)

    def _limits(self, late: frozenset[str], length: int) -> tuple[int, ...] | None:
        """Of each row, how many of its last tokens its adapter changes; None: all."""
        if not late:
            return None
        offsets = self.offsets if self.offsets is not None else (None,) * len(self.names)
        return tuple(
            [
                length if name not in late else 0 if offset is None else min(int(offset), length)
                for name, offset in zip(self.names, offsets, strict=True)
            ]
        )


def used_in(names: Sequence[str]) -> tuple[str, ...]:
    """The adapters among names."""
    return tuple(sorted(set(names) - {BASE}))


def plan_of(
    names: tuple[str, ...], adapters: tuple[str, ...], limits: tuple[int, ...] | None, length: int, device: torch.device
) -> Rows:
    """The plan of a batch whose rows have ``length`` tokens each; eager ones are remembered."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return _made(names, adapters, limits, length, device)
    # What one stream made, another would have to wait for.
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
    key = names, limits, length, device, stream
    plan = _plans.get(key)
    if plan is None:
        # What inference mode makes, no backward pass may keep.
        with torch.inference_mode(False):
            plan = _made(names, adapters, limits, length, device)
        if not is_capturing(device):
            _plans.put(key, plan)
    return plan


def _made(
    names: tuple[str, ...], adapters: tuple[str, ...], limits: tuple[int, ...] | None, length: int, device: torch.device
) -> Rows:
    slots = [adapters.index(name) if name != BASE else -1 for name in names]
    if limits is None:
        return stretched(of_batch(slots, adapters, device), length)
    ends = torch.tensor(limits, device=device).unsqueeze(1)
    is_late = torch.arange(length, device=device) >= length - ends
    slot = torch.where(is_late, torch.tensor(slots, device=device).unsqueeze(1), -1)
    if not torch.compiler.is_compiling():
        return Rows.of(slot.cpu(), known=adapters, device=device)
    slot = slot.reshape(-1).to(torch.int32)
    order = torch.argsort(slot, stable=True)
    ends = torch.arange(len(adapters) + 1, dtype=torch.int32, device=device)
    return Rows(slot, order.to(torch.int32), torch.searchsorted(slot[order], ends, out_int32=True), None, adapters)


def of_batch(slots: Sequence[int], adapters: tuple[str, ...], device: torch.device) -> Rows:
    """The plan of batch rows, as ``Rows.of`` makes it."""
    order = sorted(range(len(slots)), key=slots.__getitem__)
    first = [sum(slot < each for slot in slots) for each in range(len(adapters) + 1)]
    runs, start = [], 0
    for each, neighbours in groupby(slots):
        count = len(list(neighbours))
        runs.append((each, start, count))
        start += count
    runs = sorted([run for run in runs if run[0] >= 0])
    # As many as there could be, so that operators see few different shapes.
    runs += [(0, 0, 0)] * (_power_of_two(len(slots)) - len(runs))
    slot, positions, starts = (torch.tensor(each, dtype=torch.int32, device=device) for each in (slots, order, first))
    return Rows(slot, positions, starts, torch.tensor(runs, dtype=torch.int64, device="cpu"), adapters)


def stretched(rows: Rows, length: int) -> Rows:
    """The plan of tokens, from that of the batch rows that have ``length`` of them each."""
    if length == 1:
        return rows
    within = torch.arange(length, dtype=torch.int32, device=rows.slot.device)
    slot = rows.slot.unsqueeze(1).expand(-1, length).reshape(-1)
    order = (rows.order.unsqueeze(1) * length + within).reshape(-1)
    assert rows.runs is not None
    slots, tokens = rows.runs[:, :1], rows.runs[:, 1:] * length
    return Rows(slot, order, rows.first * length, torch.cat((slots, tokens), dim=1), rows.names)


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length() if count else 1
