"""LoRA linear: the frozen layer, PEFT's, PEFT's compiled, torch's in-place products, and this package's backends.

Each provider computes y = x W^T + scale (drop(x) A^T) B^T and the gradients of x, A and B; ``base`` is the frozen layer
alone and so the time that the low-rank branch would have if it were free.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

import peft_kernels as pk
from benchmarks import shapes
from benchmarks.family import Call, Family, Grid, Mode, Provider, Work
from python_ref import compare
from python_ref import lora as oracle

SCALE = 2
_CHECK_SEED = 20240229
# The oracle takes float64 products: all rows of a problem below this many multiplications, else the first few rows,
# where y and dX can be checked but not the sums over all rows, dA and dB.
_ORACLE_PRODUCTS = {"cuda": 1 << 41, "cpu": 1 << 33}
_ORACLE_ROWS = 64


@dataclass(frozen=True)
class Problem:
    """One layer at one batch: x (m, k), W (n, k), A (r, k), B (n, r)."""

    model: str
    projection: str
    m: int
    n: int
    k: int
    r: int
    dtype: str
    adapter_dtype: str
    p: float


class Inputs(NamedTuple):
    x: Tensor
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    dy: Tensor


class _Reference(NamedTuple):
    """What the first rows, or all of them, of the results should be, and what eager torch makes of them."""

    rows: int
    oracle: dict[str, Tensor]
    eager: dict[str, Tensor]


class _InPlace(torch.autograd.Function):
    """What a careful user writes: ``addmm_`` adds the branch to the base product, without another (M, N) tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
        a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        y = F.linear(x, weight)
        s = x @ a.t()
        y.addmm_(s, b.t(), alpha=scale)
        ctx.save_for_backward(x, weight, lora_a, lora_b, s)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_a, lora_b, s = ctx.saved_tensors
        a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        ds = (dy @ b).mul_(ctx.scale)
        dx = dy @ weight
        dx.addmm_(ds, a)
        da = (ds.t() @ x).to(lora_a.dtype)
        db = (dy.t() @ s).mul_(ctx.scale).to(lora_b.dtype)
        return dx, None, da, db, None


def problems(grid: Grid) -> list[Problem]:
    """One factor at a time around the usual training step: r = 16, no dropout, adapters in the base's dtype."""
    if grid.device_type == "cuda":
        return _quick_gpu_problems() if grid.quick else _gpu_problems()
    return _quick_cpu_problems() if grid.quick else _cpu_problems()


def modes(problem: Problem) -> tuple[Mode, ...]:
    """Decoding has no backward pass."""
    return ("forward",) if problem.m in shapes.TOKENS_DECODE else ("forward", "backward", "both")


