"""4-bit weights: a copy of as many bytes, bitsandbytes' kernels, eager torch, and this package's backends.

Each provider decodes one frozen weight; there is no backward pass.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import peft_kernels as pk
from benchmarks import shapes
from benchmarks.family import Call, Family, Grid, Mode, Provider, Work
from peft_kernels.four_bit_weight.problem import NAME
from python_ref import compare
from python_ref import four_bit_weight as oracle

BLOCKS = {"nf4": 64, "fp4": 64, "mxfp4": 32, "nvfp4": 16}
NESTED_BLOCK = 256


@dataclass(frozen=True)
class Problem:
    """A weight (n, k); ``nested`` is 1 where the scales are quantized too."""

    model: str
    n: int
    k: int
    kind: str
    nested: int
    dtype: str

    @property
    def blocks(self) -> int:
        return self.n * self.k // BLOCKS[self.kind]


class Inputs(NamedTuple):
    packed: Tensor
    scales: Tensor
    nested: tuple[Tensor, Tensor, int, Tensor] | None
    global_scale: Tensor | None


def problems(grid: Grid) -> list[Problem]:
    """NF4 as QLoRA has it, then the other formats, on the layers of models."""
    if grid.device_type != "cuda":
        dtypes = ("bfloat16",) if grid.quick else ("bfloat16", "float32")
        kinds = (("nf4", 1), ("nf4", 0), ("mxfp4", 0))
        return [Problem("square", 2048, 2048, kind, nested, dtype) for dtype in dtypes for kind, nested in kinds]
    kinds = (
        (("nf4", 1), ("mxfp4", 0)) if grid.quick else (("nf4", 1), ("nf4", 0), ("fp4", 1), ("mxfp4", 0), ("nvfp4", 0))
    )
    layers = [each for model in shapes.MODELS[: 1 if grid.quick else None] for each in shapes.projections(model)]
    return [Problem(each.model, each.n, each.k, kind, nested, "bfloat16") for kind, nested in kinds for each in layers]


def modes(problem: Problem) -> tuple[Mode, ...]:
    return ("forward",)


def make_inputs(problem: Problem, device: torch.device, seed: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)

    def codes(least: int, end: int, count: int) -> Tensor:
        return torch.randint(least, end, (count,), device=device, generator=generator, dtype=torch.uint8)

    def normal(count: int) -> Tensor:
        return torch.randn(count, device=device, generator=generator)

    packed, nested, global_scale = codes(0, 256, problem.n * problem.k // 2), None, None
    if problem.kind in ("mxfp4", "nvfp4"):
        scales = codes(40, 80, problem.blocks) if problem.kind == "nvfp4" else codes(118, 130, problem.blocks)
        global_scale = torch.full((), 0.37, device=device) if problem.kind == "nvfp4" else None
    elif problem.nested:
        scales, offset = codes(0, 256, problem.blocks), torch.full((), 0.7, device=device)
        nested = (normal(256), normal(-(-problem.blocks // NESTED_BLOCK)), NESTED_BLOCK, offset)
    else:
        scales = normal(problem.blocks)
    return Inputs(packed, scales, nested, global_scale)


def _read(problem: Problem) -> int:
    """Bytes of codes, scales and what those are made of."""
    is_bytes = problem.nested or problem.kind in ("mxfp4", "nvfp4")
    second = 4 * (-(-problem.blocks // NESTED_BLOCK) + 256) if problem.nested else 0
    return problem.n * problem.k // 2 + problem.blocks * (1 if is_bytes else 4) + second


def input_bytes(problem: Problem) -> int:
    return _read(problem) + _written(problem)


def _written(problem: Problem) -> int:
    return int(getattr(torch, problem.dtype).itemsize) * problem.n * problem.k


def work(problem: Problem, mode: Mode, provider: Provider) -> Work:
    """Codes and scales are read once, the weight is written once; a product an element."""
    return Work(_read(problem) + _written(problem), problem.n * problem.k)


def _given(problem: Problem, inputs: Inputs) -> dict[str, Any]:
    return {
        "packed": inputs.packed,
        "kind": problem.kind,
        "shape": (problem.n, problem.k),
        "dtype": getattr(torch, problem.dtype),
        "scales": inputs.scales,
        "nested": inputs.nested,
        "global_scale": inputs.global_scale,
    }


def _eager_of(problem: Problem, inputs: Inputs, dtype: torch.dtype) -> Tensor:
    global_scale = 1.0 if inputs.global_scale is None else inputs.global_scale
    given = _given(problem, inputs) | {"global_scale": global_scale, "dtype": dtype}
    return oracle.eager(**given, block=BLOCKS[problem.kind])


def checker(problem: Problem, inputs: Inputs) -> Callable[[Provider], Mapping[str, float | None]]:
    """Return the check of a provider against eager torch's float32 product, whose rounded bits are ours.

    The oracle goes element by element, which takes minutes for a layer; tests hold eager torch against it.
    """
    exact = _eager_of(problem, inputs, torch.float64)  # the float32 product, cast
    eager = exact.to(getattr(torch, problem.dtype))

    def check(provider: Provider) -> Mapping[str, float | None]:
        if provider.role == "limit":
            return {"y": None}
        w = provider.make(problem, inputs).apply()
        if provider.role == "ours" and not torch.equal(w, eager):
            raise AssertionError("w must be eager's")
        return {"y": compare.relative_error(w, exact)}

    return check


def _copy(problem: Problem, inputs: Inputs) -> Call:
    """A read and a write of half of the bytes each."""
    half = torch.empty(input_bytes(problem) // 2, dtype=torch.uint8, device=inputs.packed.device)
    target = torch.empty_like(half)
    return Call(lambda: target.copy_(half), (), target)


def _eager(problem: Problem, inputs: Inputs) -> Call:
    return Call(lambda: _eager_of(problem, inputs, getattr(torch, problem.dtype)), (), inputs.packed)


def _bitsandbytes(problem: Problem, inputs: Inputs) -> Call:
    from bitsandbytes import functional

    code, absmax, block, offset = inputs.nested or (None, None, 0, None)
    second = functional.QuantState(absmax=absmax, code=code, blocksize=block, dtype=torch.float32)
    state = functional.QuantState(
        absmax=inputs.scales, shape=torch.Size((problem.n, problem.k)), blocksize=BLOCKS[problem.kind],
        quant_type=problem.kind, dtype=getattr(torch, problem.dtype), offset=offset,
        state2=second if inputs.nested else None,
    )  # fmt: skip
    packed = inputs.packed[:, None]
    return Call(lambda: functional.dequantize_4bit(packed, state), (), packed)


def _ours(problem: Problem, inputs: Inputs, backend: str) -> Call:
    given = _given(problem, inputs)
    return Call(lambda: pk.four_bit.dequantize(**given, backend=backend), (), inputs.packed)


def _runs(problem: Problem, device: torch.device) -> str | None:
    return None


def _bitsandbytes_why_not(problem: Problem, device: torch.device) -> str | None:
    if problem.kind not in ("nf4", "fp4"):
        return f"bitsandbytes has no {problem.kind}"
    return None if importlib.util.find_spec("bitsandbytes") else "the package bitsandbytes is not installed"


def _kernels_why_not(problem: Problem, device: torch.device) -> str | None:
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        return "TRITON_INTERPRET is set: the interpreter is for tests"
    return None


def _our_provider(backend: str, why_not: Callable[[Problem, torch.device], str | None]) -> Provider:
    make = functools.partial(_ours, backend=backend)
    return Provider(f"ours_{backend}", "ours", why_not, make, (pk.UnsupportedError,))


FAMILY = Family(
    name=NAME,
    problems=problems,
    modes=modes,
    make_inputs=make_inputs,
    input_bytes=input_bytes,
    work=work,
    dtype=lambda problem: getattr(torch, problem.dtype),
    providers=(
        Provider("copy", "limit", _runs, _copy),
        Provider("bitsandbytes", "baseline", _bitsandbytes_why_not, _bitsandbytes),
        Provider("eager", "baseline", _runs, _eager),
        _our_provider("auto", _runs),
        _our_provider("torch", _runs),
        _our_provider("triton", _kernels_why_not),
    ),
    summarize_by=("dtype", "kind", "nested"),
    checker=checker,
)
