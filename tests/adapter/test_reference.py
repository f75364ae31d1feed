"""The oracle against what it does not share: autograd, differences, torch's own modules, numbers worked by hand."""

from __future__ import annotations

import inspect
import math
import re

import pytest
import torch
from torch import Tensor, nn

from peft_kernels.adapter.kernels import activations
from python_ref import adapter as oracle
from python_ref import compare

N, K, R = 7, 11, 3
NAMES = tuple(oracle.ACTIVATIONS)


def _tensors(shape: tuple[int, ...], n: int = N, biases: bool = True, seed: int = 0) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    return {
        "x": normal(*shape, K),
        "down_weight": normal(R, K),
        "up_weight": normal(n, R),
        "down_bias": normal(R) if biases else None,
        "up_bias": normal(n) if biases else None,
    }


def _gradients(dy: Tensor, tensors: dict[str, Tensor | None], **options: object) -> oracle.Gradients:
    given = {name: tensor for name, tensor in tensors.items() if name not in ("up_bias", "residual")}
    return oracle.backward(dy, **given, **options)


# Value and slope, worked out with the functions of the standard library and a pencil.
_PHI_1 = 0.5 * (1 + math.erf(1 / math.sqrt(2)))
_DENSITY_1 = math.exp(-0.5) / math.sqrt(2 * math.pi)
_SIGMOID_1 = 1 / (1 + math.exp(-1))
_TANH_OF_1 = math.tanh(math.sqrt(2 / math.pi) * 1.044715)
POINTS = [
    ("relu", 1.0, 1.0, 1.0),
    ("relu", -1.0, 0.0, 0.0),
    ("relu", 0.0, 0.0, 0.0),
    ("gelu", 1.0, _PHI_1, _PHI_1 + _DENSITY_1),
    ("gelu", -1.0, _PHI_1 - 1, 1 - _PHI_1 - _DENSITY_1),
    ("gelu", 0.0, 0.0, 0.5),
    (
        "gelu_tanh",
        1.0,
        0.5 * (1 + _TANH_OF_1),
        0.5 * (1 + _TANH_OF_1) + 0.5 * (1 - _TANH_OF_1**2) * math.sqrt(2 / math.pi) * 1.134145,
    ),
    ("gelu_tanh", 0.0, 0.0, 0.5),
    ("silu", 1.0, _SIGMOID_1, _SIGMOID_1 + _SIGMOID_1 * (1 - _SIGMOID_1)),
    ("silu", 0.0, 0.0, 0.5),
    ("tanh", 1.0, math.tanh(1), 1 - math.tanh(1) ** 2),
    ("tanh", 0.0, 0.0, 1.0),
    ("sigmoid", 1.0, _SIGMOID_1, _SIGMOID_1 * (1 - _SIGMOID_1)),
    ("sigmoid", 0.0, 0.5, 0.25),
    ("leaky_relu", 2.0, 2.0, 1.0),
    ("leaky_relu", -2.0, -0.02, 0.01),
    ("leaky_relu", 0.0, 0.0, 0.01),
    ("identity", -3.0, -3.0, 1.0),
]


@pytest.mark.parametrize(("name", "at", "value", "slope"), POINTS)
def test_activations_take_the_values_worked_by_hand(name: str, at: float, value: float, slope: float) -> None:
    z = torch.tensor([at], dtype=torch.float64)
    assert oracle.ACTIVATIONS[name].value(z).item() == pytest.approx(value, rel=1e-14, abs=1e-300)
    assert oracle.ACTIVATIONS[name].slope(z).item() == pytest.approx(slope, rel=1e-13, abs=1e-300)


