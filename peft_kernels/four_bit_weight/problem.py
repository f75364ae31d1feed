"""What a call is made of: the tensors, the facts that backends decide on, and every check, once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_kernels._core import checks
from peft_kernels._core.errors import UnsupportedError
from peft_kernels.four_bit_weight.kernels.formats import FORMATS, Format

NAME = "four_bit_dequantize"
LEAST_BLOCK, LARGEST_BLOCK = 16, 1 << 16


class Inputs(NamedTuple):
    """The arguments of one call.

    Attributes:
        packed: (ceil(n / 2)) uint8 in any shape; n elements.
        scales: one a block, in any shape: float32, or uint8 codes.
        code, nested_scales: of the second level, or None.
        offset: added to nested scales.
        global_scale: by which NVFP4's are multiplied.
        kind: name of the format.
        shape, dtype: of the result.
        block_size, nested_block_size: elements of a scale, scales of a nested one, which is 0 without the second level.
    """

    packed: Tensor
    scales: Tensor
    code: Tensor | None
    nested_scales: Tensor | None
    offset: float | Tensor
    global_scale: float | Tensor
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    block_size: int
    nested_block_size: int


class Needs(NamedTuple):
    """No gradient flows to a packed weight."""


@dataclass(frozen=True)
class DequantizeProblem:
    """The facts that choose a backend and its configs.

    Attributes:
        n: elements.
        kind, block_size, nested_block_size: as the call's.
        dtype: of the result.
        device: of all tensors.
    """

    n: int
    kind: str
    block_size: int
    nested_block_size: int
    dtype: torch.dtype
    device: torch.device

    @property
    def format(self) -> Format:
        return FORMATS[self.kind]

    @property
    def wide_dtype(self) -> torch.dtype:
        """Of scales and products."""
        return checks.wide_dtype(self.dtype)

    @property
    def is_empty(self) -> bool:
        """Whether the result has no element."""
        return self.n == 0


def make_problem(call: Inputs) -> DequantizeProblem:
    """Check the arguments of a call and describe it.

    Raises:
        ValueError: naming the argument, what it must be and what it was.
    """
    if not isinstance(call.kind, str) or call.kind not in FORMATS:
        raise ValueError(f"{NAME}: kind must be one of {', '.join(map(repr, FORMATS))}, got {call.kind!r}")
    if call.dtype not in checks.FLOATING:
        raise ValueError(f"{NAME}: dtype must be one of {', '.join(map(str, checks.FLOATING))}, got {call.dtype}")
    n = _elements(call.shape)
    _check_block(call)
    for name, value in (("nested's offset", call.offset), ("global_scale", call.global_scale)):
        checks.scalar(NAME, name, value)
        if isinstance(value, Tensor):
            _check_dense(name, value, call)
    _check_bytes("packed", call.packed, (n + 1) // 2, f"ceil(n / 2) bytes for a weight of {tuple(call.shape)}", call)
    _check_scales(call, blocks := -(-n // call.block_size))
    if call.nested_block_size or call.code is not None or call.nested_scales is not None:
        _check_nested(call, blocks)
    return DequantizeProblem(n, call.kind, call.block_size, call.nested_block_size, call.dtype, call.packed.device)


def _elements(shape: Sequence[Any]) -> int:
    # torch.SymInt, while a graph is traced.
    if not all(isinstance(size, (int, torch.SymInt)) and size >= 0 for size in shape):
        raise ValueError(f"{NAME}: shape must be of sizes of at least 0, got {tuple(shape)}")
    return math.prod(shape)


def _check_block(call: Inputs) -> None:
    size, known = call.block_size, FORMATS[call.kind]
    if known.is_fixed:
        if size != known.block_size:
            raise ValueError(f"{NAME}: block_size of {call.kind} must be {known.block_size}, got {size!r}")
        if not call.shape or call.shape[-1] % size:
            raise ValueError(
                f"{NAME}: shape must end with a multiple of {size}, the block of {call.kind}, got {tuple(call.shape)}"
            )
    elif not isinstance(size, int) or size & (size - 1) or not LEAST_BLOCK <= size <= LARGEST_BLOCK:
        raise ValueError(
            f"{NAME}: block_size must be a power of two from {LEAST_BLOCK} to {LARGEST_BLOCK}, got {size!r}"
        )


def _check_scales(call: Inputs, blocks: int) -> None:
    what = f"one for each of the {blocks} blocks of {call.block_size}"
    if FORMATS[call.kind].scale != "float32":
        _check_bytes("scales", call.scales, blocks, what, call)
        return
    _check_dense("scales", call.scales, call)
    if call.scales.dtype not in (torch.float32, torch.uint8):
        raise ValueError(
            f"{NAME}: scales of {call.kind} must be float32, or uint8 beside nested, got {call.scales.dtype}"
        )
    if (call.scales.dtype == torch.uint8) != (call.code is not None):
        missing = call.code is None
        raise ValueError(
            f"{NAME}: nested must {'' if missing else 'not '}be given where scales are {call.scales.dtype}, "
            f"got {'None' if missing else 'a second level'}"
        )
    _check_number("scales", call.scales, blocks, what)


def _check_nested(call: Inputs, blocks: int) -> None:
    if FORMATS[call.kind].scale != "float32":
        raise ValueError(f"{NAME}: nested must be None for {call.kind}, got a second level")
    size = call.nested_block_size
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"{NAME}: nested's block_size must be an int of at least 1, got {size!r}")
    second: tuple[tuple[str, Any, int, str], ...] = (
        ("nested's code", call.code, 256, "a value for each uint8"),
        ("nested's absmax", call.nested_scales, -(-blocks // size), f"one for each {size} of the {blocks} scales"),
    )
    for name, tensor, count, what in second:
        _check_dense(name, tensor, call)
        if tensor.dtype != torch.float32:
            raise ValueError(f"{NAME}: {name} must be float32, got {tensor.dtype}")
        _check_number(name, tensor, count, what)


def _check_bytes(name: str, tensor: Any, count: int, what: str, call: Inputs) -> None:
    _check_dense(name, tensor, call)
    if tensor.dtype != torch.uint8:
        raise ValueError(f"{NAME}: {name} must be uint8, got {tensor.dtype}; .view(torch.uint8) reads other storage")
    _check_number(name, tensor, count, what)


def _check_number(name: str, tensor: Tensor, count: int, what: str) -> None:
    if tensor.numel() != count:
        raise ValueError(f"{NAME}: {name} must have {count} elements, {what}, got {tuple(tensor.shape)}")


def _check_dense(name: str, tensor: Any, call: Inputs) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{NAME}: {name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.is_nested:
        raise UnsupportedError(f"{NAME}: {name} must be a dense tensor, got a nested one")
    if tensor.layout is not torch.strided:
        raise ValueError(f"{NAME}: {name} must be a dense tensor, got a {tensor.layout} one")
    if tensor.device != call.packed.device:
        raise ValueError(f"{NAME}: {name} must be on the device of packed ({call.packed.device}), got {tensor.device}")
