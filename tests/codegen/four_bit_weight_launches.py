"""The launches of the 4-bit decoder that are compiled ahead of time: kinds, dtypes, blocks, scales of both levels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

from peft_kernels.four_bit_weight import triton_impl
from peft_kernels.four_bit_weight.problem import Inputs, make_problem

# A fused multiply-add would leave out the rounding of a nested scale's product.
FORBIDDEN_OPCODES = ("FFMA",)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def launches() -> Iterator[tuple[str, Callable[[], None]]]:
    """Name and action of each case; a name is `kind/dtype/block/nested block/shape`."""
    for dtype in (BF16, FP16, FP32):
        yield _case("nf4", dtype, 64, 256)
    for block in (64, 4096, 16384):
        yield _case("nf4", BF16, block)
    yield _case("nf4", FP32, 16)
    yield _case("fp4", BF16, 128, 256)
    yield _case("nf4", BF16, 64, 256, (4095, 4095))
    for dtype in (BF16, FP16, FP32):
        yield _case("mxfp4", dtype, 32)
        yield _case("nvfp4", dtype, 16)


def _case(
    kind: str, dtype: torch.dtype, block: int, second: int = 0, shape: tuple[int, int] = (4096, 4096)
) -> tuple[str, Callable[[], None]]:
    short = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}[dtype]
    name = f"{kind}/{short}/{block}/{second}/{'x'.join(map(str, shape))}"
    return name, functools.partial(_launch, kind, dtype, block, second, shape)


def _launch(kind: str, dtype: torch.dtype, block: int, second: int, shape: tuple[int, int]) -> None:
    make = functools.partial(torch.empty, device="meta")
    n = shape[0] * shape[1]
    blocks = -(-n // block)
    is_bytes = second > 0 or kind in ("mxfp4", "nvfp4")
    call = Inputs(
        packed=make((n + 1) // 2, dtype=torch.uint8),
        scales=make(blocks, dtype=torch.uint8 if is_bytes else FP32),
        code=make(256, dtype=FP32) if second else None,
        nested_scales=make(-(-blocks // second), dtype=FP32) if second else None,
        offset=make((), dtype=FP32) if second else 0.0,
        global_scale=make((), dtype=FP32) if kind == "nvfp4" else 1.0,
        kind=kind,
        shape=shape,
        dtype=dtype,
        block_size=block,
        nested_block_size=second,
    )
    triton_impl.forward(make_problem(call), call)


def required_opcodes(kernel: str, launch: str, arch: int) -> tuple[str, ...]:
    """16 bytes of codes a load and of elements a store, where the weight's size says that these are aligned."""
    return ("LDG", "STG") if launch.endswith("4095x4095") else ("LDG.E.128", "STG.E.128")
