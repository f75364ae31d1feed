"""What the prompt tuning operator owes beside the contract: autocast, memory, the choice of a backend."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.memory import peak_bytes
from peft_kernels.prompt import triton_impl
from peft_kernels.prompt.problem import Inputs, make_problem
from tests.contract import observe
from tests.contract.operators import CPU
from tests.prompt.cases import OPERATOR, Case, make


def test_autocast_changes_nothing() -> None:
    tensors = make(Case(), CPU)
    with torch.autocast("cpu", torch.bfloat16):
        y = OPERATOR.call(Case(), tensors)
        assert y.dtype == torch.cat((tensors.token_embeddings, tensors.token_embeddings)).dtype == torch.float32


def test_nothing_is_saved() -> None:
    with observe.saved(()) as (added, _):
        OPERATOR.call(Case(), OPERATOR.leaves(make(Case(), CPU)))
    assert not added


def test_triton_refuses_many_rows_and_leaves_the_cpu_to_torch() -> None:
    large = Inputs(torch.empty(2, 1, 1), torch.empty(1, 1, 1).expand(1, 2**30, 1))
    with OPERATOR.using("triton"):
        assert "below 2^31" in triton_impl.why_not(make_problem(large))
    assert "for tests" in triton_impl.IMPLEMENTATION.why_not_auto(make_problem(Inputs(*make(Case(), CPU))))


@pytest.mark.cpu_only
def test_peak_memory_is_the_results() -> None:
    """No joined prompts, no repeated tokens: y alone; in the backward pass the prompts' gradient alone."""
    case = Case(n=3, b=4, p=20, l=500, d=64)
    tensors, dy = make(case, CPU), OPERATOR.output_gradient(case, CPU)
    prompts = tensors.prompts.requires_grad_()

    def forward() -> Tensor:
        return OPERATOR.call(case, tensors, "torch")

    held: list[Tensor] = []
    forward()
    slack = 4096  # views and scalars
    assert peak_bytes(forward, CPU) <= dy.nbytes + slack
    backward = peak_bytes(lambda: torch.autograd.grad(held, [prompts], dy), CPU, before=lambda: held.append(forward()))
    assert backward <= dy.nbytes + prompts.nbytes + slack
