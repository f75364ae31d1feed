"""Capability record of the Triton backend, and the order of its launches, which are ``lora_linear``'s."""

from __future__ import annotations

from torch import Tensor

from peft_kernels._core import triton_tools
from peft_kernels._core.dispatch import Implementation
from peft_kernels.lora.kernels.dropout import NO_DROPOUT
from peft_kernels.lora.linear.problem import Needs as LinearNeeds
from peft_kernels.lora.linear.triton_impl import Launches
from peft_kernels.lora.update.problem import Gradients, Inputs, LoraUpdateProblem, Needs
from peft_kernels.lora.update.qualification import TRITON


def why_not(problem: LoraUpdateProblem) -> str | None:
    """Reason why the kernels cannot run this problem, or None."""
    return triton_tools.why_not_tensors(problem.device, problem.dtype, "M, N and K", problem.m, problem.n, problem.k)


def forward(problem: LoraUpdateProblem, inputs: Inputs) -> Tensor:
    """Add to y (M, N), and return S (M, r) float32."""
    of_x, of_y = _launches(problem, inputs)
    s = of_x.narrow_product(inputs.x, inputs.lora_a, problem.of_x.keep_scale, of_x.dropout)
    of_y.add_rank_product(inputs.y, (s, inputs.lora_b, inputs.scale))
    return s


def backward(problem: LoraUpdateProblem, inputs: Inputs, s: Tensor, dy: Tensor, needs: Needs) -> Gradients:
    """Return the gradients that ``needs`` asks for."""
    of_x, of_y = _launches(problem, inputs)
    asked = LinearNeeds(needs.x, False, needs.lora_a, needs.lora_b, False)
    ds, db, _ = of_y.narrow_and_reduce(dy, s, inputs.lora_b, inputs.scale, asked)
    dx = da = None
    if ds is not None and needs.x:
        dx = of_x.rank_product(problem.dtype, (ds, inputs.lora_a.t(), 1.0), None, of_x.dropout)
    if ds is not None and needs.lora_a:
        da = of_x.reduce_rows(inputs.x, ds, problem.of_x.keep_scale, of_x.dropout)
    return Gradients(
        x=dx,
        lora_a=None if da is None else da.to(problem.adapter_dtype),
        lora_b=None if db is None else db.to(problem.adapter_dtype),
    )


def _launches(problem: LoraUpdateProblem, inputs: Inputs) -> tuple[Launches, Launches]:
    """Those on x, and those on y, which drop nothing."""
    of_x = Launches.of(problem.of_x, inputs.linear)
    return of_x, of_x._replace(exact=problem.adapter_dtype != problem.y_dtype, dropout=NO_DROPOUT)


IMPLEMENTATION = Implementation(
    name="triton",
    why_not_environment=triton_tools.why_not_environment,
    why_not=why_not,
    qualification=TRITON,
    forward=triton_tools.on_device(forward),
    backward=triton_tools.on_device(backward),
)
