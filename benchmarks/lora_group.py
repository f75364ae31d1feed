"""LoRA group: q, k, v and gate, up of real models, whose layers share x.

Each provider computes y_j = x W_j^T + scale (drop_j(x) A_j^T) B_j^T of every member j, and the gradients of x, summed
over the members, and of all A_j and B_j. ``base`` is the frozen products alone. The baselines of ``lora.py`` run here
on one member after another, and autograd sums the gradients of x. So do ``calls`` of ``lora_linear``, another baseline:
what a group has to beat.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

import peft_kernels as pk
from benchmarks import lora, shapes
from benchmarks.family import Call, Family, Grid, Mode, Provider, Work
from benchmarks.lora import SCALE
from python_ref import compare
from python_ref import lora as oracle

_CHECK_SEED = 20240301
_CALLS = "calls_"
_LORA = {provider.name: provider for provider in lora.FAMILY.providers}


@dataclass(frozen=True)
class Problem:
    """Layers of one x at one batch: x (m, k), W_j (n_j, k), A_j (r, k), B_j (n_j, r); n is written n_1+n_2+..."""

    model: str
    projections: str
    n: str
    m: int
    k: int
    r: int
    dtype: str
    adapter_dtype: str
    p: float

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(map(int, self.n.split("+")))

    @property
    def members(self) -> tuple[lora.Problem, ...]:
        """Each layer as one of ``lora.py``."""
        common = (self.k, self.r, self.dtype, self.adapter_dtype, self.p)
        return tuple(lora.Problem(self.model, self.projections, self.m, n, *common) for n in self.widths)


class Inputs(NamedTuple):
    x: Tensor
    weights: tuple[Tensor, ...]
    lora_a: tuple[Tensor, ...]
    lora_b: tuple[Tensor, ...]
    dys: tuple[Tensor, ...]

    @property
    def wrt(self) -> tuple[Tensor, ...]:
        return self.x, *self.lora_a, *self.lora_b

    @property
    def members(self) -> tuple[lora.Inputs, ...]:
        return tuple(lora.Inputs(self.x, *each) for each in zip(*self[1:], strict=True))


class _Reference(NamedTuple):
    """What the first rows, or all of them, of the results should be, and what eager torch makes of them."""

    rows: int
    oracle: dict[str, list[Tensor]]
    eager: dict[str, list[Tensor]]


class _Frozen(torch.autograd.Function):
    """The frozen layers; dX is the narrowest one's product, to which the others' are added in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*weights)
        return tuple(F.linear(x, weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        weights = ctx.saved_tensors
        (dy, weight), *others = sorted(zip(dys, weights, strict=True), key=lambda pair: pair[0].shape[1])
        dx = dy @ weight
        for dy, weight in others:
            dx.addmm_(dy, weight)
        return dx, *[None] * len(weights)


def problems(grid: Grid) -> list[Problem]:
    """One factor at a time around the usual training step: r = 16, no dropout, adapters in the base's dtype."""
    if grid.device_type == "cuda":
        return _quick_gpu_problems() if grid.quick else _gpu_problems()
    return _quick_cpu_problems() if grid.quick else _cpu_problems()


def modes(problem: Problem) -> tuple[Mode, ...]:
    """Decoding has no backward pass."""
    return lora.modes(problem.members[0])


def make_inputs(problem: Problem, device: torch.device, seed: int) -> Inputs:
    """Draw random tensors; weights are scaled so that each y_j and each part of dX have the size of x and dY_j."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype, adapter_dtype = getattr(torch, problem.dtype), getattr(torch, problem.adapter_dtype)
    m, k, r = problem.m, problem.k, problem.r

    def draw(rows: int, cols: int, size: float, to: torch.dtype) -> Tensor:
        return torch.randn(rows, cols, device=device, generator=generator).mul_(size).to(to)

    return Inputs(
        x=draw(m, k, 1.0, dtype).requires_grad_(),
        weights=tuple(draw(n, k, k**-0.5, dtype) for n in problem.widths),
        lora_a=tuple(draw(r, k, k**-0.5, adapter_dtype).requires_grad_() for _ in problem.widths),
        lora_b=tuple(draw(n, r, r**-0.5, adapter_dtype).requires_grad_() for n in problem.widths),
        dys=tuple(draw(m, n, 1.0, dtype) for n in problem.widths),
    )


def input_bytes(problem: Problem) -> int:
    return sum(map(lora.input_bytes, problem.members)) - _repeated(problem)


def work(problem: Problem, mode: Mode, provider: Provider) -> Work:
    """Count bytes and operations of one kernel each way, as ``lora.work`` does for each member, but x and dX once."""
    parts = [lora.work(member, mode, provider) for member in problem.members]
    # Forward reads x; backward reads it again, where it is not of the frozen layers alone, and writes dX.
    backward = 1 if provider.name == "base" else 2
    times = {"forward": 1, "backward": backward, "both": 1 + backward}[mode]
    return Work(sum(part.bytes for part in parts) - times * _repeated(problem), sum(part.flops for part in parts))


def checker(problem: Problem, inputs: Inputs) -> Callable[[Provider], Mapping[str, float | None]]:
    """Return the check of a provider against the float64 oracle and, for this package's, against the error budget.

    Of a tensor that each member has, the largest error is returned. A baseline that draws masks of its own cannot be
    compared; its code is checked where nothing is dropped.
    """
    names = ("y", "dx", "da", "db")
    reference = functools.cache(functools.partial(_reference, problem, inputs))

    def check(provider: Provider) -> Mapping[str, float | None]:
        is_package_s = provider.role == "ours" or provider.name.startswith(_CALLS)
        if provider.name == "base" or (problem.p > 0 and not is_package_s):
            return dict.fromkeys(names)
        calls = problem.p > 0 and provider.name.startswith(_CALLS)
        expected = reference(calls)
        if not is_package_s:
            call = provider.make(problem, inputs)
        elif provider.name.startswith(_CALLS):
            call = _calls(problem, inputs, provider.name, seeds=_seeds(problem))
        else:
            call = _group(problem, inputs, provider.name, seed=_CHECK_SEED)
        got = _results(call, expected)
        if is_package_s:
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


def _seeds(problem: Problem) -> list[int]:
    """Of the checked calls, one each."""
    return [_CHECK_SEED + 1 + index for index in range(len(problem.widths))]


def _reference(problem: Problem, inputs: Inputs, calls: bool) -> _Reference:
    """With the masks of a group, or of calls that have a seed each."""
    device = inputs.x.device
    rows = lora.checked_rows(problem.m, sum(problem.widths) * problem.k, device)
    masks: list[Tensor | None] = [None] * len(problem.widths)
    if problem.p > 0:
        draw = functools.partial(pk.lora_linear_dropout_mask, rows=rows, cols=problem.k, p=problem.p, device=device)
        drawn_by = [(seed, 0) for seed in _seeds(problem)]
        if not calls:
            drawn_by = [(_CHECK_SEED, lane) for lane in range(len(problem.widths))]
        masks = [draw(seed, lane=lane) for seed, lane in drawn_by]
    head = inputs._replace(x=inputs.x.detach()[:rows].requires_grad_(), dys=tuple(dy[:rows] for dy in inputs.dys))

    def members(of: Inputs) -> list[oracle.Member]:
        triples = zip(of.weights, of.lora_a, of.lora_b, masks, strict=True)
        return [oracle.Member(weight, a, b, SCALE, None, mask, problem.p) for weight, a, b, mask in triples]

    ys = oracle.eager_group(head.x, members(head))
    gradients = torch.autograd.grad(ys, head.wrt, head.dys)
    eager = _by_name([y.detach() for y in ys], gradients)

    exact = Inputs(*(_map(lambda tensor: tensor.detach().double(), part) for part in head))
    dx, found = oracle.group_backward(exact.dys, exact.x, members(exact))
    there = [each for each in found if each is not None]
    factors = (*(each.lora_a for each in there), *(each.lora_b for each in there))
    expected = _by_name(oracle.group_forward(exact.x, members(exact)), (dx, *factors))
    names = ("y", "dx", "da", "db") if rows == problem.m else ("y", "dx")
    return _Reference(rows, {name: expected[name] for name in names}, {name: eager[name] for name in names})


def _map(function: Callable[[Tensor], Tensor], part: Any) -> Any:
    return tuple(map(function, part)) if isinstance(part, tuple) else function(part)


def _by_name(ys: Sequence[Tensor], gradients: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """Gradients in the order of ``Inputs.wrt``."""
    dx, *factors = gradients
    return {"y": list(ys), "dx": [dx], "da": factors[: len(ys)], "db": factors[len(ys) :]}


def _results(call: Call, reference: _Reference) -> dict[str, list[Tensor]]:
    ys = call.apply()
    got = _by_name([y.detach() for y in ys], torch.autograd.grad(ys, call.wrt, call.dy))
    for name in ("y", "dx"):
        got[name] = [value[: reference.rows] for value in got[name]]
    return {name: got[name] for name in reference.oracle}


def _base(problem: Problem, inputs: Inputs) -> Call:
    return Call(lambda: _Frozen.apply(inputs.x, *inputs.weights), (inputs.x,), inputs.dys)


def _in_turn(provider: Provider, problem: Problem, inputs: Inputs) -> Call:
    """A provider of one layer, on one member after another."""
    applied = [provider.make(*pair).apply for pair in zip(problem.members, inputs.members, strict=True)]
    return Call(lambda: tuple([apply() for apply in applied]), inputs.wrt, inputs.dys)


def _peft_compiled(problem: Problem, inputs: Inputs) -> Call:
    """All members as one graph, as they are where a model is compiled."""
    call = _in_turn(_LORA["peft"], problem, inputs)
    return dataclasses.replace(call, apply=torch.compile(call.apply, dynamic=False))


def _calls(problem: Problem, inputs: Inputs, provider: str, seeds: Sequence[int | None] | None = None) -> Call:
    backend = provider.removeprefix(_CALLS)
    members = [(each.weight, each.lora_a, each.lora_b) for each in inputs.members]
    seeded = list(zip(members, seeds or [None] * len(members), strict=True))

    def apply() -> tuple[Tensor, ...]:
        return tuple(
            [
                pk.lora_linear(inputs.x, *member, SCALE, dropout_p=problem.p, seed=seed, backend=backend)
                for member, seed in seeded
            ]
        )

    return Call(apply, inputs.wrt, inputs.dys)


def _group(problem: Problem, inputs: Inputs, provider: str, seed: int | None = None) -> Call:
    backend = provider.removeprefix("ours_")
    members = [pk.Member(each.weight, each.lora_a, each.lora_b, SCALE) for each in inputs.members]

    def apply() -> tuple[Tensor, ...]:
        return pk.lora_group(inputs.x, members, dropout_p=problem.p, seed=seed, backend=backend)

    return Call(apply, inputs.wrt, inputs.dys)


def _why_not(provider: Provider, problem: Problem, device: torch.device) -> str | None:
    """A reason that holds for some member, or None."""
    reasons = (provider.why_not(member, device) for member in problem.members)
    return next((reason for reason in reasons if reason is not None), None)


def _baseline(name: str) -> Provider:
    provider = _LORA[name]
    make = functools.partial(_in_turn, provider)
    return Provider(name, "baseline", functools.partial(_why_not, provider), make, provider.refusals)


def _our_provider(backend: str) -> Provider:
    why_not = functools.partial(_why_not, _LORA[f"ours_{backend}"])
    name = f"ours_{backend}"
    return Provider(name, "ours", why_not, functools.partial(_group, provider=name), (pk.UnsupportedError,))


def _calls_provider(backend: str) -> Provider:
    name = f"{_CALLS}{backend}"
    why_not = functools.partial(_why_not, _LORA[f"ours_{backend}"])
    return Provider(name, "baseline", why_not, functools.partial(_calls, provider=name), (pk.UnsupportedError,))


def _repeated(problem: Problem) -> int:
    """Bytes of the tensors of x's shape that members of one x do not have each."""
    return (len(problem.widths) - 1) * problem.m * problem.k * getattr(torch, problem.dtype).itemsize


def _problem(group: shapes.Group, m: int, r: int = 16, p: float = 0.0, dtype: str = "bfloat16") -> Problem:
    return Problem(group.model, group.name, "+".join(map(str, group.n)), m, group.k, r, dtype, dtype, p)


def _with_master_adapters(problem: Problem) -> Problem:
    """Float32 adapters on a half-precision base are PEFT's default."""
    return replace(problem, adapter_dtype="float32")


def _gpu_problems() -> list[Problem]:
    groups = [group for model in shapes.GROUPED for group in shapes.groups(model)]
    first = shapes.groups(shapes.LLAMA_3_8B)
    grid = [_problem(group, 8192, p=p) for group in groups for p in shapes.DROPOUTS]
    grid += [_with_master_adapters(_problem(group, 8192, p=p)) for group in first for p in shapes.DROPOUTS]
    grid += [_problem(group, m) for m in shapes.TOKENS for group in first]
    grid += [_problem(group, 8192, r=r, p=p) for r in shapes.RANKS for group in first for p in shapes.DROPOUTS]
    grid += [_problem(group, m, p=0.1) for m in shapes.TOKENS_TRAINING for group in first]
    grid += [_with_master_adapters(_problem(group, m)) for m in shapes.TOKENS_DECODE for group in first]
    grid += [_problem(group, m) for m in shapes.TOKENS for group in groups]
    return list(dict.fromkeys(grid))


def _quick_gpu_problems() -> list[Problem]:
    attention, feed_forward = shapes.groups(shapes.LLAMA_3_8B)
    grid = [_problem(group, 8192, p=p) for group in (attention, feed_forward) for p in shapes.DROPOUTS]
    grid += [_with_master_adapters(_problem(attention, 8192, p=p)) for p in shapes.DROPOUTS]
    return grid + [_problem(attention, m) for m in (1, 16, 512)]


def _halved(group: shapes.Group) -> shapes.Group:
    return replace(group, name=f"{group.name} halved", k=group.k // 2, n=tuple(n // 2 for n in group.n))


def _cpu_problems() -> list[Problem]:
    """With and without dropout: groups of a model, and smaller ones in other ranks, token counts and dtypes."""
    attention, feed_forward = shapes.groups(shapes.LLAMA_32_1B)
    small, wide = _halved(attention), _halved(feed_forward)
    grid = []
    for dtype in ("float32", "bfloat16"):
        grid += [_problem(group, 512, p=p, dtype=dtype) for group in (small, wide) for p in shapes.DROPOUTS]
        grid += [_problem(attention, 512, dtype=dtype), _problem(small, 512, r=64, dtype=dtype)]
        grid += [_problem(small, m, dtype=dtype) for m in shapes.TOKENS_DECODE]
    return grid + [_with_master_adapters(_problem(small, 512, p=p)) for p in shapes.DROPOUTS]


def _quick_cpu_problems() -> list[Problem]:
    small = _halved(shapes.groups(shapes.LLAMA_32_1B)[0])
    grid = [_problem(small, 512, p=p, dtype=dtype) for dtype in ("float32", "bfloat16") for p in shapes.DROPOUTS]
    grid += [_with_master_adapters(_problem(small, 512, p=p)) for p in shapes.DROPOUTS]
    return [*grid, _problem(small, 16)]


FAMILY = Family(
    name="lora_group",
    problems=problems,
    modes=modes,
    make_inputs=make_inputs,
    input_bytes=input_bytes,
    work=work,
    dtype=lambda problem: getattr(torch, problem.dtype),
    providers=(
        Provider("base", "limit", functools.partial(_why_not, _LORA["base"]), _base),
        _baseline("peft"),
        Provider(
            "peft_compiled",
            "baseline",
            functools.partial(_why_not, _LORA["peft_compiled"]),
            _peft_compiled,
            (TorchDynamoException,),
        ),
        _baseline("addmm"),
        _calls_provider("torch"),
        _calls_provider("triton"),
        _calls_provider("cuda"),
        _our_provider("auto"),
        _our_provider("torch"),
        _our_provider("triton"),
        _our_provider("cuda"),
    ),
    summarize_by=("projections", "dtype", "adapter_dtype", "p"),
    checker=checker,
)