def make_inputs(problem: Problem, device: torch.device, seed: int) -> Inputs:
    """Draw random tensors; weights are scaled so that y and dX have the size of x and dY."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype, adapter_dtype = getattr(torch, problem.dtype), getattr(torch, problem.adapter_dtype)

    def draw(rows: int, cols: int, size: float, to: torch.dtype) -> Tensor:
        return torch.randn(rows, cols, device=device, generator=generator).mul_(size).to(to)

    return Inputs(
        x=draw(problem.m, problem.k, 1.0, dtype).requires_grad_(),
        weight=draw(problem.n, problem.k, problem.k**-0.5, dtype),
        lora_a=draw(problem.r, problem.k, problem.k**-0.5, adapter_dtype).requires_grad_(),
        lora_b=draw(problem.n, problem.r, problem.r**-0.5, adapter_dtype).requires_grad_(),
        dy=draw(problem.m, problem.n, 1.0, dtype),
    )


def input_bytes(problem: Problem) -> int:
    size, adapter_size = _sizes(problem)
    m, n, k, r = problem.m, problem.n, problem.k, problem.r
    return size * (m * k + n * k + m * n) + adapter_size * r * (k + n)


def work(problem: Problem, mode: Mode, provider: Provider) -> Work:
    """Count bytes and operations of one kernel each way; those of ``base`` are the frozen layer's alone.

    Between forward and backward S (m, r) goes out in float32 and comes back. The draws of dropout are not counted.
    """
    forward, backward = _forward_work(problem), _backward_work(problem)
    s = 4 * problem.m * problem.r
    if provider.name == "base":
        size, _ = _sizes(problem)
        m, n, k = problem.m, problem.n, problem.k
        # dX = dY W needs no x: the layer is frozen.
        forward = backward = Work(size * (m * k + n * k + m * n), 2 * m * n * k)
        s = 0
    if mode == "forward":
        return forward
    backward = Work(backward.bytes + s, backward.flops)
    if mode == "backward":
        return backward
    return Work(forward.bytes + s + backward.bytes, forward.flops + backward.flops)


def checker(
    problem: Problem, inputs: Inputs, ours: Callable[..., Call] | None = None
) -> Callable[[Provider], Mapping[str, float | None]]:
    """Return the check of a provider against the float64 oracle and, for ours, against the error budget.

    A baseline with dropout draws its own mask and cannot be compared; its code is checked where nothing is dropped.
    ``ours`` makes the call of another family's provider, with a seed.
    """
    reference = _reference(problem, inputs)

    def check(provider: Provider) -> Mapping[str, float | None]:
        if provider.name == "base" or (problem.p > 0 and provider.role != "ours"):
            return dict.fromkeys(("y", "dx", "da", "db"))
        with_seed = functools.partial(ours or _ours, problem, inputs, seed=_CHECK_SEED)
        call = with_seed(provider=provider.name) if provider.role == "ours" else None
        got = _results(call or provider.make(problem, inputs), reference)
        if provider.role == "ours":
            for name, value in got.items():
                compare.assert_close(name, value, reference.eager[name], reference.oracle[name])
        return {
            name: compare.relative_error(got[name], reference.oracle[name]) if name in got else None
            for name in ("y", "dx", "da", "db")
        }

    return check


def checked_rows(m: int, products: int, device: torch.device) -> int:
    """How many of m rows, each of so many products, the oracle takes."""
    return m if m * products <= _ORACLE_PRODUCTS[device.type] else min(m, _ORACLE_ROWS)


def _reference(problem: Problem, inputs: Inputs) -> _Reference:
    rows = checked_rows(problem.m, problem.n * problem.k, inputs.x.device)
    mask = None
    if problem.p > 0:
        mask = pk.lora_linear_dropout_mask(_CHECK_SEED, rows, problem.k, problem.p, device=inputs.x.device)
    head = inputs._replace(x=inputs.x.detach()[:rows].requires_grad_(), dy=inputs.dy[:rows])
    y = oracle.eager(head.x, head.weight, head.lora_a, head.lora_b, SCALE, dropout_mask=mask, dropout_p=problem.p)
    gradients = torch.autograd.grad(y, (head.x, head.lora_a, head.lora_b), head.dy)
    eager = dict(zip(("y", "dx", "da", "db"), (y.detach(), *gradients), strict=True))

    x, weight, lora_a, lora_b, dy = (tensor.detach().double() for tensor in head)
    exact, _ = oracle.forward(x, weight, lora_a, lora_b, SCALE, dropout_mask=mask, dropout_p=problem.p)
    grads = oracle.backward(dy, x, weight, lora_a, lora_b, SCALE, dropout_mask=mask, dropout_p=problem.p)
    expected = {"y": exact, "dx": grads.x, "da": grads.lora_a, "db": grads.lora_b}
    names = ("y", "dx", "da", "db") if rows == problem.m else ("y", "dx")
    return _Reference(rows, {name: expected[name] for name in names}, {name: eager[name] for name in names})


def _results(call: Call, reference: _Reference) -> dict[str, Tensor]:
    y = call.apply()
    dx, da, db = torch.autograd.grad(y, call.wrt, call.dy)
    got = {"y": y.detach()[: reference.rows], "dx": dx[: reference.rows], "da": da, "db": db}
    return {name: got[name] for name in reference.oracle}


def _base(problem: Problem, inputs: Inputs) -> Call:
    return Call(lambda: F.linear(inputs.x, inputs.weight), (inputs.x,), inputs.dy)


def _peft(problem: Problem, inputs: Inputs) -> Call:
    layer = _peft_layer(problem, inputs)
    return Call(lambda: layer(inputs.x), _wrt(inputs), inputs.dy)


def _peft_compiled(problem: Problem, inputs: Inputs) -> Call:
    layer = torch.compile(_peft_layer(problem, inputs), dynamic=False)
    return Call(lambda: layer(inputs.x), _wrt(inputs), inputs.dy)


def _addmm(problem: Problem, inputs: Inputs) -> Call:
    x, weight, lora_a, lora_b, dy = inputs
    return Call(lambda: _InPlace.apply(x, weight, lora_a, lora_b, SCALE), _wrt(inputs), dy)


def _ours(problem: Problem, inputs: Inputs, provider: str, seed: int | None = None) -> Call:
    x, weight, lora_a, lora_b, dy = inputs
    backend = provider.removeprefix("ours_")

    def apply() -> Tensor:
        return pk.lora_linear(x, weight, lora_a, lora_b, SCALE, dropout_p=problem.p, seed=seed, backend=backend)

    return Call(apply, _wrt(inputs), dy)


def _wrt(inputs: Inputs) -> tuple[Tensor, ...]:
    return inputs.x, inputs.lora_a, inputs.lora_b


def _peft_layer(problem: Problem, inputs: Inputs) -> nn.Module:
    """PEFT's layer in training mode over the given tensors, none of which is copied."""
    base = nn.Linear(problem.k, problem.n, bias=False, device="meta")
    base.weight = nn.Parameter(inputs.weight, requires_grad=False)
    config = LoraConfig(r=problem.r, lora_alpha=SCALE * problem.r, lora_dropout=problem.p, init_lora_weights=False)
    layer = PeftLinear(base, "default", config=config, r=problem.r, lora_alpha=SCALE * problem.r)
    adapters = {"lora_A": inputs.lora_a, "lora_B": inputs.lora_b}
    for name, tensor in adapters.items():
        # A Parameter would be another leaf than the one that gradients are asked for.
        linear = getattr(layer, name)["default"]
        del linear.weight
        linear.weight = tensor
    return layer.train()


