"""The public function, and the declaration that makes it an operator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from peft_kernels._core.autocast import autocast_dtype, without_autocast
from peft_kernels._core.dispatch import Implementation
from peft_kernels._core.errors import UnsupportedError
from peft_kernels._core.operator import Operator
from peft_kernels._core.rows import Rows
from peft_kernels.four_bit_weight.quant_state import QuantizedWeight
from peft_kernels.lora import members
from peft_kernels.lora.four_bit.op import four_bit_call, without_rows
from peft_kernels.lora.gain.op import linear_with_gain
from peft_kernels.lora.gain_four_bit.op import four_bit_with_gain
from peft_kernels.lora.kernels import dropout, masks
from peft_kernels.lora.kernels.masks import Mask
from peft_kernels.lora.linear import cuda_impl, mask_choice, torch_impl, triton_impl
from peft_kernels.lora.linear.composite import composite
from peft_kernels.lora.linear.native import native
from peft_kernels.lora.linear.problem import NAME, Inputs, LoraLinearProblem, Needs, make_problem
from peft_kernels.lora.members import Update
from peft_kernels.lora.qualification import MASKS
from peft_kernels.lora.rows.op import linear_by_rows


def lora_linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float | Sequence[float] | Tensor = 1.0,
    bias: Tensor | None = None,
    *,
    dropout_p: float | Sequence[float] = 0.0,
    seed: int | Tensor | None = None,
    rows: Rows | None = None,
    ranks: Sequence[int] | None = None,
    gain: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Apply a linear layer and its low-rank update (LoRA, Hu et al. 2021, arXiv:2106.09685, section 4.1).

    Semantics: ``y = x @ weight.T + bias + scale * (drop(x) @ lora_a.T) @ lora_b.T``

    With ``rows`` each row has the update of its own adapter, a slot t of ``lora_a`` and ``lora_b``:
    ``y[m] = x[m] @ weight.T + bias + scale[t] * (drop(x[m]) @ lora_a[t].T) @ lora_b[t].T``, ``t = rows.slot[m]``

    With ``gain``, such as ``dora_gain`` returns (DoRA, Liu et al. 2024, arXiv:2402.09353):
    ``y = gain * (x @ weight.T + scale * (drop(x) @ lora_a.T) @ lora_b.T) + bias``

    Args:
        x (..., K): float32, bfloat16, float16 or float64; any strides, but leading dimensions that do not flatten to
            one without a copy are copied.
        weight (N, K): x's dtype; as nn.Linear stores it. Or a ``peft_kernels.four_bit.QuantizedWeight`` (QLoRA,
            Dettmers et al. 2023, arXiv:2305.14314): it is decoded to x's dtype, whatever its own is, in the forward
            pass and again in the backward pass where x needs a gradient, and what was decoded is never kept; not with
            ``rows``.
        lora_a (r, K): x's dtype or float32; rank r >= 1.
        lora_b (N, r): lora_a's dtype.
        scale: float, or 0-d floating tensor, which is never read by the host; not differentiated.
        bias (N,): x's dtype, or None.
        dropout_p: in [0, 1), quantised to 1/65536; inverted dropout on the low-rank branch's input alone.
        seed: None draws one from torch's generator of x's device; an int or a 0-d int64 tensor on x's device fixes
            it. ``lora_linear_dropout_mask`` returns the mask of a seed.
        rows: as ``Rows.of`` makes it; x has as many rows, and those that use no slot have the frozen layer's result.
            Slots' factors are under each other in lora_a (sum of ranks, K), and side by side in lora_b; scale and
            dropout_p may be one for each slot.
        ranks: with ``rows``, of each slot; 0 is an adapter that this layer does not have.
        gain (N,): x's dtype or float32, or None; not with ``rows``.
        backend: "torch", "triton" or "cuda" forces a backend; None takes ``use_backend``'s, then the variable
            PEFT_KERNELS_BACKEND, then chooses.

    Returns:
        y (..., N) in x's dtype; under autocast in the dtype that F.linear would give.

    Raises:
        ValueError: a shape, dtype, device, probability, seed or backend name is wrong.
        UnsupportedError: the forced backend cannot run this problem; or a gain with rows.

    Numerics: products accumulate in float32 (float64 for float64). Against a float64 oracle the relative error is at
    most 1.1 times that of eager torch in the same dtypes plus one epsilon of float32, or a quarter of half precision's,
    over enough values that chance evens out (``peft_kernels.testing``).
    Gradients of x, weight, lora_a, lora_b, gain and bias are computed only where asked for, and two runs give the same
    bits.

    Example:
        >>> import torch, peft_kernels as pk
        >>> x, weight = torch.ones(2, 3), torch.eye(3)
        >>> pk.lora_linear(x, weight, torch.ones(1, 3), torch.ones(3, 1), scale=0.5)
        tensor([[2.5000, 2.5000, 2.5000],
                [2.5000, 2.5000, 2.5000]])
    """
    if rows is not None:
        if gain is not None:
            raise UnsupportedError(f"{NAME}: a gain and rows; multiply the result, or call once for each slot")
        (plain,) = without_rows((weight,), NAME)
        return linear_by_rows(x, plain, lora_a, lora_b, scale, bias, rows, ranks, dropout_p, seed, backend)
    if ranks is not None:
        raise ValueError(f"{NAME}: ranks are those of the slots of rows, which is None")
    if isinstance(dropout_p, (list, tuple)):
        raise ValueError(f"{NAME}: dropout_p must be one number but with rows, got {dropout_p}")
    if isinstance(weight, QuantizedWeight):
        update = Update(0, lora_a, lora_b, scale, dropout_p, 0)  # type: ignore[arg-type]
        if gain is not None:
            return four_bit_with_gain(x, weight, bias, update, gain, seed, backend)
        (y,) = four_bit_call(x, (weight,), (bias,), (update,), seed, backend)
        return y
    x, weight, bias, lora_a, lora_b = _autocast(x, weight, bias, lora_a, lora_b)
    limit = dropout.threshold(dropout_p)  # type: ignore[arg-type]
    seed_tensor: Tensor | None = None
    if limit > 0:
        seed_tensor = dropout.draw_seed(x.device) if seed is None else dropout.as_seed(seed, x.device)
    if isinstance(scale, Tensor):
        scale = scale.to(device=x.device)
    elif isinstance(scale, bool):
        scale = float(scale)

    call = Inputs(x, weight, lora_a, lora_b, scale, bias, dropout_p, seed_tensor)  # type: ignore[arg-type]
    return OPERATOR(call, backend) if gain is None else linear_with_gain(call, gain, backend)


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


