"""The bank's storage: who is in which slot, what a batch computes, and what a refusal leaves alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from peft_kernels._core.rows import BASE, Rows
from peft_kernels.lora import slots as slots_module
from peft_kernels.lora.bank import SlotStore
from peft_kernels.lora.slots import Batch, Factors
from python_ref import compare
from python_ref.lora import Slot, eager_rows, rows_forward
from tests.lora.banks import (
    CPU,
    MAX_RANK,
    SHAPES,
    assert_as_before,
    expected,
    make_adapter,
    make_store,
    poison,
    state,
)


def test_random_batches_are_right_and_the_least_recently_used_goes() -> None:
    """100 names in 3 slots; beside them a list that says who is to be in a slot, and nan where nobody is."""
    store, draw = make_store(), random.Random(0)
    adapters = {f"adapter{seed}": make_adapter(seed) for seed in range(100)}
    for name, factors in adapters.items():
        store.add(name, factors)
    recent: list[str] = []
    loads = 0
    for step in range(300):
        # Half of the names are of few, so that some are resident.
        pool = draw.sample(list(adapters)[: 5 if step % 2 else 100], 3)
        names = [draw.choice([*pool, BASE]) for _ in range(draw.randint(1, 6))]
        wanted = [name for name in dict.fromkeys(names) if name != BASE]
        before = dict(store._slot_of)
        store.use(names)
        for name in [name for name in wanted if name not in recent]:
            loads += 1
            if len(recent) == 3:
                recent.remove(next(name for name in recent if name not in wanted))
            recent.append(name)
        for name in wanted:
            recent.remove(name)
            recent.append(name)
        assert store.resident == tuple(recent)
        # Who stays has not moved, and no two are in one slot.
        assert all(store._slot_of[name] == slot for name, slot in before.items() if name in recent)
        assert sorted([*store._slot_of.values(), *store._free]) == [0, 1, 2]
        poison(store)
        generator = torch.Generator().manual_seed(step)
        for layer, (k, n) in zip(store.layers, SHAPES, strict=True):
            x = torch.randn(len(names), draw.randint(1, 3), k, generator=generator, dtype=torch.float64)
            weight = torch.randn(n, k, generator=generator, dtype=torch.float64)
            torch.testing.assert_close(
                layer.linear(x, weight, None), expected(adapters, names, layer.index, x, weight), rtol=1e-13, atol=1e-13
            )
    assert loads > 200


@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32])
def test_half_precision_is_within_the_budget(adapter_dtype: torch.dtype) -> None:
    """Beside a bfloat16 base; float64 files are rounded once, to what eager torch is handed too."""
    store = make_store(dtype=adapter_dtype)
    files = {f"a{seed}": make_adapter(seed) for seed in range(8) if 1 in make_adapter(seed)}
    names = [*list(files)[:3], BASE]
    for name, factors in files.items():
        store.add(name, factors)
    store.use(names)
    k, n = SHAPES[1]
    x, weight = torch.randn(4, 50, k).bfloat16(), torch.randn(n, k).bfloat16()
    slots = [Slot(*(f.to(adapter_dtype) for f in files[name][1][:2]), files[name][1].scale) for name in names[:3]]
    of_rows = [-1 if name == BASE else names.index(name) for name in names for _ in range(50)]
    eager = eager_rows(x.reshape(-1, k), weight, slots, of_rows)
    wide = [Slot(slot.lora_a.double(), slot.lora_b.double(), slot.scale) for slot in slots]
    oracle = rows_forward(x.reshape(-1, k).double(), weight.double(), wide, of_rows)
    compare.assert_close("y", store.layers[1].linear(x, weight, None).view(-1, n), eager, oracle)


def test_gradients_of_x_are_those_of_the_batch() -> None:
    store, weight = make_store(), torch.randn(5, 7, dtype=torch.float64)
    adapters = {"a": make_adapter(1), "b": make_adapter(2)}
    for name, factors in adapters.items():
        store.add(name, factors)
    names = ["b", BASE, "a"]
    store.use(names)
    x = torch.randn(3, 2, 7, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(3, 2, 5, dtype=torch.float64)
    (dx,) = torch.autograd.grad(store.layers[0].linear(x, weight, None), x, dy)
    (want,) = torch.autograd.grad(expected(adapters, names, 0, x, weight), x, dy)
    torch.testing.assert_close(dx, want, rtol=1e-13, atol=1e-13)
    assert dx.abs().min() > 0


def test_another_batch_before_the_backward_pass_is_an_error() -> None:
    """Autograd's, since tensors that it has saved are written; never the other batch's gradients."""
    store, weight = make_store(), torch.randn(5, 7, dtype=torch.float64)
    store.add("a", {0: Factors(torch.randn(2, 7), torch.randn(5, 2), 1.0)})
    store.add("b", {0: Factors(torch.randn(2, 7), torch.randn(5, 2), 1.0)})
    store.use(["a"])
    x = torch.randn(1, 2, 7, dtype=torch.float64, requires_grad=True)
    y = store.layers[0].linear(x, weight, None)
    store.use(["b"])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("count", [1, 2, 5, 8])
@pytest.mark.parametrize("length", [0, 1, 2, 7])
def test_plan_is_that_of_rows(count: int, length: int) -> None:
    """One after another in the same tensors, of batches with many runs and with few."""
    batch, draw = Batch(count, 4, CPU), random.Random(count)
    places = {name: getattr(batch.rows, name).data_ptr() for name in ("slot", "order", "first", "runs")}
    for _ in range(20):
        slots = [draw.randint(-1, 3 if draw.random() < 0.5 else 0) for _ in range(count)]
        batch.put(slots)
        got, want = batch.of_length(length), Rows.of(slots, known=4, length=length)
        for name in ("slot", "order", "first"):
            assert torch.equal(getattr(got, name), getattr(want, name))
        runs = [run for run in got.runs.tolist() if run[2]]
        assert runs == [run for run in want.runs.tolist() if run[2]]
        assert places == {name: getattr(batch.rows, name).data_ptr() for name in places}
    assert batch.of_length(length) is batch.of_length(length)


def test_nothing_moves() -> None:
    """What a captured graph reads lies where it lay, whatever is loaded."""
    store = make_store()
    for seed in range(9):
        store.add(str(seed), make_adapter(seed))
    store.use(["0", "1"])

    def places() -> list[int]:
        rows = store.current.batch.rows
        tensors = [rows.slot, rows.order, rows.first, rows.runs]
        for layer in store.layers:
            (update,) = layer.updates
            tensors += [update.lora_a, update.lora_b, update.scales, update.table.device, update.table.host]
        return [tensor.data_ptr() for tensor in tensors]

    first = places()
    for names in (["2", "3"], ["4", BASE], ["0", "8"]):
        store.use(names)
        assert places() == first
        for layer in store.layers:
            for name in set(names) - {BASE}:
                factors = store._hosted[name].factors.get(layer.index)
                begin, table = store._slot_of[name] * MAX_RANK, layer.updates[0].table.device[:, store._slot_of[name]]
                rank = 0 if factors is None else len(factors.lora_a)
                assert table.tolist() == [begin, rank, 0]
                if factors is not None:
                    assert torch.equal(layer.updates[0].lora_a[begin : begin + rank], factors.lora_a)
                    assert torch.equal(layer.updates[0].lora_b[:, begin : begin + rank], factors.lora_b)
                    assert layer.updates[0].scales[store._slot_of[name]] == factors.scale
    store.use(["1"])
    store.use(["5", "6"])
    assert places() == first


def test_residents_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store()
    for name in "abcd":
        store.add(name, make_adapter(ord(name)))
    store.use(["a", "b", "c"])
    monkeypatch.setattr(slots_module.LayerSlots, "put", lambda *_: pytest.fail("a factor was copied"))
    for names in (["b"], ["c", "a", "c", BASE], ["a", "b", "c"], [BASE]):
        store.use(names)
    assert store.resident == ("a", "b", "c")


REFUSED: dict[str, tuple[Callable[[SlotStore], object], type[Exception], str]] = {
    "too many": (
        lambda store: store.use(["a", "b", "c", "d"]),
        ValueError,
        r"AdapterBank\.use: a batch may have 3 adapters, one for each slot, got 4",
    ),
    "unknown": (
        lambda store: store.use(["a", "x"]),
        KeyError,
        r"no adapter 'x'; known are 'a', 'b', 'c', 'd', '__base__'",
    ),
    "one name": (lambda store: store.use("a"), ValueError, r"names must be a list .* got 'a'"),
    "no names": (lambda store: store.use([]), ValueError, r"got \[\]"),
    "no texts": (lambda store: store.use(["a", 3]), ValueError, r"got \['a', 3\]"),
    "known": (lambda store: store.add("d", {}), ValueError, "there is an adapter 'd' already; overwrite=True"),
    "name of the base": (lambda store: store.add(BASE, {}), ValueError, "name must be a text .* got '__base__'"),
    "empty name": (lambda store: store.add("", {}), ValueError, "got ''"),
    "overwritten in use": (lambda store: store.add("a", {}, True), ValueError, "'a' is in use by the current batch"),
    "removed in use": (lambda store: store.remove("b"), ValueError, "'b' is in use by the current batch"),
    "removed unknown": (lambda store: store.remove("x"), KeyError, "no adapter 'x'; known are 'a', 'b', 'c', 'd'"),
    "rank": (
        lambda store: store.add("n", {0: Factors(torch.zeros(5, 7), torch.zeros(5, 5), 1.0)}),
        ValueError,
        "'n': layer0 must have a rank of at most max_rank, 4, got 5",
    ),
    "shape of A": (
        lambda store: store.add("n", {1: Factors(torch.zeros(2, 7), torch.zeros(9, 2), 1.0)}),
        ValueError,
        r"layer1\.lora_A must be floating \(2, 6\), got torch\.float32 \(2, 7\)",
    ),
    "shape of B": (
        lambda store: store.add("d", {1: Factors(torch.zeros(2, 6), torch.zeros(9, 3), 1.0)}, True),
        ValueError,
        r"layer1\.lora_B must be floating \(9, 2\), got torch\.float32 \(9, 3\)",
    ),
    "batch of x": (
        lambda store: store.layers[0].linear(torch.zeros(3, 2, 7), torch.zeros(5, 7), None),
        ValueError,
        r"B the 2 names in use or a multiple of it, got \(3, 2, 7\)",
    ),
    "x without a batch": (
        lambda store: store.layers[0].linear(torch.zeros(7), torch.zeros(5, 7), None),
        ValueError,
        r"got \(7,\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_leaves_everything_as_it_was(case: str) -> None:
    store = make_store()
    for name in "abcd":
        store.add(name, make_adapter(ord(name)))
    store.use(["c", "d"])
    store.use(["a", "b"])
    before = state(store)
    call, kind, text = REFUSED[case]
    with pytest.raises(kind, match=text):
        call(store)
    assert_as_before(store, before)


def test_without_a_batch_a_layer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"use\(names\) comes before"):
        make_store().layers[0].linear(torch.zeros(1, 7), torch.zeros(5, 7), None)


def test_beams_have_their_row_s_adapter() -> None:
    """Names are repeated as PEFT repeats them: each one's rows are neighbours."""
    store, weight = make_store(), torch.randn(5, 7, dtype=torch.float64)
    adapters = {"a": make_adapter(1), "b": make_adapter(2)}
    for name, factors in adapters.items():
        store.add(name, factors)
    store.use(["b", "a"])
    x = torch.randn(6, 2, 7, dtype=torch.float64)
    want = expected(adapters, ["b", "b", "b", "a", "a", "a"], 0, x, weight)
    torch.testing.assert_close(store.layers[0].linear(x, weight, None), want, rtol=1e-13, atol=1e-13)
    flat = store.layers[0].linear(x.reshape(12, 7), weight, None)
    torch.testing.assert_close(flat, want.view(12, 5), rtol=1e-13, atol=1e-13)


