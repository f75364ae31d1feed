"""LoRA by rows: a batch whose rows use many adapters, as served, and as trained together.

Each provider computes y[m] = x[m] W^T + scale (drop(x[m]) A_t^T) B_t^T, with t the adapter of row m, and the gradients
of x and of all A_t and B_t. ``base`` is the frozen layer alone. ``peft_loop`` is PEFT's layer told ``adapter_names``,
which its models refuse while they train; ``peft_in_turn`` is its layer on one adapter's rows after another's, which is
what training them takes today. So are ``calls`` of ``lora_linear``: what a mixed batch has to beat.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn

import peft_kernels as pk
from benchmarks import lora, shapes
from benchmarks.family import Call, Family, Grid, Mode, Provider, Work
from benchmarks.lora import SCALE
from python_ref import compare
from python_ref import lora as oracle

_CHECK_SEED = 20240302
_CALLS = "calls_"
# Adapters, and tokens of each.
_TRAINED = ((4, 2048), (16, 256), (32, 128), (256, 32))
_DECODED = ((16, 1), (64, 1))
_LORA = {provider.name: provider for provider in lora.FAMILY.providers}


@dataclass(frozen=True)
class Problem:
    """A layer and a batch: x (adapters * tokens, k), W (n, k), A_t (r, k), B_t (n, r)."""

    model: str
    projection: str
    adapters: int
    tokens: int
    n: int
    k: int
    r: int
    dtype: str
    adapter_dtype: str
    p: float

    @property
    def m(self) -> int:
        return self.adapters * self.tokens

    @property
    def alone(self) -> lora.Problem:
        """One adapter's rows, as a problem of ``lora.py``."""
        sizes = (self.tokens, self.n, self.k, self.r)
        return lora.Problem(self.model, self.projection, *sizes, self.dtype, self.adapter_dtype, self.p)


class Inputs(NamedTuple):
    x: Tensor
    weight: Tensor
    lora_a: tuple[Tensor, ...]
    lora_b: tuple[Tensor, ...]
    dy: Tensor

    @property
    def wrt(self) -> tuple[Tensor, ...]:
        return self.x, *self.lora_a, *self.lora_b

    def alone(self) -> list[lora.Inputs]:
        """Each adapter's rows, which are leaves of their own over the same memory."""
        count = len(self.lora_a)
        xs = [x.requires_grad_() for x in self.x.detach().chunk(count)]
        dys = self.dy.chunk(count)
        return [lora.Inputs(x, self.weight, *each) for x, *each in zip(xs, self.lora_a, self.lora_b, dys, strict=True)]


class _Reference(NamedTuple):
    """What the first rows of each adapter's, or all of them, should be, and what eager torch makes of them."""

    rows: int
    oracle: dict[str, list[Tensor]]
    eager: dict[str, list[Tensor]]


def problems(grid: Grid) -> list[Problem]:
    """Adapters with many tokens each and with few, and such as decode a token each."""
    if grid.device_type == "cuda":
        return _quick_gpu_problems() if grid.quick else _gpu_problems()
    return _quick_cpu_problems() if grid.quick else _cpu_problems()


def modes(problem: Problem) -> tuple[Mode, ...]:
    """Decoding has no backward pass."""
    return ("forward",) if problem.tokens == 1 else ("forward", "backward", "both")


def make_inputs(problem: Problem, device: torch.device, seed: int) -> Inputs:
    """Draw random tensors; weights are scaled so that y and both parts of dX have the size of x and dY."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype, adapter_dtype = getattr(torch, problem.dtype), getattr(torch, problem.adapter_dtype)
    n, k, r = problem.n, problem.k, problem.r

    def draw(rows: int, cols: int, size: float, to: torch.dtype) -> Tensor:
        return torch.randn(rows, cols, device=device, generator=generator).mul_(size).to(to)

    def adapters(rows: int, cols: int, size: float) -> tuple[Tensor, ...]:
        return tuple(draw(rows, cols, size, adapter_dtype).requires_grad_() for _ in range(problem.adapters))

    return Inputs(
        x=draw(problem.m, k, 1.0, dtype).requires_grad_(),
        weight=draw(n, k, k**-0.5, dtype),
        lora_a=adapters(r, k, k**-0.5),
        lora_b=adapters(n, r, r**-0.5),
        dy=draw(problem.m, n, 1.0, dtype),
    )


def input_bytes(problem: Problem) -> int:
    return lora.input_bytes(replace(problem.alone, m=problem.m)) + _more_factors(problem)


def work(problem: Problem, mode: Mode, provider: Provider) -> Work:
    """Of one layer on all rows, as ``lora.work`` counts it, but every adapter's factors, and their gradients."""
    least = lora.work(replace(problem.alone, m=problem.m), mode, provider)
    if provider.name == "base":
        return least
    times = {"forward": 1, "backward": 2, "both": 3}[mode]
    return Work(least.bytes + times * _more_factors(problem), least.flops)


