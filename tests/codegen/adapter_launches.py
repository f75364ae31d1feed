"""The bottleneck adapter launches that tests/codegen compiles: forward and backward over dtypes, widths and paths."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

from peft_kernels._core.slots import table_of
from peft_kernels.adapter import triton_impl
from peft_kernels.adapter.problem import Inputs, Needs, make_problem
from peft_kernels.adapter.rows import problem as of_rows
from peft_kernels.adapter.rows import triton_impl as by_rows

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
WIDTH = 4096


def launches() -> Iterator[tuple[str, Callable[[], None]]]:
    """Name and action of each case; a name is `dtype/adapter dtype/r/activation/residual/M/K`."""
    for r in (8, 16, 64, 128, 256, 1024):
        for dtype, adapter in ((BF16, BF16), (BF16, FP32), (FP32, FP32)):
            yield _case(dtype, adapter, r)
    yield _case(FP16, FP16, 64)
    yield _case(FP16, FP32, 64)
    # Blocks of fewer rows; and few rows: the split path at a width that the fused one takes otherwise.
    for m in (4096, 16):
        for dtype, adapter in ((BF16, BF16), (BF16, FP32), (FP32, FP32)):
            yield _case(dtype, adapter, 64, m=m)
    # Activations differ in their registers: erf, exp, and the series of tanh.
    for activation in ("gelu", "gelu_tanh", "silu"):
        yield _case(BF16, BF16, 64, activation)
    # Rows that are no multiple of 16 bytes, of x and of a weight; another tensor than x as residual, also
    # in float32.
    yield _case(BF16, BF16, 64, width=4095)
    yield _case(BF16, BF16, 100)
    yield _case(BF16, BF16, 64, residual="parallel")
    for adapter in (BF16, FP32):
        yield _case(BF16, adapter, 64, residual="wide")
        yield _case(BF16, adapter, 128, residual="wide")
    # An adapter for each row, of 5 slots.
    for r in (16, 64, 128):
        for dtype, adapter in ((BF16, BF16), (BF16, FP32), (FP32, FP32)):
            yield _by_rows(dtype, adapter, r)
    yield _by_rows(FP16, FP16, 64)
    yield _by_rows(BF16, BF16, 64, "gelu")


def required_opcodes(kernel: str, launch: str, arch: int) -> tuple[str, ...]:
    """The instructions that a kernel must show: asynchronous copies; tensor cores where halves are multiplied."""
    if kernel == "copy_others_kernel":
        return ()
    # Float32 without TF32 has none, and neither has a float32 gradient of the output beside float32 weights.
    if launch.startswith("fp32/") or (launch.startswith("bf16/fp32/") and "/wide/" in launch):
        return ("LDGSTS",)
    return ("HMMA|HGMMA|UTCHMMA|UTCQMMA", "LDGSTS")


def _case(
    dtype: torch.dtype,
    adapter: torch.dtype,
    r: int,
    activation: str = "relu",
    *,
    m: int = 8192,
    width: int = WIDTH,
    residual: str = "serial",
) -> tuple[str, Callable[[], None]]:
    short = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
    name = f"{short[dtype]}/{short[adapter]}/r{r}/{activation}/{residual}/M{m}/K{width}"
    return name, functools.partial(_launch, dtype, adapter, r, activation, m, width, residual)


def _launch(
    dtype: torch.dtype, adapter: torch.dtype, r: int, activation: str, m: int, width: int, residual: str
) -> None:
    make = functools.partial(torch.empty, device="meta")
    out_dtype = FP32 if residual == "wide" else dtype
    serial = residual == "serial"
    inputs = Inputs(
        x=make(m, width, dtype=dtype),
        down_weight=make(r, width, dtype=adapter),
        up_weight=make(width, r, dtype=adapter),
        down_bias=make(r, dtype=adapter),
        up_bias=make(width, dtype=adapter),
        residual=None if serial else make(m, width, dtype=out_dtype),
        serial=serial,
        activation=activation,
        scale=0.5,
    )
    problem = make_problem(inputs)
    _, z = triton_impl.forward(problem, inputs)
    triton_impl.backward(problem, inputs, z, make(m, width, dtype=out_dtype), Needs(*[True] * 5))


def _by_rows(
    dtype: torch.dtype, adapter: torch.dtype, r: int, activation: str = "relu"
) -> tuple[str, Callable[[], None]]:
    short = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
    name = f"{short[dtype]}/{short[adapter]}/r{r}/{activation}/rows/M8192/K{WIDTH}"
    return name, functools.partial(_launch_by_rows, dtype, adapter, r, activation)


def _launch_by_rows(dtype: torch.dtype, adapter: torch.dtype, r: int, activation: str) -> None:
    make, m, ranks = functools.partial(torch.empty, device="meta"), 8192, (r, 8, 8, 8, r)
    inputs = of_rows.Inputs(
        x=make(m, WIDTH, dtype=dtype),
        down_weight=make(sum(ranks), WIDTH, dtype=adapter),
        up_weight=make(WIDTH, sum(ranks), dtype=adapter),
        down_bias=make(sum(ranks), dtype=adapter),
        up_bias=make(len(ranks), WIDTH, dtype=adapter),
        residual=None,
        serial=True,
        activation=activation,
        scales=make(len(ranks)),
        table=table_of(ranks, torch.device("meta")),
        ranks=ranks,
        slot=make(m, dtype=torch.int32),
        order=make(m, dtype=torch.int32),
        first=make(len(ranks) + 1, dtype=torch.int32),
        runs=None,
    )
    problem = of_rows.make_problem(inputs)
    _, z = by_rows.forward(problem, inputs)
    by_rows.backward(problem, inputs, z, make(m, WIDTH, dtype=dtype), of_rows.Needs(*[True] * 5))
