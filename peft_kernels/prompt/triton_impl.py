"""Capability record of the Triton backend, and the order of its launches. Imports the kernels only to launch them."""

from __future__ import annotations

from functools import cache
from types import ModuleType

from torch import Tensor

from peft_kernels._core import triton_tools
from peft_kernels._core.dispatch import Implementation
from peft_kernels.prompt import qualification
from peft_kernels.prompt.kernels import config
from peft_kernels.prompt.problem import Gradients, Inputs, Needs, PromptTuningProblem


def why_not(problem: PromptTuningProblem) -> str | None:
    """Reason why the kernels cannot run this problem, or None."""
    numbers = (problem.n * problem.b * (problem.p + problem.l), problem.d)
    what = "positions of all rows, and dimensions,"
    return triton_tools.why_not_tensors(problem.device, problem.dtype, what, *numbers)


def forward(problem: PromptTuningProblem, inputs: Inputs) -> Tensor:
    """Return y (N B, P + L, D) in the tokens' dtype."""
    fwd, _ = _kernels()
    chosen = triton_tools.chosen(config.concatenate_config, problem.d)
    return fwd.concatenate(inputs.prompts, inputs.token_embeddings, chosen)


def backward(problem: PromptTuningProblem, dy: Tensor, needs: Needs) -> Gradients:
    """Return the gradients that ``needs`` asks for."""
    _, bwd = _kernels()
    p, chosen = problem.p, triton_tools.chosen(config.sum_config, problem.d)
    by_prompt = dy.unflatten(0, (problem.n, problem.b))
    by_row = by_prompt.transpose(0, 1)
    return Gradients(
        prompts=bwd.sum_terms(by_prompt[:, :, :p], problem.prompt_dtype, chosen) if needs.prompts else None,
        token_embeddings=bwd.sum_terms(by_row[:, :, p:], problem.dtype, chosen) if needs.token_embeddings else None,
    )


@cache
def _kernels() -> tuple[ModuleType, ModuleType]:
    from peft_kernels.prompt.kernels import triton_bwd, triton_fwd

    return triton_fwd, triton_bwd


IMPLEMENTATION = Implementation(
    name="triton",
    why_not_environment=triton_tools.why_not_environment,
    why_not=why_not,
    qualification=qualification.TRITON,
    forward=triton_tools.on_device(forward),
    backward=triton_tools.on_device(backward),
)
