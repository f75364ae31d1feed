"""The public function, and the declaration that makes it an operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peft_kernels._core.operator import Operator
from peft_kernels.four_bit_weight import torch_impl, triton_impl
from peft_kernels.four_bit_weight.composite import composite
from peft_kernels.four_bit_weight.kernels.formats import FORMATS
from peft_kernels.four_bit_weight.problem import NAME, Inputs, Needs, make_problem

# torch 2.6 has no float8_e8m0fnu.
_BYTES = {"mxfp4": getattr(torch, "float8_e8m0fnu", None), "nvfp4": torch.float8_e4m3fn}


def dequantize(
    packed: Tensor,
    *,
    kind: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    scales: Tensor,
    block_size: int | None = None,
    nested: tuple[Tensor, Tensor, int, float | Tensor] | None = None,
    global_scale: float | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Decode a 4-bit weight: a table of 16 values, and a scale for each block of elements.

    Semantics: ``w.flatten()[i] = table[nibble(i)] * scale[i // block_size]``, where two nibbles are a byte of packed

    | kind  | table                | first nibble | block                   | scale                                |
    |-------|----------------------|--------------|-------------------------|--------------------------------------|
    | nf4   | bitsandbytes' NF4    | high         | any, of the flat weight | float32, or nested                   |
    | fp4   | bitsandbytes' FP4    | high         | any, of the flat weight | float32, or nested                   |
    | mxfp4 | E2M1                 | low          | 32, of the last dim     | ``2 ** (e - 127)``; nan where e is 255 |
    | nvfp4 | E2M1                 | low          | 16, of the last dim     | an E4M3 value times global_scale     |

    nested: ``scale = code[scales] * absmax.repeat_interleave(nested block_size) + offset``.

    Args:
        packed (ceil(n / 2) bytes in any shape): uint8; n is the number of elements, the last of which may be alone.
        kind: "nf4" (Dettmers et al. 2023, arXiv:2305.14314), "fp4", "mxfp4" or "nvfp4".
        shape: of the result; it ends with a multiple of the block where that is of the last dimension.
        dtype: of the result: float32, bfloat16, float16, or float64, in which all is then computed.
        scales (a scale for each block, in any shape): float32, or uint8 where they are nested; for "mxfp4" bytes or
            float8_e8m0fnu, for "nvfp4" bytes or float8_e4m3fn.
        block_size: a power of two from 16 to 65536; None is the format's own, 64, 64, 32 or 16.
        nested: ``(code (256,), absmax, block_size, offset)`` of the second level, as bitsandbytes has them in
            ``state2.code``, ``state2.absmax``, ``state2.blocksize`` and ``offset``; the tensors are float32, the offset
            a float or a 0-d tensor.
        global_scale: of "nvfp4", a float or a 0-d tensor; None is 1.
        backend: "torch" or "triton" forces a backend; None takes ``use_backend``'s, then the variable
            PEFT_KERNELS_BACKEND, then chooses.

        Tensors are read in the order of their dimensions; one that is not contiguous is copied first.

    Returns:
        w in a shape and dtype, contiguous. It never requires a gradient: none flows to a packed weight or its scales.

    Raises:
        ValueError: a kind, size, shape, dtype, device or backend name is wrong.
        UnsupportedError: the forced backend cannot run this problem.

    Numerics: scales and products are float32, and each operation is rounded once: product and sum of a nested scale,
    its product with a value, and the result to its dtype. So all backends have equal bits, those of bitsandbytes'
    CPU code and of transformers' MXFP4, except that there 255 is an exponent and no nan.

    Example:
        >>> import torch, peft_kernels as pk
        >>> packed = torch.tensor([0x7F, 0x0F], dtype=torch.uint8)
        >>> pk.four_bit.dequantize(packed, kind="nf4", shape=(2, 2), dtype=torch.float32, scales=torch.tensor([2.0]))
        tensor([[ 0.,  2.],
                [-2.,  2.]])
    """
    if isinstance(scales, Tensor) and scales.dtype == _BYTES.get(kind):
        scales = scales.view(torch.uint8)
    if block_size is None and kind in FORMATS:
        block_size = FORMATS[kind].block_size
    if global_scale is not None and kind != "nvfp4":
        raise ValueError(f"{NAME}: global_scale must be None for {kind}, got {global_scale!r}")
    code, second, second_block, offset = (None, None, 0, 0.0) if nested is None else _second_level(nested)
    call = Inputs(
        packed,
        scales,
        code,
        second,
        offset,
        1.0 if global_scale is None else global_scale,
        kind,
        _sizes(shape),
        dtype,
        block_size,  # type: ignore[arg-type]
        second_block,
    )
    result: Tensor = OPERATOR(call, backend)
    return result


def _second_level(nested: Any) -> tuple[Any, Any, Any, Any]:
    if not isinstance(nested, tuple) or len(nested) != 4:
        got = f"{len(nested)} values" if isinstance(nested, tuple) else type(nested).__name__
        raise ValueError(f"{NAME}: nested must be (code, absmax, block_size, offset), got {got}")
    return nested


def _sizes(shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, Sequence) or isinstance(shape, str):
        raise ValueError(f"{NAME}: shape must be a sequence of sizes, got {type(shape).__name__}")
    return tuple(shape)


OPERATOR = Operator(
    name=NAME,
    call=Inputs,
    needs=Needs,
    implementations=(triton_impl.IMPLEMENTATION, torch_impl.IMPLEMENTATION),
    make_problem=make_problem,
    forward=lambda problem, call, implementation: (implementation.forward(problem, call),),
    results=lambda problem, call, implementation: (call.packed.new_empty(call.shape, dtype=call.dtype),),
    composite=composite,
    varying=("n",),
)
