"""Prefix attention: PEFT's path, two ways of joining by hand, and this package's backends.

Each provider computes attention to a shared prefix and a sequence, y = softmax(scale q [prefix_k; k]^T + mask)
[prefix_v; v], and the gradients of q, k, v and the prefix.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

import peft_kernels as pk
from benchmarks import shapes
from benchmarks.family import Call, Family, Grid, Mode, Provider, Work
from python_ref import compare
from python_ref import prefix as oracle

NAMES = ("y", "dq", "dk", "dv", "dprefix_k", "dprefix_v")
# The oracle holds scores in float64: problems with more are checked on their first batch row and key head alone, and
# those with more in one key head are not.
_ORACLE_SCORES = {"cuda": 1 << 30, "cpu": 1 << 25}
_DECODE = 1


@dataclass(frozen=True)
class Problem:
    """One layer's attention: q (b, h, s, d), k and v (b, h_kv, l, d), a prefix of p keys shared by the batch.

    ``mask``: "causal", "full", or "padded": causal, and a batch row's last keys are padding, none of the first row's.
    """

    model: str
    b: int
    h: int
    h_kv: int
    s: int
    l: int  # noqa: E741
    p: int
    d: int
    dtype: str
    mask: str = "causal"


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    prefix_k: Tensor
    prefix_v: Tensor
    dy: Tensor
    kept: Tensor | None
    causal: bool

    @property
    def masks(self) -> dict[str, Any]:
        return {"causal": self.causal, "key_padding_mask": self.kept}


def problems(grid: Grid) -> list[Problem]:
    """Training steps first, from the most used size; then one query against a long sequence."""
    if grid.device_type == "cuda":
        return _quick_gpu_problems() if grid.quick else _gpu_problems()
    return _quick_cpu_problems() if grid.quick else _cpu_problems()


def modes(problem: Problem) -> tuple[Mode, ...]:
    """Decoding has no backward pass."""
    return ("forward",) if problem.s == _DECODE else ("forward", "backward", "both")


def make_inputs(problem: Problem, device: torch.device, seed: int) -> Inputs:
    """Draw random tensors; scores have variance one."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, problem.dtype)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator).to(dtype)

    # (B, S, H, D) in memory, as a projection leaves them.
    q = draw(problem.b, problem.s, problem.h, problem.d).transpose(1, 2)
    k, v = (draw(problem.b, problem.l, problem.h_kv, problem.d).transpose(1, 2) for _ in range(2))
    prefix_k, prefix_v = (draw(problem.h_kv, problem.p, problem.d) for _ in range(2))
    leaves = (tensor.requires_grad_() for tensor in (q, k, v, prefix_k, prefix_v))
    kept = None
    if problem.mask == "padded":
        padding = torch.arange(problem.b, device=device) * problem.l // (2 * problem.b)
        kept = torch.arange(problem.l, device=device) < problem.l - padding[:, None]
    # One query sees all keys, with or without a causal mask; without it every provider takes its shortest path.
    causal = problem.mask != "full" and problem.s > _DECODE
    return Inputs(*leaves, draw(problem.b, problem.h, problem.s, problem.d), kept, causal)


def input_bytes(problem: Problem) -> int:
    return _size(problem) * (2 * _queries(problem) + _keys(problem))


def work(problem: Problem, mode: Mode, provider: Provider) -> Work:
    """Count bytes and operations of kernels that never store a score.

    Forward reads q and all keys and values and writes y: two products over what is visible. Backward reads these, y and
    dy and writes five gradients: five products.
    """
    visible = problem.l * problem.s
    if problem.s > _DECODE and problem.mask != "full":
        visible -= problem.s * (problem.s - 1) // 2
    product = 2 * problem.b * problem.h * problem.d * (visible + problem.p * problem.s)
    size, queries, keys = _size(problem), _queries(problem), _keys(problem)
    forward = Work(size * (2 * queries + keys), 2 * product)
    backward = Work(size * (4 * queries + 2 * keys), 5 * product)
    if mode == "both":
        return Work(forward.bytes + backward.bytes, forward.flops + backward.flops)
    return forward if mode == "forward" else backward


def checker(problem: Problem, inputs: Inputs) -> Callable[[Provider], Mapping[str, float | None]]:
    """Return the check of a provider against the float64 oracle and, for ours, against the error budget.

    Where the oracle is too large, one batch row and key head is computed on its own, by every provider.
    """
    limit = _ORACLE_SCORES[inputs.q.device.type]
    group = problem.h // problem.h_kv
    if problem.b * problem.h * problem.s * (problem.p + problem.l) > limit:
        problem, inputs = _head(problem, inputs)
    if group * problem.s * (problem.p + problem.l) > limit:
        return lambda provider: dict.fromkeys(NAMES)
    leaves = inputs[:5]
    exact, eager = _expected(inputs)

    def check(provider: Provider) -> Mapping[str, float | None]:
        call = provider.make(problem, inputs)
        y = call.apply()
        got = dict(zip(NAMES, (y.detach(), *torch.autograd.grad(y, leaves, inputs.dy)), strict=True))
        if provider.role == "ours":
            for name, value in got.items():
                compare.assert_close(name, value, eager[name], exact[name])
        return {name: compare.relative_error(value, exact[name]) for name, value in got.items()}

    return check


