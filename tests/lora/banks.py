"""Small stores of adapters with ranks that differ by layer, and what their batches are to give."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor

from peft_kernels._core.rows import BASE
from peft_kernels.lora.bank import SlotStore
from peft_kernels.lora.slots import Factors, Shape
from python_ref.lora import Slot, rows_forward

CPU = torch.device("cpu")
SHAPES = ((7, 5), (6, 9), (3, 4))
MAX_RANK = 4


def make_store(slots: int = 3, dtype: torch.dtype = torch.float64, **options: Any) -> SlotStore:
    shapes = [Shape(f"layer{index}", k, n, dtype) for index, (k, n) in enumerate(SHAPES)]
    return SlotStore(shapes, slots, MAX_RANK, CPU, **options)


def make_adapter(seed: int, dtype: torch.dtype = torch.float64) -> dict[int, Factors]:
    """Of ranks 0 to MAX_RANK, another one in each layer; 0 is a layer that it has nothing for."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for index, (k, n) in enumerate(SHAPES):
        r = int(torch.randint(MAX_RANK + 1, (), generator=generator))
        if r:
            a, b = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((r, k), (n, r)))
            found[index] = Factors(a.to(dtype), b.to(dtype), 0.25 + seed % 7)
    return found


def state(store: SlotStore) -> list[Any]:
    """All that a refusal must leave as it is."""
    tensors = [store.tables, store.host_tables, store.scales]
    tensors += [tensor for layer in store.layers for tensor in (layer.lora_a, layer.lora_b)]
    for batch in store._batches.values():
        tensors += [batch.rows.slot, batch.rows.order, batch.rows.first, batch.rows.runs]
    hosted = [factor for each in store._hosted.values() for both in each.factors.values() for factor in both[:2]]
    facts = [store.names, store.resident, dict(store._slot_of), list(store._free), store.in_use, store.current.batch]
    return [*(tensor.clone() for tensor in (*tensors, *hosted)), facts]


def assert_as_before(store: SlotStore, before: list[Any]) -> None:
    after = state(store)
    assert len(after) == len(before)
    assert after[-1] == before[-1]
    for now, then in zip(after[:-1], before[:-1], strict=True):
        assert torch.equal(now.nan_to_num(7e7), then.nan_to_num(7e7))


def poison(store: SlotStore) -> None:
    """Put nan wherever no adapter that is resident has a rank."""
    for layer in store.layers:
        used = torch.zeros(len(layer.lora_a), dtype=torch.bool)
        for slot in store._slot_of.values():
            rank = int(store.host_tables[layer.index, 1, slot])
            used[slot * MAX_RANK : slot * MAX_RANK + rank] = True
        layer.lora_a[~used] = torch.nan
        layer.lora_b[:, ~used] = torch.nan


def expected(
    adapters: dict[str, dict[int, Factors]], names: list[str], layer: int, x: Tensor, weight: Tensor
) -> Tensor:
    """By the oracle, row by row; x (B, L, K)."""
    known = list(adapters)
    k, n = SHAPES[layer]
    none = Factors(x.new_zeros(0, k), x.new_zeros(n, 0), 1.0)
    given = [Slot(*adapters[name].get(layer, none)) for name in known]
    of_rows = [-1 if name == BASE else known.index(name) for name in names for _ in range(x.shape[1])]
    return rows_forward(x.reshape(-1, k), weight, given, of_rows).view(*x.shape[:-1], n)


def storage_bytes() -> int:
    """Of all tensors that Python knows."""
    # Not by isinstance, which asks objects of other libraries for a class of theirs.
    tensors = [each for each in gc.get_objects() if type(each) in (Tensor, torch.nn.Parameter)]
    tensors = [each for each in tensors if each.layout is torch.strided]  # another test's sparse one has no storage
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())
