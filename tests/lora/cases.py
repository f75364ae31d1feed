"""Problems, their tensors, and the ways to run them, shared by the tests of the LoRA linear family."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

import peft_kernels as pk
from peft_kernels.lora.kernels import config
from python_ref import compare
from python_ref import lora as oracle

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
        return f"{self.m}x{self.n}x{self.k}-r{self.r}-{short[self.dtype]}{adapter}-p{self.p}-{self.layout}{tail}"


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

# Shapes: ragged in every size; aligned for TMA, with several tiles; one token; ranks below, at and above a
# block, and beyond one.
SHAPES = (
    Case(m=37, n=35, k=50, r=5),
    Case(m=140, n=264, k=136, r=16),
    Case(m=1, n=72, k=136, r=32),
    Case(m=70, n=40, k=72, r=33),
    Case(m=20, n=40, k=264, r=130),
)

GRID = (
    *(
        replace(shape, dtype=dtype, adapter_dtype=adapter, p=p, bias=index % 2 == 0)
        for index, shape in enumerate(SHAPES)
        for dtype, adapter in DTYPES
        for p in (0.0, 0.3)
    ),
    Case(layout="columns"),
    Case(layout="strided", dtype=torch.bfloat16, adapter_dtype=torch.float32, p=0.3),
    Case(layout="expanded", dtype=torch.bfloat16),
    # Few rows and a long reduction: K is split between programs, whose partial sums are added afterwards.
    Case(m=9, n=24, k=1100),
    Case(m=9, n=24, k=1100, dtype=torch.bfloat16, adapter_dtype=torch.float32, p=0.3),
    Case(m=9, r=512, dtype=torch.bfloat16, adapter_dtype=torch.float32, p=0.1),
    Case(p=0.99, m=200, k=136),
    Case(scale=-3.0, bias=False),
    Case(scale=0.0),
)


def make(case: Case, device: torch.device, seed: int = 0) -> Tensors:
    """Draw fresh random tensors; the low-rank term is about as large as the base product."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * std

    x = normal(case.m, case.k)
    weight, lora_a = normal(case.n, case.k, std=case.k**-0.5), normal(case.r, case.k, std=case.k**-0.5)
    lora_b, bias = normal(case.n, case.r, std=case.r**-0.5), normal(case.n)
    return _as_asked(case, Tensors(x, weight, lora_a, lora_b, bias), device)


def make_exact(case: Case, device: torch.device, seed: int = 0) -> tuple[Tensors, Tensor]:
    """Draw small integers whose every product and sum is exact in bfloat16, in any order, and an output gradient.

    Rows of x and of the gradient hold a single 1 or -1, so no sum exceeds the rank or the rows plus two, below 256.
    """
    generator = torch.Generator().manual_seed(seed)

    def signs(*shape: int) -> Tensor:
        return torch.randint(-1, 2, shape, generator=generator, dtype=torch.float64)

    def single_signs(rows: int, cols: int) -> Tensor:
        where = torch.randint(0, cols, (rows, 1), generator=generator)
        return torch.zeros(rows, cols, dtype=torch.float64).scatter_(1, where, 2 * (where % 2).double() - 1)

    drawn = Tensors(
        single_signs(case.m, case.k),
        signs(case.n, case.k),
        signs(case.r, case.k),
        signs(case.n, case.r),
        signs(case.n),
    )
    return _as_asked(case, drawn, device), single_signs(case.m, case.n).to(device, case.dtype)


def _as_asked(case: Case, drawn: Tensors, device: torch.device) -> Tensors:
    """Put float64 tensors on the device in the case's dtypes, and x in its layout."""
    adapter = case.adapter_dtype or case.dtype
    x = drawn.x.to(device, case.dtype)
    if case.layout == "columns":
        x = x.t().contiguous().t()
    elif case.layout == "strided":
        x = torch.stack((x, x.flip(1)), dim=-1)[..., 0]
    elif case.layout == "expanded":
        x = x[:1].expand(case.m, case.k)
    return Tensors(
        x=x,
        weight=drawn.weight.to(device, case.dtype),
        lora_a=drawn.lora_a.to(device, adapter),
        lora_b=drawn.lora_b.to(device, adapter),
        bias=drawn.bias.to(device, case.dtype) if case.bias else None,
    )


def output_gradient(case: Case, device: torch.device, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(99 + seed)
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
        y = pk.lora_linear(x, weight, lora_a, lora_b, case.scale, bias, dropout_p=case.p, seed=SEED, backend=backend)
        grads = iter(torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], dy))
    return Result(y.detach(), *(None if leaf is None else next(grads) for leaf in leaves))


def run_eager(case: Case, tensors: Tensors, dy: Tensor) -> Result:
    """Forward and all gradients by eager torch in the same dtypes: what the error budget is measured in."""
    leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in tensors]
    x, weight, lora_a, lora_b, bias = leaves
    y = oracle.eager(
        x, weight, lora_a, lora_b, case.scale, bias, dropout_mask=keep_mask(case, x.device), dropout_p=case.p
    )
    grads = iter(torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], dy))
    return Result(y.detach(), *(None if leaf is None else next(grads) for leaf in leaves))


def run_oracle(case: Case, tensors: Tensors, dy: Tensor) -> Result:
    """Forward and all gradients in float64, on the same rounded inputs."""
    x, weight, lora_a, lora_b, bias = (None if tensor is None else tensor.double() for tensor in tensors)
    mask = keep_mask(case, x.device)
    y, _ = oracle.forward(x, weight, lora_a, lora_b, case.scale, bias, dropout_mask=mask, dropout_p=case.p)
    grads = oracle.backward(dy.double(), x, weight, lora_a, lora_b, case.scale, dropout_mask=mask, dropout_p=case.p)
    return Result(y, grads.x, grads.weight, grads.lora_a, grads.lora_b, grads.bias if case.bias else None)


def check_budget(case: Case, device: torch.device, run: Callable[[Case, Tensors, Tensor], Result]) -> None:
    """Hold a way to run a case against the error budget, and see that it leaves its inputs alone.

    The budget compares norms of rounding errors. Those of n independent values scatter by a share of 1 / sqrt(n), and
    S, whose errors reach most results, has m r values: where these are few, further draws join them.
    """
    draws: list[tuple[Result, Result, Result]] = []
    for seed in range(max(1, min(16, 256 // (case.m * case.r)))):
        tensors, dy = make(case, device, seed), output_gradient(case, device, seed)
        arguments = [tensor for tensor in (*tensors, dy) if tensor is not None]
        before = [tensor.clone() for tensor in arguments]
        ours = run(case, tensors, dy)
        for old, new in zip(before, arguments, strict=True):
            compare.assert_bitwise_equal("an input after the call", new, old)
        draws.append((ours, run_eager(case, tensors, dy), run_oracle(case, tensors, dy)))
    for label in named(draws[0][0]):
        ours, eager, exact = (torch.stack([getattr(draw[index], label) for draw in draws]) for index in range(3))
        compare.assert_close(f"{case} {label}", ours, eager, exact)


def named(result: Result) -> dict[str, Tensor]:
    """The tensors of a result by name, without a bias that is not there."""
    return {name: tensor for name, tensor in zip(Result._fields, result, strict=True) if tensor is not None}


def keep_mask(case: Case, device: torch.device) -> Tensor | None:
    """The mask of SEED, from the oracle's own recipe."""
    return oracle.dropout_mask(SEED, case.m, case.k, case.p).to(device) if case.p else None
