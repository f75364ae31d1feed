"""Bottleneck adapters: two linear layers, an activation and a sum in eager torch, the same compiled, and our backends.

Each provider computes y = residual + scale (act(x Wd^T + bd) Wu^T + bu) and the gradients of x, both weights, both
biases and, where it is another tensor than x, the residual.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

import peft_kernels as pk
from benchmarks.family import Call, Family, Grid, Mode, Provider, Work
from python_ref import adapter as oracle
from python_ref import compare

SCALE = 0.5
HIDDEN = (768, 1024, 2048, 4096, 8192)
WIDTHS = (8, 16, 64, 256)
TOKENS = (16, 512, 2048, 8192, 32768)
_DECODE = 16
# The oracle takes float64 products: all rows of a problem below this many multiplications, else the first few rows,
# where y and dx can be checked but not the sums over all rows.
_ORACLE_PRODUCTS = {"cuda": 1 << 41, "cpu": 1 << 33}
_ORACLE_ROWS = 64
# The output and the gradients of x and the parameters, in the order of ``Inputs``.
_NAMES = ("y", "dx", "dwd", "dwu", "dbd", "dbu")


@dataclass(frozen=True)
class Problem:
    """One adapter at one batch: x and y (m, k), a bottleneck of r. ``form`` is "serial" or "parallel"."""

    m: int
    k: int
    r: int
    dtype: str
    adapter_dtype: str
    activation: str
    form: str


class Inputs(NamedTuple):
    """``residual`` is x itself in the serial form."""

    x: Tensor
    down_weight: Tensor
    up_weight: Tensor
    down_bias: Tensor
    up_bias: Tensor
    residual: Tensor
    dy: Tensor


class _Reference(NamedTuple):
    """What the first rows, or all of them, of the results should be, and what eager torch makes of them."""

    rows: int
    oracle: dict[str, Tensor]
    eager: dict[str, Tensor]


class _Adapter(nn.Module):
    """What users write: two linear layers, an activation between, and a sum."""

    ACTIVATIONS: Mapping[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}

    def __init__(self, problem: Problem, inputs: Inputs) -> None:
        super().__init__()
        down, up = (nn.Linear(1, 1, device="meta") for _ in range(2))
        given = {down: (inputs.down_weight, inputs.down_bias), up: (inputs.up_weight, inputs.up_bias)}
        for linear, (weight, bias) in given.items():
            # A Parameter would be another leaf than the one that gradients are asked for.
            del linear.weight, linear.bias
            linear.weight, linear.bias = weight, bias
        self.branch = nn.Sequential(down, self.ACTIVATIONS[problem.activation](), up)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return (residual + self.branch(x.to(self.branch[0].weight.dtype)) * SCALE).to(residual.dtype)


def problems(grid: Grid) -> list[Problem]:
    """One factor at a time around a training step of 8192 tokens at 4096 features and a bottleneck of 64."""
    if grid.device_type == "cuda":
        return _quick_gpu_problems() if grid.quick else _gpu_problems()
    return _quick_cpu_problems() if grid.quick else _cpu_problems()


def modes(problem: Problem) -> tuple[Mode, ...]:
    """Decoding has no backward pass."""
    return ("forward",) if problem.m <= _DECODE else ("forward", "backward", "both")


def make_inputs(problem: Problem, device: torch.device, seed: int) -> Inputs:
    """Draw random tensors; weights are scaled so that the branch has the size of x."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype, adapter_dtype = getattr(torch, problem.dtype), getattr(torch, problem.adapter_dtype)
    m, k, r = problem.m, problem.k, problem.r

    def draw(*shape: int, size: float = 1.0, to: torch.dtype = adapter_dtype) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator).mul_(size).to(to)

    x = draw(m, k, to=dtype).requires_grad_()
    return Inputs(
        x=x,
        down_weight=draw(r, k, size=k**-0.5).requires_grad_(),
        up_weight=draw(k, r, size=r**-0.5).requires_grad_(),
        down_bias=draw(r).requires_grad_(),
        up_bias=draw(k).requires_grad_(),
        residual=x if problem.form == "serial" else draw(m, k, to=dtype).requires_grad_(),
        dy=draw(m, k, to=dtype),
    )


def input_bytes(problem: Problem) -> int:
    activations = 2 if problem.form == "serial" else 3
    return _sizes(problem)[0] * activations * problem.m * problem.k + _parameter_bytes(problem)


