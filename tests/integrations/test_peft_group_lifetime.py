"""Nothing of a parent's call outlives it, and no other call sees it: errors, threads, a parent inside itself."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.integrations.siblings import Counts, assert_close, counts, first_of, given, inner, outcome, pair

__all__ = ["counts"]


class TestNothingIsLeft:
    @staticmethod
    def _graph_of(fused: Any, forward: Callable[[Tensor], Tensor], errors: Any) -> Any:
        """A weak reference to an input of the fused layers, whose call ends in one of the errors or in none."""
        fused.forward = forward
        x = (given().requires_grad_() * 2).detach().requires_grad_()
        with contextlib.suppress(*errors):
            fused(x)
        reference = weakref.ref(x)
        del x, fused.forward
        return reference

    def test_after_an_error(self) -> None:
        """Else a whole graph would wait for the parent's next call."""
        fused, _, report = first_of()

        def forward(x: Tensor) -> Tensor:
            fused.q(x)
            raise ValueError("between q and k")

        for _ in range(3):
            assert self._graph_of(fused, forward, (ValueError,))() is None
        assert not report.dissolved  # an error says nothing of the group

    def test_after_a_member_that_was_not_called(self) -> None:
        fused, _, _ = first_of()
        assert self._graph_of(fused, lambda x: fused.q(x).detach(), ())() is None

    def test_after_an_interrupt_it_goes_with_the_next_call(self, counts: Counts) -> None:
        """torch runs no hooks then."""
        fused, plain, _ = first_of()

        def forward(x: Tensor) -> Tensor:
            fused.q(x)
            raise KeyboardInterrupt

        reference = self._graph_of(fused, forward, (KeyboardInterrupt,))
        expected = outcome(plain, plain)
        assert counts.of(lambda: assert_close(outcome(fused, fused), expected))["hit"] == 2
        gc.collect()
        assert reference() is None

    def test_a_model_goes(self) -> None:
        fused = pair()[0]
        fused(given())
        reference = weakref.ref(inner(fused).first.q)
        del fused
        gc.collect()
        assert reference() is None


def test_a_replica_has_its_own_layers(counts: Counts) -> None:
    """As DataParallel makes them: modules whose attributes are the original's, and whose children are other ones."""
    fused, plain, _ = first_of()
    replicas = {module: module._replicate_for_data_parallel() for module in fused.modules()}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            replica._modules[name] = replicas.get(child)
        for name, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, 1.5 * parameter)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(1.5)
    found: list[Tensor] = []
    assert counts.of(lambda: found.append(replicas[fused](given()))) == {"lead": 1, "hit": 2, "alone": 1}
    torch.testing.assert_close(found[0], plain(given()))


def test_threads(counts: Counts) -> None:
    """Two threads meet between q and k; each has its own outputs."""
    fused, plain, report = first_of()
    inputs = [given(seed=seed) for seed in (1, 2)]
    expected = [plain(x).detach() for x in inputs]
    barrier, got = threading.Barrier(2, timeout=60), {}

    def between(x: Tensor, name: str) -> Tensor:
        barrier.wait()
        return x

    def work(index: int) -> None:
        for _ in range(5):
            got[index] = fused(inputs[index], between).detach()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        torch.testing.assert_close(got[index], expected[index])
    assert counts["hit"] == 20 and not report.dissolved


def test_a_parent_inside_itself(counts: Counts) -> None:
    fused, plain, _ = first_of()
    x = given()
    deep = [True]

    def between(attention: Any) -> Callable[[Tensor, str], Tensor]:
        def called(x: Tensor, name: str) -> Tensor:
            if name == "k" and deep:
                deep.clear()
                attention(x)
            return x

        return called

    expected = plain(x, between(plain))
    deep.append(True)
    torch.testing.assert_close(fused(x, between(fused)), expected)
