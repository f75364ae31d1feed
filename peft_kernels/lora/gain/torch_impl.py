"""LoRA linear with a gain, with torch alone.

Forward   S = drop(x) A^T;  P = x W^T;  y = bias + scale S (g * B)^T;  y += g * P, in one pass that P's bits come from
Backward  dS = scale dY (g * B);  dA = dS^T drop(x);  T = scale dY^T S;  dB = g * T;  dbias = sum dY
          dX = dY (g * W) + drop'(dS A), or (g * dY) W where that has fewer elements
          dg = sum over rows of dY * P + sum over ranks of T * B
Tensors   as problem.Inputs; S (M, r) float32, or float64 with x; P (M, N) in x's dtype
Saved     x, S, P and the seed. Not y, from which P and the update could be had again: a caller may write to y, a gain
          of zero has nothing left of them, and where |bias| is more than |g P| their bits are gone
Temporary g * W or g * dY in x's dtype; one activation in the adapters' dtype, a block of rows at a time, where adapters
          or the gain are float32 beside half precision
Refused   nothing
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from peft_kernels._core.dispatch import Implementation
from peft_kernels.lora.gain.problem import Gradients, Inputs, LoraGainProblem, Needs
from peft_kernels.lora.kernels.config import torch_rows_per_block, writes_update_first
from peft_kernels.lora.linear import torch_steps as steps
from peft_kernels.lora.linear.problem import Needs as LinearNeeds


def forward(problem: LoraGainProblem, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Return y (M, N), S (M, r) and P (M, N)."""
    s = steps.down(problem, inputs.linear(None))
    product = steps.base(inputs.x, inputs.weight, None)
    return _sum(problem, inputs, s, product), s.to(problem.wide_dtype), product


def _sum(problem: LoraGainProblem, inputs: Inputs, s: Tensor, product: Tensor) -> Tensor:
    """y; where x and the adapters have one dtype it begins as the update, which is small, and else is rounded once."""
    gain, bias, dtype = inputs.gain, inputs.bias, problem.dtype
    has_one_dtype = problem.adapter_dtype == dtype
    if has_one_dtype and steps.adds_base_last(problem) and writes_update_first(dtype, dtype, bias is not None):
        b = times_rows(problem, inputs.lora_b, gain)
        y = steps.update_of(problem, s, b.t(), inputs.scale, bias)
        for rows in _blocks(problem, y):
            y[rows].addcmul_(product[rows], gain)
        return y
    y, wide = torch.empty_like(product), problem.wide_dtype
    b = (inputs.lora_b.to(wide) * gain.to(wide)[:, None] * inputs.scale).t()
    for rows in steps.blocks(problem, problem.n):
        part = s[rows].to(wide) @ b
        if bias is not None:
            part.add_(bias)
        y[rows] = part.addcmul_(product[rows], gain)
    return y


def backward(
    problem: LoraGainProblem, inputs: Inputs, s: Tensor | None, product: Tensor | None, dy: Tensor, needs: Needs
) -> Gradients:
    """Return the gradients that ``needs`` asks for."""
    gain, dx, da, ds, t = inputs.gain, None, None, None, None
    if needs.x or needs.lora_a or needs.lora_b or needs.gain:
        ds, t = _grad_up(problem, inputs, s, dy, needs)
    scaled = scaled_gradient(problem, dy, gain, needs)
    if ds is not None:
        call, asked = inputs.linear(None), LinearNeeds(needs.x, False, needs.lora_a, False, False)
        if needs.x and steps.adds_base_last(problem) and not problem.has_dropout:
            factors = base_factors(problem, inputs, dy, scaled)
            dx = steps.update_of(problem, ds, inputs.lora_a, 1.0, None).addmm_(*factors)
            da = steps.grad_down(problem, call, ds, None, asked)
        else:
            dx = steps.base_gradient(*base_factors(problem, inputs, dy, scaled)) if needs.x else None
            da = steps.grad_down(problem, call, ds, dx, asked)
    return Gradients(
        x=dx,
        weight=scaled.t() @ inputs.x if scaled is not None and needs.weight else None,
        lora_a=da,
        lora_b=grad_b(problem, gain, t) if needs.lora_b else None,
        gain=grad_gain(problem, column_sums(problem, dy, product), inputs.lora_b, t) if needs.gain else None,
        bias=dy.sum(0) if needs.bias else None,
    )


def grad_b(problem: LoraGainProblem, gain: Tensor, t: Tensor | None) -> Tensor:
    """dB = g * T."""
    assert t is not None
    wide = problem.wide_dtype
    return (t.to(wide) * gain.to(wide)[:, None]).to(problem.adapter_dtype)


def grad_gain(problem: LoraGainProblem, of_product: Tensor, lora_b: Tensor, t: Tensor | None) -> Tensor:
    """dg from the sums over rows of dY * P: where T = scale dY^T S is there, those of the update cost nothing."""
    assert t is not None
    wide = problem.wide_dtype
    return of_product.add_((t.to(wide) * lora_b.to(wide)).sum(1)).to(problem.gain_dtype)


