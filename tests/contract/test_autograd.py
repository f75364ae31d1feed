"""Autograd, torch.library and torch.compile: what holds for every operator, on the CPU."""

from __future__ import annotations

import itertools
from dataclasses import replace
from inspect import signature
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from peft_kernels._core import registration
from python_ref import compare
from tests.contract import observe
from tests.contract.operators import CPU, Operator, over

each_operator = over("", lambda operator: [()], gradients=True)
each_kind = over("case", lambda operator: itertools.product(operator.kinds), gradients=True)


def _leaves(operator: Operator, case: Any) -> tuple[Any, list[Tensor]]:
    """Tensors of a case, and those of them that want a gradient."""
    leaves = operator.leaves(operator.make(case, CPU))
    return leaves, list(operator.wanted(leaves).values())


@over("case", lambda operator: itertools.product(operator.gradcheck))
def test_gradcheck(operator: Operator, case: Any) -> None:
    leaves, wanted = _leaves(operator, case)

    def call(*given: Tensor) -> Tensor:
        # What gradcheck perturbs in place it passes too: a tensor that is read twice is one tensor here.
        return operator.call(case, leaves._replace(**dict(zip(operator.wanted(leaves), given, strict=True))))

    assert torch.autograd.gradcheck(call, wanted)


@pytest.mark.parametrize("linear_loss", [False, True])
@each_kind
def test_second_derivatives_are_right_or_raise(operator: Operator, case: Any, linear_loss: bool) -> None:
    """Of the gradient of each tensor by each other, also where dy has no graph and so drops nothing by itself."""
    leaves, wanted = _leaves(operator, case)
    dy = operator.output_gradient(case, CPU).requires_grad_(not linear_loss)
    hidden = leaves._replace(**{name: leaf * 1 for name, leaf in operator.wanted(leaves).items()})
    for given in (leaves, hidden):
        inputs = list(operator.wanted(given).values())
        try:
            gradients = torch.autograd.grad(operator.call(case, given), inputs, dy, create_graph=True)
        except RuntimeError as error:  # where what is not saved cannot be tied to a gradient any more
            assert given is hidden and "no second derivatives" in str(error)
            continue
        expected = torch.autograd.grad(operator.eager(case, given), inputs, dy, create_graph=True)
        for name, gradient, other in zip(operator.wanted(given), gradients, expected, strict=True):
            torch.testing.assert_close(gradient.float(), other.float(), rtol=0.05, atol=0.05)
            if operator.op.OPERATOR.linear or name == operator.op.OPERATOR.passes:
                assert gradient.requires_grad == other.requires_grad
            elif other.requires_grad:
                for leaf in wanted:
                    (second,) = torch.autograd.grad(other.square().sum(), leaf, allow_unused=True, retain_graph=True)
                    if second is not None and second.any():
                        _check_second(operator, gradient.square().sum(), leaf, second)