def _head(problem: Problem, inputs: Inputs) -> tuple[Problem, Inputs]:
    """The first batch row and key head, with the query heads that read it."""
    group = problem.h // problem.h_kv
    q, dy = inputs.q.detach()[:1, :group], inputs.dy[:1, :group]
    k, v = inputs.k.detach()[:1, :1], inputs.v.detach()[:1, :1]
    prefix_k, prefix_v = inputs.prefix_k.detach()[:1], inputs.prefix_v.detach()[:1]
    leaves = (tensor.clone().requires_grad_() for tensor in (q, k, v, prefix_k, prefix_v))
    kept = None if inputs.kept is None else inputs.kept[:1]
    return replace(problem, b=1, h=group, h_kv=1), inputs._replace(
        **dict(zip(Inputs._fields, (*leaves, dy, kept), strict=False))
    )


def _expected(inputs: Inputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    leaves, masks = inputs[:5], inputs.masks
    wide = [tensor.detach().double() for tensor in leaves]
    exact = (oracle.forward(*wide, **masks), *oracle.backward(inputs.dy.double(), *wide, **masks))
    y = oracle.eager(*leaves, **masks)
    eager = (y.detach(), *torch.autograd.grad(y, leaves, inputs.dy))
    return dict(zip(NAMES, exact, strict=True)), dict(zip(NAMES, eager, strict=True))


def _joined(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The prefix copied for each batch row and joined, as a cache of past keys does it."""
    batch = inputs.q.shape[0]
    return (
        torch.cat((inputs.prefix_k.expand(batch, -1, -1, -1), inputs.k), dim=2),
        torch.cat((inputs.prefix_v.expand(batch, -1, -1, -1), inputs.v), dim=2),
    )


def _peft(problem: Problem, inputs: Inputs) -> Call:
    """PEFT's prefix as a cache: joined, and a dense mask, because there are more keys than queries.

    As transformers 5 has it: one mask serves all layers, so that it is not timed, and beside a mask key heads are
    repeated; without one torch does that.
    """
    length, group, mask = problem.p + problem.l, problem.h // problem.h_kv, None
    if inputs.causal or inputs.kept is not None:
        mask = oracle.allowed(*inputs[:2], inputs.prefix_k, inputs.causal, inputs.kept)[:, 0]

    def apply() -> Tensor:
        keys, values = _joined(inputs)
        if mask is not None and group > 1:
            keys, values = (
                x[:, :, None].expand(-1, -1, group, -1, -1).reshape(problem.b, problem.h, length, problem.d)
                for x in (keys, values)
            )
        grouped = mask is None and group > 1
        return F.scaled_dot_product_attention(inputs.q, keys, values, attn_mask=mask, enable_gqa=grouped)

    return _call(inputs, apply)


def _lower_right(problem: Problem, inputs: Inputs) -> Call:
    """Joined by hand, with a mask that torch's flash kernel knows."""

    def apply() -> Tensor:
        keys, values = _joined(inputs)
        mask = causal_lower_right(problem.s, keys.shape[2]) if inputs.causal else None
        return F.scaled_dot_product_attention(inputs.q, keys, values, attn_mask=mask, enable_gqa=_is_grouped(problem))

    return _call(inputs, apply)


def _cudnn(problem: Problem, inputs: Inputs) -> Call:
    """Joined by hand, through cuDNN, which takes the mask as a dense one."""
    peft = _peft(problem, inputs)

    def apply() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return peft.apply()

    return _call(inputs, apply)


def _ours(problem: Problem, inputs: Inputs, backend: str) -> Call:
    return _call(inputs, lambda: pk.prefix_attention(*inputs[:5], **inputs.masks, backend=backend))


def _call(inputs: Inputs, apply: Callable[[], Tensor]) -> Call:
    return Call(apply, tuple(inputs[:5]), inputs.dy)


def _is_grouped(problem: Problem) -> bool:
    return problem.h != problem.h_kv


def _runs(problem: Problem, device: torch.device) -> str | None:
    return None


def _lower_right_why_not(problem: Problem, device: torch.device) -> str | None:
    return "its mask has no padding" if problem.mask == "padded" else None


def _cudnn_why_not(problem: Problem, device: torch.device) -> str | None:
    return None if device.type == "cuda" else "cuDNN is on CUDA only"


def _kernels_why_not(problem: Problem, device: torch.device) -> str | None:
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        return "TRITON_INTERPRET is set: the interpreter is for tests"
    return None


def _size(problem: Problem) -> int:
    return getattr(torch, problem.dtype).itemsize


def _queries(problem: Problem) -> int:
    """Elements of q, y or dy."""
    return problem.b * problem.h * problem.s * problem.d


def _keys(problem: Problem) -> int:
    """Elements of all keys and values."""
    return 2 * problem.h_kv * (problem.b * problem.l + problem.p) * problem.d


def _problem(
    model: shapes.Model, s: int, p: int, b: int, l: int | None = None, dtype: str = "bfloat16"  # noqa: E741
) -> Problem:  # fmt: skip
    keys = s if l is None else l
    return Problem(model.name, b, model.heads, model.kv_heads, s, keys, p, model.head_dim, dtype)


def _multi_head(model: shapes.Model) -> shapes.Model:
    """The same model without grouping: as many key heads as query heads."""
    return replace(model, name=f"{model.name}, multi-head", kv_heads=model.heads)


def _gpu_problems() -> list[Problem]:
    first, second = shapes.LLAMA_3_8B, shapes.LLAMA_3_70B
    models = (first, second, _multi_head(first))
    grid = [_problem(model, 2048, 64, 4) for model in models]
    grid += [_problem(model, s, 64, b) for model in models for s, b in ((512, 16), (2048, 4), (8192, 1))]
    grid += [_problem(model, 2048, p, 4) for model in models for p in (16, 64, 256)]
    grid += [_problem(first, 2048, 64, b) for b in (1, 4, 16)]
    grid += [_problem(model, 1, 64, b, l=4096) for model in models for b in (1, 4, 16)]
    # Every combination that the sections above leave out, the largest last.
    grid += [_problem(model, s, p, b) for s in (512, 2048, 8192) for b in (1, 4, 16) for p in (16, 64, 256)
             for model in models]  # fmt: skip
    return list(dict.fromkeys(grid))


def _quick_gpu_problems() -> list[Problem]:
    first = shapes.LLAMA_3_8B
    grid = [_problem(first, 2048, 64, 4), _problem(_multi_head(first), 2048, 64, 4), _problem(first, 512, 16, 16)]
    return [*grid, _problem(first, 8192, 64, 1), _problem(first, 1, 64, 16, l=4096)]


def _cpu_problems() -> list[Problem]:
    """Training steps of every mask and dtype; head counts, batches and prefixes one at a time; decoding."""
    grouped = replace(shapes.LLAMA_32_1B, name="Llama-3.2-1B, half of the heads", heads=16, kv_heads=4)
    wide = replace(_multi_head(grouped), name="8 heads of 128", heads=8, kv_heads=8, head_dim=128)
    grid = []
    for dtype in ("float32", "bfloat16"):
        middle = _problem(grouped, 512, 30, 1, dtype=dtype)
        grid += [middle, replace(middle, mask="full"), replace(middle, b=4, mask="padded")]
        grid += [_problem(wide, 512, 16, 1, dtype=dtype), _problem(shapes.LLAMA_32_1B, 64, 30, 1, dtype=dtype)]
        grid += [_problem(wide, 64, 16, b, dtype=dtype) for b in (1, 4)]
        grid += [replace(_problem(wide, 64, 16, 4, dtype=dtype), mask="full")]
        grid += [_problem(grouped, 1, 30, 1, l=keys, dtype=dtype) for keys in (128, 2048)]
    return [*grid, _problem(wide, 64, 16, 1, dtype="float16"), _problem(grouped, 1, 30, 1, l=2048, dtype="float16")]


def _quick_cpu_problems() -> list[Problem]:
    """Short sequences: the harness draws more inputs than the caches hold, and time grows with s by the byte."""
    model = replace(shapes.LLAMA_32_1B, name="Llama-3.2-1B, a quarter of the heads", heads=8, kv_heads=2)
    grid = [_problem(model, 128, 16, 1, dtype=dtype) for dtype in ("float32", "bfloat16")]
    return [*grid, _problem(model, 1, 64, 1, l=1024)]


def _our_provider(backend: str, why_not: Callable[[Problem, torch.device], str | None]) -> Provider:
    make = functools.partial(_ours, backend=backend)
    return Provider(f"ours_{backend}", "ours", why_not, make, (pk.UnsupportedError,))


FAMILY = Family(
    name="prefix_attention",
    problems=problems,
    modes=modes,
    make_inputs=make_inputs,
    input_bytes=input_bytes,
    work=work,
    dtype=lambda problem: getattr(torch, problem.dtype),
    providers=(
        Provider("peft", "baseline", _runs, _peft),
        Provider("cat_lower_right", "baseline", _lower_right_why_not, _lower_right),
        Provider("cat_cudnn", "baseline", _cudnn_why_not, _cudnn, (RuntimeError,)),
        _our_provider("auto", _runs),
        _our_provider("torch", _runs),
        _our_provider("triton", _kernels_why_not),
    ),
    summarize_by=("dtype", "mask"),
    checker=checker,
)