def work(problem: Problem, mode: Mode, provider: Provider) -> Work:
    """Count bytes and operations of one kernel each way.

    Forward reads x, the parameters and the residual where that is another tensor, and writes y. Backward reads dy and x
    once and writes dx; the residual's gradient is dy itself. Between them z (m, r) goes out in float32 and comes back.
    """
    size, _ = _sizes(problem)
    m, k, r = problem.m, problem.k, problem.r
    z, parameters = 4 * m * r, _parameter_bytes(problem)
    activations = 2 if problem.form == "serial" else 3
    forward = Work(size * activations * m * k + parameters, 4 * m * k * r)
    if mode == "forward":
        return forward
    backward = Work(size * 3 * m * k + 2 * parameters + z, 8 * m * k * r)
    if mode == "backward":
        return backward
    return Work(forward.bytes + z + backward.bytes, forward.flops + backward.flops)


def checker(problem: Problem, inputs: Inputs) -> Callable[[Provider], Mapping[str, float | None]]:
    """Return the check of a provider against the float64 oracle and, for ours, against the error budget."""
    reference = _reference(problem, inputs)

    def check(provider: Provider) -> Mapping[str, float | None]:
        got = _results(provider.make(problem, inputs), reference)
        if provider.role == "ours":
            for name, value in got.items():
                compare.assert_close(name, value, reference.eager[name], reference.oracle[name])
        return {
            name: compare.relative_error(got[name], reference.oracle[name]) if name in got else None for name in _NAMES
        }

    return check


def _reference(problem: Problem, inputs: Inputs) -> _Reference:
    whole = problem.m * problem.k * problem.r <= _ORACLE_PRODUCTS[inputs.x.device.type]
    rows = problem.m if whole else min(problem.m, _ORACLE_ROWS)
    serial = problem.form == "serial"
    x = inputs.x.detach()[:rows].requires_grad_()
    residual, dy = x if serial else inputs.residual.detach()[:rows], inputs.dy[:rows]
    weights = inputs[1:5]
    down_weight, up_weight, down_bias, up_bias = weights
    options = {"activation": problem.activation, "scale": SCALE}
    y = oracle.eager(x, down_weight, up_weight, down_bias=down_bias, up_bias=up_bias, residual=residual, **options)
    eager = dict(zip(_NAMES, (y.detach(), *torch.autograd.grad(y, (x, *weights), dy)), strict=True))

    x, wd, wu, bd, bu, residual, dy = (tensor.detach().double() for tensor in (x, *weights, residual, dy))
    exact, _ = oracle.forward(x, wd, wu, down_bias=bd, up_bias=bu, residual=residual, **options)
    grads = oracle.backward(dy, x, wd, wu, down_bias=bd, serial=serial, **options)
    expected = dict(zip(_NAMES, (exact, *grads[:5]), strict=True))
    names = _NAMES if whole else _NAMES[:2]
    return _Reference(rows, {name: expected[name] for name in names}, {name: eager[name] for name in names})


def _results(call: Call, reference: _Reference) -> dict[str, Tensor]:
    y = call.apply()
    gradients = torch.autograd.grad(y, call.wrt[:5], call.dy)
    got = dict(zip(_NAMES, (y.detach(), *gradients), strict=True))
    got |= {name: got[name][: reference.rows] for name in ("y", "dx")}
    return {name: got[name] for name in reference.oracle}


def _eager(problem: Problem, inputs: Inputs) -> Call:
    module = _Adapter(problem, inputs)
    return Call(lambda: module(inputs.x, inputs.residual), _wrt(problem, inputs), inputs.dy)


def _compiled(problem: Problem, inputs: Inputs) -> Call:
    module = torch.compile(_Adapter(problem, inputs), dynamic=False)
    return Call(lambda: module(inputs.x, inputs.residual), _wrt(problem, inputs), inputs.dy)


def _ours(problem: Problem, inputs: Inputs, backend: str) -> Call:
    x, down_weight, up_weight, down_bias, up_bias, residual, dy = inputs

    def apply() -> Tensor:
        return pk.bottleneck_adapter(
            x,
            down_weight,
            up_weight,
            down_bias=down_bias,
            up_bias=up_bias,
            residual=residual,
            activation=problem.activation,
            scale=SCALE,
            backend=backend,
        )

    return Call(apply, _wrt(problem, inputs), dy)


