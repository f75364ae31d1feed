"""The prompt tuning launches that are compiled ahead of time: forward, backward; dtypes, one prompt and several."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

from peft_kernels.prompt import triton_impl
from peft_kernels.prompt.problem import Inputs, Needs, make_problem

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def launches() -> Iterator[tuple[str, Callable[[], None]]]:
    """Name and action of each case; a name is `dtype/prompt dtype/N/D`."""
    for dtype, prompt in ((BF16, BF16), (BF16, FP32), (FP16, FP32), (FP32, FP32)):
        yield _case(dtype, prompt, 1, 4096)
    yield _case(BF16, FP32, 5, 4095)
    yield _case(BF16, BF16, 5, 64)


def _case(dtype: torch.dtype, prompt: torch.dtype, n: int, d: int) -> tuple[str, Callable[[], None]]:
    short = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
    return f"{short[dtype]}/{short[prompt]}/N{n}/D{d}", functools.partial(_launch, dtype, prompt, n, d)


def _launch(dtype: torch.dtype, prompt: torch.dtype, n: int, d: int) -> None:
    make = functools.partial(torch.empty, device="meta")
    inputs = Inputs(token_embeddings=make(8, 512, d, dtype=dtype), prompts=make(n, 20, d, dtype=prompt))
    problem = make_problem(inputs)
    y = triton_impl.forward(problem, inputs)
    triton_impl.backward(problem, y, Needs(*[True] * 2))


def required_opcodes(kernel: str, launch: str, arch: int) -> tuple[str, ...]:
    """Copies and sums need no instruction in particular, but what they read and write."""
    return ("LDG", "STG")
