"""The operator: autograd, torch.library, compile, checkpointing, saved memory, wrong input."""

from __future__ import annotations

import warnings
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import peft_kernels as pk
from benchmarks.memory import peak_bytes
from peft_kernels.prompt import op, triton_impl
from peft_kernels.prompt.op import prompt_tuning
from peft_kernels.prompt.problem import describe
from tests.prompt.cases import Case, make

CPU = torch.device("cpu")


def _leaves(case: Case) -> tuple[tuple[Tensor, Tensor], Tensor]:
    prompts, tokens, dy = make(case, CPU)
    return (prompts.requires_grad_(), tokens.requires_grad_()), dy


def test_gradcheck() -> None:
    leaves, _ = _leaves(Case(d=3, dtype=torch.float64))
    assert torch.autograd.gradcheck(prompt_tuning, leaves)


def test_second_derivative_is_refused() -> None:
    leaves, dy = _leaves(Case())
    (gradient,) = torch.autograd.grad(prompt_tuning(*leaves), leaves[:1], dy.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("needs", [[True, True], [True, False]])
def test_opcheck(needs: list[bool]) -> None:
    leaves, dy = _leaves(Case())
    torch.library.opcheck(torch.ops.peft_kernels.prompt_tuning.default, (*leaves, "torch"))
    arguments = (dy, *(leaf.detach() for leaf in leaves), needs, "torch")
    torch.library.opcheck(torch.ops.peft_kernels.prompt_tuning_backward.default, arguments)


def test_compile_without_graph_break() -> None:
    torch._dynamo.reset()
    leaves, dy = _leaves(Case(dtype=torch.bfloat16, prompt_dtype=torch.float32))

    def call(prompts: Tensor, tokens: Tensor) -> Tensor:
        return prompt_tuning(prompts * 2, tokens).relu()

    eager = call(*leaves)
    got = torch.compile(call, fullgraph=True, backend="aot_eager")(*leaves)
    assert torch.equal(got, eager)
    expected = torch.autograd.grad(eager, leaves, dy)
    for gradient, other in zip(torch.autograd.grad(got, leaves, dy), expected, strict=True):
        assert torch.equal(gradient, other)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant: bool) -> None:
    leaves, _ = _leaves(Case())
    expected = torch.autograd.grad(prompt_tuning(*leaves).square().sum(), leaves)
    checkpoint(prompt_tuning, *leaves, use_reentrant=use_reentrant).square().sum().backward()
    for leaf, gradient in zip(leaves, expected, strict=True):
        assert torch.equal(leaf.grad, gradient)


def test_autocast_changes_nothing() -> None:
    leaves, _ = _leaves(Case())
    with torch.autocast("cpu", torch.bfloat16):
        assert prompt_tuning(*leaves).dtype == torch.cat((leaves[1], leaves[1])).dtype == torch.float32


def test_nothing_is_saved() -> None:
    leaves, _ = _leaves(Case())
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        prompt_tuning(*leaves)
    assert not saved


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": [1.0]}, "prompts must be a torch.Tensor, got list"),
        ({"tokens": None}, "tokens must be a torch.Tensor, got NoneType"),
        ({"prompts": torch.ones(4, 8)}, r"prompts must be \(N, P, D\), got a tensor of shape \(4, 8\)"),
        ({"tokens": torch.ones(5, 8)}, r"tokens must be \(B, L, D\)"),
        ({"prompts": torch.ones(2, 4, 7)}, r"prompts must be \(N, P, D\) = \(2, 4, 8\), got \(2, 4, 7\)"),
        ({"tokens": torch.ones(3, 5, 8, dtype=torch.int64)}, "tokens must have one of the dtypes .*got torch.int64"),
        ({"prompts": torch.ones(2, 4, 8).bfloat16()}, "prompts must have the dtype of tokens, or float32"),
        ({"prompts": torch.ones(2, 4, 8, device="meta")}, r"prompts must be on the device of tokens \(cpu\), got meta"),
        ({"backend": "cudnn"}, "backend must be one of 'auto', 'torch', 'triton', 'cuda', got 'cudnn'"),
    ],
)
def test_wrong_input_is_named(changes: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"prompts": torch.ones(2, 4, 8), "tokens": torch.ones(3, 5, 8)}
    with pytest.raises(ValueError, match=message):
        prompt_tuning(**{**arguments, **changes})


def test_forced_backend_never_falls_back() -> None:
    prompts, tokens, _ = make(Case(dtype=torch.float64), CPU)
    with pytest.raises(pk.UnsupportedError, match="there is no 'cuda' implementation"):
        prompt_tuning(prompts, tokens, backend="cuda")
    if triton_impl.IMPLEMENTATION.why_not_environment() is None:
        with pytest.raises(pk.UnsupportedError, match="float64"):
            prompt_tuning(prompts, tokens, backend="triton")
        large = torch.empty(1, 2**30, 1, device="meta"), torch.empty(2, 1, 1, device="meta")
        assert "less than 2^31" in triton_impl.why_not(describe(*large))


def test_cpu_runs_on_torch_without_a_warning() -> None:
    problem = describe(*make(Case(), CPU)[:2])
    assert "for tests" in triton_impl.why_not_auto(problem)
    with warnings.catch_warnings(), mock.patch.object(op, "_operator", side_effect=AssertionError("dispatched")):
        warnings.simplefilter("error")
        prompt_tuning(*make(Case(), CPU)[:2])


@pytest.mark.cpu_only
def test_peak_memory_is_the_results() -> None:
    """No joined prompts, no repeated tokens: y alone; in the backward pass the prompts' gradient alone."""
    case = Case(n=3, b=4, p=20, l=500, d=64)
    prompts, tokens, dy = make(case, CPU)
    prompts.requires_grad_()

    def forward() -> Tensor:
        return prompt_tuning(prompts, tokens, backend="torch")

    held: list[Tensor] = []
    forward()
    slack = 4096  # views and scalars
    assert peak_bytes(forward, CPU) <= dy.nbytes + slack
    backward = peak_bytes(lambda: torch.autograd.grad(held, [prompts], dy), CPU, before=lambda: held.append(forward()))
    assert backward <= dy.nbytes + prompts.nbytes + slack
