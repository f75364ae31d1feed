"""The bottleneck adapter with torch alone, as a very good user would write it: a backend for any device.

Forward   z = x Wd^T + bd;  h = act(z);  y = residual + scale bu;  y += scale h Wu^T, in place
Backward  dz = scale (dy Wu) * act'(z);  dx = dz Wd, and dy where x is the residual;  dWd = dz^T x;  dWu = scale dy^T h
Tensors   as problem.Inputs; z (M, r) float32, or float64 with x
Saved     x and z; h and act'(z) are made again from z, which gives every activation's derivative exactly
Temporary h and an up_weight with the bias as a column, of half precision on a CPU
Refused   nothing; what is multiplied in a wider dtype than x's is torch_wide.py's
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels._core.dispatch import Implementation
from peft_kernels._core.torch_products import add_product, is_slow
from peft_kernels.adapter import torch_wide
from peft_kernels.adapter.kernels.activations import ACTIVATIONS
from peft_kernels.adapter.kernels.config import torch_turns
from peft_kernels.adapter.problem import BottleneckAdapterProblem, Gradients, Inputs, Needs


def forward(problem: BottleneckAdapterProblem, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return y (M, N) and z (M, r)."""
    y = torch.empty(problem.m, problem.n, dtype=problem.out_dtype, device=problem.device)
    return y, write_forward(problem, inputs, y)


def write_forward(problem: BottleneckAdapterProblem, inputs: Inputs, y: Tensor) -> Tensor:
    """Write y (M, N), whose rows are contiguous, and return z (M, r)."""
    if _is_wide(problem):
        return torch_wide.write_forward(problem, inputs, y)
    residual = inputs.x if problem.serial else inputs.residual
    z = _narrow(problem, inputs.x, inputs.down_weight.t(), inputs.down_bias)
    _up(ACTIVATIONS[problem.activation].value(z), inputs, residual, out=y)
    # As a compiled call has it, and every other backend.
    return z.to(problem.wide_dtype, memory_format=torch.contiguous_format)


def backward(problem: BottleneckAdapterProblem, inputs: Inputs, z: Tensor, dy: Tensor, needs: Needs) -> Gradients:
    """Return the gradients that ``needs`` asks for; without one of down_weight ``inputs.x`` is not read."""
    dx = torch.empty(problem.m, problem.k, dtype=problem.dtype, device=problem.device) if needs.x else None
    return write_backward(problem, inputs, z, dy, needs, dx)


def write_backward(
    problem: BottleneckAdapterProblem, inputs: Inputs, z: Tensor, dy: Tensor, needs: Needs, dx: Tensor | None
) -> Gradients:
    """The same, x's gradient written to dx (M, K), whose rows are contiguous; None where it is not asked for."""
    if _is_wide(problem):
        return torch_wide.write_backward(problem, inputs, z, dy, needs, dx)
    act = ACTIVATIONS[problem.activation]
    # A sum's gradient has the sum's dtype, the branch's the branch's: autograd casts there too.
    dy = dy.to(problem.dtype)
    scaled, scale = dy, inputs.scale
    if dy.dtype == torch.float16:
        # As eager does: between other factors the scale would meet what has left float16's range.
        scaled, scale = dy * scale, 1.0
    h = act.value(z) if needs.dz or needs.up_weight else z
    dwd = dbd = dwu = dbu = None
    if needs.dz:
        dh = _narrow(problem, scaled, inputs.up_weight, None).to(problem.wide_dtype)
        dz = act.backward(dh, z, h).mul_(scale)
        dbd = dz.sum(0).to(problem.adapter_dtype) if needs.down_bias else None
        dz = dz.to(problem.adapter_dtype)
        if dx is not None:
            _write_input_gradient(problem, inputs, dz, dy, dx)
        dwd = dz.t() @ inputs.x if needs.down_weight else None
    if needs.up_weight:
        # The (r, N) product is the faster one; what is turned afterwards is only of the weight's size.
        dwu = ((h * scale).to(scaled.dtype).t() @ scaled).t().contiguous()
    # torch accumulates half precision in float32.
    dbu = scaled.sum(0).mul_(scale) if needs.up_bias else None
    return Gradients(x=dx, down_weight=dwd, up_weight=dwu, down_bias=dbd, up_bias=dbu)


def _is_wide(problem: BottleneckAdapterProblem) -> bool:
    return problem.is_mixed or is_slow(problem.dtype, problem.device.type)


def _narrow(problem: BottleneckAdapterProblem, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """rows weight + bias, (M, r), a new tensor."""
    if torch_turns(problem.m, problem.r, problem.dtype, problem.device.type):
        left, right = weight.t(), rows.t()
        return (left @ right if bias is None else torch.addmm(bias[:, None], left, right)).t()
    return rows @ weight if bias is None else torch.addmm(bias, rows, weight)


def _up(h: Tensor, inputs: Inputs, base: Tensor | None, out: Tensor) -> None:
    """out = base + scale (h Wu^T + bu), with as few passes over ``out`` as torch has: one, or two beside a base."""
    weight, bias, scale = inputs.up_weight, inputs.up_bias, inputs.scale
    if (base is not None and base.dtype != h.dtype) or (h.dtype == torch.float16 and isinstance(scale, Tensor)):
        # No product adds into another dtype, as that of a float32 residual; h * scale might leave float16's range.
        branch = F.linear(h, weight, bias).mul_(scale)
        torch.add(branch, 0.0 if base is None else base, out=out)
        return
    if base is not None and bias is not None and h.dtype == torch.bfloat16 and h.device.type == "cpu":
        # A sum with a row costs torch as much as the product there; a column more of the product costs next to nothing.
        weight, bias = torch.cat((weight, bias[:, None]), dim=1), None
        h = F.pad(h, (0, 1), value=1.0)
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


def _write_input_gradient(
    problem: BottleneckAdapterProblem, inputs: Inputs, dz: Tensor, dy: Tensor, dx: Tensor
) -> None:
    """dx = dz Wd, with dy where x is the residual."""
    if problem.serial:
        add_product(dx.copy_(dy), dz, inputs.down_weight)
    else:
        torch.mm(dz, inputs.down_weight, out=dx)


IMPLEMENTATION = Implementation("torch", forward, backward)
