"""The call, and the declaration that makes it an operator."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from peft_kernels._core.autocast import without_autocast
from peft_kernels._core.dispatch import Implementation
from peft_kernels._core.operator import Operator
from peft_kernels.lora import members
from peft_kernels.lora.gain.op import cast_for_autocast
from peft_kernels.lora.gain_alone import torch_impl, triton_impl
from peft_kernels.lora.gain_alone.composite import composite
from peft_kernels.lora.gain_alone.problem import NAME, Inputs, LoraGainAloneProblem, Needs, make_problem


def linear_with_gain_alone(
    x: Tensor, weight: Tensor, gain: Tensor, bias: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """A linear layer each of whose outputs a gain multiplies: (IA)^3 (Liu et al. 2022, arXiv:2205.05638).

    ``y = gain * (x @ weight.T + bias)``

    Args:
        x (..., K): float32, bfloat16, float16 or float64; any strides.
        weight (N, K), bias (N,): x's dtype.
        gain (N,): x's dtype or float32.
        backend: as ``lora_linear``'s.

    Returns:
        y (..., N) in x's dtype; under autocast in its dtype, to which x, weight and bias are cast, but for float64.

    Raises:
        ValueError: a shape, dtype, device or backend name is wrong.
        UnsupportedError: the forced backend cannot run this problem.
    """
    if isinstance(x, Tensor):
        x, (weight,), (bias,), _ = members.cast_for_autocast(x, (weight,), (bias,), ())
        gain = cast_for_autocast(x, gain)
    y: Tensor = OPERATOR(Inputs(x, weight, gain, bias), backend)
    return y


def _forward(problem: LoraGainAloneProblem, call: Inputs, implementation: Implementation) -> tuple[Tensor, Tensor]:
    flat = call if call.x.dim() == 2 else call._replace(x=call.x.reshape(problem.m, problem.k))
    with without_autocast(problem.device.type):
        y, product = implementation.forward(problem, flat)
    return y if flat is call else y.view(*call.x.shape[:-1], problem.n), product


def _results(problem: LoraGainAloneProblem, call: Inputs, implementation: Implementation) -> tuple[Tensor, Tensor]:
    return call.x.new_empty((*call.x.shape[:-1], problem.n)), call.x.new_empty((problem.m, problem.n))


def _reads(needs: Needs) -> Iterable[str]:
    if needs.x or needs.weight or needs.bias:
        yield "gain"
    if needs.x:
        yield "weight"
    if needs.weight:
        yield "x"
    if needs.gain:
        # P is made of it: who asks for a second derivative by the bias has to be told.
        yield from ("product", "bias")


OPERATOR = Operator(
    name=NAME,
    call=Inputs,
    needs=Needs,
    implementations=(triton_impl.IMPLEMENTATION, torch_impl.IMPLEMENTATION),
    make_problem=make_problem,
    forward=_forward,
    backward=members.backward_of_one,
    results=_results,
    composite=composite,
    reads=_reads,
    varying=("m",),
    kept=("product",),
    activations=("x",),
    adds=("bias",),
)
