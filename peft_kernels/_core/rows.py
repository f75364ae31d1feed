"""Which adapter each row of a batch uses: one plan for all layers of a forward pass.

A *slot* is a number of an adapter, 0 ... T - 1; -1 is none of them. Rows stay where they are: what reduces over the
rows of a slot, or writes them, finds them by ``order``, in which the rows of a slot follow each other, as they stood.

The plan is made by a few operations on the device, none of which the host waits for, so that it can be made while a
CUDA graph is captured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from peft_kernels._core.plans import is_seen_into

BASE = "__base__"
NAME = "Rows"


@dataclass(frozen=True, eq=False)
class Rows:
    """The slots of M rows, and where the rows of each slot are. ``of`` makes it.

    Attributes:
        slot: (M,) int32, of each row; what is no slot is a row without an adapter.
        order: (M,) int32, a permutation of the rows that sorts them by slot and keeps the order of a slot's rows.
        first: (T + 1,) int32; the rows of slot t are order[first[t] : first[t + 1]].
        runs: (R, 3) int64 on the CPU: (slot, first row, count) of neighbours with one slot, those of a slot one after
            the other; further entries have count 0. None where only the device knows the slots.
        names: of the slots, if they have some.
    """

    slot: Tensor
    order: Tensor
    first: Tensor
    runs: Tensor | None
    names: tuple[str, ...] = ()

    @staticmethod
    def of(
        names_or_slots: Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Tensor,
        *,
        known: Sequence[str] | int | None = None,
        length: int | None = None,
        device: torch.device | str | None = None,
    ) -> Rows:
        """Make the plan of a batch; call it once for all layers that see the same rows.

        Args:
            names_or_slots: the adapter of each batch row, by name, "__base__" for none; or slots (B,), -1 for none, or
                one for each token (B, L); a list, or an integer tensor, which stays where it is.
            known: the names of the slots in their order, by default those of the batch in the order in which they come;
                or how many slots there are, which a tensor that is not on the CPU cannot tell.
            length: tokens of each batch row; None where x has no such dimension, or slots have it.
            device: where the activations are; by default that of a tensor, else the CPU.

        Raises:
            KeyError: a name is none of ``known``.
            ValueError: slots are of another form, or out of range where the host knows them.

        Example:
            >>> import peft_kernels as pk
            >>> rows = pk.Rows.of(["b", "__base__", "a", "b"], known=["a", "b"])
            >>> rows.slot.tolist(), rows.order.tolist(), rows.first.tolist()
            ([1, -1, 0, 1], [1, 2, 0, 3], [1, 2, 4])
        """
        names: tuple[str, ...] = () if known is None or isinstance(known, int) else tuple(known)
        if len(set(names)) != len(names) or BASE in names:
            raise ValueError(f"{NAME}: known names must differ, and {BASE!r} is none of them, got {names}")
        if isinstance(names_or_slots, Tensor):
            slots, on_host = _checked(names_or_slots), _on_host(names_or_slots)
            if on_host is None and known is None:
                raise ValueError(f"{NAME}: slots on {slots.device} need known, their names or how many there are")
        else:
            on_host, names = _slots_of(names_or_slots, known, names)
            slots = _checked(torch.tensor(on_host, dtype=torch.int64, device="cpu"))
        if length is not None and slots.dim() != 1:
            raise ValueError(f"{NAME}: length is for slots (B,), got slots {tuple(slots.shape)}")
        flat = None if on_host is None else _flat(on_host)
        count = len(names) or (known if isinstance(known, int) else max(flat or (), default=-1) + 1)
        if flat and not -1 <= min(flat) <= max(flat) < count:
            wrong = min(flat) if min(flat) < -1 else max(flat)
            raise ValueError(f"{NAME}: slots must be in -1 ... {count - 1}, got {wrong}")
        device = slots.device if device is None else torch.device(device)
        runs = None if flat is None else _runs(flat, 1 if length is None else length)
        # What crosses to the device is one for a batch row.
        slot = slots.to(device, torch.int32, non_blocking=True)
        slot = slot.reshape(-1) if length is None else slot.repeat_interleave(length)
        # What is no slot comes before the first or after the last.
        order = torch.argsort(slot, stable=True)
        boundaries = torch.arange(count + 1, dtype=torch.int32, device=device)
        first = torch.searchsorted(slot[order], boundaries, out_int32=True)
        return Rows(slot, order.to(torch.int32), first, runs, names)

    @property
    def slots(self) -> int:
        """How many there are."""
        return self.first.shape[0] - 1

    def to(self, device: torch.device | str) -> Rows:
        """The same plan on another device."""
        device = torch.device(device)
        if self.slot.device == device:
            return self
        slot, order, first = (each.to(device, non_blocking=True) for each in (self.slot, self.order, self.first))
        return Rows(slot, order, first, self.runs, self.names)

    def mean(self, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """Each adapter's own mean of something that every row has, such as the loss of a token; differentiable.

        A mean over a mixed batch would tie the size of one adapter's step to how many tokens the others have.

        Args:
            values (..., as x without its last dimension): of M rows.
            mask: of values' shape, True where a row counts; None: all do.

        Returns:
            (T,) in values' dtype, 0 for a slot without rows that count. Values of other rows, even inf or nan, are not
            in it. Sums are in a fixed order.

        Raises:
            ValueError: shapes that do not fit.
        """
        m = self.slot.shape[0]
        for name, each in (("values", values), ("mask", mask)):
            if each is not None and each.numel() != m:
                raise ValueError(f"{NAME}.mean: {name} must have as many elements as rows, {m}, got {each.numel()}")
        mine = self._is_of_slot if mask is None else self._is_of_slot & mask.reshape(1, m).bool()
        wide = values.reshape(1, m).to(torch.promote_types(values.dtype, torch.float32))
        total = torch.where(mine, wide, 0.0).sum(1)
        return (total / mine.sum(1).clamp(min=1)).to(values.dtype)

    @cached_property
    def _is_of_slot(self) -> Tensor:
        """(T, M) bool."""
        return self.slot == torch.arange(self.slots, device=self.slot.device).unsqueeze(1)


def _slots_of(
    given: Sequence[str] | Sequence[int] | Sequence[Sequence[int]],
    known: Sequence[str] | int | None,
    names: tuple[str, ...],
) -> tuple[list[Any], tuple[str, ...]]:
    """Slots, and their names if names were given."""
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise ValueError(f"{NAME}: names or slots must be a list or an integer tensor, got {given!r}")
    if not any(isinstance(each, str) for each in given):
        return list(given), names
    if isinstance(known, int):
        raise ValueError(f"{NAME}: names need known names, got known = {known}")
    found = names or tuple(dict.fromkeys(str(each) for each in given if each != BASE))
    places = {BASE: -1} | {name: slot for slot, name in enumerate(found)}
    for each in given:
        if each not in places:
            raise KeyError(f"{NAME}: no adapter {each!r}; known are {', '.join(map(repr, found))} and {BASE!r}")
    return [places[str(each)] for each in given], found


def _checked(slots: Tensor) -> Tensor:
    if (
        slots.dtype.is_floating_point
        or slots.dtype.is_complex
        or slots.dtype == torch.bool
        or slots.dim() not in (1, 2)
    ):
        raise ValueError(f"{NAME}: slots must be integers (B,) or (B, L), got {slots.dtype} {tuple(slots.shape)}")
    return slots


def _on_host(slots: Tensor) -> list[Any] | None:
    """Slots that can be read without waiting for a device."""
    if slots.device.type != "cpu" or type(slots) is not Tensor or torch.compiler.is_compiling() or is_seen_into():
        return None
    found: list[Any] = slots.tolist()
    return found


def _flat(slots: list[Any]) -> list[int]:
    return [slot for row in slots for slot in row] if slots and isinstance(slots[0], Sequence) else slots


def _runs(slots: list[int], length: int) -> Tensor:
    """As many as the next power of two, so that operators see few different shapes."""
    found, start = [], 0
    for slot, neighbours in groupby(slots):
        count = length * len(list(neighbours))
        if slot >= 0 and count:
            found.append((slot, start, count))
        start += count
    found.sort()
    rest = (1 << (len(found) - 1).bit_length() if found else 1) - len(found)
    return torch.tensor(found + [(0, 0, 0)] * rest, dtype=torch.int64, device="cpu")
