"""What runs a call where the clock decides: here a clock that the implementations under test move themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import peft_kernels as pk
from peft_kernels._core import candidates, plans, timing
from peft_kernels._core.dispatch import Implementation
from peft_kernels.lora.linear import torch_impl
from peft_kernels.lora.linear.op import OPERATOR
from tests.clock import Clock
from tests.contract.operators import CPU, Operator, assert_bitwise_equal, over


class Machine(Clock):
    """One with implementations."""

    def implementation(self, name: str, *paths: str, run: Any = torch_impl.IMPLEMENTATION) -> Implementation:
        """One that computes what another does, and takes its time; by one of its paths, if it has some."""

        def taking(compute: Callable[..., Any], direction: str) -> Callable[..., Any]:
            def passed(*arguments: Any, path: str | None = None) -> Any:
                title = f"{name}:{path or paths[0]}" if paths else name
                self.runs.append(f"{title} {direction}")
                self.now += self.costs.get(f"{title} {direction}", self.costs[title])
                return compute(*arguments)

            return passed

        forward, backward = taking(run.forward, "forward"), taking(run.backward, "backward")
        return Implementation(name, forward, backward, paths=lambda problem: paths)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Everything here as on a GPU, on CPU tensors: lora_linear by cuda, triton on two paths, and torch."""
    made = Machine(**{"cuda": 80.0, "triton:fused": 60.0, "triton:cublas": 70.0, "torch": 100.0})
    implementations = (
        made.implementation("cuda"),
        made.implementation("triton", "fused", "cublas"),
        made.implementation("torch"),
    )
    monkeypatch.setattr(OPERATOR, "implementations", implementations)
    monkeypatch.setattr(OPERATOR, "plans", plans.Cache())
    monkeypatch.setattr(OPERATOR, "native", lambda problem, call, records: None)
    made.install(monkeypatch)
    yield made


def tensors(m: int = 5, **gradients: bool) -> dict[str, Tensor]:
    shapes = {"x": (m, 8), "weight": (6, 8), "lora_a": (2, 8), "lora_b": (6, 2)}
    return {name: torch.ones(*shape).requires_grad_(gradients.get(name, False)) for name, shape in shapes.items()}


def test_the_fastest_path_of_the_fastest_implementation_runs(machine: Machine) -> None:
    pk.lora_linear(**tensors())
    machine.runs.clear()
    y = pk.lora_linear(**tensors())
    assert machine.runs == ["triton:fused forward"]
    assert torch.equal(y, pk.lora_linear(**tensors(), backend="torch"))


def test_torch_is_a_candidate(machine: Machine) -> None:
    machine.costs["torch"] = 50.0
    pk.lora_linear(**tensors())
    machine.runs.clear()
    pk.lora_linear(**tensors())
    assert machine.runs == ["torch forward"]


def test_forward_and_backward_are_timed_together_and_run_on_the_same(machine: Machine) -> None:
    """Triton's fused path is fastest forward, and slowest in sum."""
    machine.costs["triton:fused backward"] = 500.0
    inputs = tensors(x=True, lora_a=True, lora_b=True)
    pk.lora_linear(**inputs)
    machine.runs.clear()
    pk.lora_linear(**inputs).sum().backward()
    assert machine.runs == ["triton:cublas forward", "triton:cublas backward"]


def test_calls_without_gradients_are_a_class_of_their_own(machine: Machine) -> None:
    machine.costs["triton:fused backward"] = 500.0
    pk.lora_linear(**tensors(lora_a=True))
    with torch.no_grad():
        pk.lora_linear(**tensors(lora_a=True))
    pk.lora_linear(**tensors(lora_a=True, x=True))
    gradients = sorted(key.partition("gradients=")[2].split(" ")[0] for key in machine.winners)
    assert gradients == ["lora_a", "none", "x,lora_a"]
    assert machine.winners[next(key for key in machine.winners if "gradients=none" in key)] == "triton:fused"