def _check_second(operator: Operator, loss: Tensor, leaf: Tensor, expected: Tensor) -> None:
    """It raises, here or in torch; or is right, as where operators run whose derivatives torch differentiates."""
    try:
        (second,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    except RuntimeError as error:
        assert str(error).startswith((f"{operator.name}: no second derivatives", "derivative for aten::"))
        return
    torch.testing.assert_close(second.float(), expected.float(), rtol=0.05, atol=0.05)


@each_operator
def test_frozen_arguments_hide_no_second_derivative(operator: Operator) -> None:
    """Whichever one gradient is asked for, what it depends on is tied to it or refused."""
    for name in operator.wanted(operator.make(operator.typical, CPU)):
        leaves, _ = _leaves(operator, operator.typical)
        alone = leaves._replace(
            **{other: leaf.detach() for other, leaf in operator.wanted(leaves).items() if other != name}
        )
        leaf = getattr(alone, name)
        given = alone._replace(**{name: leaf * 1})
        (expected,) = torch.autograd.grad(operator.eager(operator.typical, given).sum(), leaf, create_graph=True)
        if expected.requires_grad:
            (second,) = torch.autograd.grad(expected.sum(), leaf, allow_unused=True, retain_graph=True)
            try:
                (gradient,) = torch.autograd.grad(operator.call(operator.typical, given).sum(), leaf, create_graph=True)
            except RuntimeError as error:
                assert "no second derivatives" in str(error)
            else:
                wanted = torch.zeros_like(leaf) if second is None else second
                _check_second(operator, gradient.sum(), leaf, wanted)


def _subsets(operator: Operator) -> list[tuple[tuple[str, ...]]]:
    names = operator.differentiable
    return [(names,), *((together,) for together in operator.together or [(name,) for name in names])]


@over("names", _subsets, gradients=True)
def test_saves_no_more_than_eager(operator: Operator, names: tuple[str, ...]) -> None:
    """Whatever alone wants a gradient; parameters exist anyway, activations do not. Eager is what users run today."""
    case, asked = operator.typical, replace(operator, differentiable=names)
    leaves = asked.leaves(operator.make(case, CPU))
    activations = {id(getattr(leaves, name)) for name in operator.op.OPERATOR.activations}
    held = {}
    for call in (operator.call, operator.today):
        with observe.saved([tensor for tensor in leaves if id(tensor) not in activations]) as (added, _):
            call(case, leaves)
        held[call] = sum(added.values())
    # A seed's 8 bytes stand for a mask that eager may have put into what it keeps.
    assert held[operator.call] <= held[operator.today] + 8 + operator.shared(case)


def _check_compiled(operator: Operator, case: Any, compiler: Any, **tolerances: float) -> None:
    """Compile a call without a graph break and compare it and its gradients with eager ones."""
    torch._dynamo.reset()
    leaves, wanted = _leaves(operator, case)
    dy, first = operator.output_gradient(case, CPU), operator.differentiable[0]

    # What the compiler fuses with rounds nothing, neither forward nor backward.
    def call(given: Any, backend: str | None = None) -> Tensor:
        return operator.call(case, given._replace(**{first: getattr(given, first) * 2}), backend).relu()

    # A compiled call is the torch backend's whatever its size.
    eager, got = call(leaves, "torch"), torch.compile(call, fullgraph=True, backend=compiler)(leaves)
    expected = torch.autograd.grad(eager, wanted, dy)
    torch.testing.assert_close(got, eager, **tolerances)
    torch.testing.assert_close(torch.autograd.grad(got, wanted, dy), expected, **tolerances)


@each_kind
def test_compile_and_opcheck(operator: Operator, case: Any) -> None:
    """Opcheck on what a compiled call gives; asked for all gradients, for every second one, and for the others."""
    recorder = observe.Recorder()
    _check_compiled(operator, case, recorder.compiler, rtol=0, atol=0)
    forward, backward = recorder.calls
    assert [str(target) for target, _ in (forward, backward)] == [
        f"peft_kernels.{operator.name}{which}.default" for which in ("", "_backward")
    ]
    # What a cache of compiled graphs tells states of the package apart by.
    assert forward[1][-1] == backward[1][-1] == registration.revision()
    torch.library.opcheck(forward[0], tuple(_fresh(argument, requires_grad=True) for argument in forward[1]))
    place = [argument.name for argument in backward[0]._schema.arguments].index("needs")
    needs = backward[1][place]
    # Of an optional tensor in a tuple, which may be missing, there is none.
    lists = [name for name in operator.op.OPERATOR.needs._fields if operator.op.OPERATOR.signature.is_tuple(name)]
    assert sum(needs) == len(operator.wanted(operator.make(case, CPU))) if lists else all(needs)
    every_second = [need and index % 2 == 0 for index, need in enumerate(needs)]

    def asked(gradients: list[bool]) -> tuple[Any, ...]:
        fresh = [_fresh(argument) for argument in backward[1]]
        return (*fresh[:place], gradients, *fresh[place + 1 :])

    torch.library.opcheck(backward[0], asked(needs))
    torch.library.opcheck(backward[0], asked(every_second))
    others = [need and not taken for need, taken in zip(needs, every_second, strict=True)]
    torch.library.opcheck(backward[0], asked(others), test_utils=("test_schema", "test_faketensor"))


def _fresh(argument: Any, requires_grad: bool = False) -> Any:
    if isinstance(argument, (list, tuple)):
        return [_fresh(each, requires_grad) for each in argument]
    if not isinstance(argument, Tensor):
        return argument
    fresh = argument.detach().clone()
    # A tensor of no dimensions is a scalar: it has no gradient.
    return fresh.requires_grad_(requires_grad and fresh.is_floating_point() and fresh.dim() > 0)


@pytest.mark.slow
@each_kind
def test_compile_by_inductor(operator: Operator, case: Any) -> None:
    _check_compiled(operator, case, "inductor")


@over("case", lambda operator: itertools.product(operator.scaled[:1]))
def test_scale_s_value_does_not_recompile(operator: Operator, case: Any) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    given = operator.arguments(case, operator.make(case, CPU))

    def call(scale: Tensor) -> Tensor:
        return operator.function(**given | {"scale": scale})

    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for value in (0.5, 2.0, 3.0):
        torch.testing.assert_close(compiled(torch.tensor(value)), call(torch.tensor(value)))
    assert counter.frame_count == 1


@over("case", lambda operator: itertools.product(operator.kinds[: "scale" in signature(operator.function).parameters]))
def test_a_float_scale_is_compiled_twice(operator: Operator, case: Any) -> None:
    """Once as a constant, and once for every other value, as torch does with a float that a module holds."""
    given = operator.arguments(case, operator.make(case, CPU))
    torch._dynamo.reset()
    counter, settings = torch._dynamo.testing.CompileCounterWithBackend("aot_eager"), {"scale": 0.5}
    leaves = {name: given[name].requires_grad_() for name in operator.differentiable if given.get(name) is not None}

    def call() -> Tensor:
        return operator.function(**given | {"scale": settings["scale"]})

    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for value in (0.5, 0.25, 0.75, -1.5):
        settings["scale"] = value
        got, expected = compiled(), call()
        torch.testing.assert_close(got, expected)
        first = next(iter(leaves.values()))
        gradients = (torch.autograd.grad(y.sum(), first)[0] for y in (got, expected))
        torch.testing.assert_close(*gradients)
    assert counter.frame_count <= 2


@each_kind
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(operator: Operator, case: Any, use_reentrant: bool) -> None:
    leaves, wanted = _leaves(operator, case)

    def call(*given: Tensor | None) -> Tensor:
        return operator.call(case, leaves._make(given))

    y = call(*leaves)
    expected = torch.autograd.grad(y.square().sum(), wanted)
    again = checkpoint(call, *leaves, use_reentrant=use_reentrant)
    compare.assert_bitwise_equal("y", again, y)
    again.square().sum().backward()  # reentrant checkpointing knows no autograd.grad
    for tensor, gradient in zip(wanted, expected, strict=True):
        compare.assert_bitwise_equal("gradient", tensor.grad, gradient)


@over("", lambda operator: [()])
def test_inference_saves_nothing(operator: Operator) -> None:
    tensors = operator.make(operator.typical, CPU)
    with observe.saved(()) as (added, _), torch.no_grad():
        y = operator.call(operator.typical, operator.leaves(tensors))
    assert y.grad_fn is None and not added
    assert operator.call(operator.typical, tensors).grad_fn is None


@each_operator
def test_eager_calls_bypass_the_registered_operator(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    leaves, wanted = _leaves(operator, operator.typical)
    monkeypatch.setattr(operator.op.OPERATOR, "_operator", None)
    torch.autograd.grad(operator.call(operator.typical, leaves).sum(), wanted)