@pytest.mark.parametrize("name", NAMES)
def test_slope_is_torch_s_at_every_point(name: str) -> None:
    z = torch.cat((torch.linspace(-30, 30, 4001, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)))
    z.requires_grad_()
    (expected,) = torch.autograd.grad(oracle.ACTIVATIONS[name].eager(z).sum(), z)
    torch.testing.assert_close(oracle.ACTIVATIONS[name].slope(z.detach()), expected, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(
        oracle.ACTIVATIONS[name].value(z.detach()), oracle.ACTIVATIONS[name].eager(z.detach()), rtol=1e-9, atol=1e-14
    )


def test_tables_have_the_same_names() -> None:
    assert tuple(activations.ACTIVATIONS) == NAMES
    kernels = pytest.importorskip("peft_kernels.adapter.kernels.triton_activations")
    for function in (kernels.activate, kernels.activation_grad):
        assert tuple(re.findall(r'NAME == "(\w+)"', inspect.getsource(function.fn))) == NAMES


def test_forward_is_the_equation_element_by_element() -> None:
    tensors, scale = _tensors((2, 2)), 1.25
    residual = torch.randn(2, 2, N, dtype=torch.float64)
    y, z = oracle.forward(**tensors, residual=residual, activation="tanh", scale=scale)
    x, down, up = tensors["x"].reshape(-1, K), tensors["down_weight"], tensors["up_weight"]
    for m in range(4):
        before = [
            sum(float(x[m, k]) * float(down[i, k]) for k in range(K)) + float(tensors["down_bias"][i]) for i in range(R)
        ]
        assert z.reshape(-1, R)[m].tolist() == pytest.approx(before, rel=1e-13)
        for n in range(N):
            branch = sum(math.tanh(before[i]) * float(up[n, i]) for i in range(R)) + float(tensors["up_bias"][n])
            expected = float(residual.reshape(-1, N)[m, n]) + scale * branch
            assert float(y.reshape(-1, N)[m, n]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", NAMES)
def test_oracle_keeps_its_arguments_dtype(dtype: torch.dtype, activation: str) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in _tensors((4,), K).items()}
    options = {"activation": activation, "scale": torch.tensor(0.5)}
    assert {result.dtype for result in oracle.forward(**tensors, residual=tensors["x"], **options)} == {dtype}
    gradients = _gradients(torch.ones(4, K, dtype=dtype), tensors, serial=True, **options)
    assert {gradient.dtype for gradient in gradients} == {dtype}


MODULES = {
    "relu": nn.ReLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "silu": nn.SiLU(),
    "tanh": nn.Tanh(),
    "sigmoid": nn.Sigmoid(),
    "leaky_relu": nn.LeakyReLU(),
    "identity": nn.Identity(),
}


@pytest.mark.parametrize("activation", MODULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eager_is_a_sequential_bit_for_bit(dtype: torch.dtype, activation: str) -> None:
    """Output and every gradient, against the modules that a user would write down."""
    sequential = nn.Sequential(nn.Linear(K, R), MODULES[activation], nn.Linear(R, K)).to(dtype)
    x, dy = torch.randn(3, 5, K).to(dtype).requires_grad_(), torch.randn(3, 5, K).to(dtype)
    down, _, up = sequential
    leaves = [x, down.weight, up.weight, down.bias, up.bias]
    expected = x + sequential(x) * 0.75
    got = oracle.eager(
        x, down.weight, up.weight, down_bias=down.bias, up_bias=up.bias, residual=x, activation=activation, scale=0.75
    )
    compare.assert_bitwise_equal("y", got, expected)
    for ours, theirs in zip(*(torch.autograd.grad(y, leaves, dy) for y in (got, expected)), strict=True):
        compare.assert_bitwise_equal("gradient", ours, theirs)


@pytest.mark.parametrize("residual_dtype", [torch.bfloat16, torch.float32])
def test_eager_casts_to_the_adapter_and_back(residual_dtype: torch.dtype) -> None:
    tensors = {name: tensor.float() for name, tensor in _tensors((4,), K).items()}
    x, residual = tensors.pop("x").bfloat16(), torch.randn(4, K).to(residual_dtype)
    got = oracle.eager(x, **tensors, residual=residual, activation="gelu")
    wide, _ = oracle.forward(x.float(), **tensors, residual=residual.float(), activation="gelu")
    assert got.dtype == residual_dtype
    torch.testing.assert_close(got, wide.to(residual_dtype))
    assert oracle.eager(x, **tensors).dtype == torch.bfloat16
