"""A bank that lives long: adapters come and go, from other threads too, and under torch.compile."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from peft_kernels._core.rows import BASE
from tests.lora.banks import (
    expected,
    make_adapter,
    make_store,
    storage_bytes,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_a_thousand_adapters_come_and_go() -> None:
    """In a process of its own: what other tests have left behind comes and goes, too."""
    code = "from tests.lora.test_bank_lifetime import come_and_go; come_and_go()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def come_and_go() -> None:
    """Nothing is left of them: not an object, not a byte of Python's, and not a tensor."""
    store = make_store()
    store.add("stays", make_adapter(0))

    def some(first: int, count: int) -> None:
        for number in range(first, first + count):
            store.add(f"adapter{number}", make_adapter(number))
            store.use([f"adapter{number}", "stays"])
            store.use(["stays"])
            store.remove(f"adapter{number}")

    tracemalloc.start()
    try:
        some(0, 500)
        gc.collect()
        objects, host, tensors = len(gc.get_objects()), store.host_nbytes, storage_bytes()
        before = tracemalloc.get_traced_memory()[0]
        some(500, 1000)
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    # A forgotten name alone, of each, would be 58,000 bytes and the 8,000 of a list; what is forgotten of an adapter's
    # factors is 1,000 objects at least.
    assert len(gc.get_objects()) - objects < 500
    assert grown < 50_000
    assert storage_bytes() == tensors
    assert store.host_nbytes == host
    assert store.names == ("stays",) and store.resident == ("stays",)


def test_adapters_come_and_go_beside_a_server() -> None:
    """From two other threads; every batch of the server's is right, and no error comes from a state half made."""
    store = make_store()
    adapters = {name: make_adapter(seed) for seed, name in enumerate("abcdef", 40)}
    for name, factors in adapters.items():
        store.add(name, factors)
    errors: list[BaseException] = []
    ends = threading.Event()

    def churn(prefix: str) -> None:
        number = 0
        try:
            while not ends.is_set():
                store.add(f"{prefix}{number % 7}", make_adapter(number), overwrite=True)
                store.remove(f"{prefix}{number % 7}")
                number += 1
        except BaseException as error:  # Reported below, by the thread that may fail the test.
            errors.append(error)

    threads = [threading.Thread(target=churn, args=(prefix,)) for prefix in ("x", "y")]
    for thread in threads:
        thread.start()
    draw, weight = random.Random(1), torch.randn(5, 7, dtype=torch.float64)
    try:
        for _ in range(100):
            names = draw.choices([*draw.sample(list(adapters), 3), BASE], k=4)
            store.use(names)
            x = torch.randn(4, 1, 7, dtype=torch.float64)
            want = expected(adapters, names, 0, x, weight)
            torch.testing.assert_close(store.layers[0].linear(x, weight, None), want, rtol=1e-13, atol=1e-13)
    finally:
        ends.set()
        for thread in threads:
            thread.join()
    assert not errors


@pytest.mark.slow
def test_other_adapters_are_no_other_graph() -> None:
    """One graph for a shape of the batch, whatever is in use, in the slots and on the host."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    store, weight = make_store(), torch.randn(5, 7, dtype=torch.float64)
    adapters = {name: make_adapter(seed) for seed, name in enumerate("abcdef", 40)}
    for name, factors in adapters.items():
        store.add(name, factors)
    compiled = torch.compile(store.layers[0].linear, fullgraph=True, backend=counter)
    for length in (1, 3):
        for names in (["a", "b"], ["c", "d"], [BASE, "a"], ["f", "f"], ["e", "b"]):
            store.use(names)
            x = torch.randn(2, length, 7, dtype=torch.float64)
            want = expected(adapters, names, 0, x, weight)
            with torch.no_grad():
                torch.testing.assert_close(compiled(x, weight, None), want, rtol=1e-13, atol=1e-13)
        # A second length is a second graph, as everywhere in torch.
        assert counter.frame_count == (1 if length == 1 else 2)
        store.use([BASE, BASE])
        store.remove("f")
        store.add("f", adapters["f"])