def test_overwriting_is_seen_by_the_next_batch() -> None:
    store, weight, x = make_store(), torch.zeros(5, 7).double(), torch.ones(1, 7).double()
    ones = Factors(torch.ones(1, 7), torch.ones(5, 1), 1.0)
    store.add("a", {0: ones})
    store.use(["a"])
    assert torch.equal(store.layers[0].linear(x, weight, None), torch.full((1, 5), 7.0).double())
    store.use([BASE])
    store.add("a", {0: ones._replace(scale=3.0)}, overwrite=True)
    assert store.resident == ()
    store.use(["a"])
    assert torch.equal(store.layers[0].linear(x, weight, None), torch.full((1, 5), 21.0).double())


def test_a_removed_adapter_s_slot_is_the_next_one_s() -> None:
    """Also where the next one has its name."""
    store, weight, x = make_store(), torch.zeros(5, 7).double(), torch.ones(1, 7).double()
    ones = Factors(torch.ones(1, 7), torch.ones(5, 1), 1.0)
    for name, scale in (("a", 1.0), ("b", 2.0)):
        store.add(name, {0: ones._replace(scale=scale)})
    store.use(["a", "b"])
    store.use([BASE])
    store.remove("a")
    assert store.names == store.resident == ("b",) and store._free == [0, 2]
    store.add("a", {0: ones._replace(scale=5.0)})
    store.use(["a"])
    assert store._slot_of == {"b": 1, "a": 0}
    assert torch.equal(store.layers[0].linear(x, weight, None), torch.full((1, 5), 35.0).double())


