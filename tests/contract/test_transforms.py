"""Where torch must see what is inside a call: torch.func, tracers, dispatch modes, tensors without memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import peft_kernels as pk
from tests.contract import observe
from tests.contract.operators import CPU, Operator, over

each_kind = over("case", lambda operator: itertools.product(operator.kinds), gradients=True)
first_kind = over("case", lambda operator: itertools.product(operator.kinds[:1]), gradients=True)

Function = Callable[..., Tensor]


def _of_tensors(operator: Operator, case: Any, call: Callable[..., Tensor]) -> tuple[Function, tuple[Tensor, ...]]:
    """A call as a function of its differentiable tensors, and these."""
    tensors = operator.make(case, CPU)
    names, values = zip(*operator.wanted(tensors).items(), strict=True)
    return lambda *given: call(case, tensors._replace(**dict(zip(names, given, strict=True)))), values


def _loss(function: Function) -> Function:
    return lambda *given: function(*given).float().square().sum()


def _two(values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.stack((value, value / 2)) for value in values)


def _jacobian(function: Function, values: tuple[Tensor, ...], vmap: bool) -> Any:
    """Rows of the vector-Jacobian product of a graph that was made outside of vmap."""
    leaves = [value.clone().requires_grad_() for value in values]
    y = function(*leaves)
    rows = torch.stack((torch.ones_like(y), torch.full_like(y, 0.5)))
    if not vmap:
        return torch.autograd.grad(y, leaves, rows, is_grads_batched=True)
    return torch.func.vmap(lambda dy: torch.autograd.grad(y, leaves, dy, retain_graph=True))(rows)


def _export(function: Function, values: tuple[Tensor, ...], strict: bool) -> Tensor:
    class Module(torch.nn.Module):
        def forward(self, *given: Tensor) -> Tensor:
            return function(*given)

    return torch.export.export(Module(), values, strict=strict).module()(*values)


TRANSFORMS: dict[str, Callable[[Function, tuple[Tensor, ...]], Any]] = {
    "grad": lambda f, values: torch.func.grad(_loss(f), tuple(range(len(values))))(*values),
    "vmap": lambda f, values: torch.func.vmap(f)(*_two(values)),
    "gradient by sample": lambda f, values: torch.func.vmap(
        torch.func.grad(_loss(f), len(values) - 1), (0, *[None] * (len(values) - 1))
    )(_two(values)[0], *values[1:]),
    "jvp": lambda f, values: torch.func.jvp(f, values, values),
    "hessian": lambda f, values: torch.func.hessian(_loss(lambda last: f(*values[:-1], last)))(values[-1]),
    "batched gradients": lambda f, values: _jacobian(f, values, vmap=False),
    "vmap of autograd": lambda f, values: _jacobian(f, values, vmap=True),
    "make_fx": lambda f, values: make_fx(f)(*values)(*values),
    "jit.trace": lambda f, values: torch.jit.trace(f, values, check_trace=False)(*values),
    "export": lambda f, values: _export(f, values, strict=False),
}
COMPILED: dict[str, Callable[[Function, tuple[Tensor, ...]], Any]] = {
    "vmap": lambda f, values: torch.compile(torch.func.vmap(f), backend="eager", fullgraph=True)(*_two(values)),
    "jvp": lambda f, values: torch.compile(
        lambda *given: torch.func.jvp(f, given, given), backend="eager", fullgraph=True
    )(*values),
}


def _check(operator: Operator, case: Any, transform: Callable[[Function, tuple[Tensor, ...]], Any]) -> None:
    function, values = _of_tensors(operator, case, operator.call)
    eager, _ = _of_tensors(operator, case, operator.eager)
    tolerance = 1e-4 if values[0].dtype == torch.float32 else 0.05
    torch.testing.assert_close(transform(function, values), transform(eager, values), rtol=tolerance, atol=tolerance)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("transform", TRANSFORMS)
@each_kind
def test_transforms(operator: Operator, case: Any, transform: str) -> None:
    _check(operator, case, TRANSFORMS[transform])


@pytest.mark.parametrize("transform", COMPILED)
@first_kind
def test_compiled_transforms(operator: Operator, case: Any, transform: str) -> None:
    torch._dynamo.reset()
    _check(operator, case, COMPILED[transform])


@first_kind
def test_a_forced_backend_is_refused_under_a_transform(operator: Operator, case: Any) -> None:
    with operator.using("triton"), pytest.raises(pk.UnsupportedError, match=r"torch\.func.*backend='torch' or 'auto'"):
        function, values = _of_tensors(operator, case, lambda *given: operator.call(*given, "triton"))
        torch.func.vmap(function)(*_two(values))


@each_kind
def test_a_dispatch_mode_sees_nothing_written(operator: Operator, case: Any) -> None:
    """A mode may keep what any operation made, as selective checkpointing does."""
    function, values = _of_tensors(operator, case, operator.call)
    leaves = [value.requires_grad_() for value in values]
    with observe.WrittenInPlace() as seen:
        y = function(*leaves)
    assert not seen.written and not seen.ours
    tolerance = 1e-4 if y.dtype == torch.float32 else 0.05
    torch.testing.assert_close(y, function(*leaves), rtol=tolerance, atol=tolerance)


@first_kind
def test_a_dispatch_mode_sees_a_forced_backend_as_one_operator(operator: Operator, case: Any) -> None:
    function, values = _of_tensors(operator, case, lambda *given: operator.call(*given, "triton"))
    with operator.using("triton"), observe.WrittenInPlace() as seen:
        y = function(*values)
    assert seen.ours == [f"peft_kernels.{operator.name}.default"] and not seen.written
    with operator.using("triton"):
        torch.testing.assert_close(y, function(*values), rtol=0, atol=0)


@first_kind
def test_floating_point_operations_are_counted(operator: Operator, case: Any) -> None:
    counts = []
    for call in (operator.call, operator.eager):
        function, values = _of_tensors(operator, case, call)
        # torch counts nothing for its attention on a CPU.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            function(*values)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


@each_kind
def test_meta_tensors_have_shapes_and_dtypes(operator: Operator, case: Any) -> None:
    tensors = operator.make(case, CPU)
    leaves = operator.leaves(tensors._make(None if tensor is None else tensor.to("meta") for tensor in tensors))
    given = operator.arguments(case, leaves)
    given = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in given.items()}
    y = operator.function(**given)
    assert (tuple(y.shape), y.dtype, y.device.type) == (tuple(case.y_shape), case.y_dtype, "meta")
    wanted = operator.wanted(leaves)
    gradients = torch.autograd.grad(y.sum(), list(wanted.values()))
    for gradient, leaf in zip(gradients, wanted.values(), strict=True):
        assert (gradient.shape, gradient.dtype, gradient.device) == (leaf.shape, leaf.dtype, leaf.device)
    with pytest.raises(pk.UnsupportedError, match="on meta"):
        operator.function(**given, backend="triton")
