"""Which backend runs, and what a call that cannot run says."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import peft_kernels as pk
from peft_kernels._core.operator import OPERATORS
from tests.contract import observe
from tests.contract.operators import CPU, Operator, discover, over


def test_every_operator_has_a_record() -> None:
    package = Path(pk.__file__).parent
    assert sorted(package.rglob("op.py")) == sorted(Path(str(operator.op.__file__)) for operator in discover())


@over("backend, case, message", lambda operator: operator.unsupported)
def test_forced_backend_never_falls_back(operator: Operator, backend: str, case: Any, message: str) -> None:
    tensors = operator.make(case, CPU)
    with operator.using(backend), observe.implementations_run(operator) as run:
        with pytest.raises(pk.UnsupportedError, match=message):
            operator.call(case, tensors, backend)
        with pk.use_backend(backend), pytest.raises(pk.UnsupportedError, match=message):
            operator.call(case, tensors)
    assert not run


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@over("backend", lambda operator: [("torch",), ("triton",)], gradients=True)
def test_backward_runs_where_forward_ran(
    operator: Operator, backend: str, compiled: bool, device: torch.device
) -> None:
    """Also where another backend is forced by then, and in another thread, which no ``use_backend`` block reaches."""
    torch._dynamo.reset()
    case, other = operator.kinds[0], {"torch": "triton", "triton": "torch"}[backend]
    leaves = operator.leaves(operator.make(case, device))
    wanted = list(operator.wanted(leaves).values())

    def call() -> torch.Tensor:
        return operator.call(case, leaves)

    def gradients() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(y, wanted, torch.ones_like(y), retain_graph=True)

    with operator.using(backend), observe.implementations_run(operator) as run:
        with pk.use_backend(backend):
            y = (torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call)()
            expected = gradients()
        with pk.use_backend(other):
            got = [gradients()]
        with ThreadPoolExecutor(1) as thread:
            got.append(thread.submit(gradients).result())
    assert run == [("forward", backend), *[("backward", backend)] * 3]
    for result in got:
        torch.testing.assert_close(result, expected, rtol=0, atol=0)


@over("", lambda operator: [()])
def test_cpu_runs_on_torch_without_a_warning(operator: Operator) -> None:
    tensors = operator.make(operator.typical, CPU)
    with warnings.catch_warnings(), observe.implementations_run(operator) as run:
        warnings.simplefilter("error")
        text = pk.explain(operator.call, operator.typical, tensors)
    assert text.startswith(f"{operator.name}: torch\n")
    # A tiny call is made of torch's own operators instead, and says so.
    assert run == ([] if "plan: torch's own operators" in text else [("forward", "torch")])


@over("", lambda operator: [()])
def test_every_kernel_has_problems_to_be_checked_by(operator: Operator) -> None:
    """And torch's own code has none: it is what they are compared with, and runs everything."""
    *kernels, reference = operator.op.OPERATOR.implementations
    assert reference.name == "torch" and reference.qualification is None
    for implementation in kernels:
        # Or by those of another operator, whose functions it calls.
        asked = OPERATORS[implementation.qualification.family.operator]
        assert implementation.name in [each.name for each in asked.to_check]
        assert implementation.qualification.parts
        # Blocks that wait for each other are CUDA C++'s.
        assert implementation.qualification.alone == (implementation.name == "cuda")


@over("changes, message", lambda operator: operator.wrong)
def test_wrong_input_is_named(operator: Operator, changes: dict[str, Any], message: str) -> None:
    given = operator.arguments(operator.wrong_case, operator.make(operator.wrong_case, CPU))
    with pytest.raises(ValueError, match=f"^{operator.name}: {message}"):
        operator.function(**given | changes)


@over("", lambda operator: [()])
def test_unknown_backend_is_named(operator: Operator) -> None:
    message = "^backend must be one of 'auto', 'torch', 'triton', 'cuda', got 'cudnn'"
    with pytest.raises(ValueError, match=message):
        operator.call(operator.typical, operator.make(operator.typical, CPU), "cudnn")
