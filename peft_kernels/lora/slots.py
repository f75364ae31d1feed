"""A layer with slots for adapters, and what its calls go by: the batch, and copies that may still be on their way.

Tensors that a layer computes with stay where they are, whatever is loaded into them, so that a captured CUDA graph and
a compiled function go on with other adapters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_kernels._core.cuda_tools import is_capturing
from peft_kernels._core.errors import UnsupportedError
from peft_kernels._core.rows import Rows
from peft_kernels.lora.rows.op import SlotUpdate, Table, rows_call

NAME = "AdapterBank"


class Shape(NamedTuple):
    """A layer that has slots: its path in the model, in-features, out-features, and the factors' dtype."""

    name: str
    k: int
    n: int
    dtype: torch.dtype

    @property
    def bytes_of_a_rank(self) -> int:
        """What one rank of an adapter takes."""
        return (self.k + self.n) * self.dtype.itemsize


class Factors(NamedTuple):
    """What an adapter has for one layer: lora_a (r, K), lora_b (N, r), and the scale of their product."""

    lora_a: Tensor
    lora_b: Tensor
    scale: float


class Batch:
    """The slots of a batch's rows, in tensors that all batches of as many rows share, one after another."""

    def __init__(self, count: int, slots: int, device: torch.device) -> None:
        self.count, self.slots, self.device = count, slots, device
        # Of batches of this size none has more runs than rows.
        longest = 1 << (count - 1).bit_length()
        # What inference mode makes, no backward pass may keep.
        with torch.inference_mode(False):
            empty = Rows.of([-1] * count, known=slots, device=device)
            self.rows = Rows(empty.slot, empty.order, empty.first, torch.zeros(longest, 3, dtype=torch.int64))
        self._by_length: dict[int, Rows] = {}

    def put(self, slots: list[int]) -> None:
        """Make these the rows' slots, in place."""
        rows = Rows.of(slots, known=self.slots, device=self.device)
        for mine, new in ((self.rows.slot, rows.slot), (self.rows.order, rows.order), (self.rows.first, rows.first)):
            mine.copy_(new)
        assert self.rows.runs is not None and rows.runs is not None
        self.rows.runs.zero_()[: len(rows.runs)] = rows.runs
        self._by_length.clear()

    def of_length(self, length: int) -> Rows:
        """The plan of as many rows for each of the batch's: its tokens, or its beams' tokens."""
        if length == 1:
            return self.rows
        # What a graph has captured it must make again when it is replayed, from tensors that stay.
        if torch.compiler.is_compiling() or is_capturing(self.device):
            return self._spread(length)
        if length not in self._by_length:
            with torch.inference_mode(False):
                self._by_length[length] = self._spread(length)
        return self._by_length[length]

    def _spread(self, length: int) -> Rows:
        slot, order, first, runs = self.rows.slot, self.rows.order, self.rows.first, self.rows.runs
        assert runs is not None
        within = torch.arange(length, dtype=torch.int32, device=order.device)
        return Rows(
            slot.unsqueeze(1).expand(-1, length).reshape(-1),
            (order.unsqueeze(1) * length + within).reshape(-1),
            first * length,
            torch.stack((runs[:, 0], runs[:, 1] * length, runs[:, 2] * length), dim=1),
        )


class SideStream:
    """The stream on which factors cross to a GPU, and an event for each layer when its own are there."""

    def __init__(self, device: torch.device, layers: int) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.events = [torch.cuda.Event() for _ in range(layers)]

    @contextmanager
    def copying(self) -> Iterator[None]:
        """Copy after all that was launched so far, which may still read the slots."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            yield

    def record(self, layer: int) -> None:
        """Say that what a layer needs was copied."""
        self.events[layer].record(self.stream)

    def wait(self, layer: int) -> None:
        """Let what is launched from now on begin when a layer's factors are there."""
        torch.cuda.current_stream(self.device).wait_event(self.events[layer])

    def wait_for_all(self) -> None:
        """The same for all layers."""
        torch.cuda.current_stream(self.device).wait_stream(self.stream)


@dataclass
class Current:
    """What the calls of all layers go by.

    Attributes:
        slots, max_rank, device: of the layers' tensors.
        side: what factors cross on; None where copies are done when they return.
        overlaps: whether each layer waits for its own copies.
        batch: of the rows; None before the first, and after the last.
        is_captured: whether a graph was captured, which waits for nothing.
    """

    slots: int
    max_rank: int
    device: torch.device
    side: SideStream | None
    overlaps: bool
    batch: Batch | None = None
    is_captured: bool = False

    def rows_of(self, x: Tensor) -> Rows:
        """The plan for x (B, ..., K), where B is the number of names in use or a multiple of it.

        Raises:
            ValueError: it is another.
        """
        batch = self.batch
        if batch is None:
            raise ValueError(f"{NAME}: use(names) comes before a layer is called")
        if x.dim() < 2 or x.shape[0] % batch.count:
            wanted = f"x must be (B, ..., K) with B the {batch.count} names in use or a multiple of it"
            raise ValueError(f"{NAME}: {wanted}, got {tuple(x.shape)}")
        return batch.of_length(x.shape[0] // batch.count * math.prod(x.shape[1:-1]))


class LayerSlots:
    """A layer's slots, and the layer's call.

    Attributes:
        lora_a: (slots * max_rank, K); slot t has the rows from t * max_rank on.
        lora_b: (N, slots * max_rank); slot t has the columns from t * max_rank on.
        is_awaited: whether its factors may still be on their way.
    """

    def __init__(self, current: Current, index: int, shape: Shape, table: Table, scales: Tensor) -> None:
        ranks, device = current.slots * current.max_rank, current.device
        self.current, self.index, self.is_awaited = current, index, False
        self.lora_a = torch.zeros(ranks, shape.k, dtype=shape.dtype, device=device)
        self.lora_b = torch.zeros(shape.n, ranks, dtype=shape.dtype, device=device)
        self.updates = (SlotUpdate(0, self.lora_a, self.lora_b, scales, table),)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output: x W^T + bias, and on each row the update of its adapter.

        Raises:
            ValueError: x's batch is no multiple of the names in use, or the operation refuses an argument.
            UnsupportedError: it is compiled while layers wait for copies.
        """
        rows = self.current.rows_of(x)
        if self.current.overlaps:
            self._wait()
        (y,) = rows_call(x, (weight,), (bias,), self.updates, rows)
        return y

    def _wait(self) -> None:
        if torch.compiler.is_compiling():
            raise UnsupportedError(f"{NAME}: a compiled layer waits for no copy; make the bank with overlap=False")
        if is_capturing(self.current.device):
            # A graph waits for nothing outside of it, so that ``use`` must from now on.
            self.current.is_captured = True
        elif self.is_awaited:
            assert self.current.side is not None
            self.current.side.wait(self.index)
            self.is_awaited = False

    def put(self, slot: int, factors: Factors) -> None:
        """Copy an adapter's factors into a slot."""
        first, rank = slot * self.current.max_rank, len(factors.lora_a)
        self.lora_a[first : first + rank].copy_(factors.lora_a, non_blocking=True)
        self.lora_b[:, first : first + rank].copy_(factors.lora_b, non_blocking=True)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(f"{NAME}: a model with a bank is neither copied nor pickled; call the bank's close() before")
