"""4-bit weights on Triton: codes are read once, 16 bytes a thread, and elements written once.

Equation  W[i] = table[nibble i] * scale[i // block], in float32, rounded once to W's dtype
          (NF4: Dettmers et al. 2023, arXiv:2305.14314)
Tensors   packed (ceil(n / 2),) uint8; scales (blocks,) float32 or bytes; code (256,), second (blocks of blocks,)
          float32; all contiguous; W (n,): contiguous
Tiles     a program owns 2 BLOCK_BYTES elements, a run of whole blocks, or of a part of one
Bound     1/2 byte of codes and an element of W: 2.5 bytes an element in half precision, and the scales
Refused   float64
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_kernels._core.launch import Launcher
from peft_kernels._core.triton_math import load_scalar
from peft_kernels._core.triton_tools import cdiv
from peft_kernels.four_bit_weight.kernels import formats
from peft_kernels.four_bit_weight.kernels.config import DecodeConfig

NF4 = tl.constexpr(formats.NF4)
FP4 = tl.constexpr(formats.FP4)


@triton.jit
def _look_up(codes, VALUES: tl.constexpr):
    """A table in shared memory, where its 16 values lie in 16 banks: a load an element instead of some 15 selects."""
    offs = tl.arange(0, 16)
    table = tl.full((16,), VALUES[0], tl.float32)
    for i in tl.static_range(1, 16):
        table = tl.where(offs == i, VALUES[i], table)
    return tl.gather(table, codes.to(tl.int32), 0)


@triton.jit
def _e2m1(codes):
    """The three bits of a magnitude as the last of a float32's exponent and the first of its mantissa; exact."""
    bits = codes.to(tl.uint32)
    bits = ((bits & 7) << 22) | ((bits & 8) << 28)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126: float32's bias less the format's


@triton.jit
def _e4m3(codes):
    """As above; the largest magnitude's bits are nan."""
    bits = codes.to(tl.uint32)
    value = (((bits & 127) << 20) | ((bits & 128) << 24)).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
    return tl.where((bits & 127) == 127, float("nan"), value)


@triton.jit
def _e8m0(codes):
    """A float32's exponent bits; 0 is below its normal values, and 255 is nan, not infinity."""
    bits = codes.to(tl.uint32)
    bits = tl.where(bits == 0, 1 << 22, tl.where(bits == 255, 0x7FC00000, bits << 23))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _values(codes, KIND: tl.constexpr):
    if KIND == "nf4":
        return _look_up(codes, NF4)
    elif KIND == "fp4":
        return _look_up(codes, FP4)
    else:
        return _e2m1(codes)


@triton.jit
def _scales(
    scales_ptr, code_ptr, second_ptr, offset, global_scale, block, mask,
    KIND: tl.constexpr, SECOND_BLOCK: tl.constexpr, IS_OFFSET_TENSOR: tl.constexpr, IS_GLOBAL_TENSOR: tl.constexpr,
):  # fmt: skip
    """Of some blocks, in float32."""
    if SECOND_BLOCK:
        scale = tl.load(scales_ptr + block, mask=mask, other=0)
        scale = tl.load(code_ptr + scale.to(tl.int32), mask=mask, other=0.0)
        scale *= tl.load(second_ptr + block // SECOND_BLOCK, mask=mask, other=0.0)
        return scale + load_scalar(offset, IS_OFFSET_TENSOR)
    elif KIND == "mxfp4":
        return _e8m0(tl.load(scales_ptr + block, mask=mask, other=0))
    elif KIND == "nvfp4":
        scale = _e4m3(tl.load(scales_ptr + block, mask=mask, other=0))
        return scale * load_scalar(global_scale, IS_GLOBAL_TENSOR)
    else:
        return tl.load(scales_ptr + block, mask=mask, other=0.0)


@triton.jit
def decode_kernel(
    # pointers
    packed_ptr, scales_ptr, code_ptr, second_ptr, offset_ptr, global_scale_ptr, out_ptr,
    # specialized
    BYTES, N,
    # constexprs
    KIND: tl.constexpr, LOW_FIRST: tl.constexpr, BLOCK_SIZE: tl.constexpr, SECOND_BLOCK: tl.constexpr,
    IS_OFFSET_TENSOR: tl.constexpr, IS_GLOBAL_TENSOR: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):  # fmt: skip
    ELEMENTS: tl.constexpr = 2 * BLOCK_BYTES
    # Elements of a program that have one scale.
    RUN: tl.constexpr = min(BLOCK_SIZE, ELEMENTS)
    pid = tl.program_id(0).to(tl.int64)

    offs = pid * BLOCK_BYTES + tl.arange(0, BLOCK_BYTES)
    byte = tl.load(packed_ptr + offs, mask=offs < BYTES, other=0)
    low, high = byte & 15, byte >> 4
    codes = tl.interleave(low, high) if LOW_FIRST else tl.interleave(high, low)
    values = _values(codes, KIND)

    first = pid * ELEMENTS + tl.arange(0, ELEMENTS // RUN) * RUN
    scale = _scales(
        scales_ptr, code_ptr, second_ptr, offset_ptr, global_scale_ptr, first // BLOCK_SIZE, first < N,
        KIND, SECOND_BLOCK, IS_OFFSET_TENSOR, IS_GLOBAL_TENSOR,
    )  # fmt: skip
    scaled = tl.reshape(values, (ELEMENTS // RUN, RUN)) * scale[:, None]
    offs_out = pid * ELEMENTS + tl.arange(0, ELEMENTS)
    out = tl.reshape(scaled, (ELEMENTS,)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offs_out, out, mask=offs_out < N)


_launch_decode = Launcher(
    decode_kernel,
    flags=("KIND", "LOW_FIRST", "BLOCK_SIZE", "SECOND_BLOCK", "IS_OFFSET_TENSOR", "IS_GLOBAL_TENSOR"),
)


def decode(
    packed: Tensor,
    scales: Tensor,
    nested: tuple[Tensor, Tensor, int, float | Tensor] | None,
    global_scale: float | Tensor,
    kind: str,
    block_size: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    config: DecodeConfig,
) -> Tensor:
    """Launch W and return it in a shape and dtype; all tensors are contiguous, those of bytes uint8."""
    code, second, second_block, offset = nested or (None, None, 0, 0.0)
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    bytes_, elements = packed.numel(), out.numel()

    _launch_decode(
        (cdiv(bytes_, config.BLOCK_BYTES), 1, 1),
        (packed, scales, code, second, offset, global_scale, out),
        (),
        (bytes_, elements),
        (
            kind,
            formats.FORMATS[kind].low_first,
            block_size,
            second_block,
            isinstance(offset, Tensor),
            isinstance(global_scale, Tensor),
        ),
        config,
    )
    return out
