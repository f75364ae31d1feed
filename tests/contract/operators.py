"""What an operator hands to the contract's tests. A record in a family's ``cases.py`` is found by ``discover``."""

from __future__ import annotations

import contextlib
import importlib
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from peft_kernels._core.triton_tools import why_not_environment
from python_ref import compare
from tests.contract.draw import Draw

CPU = torch.device("cpu")

# A problem: a frozen dataclass with y_shape and y_dtype, whose str is the test's name.
Case = Any
# The tensors of a problem: a NamedTuple, None where an optional one is left out.
Tensors = Any
# The output y and the gradient of every differentiable tensor that there is, by ``label_of`` its name.
Results = SimpleNamespace

Run = Callable[[Case, Tensors, Tensor], Results]


@dataclass(frozen=True)
class Operator:
    """One operator.

    Attributes:
        function: the public one; it takes tensors by name and has ``backend``.
        op: the module that holds its implementations.
        differentiable: fields of its tensors that have gradients; there may be none.
        variants: backends, each with what ``pin`` pins after a dash.
        pin: variant -> a context in which the problem takes that path; yields the backend's name.
        make: (case, device, seed) -> random tensors.
        make_exact: (case, device, seed) -> tensors and a gradient of y that leave nothing to round in any order of any
            sum.
        arguments: (case, tensors) -> the function's arguments by name, but for the backend.
        eager: (case, tensors) -> y by eager torch in the same dtypes.
        oracle: (case, tensors, dy) -> y and gradients in float64, from the same rounded inputs.
        draws: case -> how many draws join in one comparison of errors, which scatter where values are few.
        unrounded: results that have eager's bits.
        shared: case -> bytes of what backward passes keep and all layers of a forward pass have in common.
        together: sets of tensors for whose gradients alone no more is kept than by eager; without it each is one.
        budget: cases and variants held against the error budget.
        exact: cases for ``make_exact``; ``exact_draws`` of them, and always ``exact_examples``, the first in float32.
        repeated: cases and variants that give the same bits twice; ``deterministic`` where torch must be asked.
        typical: with every tensor, in float32.
        kinds: of calls, small, for the ways through autograd and the compiler; the first is in float32.
        gradcheck: tiny cases in float64.
        far: a case, and its tensors whose first dimension can have any stride; None where all are contiguous.
        empty: cases with a size of zero.
        rows: cases, and their tensors whose first dimension m may be several.
        scaled: cases whose scale may be a tensor.
        wrong_case: what ``wrong`` changes.
        wrong: changed arguments and the message that names them.
        usual: (case, tensors) -> y as users run it today, where ``eager`` is on another path of torch.
        unsupported: a forced backend, the case that it cannot run, and its reason.
    """

    function: Callable[..., Tensor]
    op: ModuleType
    differentiable: tuple[str, ...]
    variants: tuple[str, ...]
    pin: Callable[[str], contextlib.AbstractContextManager[str]]
    make: Callable[..., Tensors]
    make_exact: Callable[..., tuple[Tensors, Tensor]]
    arguments: Callable[[Case, Tensors], dict[str, Any]]
    eager: Callable[[Case, Tensors], Tensor]
    oracle: Callable[[Case, Tensors, Tensor], tuple[Tensor, Any]]
    draws: Callable[[Case], int]
    budget: tuple[tuple[Case, str], ...]
    exact: SearchStrategy[Case]
    exact_draws: int
    exact_examples: tuple[Case, ...]
    repeated: tuple[tuple[Case, str], ...]
    typical: Case
    kinds: tuple[Case, ...]
    gradcheck: tuple[Case, ...]
    far: tuple[Case, tuple[str, ...]] | None
    empty: tuple[Case, ...]
    wrong_case: Case
    wrong: tuple[tuple[dict[str, Any], str], ...]
    unsupported: tuple[tuple[str, Case, str], ...]
    rows: tuple[tuple[Case, tuple[str, ...]], ...] = ()
    scaled: tuple[Case, ...] = ()
    unrounded: tuple[str, ...] = ()
    together: tuple[tuple[str, ...], ...] = ()
    shared: Callable[[Case], int] = lambda case: 0
    deterministic: bool = False
    usual: Callable[[Case, Tensors], Tensor] | None = None

    @property
    def today(self) -> Callable[[Case, Tensors], Tensor]:
        """What users run today."""
        return self.usual or self.eager

    @property
    def name(self) -> str:
        return self.op.OPERATOR.name

    def __str__(self) -> str:
        return self.name

    @contextlib.contextmanager
    def using(self, variant: str) -> Iterator[str]:
        """Pin a variant and yield its backend's name; skip the test where it cannot run at all."""
        if variant.startswith("triton") and (reason := why_not_environment()):
            pytest.skip(reason)
        with self.pin(variant) as backend:
            yield backend

    def call(self, case: Case, tensors: Tensors, backend: str | None = None) -> Tensor:
        return self.function(**self.arguments(case, tensors), backend=backend)

    @staticmethod
    def output_gradient(case: Case, device: torch.device, seed: int = 0) -> Tensor:
        return Draw(99 + seed).normal(*case.y_shape).to(device, case.y_dtype)

    def wanted(self, tensors: Tensors) -> dict[str, Tensor]:
        """The differentiable tensors that there are, by name."""
        return {name: tensor for name in self.differentiable if (tensor := getattr(tensors, name)) is not None}

    def leaves(self, tensors: Tensors) -> Tensors:
        """The same tensors, the differentiable ones as leaves of a new graph."""
        return tensors._replace(
            **{name: tensor.detach().requires_grad_() for name, tensor in self.wanted(tensors).items()}
        )

    def run(self, call: Callable[[Tensors], Tensor], tensors: Tensors, dy: Tensor) -> Results:
        """Output and all gradients of a function of tensors."""
        leaves = self.leaves(tensors)
        y = call(leaves)
        wanted = self.wanted(leaves)
        gradients = torch.autograd.grad(y, list(wanted.values()), dy) if wanted else ()
        return Results(y=y.detach(), **dict(zip(map(label_of, wanted), gradients, strict=True)))

    def run_ours(self, case: Case, tensors: Tensors, dy: Tensor, variant: str) -> Results:
        """Output and all gradients by the package."""
        with self.using(variant) as backend:
            return self.run(lambda leaves: self.call(case, leaves, backend), tensors, dy)

    def run_eager(self, case: Case, tensors: Tensors, dy: Tensor) -> Results:
        """Output and all gradients by eager torch in the same dtypes: what the error budget is measured in."""
        return self.run(lambda leaves: self.eager(case, leaves), tensors, dy)

    def run_oracle(self, case: Case, tensors: Tensors, dy: Tensor) -> Results:
        """Output and all gradients in float64, on the same rounded inputs."""
        y, gradients = self.oracle(case, tensors, dy)
        return Results(y=y, **{label_of(name): getattr(gradients, name) for name in self.wanted(tensors)})

    def check_budget(self, case: Case, device: torch.device, run: Run) -> None:
        """Hold a way to run a case against the error budget, and see that it leaves its inputs alone.

        The budget compares norms of rounding errors. Those of n independent values scatter by a share of 1 / sqrt(n):
        where these are few, further draws join them.
        """
        draws: list[tuple[Results, Results, Results]] = []
        for seed in range(max(1, self.draws(case))):
            tensors, dy = self.make(case, device, seed), self.output_gradient(case, device, seed)
            given = [tensor for tensor in (*tensors, dy) if tensor is not None]
            before = [tensor.clone() for tensor in given]
            ours = run(case, tensors, dy)
            for old, new in zip(before, given, strict=True):
                compare.assert_bitwise_equal("an input after the call", new, old)
            draws.append((ours, self.run_eager(case, tensors, dy), self.run_oracle(case, tensors, dy)))
        ours, eager, exact = (
            Results(**{label: torch.stack([getattr(result, label) for result in results]) for label in vars(ours)})
            for results in zip(*draws, strict=True)
        )
        assert_close(ours, eager, exact, str(case))
        for label in self.unrounded:
            compare.assert_bitwise_equal(label, getattr(ours, label), getattr(eager, label))


