"""The public function, and the declaration that makes it an operator."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels._core.autocast import autocast_dtype, without_autocast
from peft_kernels._core.dispatch import Implementation
from peft_kernels._core.graph import as_symbol
from peft_kernels._core.operator import Operator
from peft_kernels.prefix import torch_impl, triton_impl
from peft_kernels.prefix.composite import composite
from peft_kernels.prefix.native import native
from peft_kernels.prefix.problem import (
    NAME,
    Gradients,
    Inputs,
    Needs,
    PrefixAttentionProblem,
    default_scale,
    make_problem,
)


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
            PEFT_KERNELS_BACKEND, then chooses. A backward pass has its forward
            pass's.

    Returns:
        y (B, H, S, D) in q's dtype and, by torch on a CPU, in q's strides, as torch's own attention; under autocast in
        the dtype that F.scaled_dot_product_attention would give.

    Raises:
        ValueError: a shape, dtype, device, scale or backend name is wrong.
        UnsupportedError: the forced backend cannot run this problem.

    Numerics: scores, softmax and sums are float32 (float64 for float64). Against a float64 oracle the relative error is
    at most 1.1 times that of torch's math attention in the same dtypes plus one epsilon of float32, or a quarter of
    half precision's, over enough values that chance evens out (``peft_kernels.testing``). On a CPU in float32 that
    takes scores of about normal size, beyond which gradients are as exact as torch's fused attention. Gradients of q,
    k, v, prefix_k and prefix_v are computed only where asked for; a shared prefix's is summed over the batch in
    float32. Two runs give the same bits; but dq of the torch backend on CUDA in half precision does so only under
    torch.use_deterministic_algorithms(True), as torch's own attention.

    Memory: saved besides the arguments are y and, for each query and head, two numbers by Triton and one by torch on a
    CPU, in most problems, as by torch's own attention; else, by torch, nothing. Triton
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

    if scale is None and isinstance(q, Tensor):
        scale = default_scale(q.shape[-1] if q.dim() else 1)
    elif torch.compiler.is_compiling():
        q, scale = _with_changing_scale(q, scale)
    return OPERATOR(Inputs(q, k, v, prefix_k, prefix_v, causal, scale, key_padding_mask), backend)


def _with_changing_scale(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """A scale that the graph holds as a symbol goes into q, because kernels are chosen by its value."""
    symbol = as_symbol(scale, q)
    if not isinstance(symbol, Tensor):
        return q, scale
    default = default_scale(q.shape[-1])
    return q * (symbol / default), default


def _as_backends_take(problem: PrefixAttentionProblem, inputs: Inputs) -> Inputs:
    return inputs._replace(
        q=_contiguous_rows(inputs.q),
        k=_contiguous_rows(inputs.k),
        v=_contiguous_rows(inputs.v),
        prefix_k=_contiguous_rows(inputs.prefix_k.to(problem.dtype)),
        prefix_v=_contiguous_rows(inputs.prefix_v.to(problem.dtype)),
    )


def _contiguous_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def _forward(problem: PrefixAttentionProblem, call: Inputs, implementation: Implementation) -> tuple[Tensor, Tensor]:
    with without_autocast(problem.device.type):
        y, stats = implementation.forward(problem, _as_backends_take(problem, call))
    return y, stats


def _backward(
    problem: PrefixAttentionProblem,
    call: Inputs,
    kept: tuple[Tensor | None, Tensor],
    dy: Tensor,
    needs: Needs,
    implementation: Implementation,
) -> Gradients:
    with without_autocast(problem.device.type):
        taken, dy, (y, stats) = _as_backends_take(problem, call), _contiguous_rows(dy), kept
        # y stands in delta alone, which no gradient of values depends on.
        y = dy if y is None else y
        gradients: Gradients = implementation.backward(problem, taken, y, stats, dy, needs)
    return gradients


def _results(problem: PrefixAttentionProblem, call: Inputs, implementation: Implementation) -> tuple[Tensor, Tensor]:
    if implementation.name == "torch":
        return torch_impl.results(problem, call.q)
    shape = (2, problem.b, problem.h, problem.s)
    return call.q.new_empty(call.q.shape), call.q.new_empty(shape, dtype=problem.wide_dtype)


OPERATOR = Operator(
    name=NAME,
    call=Inputs,
    needs=Needs,
    implementations=(triton_impl.IMPLEMENTATION, torch_impl.IMPLEMENTATION),
    make_problem=make_problem,
    forward=_forward,
    backward=_backward,
    results=_results,
    composite=composite,
    reads=lambda needs: (*Inputs._fields, *(("y",) if needs.q or needs.k or needs.prefix_k else ()), "stats"),
    varying=("b", "s", "l"),
    checked=triton_impl.CHECKED,
    native=native,
    kept=("y", "stats"),
    keep=lambda y, stats: (y if stats.dim() > 1 else None, stats),
)
