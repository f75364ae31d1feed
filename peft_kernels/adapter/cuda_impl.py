"""Capability record of the CUDA backend: the forward pass through the compiled extension, backward as in torch_impl."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels._core import cuda_tools, extension
from peft_kernels._core.device import hardware, why_not_verified
from peft_kernels._core.dispatch import Implementation
from peft_kernels._core.triton_tools import tma_can_read
from peft_kernels.adapter import torch_impl
from peft_kernels.adapter.kernels.activations import ACTIVATIONS
from peft_kernels.adapter.kernels.config import CUDA_ARCH, cuda_forward_config
from peft_kernels.adapter.problem import BottleneckAdapterProblem, Inputs

# Architectures on which the tests and benchmarks of this backend have run; `auto` takes it nowhere else.
VERIFIED_ARCHS: frozenset[int] = frozenset()

DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
ROW_ELEMENTS = 8  # the copy engine's rows start at multiples of 16 bytes
INDEX_LIMIT = 2**31  # its coordinates are 32-bit


def why_not(problem: BottleneckAdapterProblem) -> str | None:
    """Reason why the kernel cannot run this problem, or None."""
    return _why_not_device(problem.device) or why_not_shape(problem)


def why_not_auto(problem: BottleneckAdapterProblem) -> str | None:
    """Reason why ``auto`` passes over the kernel although it runs, or None."""
    return why_not_verified(problem.device, VERIFIED_ARCHS, "cuda")


def why_not_shape(problem: BottleneckAdapterProblem) -> str | None:
    """Reason why the kernel has no code for these dtypes or sizes, or None; needs the extension, not a device."""
    if problem.dtype not in DTYPES:
        return f"its products are of bfloat16 or float16, and x is {problem.dtype}"
    if problem.is_mixed:
        return f"its products have operands of one dtype, x is {problem.dtype} and down_weight {problem.adapter_dtype}"
    if problem.out_dtype != problem.dtype:
        return f"its residual has x's dtype {problem.dtype}, this one is {problem.out_dtype}"
    if problem.k % ROW_ELEMENTS or problem.n % ROW_ELEMENTS:
        return f"K and N must be multiples of {ROW_ELEMENTS} (rows of 16 bytes), got {problem.k} and {problem.n}"
    if problem.m >= INDEX_LIMIT:
        return f"M must be below 2^31, got {problem.m}"
    kernels = extension.load().adapter
    if problem.r > kernels.MAX_RANK:
        return f"r must be at most {kernels.MAX_RANK}, got {problem.r}"
    widest, columns = kernels.max_columns(problem.r), max(problem.k, problem.n)
    if columns > widest:
        return f"a cluster's shared memory holds K and N up to {widest} at r = {problem.r}, got {columns}"
    return None


def forward(problem: BottleneckAdapterProblem, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return y (M, N) and z (M, r) float32. Matrices whose rows the copy engine cannot read are copied first."""
    kernels = extension.load().adapter
    x, down_weight, up_weight = (_readable(matrix) for matrix in (inputs.x, inputs.down_weight, inputs.up_weight))
    residual = None if inputs.residual is None else _readable(inputs.residual)
    down_bias, up_bias = (None if bias is None else bias.contiguous() for bias in (inputs.down_bias, inputs.up_bias))
    # Only where a tensor scale is not float32 already does this launch anything.
    scale = inputs.scale.to(torch.float32) if isinstance(inputs.scale, Tensor) else None
    z = torch.empty(problem.m, problem.r, dtype=torch.float32, device=problem.device)
    y = torch.empty(problem.m, problem.n, dtype=problem.dtype, device=problem.device)
    config = cuda_forward_config(problem.m, problem.k, problem.n, hardware(problem.device))

    with cuda_tools.stream_of(problem.device) as stream:
        kernels.forward(
            x=_address(x),
            x_stride=x.stride(0),
            down_weight=_address(down_weight),
            down_weight_stride=down_weight.stride(0),
            up_weight=_address(up_weight),
            up_weight_stride=up_weight.stride(0),
            down_bias=_address(down_bias),
            up_bias=_address(up_bias),
            residual=_address(residual),
            residual_stride=0 if residual is None else residual.stride(0),
            scale_tensor=_address(scale),
            scale=1.0 if scale is not None else float(inputs.scale),
            z=_address(z),
            y=_address(y),
            m=problem.m,
            n=problem.n,
            k=problem.k,
            r=problem.r,
            serial=problem.serial,
            activation=list(ACTIVATIONS).index(problem.activation),
            dtype=DTYPES[problem.dtype],
            cluster=config.CLUSTER,
            stream=stream,
        )
    return y, z


def _why_not_device(device: torch.device) -> str | None:
    reason = cuda_tools.why_not_device(device, CUDA_ARCH)
    if reason is not None:
        return reason
    arch = hardware(device).arch
    if arch != CUDA_ARCH:
        return f"its kernel is for sm_{CUDA_ARCH} alone (wgmma), {device} is sm_{arch}"
    archs = extension.build_record()["archs"]
    if f"{CUDA_ARCH}a" not in archs:
        return f"the extension was built for {', '.join(archs)}, and its kernel needs {CUDA_ARCH}a"
    return None


def _readable(matrix: Tensor) -> Tensor:
    """The matrix, or a copy of it whose rows are contiguous and start at multiples of 16 bytes."""
    if tma_can_read(matrix):
        return matrix
    rows, columns = matrix.shape
    # up_weight's rows have r elements, which need be no multiple; the kernel reads r of each.
    copy = matrix.new_empty(rows, columns + -columns % ROW_ELEMENTS)[:, :columns]
    return copy.copy_(matrix)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


IMPLEMENTATION = Implementation(
    name="cuda",
    why_not_environment=extension.why_not,
    why_not=why_not,
    why_not_auto=why_not_auto,
    forward=forward,
    # The forward pass saves what that of torch saves.
    backward=torch_impl.backward,
    borrows=("torch",),
)
