"""LoRA linear in one launch each way on Hopper: what csrc/lora/gemm_sm90.cuh can run, and its launches.

Equation  y = x W^T + bias + scale S B^T, S = x A^T | dX = dY W + dS A, dS = scale dY B
Tensors   x (M, K), W (N, K), A (r, K): contiguous rows on 16-byte boundaries; B (N, r), bias (N,), dY (M, N): any, but
          what the copy engine cannot read is copied: B of a rank that is no multiple of 8, a strided bias or dY,
          rows that overlap
Workspace S or dS (M, r up to 16, 32, 64 or 128) in half precision, and flags (cuda_workspace.py)
Refused   other architectures, ranks above 128, dropout, float32 adapters, N or K no multiple of 8
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peft_kernels._core import cuda_tools, extension
from peft_kernels._core.device import hardware
from peft_kernels.lora.kernels import cuda_workspace
from peft_kernels.lora.linear import torch_impl
from peft_kernels.lora.linear.problem import Gradients, Inputs, LoraLinearProblem, Needs

ARCH = 90
MAX_RANK = 128
_MAX_SIZE = 2**31 - 1024  # the copy engine's coordinates are 32-bit, and tiles reach past the end
_VECTOR = 8  # half-precision elements in 16 bytes


def why_not(problem: LoraLinearProblem) -> str | None:
    """Reason why the kernel cannot run this problem on a device that has its machine code, or None."""
    arch = hardware(problem.device).arch
    if arch != ARCH:
        return f"it is written in sm_{ARCH}a's instructions, {problem.device} is sm_{arch}"
    if problem.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, x is {problem.dtype}"
    if problem.adapter_dtype != problem.dtype:
        return f"it multiplies x by lora_a as they are, and does not round adapters of {problem.adapter_dtype}"
    if problem.has_dropout:
        return "x goes from the copy engine to the tensor cores without passing registers that could mask it"
    if problem.r > MAX_RANK:
        return f"it keeps S of a tile in registers, up to rank {MAX_RANK}, got {problem.r}"
    for name, size in (("N", problem.n), ("K", problem.k)):
        if size % _VECTOR != 0:
            return f"the copy engine moves rows of 16-byte multiples, and {name} = {size} is no multiple of {_VECTOR}"
    if not problem.rows_aligned:
        return "the copy engine cannot read x, weight or lora_a: their rows are strided or off 16-byte boundaries"
    largest = max(problem.m, problem.n, problem.k)
    if largest > _MAX_SIZE:
        return f"M, N and K must be at most {_MAX_SIZE}, got {largest}"
    return None


def forward(problem: LoraLinearProblem, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Launch; return y (M, N) and S (M, r) float32."""
    x, weight, lora_a, lora_b, scale, bias, _ = inputs
    return _launch(problem, {"x": x, "w": weight, "down": lora_a, "up": lora_b}, bias, scale, backward=False)


def backward(problem: LoraLinearProblem, inputs: Inputs, s: Tensor, dy: Tensor, needs: Needs) -> Gradients:
    """Return the gradients that ``needs`` asks for: dX and dA by one launch and one product, the others by torch."""
    if not needs.x:
        return torch_impl.backward(problem, inputs, s, dy, needs)
    operands = {"x": dy, "w": inputs.weight, "down": inputs.lora_b, "up": inputs.lora_a}
    dx, ds = _launch(problem, operands, None, inputs.scale, backward=True)
    others = torch_impl.backward(problem, inputs, s, dy, needs._replace(x=False, lora_a=False))
    return others._replace(x=dx, lora_a=ds.to(problem.dtype).t() @ inputs.x if needs.lora_a else None)


def _launch(
    problem: LoraLinearProblem, operands: dict[str, Tensor], bias: Tensor | None, scale: float | Tensor, backward: bool
) -> tuple[Tensor, Tensor]:
    kernels, device = extension.load().lora, problem.device
    n, k = (problem.k, problem.n) if backward else (problem.n, problem.k)
    # A scale of another dtype is cast by a launch of its own; a float32 one stays as it is.
    scale_tensor = scale.to(torch.float32) if isinstance(scale, Tensor) else None
    operands, bias = {name: _readable(matrix) for name, matrix in operands.items()}, _pairs(bias)
    addresses: dict[str, Any] = {name: matrix.data_ptr() for name, matrix in operands.items()}
    # A single row's stride may be anything.
    strides = {
        f"{name}_stride": matrix.stride(0) if matrix.shape[0] > 1 else _row_length(matrix.shape[1])
        for name, matrix in operands.items()
    }

    with cuda_tools.stream_of(device) as stream:
        y = torch.empty(problem.m, n, dtype=problem.dtype, device=device)
        s = torch.empty(problem.m, problem.r, dtype=torch.float32, device=device)
        flags, size = kernels.gemm_workspace(m=problem.m, r=problem.r)
        workspace = cuda_workspace.allocate(flags, size, device)
        kernels.gemm_sm90(
            **addresses,
            **strides,
            bias=0 if bias is None else bias.data_ptr(),
            scale=0 if scale_tensor is None else scale_tensor.data_ptr(),
            scale_value=0.0 if isinstance(scale, Tensor) else float(scale),
            y=y.data_ptr(),
            s=s.data_ptr(),
            workspace=workspace.tensor.data_ptr(),
            nonce=workspace.nonce,
            m=problem.m,
            n=n,
            k=k,
            r=problem.r,
            dtype=str(problem.dtype).removeprefix("torch."),
            backward=backward,
            multiprocessors=hardware(device).sm_count,
            stream=stream,
        )
    return y, s


def _readable(matrix: Tensor) -> Tensor:
    """The matrix as the copy engine can read it: itself, or a copy whose rows are padded to 16-byte multiples."""
    rows, cols = matrix.shape
    if cuda_tools.rows_aligned(matrix) and (rows == 1 or matrix.stride(0) >= cols):
        return matrix
    stored = matrix.new_empty(rows, _row_length(cols))
    return stored[:, :cols].copy_(matrix)


def _row_length(cols: int) -> int:
    return -(-cols // _VECTOR) * _VECTOR


def _pairs(bias: Tensor | None) -> Tensor | None:
    """The bias as the kernel reads it, two elements at a time: itself, or a copy."""
    if bias is None or (bias.is_contiguous() and bias.data_ptr() % 4 == 0):
        return bias
    return bias.clone(memory_format=torch.contiguous_format)