def label_of(name: str) -> str:
    """What the gradient of a tensor is called among results, where y is the output."""
    return "dy" if name == "y" else name


def assert_close(ours: Results, eager: Results, exact: Results, name: str = "") -> None:
    """Hold every result against the error budget."""
    for label, value in vars(ours).items():
        compare.assert_close(f"{name} {label}", value, getattr(eager, label), getattr(exact, label))


def assert_bitwise_equal(got: Results, expected: Results) -> None:
    assert vars(got).keys() == vars(expected).keys()
    for label, value in vars(got).items():
        compare.assert_bitwise_equal(label, value, getattr(expected, label))


def assert_exact(got: Results, exact: Results, name: str = "") -> None:
    """Demand the oracle's numbers: -0.0 is 0.0, and nan is nothing's equal."""
    for label, value in vars(got).items():
        assert torch.equal(value.double(), getattr(exact, label)), f"{name} {label}"


def double(tensors: Tensors) -> Tensors:
    return tensors._make(None if tensor is None else tensor.double() for tensor in tensors)


@cache
def discover() -> tuple[Operator, ...]:
    """Import the families' ``cases.py``, and ``<operator>_cases.py`` of their further ones, and collect the records."""
    paths = sorted(Path(__file__).parent.parent.glob("*/*cases.py"))
    modules = [importlib.import_module(f"tests.{path.parent.name}.{path.stem}") for path in paths]
    return tuple(value for module in modules for value in vars(module).values() if isinstance(value, Operator))


def over(
    names: str, rows: Callable[[Operator], Iterable[tuple[Any, ...]]], gradients: bool = False
) -> pytest.MarkDecorator:
    """Parametrise a test over the operators, or those that have ``gradients``, and over rows of each.

    Triton's interpreter takes long: make test runs the first case of an operator and about a third of the others.
    """
    parameters = []
    for operator in discover():
        seen = set()
        for row in rows(operator) if operator.differentiable or not gradients else ():
            name, variant = "-".join(_id(value) for value in (operator, *row)), row[-1] if row else None
            is_sampled = names == "case, variant" and str(variant).startswith("triton") and variant in seen
            is_left_out = is_sampled and zlib.crc32(name.encode()) % 3 > 0
            seen.add(variant if isinstance(variant, str) else None)
            parameters.append(pytest.param(operator, *row, id=name, marks=[pytest.mark.thorough] * is_left_out))
    return pytest.mark.parametrize(f"operator, {names}" if names else ["operator"], parameters)


def _id(value: Any) -> str:
    return "+".join(value) if isinstance(value, dict) else str(value)