def _more_factors(problem: Problem) -> int:
    """Bytes of all adapters' factors but the first's."""
    size = getattr(torch, problem.adapter_dtype).itemsize
    return (problem.adapters - 1) * problem.r * (problem.n + problem.k) * size


def checker(problem: Problem, inputs: Inputs) -> Callable[[Provider], Mapping[str, float | None]]:
    """Return the check of a provider against the float64 oracle and, for this package's, against the error budget.

    A baseline that draws masks of its own cannot be compared; its code is checked where nothing is dropped.
    """
    names = ("y", "dx", "da", "db")
    reference = functools.cache(functools.partial(_reference, problem, inputs))

    def check(provider: Provider) -> Mapping[str, float | None]:
        is_calls = provider.name.startswith(_CALLS)
        if provider.name == "base" or (problem.p > 0 and provider.role != "ours"):
            return dict.fromkeys(names)
        expected = reference()
        call = _rows(problem, inputs, provider.name, seed=_CHECK_SEED) if provider.role == "ours" else None
        got = _results(problem, call or provider.make(problem, inputs), expected)
        if provider.role == "ours" or is_calls:
            for name, values in got.items():
                for index, value in enumerate(values):
                    pair = expected.eager[name][index], expected.oracle[name][index]
                    compare.assert_close(f"{name}[{index}]", value, *pair)
        return {name: _largest_error(got[name], expected.oracle[name]) if name in got else None for name in names}

    return check


