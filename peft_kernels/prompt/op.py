"""The public function, and the declaration that makes it an operator."""

from __future__ import annotations

from torch import Tensor

from peft_kernels._core.operator import Operator
from peft_kernels.prompt import torch_impl, triton_impl
from peft_kernels.prompt.composite import composite
from peft_kernels.prompt.native import native
from peft_kernels.prompt.problem import NAME, Inputs, Needs, make_problem


def prompt_tuning(token_embeddings: Tensor, prompts: Tensor, *, backend: str | None = None) -> Tensor:
    """Put every prompt in front of every row of token embeddings (Lester et al. 2021, arXiv:2104.08691).

    Semantics: ``y[n * B + b] = cat(prompts[n], token_embeddings[b])``

    Args:
        token_embeddings (B, L, D): float32, bfloat16, float16 or float64; any strides.
        prompts (N, P, D): the tokens' dtype, or float32 beside half precision, then cast; any strides.
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
        >>> import torch, peft_kernels as pk
        >>> pk.prompt_tuning(torch.zeros(1, 2, 1), torch.ones(2, 1, 1))[..., 0]
        tensor([[1., 0., 0.],
                [1., 0., 0.]])
    """
    return OPERATOR(Inputs(token_embeddings, prompts), backend)


OPERATOR = Operator(
    name=NAME,
    call=Inputs,
    needs=Needs,
    implementations=(triton_impl.IMPLEMENTATION, torch_impl.IMPLEMENTATION),
    make_problem=make_problem,
    forward=lambda problem, call, implementation: (implementation.forward(problem, call),),
    backward=lambda problem, call, kept, dy, needs, implementation: implementation.backward(problem, dy, needs),
    results=lambda problem, call, implementation: (
        call.token_embeddings.new_empty((problem.n * problem.b, problem.p + problem.l, problem.d)),
    ),
    composite=composite,
    reads=lambda needs: (),
    varying=("b", "l"),
    native=native,
    activations=("token_embeddings",),
    linear=True,
)
