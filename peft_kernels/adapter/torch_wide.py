"""The bottleneck adapter by torch's products in a wider dtype than x's: float32 weights, or a float16 that is slow.

Equation  as torch_impl.py
Tensors   as problem.Inputs; z (M, r) float32
Saved     x and z
Temporary weights in float32; and float32 copies of a block of rows of x, the residual and dy, each cast once a pass
Refused   nothing
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from peft_kernels.adapter.kernels.activations import ACTIVATIONS
from peft_kernels.adapter.kernels.config import torch_rows_per_block
from peft_kernels.adapter.problem import BottleneckAdapterProblem, Gradients, Inputs, Needs


def write_forward(problem: BottleneckAdapterProblem, inputs: Inputs, y: Tensor) -> Tensor:
    """Write y (M, N) and return z (M, r)."""
    act, wide = ACTIVATIONS[problem.activation].value, problem.wide_dtype
    residual = inputs.x if problem.serial else inputs.residual
    z = torch.empty(problem.m, problem.r, dtype=wide, device=problem.device)
    down, up = inputs.down_weight.to(wide).t(), inputs.up_weight.to(wide).t()
    down_bias, up_bias = (None if bias is None else bias.to(wide) for bias in (inputs.down_bias, inputs.up_bias))
    if up_bias is not None:
        up_bias = up_bias * inputs.scale
    for rows in _blocks(problem):
        x = inputs.x[rows].to(wide)
        if down_bias is None:
            torch.mm(x, down, out=z[rows])
        else:
            torch.addmm(down_bias, x, down, out=z[rows])
        # Copies both: what is changed in place is nobody's.
        if residual is None:
            branch = x.new_zeros(x.shape[0], problem.n)
        elif problem.serial:
            branch = x if x.dtype != inputs.x.dtype else x.clone()
        else:
            branch = residual[rows].to(wide, copy=True)
        if up_bias is not None:
            branch += up_bias
        h = act(z[rows])
        if isinstance(inputs.scale, Tensor):
            branch.addmm_(h * inputs.scale, up)
        else:
            branch.addmm_(h, up, alpha=inputs.scale)
        y[rows] = branch
    return z


def write_backward(
    problem: BottleneckAdapterProblem, inputs: Inputs, z: Tensor, dy: Tensor, needs: Needs, dx: Tensor | None
) -> Gradients:
    """Write x's gradient, unless dx is None, and return all that ``needs`` asks for."""
    act, wide, scale = ACTIVATIONS[problem.activation], problem.wide_dtype, inputs.scale

    def sums(need: bool, *shape: int) -> Tensor | None:
        return torch.zeros(shape, dtype=wide, device=problem.device) if need else None

    dwd, dbd = sums(needs.down_weight, problem.r, problem.k), sums(needs.down_bias, problem.r)
    # The (r, N) product is the faster one; what is turned afterwards is only of the weight's size.
    dwu, dbu = sums(needs.up_weight, problem.r, problem.n), sums(needs.up_bias, problem.n)
    down, up = (None if weight is None else weight.to(wide) for weight in (inputs.down_weight, inputs.up_weight))
    for rows in _blocks(problem):
        dy_rows = dy[rows].to(wide)
        if dbu is not None:
            dbu += dy_rows.sum(0)
        h = act.value(z[rows]) if needs.dz or dwu is not None else z[rows]
        if dwu is not None:
            dwu.addmm_(h.t(), dy_rows)
        if not needs.dz:
            continue
        dz = act.backward(dy_rows @ up, z[rows], h).mul_(scale)
        if dbd is not None:
            dbd += dz.sum(0)
        if dwd is not None:
            dwd.addmm_(dz.t(), inputs.x[rows].to(wide))
        if dx is not None:
            dx[rows] = torch.addmm(dy_rows, dz, down) if problem.serial else dz @ down
    narrow = problem.adapter_dtype
    return Gradients(
        x=dx,
        down_weight=None if dwd is None else dwd.to(narrow),
        up_weight=None if dwu is None else dwu.t().mul(scale).to(narrow).contiguous(),
        down_bias=None if dbd is None else dbd.to(narrow),
        up_bias=None if dbu is None else dbu.mul_(scale).to(narrow),
    )


def _blocks(problem: BottleneckAdapterProblem) -> Iterator[slice]:
    rows = torch_rows_per_block(max(problem.k, problem.n), problem.device.type)
    for start in range(0, problem.m, rows):
        yield slice(start, min(start + rows, problem.m))
