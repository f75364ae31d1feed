"""LoRA linear for at most 16 tokens in one launch: what csrc/lora/decode.cuh can run, and its launch.

Equation  y = x W^T + bias + scale S B^T,  S = x A^T
Tensors   x (M, K), W (N, K), A (r, K): contiguous rows on 16-byte boundaries; B (N, r), bias (N,): any strides
Refused   M > 16, dropout, float32 and float64, K no multiple of 8, rows off 16-byte boundaries
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels._core import cuda_tools, extension
from peft_kernels._core.device import hardware
from peft_kernels.lora.kernels import cuda_workspace
from peft_kernels.lora.kernels.config import decode_config
from peft_kernels.lora.linear.problem import Inputs, LoraLinearProblem

MAX_TOKENS = 16
MINIMUM_ARCH = 80
_MAX_SIZE = 2**30
_VECTOR = 8  # half-precision elements in 16 bytes


def why_not(problem: LoraLinearProblem) -> str | None:
    """Reason why the kernel cannot run this problem on a device that has its machine code, or None."""
    if problem.m > MAX_TOKENS:
        return f"it takes at most {MAX_TOKENS} tokens, got {problem.m}"
    if problem.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, x is {problem.dtype}"
    if problem.has_dropout:
        return "it has no dropout"
    if problem.k % _VECTOR != 0:
        return f"it reads 16 bytes at a time, and K = {problem.k} is no multiple of {_VECTOR}"
    if not problem.rows_aligned:
        return "it reads 16 bytes at a time, and rows of x, weight or lora_a are strided or off 16-byte boundaries"
    largest = max(problem.n, problem.k, problem.r)
    if largest > _MAX_SIZE:
        return f"N, K and r must be at most 2^30, got {largest}"
    return None


def forward(problem: LoraLinearProblem, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Launch; return y (M, N) and S (M, r) float32."""
    x, weight, lora_a, lora_b, scale, bias, _ = inputs
    kernels, device = extension.load().lora, problem.device
    # A scale of another dtype is cast by a launch of its own; a float32 one stays as it is.
    scale_tensor = scale.to(torch.float32) if isinstance(scale, Tensor) else None

    chosen = decode_config(problem.n, problem.k, problem.r, hardware(device))
    shape = {
        "m": problem.m,
        "n": problem.n,
        "k": problem.k,
        "r": problem.r,
        "splits": chosen.SPLITS,
        "down_splits": chosen.DOWN_SPLITS,
    }

    with cuda_tools.stream_of(device) as stream:
        y = torch.empty(problem.m, problem.n, dtype=problem.dtype, device=device)
        s = torch.empty(problem.m, problem.r, dtype=torch.float32, device=device)
        flags, size = kernels.decode_workspace(**shape)
        workspace = cuda_workspace.allocate(flags, size, device)
        kernels.decode_forward(
            x=x.data_ptr(),
            weight=weight.data_ptr(),
            lora_a=lora_a.data_ptr(),
            lora_b=lora_b.data_ptr(),
            bias=0 if bias is None else bias.data_ptr(),
            scale=0 if scale_tensor is None else scale_tensor.data_ptr(),
            scale_value=0.0 if isinstance(scale, Tensor) else float(scale),
            y=y.data_ptr(),
            s=s.data_ptr(),
            workspace=workspace.tensor.data_ptr(),
            nonce=workspace.nonce,
            x_stride=x.stride(0),
            weight_stride=weight.stride(0),
            a_stride=lora_a.stride(0),
            b_strides=lora_b.stride(),
            bias_stride=0 if bias is None else bias.stride(0),
            dtype=_name(problem.dtype),
            adapter_dtype=_name(problem.adapter_dtype),
            grid=chosen.GRID,
            stream=stream,
            **shape,
        )
    return y, s


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
