"""LoRA linear for at most 16 tokens on a weight of four bits, in one launch (csrc/lora/decode_four_bit.cuh).

Equation  y = x W^T + bias + scale S B^T,  S = x A^T, with W[i] = values[nibble i] * scales[i // block] in float32,
          rounded once to x's dtype
Tensors   packed (N K / 2) uint8 on a 16-byte boundary, the high nibble first; scales as ``FourBitWeight`` has them; the
          others as cuda_decode.py's
Bits      those of ``cuda_decode.forward`` on W, for the same config
Refused   what cuda_decode.py refuses; formats other than NF4 and FP4; blocks shorter than 64 or longer than a row, and
          rows that are not whole blocks
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels._core import cuda_tools, extension
from peft_kernels._core.cuda_tools import address, dtype_name, strided
from peft_kernels.lora.kernels import cuda_decode, cuda_workspace
from peft_kernels.lora.kernels.config import DECODE_CHUNK_K, DecodeConfig

KINDS = ("nf4", "fp4")
MAX_ELEMENTS = 2**36  # the kernel counts chunks of 64 in 32 bits


class FourBitWeight(NamedTuple):
    """A weight (N, K) of bitsandbytes' formats, all on x's device.

    Attributes:
        packed: (N K / 2) uint8 in any shape; of a byte the high nibble is the first element.
        values: of the nibbles 0 to 15, float32's.
        scales: (N K / block_size) in any shape: float32, or uint8 where they are nested.
        block_size: a power of two.
        nested: ``(code (256,), absmax, block_size, offset)`` of the second level, float32; the offset a float or 0-d.
    """

    packed: Tensor
    values: tuple[float, ...]
    scales: Tensor
    block_size: int
    nested: tuple[Tensor, Tensor, int, float | Tensor] | None = None


def why_not(
    m: int,
    n: int,
    k: int,
    r: int,
    dtype: torch.dtype,
    kind: str,
    block_size: int,
    nested_block_size: int,
    has_dropout: bool,
    rows_aligned: bool,
) -> str | None:
    """Reason why the kernel cannot run a layer, or None.

    Args:
        nested_block_size: 0 where there is no second level.
        rows_aligned: whether rows of x and lora_a are contiguous, and they and packed on 16-byte boundaries.
    """
    if m > cuda_decode.MAX_TOKENS:
        return f"it takes at most {cuda_decode.MAX_TOKENS} tokens, got {m}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, got {dtype}"
    if has_dropout:
        return "it has no dropout"
    if kind not in KINDS:
        return f"it decodes {' and '.join(KINDS)}, got {kind}"
    if block_size < DECODE_CHUNK_K:
        return f"a warp's {DECODE_CHUNK_K} elements of a row have one scale, got blocks of {block_size}"
    if k % block_size != 0:
        return f"a row must be whole blocks, so K must be a multiple of {block_size}, got {k}"
    if nested_block_size & (nested_block_size - 1):
        return f"nested blocks must be a power of two, got {nested_block_size}"
    if not rows_aligned:
        return (
            "it reads 16 bytes at a time, and rows of x or lora_a are strided, or one of these or packed is misaligned"
        )
    largest = max(n, k, r)
    if largest > cuda_decode.MAX_SIZE:
        return f"N, K and r must be at most {cuda_decode.MAX_SIZE}, got {largest}"
    if n * k > MAX_ELEMENTS:
        return f"the weight must have at most {MAX_ELEMENTS} elements, got {n * k}"
    return None


def decode_four_bit(
    x: Tensor,
    weight: FourBitWeight,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float | Tensor,
    bias: Tensor | None,
    config: DecodeConfig,
) -> tuple[Tensor, Tensor]:
    """Return y (M, N) and S (M, r) float32."""
    kernels, device = extension.load().lora, x.device
    (m, k), (n, r) = x.shape, lora_b.shape
    shape = {"m": m, "n": n, "k": k, "r": r, "splits": config.SPLITS, "down_splits": config.DOWN_SPLITS}
    code, second, second_block, offset = (None, None, 1, 0.0) if weight.nested is None else weight.nested

    with cuda_tools.stream_of(device) as stream:
        scale_tensor, scale_value = cuda_tools.float32_scale(scale)
        offset_tensor, offset_value = cuda_tools.float32_scale(offset)
        # What is contiguous is itself.
        packed, scales = weight.packed.contiguous(), weight.scales.contiguous()
        code = None if code is None else code.contiguous()
        second = None if second is None else second.contiguous()
        y = torch.empty(m, n, dtype=x.dtype, device=device)
        s = torch.empty(m, r, dtype=torch.float32, device=device)
        flags, size = kernels.decode_workspace(**shape)
        workspace = cuda_workspace.allocate(flags, size, device)
        kernels.decode_four_bit(
            x=strided(x), codes=address(packed), scales=address(scales), code=address(code), second=address(second),
            offset=(address(offset_tensor), offset_value), values=weight.values,
            block_shift=_log2(weight.block_size), second_shift=_log2(second_block),
            lora_a=strided(lora_a), lora_b=(address(lora_b), *lora_b.stride()), bias=strided(bias),
            scale=(address(scale_tensor), scale_value), y=address(y), s=address(s),
            workspace=address(workspace.tensor), nonce=workspace.nonce, dtype=dtype_name(x.dtype),
            adapter_dtype=dtype_name(lora_a.dtype), grid=config.GRID, stream=stream, **shape,
        )  # fmt: skip
    return y, s


def _log2(power_of_two: int) -> int:
    return power_of_two.bit_length() - 1
