"""The public function, its autograd, and its registration with torch.library. The only file that knows autograd.

Eager calls go through ``_PrefixAttention``; compiled ones through the operators ``peft_kernels::prefix`` and
``peft_kernels::prefix_backward``. Both end in ``_forward`` and ``_backward``.
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
from peft_kernels.prefix import torch_impl, triton_impl
from peft_kernels.prefix.problem import (
    FAMILY,
    Gradients,
    Inputs,
    Needs,
    PrefixAttentionProblem,
    default_scale,
    describe,
)

# In the order that `auto` tries them; the last one runs everything.
IMPLEMENTATIONS: tuple[Implementation, ...] = (triton_impl.IMPLEMENTATION, torch_impl.IMPLEMENTATION)


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attend to a prefix and a sequence in two pieces (prefix tuning, Li & Liang 2021, arXiv:2101.00190).

    Semantics: ``y = softmax(scale * q @ cat(prefix_k, k).mT + mask) @ cat(prefix_v, v)`` per head, where query head h
    reads key head ``h // (H // H_kv)`` and ``mask`` is -inf where a query may not attend. Every query attends to every
    key of the prefix. Causal: query i attends to the keys j <= i + L - S of the sequence (aligned at the lower right).
    A query that may attend to nothing, which takes P = 0, gives zeros and adds nothing to any gradient.

    Args:
        q (B, H, S, D): float32, bfloat16, float16 or float64. Strides are free; a tensor whose last dimension is not
            contiguous is copied, here and below.
        k, v (B, H_kv, L, D): q's dtype; H_kv divides H.
        prefix_k, prefix_v (H_kv, P, D), one for the whole batch, or (B, H_kv, P, D): q's dtype, or float32 beside
            half precision, then cast to q's for the products.
        causal: whether queries see only what is not after them.
        scale: float; None is D ** -0.5. Not differentiated.
        key_padding_mask (B, L): bool, True where a key of the sequence may be attended to; None is everywhere. Masked
            keys and values must be finite.
        backend: "torch", "triton" or "cuda" forces a backend; None takes ``use_backend``'s, then the variable
            PEFT_KERNELS_BACKEND, then chooses. A compiled call keeps what was in force when it was traced, and a
            backward pass has its forward pass's.

    Returns:
        y (B, H, S, D) in q's dtype; under autocast in the dtype that F.scaled_dot_product_attention would give.

    Raises:
        ValueError: a shape, dtype, device, scale or backend name is wrong.
        UnsupportedError: the forced backend cannot run this problem.

    Numerics: scores, softmax and sums are float32 (float64 for float64). Against a float64 oracle the relative error is
    at most 1.1 times that of torch's math attention in the same dtypes plus a quarter of the dtype's epsilon
    (python_ref/compare.py). Gradients of q, k, v, prefix_k and prefix_v are computed only where asked for; a shared
    prefix's is summed over the batch in float32. Two runs give the same bits; but dq of the torch backend on CUDA in
    half precision does so only under torch.use_deterministic_algorithms(True), as torch's own attention.

    Memory: saved besides the arguments are, by Triton, y and two numbers a query and head; by torch, nothing. Triton
    joins nothing; torch joins keys and values for the length of a pass. Neither holds S (P + L) scores.

    Example:
        >>> import torch, peft_kernels as pk
        >>> q, k, v = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), torch.ones(1, 1, 2, 4)
        >>> prefix_k, prefix_v = torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)
        >>> pk.prefix_attention(q, k, v, prefix_k, prefix_v, causal=True)[0, 0, :, 0]
        tensor([0.3333, 0.5000])
    """
    dtype = autocast_dtype(q.device.type) if isinstance(q, Tensor) else None
    if dtype is not None and q.dtype != torch.float64:
        # A float32 prefix stays, because it is cast for the products alone and its gradient is not rounded.
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        prefix_k, prefix_v = (p if p.dtype == torch.float32 else p.to(dtype) for p in (prefix_k, prefix_v))

    if torch.compiler.is_compiling():
        factor = default_scale(q.shape[-1]) if scale is None else scale
        y, _ = torch.ops.peft_kernels.prefix_attention(
            q, k, v, prefix_k, prefix_v, causal, factor, key_padding_mask, _backend_of_graph(backend)
        )
        return y
    problem = describe(q, k, v, prefix_k, prefix_v, causal, scale, key_padding_mask)
    if not is_recorded():
        inputs = Inputs(q, k, v, prefix_k, prefix_v, key_padding_mask)
        return _forward(problem, inputs, _implementation(problem, backend))[0]
    return _PrefixAttention.apply(problem, backend, q, k, v, prefix_k, prefix_v, key_padding_mask)


def _backend_of_graph(backend: str | None) -> str:
    """The backend in force while a graph is traced: what the forward pass keeps is for its own backward pass alone."""
    return requested_backend(backend)


# What torch.compiler.assume_constant_result does; but that imports torch's compiler, and Triton with it.
_backend_of_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _implementation(problem: PrefixAttentionProblem, backend: str | None) -> Implementation:
    chosen = choose(FAMILY, IMPLEMENTATIONS, problem, requested_backend(backend))
    # Without a query or a key there is nothing to launch; the torch backend knows what is left.
    return torch_impl.IMPLEMENTATION if problem.is_empty else chosen


