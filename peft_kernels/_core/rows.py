"""Which adapter each row of a batch uses: one plan for all layers of a forward pass.

A *slot* is a number of an adapter, 0 ... T - 1; -1 is none of them. Rows stay where they are: what reduces over the
rows of a slot, or writes them, finds them by ``order``, in which a slot's rows stand one after the other, as they stood.

The plan is made by a few operations on the device, none of which the host waits for, so that it can be made while a
CUDA graph is captured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

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
            slots = names_or_slots
        else:
            slots, names = _slots_of(names_or_slots, known, names)
        slots = _checked(slots, known, names)
        count = len(names) or (known if isinstance(known, int) else _count(slots))
        if slots.device.type == "cpu" and slots.numel():
            least, most = int(slots.min()), int(slots.max())
            if least < -1 or most >= count:
                raise ValueError(f"{NAME}: slots must be in -1 ... {count - 1}, got {least if least < -1 else most}")
        if length is not None:
            if slots.dim() != 1:
                raise ValueError(f"{NAME}: length is for slots (B,), got slots {tuple(slots.shape)}")
            slots = slots.unsqueeze(1).expand(-1, length)
        return _plan(slots, count, names, torch.device(device) if device is not None else slots.device)

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
) -> tuple[Tensor, tuple[str, ...]]:
    """Slots on the CPU, and their names if names were given."""
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise ValueError(f"{NAME}: names or slots must be a list or an integer tensor, got {given!r}")
    if not any(isinstance(each, str) for each in given):
        return torch.tensor(given, dtype=None if len(given) else torch.int64), names
    if isinstance(known, int):
        raise ValueError(f"{NAME}: names need known names, got known = {known}")
    found = names or tuple(dict.fromkeys(str(each) for each in given if each != BASE))
    places = {BASE: -1} | {name: slot for slot, name in enumerate(found)}
    for each in given:
        if each not in places:
            raise KeyError(f"{NAME}: no adapter {each!r}; known are {', '.join(map(repr, found))} and {BASE!r}")
    return torch.tensor([places[each] for each in given]), found  # type: ignore[index]


def _checked(slots: Tensor, known: Sequence[str] | int | None, names: tuple[str, ...]) -> Tensor:
    if slots.dtype.is_floating_point or slots.dtype in (torch.bool, torch.complex64) or slots.dim() not in (1, 2):
        got = f"{slots.dtype} {tuple(slots.shape)}"
        raise ValueError(f"{NAME}: slots must be integers (B,) or (B, L), got {got}")
    if slots.device.type != "cpu" and not names and known is None:
        raise ValueError(f"{NAME}: slots on {slots.device} need known, their names or how many there are")
    return slots


def _count(slots: Tensor) -> int:
    return int(slots.max()) + 1 if slots.numel() else 0


def _plan(slots: Tensor, count: int, names: tuple[str, ...], device: torch.device) -> Rows:
    runs = _runs(slots.reshape(-1), count) if slots.device.type == "cpu" else None
    if slots.device != device and slots.dim() == 2 and slots.stride(1) == 0:
        slots = (
            slots[:, 0].to(device, non_blocking=True).unsqueeze(1).expand(slots.shape)
        )  # one for a batch row crosses
    slot = slots.to(device, non_blocking=True).reshape(-1).to(torch.int32)
    # What is no slot comes before the first or after the last.
    order = torch.argsort(slot, stable=True)
    boundaries = torch.arange(count + 1, dtype=torch.int32, device=device)
    first = torch.searchsorted(slot[order], boundaries, out_int32=True)
    return Rows(slot, order.to(torch.int32), first, runs, names)


def _runs(slot: Tensor, count: int) -> Tensor:
    """As many as the next power of two, so that operators see few different shapes."""
    value, length = torch.unique_consecutive(slot, return_counts=True)
    start = length.cumsum(0) - length
    is_slot = (value >= 0) & (value < count)
    value, start, length = value[is_slot], start[is_slot], length[is_slot]
    by_slot = torch.argsort(value, stable=True)
    runs = torch.zeros(max(1, 1 << (len(by_slot) - 1).bit_length()) if len(by_slot) else 1, 3, dtype=torch.int64)
    runs[: len(by_slot)] = torch.stack((value, start, length), dim=1)[by_slot]
    return runs
