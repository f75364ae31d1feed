"""Capability record of the Triton backend of adapters by row, and the order of its launches."""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from peft_kernels._core import tma, triton_tools
from peft_kernels._core.device import hardware
from peft_kernels._core.dispatch import Implementation
from peft_kernels.adapter.kernels import config
from peft_kernels.adapter.rows import qualification
from peft_kernels.adapter.rows.problem import AdapterRowsProblem, Gradients, Inputs, Needs

# Of a vector of slots that each program searches.
MOST_SLOTS = 4096


def why_not(problem: AdapterRowsProblem) -> str | None:
    """Reason why the kernels cannot run this problem, or None."""
    reason = triton_tools.why_not_tensors(problem.device, problem.dtype, "M, N and K", problem.m, problem.n, problem.k)
    if reason is not None:
        return reason
    if problem.width > config.FUSED_LIMIT:
        return f"a rank must be at most {config.FUSED_LIMIT}, got {problem.width}"
    if problem.slots > MOST_SLOTS:
        return f"there must be at most {MOST_SLOTS} slots, got {problem.slots}"
    return None


def forward(problem: AdapterRowsProblem, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return y (M, N) and z (M, width) float32."""
    kernels, plan, x = _kernels(), _plan(inputs), inputs.x
    residual = x if problem.serial else inputs.residual
    y, z = kernels.bottleneck_by_slot(
        x, (inputs.down_weight, inputs.up_weight), (_dense(inputs.down_bias), _dense(inputs.up_bias)), residual, plan,
        problem.width, problem.activation, problem.out_dtype, _precisions(problem, problem.out_dtype),
        _bottleneck_config(problem, x, problem.out_dtype),
    )  # fmt: skip
    kernels.copy_others(residual, y, plan, config.copy_config(problem.n))
    return y, z


def backward(problem: AdapterRowsProblem, inputs: Inputs, z: Tensor, dy: Tensor, needs: Needs) -> Gradients:
    """Return the gradients that ``needs`` asks for; without one of down_weight ``inputs.x`` is not read."""
    kernels, plan, dtype = _kernels(), _plan(inputs), problem.adapter_dtype
    dx = dwd = dbd = dwu = dbu = None
    if needs.dz:
        weights = inputs.down_weight if needs.x else None, inputs.up_weight
        dx, dz = kernels.bottleneck_grad_by_slot(
            dy, weights, z, plan, problem.activation, problem.serial, problem.dtype,
            _precisions(problem, problem.dtype), _bottleneck_config(problem, dy, problem.dtype),
        )  # fmt: skip
        if dx is not None:
            kernels.copy_others(dy if problem.serial else None, dx, plan, config.copy_config(problem.k))
        if needs.down_weight or needs.down_bias:
            t = inputs.x if needs.down_weight else None
            dwd, dbd = _reduce(problem, plan, t, dz, False, (needs.down_weight, needs.down_bias))
    if needs.up_weight or needs.up_bias:
        dwu, dbu = _reduce(problem, plan, dy, z, True, (needs.up_weight, needs.up_bias))
    narrow = (None if each is None else each.to(dtype) for each in (dwd, dwu, dbd, dbu))
    return Gradients(dx, *narrow)


@cache
def _kernels() -> ModuleType:
    from peft_kernels.adapter.kernels import triton_rows

    return triton_rows


def _plan(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return inputs.slot, inputs.order, inputs.first, inputs.table, inputs.scales


def _dense(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


def _reduce(
    problem: AdapterRowsProblem,
    plan: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    t: Tensor | None,
    u: Tensor | None,
    is_up: bool,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the up projection or of the down projection."""
    c = problem.n if is_up else problem.k
    t_dtype = problem.dtype if t is None else t.dtype
    facts = problem.m, c, problem.width, problem.slots, t_dtype, problem.is_mixed, hardware(problem.device)
    chosen = triton_tools.chosen(config.reduce_by_slot_config, *facts)
    found: tuple[Tensor | None, Tensor | None] = _kernels().reduce_by_slot(
        t, u, plan, (problem.m, c, problem.r), problem.activation if is_up else "identity", is_up, needs,
        problem.adapter_dtype, _precisions(problem, torch.float32), chosen,
    )  # fmt: skip
    return found


def _bottleneck_config(problem: AdapterRowsProblem, t: Tensor, out_dtype: torch.dtype) -> config.BottleneckConfig:
    """Of a launch whose first product reads t, and whose second writes ``out_dtype``."""
    facts = problem.m, problem.width, t.dtype, problem.adapter_dtype, out_dtype
    return triton_tools.chosen(config.bottleneck_by_slot_config, *facts, tma.tma_can_read(t), hardware(problem.device))


def _precisions(problem: AdapterRowsProblem, out_dtype: torch.dtype) -> tuple[bool, str, str]:
    """As ``bottleneck_adapter``'s: whether float32 weights keep their bits, and what float32 products may do."""
    strict = triton_tools.dot_precision(problem.adapter_dtype)
    return problem.is_mixed, strict, strict if out_dtype == torch.float32 else "tf32"


IMPLEMENTATION = Implementation(
    name="triton",
    why_not_environment=triton_tools.why_not_environment,
    why_not=why_not,
    qualification=qualification.TRITON,
    forward=triton_tools.on_device(forward),
    backward=triton_tools.on_device(backward),
)