def _forward(problem: LoraLinearProblem, call: Inputs, implementation: Implementation) -> tuple[Tensor, Tensor]:
    flat = call if call.x.dim() == 2 else call._replace(x=call.x.reshape(problem.m, problem.k))
    with without_autocast(problem.device.type):
        y, s = implementation.forward(problem, flat)
    return y if flat is call else y.view(*call.x.shape[:-1], problem.n), s


def _results(problem: LoraLinearProblem, call: Inputs, implementation: Implementation) -> tuple[Tensor, Tensor]:
    y = call.x.new_empty((*call.x.shape[:-1], problem.n))
    return y, call.x.new_empty((problem.m, problem.r), dtype=problem.wide_dtype)


def _reads(needs: Needs) -> Iterable[str]:
    if needs.x or needs.lora_a:
        yield from ("seed", "lora_b")
    if needs.x:
        yield from ("weight", "lora_a")
    if needs.weight or needs.lora_a:
        yield "x"
    if needs.lora_b:
        yield "s"


def _on_masks(name: str, kind: type[Mask], why_not: Callable[[torch.device], str | None]) -> Implementation:
    """The torch backend on one kind of masks, for a machine to check."""

    def bound(run: Callable[..., Any]) -> Callable[..., Any]:
        def on_kind(*arguments: Any) -> Any:
            with mask_choice.bound_to(kind):
                return run(*arguments)

        return on_kind

    return Implementation(
        name,
        bound(torch_impl.forward),
        bound(torch_impl.backward),
        why_not=lambda problem: why_not(problem.device),
        qualification=MASKS,
    )


OPERATOR = Operator(
    name=NAME,
    call=Inputs,
    needs=Needs,
    implementations=(cuda_impl.IMPLEMENTATION, triton_impl.IMPLEMENTATION, torch_impl.IMPLEMENTATION),
    make_problem=make_problem,
    forward=_forward,
    backward=members.backward_of_one,
    results=_results,
    composite=composite,
    reads=_reads,
    checked=(
        _on_masks("triton masks", masks.TritonMask, masks.why_not_triton),
        _on_masks("cuda masks", masks.ByteMask, masks.why_not_bytes),
    ),
    varying=("m",),
    kept=("s",),
    activations=("x",),
    adds=("bias",),
    native=native,
    addressed=("x", "weight", "lora_a"),
)