def _runs(problem: Problem, device: torch.device) -> str | None:
    return None


def _compiled_why_not(problem: Problem, device: torch.device) -> str | None:
    # On a CPU compiling would take longer than all the measurements.
    return None if device.type == "cuda" else "compiled on CUDA only"


def _addmm_why_not(problem: Problem, device: torch.device) -> str | None:
    return None if problem.p == 0 else "it has no dropout"


def _kernels_why_not(problem: Problem, device: torch.device) -> str | None:
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        return "TRITON_INTERPRET is set: the interpreter is for tests"
    return None


def _our_provider(backend: str, why_not: Callable[[Problem, torch.device], str | None]) -> Provider:
    name = f"ours_{backend}"
    return Provider(name, "ours", why_not, functools.partial(_ours, provider=name), (pk.UnsupportedError,))


def _sizes(problem: Problem) -> tuple[int, int]:
    return getattr(torch, problem.dtype).itemsize, getattr(torch, problem.adapter_dtype).itemsize


def _forward_work(problem: Problem) -> Work:
    return Work(input_bytes(problem), 2 * problem.m * (problem.n * problem.k + problem.r * (problem.k + problem.n)))


def _backward_work(problem: Problem) -> Work:
    """Reads dY, x, W, A, B; writes dX, dA, dB."""
    size, adapter_size = _sizes(problem)
    m, n, k, r = problem.m, problem.n, problem.k, problem.r
    moved = size * (m * n + m * k + n * k + m * k) + adapter_size * 2 * r * (k + n)
    return Work(moved, 2 * m * (n * k + 2 * r * (k + n)))