def _wrt(problem: Problem, inputs: Inputs) -> tuple[Tensor, ...]:
    return inputs[:5] if problem.form == "serial" else inputs[:6]


def _runs(problem: Problem, device: torch.device) -> str | None:
    return None


def _compiled_why_not(problem: Problem, device: torch.device) -> str | None:
    # On a CPU compiling would take longer than all the measurements.
    return None if device.type == "cuda" else "compiled on CUDA only"


def _kernels_why_not(problem: Problem, device: torch.device) -> str | None:
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        return "TRITON_INTERPRET is set: the interpreter is for tests"
    return None


def _our_provider(backend: str, why_not: Callable[[Problem, torch.device], str | None]) -> Provider:
    return Provider(
        f"ours_{backend}", "ours", why_not, functools.partial(_ours, backend=backend), (pk.UnsupportedError,)
    )


def _sizes(problem: Problem) -> tuple[int, int]:
    return getattr(torch, problem.dtype).itemsize, getattr(torch, problem.adapter_dtype).itemsize


def _parameter_bytes(problem: Problem) -> int:
    return _sizes(problem)[1] * (2 * problem.r * problem.k + problem.r + problem.k)


def _problem(
    m: int, k: int, r: int, dtype: str = "bfloat16", activation: str = "relu", form: str = "serial"
) -> Problem:
    return Problem(m, k, r, dtype, dtype, activation, form)


def _gpu_problems() -> list[Problem]:
    middle = _problem(8192, 4096, 64)
    grid = [middle, replace(middle, form="parallel"), replace(middle, adapter_dtype="float32")]
    grid += [replace(middle, k=k) for k in HIDDEN]
    grid += [replace(middle, r=r) for r in WIDTHS]
    grid += [replace(middle, m=m) for m in TOKENS]
    grid += [replace(middle, activation=activation) for activation in ("gelu", "silu")]
    grid += [replace(middle, dtype="float32", adapter_dtype="float32"), replace(middle, k=768, r=16, m=512)]
    return list(dict.fromkeys(grid))


def _quick_gpu_problems() -> list[Problem]:
    middle = _problem(8192, 4096, 64)
    return [
        middle,
        replace(middle, form="parallel"),
        replace(middle, adapter_dtype="float32"),
        replace(middle, r=256),
        replace(middle, k=768, m=2048),
        replace(middle, m=16),
    ]


def _cpu_problems() -> list[Problem]:
    """One factor at a time around 512 tokens at 1024 features."""
    grid = []
    for dtype in ("float32", "bfloat16"):
        middle = _problem(512, 1024, 64, dtype)
        grid += [replace(middle, form=form, r=r) for form in ("serial", "parallel") for r in (64, 16)]
        grid += [replace(middle, activation=activation, form="parallel") for activation in ("gelu", "silu")]
        grid += [replace(middle, m=2048), replace(middle, k=2048), replace(middle, m=16)]
    masters = replace(_problem(512, 1024, 64), adapter_dtype="float32")
    return [*grid, masters, replace(masters, form="parallel"), _problem(512, 1024, 16, "float16")]


def _quick_cpu_problems() -> list[Problem]:
    grid = []
    for dtype in ("float32", "bfloat16"):
        middle = _problem(2048, 1024, 64, dtype)
        grid += [middle, replace(middle, form="parallel"), replace(middle, activation="gelu")]
    return [*grid, replace(_problem(2048, 1024, 64), adapter_dtype="float32"), _problem(16, 1024, 64)]


FAMILY = Family(
    name="bottleneck_adapter",
    problems=problems,
    modes=modes,
    make_inputs=make_inputs,
    input_bytes=input_bytes,
    work=work,
    dtype=lambda problem: getattr(torch, problem.dtype),
    providers=(
        Provider("eager", "baseline", _runs, _eager),
        Provider("eager_compiled", "baseline", _compiled_why_not, _compiled, (TorchDynamoException,)),
        _our_provider("auto", _runs),
        _our_provider("torch", _runs),
        _our_provider("triton", _kernels_why_not),
        _our_provider("cuda", _runs),
    ),
    summarize_by=("dtype", "adapter_dtype", "form"),
    checker=checker,
)
