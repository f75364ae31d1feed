"""Problems of every family with mixed shapes and dtypes, as calls with gradients, for tests that launch very often."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_kernels.adapter.kernels.activations import ACTIVATIONS
from tests.adapter import cases as adapter
from tests.contract.draw import DTYPES
from tests.contract.operators import Case, Operator, Tensors
from tests.lora import cases as lora
from tests.prefix import cases as prefix
from tests.prompt import cases as prompt


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


class _Sizes(random.Random):
    """Sizes and other choices from one seed."""

    def __init__(self, seed: int, largest: int) -> None:
        super().__init__(seed)
        self.largest = largest
        self.dtype = self.choice([dtype for dtype, adapter in DTYPES if adapter is None])

    def size(self, share: float = 1.0) -> int:
        """A size of any kind, or, one time in two, a multiple of 16."""
        size = self.randint(1, max(16, int(self.largest * share)))
        return size if self.random() < 0.5 else -(-size // 16) * 16


def draw(index: int, device: torch.device, largest: int) -> Problem:
    """Make the problem of an index: the families take turns, its sizes and values are always the same.

    Args:
        largest: of the sizes that may be large.
    """
    family, operator = FAMILIES[index % len(FAMILIES)]
    case = family(_Sizes(index, largest))
    return Problem(operator, case, operator.make(case, device, index), operator.output_gradient(case, device, index))


def _lora(d: _Sizes) -> lora.Case:
    r, p = d.choice((1, 5, 8, 16, 64)), d.choice((0.0, 0.1))
    return lora.Case(m=d.size(), n=d.size(), k=d.size(), r=r, p=p, dtype=d.dtype)


def _adapter(d: _Sizes) -> adapter.Case:
    # relu's kink is left out: a rounding at it is a whole gradient.
    activation = d.choice([name for name in ACTIVATIONS if "relu" not in name])
    r, residual = d.choice((1, 8, 24, 64)), d.choice(("x", "tensor"))
    return adapter.Case(
        m=d.size(), n=d.size(), k=d.size(), r=r, dtype=d.dtype, activation=activation, residual=residual
    )


def _prefix(d: _Sizes) -> prefix.Case:
    b, h_kv, group = d.randint(1, 3), d.randint(1, 3), d.choice((1, 2, 4))
    keys, p, causal = d.size(0.5), d.randint(1, 40), d.random() < 0.5
    queries = d.choice((keys, d.randint(1, keys)))
    return prefix.Case(b=b, h=h_kv * group, h_kv=h_kv, s=queries, l=keys, p=p, dtype=d.dtype, causal=causal)


def _prompt(d: _Sizes) -> prompt.Case:
    n, p, b = d.randint(1, 4), d.randint(1, 30), d.randint(1, 5)
    return prompt.Case(n=n, b=b, p=p, l=d.size(0.3), d=d.size(), dtype=d.dtype)


FAMILIES = (
    (_lora, lora.OPERATOR),
    (_adapter, adapter.OPERATOR),
    (_prefix, prefix.OPERATOR),
    (_prompt, prompt.OPERATOR),
)