def _problem(projection: shapes.Projection, m: int, r: int = 16, p: float = 0.0, dtype: str = "bfloat16") -> Problem:
    return Problem(projection.model, projection.name, m, projection.n, projection.k, r, dtype, dtype, p)


def _with_master_adapters(problem: Problem) -> Problem:
    """Float32 adapters on a half-precision base are PEFT's default."""
    return replace(problem, adapter_dtype="float32")


def _gpu_problems() -> list[Problem]:
    models = {model: shapes.projections(model) for model in shapes.MODELS}
    layers = [layer for of_model in models.values() for layer in of_model]
    first = models[shapes.LLAMA_3_8B]
    grid = [_problem(layer, 8192, p=p) for layer in layers for p in shapes.DROPOUTS]
    grid += [_with_master_adapters(_problem(layer, 8192, p=p)) for layer in first for p in shapes.DROPOUTS]
    grid += [_problem(layer, m) for m in shapes.TOKENS for layer in first]
    grid += [_problem(layer, 8192, r=r, p=p) for r in shapes.RANKS for layer in first for p in shapes.DROPOUTS]
    grid += [_problem(layer, m, p=0.1) for m in shapes.TOKENS_TRAINING for layer in first]
    grid += [_with_master_adapters(_problem(layer, m)) for m in shapes.TOKENS_DECODE for layer in first]
    grid += [_problem(layer, m) for m in shapes.TOKENS for layer in layers]
    return list(dict.fromkeys(grid))


def _quick_gpu_problems() -> list[Problem]:
    attention, _, _, down = shapes.projections(shapes.LLAMA_3_8B)
    grid = [_problem(layer, 8192, p=p) for layer in (attention, down) for p in shapes.DROPOUTS]
    grid += [_with_master_adapters(_problem(attention, 8192, p=p)) for p in shapes.DROPOUTS]
    return grid + [_problem(attention, m) for m in (1, 16, 512)]


def _halved(attention: shapes.Projection) -> shapes.Projection:
    return replace(attention, name="q,o halved", k=attention.k // 2, n=attention.n // 2)


def _cpu_problems() -> list[Problem]:
    """With and without dropout: one layer of a model, and a smaller one in other ranks, token counts and dtypes."""
    attention = shapes.projections(shapes.LLAMA_32_1B)[0]
    small = _halved(attention)
    grid = []
    for dtype in ("float32", "bfloat16"):
        grid += [_problem(layer, 512, p=p, dtype=dtype) for layer in (small, attention) for p in shapes.DROPOUTS]
        grid += [_problem(small, 512, r=64, p=p, dtype=dtype) for p in shapes.DROPOUTS]
        grid += [_problem(small, m, dtype=dtype) for m in shapes.TOKENS_DECODE]
    return grid + [_with_master_adapters(_problem(small, 512, p=p)) for p in shapes.DROPOUTS]


def _quick_cpu_problems() -> list[Problem]:
    small = _halved(shapes.projections(shapes.LLAMA_32_1B)[0])
    grid = [_problem(small, 512, p=p, dtype=dtype) for dtype in ("float32", "bfloat16") for p in shapes.DROPOUTS]
    grid += [_with_master_adapters(_problem(small, 512, p=p)) for p in shapes.DROPOUTS]
    return [*grid, _problem(small, 16)]


FAMILY = Family(
    name="lora_linear",
    problems=problems,
    modes=modes,
    make_inputs=make_inputs,
    input_bytes=input_bytes,
    work=work,
    dtype=lambda problem: getattr(torch, problem.dtype),
    providers=(
        Provider("base", "limit", _runs, _base),
        Provider("peft", "baseline", _runs, _peft),
        Provider("peft_compiled", "baseline", _compiled_why_not, _peft_compiled, (TorchDynamoException,)),
        Provider("addmm", "baseline", _addmm_why_not, _addmm),
        _our_provider("auto", _runs),
        _our_provider("torch", _runs),
        _our_provider("triton", _kernels_why_not),
        _our_provider("cuda", _runs),
    ),
    summarize_by=("dtype", "adapter_dtype", "p"),
    checker=checker,
)
