"""Capability record of the Triton backend, and the order of its launches. Imports the kernels only to launch them."""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch.nn.functional as F
from torch import Tensor

from peft_kernels._core import triton_tools
from peft_kernels._core.device import hardware
from peft_kernels._core.dispatch import Implementation
from peft_kernels._core.torch_products import add_product
from peft_kernels.lora.gain import qualification
from peft_kernels.lora.gain.problem import Gradients, Inputs, LoraGainProblem, Needs
from peft_kernels.lora.gain.torch_impl import base_factors, grad_b, grad_gain, scaled_gradient, times_rows
from peft_kernels.lora.kernels import config
from peft_kernels.lora.kernels.dropout import NO_DROPOUT
from peft_kernels.lora.linear.triton_impl import Launches, why_not


def forward(problem: LoraGainProblem, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Return y (M, N), S (M, r) float32 and P = x W^T (M, N)."""
    launches = Launches.of(problem, inputs.linear(inputs.lora_b))
    s = launches.narrow_product(inputs.x, inputs.lora_a, problem.keep_scale, launches.dropout)
    product = F.linear(inputs.x, inputs.weight)
    chosen = triton_tools.chosen(config.rank_product_config, problem.dtype, launches.hardware)
    term = launches.fwd.RankProduct(s, inputs.lora_b, inputs.scale)
    gain, bias = inputs.gain.contiguous(), None if inputs.bias is None else inputs.bias.contiguous()
    return _kernels().gain_rank_product(product, term, gain, bias, chosen), s, product


def backward(
    problem: LoraGainProblem, inputs: Inputs, s: Tensor | None, product: Tensor | None, dy: Tensor, needs: Needs
) -> Gradients:
    """Return the gradients that ``needs`` asks for."""
    gain, needs_ds = inputs.gain, needs.x or needs.lora_a
    b = times_rows(problem, inputs.lora_b, gain) if needs_ds else None
    launches = Launches.of(problem, inputs.linear(b))
    ds, t, dbias, sums = _narrow_and_reduce(problem, launches, inputs, b, s, product, dy, needs)
    scaled = scaled_gradient(problem, dy, gain, needs)
    dx = da = None
    if ds is not None and needs.x:
        dx = launches.rank_product(problem.dtype, (ds, inputs.lora_a.t(), 1.0), None, launches.dropout)
        add_product(dx, *base_factors(problem, inputs, dy, scaled))
    if ds is not None and needs.lora_a:
        da = launches.reduce_rows(inputs.x, ds, problem.keep_scale, launches.dropout)
    return Gradients(
        x=dx,
        weight=scaled.t() @ inputs.x if scaled is not None and needs.weight else None,
        lora_a=None if da is None else da.to(problem.adapter_dtype),
        lora_b=grad_b(problem, gain, t) if needs.lora_b else None,
        gain=None if sums is None else grad_gain(problem, sums, inputs.lora_b, t),
        bias=None if dbias is None else dbias.to(problem.dtype),
    )


def _narrow_and_reduce(
    problem: LoraGainProblem,
    launches: Launches,
    inputs: Inputs,
    b: Tensor | None,
    s: Tensor | None,
    product: Tensor | None,
    dy: Tensor,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dS, T = scale dY^T S, dbias and the sums over rows of dY * P, float32, where they are asked for.

    In one pass over dY, but where the rank makes passes of their own cheaper for the first two.
    """
    (m, n), r = dy.shape, problem.r
    needs_ds, needs_t = needs.x or needs.lora_a, needs.lora_b or needs.gain
    ds = t = None
    if not config.reads_dy_once(r):
        if b is not None:
            ds = launches.narrow_product(dy, b.t(), inputs.scale, NO_DROPOUT)
        if s is not None and needs_t:
            t = launches.reduce_rows(dy, s, inputs.scale, NO_DROPOUT).t()
        needs_ds, needs_t, r = False, False, 1
    asked = needs_ds, needs_t, needs.bias, needs.gain
    if not any(asked):
        return ds, t, None, None
    facts = m, n, r, dy.dtype, launches.exact, hardware(problem.device)
    chosen = triton_tools.chosen(config.gain_narrow_and_reduce_config, *facts)
    found = _kernels().gain_narrow_and_reduce(dy, product, s, b, inputs.scale, asked, r, launches.exact, chosen)
    return found[0] if needs_ds else ds, found[1] if needs_t else t, *found[2:]


@cache
def _kernels() -> ModuleType:
    from peft_kernels.lora.kernels import triton_gain

    return triton_gain


IMPLEMENTATION = Implementation(
    name="triton",
    why_not_environment=triton_tools.why_not_environment,
    why_not=why_not,
    qualification=qualification.TRITON,
    forward=triton_tools.on_device(forward),
    backward=triton_tools.on_device(backward),
)
