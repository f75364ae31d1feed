"""What crosses when, and who waits for it: by streams that write down their calls, and on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_kernels._core.errors import UnsupportedError
from peft_kernels._core.rows import BASE
from peft_kernels.lora import slots as slots_module
from peft_kernels.lora.bank import SlotStore
from peft_kernels.lora.slots import Batch, Factors, Shape, SideStream
from python_ref import compare
from tests.lora.banks import CPU, SHAPES, make_store


class _Log(list[str]):
    """A stand-in for torch.cuda's streams and events that writes down what is asked of them, and in which order."""

    def __init__(self) -> None:
        super().__init__()
        self.here = "main"

    def stream_of(self, name: str) -> Any:
        log = self

        class Stream:
            def wait_stream(self, other: Any) -> None:
                log.append(f"{name} waits for {other.name}")

            def wait_event(self, event: Any) -> None:
                log.append(f"{name} waits for event {event.number}")

        Stream.name = name
        return Stream()

    def install(self, patch: pytest.MonkeyPatch) -> None:
        log, made = self, iter(range(100))

        class Event:
            def __init__(self) -> None:
                self.number = next(made)

            def record(self, stream: Any) -> None:
                log.append(f"{stream.name} records event {self.number}")

        @contextmanager
        def stream(which: Any) -> Iterator[None]:
            log.here = which.name
            yield
            log.here = "main"

        put = slots_module.LayerSlots.put

        def logged(layer: slots_module.LayerSlots, slot: int, factors: Factors) -> None:
            log.append(f"{log.here} copies into layer {layer.index}")
            put(layer, slot, factors)

        def call(*arguments: Any) -> Any:
            log.append("a layer computes")
            return rows_call(*arguments)

        rows_call = slots_module.rows_call
        main, side = self.stream_of("main"), self.stream_of("side")
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "Stream", lambda device: side)
        patch.setattr(torch.cuda, "current_stream", lambda device: main)
        patch.setattr(torch.cuda, "stream", stream)
        patch.setattr(slots_module.LayerSlots, "put", logged)
        patch.setattr(slots_module, "rows_call", call)
        patch.setattr(Tensor, "record_stream", lambda tensor, stream: None)


def _full(seed: int) -> dict[int, Factors]:
    """An adapter that has something for every layer."""
    generator = torch.Generator().manual_seed(seed)
    return {
        index: Factors(torch.randn(2, k, generator=generator), torch.randn(n, 2, generator=generator), 1.0)
        for index, (k, n) in enumerate(SHAPES)
    }


@pytest.mark.cpu_only
def test_each_layer_waits_for_its_own_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """With streams and events that write down their calls; that copies really overlap, only a GPU can show."""
    log = _Log()
    log.install(monkeypatch)
    store = make_store(side=SideStream(CPU, len(SHAPES)))
    for name in "abc":
        store.add(name, _full(ord(name)))
    assert log == []
    store.use(["a", "b"])
    of_layer = [["side copies into layer {0}"] * 2 + ["side records event {0}"] for _ in SHAPES]
    loading = [line.format(layer) for layer, lines in enumerate(of_layer) for line in lines]
    # What was launched before may still read the slots.
    assert log == ["side waits for main", *loading]

    def run() -> list[str]:
        log.clear()
        for layer, (k, n) in zip(store.layers, SHAPES, strict=True):
            layer.linear(torch.zeros(2, k).double(), torch.zeros(n, k).double(), None)
        return list(log)

    assert run() == [line for layer in range(3) for line in (f"main waits for event {layer}", "a layer computes")]
    # Once is enough, and residents are waited for by nobody.
    assert run() == ["a layer computes"] * 3
    store.use(["b", "a"])
    assert run() == ["a layer computes"] * 3
    # A batch that never ran leaves its copies to be waited for by the next.
    store.use(["c", "c"])
    store.use(["a", "c"])
    assert run()[:2] == ["main waits for event 0", "a layer computes"]


@pytest.mark.cpu_only
def test_without_overlap_use_waits_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    log = _Log()
    log.install(monkeypatch)
    store = make_store(side=SideStream(CPU, len(SHAPES)), waits_by_layer=False)
    store.add("a", _full(1))
    store.use(["a"])
    assert log[-2:] == ["side records event 2", "main waits for side"]
    log.clear()
    store.layers[0].linear(torch.zeros(1, 7).double(), torch.zeros(5, 7).double(), None)
    assert log == ["a layer computes"]