def _as_backends_take(problem: PrefixAttentionProblem, inputs: Inputs) -> Inputs:
    return Inputs(
        q=_contiguous_rows(inputs.q),
        k=_contiguous_rows(inputs.k),
        v=_contiguous_rows(inputs.v),
        prefix_k=_contiguous_rows(inputs.prefix_k.to(problem.dtype)),
        prefix_v=_contiguous_rows(inputs.prefix_v.to(problem.dtype)),
        key_padding_mask=inputs.key_padding_mask,
    )


def _contiguous_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def _statistics_shape(problem: PrefixAttentionProblem, implementation: Implementation) -> tuple[int, ...]:
    """Of what a forward pass keeps beside y; the torch backend keeps neither."""
    return (0,) if implementation.name == "torch" else (2, problem.b, problem.h, problem.s)


def _kept(y: Tensor, stats: Tensor) -> tuple[Tensor | None, Tensor]:
    """What of a forward pass's results its backward pass reads."""
    return (y if stats.dim() > 1 else None), stats


def _forward(problem: PrefixAttentionProblem, inputs: Inputs, implementation: Implementation) -> tuple[Tensor, Tensor]:
    with without_autocast(problem.device.type):
        y, stats = implementation.forward(problem, _as_backends_take(problem, inputs))
    return y, stats


def _backward(
    problem: PrefixAttentionProblem,
    inputs: Inputs,
    kept: tuple[Tensor | None, Tensor],
    dy: Tensor,
    needs: Needs,
    implementation: Implementation,
) -> Gradients:
    with without_autocast(problem.device.type):
        taken = _as_backends_take(problem, inputs)
        gradients: Gradients = implementation.backward(problem, taken, *kept, _contiguous_rows(dy), needs)
    return gradients


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        problem: PrefixAttentionProblem,
        backend: str | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prefix_k: Tensor,
        prefix_v: Tensor,
        key_padding_mask: Tensor | None,
    ) -> Tensor:
        inputs = Inputs(q, k, v, prefix_k, prefix_v, key_padding_mask)
        implementation = _implementation(problem, backend)
        y, stats = _forward(problem, inputs, implementation)
        # Another backend may be in force when the backward pass runs; the statistics are this one's.
        ctx.problem, ctx.implementation = problem, implementation
        ctx.save_for_backward(*inputs, *_kept(y, stats))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, y, stats = ctx.saved_tensors
        needs = Needs(*ctx.needs_input_grad[2:7])
        grads = _backward(ctx.problem, Inputs(*inputs), (y, stats), dy, needs, ctx.implementation)
        return None, None, *grads, None


def _operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    causal: bool,
    scale: float,
    key_padding_mask: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    problem = describe(q, k, v, prefix_k, prefix_v, causal, scale, key_padding_mask)
    inputs = Inputs(q, k, v, prefix_k, prefix_v, key_padding_mask)
    return _forward(problem, inputs, _implementation(problem, backend))


def _operator_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    causal: bool,
    scale: float,
    key_padding_mask: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    problem = describe(q, k, v, prefix_k, prefix_v, causal, scale, key_padding_mask)
    shape = _statistics_shape(problem, _implementation(problem, backend))
    return q.new_empty(q.shape), q.new_empty(shape, dtype=problem.wide_dtype)


def _operator_backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    causal: bool,
    scale: float,
    key_padding_mask: Tensor | None,
    y: Tensor | None,
    stats: Tensor,
    needs: list[bool],
    backend: str,
) -> Gradients:
    problem = describe(q, k, v, prefix_k, prefix_v, causal, scale, key_padding_mask)
    inputs = Inputs(q, k, v, prefix_k, prefix_v, key_padding_mask)
    return _backward(problem, inputs, (y, stats), dy, Needs(*needs), _implementation(problem, backend))


def _operator_backward_fake(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    causal: bool,
    scale: float,
    key_padding_mask: Tensor | None,
    y: Tensor | None,
    stats: Tensor,
    needs: list[bool],
    backend: str,
) -> Gradients:
    # Not empty_like, which would keep the strides of a transposed or expanded input.
    like = (q, k, v, prefix_k, prefix_v)
    return Gradients(
        *(tensor.new_empty(tensor.shape) if need else None for tensor, need in zip(like, needs, strict=True))
    )


_COMMON = (
    "Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, bool causal, float scale, Tensor? key_padding_mask"
)
_FORWARD = library.define(
    f"prefix_attention({_COMMON}, str backend) -> (Tensor, Tensor)",
    _operator,
    _operator_fake,
)
library.define(
    f"prefix_attention_backward(Tensor dy, {_COMMON}, Tensor? y, Tensor stats, bool[] needs, str backend)"
    " -> (Tensor?, Tensor?, Tensor?, Tensor?, Tensor?)",
    _operator_backward,
    _operator_backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.causal, ctx.scale, key_padding_mask, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, key_padding_mask, *_kept(*output))


def _registered_backward(ctx: Any, dy: Tensor | None, dstats: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 9
    *tensors, key_padding_mask, y, stats = ctx.saved_tensors
    grads = torch.ops.peft_kernels.prefix_attention_backward(
        dy, *tensors, ctx.causal, ctx.scale, key_padding_mask, y, stats, list(ctx.needs_input_grad[:5]), ctx.backend
    )
    return *grads, None, None, None, None


library.register_autograd(_FORWARD, _registered_backward, _setup_context)
