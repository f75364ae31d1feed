"""``lora_linear`` with a gain: the call, and the declaration that makes it an operator."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from peft_kernels._core.autocast import autocast_dtype, without_autocast
from peft_kernels._core.dispatch import Implementation
from peft_kernels._core.operator import Operator
from peft_kernels.lora import members
from peft_kernels.lora.gain import torch_impl, triton_impl
from peft_kernels.lora.gain.composite import composite
from peft_kernels.lora.gain.native import native
from peft_kernels.lora.gain.problem import NAME, Inputs, LoraGainProblem, Needs, make_problem
from peft_kernels.lora.linear.problem import Inputs as LinearInputs


def linear_with_gain(call: LinearInputs, gain: Tensor, backend: str | None) -> Tensor:
    """Run a call that ``lora_linear`` has made ready, with a gain (N,) in x's dtype or float32.

    Raises:
        ValueError: a shape, dtype or device is wrong.
        UnsupportedError: the forced backend cannot run this problem.
    """
    x, weight, lora_a, lora_b, scale, bias, dropout_p, seed = call
    gain = cast_for_autocast(x, gain)
    y: Tensor = OPERATOR(Inputs(x, weight, lora_a, lora_b, gain, scale, bias, dropout_p, seed), backend)
    return y


def cast_for_autocast(x: Tensor, gain: Tensor) -> Tensor:
    """A gain as autocast would cast it beside an x that it has cast; float32 stays."""
    if isinstance(x, Tensor) and isinstance(gain, Tensor) and gain.dtype not in (x.dtype, torch.float32):
        casts = autocast_dtype(x.device.type) is not None and gain.dtype in (torch.bfloat16, torch.float16)
        gain = gain.to(x.dtype) if casts else gain
    return gain


def forward(problem: LoraGainProblem, call: Any, implementation: Implementation) -> tuple[Tensor, ...]:
    """An ``Operator``'s."""
    flat = call if call.x.dim() == 2 else call._replace(x=call.x.reshape(problem.m, problem.k))
    with without_autocast(problem.device.type):
        y, s, product = implementation.forward(problem, flat)
    return y if flat is call else y.view(*call.x.shape[:-1], problem.n), s, product


def results(problem: LoraGainProblem, call: Any, implementation: Implementation) -> tuple[Tensor, ...]:
    """An ``Operator``'s."""
    y = call.x.new_empty((*call.x.shape[:-1], problem.n))
    s = call.x.new_empty((problem.m, problem.r), dtype=problem.wide_dtype)
    return y, s, call.x.new_empty((problem.m, problem.n))


def reads(needs: Needs) -> Iterable[str]:
    """An ``Operator``'s."""
    if needs.x or needs.weight or needs.lora_a or needs.lora_b:
        yield "gain"
    if needs.x or needs.lora_a:
        yield "seed"
    if needs.x or needs.lora_a or needs.gain:
        yield "lora_b"
    if needs.x:
        yield from ("weight", "lora_a")
    if needs.weight or needs.lora_a:
        yield "x"
    if needs.lora_b or needs.gain:
        yield "s"
    if needs.gain:
        yield "product"


OPERATOR = Operator(
    name=NAME,
    call=Inputs,
    needs=Needs,
    implementations=(triton_impl.IMPLEMENTATION, torch_impl.IMPLEMENTATION),
    make_problem=make_problem,
    forward=forward,
    backward=members.backward_of_one,
    results=results,
    composite=composite,
    reads=reads,
    varying=("m",),
    kept=("s", "product"),
    activations=("x",),
    adds=("bias",),
    native=native,
)
