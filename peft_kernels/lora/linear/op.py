"""The public function, its autograd, and its registration with torch.library. The only file that knows autograd.

Eager calls go through ``_LoraLinear``; compiled ones through the operators ``peft_kernels::lora`` and
``peft_kernels::lora_backward``. Both end in ``_forward`` and ``_backward``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peft_kernels._core import library
from peft_kernels._core.autocast import autocast_dtype, without_autocast
from peft_kernels._core.dispatch import Implementation, choose, requested_backend
from peft_kernels._core.graph import is_recorded
from peft_kernels.lora.kernels import dropout
from peft_kernels.lora.linear import cuda_impl, torch_impl, triton_impl
from peft_kernels.lora.linear.problem import FAMILY, Gradients, Inputs, LoraLinearProblem, Needs, describe

# In the order that `auto` tries them; the last one runs everything.
IMPLEMENTATIONS: tuple[Implementation, ...] = (
    cuda_impl.IMPLEMENTATION,
    triton_impl.IMPLEMENTATION,
    torch_impl.IMPLEMENTATION,
)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float | Tensor = 1.0,
    bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Apply a linear layer and its low-rank update (LoRA, Hu et al. 2021, arXiv:2106.09685, section 4.1).

    Semantics: ``y = x @ weight.T + bias + scale * (drop(x) @ lora_a.T) @ lora_b.T``

    Args:
        x (..., K): float32, bfloat16, float16 or float64; any strides, but leading dimensions that do not flatten to
            one without a copy are copied.
        weight (N, K): x's dtype; as nn.Linear stores it.
        lora_a (r, K): x's dtype or float32; rank r >= 1.
        lora_b (N, r): lora_a's dtype.
        scale: float, or 0-d floating tensor, which is never read by the host; not differentiated.
        bias (N,): x's dtype, or None.
        dropout_p: in [0, 1), quantised to 1/65536; inverted dropout on the low-rank branch's input alone.
        seed: None draws one from torch's generator of x's device; an int or a 0-d int64 tensor on x's device fixes
            it. ``lora_linear_dropout_mask`` returns the mask of a seed.
        backend: "torch", "triton" or "cuda" forces a backend; None takes ``use_backend``'s, then the variable
            PEFT_KERNELS_BACKEND, then chooses.

    Returns:
        y (..., N) in x's dtype; under autocast in the dtype that F.linear would give.

    Raises:
        ValueError: a shape, dtype, device, probability, seed or backend name is wrong.
        UnsupportedError: the forced backend cannot run this problem.

    Numerics: products accumulate in float32 (float64 for float64). Against a float64 oracle the relative error is at
    most 1.1 times that of eager torch in the same dtypes plus a quarter of the dtype's epsilon (python_ref/compare.py).
    Gradients of x, weight, lora_a, lora_b and bias are computed only where asked for, and two runs give the same bits.

    Example:
        >>> import torch, peft_kernels as pk
        >>> x, weight = torch.ones(2, 3), torch.eye(3)
        >>> pk.lora_linear(x, weight, torch.ones(1, 3), torch.ones(3, 1), scale=0.5)
        tensor([[2.5000, 2.5000, 2.5000],
                [2.5000, 2.5000, 2.5000]])
    """
    x, weight, bias, lora_a, lora_b = _autocast(x, weight, bias, lora_a, lora_b)
    limit = dropout.threshold(dropout_p)
    seed_tensor: Tensor | None = None
    if limit > 0:
        seed_tensor = dropout.draw_seed(x.device) if seed is None else dropout.as_seed(seed, x.device)
    if isinstance(scale, Tensor):
        scale = scale.to(device=x.device)

    if torch.compiler.is_compiling():
        number, tensor = (1.0, scale) if isinstance(scale, Tensor) else (scale, None)
        y, _ = torch.ops.peft_kernels.lora_linear(
            x, weight, lora_a, lora_b, number, tensor, bias, dropout_p, seed_tensor, backend
        )
        return y
    problem = describe(x, weight, lora_a, lora_b, scale, bias, dropout_p, seed_tensor)
    if not is_recorded():
        return _forward(problem, Inputs(x, weight, lora_a, lora_b, scale, bias, seed_tensor), backend)[0]
    return _LoraLinear.apply(problem, backend, x, weight, lora_a, lora_b, scale, bias, seed_tensor)


def _autocast(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """Cast what F.linear would cast; float32 adapters stay, because every backend takes them as they are."""
    dtype = autocast_dtype(x.device.type) if isinstance(x, Tensor) else None
    if dtype is None or x.dtype == torch.float64:
        return x, weight, bias, lora_a, lora_b
    if lora_a.dtype != torch.float32:
        lora_a, lora_b = lora_a.to(dtype), lora_b.to(dtype)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), lora_a, lora_b


def _implementation(problem: LoraLinearProblem, backend: str | None) -> Implementation:
    chosen = choose(FAMILY, IMPLEMENTATIONS, problem, requested_backend(backend))
    # With nothing to multiply there is nothing to launch; torch knows what empty products are.
    return torch_impl.IMPLEMENTATION if problem.is_empty else chosen