@pytest.mark.cpu_only
def test_use_waits_for_what_a_captured_graph_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph cannot wait for an event from outside of it."""
    log = _Log()
    log.install(monkeypatch)
    store = make_store(side=SideStream(CPU, len(SHAPES)))
    for name in "ab":
        store.add(name, _full(ord(name)))
    store.use(["a"])
    log.clear()
    with monkeypatch.context() as patch:
        patch.setattr(slots_module, "is_capturing", lambda device: True)
        store.layers[0].linear(torch.zeros(1, 2, 7).double(), torch.zeros(5, 7).double(), None)
    assert log == ["a layer computes"]
    store.use(["b"])
    assert log[-1] == "main waits for side"


@pytest.mark.cpu_only
def test_captured_plans_are_made_in_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was kept from before would be that of another batch when the graph is replayed."""
    batch = Batch(2, 4, CPU)
    batch.put([1, 0])
    kept = batch.of_length(3)
    monkeypatch.setattr(slots_module, "is_capturing", lambda device: True)
    assert batch.of_length(3) is not kept
    assert batch.of_length(1) is batch.rows


@pytest.mark.slow
@pytest.mark.cpu_only
def test_a_compiled_layer_that_would_have_to_wait_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    log = _Log()
    log.install(monkeypatch)
    torch._dynamo.reset()
    store = make_store(side=SideStream(CPU, len(SHAPES)))
    store.add("a", _full(1))
    store.use(["a"])
    with pytest.raises((UnsupportedError, torch._dynamo.exc.TorchDynamoException), match="overlap=False"):
        torch.compile(store.layers[0].linear, fullgraph=True, backend="eager")(
            torch.zeros(1, 7).double(), torch.zeros(5, 7).double(), None
        )


@pytest.mark.gpu
@pytest.mark.parametrize("overlap", [True, False])
def test_batches_on_a_gpu_are_right(overlap: bool) -> None:
    """Adapters cross while the layers before theirs compute, and before those that still read the slots have done."""
    device = torch.device("cuda")
    sizes = [(1024, 1024)] * 6
    shapes = [Shape(f"layer{index}", k, n, torch.float32) for index, (k, n) in enumerate(sizes)]
    store = SlotStore(shapes, 2, 8, device, SideStream(device, len(shapes)), overlap)
    generator = torch.Generator().manual_seed(0)

    def drawn() -> Factors:
        return Factors(
            torch.randn(8, 1024, generator=generator) / 32, torch.randn(1024, 8, generator=generator) / 32, 1.0
        )

    adapters = {str(number): {index: drawn() for index in range(6)} for number in range(12)}
    for name, factors in adapters.items():
        store.add(name, factors)
    x, weight = torch.randn(2, 64, 1024, device=device), torch.randn(1024, 1024, device=device) / 32
    got: dict[str, Tensor] = {}
    for first in range(0, 12, 2):
        store.use([str(first), str(first + 1)])
        y = x
        for layer in store.layers:
            y = layer.linear(y, weight, None)
        got[str(first)], got[str(first + 1)] = y[0], y[1]
    for name, result in got.items():
        y = x[int(name) % 2].double()
        for index in range(6):
            a, b, scale = adapters[name][index]
            y = y @ weight.t().double() + scale * (y @ a.to(y).t()) @ b.to(y).t()
        # Six layers of float32 sums of 1,024 terms, or of TF32 ones; another adapter's result is off by its size.
        assert compare.relative_error(result, y) < 1e-2


@pytest.mark.gpu
def test_a_captured_graph_goes_on_with_other_adapters() -> None:
    device = torch.device("cuda")
    store = SlotStore([Shape("layer", 64, 64, torch.float32)], 2, 8, device, SideStream(device, 1))
    for seed in range(6):
        torch.manual_seed(seed)
        store.add(str(seed), {0: Factors(torch.randn(8, 64), torch.randn(64, 8), 1.0)})
    x, weight = torch.randn(2, 3, 64, device=device), torch.randn(64, 64, device=device)
    store.use(["0", "1"])
    layer = store.layers[0]
    for _ in range(3):
        layer.linear(x, weight, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer.linear(x, weight, None)
    for names in (["2", "3"], ["4", BASE], ["1", "5"]):
        store.use(names)
        graph.replay()
        torch.testing.assert_close(y, layer.linear(x, weight, None))
