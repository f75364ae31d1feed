"""Capability record of the CUDA backend: its kernels in the order in which they are tried, and what it borrows.

A call's backward pass is that of the kernel that runs its forward pass, or, where the kernel has none, the torch
backend's, which takes the same S (M, r) float32; the record declares it. Imports the extension only to ask or launch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from peft_kernels._core import cuda_tools, extension
from peft_kernels._core.device import why_not_verified
from peft_kernels._core.dispatch import Implementation
from peft_kernels.lora.linear import cuda_decode, cuda_gemm, torch_impl
from peft_kernels.lora.linear.problem import Gradients, Inputs, LoraLinearProblem, Needs

# Architectures on which the tests and benchmarks of this backend have run; `auto` takes it nowhere else.
VERIFIED_ARCHS: frozenset[int] = frozenset()


class Kernel(NamedTuple):
    """One kernel, and the passes of the calls that it runs.

    Attributes:
        name: for refusals.
        minimum_arch: oldest architecture that it is compiled for.
        why_not: reason why it cannot run a problem, or None.
        forward: returns y (M, N) and S (M, r) float32.
        backward: returns the gradients that are asked for.
    """

    name: str
    minimum_arch: int
    why_not: Callable[[LoraLinearProblem], str | None]
    forward: Callable[[LoraLinearProblem, Inputs], tuple[Tensor, Tensor]]
    backward: Callable[[LoraLinearProblem, Inputs, Tensor, Tensor, Needs], Gradients]


# In the order in which they are tried: where few tokens make the weights' bytes all the cost, decode reads them once.
KERNELS: tuple[Kernel, ...] = (
    Kernel("decode", cuda_decode.MINIMUM_ARCH, cuda_decode.why_not, cuda_decode.forward, torch_impl.backward),
    Kernel("gemm", cuda_gemm.ARCH, cuda_gemm.why_not, cuda_gemm.forward, cuda_gemm.backward),
)


def why_not(problem: LoraLinearProblem) -> str | None:
    """Reason why no kernel can run this problem, or None."""
    chosen = _choose(problem)
    return chosen if isinstance(chosen, str) else None


def why_not_auto(problem: LoraLinearProblem) -> str | None:
    """Reason why ``auto`` passes over the kernels although they run, or None."""
    return why_not_verified(problem.device, VERIFIED_ARCHS, "cuda")


def forward(problem: LoraLinearProblem, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return y (M, N) and S (M, r) float32."""
    return _chosen(problem).forward(problem, inputs)


def backward(problem: LoraLinearProblem, inputs: Inputs, s: Tensor, dy: Tensor, needs: Needs) -> Gradients:
    """Return the gradients that ``needs`` asks for."""
    return _chosen(problem).backward(problem, inputs, s, dy, needs)


def _chosen(problem: LoraLinearProblem) -> Kernel:
    chosen = _choose(problem)
    if isinstance(chosen, str):
        raise RuntimeError(f"lora_linear: no CUDA kernel runs this problem: {chosen}")
    return chosen


def _choose(problem: LoraLinearProblem) -> Kernel | str:
    """The first kernel that runs the problem, or the reasons of all."""
    reasons: dict[str, None] = {}  # a device that refuses several kernels for one reason says so once
    for kernel in KERNELS:
        reason = cuda_tools.why_not_device(problem.device, kernel.minimum_arch)
        if reason is None:
            reason = kernel.why_not(problem)
            if reason is None:
                return kernel
            reason = f"{kernel.name}: {reason}"
        reasons[reason] = None
    return "; ".join(reasons)


IMPLEMENTATION = Implementation(
    name="cuda",
    why_not_environment=extension.why_not,
    why_not=why_not,
    why_not_auto=why_not_auto,
    forward=forward,
    backward=backward,
    borrows=("torch",),
)
