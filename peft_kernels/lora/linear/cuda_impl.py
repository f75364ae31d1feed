"""Capability record of the CUDA backend: its kernels in the order in which they are tried.

A call's backward pass is that of the kernel that runs its forward pass; both leave the gradients of the factors to
``cuda_reduce``. Plain products of whole matrices are torch's, that is cuBLAS: dW, and dX of at most 16 tokens. Imports
the extension only to ask or launch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels._core import cuda_tools, extension
from peft_kernels._core.device import hardware
from peft_kernels._core.dispatch import Implementation
from peft_kernels._core.explain import note
from peft_kernels._core.torch_products import add_product
from peft_kernels.lora import qualification
from peft_kernels.lora.kernels import cuda_decode, cuda_gemm, cuda_reduce
from peft_kernels.lora.kernels.config import decode_config
from peft_kernels.lora.kernels.dropout import NO_DROPOUT, Dropout
from peft_kernels.lora.linear.problem import Gradients, Inputs, LoraLinearProblem, Needs

HALVES = (torch.bfloat16, torch.float16)
VECTOR = 8  # half-precision elements in 16 bytes
LEAST_BUSY = 0.4  # of the multiprocessors' time, for a product that auto may take


class Kernel(NamedTuple):
    """One kernel, and the passes of the calls that it runs.

    Attributes:
        name: for refusals.
        minimum_arch: oldest architecture that it is compiled for.
        why_not: reason why it cannot run a problem on a device that has its machine code, or None.
        forward: returns y (M, N) and S (M, r) float32.
        backward: returns the gradients that are asked for.
    """

    name: str
    minimum_arch: int
    why_not: Callable[[LoraLinearProblem], str | None]
    forward: Callable[[LoraLinearProblem, Inputs], tuple[Tensor, Tensor]]
    backward: Callable[[LoraLinearProblem, Inputs, Tensor, Tensor, Needs], Gradients]


def _why_not_decode(problem: LoraLinearProblem) -> str | None:
    if problem.m > cuda_decode.MAX_TOKENS:
        return f"it takes at most {cuda_decode.MAX_TOKENS} tokens, got {problem.m}"
    if problem.dtype not in HALVES:
        return f"it takes bfloat16 and float16, got {problem.dtype}"
    if problem.has_dropout:
        return "it has no dropout"
    if problem.k % VECTOR != 0:
        return f"it reads 16 bytes at a time, so K must be a multiple of {VECTOR}, got {problem.k}"
    if not problem.rows_aligned:
        return "it reads 16 bytes at a time, and rows of x, weight or lora_a are strided or off 16-byte boundaries"
    largest = max(problem.n, problem.k, problem.r)
    if largest > cuda_decode.MAX_SIZE:
        return f"N, K and r must be at most {cuda_decode.MAX_SIZE}, got {largest}"
    return None


def _forward_decode(problem: LoraLinearProblem, inputs: Inputs) -> tuple[Tensor, Tensor]:
    config = decode_config(problem.n, problem.k, problem.r, hardware(problem.device))
    return cuda_decode.forward(*inputs[:6], config)


def _backward_decode(problem: LoraLinearProblem, inputs: Inputs, s: Tensor, dy: Tensor, needs: Needs) -> Gradients:
    """dX by torch's products: cuBLAS splits the reduction of so few rows, and the Hopper GEMM does not."""
    gradients, ds = _factors(problem, inputs, s, dy, needs, None)
    if ds is None or not needs.x:
        return gradients
    dx = dy @ inputs.weight
    if problem.adapter_dtype == problem.dtype:
        add_product(dx, ds.to(dx.dtype), inputs.lora_a)
    else:
        dx.add_(ds @ inputs.lora_a)
    return gradients._replace(x=dx)


def _why_not_gemm(problem: LoraLinearProblem) -> str | None:
    arch = hardware(problem.device).arch
    if arch != cuda_gemm.ARCH:
        return f"it is written in sm_{cuda_gemm.ARCH}a's instructions, got sm_{arch}"
    if problem.dtype not in HALVES:
        return f"it takes bfloat16 and float16, got {problem.dtype}"
    if problem.adapter_dtype != problem.dtype:
        return f"it multiplies x by lora_a as they are, and does not round adapters, got {problem.adapter_dtype}"
    most = extension.load().lora.GEMM_MAX_RANK
    if problem.r > most:
        return f"it keeps S of a tile in registers, up to rank {most}, got {problem.r}"
    for name, size in (("N", problem.n), ("K", problem.k)):
        if size % VECTOR != 0:
            return f"TMA moves rows of 16-byte multiples, so {name} must be a multiple of {VECTOR}, got {size}"
    if not problem.rows_aligned:
        return "TMA cannot read x, weight or lora_a: their rows are strided or off 16-byte boundaries"
    largest = max(problem.m, problem.n, problem.k)
    if largest > cuda_gemm.MAX_SIZE:
        return f"M, N and K must be at most {cuda_gemm.MAX_SIZE}, got {largest}"
    return None


