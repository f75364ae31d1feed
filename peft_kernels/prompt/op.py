"""The function, its autograd, and its registration with torch.library. The only file that knows autograd.

Eager calls go through ``_PromptTuning``; compiled ones through the operators ``peft_kernels::prompt`` and
``peft_kernels::prompt_backward``. Both end in ``_forward`` and ``_backward``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peft_kernels._core import library
from peft_kernels._core.dispatch import Implementation, choose, requested_backend
from peft_kernels._core.graph import is_recorded
from peft_kernels.prompt import torch_impl, triton_impl
from peft_kernels.prompt.problem import FAMILY, Gradients, Needs, PromptTuningProblem, describe

# In the order that `auto` tries them; the last one runs everything.
IMPLEMENTATIONS: tuple[Implementation, ...] = (triton_impl.IMPLEMENTATION, torch_impl.IMPLEMENTATION)


def prompt_tuning(prompts: Tensor, tokens: Tensor, *, backend: str | None = None) -> Tensor:
    """Put every prompt in front of every row of token embeddings (Lester et al. 2021, arXiv:2104.08691).

    Semantics: ``y[n * B + b] = cat(prompts[n], tokens[b])``

    Args:
        prompts (N, P, D): the tokens' dtype, or float32 beside half precision, then cast; any strides.
        tokens (B, L, D): float32, bfloat16, float16 or float64; any strides.
        backend: "torch", "triton" or "cuda" forces a backend; None takes ``use_backend``'s, then the variable
            PEFT_KERNELS_BACKEND, then chooses.

    Returns:
        y (N * B, P + L, D) in the tokens' dtype, contiguous. Autocast changes nothing, as for torch.cat of one dtype.

    Raises:
        ValueError: a shape, dtype, device or backend name is wrong.
        UnsupportedError: the forced backend cannot run this problem.

    Numerics: y is a copy. Gradients are summed in float32 (float64 for float64) and rounded once, computed only where
    asked for, and have the same bits in two runs. Nothing is saved for the backward pass.

    Example:
        >>> import torch
        >>> from peft_kernels.prompt import prompt_tuning
        >>> prompt_tuning(torch.ones(2, 1, 1), torch.zeros(1, 2, 1))[..., 0]
        tensor([[1., 0., 0.],
                [1., 0., 0.]])
    """
    if torch.compiler.is_compiling():
        y: Tensor = torch.ops.peft_kernels.prompt_tuning(prompts, tokens, backend)
        return y
    problem = describe(prompts, tokens)
    if not is_recorded():
        return _forward(problem, prompts, tokens, backend)
    return _PromptTuning.apply(problem, backend, prompts, tokens)


def _implementation(problem: PromptTuningProblem, backend: str | None) -> Implementation:
    chosen = choose(FAMILY, IMPLEMENTATIONS, problem, requested_backend(backend))
    return torch_impl.IMPLEMENTATION if problem.is_empty else chosen


def _forward(problem: PromptTuningProblem, prompts: Tensor, tokens: Tensor, backend: str | None) -> Tensor:
    y: Tensor = _implementation(problem, backend).forward(problem, prompts, tokens)
    return y


def _backward(problem: PromptTuningProblem, dy: Tensor, needs: Needs, backend: str | None) -> Gradients:
    grads: Gradients = _implementation(problem, backend).backward(problem, dy, needs)
    return grads


class _PromptTuning(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, problem: PromptTuningProblem, backend: str | None, prompts: Tensor, tokens: Tensor) -> Tensor:
        ctx.problem, ctx.backend = problem, backend
        return _forward(problem, prompts, tokens, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        grads = _backward(ctx.problem, dy, Needs(*ctx.needs_input_grad[2:]), ctx.backend)
        return None, None, *grads


def _operator(prompts: Tensor, tokens: Tensor, backend: str | None) -> Tensor:
    return _forward(describe(prompts, tokens), prompts, tokens, backend)


def _operator_fake(prompts: Tensor, tokens: Tensor, backend: str | None) -> Tensor:
    problem = describe(prompts, tokens)
    return tokens.new_empty((problem.n * problem.b, problem.p + problem.l, problem.d))


def _operator_backward(
    dy: Tensor, prompts: Tensor, tokens: Tensor, needs: list[bool], backend: str | None
) -> Gradients:
    return _backward(describe(prompts, tokens), dy, Needs(*needs), backend)


def _operator_backward_fake(
    dy: Tensor, prompts: Tensor, tokens: Tensor, needs: list[bool], backend: str | None
) -> Gradients:
    # Not empty_like, which would keep the strides of a transposed or expanded input.
    return Gradients(
        prompts=prompts.new_empty(prompts.shape) if needs[0] else None,
        tokens=tokens.new_empty(tokens.shape) if needs[1] else None,
    )


_FORWARD = library.define(
    "prompt_tuning(Tensor prompts, Tensor tokens, str? backend) -> Tensor",
    _operator,
    _operator_fake,
)
library.define(
    "prompt_tuning_backward(Tensor dy, Tensor prompts, Tensor tokens, bool[] needs, str? backend)"
    " -> (Tensor?, Tensor?)",
    _operator_backward,
    _operator_backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    # Only their shapes are read; both exist anyway.
    prompts, tokens, ctx.backend = inputs
    ctx.save_for_backward(prompts, tokens)


def _registered_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    prompts, tokens = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:2])
    grads = torch.ops.peft_kernels.prompt_tuning_backward(dy, prompts, tokens, needs, ctx.backend)
    return *grads, None


library.register_autograd(_FORWARD, _registered_backward, _setup_context)
