"""Problems, their tensors, and the ways to run them, shared by the tests of the LoRA linear family."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

import peft_kernels as pk
from peft_kernels.lora_linear import config
from python_ref import lora_linear as oracle

SEED = 20240229

# Backend, and which path of the Triton backend computes the base product.
VARIANTS = ("torch", "triton-fused", "triton-cublas")


@dataclass(frozen=True)
class Case:
    """One problem; ``layout`` says how x lies in memory."""

    m: int = 37
    n: int = 72
    k: int = 40
    r: int = 5
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None
    p: float = 0.0
    bias: bool = True
    scale: float = 0.75
    layout: str = "rows"

    def __str__(self) -> str:
        short = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
        adapter = f"+{short[self.adapter_dtype]}" if self.adapter_dtype else ""
        tail = "" if self.bias else "-nobias"
        return (
            f"{self.m}x{self.n}x{self.k}-r{self.r}-{short[self.dtype]}{adapter}-p{self.p}-{self.layout}{tail}"
        )


class Tensors(NamedTuple):
    x: Tensor
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    bias: Tensor | None


class Result(NamedTuple):
    """Output and gradients of one run."""

    y: Tensor
    x: Tensor
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    bias: Tensor | None


DTYPES = (
    (torch.float32, None),
    (torch.bfloat16, None),
    (torch.float16, None),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
)

# Shapes: ragged in every size; aligned for the copy engine, with several tiles; one token; the smallest of all;
# ranks below, at and above a block, and beyond one.
SHAPES = (
    Case(m=37, n=35, k=50, r=5),
    Case(m=140, n=264, k=136, r=16),
    Case(m=1, n=72, k=40, r=3),
    Case(m=2, n=1, k=1, r=1),
    Case(m=70, n=40, k=72, r=33),
    Case(m=20, n=40, k=264, r=130),
)

GRID = tuple(
    replace(shape, dtype=dtype, adapter_dtype=adapter, p=p, bias=index % 2 == 0)
    for index, shape in enumerate(SHAPES)
    for dtype, adapter in DTYPES
    for p in (0.0, 0.3)
) + (
    Case(layout="columns"),
    Case(layout="strided", dtype=torch.bfloat16, adapter_dtype=torch.float32, p=0.3),
    Case(layout="expanded", dtype=torch.bfloat16),
    Case(m=9, r=512, dtype=torch.bfloat16, adapter_dtype=torch.float32, p=0.1),
    Case(p=0.999, m=64),
    Case(scale=-3.0, bias=False),
    Case(scale=0.0),
)


def make(case: Case, device: torch.device, seed: int = 0) -> Tensors:
    """Draw fresh random tensors; the low-rank term is about as large as the base product."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0, dtype: torch.dtype = case.dtype) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * std).to(device, dtype)

    adapter = case.adapter_dtype or case.dtype
    x = normal(case.m, case.k)
    if case.layout == "columns":
        x = x.t().contiguous().t()
    elif case.layout == "strided":
        x = normal(case.m, 2 * case.k + 3)[:, 1 : 2 * case.k + 1 : 2]
    elif case.layout == "expanded":
        x = normal(1, case.k).expand(case.m, case.k)
    return Tensors(
        x=x,
        weight=normal(case.n, case.k, std=case.k**-0.5),
        lora_a=normal(case.r, case.k, std=case.k**-0.5, dtype=adapter),
        lora_b=normal(case.n, case.r, std=case.r**-0.5, dtype=adapter),
        bias=normal(case.n) if case.bias else None,
    )


def output_gradient(case: Case, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(99)
    return torch.randn(case.m, case.n, generator=generator, dtype=torch.float64).to(device, case.dtype)


@contextlib.contextmanager
def variant(name: str) -> Iterator[str]:
    """Yield the backend's name, with the Triton backend's path for the base product pinned."""
    backend, _, path = name.partition("-")
    with contextlib.ExitStack() as stack:
        if path:
            stack.enter_context(mock.patch.object(config, "base_product_path", lambda *_: path))
        yield backend


def run_ours(case: Case, tensors: Tensors, dy: Tensor, name: str) -> Result:
    """Forward and all gradients by the package."""
    leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in tensors]
    x, weight, lora_a, lora_b, bias = leaves
    with variant(name) as backend:
        y = pk.lora_linear(
            x, weight, lora_a, lora_b, case.scale, bias, dropout_p=case.p, seed=SEED, backend=backend
        )
        grads = iter(torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], dy))
    return Result(y.detach(), *(None if leaf is None else next(grads) for leaf in leaves))


def run_eager(case: Case, tensors: Tensors, dy: Tensor) -> Result:
    """Forward and all gradients by eager torch in the same dtypes: what the error budget is measured in."""
    leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in tensors]
    x, weight, lora_a, lora_b, bias = leaves
    y = oracle.eager(x, weight, lora_a, lora_b, case.scale, bias, dropout_mask=keep_mask(case, x.device), dropout_p=case.p)
    grads = iter(torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], dy))
    return Result(y.detach(), *(None if leaf is None else next(grads) for leaf in leaves))


def run_oracle(case: Case, tensors: Tensors, dy: Tensor) -> Result:
    """Forward and all gradients in float64, on the same rounded inputs."""
    x, weight, lora_a, lora_b, bias = (None if tensor is None else tensor.double() for tensor in tensors)
    mask = keep_mask(case, x.device)
    y, _ = oracle.forward(x, weight, lora_a, lora_b, case.scale, bias, dropout_mask=mask, dropout_p=case.p)
    grads = oracle.backward(
        dy.double(), x, weight, lora_a, lora_b, case.scale, dropout_mask=mask, dropout_p=case.p
    )
    return Result(y, grads.x, grads.weight, grads.lora_a, grads.lora_b, grads.bias if case.bias else None)


def keep_mask(case: Case, device: torch.device) -> Tensor | None:
    """The mask of SEED, from the oracle's own recipe."""
    return oracle.dropout_mask(SEED, case.m, case.k, case.p).to(device) if case.p else None
