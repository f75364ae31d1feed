"""Capability record of the CUDA backend: the forward pass through the compiled extension, backward as in torch_impl."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels._core import cuda_tools, extension
from peft_kernels._core.device import hardware
from peft_kernels._core.dispatch import Implementation
from peft_kernels.adapter import qualification, torch_impl
from peft_kernels.adapter.kernels import cuda_bottleneck
from peft_kernels.adapter.kernels.config import CUDA_ARCH, cuda_forward_config
from peft_kernels.adapter.problem import BottleneckAdapterProblem, Inputs

ROW_ELEMENTS = 8  # half-precision elements in 16 bytes, of which the rows that TMA reads are multiples


def why_not(problem: BottleneckAdapterProblem) -> str | None:
    """Reason why the kernel cannot run this problem, or None."""
    return _why_not_device(problem.device) or why_not_shape(problem)


def why_not_shape(problem: BottleneckAdapterProblem) -> str | None:
    """Reason why the kernel has no code for these dtypes or sizes, or None; needs the extension, not a device."""
    if problem.dtype not in (torch.bfloat16, torch.float16):
        return f"its products are of bfloat16 or float16, got {problem.dtype}"
    if problem.is_mixed:
        return f"its products have operands of one dtype, got {problem.dtype} x and {problem.adapter_dtype} weights"
    if problem.out_dtype != problem.dtype:
        return f"its residual has x's dtype, got {problem.out_dtype}"
    if problem.k % ROW_ELEMENTS or problem.n % ROW_ELEMENTS:
        return f"K and N must be multiples of {ROW_ELEMENTS} (rows of 16 bytes), got {problem.k} and {problem.n}"
    if problem.m >= cuda_bottleneck.INDEX_LIMIT:
        return f"M must be below 2^31, got {problem.m}"
    kernels = extension.load().adapter
    if problem.r > kernels.MAX_RANK:
        return f"r must be at most {kernels.MAX_RANK}, got {problem.r}"
    widest, columns = kernels.max_columns(problem.r), max(problem.k, problem.n)
    if columns > widest:
        return f"a cluster's shared memory holds K and N up to {widest} at this width, got {columns} at r = {problem.r}"
    return None


def forward(problem: BottleneckAdapterProblem, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return y (M, N) and z (M, r) float32."""
    x, down_weight, up_weight, down_bias, up_bias, residual, *_, scale = inputs
    config = cuda_forward_config(problem.m, problem.k, problem.n, hardware(problem.device))
    weights, biases = (down_weight, up_weight), (down_bias, up_bias)
    return cuda_bottleneck.forward(x, weights, biases, residual, scale, problem.serial, problem.activation, config)


def _why_not_device(device: torch.device) -> str | None:
    reason = cuda_tools.why_not_device(device, CUDA_ARCH)
    if reason is not None:
        return reason
    arch = hardware(device).arch
    if arch != CUDA_ARCH:
        return f"its kernel is for sm_{CUDA_ARCH} alone (wgmma), got sm_{arch}"
    archs = extension.build_record()["archs"]
    if f"{CUDA_ARCH}a" not in archs:
        return f"its kernel needs an extension built for {CUDA_ARCH}a, got {', '.join(archs)}"
    return None


IMPLEMENTATION = Implementation(
    name="cuda",
    why_not_environment=extension.why_not,
    why_not=why_not,
    qualification=qualification.CUDA,
    forward=forward,
    # The forward pass saves what that of torch saves.
    backward=torch_impl.backward,
    borrows=("torch",),
)