def _slower(problem: LoraLinearProblem) -> str | None:
    """Few tiles for many multiprocessors: torch's own products have tiles of all sizes, and split the reduction."""
    if _chosen(problem).name != "gemm":
        return None
    busy = cuda_gemm.busy(
        problem.m, problem.n, problem.k, problem.r, problem.dtype, problem.has_dropout, problem.device
    )
    if busy < LEAST_BUSY:
        return f"gemm: its tiles leave most of the multiprocessors idle, got M = {problem.m} and N = {problem.n}"
    return None


def _forward_gemm(problem: LoraLinearProblem, inputs: Inputs) -> tuple[Tensor, Tensor]:
    return cuda_gemm.forward(*inputs[:6], _dropout(problem, inputs))


def _backward_gemm(problem: LoraLinearProblem, inputs: Inputs, s: Tensor, dy: Tensor, needs: Needs) -> Gradients:
    """dX and dS by one launch, and then dA and dB by one; without dX, dS is made beside dB."""
    dx = ds = None
    if needs.x:
        dropout = _dropout(problem, inputs)
        dx, ds = cuda_gemm.input_gradient(dy, inputs.weight, inputs.lora_a, inputs.lora_b, inputs.scale, dropout)
    gradients, _ = _factors(problem, inputs, s, dy, needs, ds)
    return gradients._replace(x=dx)


def _dropout(problem: LoraLinearProblem, inputs: Inputs) -> Dropout:
    if inputs.seed is None:
        return NO_DROPOUT
    return Dropout(inputs.seed, problem.dropout_threshold, problem.keep_scale)


def _factors(
    problem: LoraLinearProblem, inputs: Inputs, s: Tensor, dy: Tensor, needs: Needs, ds: Tensor | None
) -> tuple[Gradients, Tensor | None]:
    """All gradients but dX, and dS (M, r) float32: the one given, or, where a gradient takes it, made beside dB."""

    def reduced(over_dy: cuda_reduce.OverDy | None, over_x: cuda_reduce.OverX | None) -> cuda_reduce.Sums:
        return cuda_reduce.reduce_rows(over_dy, over_x, problem.r, problem.adapter_dtype)

    makes_ds = ds is None and (needs.x or needs.lora_a)
    over_dy = over_x = None
    if needs.lora_b or needs.bias or makes_ds:
        lora_b = inputs.lora_b if makes_ds else None
        over_dy = cuda_reduce.OverDy(dy, inputs.scale, s if needs.lora_b else None, lora_b, needs.bias)
    sums = None
    if makes_ds:
        sums = reduced(over_dy, None)
        over_dy, ds = None, sums.ds
    if needs.lora_a and ds is not None:
        over_x = cuda_reduce.OverX(inputs.x, ds, _dropout(problem, inputs))
    rest = reduced(over_dy, over_x)
    of_dy = sums or rest
    weight = dy.t() @ inputs.x if needs.weight else None
    return Gradients(x=None, weight=weight, lora_a=rest.da, lora_b=of_dy.db, bias=of_dy.dbias), ds


# In the order in which they are tried: where few tokens make the weights' bytes all the cost, decode reads them once.
KERNELS: tuple[Kernel, ...] = (
    Kernel("decode", cuda_decode.MINIMUM_ARCH, _why_not_decode, _forward_decode, _backward_decode),
    Kernel("gemm", cuda_gemm.ARCH, _why_not_gemm, _forward_gemm, _backward_gemm),
)


def why_not(problem: LoraLinearProblem) -> str | None:
    """Reason why no kernel can run this problem, or None."""
    chosen = _choose(problem)
    return chosen if isinstance(chosen, str) else None


def forward(problem: LoraLinearProblem, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return y (M, N) and S (M, r) float32."""
    chosen = _chosen(problem)
    note(lambda: f"  lora_linear's kernel: {chosen.name}")
    return chosen.forward(problem, inputs)


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
    slower=_slower,
    qualification=qualification.cuda(lambda problem: _chosen(problem).name),
    forward=forward,
    backward=backward,
)