def base_factors(problem: Any, inputs: Any, dy: Tensor, scaled: Tensor | None) -> tuple[Tensor, Tensor]:
    """The factors of dX's product, the smaller of which the gain multiplies; ``scaled`` as below."""
    if _scales_gradient(problem):
        assert scaled is not None
        return scaled, inputs.weight
    weight = inputs.weight
    return dy, times_rows(problem, weight, inputs.gain, weight if inputs.has_own_weight else None)


def scaled_gradient(problem: Any, dy: Tensor, gain: Tensor, needs: Any) -> Tensor | None:
    """gain * dY, (M, N) in dY's dtype, rounded once, where a product takes it."""
    return times_columns(problem, dy, gain) if needs.weight or (needs.x and _scales_gradient(problem)) else None


def times_columns(problem: Any, activation: Tensor, gain: Tensor) -> Tensor:
    """gain * activation, (M, N) in the activation's dtype, rounded once."""
    out = torch.empty_like(activation)
    for rows in _blocks(problem, activation):
        torch.mul(activation[rows], gain, out=out[rows])
    return out


def _scales_gradient(problem: Any) -> bool:
    """Whether the gain multiplies dY (M, N) on its way to dX, and not the weight (N, K)."""
    return problem.m < problem.k


def times_rows(problem: Any, matrix: Tensor, gain: Tensor, out: Tensor | None = None) -> Tensor:
    """gain * matrix, (N, any) in the matrix's dtype, rounded once; ``out`` may be the matrix."""
    out = torch.empty_like(matrix) if out is None else out
    step = max(1, problem.n) if _casts_nothing(problem, matrix) else torch_rows_per_block(matrix.shape[1], "cpu")
    for first in range(0, problem.n, step):
        rows = slice(first, first + step)
        torch.mul(matrix[rows], gain[rows, None], out=out[rows])
    return out


def _grad_up(
    problem: LoraGainProblem, inputs: Inputs, s: Tensor | None, dy: Tensor, needs: Needs
) -> tuple[Tensor | None, Tensor | None]:
    """dS = scale dY (g * B), where x or lora_a needs it, and T = scale dY^T S, which dB and dg are made of.

    The scale meets factors of rank size before they are rounded, but for float16, whose range is eager's in its order.
    """
    wide, has_one_dtype = problem.wide_dtype, problem.adapter_dtype == problem.dtype
    needs_t, t_is_wide = needs.lora_b or needs.gain, has_one_dtype and problem.gain_dtype != problem.dtype
    scales_first = problem.dtype != torch.float16 or not has_one_dtype or t_is_wide
    b = None
    if needs.x or needs.lora_a:
        scaled = inputs.lora_b.to(wide) * inputs.gain.to(wide)[:, None]
        b = (scaled * inputs.scale if scales_first else scaled).to(problem.adapter_dtype)
    call = inputs.linear(b)
    asked = LinearNeeds(needs.x, False, needs.lora_a, needs_t and not t_is_wide, False)
    ds, t = steps.grad_up(problem, call._replace(scale=1.0) if scales_first else call, s, dy, asked)
    if t_is_wide and needs_t:
        t = _wide_product(problem, s, dy)
    return ds, t if t is None or not scales_first else t.to(wide) * inputs.scale


def _wide_product(problem: LoraGainProblem, s: Tensor | None, dy: Tensor) -> Tensor:
    """dY^T S in float32, as eager torch has what a float32 gain has met."""
    assert s is not None
    total = torch.zeros(problem.r, problem.n, dtype=s.dtype, device=problem.device)
    for rows in steps.blocks(problem, problem.n):
        total.addmm_(s[rows].t(), dy[rows].to(s.dtype))
    return total.t()


def column_sums(problem: Any, dy: Tensor, product: Tensor | None) -> Tensor:
    """Sums over rows of dY * P, float32 or float64: a block after another, so that two runs give the same bits."""
    assert product is not None
    wide = problem.wide_dtype
    total = torch.zeros(problem.n, dtype=wide, device=problem.device)
    for rows in steps.blocks(problem, problem.n):
        total += (dy[rows].to(wide) * product[rows]).sum(0)
    return total


def _blocks(problem: Any, matrix: Tensor) -> Iterable[slice]:
    """Rows of an activation that an operation with the gain may take at a time."""
    return (slice(None),) if _casts_nothing(problem, matrix) else steps.blocks(problem, problem.n)


def _casts_nothing(problem: Any, matrix: Tensor) -> bool:
    """Whether torch makes no copy of a matrix of another dtype than the gain's, as it does on a CPU."""
    return problem.gain_dtype == matrix.dtype or problem.device.type != "cpu"


IMPLEMENTATION = Implementation("torch", forward, backward)
