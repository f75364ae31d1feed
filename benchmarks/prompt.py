"""Prompt tuning: PEFT's repeat and concatenation, and this package's backends.

Each provider puts N prompts in front of a batch of token embeddings and computes the prompts' gradients; the embeddings
are frozen.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import peft_kernels as pk
from benchmarks import shapes
from benchmarks.family import Call, Family, Grid, Mode, Provider, Work
from peft_kernels.prompt.op import prompt_tuning
from python_ref import compare
from python_ref import prompt as oracle


@dataclass(frozen=True)
class Problem:
    """n prompts (p, d) in front of tokens (b, l, d)."""

    model: str
    n: int
    b: int
    p: int
    l: int  # noqa: E741
    d: int
    dtype: str


class Inputs(NamedTuple):
    prompts: Tensor
    tokens: Tensor
    dy: Tensor


def problems(grid: Grid) -> list[Problem]:
    """One prompt as in training, then an ensemble of five."""
    if grid.device_type == "cuda":
        batches = ((8, 512), (4, 2048)) if grid.quick else ((8, 512), (32, 512), (4, 2048), (16, 2048))
        models = shapes.MODELS[:1] if grid.quick else shapes.MODELS
        return [
            _problem(model, n, *batch, p) for model in models for n in (1, 5) for batch in batches for p in (20, 100)
        ]
    lengths = (512,) if grid.quick else (128, 512)
    dtypes = ("float32", "bfloat16")
    return [_problem(shapes.LLAMA_32_1B, n, 4, m, 20, dtype) for dtype in dtypes for n in (1, 5) for m in lengths]


def modes(problem: Problem) -> tuple[Mode, ...]:
    return ("forward", "backward", "both")


def make_inputs(problem: Problem, device: torch.device, seed: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, problem.dtype)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator).to(dtype)

    rows = problem.n * problem.b
    return Inputs(
        prompts=draw(problem.n, problem.p, problem.d).requires_grad_(),
        tokens=draw(problem.b, problem.l, problem.d),
        dy=draw(rows, problem.p + problem.l, problem.d),
    )


def input_bytes(problem: Problem) -> int:
    elements = problem.n * problem.p + problem.b * problem.l + problem.n * problem.b * (problem.p + problem.l)
    return getattr(torch, problem.dtype).itemsize * elements * problem.d


def work(problem: Problem, mode: Mode, provider: Provider) -> Work:
    """Forward reads both inputs and writes y; backward reads the prompts' part of dy and adds it up."""
    size = getattr(torch, problem.dtype).itemsize
    terms = problem.n * problem.b * problem.p * problem.d
    forward = Work(input_bytes(problem), 0)
    backward = Work(size * (terms + problem.n * problem.p * problem.d), terms)
    if mode == "both":
        return Work(forward.bytes + backward.bytes, backward.flops)
    return forward if mode == "forward" else backward


def checker(problem: Problem, inputs: Inputs) -> Callable[[Provider], Mapping[str, float | None]]:
    """Return the check of a provider against the oracle and, for ours, against the error budget."""
    exact_y = oracle.forward(inputs.prompts.detach().double(), inputs.tokens.double())
    exact = oracle.backward(inputs.dy.double(), inputs.prompts, inputs.tokens).prompts
    eager = torch.autograd.grad(oracle.eager(inputs.prompts, inputs.tokens), inputs.prompts, inputs.dy)[0]

    def check(provider: Provider) -> Mapping[str, float | None]:
        call = provider.make(problem, inputs)
        y = call.apply()
        (gradient,) = torch.autograd.grad(y, call.wrt, call.dy)
        if provider.role == "ours":
            compare.assert_close("dprompts", gradient, eager, exact)
        if not torch.equal(y.double(), exact_y):
            raise AssertionError("y is a copy and must equal the oracle's")
        return {"y": 0.0, "dprompts": compare.relative_error(gradient, exact)}

    return check


def _eager(problem: Problem, inputs: Inputs) -> Call:
    return Call(lambda: oracle.eager(inputs.prompts, inputs.tokens), (inputs.prompts,), inputs.dy)


def _ours(problem: Problem, inputs: Inputs, backend: str) -> Call:
    return Call(lambda: prompt_tuning(inputs.tokens, inputs.prompts, backend=backend), (inputs.prompts,), inputs.dy)


def _runs(problem: Problem, device: torch.device) -> str | None:
    return None


def _kernels_why_not(problem: Problem, device: torch.device) -> str | None:
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        return "TRITON_INTERPRET is set: the interpreter is for tests"
    return None


def _problem(model: shapes.Model, n: int, b: int, l: int, p: int, dtype: str = "bfloat16") -> Problem:  # noqa: E741
    return Problem(model.name, n, b, p, l, model.hidden, dtype)


def _our_provider(backend: str, why_not: Callable[[Problem, torch.device], str | None]) -> Provider:
    make = functools.partial(_ours, backend=backend)
    return Provider(f"ours_{backend}", "ours", why_not, make, (pk.UnsupportedError,))


FAMILY = Family(
    name="prompt_tuning",
    problems=problems,
    modes=modes,
    make_inputs=make_inputs,
    input_bytes=input_bytes,
    work=work,
    dtype=lambda problem: getattr(torch, problem.dtype),
    providers=(
        Provider("peft", "baseline", _runs, _eager),
        _our_provider("auto", _runs),
        _our_provider("torch", _runs),
        _our_provider("triton", _kernels_why_not),
    ),
    summarize_by=("dtype", "n"),
    checker=checker,
)