def _forward(problem: LoraLinearProblem, inputs: Inputs, backend: str | None) -> tuple[Tensor, Tensor]:
    flat = inputs._replace(x=inputs.x.reshape(problem.m, problem.k))
    with without_autocast(problem.device.type):
        y, s = _implementation(problem, backend).forward(problem, flat)
    return y.view(*inputs.x.shape[:-1], problem.n), s


def _backward(
    problem: LoraLinearProblem, inputs: Inputs, s: Tensor, dy: Tensor, needs: Needs, backend: str | None
) -> Gradients:
    flat = inputs._replace(x=inputs.x.reshape(problem.m, problem.k))
    with without_autocast(problem.device.type):
        gradients = _implementation(problem, backend).backward(
            problem, flat, s, dy.reshape(problem.m, problem.n), needs
        )
    return gradients if gradients.x is None else gradients._replace(x=gradients.x.view(inputs.x.shape))


class _LoraLinear(torch.autograd.Function):
    """Eager calls: the direct launch, with x, S and the seed saved, besides the parameters."""

    @staticmethod
    def forward(
        ctx: Any,
        problem: LoraLinearProblem,
        backend: str | None,
        x: Tensor,
        weight: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        scale: float | Tensor,
        bias: Tensor | None,
        seed: Tensor | None,
    ) -> Tensor:
        y, s = _forward(problem, Inputs(x, weight, lora_a, lora_b, scale, bias, seed), backend)
        if any(ctx.needs_input_grad):
            number, tensor = (1.0, scale) if isinstance(scale, Tensor) else (scale, None)
            # The forward pass's choice holds for the backward pass, which may run outside a use_backend block.
            ctx.problem, ctx.backend, ctx.scale = problem, requested_backend(backend), number
            ctx.save_for_backward(x, weight, lora_a, lora_b, tensor, seed, s)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_a, lora_b, tensor, seed, s = ctx.saved_tensors
        needs_input = ctx.needs_input_grad[2:]
        needs = Needs(
            x=needs_input[0], weight=needs_input[1], lora_a=needs_input[2], lora_b=needs_input[3], bias=needs_input[5]
        )
        inputs = Inputs(x, weight, lora_a, lora_b, ctx.scale if tensor is None else tensor, None, seed)
        grads = _backward(ctx.problem, inputs, s, dy, needs, ctx.backend)
        return None, None, grads.x, grads.weight, grads.lora_a, grads.lora_b, None, grads.bias, None


def _operator(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    scale_tensor: Tensor | None,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    factor = scale if scale_tensor is None else scale_tensor
    problem = describe(x, weight, lora_a, lora_b, factor, bias, dropout_p, seed)
    return _forward(problem, Inputs(x, weight, lora_a, lora_b, factor, bias, seed), backend)


def _operator_fake(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    scale_tensor: Tensor | None,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    factor = scale if scale_tensor is None else scale_tensor
    problem = describe(x, weight, lora_a, lora_b, factor, bias, dropout_p, seed)
    y = x.new_empty((*x.shape[:-1], problem.n))
    return y, x.new_empty((problem.m, problem.r), dtype=problem.wide_dtype)


def _operator_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    scale_tensor: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    s: Tensor,
    needs: list[bool],
    backend: str | None,
) -> Gradients:
    factor = scale if scale_tensor is None else scale_tensor
    problem = describe(x, weight, lora_a, lora_b, factor, None, dropout_p, seed)
    return _backward(problem, Inputs(x, weight, lora_a, lora_b, factor, None, seed), s, dy, Needs(*needs), backend)


def _operator_backward_fake(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    scale_tensor: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    s: Tensor,
    needs: list[bool],
    backend: str | None,
) -> Gradients:
    # Not empty_like, which would keep the strides of a transposed or expanded input.
    like = (x, weight, lora_a, lora_b, weight)
    shapes = (x.shape, weight.shape, lora_a.shape, lora_b.shape, weight.shape[:1])
    return Gradients(
        *(tensor.new_empty(shape) if need else None for tensor, shape, need in zip(like, shapes, needs, strict=True))
    )


_COMMON = "Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, float scale, Tensor? scale_tensor"
_FORWARD = library.define(
    f"lora_linear({_COMMON}, Tensor? bias, float dropout_p, Tensor? seed, str? backend) -> (Tensor, Tensor)",
    _operator,
    _operator_fake,
)
library.define(
    f"lora_linear_backward(Tensor dy, {_COMMON}, float dropout_p, Tensor? seed, Tensor s, bool[] needs, str? backend)"
    " -> (Tensor?, Tensor?, Tensor?, Tensor?, Tensor?)",
    _operator_backward,
    _operator_backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, lora_a, lora_b, ctx.scale, scale_tensor, _, ctx.dropout_p, seed, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, lora_a, lora_b, scale_tensor, seed, output[1])


def _registered_backward(ctx: Any, dy: Tensor | None, ds: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 10
    x, weight, lora_a, lora_b, scale_tensor, seed, s = ctx.saved_tensors
    needed = ctx.needs_input_grad
    needs = [*needed[:4], needed[6]]
    dx, dweight, da, db, dbias = torch.ops.peft_kernels.lora_linear_backward(
        dy, x, weight, lora_a, lora_b, ctx.scale, scale_tensor, ctx.dropout_p, seed, s, needs, ctx.backend
    )
    return dx, dweight, da, db, None, None, dbias, None, None, None


library.register_autograd(_FORWARD, _registered_backward, _setup_context)
