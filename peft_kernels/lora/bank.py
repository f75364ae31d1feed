"""Adapters in slots: the factors of many adapters, stored so that each row of a batch uses its own.

Every adapter has a copy on the host, and some are *resident*: in a slot, which each layer stores as max_rank rows of
its lora_a and as many columns of its lora_b. On a GPU, factors cross on a stream of their own, in the order of the
layers, and each layer waits for its own alone.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_kernels._core.rows import BASE
from peft_kernels.lora.rows.op import Table
from peft_kernels.lora.rows.problem import FIRST, RANK
from peft_kernels.lora.slots import NAME, Batch, Current, Factors, LayerSlots, Shape, SideStream

# Of a factor's place in an adapter's host memory, in bytes: more than any dtype's, and what a DMA engine likes.
_ALIGNMENT = 256


class _Hosted(NamedTuple):
    """An adapter on the host: its factors by the layer's index, ranks and scales of all layers, and their bytes."""

    factors: Mapping[int, Factors]
    ranks: Tensor
    scales: Tensor
    nbytes: int


class SlotStore:
    """Named adapters: all on the host, those that were used last in slots on the device.

    Args:
        shapes: of the layers.
        slots: how many adapters fit on the device.
        max_rank: the greatest rank that an adapter may have in a layer.
        device: of the layers.
        side: what copies run on; None where they are done when they return.
        waits_by_layer: whether each layer waits for its own copies; else ``use`` makes its stream wait for all.
    """

    def __init__(
        self,
        shapes: Sequence[Shape],
        slots: int,
        max_rank: int,
        device: torch.device,
        side: SideStream | None = None,
        waits_by_layer: bool = True,
    ) -> None:
        self.shapes, self.slots, self.max_rank, self.device, self.side = tuple(shapes), slots, max_rank, device, side
        self.current = Current(slots, max_rank, device, side, side is not None and waits_by_layer)
        self.lock = threading.RLock()
        self.in_use: tuple[str, ...] | None = None
        self._hosted: dict[str, _Hosted] = {}
        self._slot_of: OrderedDict[str, int] = OrderedDict()
        self._free = list(range(slots))
        self._batches: dict[int, Batch] = {}
        self._held: list[tuple[str, ...] | None] = []
        self.is_closed = False
        with torch.inference_mode(False):
            self.host_tables = torch.zeros(len(shapes), 3, slots, dtype=torch.int32)
            self.host_tables[:, FIRST] = torch.arange(slots, dtype=torch.int32) * max_rank
            self.tables = self.host_tables.to(device, copy=True)
            wide = torch.float64 if torch.float64 in [shape.dtype for shape in shapes] else torch.float32
            self.scales = torch.zeros(len(shapes), slots, dtype=wide, device=device)
            self.layers = tuple(self._layer(index) for index in range(len(shapes)))
        if side is not None:
            for layer in self.layers:
                for tensor in (layer.lora_a, layer.lora_b, self.tables, self.scales):
                    tensor.record_stream(side.stream)

    def _layer(self, index: int) -> LayerSlots:
        table = Table(self.tables[index], self.host_tables[index], self.max_rank, False)
        return LayerSlots(self.current, index, self.shapes[index], table, self.scales[index])

    @property
    def names(self) -> tuple[str, ...]:
        """Of all adapters, in the order in which they were added."""
        return tuple(self._hosted)

    @property
    def resident(self) -> tuple[str, ...]:
        """Of those that are in a slot, the least recently used first."""
        return tuple(self._slot_of)

    @property
    def nbytes(self) -> int:
        """Of all slots on the device."""
        return sum(shape.bytes_of_a_rank for shape in self.shapes) * self.slots * self.max_rank

    @property
    def host_nbytes(self) -> int:
        """Of all adapters on the host."""
        return sum(hosted.nbytes for hosted in self._hosted.values())

    def add(self, name: str, factors: Mapping[int, Factors], overwrite: bool = False) -> None:
        """Keep an adapter on the host; nothing crosses before a batch uses it.

        Args:
            factors: by the layer's index; of other layers the adapter has none. They are copied.

        Raises:
            ValueError: the name is none, is known and not to be overwritten, or in use; or factors do not fit.
        """
        hosted = self._to_host(name, factors)
        with self.lock:
            self.check_name(name, overwrite)
            self._let_go(name)
            self._hosted[name] = hosted

    def check_name(self, name: str, overwrite: bool) -> None:
        """Raise as ``add`` does for a name that it does not take."""
        where = f"{NAME}.add"
        if not isinstance(name, str) or not name or name == BASE:
            raise ValueError(f"{where}: name must be a text that is not empty and not {BASE!r}, got {name!r}")
        if name in self._hosted and not overwrite:
            raise ValueError(f"{where}: there is an adapter {name!r} already; overwrite=True takes its place")
        if name in self._hosted:
            self._check_unused(where, name)

    def remove(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            KeyError: there is none of this name.
            ValueError: it is in use.
        """
        with self.lock:
            if name not in self._hosted:
                raise KeyError(f"{NAME}.remove: no adapter {name!r}; known are {self._known()}")
            self._check_unused(f"{NAME}.remove", name)
            self._let_go(name)
            del self._hosted[name]

    def use(self, names: Sequence[str] | None) -> None:
        """Make these the adapters of the next batches' rows, and load those that are not resident.

        Raises:
            ValueError: ``names`` is no list of names, or has more adapters than there are slots.
            KeyError: one is unknown.
        """
        with self.lock:
            if names is None:
                self.current.batch = self.in_use = None
                return
            wanted = self._wanted(names)
            if tuple(names) == self.in_use:
                return
            missing = [name for name in wanted if name not in self._slot_of]
            if missing:
                self._load(missing, set(wanted))
            for name in wanted:
                self._slot_of.move_to_end(name)
            count = len(names)
            if count not in self._batches:
                self._batches[count] = Batch(count, self.slots, self.device)
            batch = self._batches[count]
            batch.put([self._slot_of.get(name, -1) for name in names])
            self.current.batch, self.in_use = batch, tuple(names)
            if self.side is not None and (self.current.is_captured or not self.current.overlaps):
                self.side.wait_for_all()

    def hold(self, names: tuple[str, ...] | None) -> None:
        """Let nobody remove adapters that are to be used again by ``release``."""
        with self.lock:
            self._held.append(names)

    def release(self, names: tuple[str, ...] | None) -> None:
        """Use what was held; nothing after ``close``."""
        with self.lock:
            if not self.is_closed:
                self._held.remove(names)
                self.use(names)

    def close(self) -> None:
        """Let go of everything."""
        with self.lock:
            self.use(None)
            self.is_closed = True
            self._hosted.clear()
            self._slot_of.clear()

    def _wanted(self, names: Sequence[str]) -> list[str]:
        """The adapters among names, each once, in the order in which they come."""
        where = f"{NAME}.use"
        if isinstance(names, str) or not isinstance(names, (list, tuple)) or not names or not _are_texts(names):
            raise ValueError(f"{where}: names must be a list with the adapter of each batch row, got {names!r}")
        wanted = [name for name in dict.fromkeys(names) if name != BASE]
        for name in wanted:
            if name not in self._hosted:
                raise KeyError(f"{where}: no adapter {name!r}; known are {self._known()}")
        if len(wanted) > self.slots:
            raise ValueError(f"{where}: a batch may have {self.slots} adapters, one for each slot, got {len(wanted)}")
        return wanted

    def _load(self, missing: Sequence[str], wanted: set[str]) -> None:
        """Put adapters into slots: free ones, and then those whose adapters were not used for the longest time."""
        unused = [name for name in self._slot_of if name not in wanted]
        for name in unused[: max(0, len(missing) - len(self._free))]:
            self._let_go(name)
        places = {name: self._free[position] for position, name in enumerate(missing)}
        # Until all is there, nothing is; the batch before may have used what is overwritten.
        self.current.batch = self.in_use = None
        if self.side is None:
            self._copy(places)
        else:
            with self.side.copying():
                self._copy(places)
        del self._free[: len(missing)]
        self._slot_of.update(places)

    def _copy(self, places: Mapping[str, int]) -> None:
        adapters = [(self._hosted[name], slot) for name, slot in places.items()]
        for hosted, slot in adapters:
            self.host_tables[:, RANK, slot] = hosted.ranks
            self.tables[:, RANK, slot].copy_(hosted.ranks, non_blocking=True)
            self.scales[:, slot].copy_(hosted.scales, non_blocking=True)
        for layer in self.layers:
            for hosted, slot in adapters:
                if layer.index in hosted.factors:
                    layer.put(slot, hosted.factors[layer.index])
            if self.side is not None:
                self.side.record(layer.index)
                layer.is_awaited = True

    def _let_go(self, name: str) -> None:
        """Free an adapter's slot, if it has one; the lowest is taken first."""
        if name in self._slot_of:
            self._free.append(self._slot_of.pop(name))
            self._free.sort()

    def _check_unused(self, where: str, name: str) -> None:
        if name in (self.in_use or ()):
            raise ValueError(f"{where}: {name!r} is in use by the current batch; use another, or None, before")
        if any(name in (names or ()) for names in self._held):
            raise ValueError(f"{where}: {name!r} is used again at the end of a with block; leave that before")

    def _known(self) -> str:
        return ", ".join(map(repr, (*self._hosted, BASE)))

    def _to_host(self, name: str, factors: Mapping[int, Factors]) -> _Hosted:
        """Copy an adapter into one piece of memory, pinned where it is to cross to a GPU.

        Raises:
            ValueError: factors do not fit.
        """
        for index, each in factors.items():
            self._check(name, self.shapes[index], each)
        pinned, scale = self.device.type == "cuda", self.scales.dtype
        ranks = torch.zeros(len(self.shapes), dtype=torch.int32, pin_memory=pinned)
        scales = torch.zeros(len(self.shapes), dtype=scale, pin_memory=pinned)
        places: list[tuple[int, Tensor, int]] = []
        end = 0
        for index, each in factors.items():
            ranks[index], scales[index] = len(each.lora_a), each.scale
            for factor in each[:2]:
                places.append((index, factor, end))
                end += -(-factor.numel() * self.shapes[index].dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        memory = torch.empty(end, dtype=torch.uint8, pin_memory=pinned)
        copies: dict[int, list[Any]] = {}
        for index, factor, start in places:
            dtype = self.shapes[index].dtype
            copy = memory[start : start + factor.numel() * dtype.itemsize].view(dtype).view(factor.shape)
            copies.setdefault(index, []).append(copy.copy_(factor.detach()))
        hosted = {index: Factors(both[0], both[1], factors[index].scale) for index, both in copies.items()}
        return _Hosted(hosted, ranks, scales, end + ranks.nbytes + scales.nbytes)

    def _check(self, name: str, shape: Shape, factors: Factors) -> None:
        where, rank = f"{NAME}.add: {name!r}: {shape.name}", len(factors.lora_a)
        if rank > self.max_rank:
            raise ValueError(f"{where} must have a rank of at most max_rank, {self.max_rank}, got {rank}")
        for letter, factor, expected in (
            ("A", factors.lora_a, (rank, shape.k)),
            ("B", factors.lora_b, (shape.n, rank)),
        ):
            if tuple(factor.shape) != expected or not factor.is_floating_point():
                got = f"{factor.dtype} {tuple(factor.shape)}"
                raise ValueError(f"{where}.lora_{letter} must be floating {expected}, got {got}")


def _are_texts(values: Sequence[object]) -> bool:
    return all(isinstance(value, str) for value in values)