def _largest_error(values: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    errors = [compare.relative_error(value, exact) for value, exact in zip(values, expected, strict=True)]
    # Python's max would pass over a nan.
    return torch.tensor(errors, dtype=torch.float64).max().item()


def _reference(problem: Problem, inputs: Inputs) -> _Reference:
    """Each adapter's rows alone, with their part of the batch's mask."""
    device, tokens = inputs.x.device, problem.tokens
    rows = lora.checked_rows(tokens, problem.n * problem.k * problem.adapters, device)
    mask = None
    if problem.p > 0:
        mask = pk.lora_linear_dropout_mask(_CHECK_SEED, problem.m, problem.k, problem.p, device)
    exact: dict[str, list[Tensor]] = {name: [] for name in ("y", "dx", "da", "db")}
    eager: dict[str, list[Tensor]] = {name: [] for name in exact}
    for index, (x, weight, lora_a, lora_b, dy) in enumerate(inputs.alone()):
        drop = {"dropout_p": problem.p, "dropout_mask": None}
        if mask is not None:
            drop["dropout_mask"] = mask[index * tokens : index * tokens + rows]
        head = x.detach()[:rows].requires_grad_()
        y = oracle.eager(head, weight, lora_a, lora_b, SCALE, **drop)
        found = y.detach(), *torch.autograd.grad(y, (head, lora_a, lora_b), dy[:rows])
        wide = [each.detach().double() for each in (head, weight, lora_a, lora_b)]
        y, _ = oracle.forward(*wide, SCALE, **drop)
        gradients = oracle.backward(dy[:rows].double(), *wide, SCALE, **drop)
        wanted = y, gradients.x, gradients.lora_a, gradients.lora_b
        for name, value, of_eager in zip(exact, wanted, found, strict=True):
            exact[name].append(value)
            eager[name].append(of_eager)
    names = tuple(exact) if rows == tokens else ("y", "dx")
    return _Reference(rows, {name: exact[name] for name in names}, {name: eager[name] for name in names})


def _results(problem: Problem, call: Call, reference: _Reference) -> dict[str, list[Tensor]]:
    """Adapter by adapter, whether a provider computes them together or one after another."""
    y, count = call.apply(), problem.adapters
    gradients = torch.autograd.grad(y, call.wrt, call.dy)
    of_x = len(gradients) - 2 * count
    got = {
        "y": _by_adapter(y, problem),
        "dx": _by_adapter(gradients[0] if of_x == 1 and isinstance(y, Tensor) else gradients[:of_x], problem),
        "da": list(gradients[of_x : of_x + count]),
        "db": list(gradients[of_x + count :]),
    }
    for name in ("y", "dx"):
        got[name] = [value[: reference.rows] for value in got[name]]
    return {name: got[name] for name in reference.oracle}


def _by_adapter(value: Tensor | tuple[Tensor, ...], problem: Problem) -> list[Tensor]:
    if isinstance(value, tuple):
        return [each.detach() for each in value]
    return list(value.detach().reshape(problem.m, -1).chunk(problem.adapters))


def _base(problem: Problem, inputs: Inputs) -> Call:
    return Call(lambda: F.linear(inputs.x, inputs.weight), (inputs.x,), inputs.dy)


def _in_turn(problem: Problem, inputs: Inputs, provider: Provider) -> Call:
    """A provider of one adapter, on one adapter's rows after another's."""
    parts = inputs.alone()
    applied = [provider.make(problem.alone, part).apply for part in parts]
    wrt = (*(part.x for part in parts), *inputs.lora_a, *inputs.lora_b)
    return Call(lambda: tuple([apply() for apply in applied]), wrt, tuple(part.dy for part in parts))


def _peft_loop(problem: Problem, inputs: Inputs) -> Call:
    layer = _peft_layer(problem, inputs)
    shape = problem.adapters, problem.tokens
    names = [f"adapter {t}" for t in range(problem.adapters)]
    x = inputs.x.detach().view(*shape, problem.k).requires_grad_()
    wrt = (x, *inputs.lora_a, *inputs.lora_b)
    return Call(lambda: layer(x, adapter_names=names), wrt, inputs.dy.view(*shape, problem.n))


def _peft_layer(problem: Problem, inputs: Inputs) -> nn.Module:
    """PEFT's layer over the given tensors, none of which is copied."""
    base = nn.Linear(problem.k, problem.n, bias=False, device="meta")
    base.weight = nn.Parameter(inputs.weight, requires_grad=False)
    config = LoraConfig(r=problem.r, lora_alpha=SCALE * problem.r, lora_dropout=problem.p, init_lora_weights=False)
    layer = PeftLinear(base, "adapter 0", config=config, r=problem.r, lora_alpha=SCALE * problem.r)
    for t, factors in enumerate(zip(inputs.lora_a, inputs.lora_b, strict=True)):
        name = f"adapter {t}"
        if t:
            layer.update_layer(name, problem.r, SCALE * problem.r, config=config)
        for part, tensor in zip(("lora_A", "lora_B"), factors, strict=True):
            # A Parameter would be another leaf than the one that gradients are asked for.
            linear = getattr(layer, part)[name]
            del linear.weight
            linear.weight = tensor
    return layer.train()


def _rows(problem: Problem, inputs: Inputs, provider: str, seed: int | None = None) -> Call:
    backend = provider.removeprefix("ours_")
    names = [f"adapter {t}" for t in range(problem.adapters)]
    # Once for all layers of a model.
    rows = pk.Rows.of(names, length=problem.tokens, device=inputs.x.device)
    options: dict[str, Any] = {"rows": rows, "ranks": (problem.r,) * problem.adapters, "dropout_p": problem.p}

    def apply() -> Tensor:
        lora_a, lora_b = torch.cat(inputs.lora_a), torch.cat(inputs.lora_b, dim=1)
        return pk.lora_linear(inputs.x, inputs.weight, lora_a, lora_b, SCALE, seed=seed, backend=backend, **options)

    return Call(apply, inputs.wrt, inputs.dy)


def _why_not(provider: Provider, problem: Problem, device: torch.device) -> str | None:
    return provider.why_not(replace(problem.alone, m=problem.m), device)


def _our_provider(backend: str) -> Provider:
    name = f"ours_{backend}"
    why_not = functools.partial(_why_not, _LORA[name])
    return Provider(name, "ours", why_not, functools.partial(_rows, provider=name), (pk.UnsupportedError,))


def _calls_provider(backend: str) -> Provider:
    provider = _LORA[f"ours_{backend}"]
    make = functools.partial(_in_turn, provider=provider)
    return Provider(
        f"{_CALLS}{backend}", "baseline", functools.partial(_why_not, provider), make, (pk.UnsupportedError,)
    )


def _problem(
    layer: shapes.Projection, adapters: int, tokens: int, r: int = 16, p: float = 0.0, dtype: str = "bfloat16"
) -> Problem:
    return Problem(layer.model, layer.name, adapters, tokens, layer.n, layer.k, r, dtype, dtype, p)


def _with_master_adapters(problem: Problem) -> Problem:
    """Float32 adapters on a half-precision base are PEFT's default."""
    return replace(problem, adapter_dtype="float32")


def _gpu_problems() -> list[Problem]:
    layers = shapes.projections(shapes.LLAMA_3_8B)
    batches = [*_TRAINED, *_DECODED]
    grid = [_problem(layers[0], *batch, p=p) for batch in _TRAINED for p in shapes.DROPOUTS]
    grid += [_problem(layer, *batch) for layer in layers for batch in batches]
    grid += [_with_master_adapters(_problem(layers[0], *batch)) for batch in batches]
    grid += [_problem(layers[0], 16, 256, r=r) for r in shapes.RANKS]
    return list(dict.fromkeys(grid))


def _quick_gpu_problems() -> list[Problem]:
    attention = shapes.projections(shapes.LLAMA_3_8B)[0]
    return [_problem(attention, *batch) for batch in (*_TRAINED[1:3], _DECODED[0])]


def _halved(layer: shapes.Projection) -> shapes.Projection:
    return replace(layer, name=f"{layer.name} halved", k=layer.k // 2, n=layer.n // 2)


def _cpu_problems() -> list[Problem]:
    """Smaller layers, and up to 16 adapters: with and without dropout, in two dtypes, and decoding."""
    small = _halved(shapes.projections(shapes.LLAMA_32_1B)[0])
    grid = [
        _problem(small, *batch, p=p, dtype=dtype)
        for dtype in ("float32", "bfloat16")
        for batch in ((4, 128), (8, 64), (16, 32))
        for p in shapes.DROPOUTS
    ]
    grid += [_problem(small, 16, 1, dtype=dtype) for dtype in ("float32", "bfloat16")]
    return [*grid, _with_master_adapters(_problem(small, 8, 64))]


def _quick_cpu_problems() -> list[Problem]:
    small = _halved(shapes.projections(shapes.LLAMA_32_1B)[0])
    grid = [_problem(small, 8, 64, p=p, dtype="float32") for p in shapes.DROPOUTS]
    return [*grid, _problem(small, 8, 64), _problem(small, 16, 1, dtype="float32")]


FAMILY = Family(
    name="lora_rows",
    problems=problems,
    modes=modes,
    make_inputs=make_inputs,
    input_bytes=input_bytes,
    work=work,
    dtype=lambda problem: getattr(torch, problem.dtype),
    providers=(
        Provider("base", "limit", functools.partial(_why_not, _LORA["base"]), _base),
        Provider("peft_loop", "baseline", functools.partial(_why_not, _LORA["peft"]), _peft_loop),
        Provider(
            "peft_in_turn",
            "baseline",
            functools.partial(_why_not, _LORA["peft"]),
            functools.partial(_in_turn, provider=_LORA["peft"]),
        ),
        _calls_provider("torch"),
        _calls_provider("triton"),
        _our_provider("auto"),
        _our_provider("torch"),
        _our_provider("triton"),
        _our_provider("cuda"),
    ),
    summarize_by=("adapters", "dtype", "adapter_dtype", "p"),
    checker=checker,
)
