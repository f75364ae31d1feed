"""LoRA on a given base: a frozen layer that computes by itself, and the update that is added to its output.

The base is ``F.linear`` here, for a quantized layer's call, a hooked one's, or any other's. Each provider computes y =
base(x) + scale (drop(x) A^T) B^T and the gradients of x, A and B; problems, limit and baselines are ``lora.py``'s.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

import peft_kernels as pk
from benchmarks import lora
from benchmarks.family import Call, Mode, Provider, Work
from benchmarks.lora import SCALE, Inputs, Problem


def work(problem: Problem, mode: Mode, provider: Provider) -> Work:
    """That of ``lora_linear``, and what two operations pass again: x, y, dY and both parts of dX, which are summed."""
    least = lora.work(problem, mode, provider)
    if provider.role != "ours":
        return least
    size = getattr(torch, problem.dtype).itemsize
    m, n, k = problem.m, problem.n, problem.k
    again = {"forward": m * (2 * n + k), "backward": m * (n + 4 * k)}
    moved = sum(again.values()) if mode == "both" else again[mode]
    return Work(least.bytes + size * moved, least.flops)


def _ours(problem: Problem, inputs: Inputs, provider: str, seed: int | None = None) -> Call:
    x, weight, lora_a, lora_b, dy = inputs
    backend = provider.removeprefix("ours_")

    def apply() -> Tensor:
        y = F.linear(x, weight)
        return pk.lora_update(y, x, lora_a, lora_b, SCALE, dropout_p=problem.p, seed=seed, backend=backend)

    return Call(apply, (x, lora_a, lora_b), dy)


def _provider(theirs: Provider) -> Provider:
    """The same backend as one of ``lora.py``'s."""
    return replace(theirs, make=functools.partial(_ours, provider=theirs.name))


FAMILY = replace(
    lora.FAMILY,
    name="lora_update",
    work=work,
    providers=tuple(
        _provider(each) if each.role == "ours" else each for each in lora.FAMILY.providers if each.name != "ours_cuda"
    ),
    checker=functools.partial(lora.checker, ours=_ours),
)