def test_files_tensors_are_copied() -> None:
    store = make_store()
    given = Factors(torch.ones(2, 7).double(), torch.ones(5, 2).double(), 1.0)
    store.add("a", {0: given})
    given.lora_a.zero_()
    assert store._hosted["a"].factors[0].lora_a.eq(1).all()


def test_a_failed_copy_leaves_no_half_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory may run out in the middle: what was overwritten is no longer resident, and the next use is right."""
    store = make_store()
    adapters = {name: make_adapter(seed) for seed, name in enumerate("abcd", 20)}
    for name, factors in adapters.items():
        store.add(name, factors)
    store.use(["a", "b", "c"])
    put = slots_module.LayerSlots.put

    def fails(layer: slots_module.LayerSlots, *arguments: Any) -> None:
        if layer.index == 2:
            raise torch.cuda.OutOfMemoryError("out of memory")
        put(layer, *arguments)

    assert 2 in adapters["d"]
    with monkeypatch.context() as patch:
        patch.setattr(slots_module.LayerSlots, "put", fails)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            store.use(["d"])
    assert store.resident == ("b", "c")
    assert store.in_use is None and store.current.batch is None
    names = ["a", "d", "c"]
    store.use(names)
    for layer, (k, n) in zip(store.layers, SHAPES, strict=True):
        x, weight = torch.randn(3, 2, k, dtype=torch.float64), torch.randn(n, k, dtype=torch.float64)
        want = expected(adapters, names, layer.index, x, weight)
        torch.testing.assert_close(layer.linear(x, weight, None), want, rtol=1e-13, atol=1e-13)