def test_tokens_of_one_class_are_timed_once(machine: Machine) -> None:
    pk.lora_linear(**tensors(m=5))
    machine.runs.clear()
    pk.lora_linear(**tensors(m=6))
    assert machine.runs == ["triton:fused forward"]
    pk.lora_linear(**tensors(m=9))
    assert len(machine.winners) == 2 and len(machine.runs) > 2


def test_no_input_and_no_gradient_is_written(machine: Machine) -> None:
    inputs = tensors(x=True, lora_a=True, lora_b=True)
    before, state = {name: x.detach().clone() for name, x in inputs.items()}, torch.get_rng_state()
    pk.lora_linear(**inputs)
    assert all(torch.equal(x.detach(), before[name]) and x.grad is None for name, x in inputs.items())
    assert torch.equal(torch.get_rng_state(), state)


def test_switched_off_the_first_guess_runs(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_KERNELS_TUNE", "0")
    pk.lora_linear(**tensors())
    assert machine.runs == ["cuda forward"] and not machine.winners


def test_a_forced_backend_is_not_timed(machine: Machine) -> None:
    pk.lora_linear(**tensors(), backend="triton")
    assert machine.runs == ["triton:fused forward"] and not machine.winners


def test_where_nothing_may_be_timed_the_first_guess_runs(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "why_not_timed", lambda device, call_bytes: "memory is short")
    pk.lora_linear(**tensors())
    assert machine.runs == ["cuda forward"] and not machine.winners


def test_what_a_call_takes_is_counted_before_it_is_timed(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(timing, "why_not_timed", lambda device, call_bytes: asked.append(call_bytes))
    pk.lora_linear(**tensors(m=100, x=True, lora_b=True))
    y, s, dx, db = 100 * 6 * 4, 100 * 2 * 4, 100 * 8 * 4, 6 * 2 * 4
    assert asked == [2 * (y + s) + dx + db]


def test_a_wrong_kernel_is_no_candidate(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Implementation, "why_not_auto", lambda self, problem: "it was wrong" if self.name == "triton" else None
    )
    pk.lora_linear(**tensors())
    assert set(machine.winners.values()) == {"cuda"}
    assert not any(name.startswith("triton") for name in machine.runs)


def test_explain_names_what_runs_and_what_the_clock_passed_over(machine: Machine) -> None:
    inputs = tensors()
    text = pk.explain(pk.lora_linear, **inputs)
    assert "lora_linear: triton:fused among cuda, triton:fused, triton:cublas, torch" in text
    again = pk.explain(pk.lora_linear, **inputs).splitlines()
    assert again[0] == "lora_linear: triton:fused"
    assert "  cuda: it is right here, and not what is fastest" in again
    assert "  torch: comes after" in again


def test_the_record_of_a_machine_keeps_the_first_winner(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_KERNELS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(candidates, "_read", {})
    one, other = (candidates.Recorded(torch.device("cpu")) for _ in range(2))
    one.add("f | 16", "torch")
    other.add("f | 16", "triton")
    other.add("f | 32", "triton")
    assert dict(one.read()) == dict(other.read(again=True)) == {"f | 16": "torch", "f | 32": "triton"}


@over("case", lambda operator: [(case,) for case in operator.kinds])
def test_every_familys_calls_can_be_timed(
    operator: Operator, case: Any, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The passes run, whatever arguments and results are; and the sizes that vary are the problem's."""
    core, given = operator.op.OPERATOR, operator.make(case, CPU)
    torch_ = core.implementations[-1]
    machine.costs = {"triton": 10.0, "torch": 100.0}
    made = machine.implementation("triton", run=torch_), machine.implementation("torch", run=torch_)
    monkeypatch.setattr(core, "implementations", made)
    monkeypatch.setattr(core, "plans", plans.Cache())
    dy = operator.output_gradient(case, CPU)
    got, forced = (
        operator.run(lambda leaves, backend=backend: operator.call(case, leaves, backend), given, dy)
        for backend in (None, "torch")
    )
    assert list(machine.winners.values()) == ["triton"]
    assert core.varying and all(key.startswith(f"{core.name} ") for key in machine.winners)
    assert_bitwise_equal(got, forced)
