"""The bottleneck adapter with torch alone, as a very good user would write it: a backend for any device.

Forward   z = x Wd^T + bd;  h = act(z);  y = residual + scale bu;  y += scale h Wu^T, in place
Backward  dz = scale (dy Wu) * act'(z);  dx = dz Wd, and dy where x is the residual;  dWd = dz^T x;  dWu = scale dy^T h
Tensors   as problem.Inputs; z (M, r) float32, or float64 with x
Saved     x and z; h and act'(z) are made again from z, which gives every activation's derivative exactly
Temporary what float32 weights on a half-precision x need is made for a block of rows at a time
Refused   nothing
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels._core.dispatch import Implementation
from peft_kernels._core.torch_products import add_product
from peft_kernels.adapter.kernels.activations import ACTIVATIONS
from peft_kernels.adapter.kernels.config import torch_rows_per_block
from peft_kernels.adapter.problem import BottleneckAdapterProblem, Gradients, Inputs, Needs


def forward(problem: BottleneckAdapterProblem, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return y (M, N) and z (M, r)."""
    act = ACTIVATIONS[problem.activation].value
    residual = inputs.x if problem.serial else inputs.residual
    y = torch.empty(problem.m, problem.n, dtype=problem.out_dtype, device=problem.device)
    if not problem.is_mixed:
        z = F.linear(inputs.x, inputs.down_weight, inputs.down_bias)
        _up(act(z), inputs, residual, out=y)
        return y, z.to(problem.wide_dtype)
    z = torch.empty(problem.m, problem.r, dtype=problem.wide_dtype, device=problem.device)
    for rows in _blocks(problem):
        z[rows] = F.linear(inputs.x[rows].to(z.dtype), inputs.down_weight, inputs.down_bias)
        base = None if residual is None else residual[rows].to(z.dtype)
        if y.dtype == z.dtype:
            _up(act(z[rows]), inputs, base, out=y[rows])
        else:
            block = torch.empty_like(y[rows], dtype=z.dtype)
            _up(act(z[rows]), inputs, base, out=block)
            y[rows] = block
    return y, z


def backward(problem: BottleneckAdapterProblem, inputs: Inputs, z: Tensor, dy: Tensor, needs: Needs) -> Gradients:
    """Return the gradients that ``needs`` asks for; without one of down_weight ``inputs.x`` is not read."""
    act = ACTIVATIONS[problem.activation]
    # A sum's gradient has the sum's dtype, the branch's the branch's: autograd casts there too.
    dy = dy if problem.is_mixed else dy.to(problem.dtype)
    scaled, scale = dy, inputs.scale
    if dy.dtype == torch.float16 and not problem.is_mixed:
        # As eager does: between other factors the scale would meet what has left float16's range.
        scaled, scale = dy * scale, 1.0
    h = act.value(z) if needs.dz or needs.up_weight else z
    dx = dwd = dbd = dwu = dbu = None
    if needs.dz:
        dz = act.backward(_up_transposed(problem, inputs, scaled), z, h).mul_(scale)
        dbd = dz.sum(0).to(problem.adapter_dtype) if needs.down_bias else None
        dz = dz.to(problem.adapter_dtype)
        dx = _input_gradient(problem, inputs, dz, dy) if needs.x else None
        dwd = _summed_over_rows(problem, dz, inputs.x) if needs.down_weight else None
    if needs.up_weight:
        # The (r, N) product is the faster one; what is turned afterwards is only of the weight's size.
        dwu = _summed_over_rows(problem, h * scale, scaled).t().contiguous()
    dbu = _column_sums(problem, scaled).mul_(scale) if needs.up_bias else None
    return Gradients(x=dx, down_weight=dwd, up_weight=dwu, down_bias=dbd, up_bias=dbu)


def _blocks(problem: BottleneckAdapterProblem) -> Iterator[slice]:
    rows = torch_rows_per_block(max(problem.k, problem.n), problem.device.type)
    for start in range(0, problem.m, rows):
        yield slice(start, min(start + rows, problem.m))


def _up(h: Tensor, inputs: Inputs, base: Tensor | None, out: Tensor) -> None:
    """out = base + scale (h Wu^T + bu), with as few passes over ``out`` as torch has: one, or two beside a base."""
    weight, bias, scale = inputs.up_weight, inputs.up_bias, inputs.scale
    if (base is not None and base.dtype != h.dtype) or (h.dtype == torch.float16 and isinstance(scale, Tensor)):
        # No product adds into another dtype, as that of a float32 residual; h * scale might leave float16's range.
        branch = F.linear(h, weight, bias).mul_(scale)
        torch.add(branch, 0.0 if base is None else base, out=out)
        return
    weight = weight.t()
    if isinstance(scale, Tensor):
        h, bias, scale = h * scale, None if bias is None else bias * scale, 1.0
    elif bias is not None:
        bias = bias * scale
    if base is not None and bias is not None:
        add_product(torch.add(base, bias, out=out), h, weight, scale)
    elif base is not None:
        add_product(out.copy_(base), h, weight, scale)
    elif bias is None:
        # With beta = 0 what lies in ``out`` is not read.
        out.addmm_(h, weight, beta=0, alpha=scale)
    else:
        torch.addmm(bias, h, weight, alpha=scale, out=out)


def _up_transposed(problem: BottleneckAdapterProblem, inputs: Inputs, dy: Tensor) -> Tensor:
    """dy Wu (M, r), a new tensor in the wide dtype."""
    if not problem.is_mixed:
        return (dy @ inputs.up_weight).to(problem.wide_dtype)
    product = torch.empty(problem.m, problem.r, dtype=problem.wide_dtype, device=problem.device)
    for rows in _blocks(problem):
        torch.mm(dy[rows].to(product.dtype), inputs.up_weight, out=product[rows])
    return product


def _input_gradient(problem: BottleneckAdapterProblem, inputs: Inputs, dz: Tensor, dy: Tensor) -> Tensor:
    """dz Wd, with dy where x is the residual."""
    if not problem.is_mixed:
        return add_product(dy.clone(), dz, inputs.down_weight) if problem.serial else dz @ inputs.down_weight
    dx = torch.empty(problem.m, problem.k, dtype=problem.dtype, device=problem.device)
    for rows in _blocks(problem):
        block = dz[rows] @ inputs.down_weight
        dx[rows] = block.add_(dy[rows]) if problem.serial else block
    return dx


def _summed_over_rows(problem: BottleneckAdapterProblem, left: Tensor, right: Tensor) -> Tensor:
    """left^T right in the adapter's dtype; left (M, r) in the wide dtype, right (M, N or K)."""
    if not problem.is_mixed:
        return left.to(right.dtype).t() @ right
    total = torch.zeros(left.shape[1], right.shape[1], dtype=left.dtype, device=left.device)
    for rows in _blocks(problem):
        total.addmm_(left[rows].t(), right[rows].to(left.dtype))
    return total


def _column_sums(problem: BottleneckAdapterProblem, dy: Tensor) -> Tensor:
    """Sum of dy over rows in the adapter's dtype; torch accumulates half precision in float32."""
    if not problem.is_mixed:
        return dy.sum(0)
    # A sum into another dtype would copy all of dy first on a CPU.
    total = torch.zeros(problem.n, dtype=problem.adapter_dtype, device=dy.device)
    for rows in _blocks(problem):
        total += dy[rows].to(total.dtype).sum(0)
    return total


IMPLEMENTATION = Implementation("torch", forward, backward)
