"""LoRA linear with torch alone, as a very good user would write it: a backend in its own right, on any device.

Forward   y = x W^T + bias;  S = drop(x) A^T;  y += scale S B^T, in place
Backward  dS = scale dY B;  dB = scale dY^T S;  dX = dY W + drop'(dS A);  dA = dS^T drop(x)
Tensors   as problem.Inputs; S (M, r) float32, or float64 with x
Saved     x, S and the seed; never a mask, never a dropped or cast copy of x
Temporary what dropout or float32 adapters on a half-precision x need is made for a block of rows at a time
Refused   nothing
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels._core.dispatch import Implementation
from peft_kernels.lora.kernels import dropout
from peft_kernels.lora.kernels.config import torch_rows_per_block
from peft_kernels.lora.linear.problem import Gradients, Inputs, LoraLinearProblem, Needs


def forward(problem: LoraLinearProblem, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return y (M, N) and S (M, r)."""
    y = F.linear(inputs.x, inputs.weight, inputs.bias)
    s = _down(problem, inputs)
    _add_product(y, s, inputs.lora_b.t(), inputs.scale)
    return y, s


def backward(problem: LoraLinearProblem, inputs: Inputs, s: Tensor, dy: Tensor, needs: Needs) -> Gradients:
    """Return the gradients that ``needs`` asks for."""
    x, weight = inputs.x, inputs.weight
    dx = dy @ weight if needs.x else None
    da = db = None
    if needs.x or needs.lora_a or needs.lora_b:
        ds, db = _grad_up(problem, inputs, s, dy, needs)
        if ds is not None:
            da = _grad_down(problem, inputs, ds, dx, needs)
    return Gradients(
        x=dx,
        weight=dy.t() @ x if needs.weight else None,
        lora_a=da,
        lora_b=db,
        bias=dy.sum(0) if needs.bias else None,
    )


def _is_uniform(problem: LoraLinearProblem) -> bool:
    """Whether adapters and activations have one dtype, so that whole matrices multiply without a cast."""
    return problem.adapter_dtype == problem.dtype


def _blocks(problem: LoraLinearProblem, width: int) -> Iterator[slice]:
    rows = torch_rows_per_block(width, problem.device.type)
    for start in range(0, problem.m, rows):
        yield slice(start, min(start + rows, problem.m))


def _keep_bits(problem: LoraLinearProblem, inputs: Inputs, rows: slice) -> Tensor | None:
    if inputs.seed is None:
        return None
    return dropout.keep_bits(inputs.seed, rows.start, rows.stop - rows.start, problem.k, problem.dropout_threshold)


def _dropped(problem: LoraLinearProblem, inputs: Inputs, rows: slice, bits: Tensor | None) -> Tensor:
    """drop(x) of some rows in the adapters' dtype, without the factor 1 / (1 - p)."""
    x = inputs.x[rows].to(problem.adapter_dtype)
    return x if bits is None else dropout.drop(x, bits)


def _down(problem: LoraLinearProblem, inputs: Inputs) -> Tensor:
    """S = drop(x) A^T."""
    wide, a = problem.wide_dtype, inputs.lora_a.t()
    if _is_uniform(problem) and not problem.has_dropout:
        return (inputs.x @ a).to(wide)
    s = torch.empty(problem.m, problem.r, dtype=wide, device=problem.device)
    for rows in _blocks(problem, problem.k):
        s[rows] = _dropped(problem, inputs, rows, _keep_bits(problem, inputs, rows)) @ a
    return s.mul_(problem.keep_scale) if problem.has_dropout else s


def _grad_up(
    problem: LoraLinearProblem, inputs: Inputs, s: Tensor, dy: Tensor, needs: Needs
) -> tuple[Tensor | None, Tensor | None]:
    """dS = scale dY B where x or lora_a needs it, and dB = scale dY^T S."""
    needs_ds = needs.x or needs.lora_a
    b, scale = inputs.lora_b, inputs.scale
    if _is_uniform(problem):
        ds = (dy @ b).to(s.dtype).mul_(scale) if needs_ds else None
        db = dy.t() @ (s * scale).to(dy.dtype) if needs.lora_b else None
        return ds, db
    wide_b = b.to(s.dtype)
    ds = torch.empty_like(s) if needs_ds else None
    db = torch.zeros_like(wide_b) if needs.lora_b else None
    for rows in _blocks(problem, problem.n):
        block = dy[rows].to(s.dtype)
        if ds is not None:
            torch.mm(block, wide_b, out=ds[rows])
        if db is not None:
            db.addmm_(block.t(), s[rows])
    return None if ds is None else ds.mul_(scale), None if db is None else db.mul_(scale)


def _grad_down(
    problem: LoraLinearProblem, inputs: Inputs, ds: Tensor, dx: Tensor | None, needs: Needs
) -> Tensor | None:
    """dA = dS^T drop(x), and dX += drop'(dS A) in place; one draw of the mask serves both."""
    if not problem.has_dropout:
        if dx is not None:
            _add_product(dx, ds, inputs.lora_a, 1.0)
        if not needs.lora_a:
            return None
        if _is_uniform(problem):
            return ds.to(inputs.x.dtype).t() @ inputs.x
    narrow = (ds * problem.keep_scale).to(problem.adapter_dtype)
    da = torch.zeros_like(inputs.lora_a, dtype=ds.dtype) if needs.lora_a else None
    for rows in _blocks(problem, problem.k):
        bits = _keep_bits(problem, inputs, rows)
        if dx is not None and bits is not None:
            dx[rows] += dropout.drop_(narrow[rows] @ inputs.lora_a, bits)
        if da is not None:
            da += narrow[rows].t() @ _dropped(problem, inputs, rows, bits)
    return None if da is None else da.to(problem.adapter_dtype)


def _add_product(out: Tensor, left: Tensor, right: Tensor, scale: float | Tensor) -> None:
    """out += scale left right, in place, in out's dtype."""
    if isinstance(scale, Tensor):
        left, scale = left * scale, 1.0
    out.addmm_(left.to(out.dtype), right.to(out.dtype), alpha=scale)


IMPLEMENTATION = Implementation("torch", forward, backward)
