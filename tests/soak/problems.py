"""Problems of every operator, of mixed shapes and dtypes, for tests that launch very often."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.contract.operators import Case, Operator, Tensors, discover


@dataclass(frozen=True)
class Problem:
    """One call on tensors of its own; dy is the gradient of its output."""

    operator: Operator
    case: Case
    tensors: Tensors
    dy: Tensor

    @property
    def name(self) -> str:
        return f"{self.operator} {self.case}"

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return tuple(tensor for tensor in self.tensors if tensor is not None)

    def run(self, backend: str) -> tuple[Tensor, ...]:
        """Return the output, then the gradient of every input that has one."""
        return tuple(vars(self.operator.run_ours(self.case, self.tensors, self.dy, backend)).values())


# The cases of the error budget, in an order in which neighbours differ. relu's kink is left out: a rounding at it is a
# whole gradient.
CASES = [
    (operator, case)
    for operator in discover()
    for case in dict.fromkeys(case for case, _ in operator.budget)
    if "relu" not in getattr(case, "activation", "")
]
random.Random(0).shuffle(CASES)


def draw(index: int, device: torch.device) -> Problem:
    """Make the problem of an index, always the same."""
    operator, case = CASES[index % len(CASES)]
    return Problem(operator, case, operator.make(case, device, index), operator.output_gradient(case, device, index))
