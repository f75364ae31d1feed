"""The rows of one slot after the other, for torch backends: views where a slot's rows are neighbours."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """The rows of a slot.

    Attributes:
        slot: its number; -1 for the rows of none.
        runs: (first row, count) of neighbours.
        places: where they stand in the order of a plan.
        rows: their indices, where they are not all neighbours.
        mine: (M, 1) bool, where only the device knows them; the part is then of all rows.
    """

    slot: int
    runs: tuple[tuple[int, int], ...]
    places: slice
    rows: Tensor | None = None
    mine: Tensor | None = None

    @property
    def count(self) -> int:
        return self.places.stop - self.places.start

    def take(self, tensor: Tensor) -> Tensor:
        """Its rows of a tensor, to be read; a view where they are neighbours."""
        if self.mine is not None:
            return torch.where(self.mine, tensor, 0.0)
        return self._neighbours(tensor) if self.rows is None else tensor.index_select(0, self.rows)

    def take_apart(self, tensor: Tensor) -> Tensor:
        """Its rows of a tensor to be changed, and given to ``put``; where only the device knows them, all rows."""
        return tensor.clone() if self.mine is not None else self.take(tensor)

    def room_in(self, tensor: Tensor) -> Tensor:
        """Where its rows of a tensor may be written, to be given to ``put``."""
        if self.mine is None and self.rows is None:
            return self._neighbours(tensor)
        return tensor.new_empty(self.count, tensor.shape[1])

    def put(self, tensor: Tensor, rows: Tensor) -> None:
        """Write what ``room_in`` or ``take_apart`` returned to its rows of a tensor."""
        if self.mine is not None:
            tensor.copy_(torch.where(self.mine, rows, tensor))
        elif self.rows is not None:
            tensor.index_copy_(0, self.rows, rows)

    def take_ordered(self, tensor: Tensor) -> Tensor:
        """The same rows of a tensor whose rows are in the plan's order; in their own where only the device knows it."""
        return self.alone(tensor[self.places])

    def alone(self, rows: Tensor) -> Tensor:
        """Rows of the part without what an adapter that is nan made of others' zeros."""
        return rows if self.mine is None else torch.where(self.mine, rows, 0.0)

    def put_ordered(self, tensor: Tensor, rows: Tensor) -> None:
        """Write rows to where ``take_ordered`` reads them."""
        part = tensor[self.places]
        part.copy_(rows if self.mine is None else torch.where(self.mine, rows, part))

    def _neighbours(self, tensor: Tensor) -> Tensor:
        ((first, count),) = self.runs
        return tensor[first : first + count]


def parts_of(slots: int, slot: Tensor, order: Tensor, runs: Tensor | None) -> Iterator[Part]:
    """Each slot that has rows; where only the device knows which have, each slot.

    Args:
        slot, order, runs: as a plan of rows has them.
    """
    m = slot.shape[0]
    if runs is None:
        of_rows = slot.unsqueeze(1)
        for t in range(slots):
            yield Part(t, ((0, m),), slice(0, m), mine=of_rows == t)
        return
    by_slot = _by_slot(runs)
    # What writes to rows asks for 64 bits.
    indices = order.long() if any(len(of_slot) > 1 for of_slot in by_slot.values()) else order
    # The rows of no slot come first.
    start = m - _count(by_slot)
    for t, of_slot in by_slot.items():
        end = start + sum(count for _, count in of_slot)
        yield Part(t, tuple(of_slot), slice(start, end), None if len(of_slot) == 1 else indices[start:end])
        start = end


def others_of(slot: Tensor, order: Tensor, runs: Tensor | None) -> Part | None:
    """The rows of no slot, if there are some; where only the device knows them, all rows."""
    m = slot.shape[0]
    if runs is None:
        return Part(-1, ((0, m),), slice(0, m))
    count = m - _count(_by_slot(runs))
    if count == 0:
        return None
    return Part(-1, ((0, m),), slice(0, count), None if count == m else order[:count].long())


def _by_slot(runs: Tensor) -> dict[int, list[tuple[int, int]]]:
    by_slot: dict[int, list[tuple[int, int]]] = {}
    for t, first, count in runs.tolist():
        if count:
            by_slot.setdefault(t, []).append((first, count))
    return by_slot


def _count(by_slot: dict[int, list[tuple[int, int]]]) -> int:
    return sum(count for runs in by_slot.values() for _, count in runs)
