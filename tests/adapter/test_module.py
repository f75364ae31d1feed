"""SerialAdapter and ParallelAdapter against their equations; copies, dtypes, checkpointing, compile."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peft_kernels as pk
from peft_kernels.adapter.kernels.activations import ACTIVATIONS
from python_ref import compare
from tests.adapter.modules import COPIES, KINDS, H, R, equation, with_random_parameters


def _inputs(kind: str, *shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return tuple(torch.randn(*shape, dtype=dtype, requires_grad=True) for _ in range(2 if kind == "parallel" else 1))


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_adapter_changes_nothing(kind: str) -> None:
    given = _inputs(kind, 2, 5, H)
    adapter = KINDS[kind](H, R, activation="gelu", scale=4.0)
    assert torch.equal(adapter(*given), given[-1])
    adapter(*given).sum().backward()
    assert adapter.up.weight.grad.abs().sum() > 0, "a branch of zeros must still learn"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_module_is_its_equation(kind: str, bias: bool, activation: str) -> None:
    adapter = with_random_parameters(KINDS[kind](H, R, activation, scale=0.5, bias=bias, dtype=torch.float64))
    given = _inputs(kind, 2, 5, H, dtype=torch.float64)
    leaves = [*given, *adapter.parameters()]
    y, expected = adapter(*given), equation(adapter, given[0], given[-1])
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True])
def test_state_dict_has_linear_s_names(kind: str, bias: bool) -> None:
    adapter = KINDS[kind](H, R, bias=bias)
    names = ("weight", "bias") if bias else ("weight",)
    assert list(adapter.state_dict()) == [f"{part}.{name}" for part in ("down", "up") for name in names]
    assert adapter.down.weight.shape == (R, H)
    assert adapter.up.weight.shape == (H, R)
    other = with_random_parameters(KINDS[kind](H, R, bias=bias))
    adapter.load_state_dict(other.state_dict())
    given = _inputs(kind, 3, H)
    assert torch.equal(adapter(*given), other(*given))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("copied", COPIES)
def test_copies_compute_the_same(kind: str, copied: Callable[[nn.Module], nn.Module]) -> None:
    adapter = with_random_parameters(KINDS[kind](H, R, "silu", scale=0.3))
    given = _inputs(kind, 3, H)
    again = copied(adapter)
    assert torch.equal(again(*given), adapter(*given))
    assert again.down.weight.data_ptr() != adapter.down.weight.data_ptr()


@pytest.mark.parametrize("kind", KINDS)
def test_to_moves_and_casts(kind: str) -> None:
    adapter = with_random_parameters(KINDS[kind](H, R)).to(torch.bfloat16)
    given = _inputs(kind, 3, H, dtype=torch.bfloat16)
    assert adapter(*given).dtype == torch.bfloat16
    assert KINDS[kind](H, R, device="meta", dtype=torch.float16).up.weight.dtype == torch.float16


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("by_part", [False, True])
def test_meta_construction(kind: str, by_part: bool) -> None:
    """By the adapter's own reset_parameters, or by that of each module that holds parameters, as FSDP does."""
    adapter = KINDS[kind](H, R, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.fill_(math.nan)
    for module in (adapter.down, adapter.up) if by_part else (adapter,):
        module.reset_parameters()
    given = _inputs(kind, 3, H)
    assert torch.equal(adapter(*given), given[-1])
    assert 0 < adapter.down.weight.abs().max() <= H**-0.5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_adapter_keeps_half_precision_activations(kind: str, dtype: torch.dtype) -> None:
    adapter, given = with_random_parameters(KINDS[kind](H, R)), _inputs(kind, 3, H, dtype=dtype)
    y = adapter(*given)
    assert y.dtype == dtype
    y.float().sum().backward()
    assert {parameter.grad.dtype for parameter in adapter.parameters()} == {torch.float32}
    assert {tensor.grad.dtype for tensor in given} == {dtype}


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind: str) -> None:
    adapter, given = with_random_parameters(KINDS[kind](H, R, "tanh")), _inputs(kind, 3, H)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = adapter(*given), equation(adapter, given[0], given[-1])
    assert y.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(kind: str, use_reentrant: bool) -> None:
    adapter, given = with_random_parameters(KINDS[kind](H, R, "gelu")), _inputs(kind, 3, H)
    adapter(*given).square().sum().backward()
    leaves = [*given, *adapter.parameters()]
    expected = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    checkpoint(adapter, *given, use_reentrant=use_reentrant).square().sum().backward()
    for leaf, gradient in zip(leaves, expected, strict=True):
        compare.assert_bitwise_equal("gradient", leaf.grad, gradient)


@pytest.mark.parametrize("kind", KINDS)
def test_compile_without_graph_break(kind: str) -> None:
    torch._dynamo.reset()
    adapter, given = with_random_parameters(KINDS[kind](H, R, "gelu")), _inputs(kind, 3, H)
    compiled = torch.compile(adapter, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), adapter(*given))


def test_repr_says_what_it_is() -> None:
    text = repr(pk.SerialAdapter(H, R, "silu", scale=0.25))
    assert text.startswith("SerialAdapter(")
    for part in ("activation='silu'", "scale=0.25", "in_features=24, out_features=6"):
        assert part in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4), "SerialAdapter: hidden must be an int of at least 1, got 0"),
        ((4, -1), "SerialAdapter: bottleneck must be an int of at least 1, got -1"),
        ((4, 2.0), "SerialAdapter: bottleneck must be an int of at least 1, got 2.0"),
        ((4, True), "SerialAdapter: bottleneck must be an int of at least 1, got True"),
        (("4", 2), "SerialAdapter: hidden must be an int of at least 1, got '4'"),
        ((4, 2, ["relu"]), r"SerialAdapter: activation must be one of relu, .*, got \['relu'\]"),
        ((4, 2, "relu", "2"), "SerialAdapter: scale must be a float or a 0-d floating tensor, got str"),
        (
            (4, 2, "relu", 1.0, True, None, torch.int8),
            "SerialAdapter: dtype must be one of torch.float32, .*, got torch.int8",
        ),
        ((4, 2, "swish"), "SerialAdapter: activation must be one of relu, .*, got 'swish'"),
    ],
)
def test_wrong_input_is_named(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pk.SerialAdapter(*arguments)
