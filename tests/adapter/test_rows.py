"""What ``bottleneck_adapter`` with ``rows`` owes beside the contract."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import peft_kernels as pk
from python_ref import adapter as oracle
from python_ref import compare
from tests.adapter.rows_cases import OPERATOR, Case, Tensors, arguments, known_slot, make, slots_of
from tests.contract.operators import CPU

BACKENDS = tuple(dict.fromkeys(variant.partition("-")[0] for variant in OPERATOR.variants))
DOUBLE = Case(m=41, n=11, k=9, ranks=(3, 0, 7, 1, 4), dtype=torch.float64, activation="gelu")
# Of float64 sums of at most 41 terms, in parts of the largest value; a row in a wrong slot differs by about one.
CLOSE = 1e-12


def _assert_near(name: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.isfinite().all(), name
    torch.testing.assert_close(got, expected, rtol=0, atol=CLOSE * max(1.0, float(expected.abs().max())))


class TestReference:
    @pytest.mark.parametrize("residual", ["none", "x", "tensor"])
    @pytest.mark.parametrize("activation", oracle.ACTIVATIONS)
    def test_backward_is_autograd_of_forward(self, activation: str, residual: str) -> None:
        case = replace(DOUBLE, activation=activation, residual=residual)
        tensors, dy = make(case, CPU), OPERATOR.output_gradient(case, CPU)
        exact = OPERATOR.run_oracle(case, tensors, dy)

        def forward(leaves: Tensors) -> torch.Tensor:
            residual_of = leaves.x if residual == "x" else leaves.residual
            return oracle.rows_forward(leaves.x, slots_of(case, leaves), known_slot(case), residual_of, activation)

        for name, value in vars(OPERATOR.run(forward, tensors, dy)).items():
            _assert_near(name, value, getattr(exact, name))

    def test_eager_is_forward(self) -> None:
        tensors = make(DOUBLE, CPU)
        given = tensors.x, slots_of(DOUBLE, tensors), known_slot(DOUBLE), tensors.x, "gelu"
        _assert_near("y", oracle.eager_rows(*given), oracle.rows_forward(*given))


@pytest.mark.parametrize("is_hidden", [False, True])
@pytest.mark.parametrize("residual", ["none", "x", "tensor"])
@pytest.mark.parametrize("order", ["shuffled", "sorted", "base", "alone"])
def test_float64(order: str, residual: str, is_hidden: bool) -> None:
    case = replace(DOUBLE, order=order, residual=residual, is_hidden=is_hidden)
    tensors, dy = make(case, CPU), OPERATOR.output_gradient(case, CPU)
    exact = OPERATOR.run_oracle(case, tensors, dy)
    for name, value in vars(OPERATOR.run_ours(case, tensors, dy, "torch")).items():
        _assert_near(name, value, getattr(exact, name))


@pytest.mark.parametrize("is_hidden", [False, True])
@pytest.mark.parametrize("residual", ["none", "x", "tensor", "wide"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_an_adapter_have_the_residual_s_bits(backend: str, residual: str, is_hidden: bool) -> None:
    """And their gradient of x is dy's, or zero."""
    dtype = torch.bfloat16 if residual == "wide" else torch.float32
    case = Case(ranks=(5, 0, 8), residual=residual, is_hidden=is_hidden, dtype=dtype)
    tensors, dy = make(case, CPU), OPERATOR.output_gradient(case, CPU)
    found = OPERATOR.run_ours(case, tensors, dy, _variant(backend))
    others = torch.tensor(known_slot(case)) < 0
    assert 0 < others.sum() < case.m
    base = tensors.x if residual == "x" else tensors.residual
    expected = torch.zeros(case.m, case.out) if base is None else base
    compare.assert_bitwise_equal("y", found.y[others], expected[others])
    compare.assert_bitwise_equal(
        "x", found.x[others], dy[others] if residual == "x" else torch.zeros_like(found.x[others])
    )


@pytest.mark.parametrize("is_hidden", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_adapters_without_rows_reach_nothing(backend: str, is_hidden: bool) -> None:
    """Not even nan; their gradients are zero."""
    case = Case(m=20, ranks=(5, 3, 4), order="alone", is_hidden=is_hidden, activation="sigmoid")
    tensors, dy = make(case, CPU), OPERATOR.output_gradient(case, CPU)
    clean = OPERATOR.run_ours(case, tensors, dy, _variant(backend))
    for tensor, own in (
        (tensors.down_weight, 5),
        (tensors.up_weight.t(), 5),
        (tensors.down_bias, 5),
        (tensors.up_bias, 1),
    ):
        tensor[own:] = torch.nan
    found = OPERATOR.run_ours(case, tensors, dy, _variant(backend))
    for name, value in vars(found).items():
        compare.assert_bitwise_equal(name, value, getattr(clean, name))
    for value in (found.down_weight[5:], found.up_weight[:, 5:], found.down_bias[5:], found.up_bias[1:]):
        assert (value == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_others_reach_nothing(backend: str) -> None:
    """nan in rows without an adapter stays in them."""
    case = Case(residual="x", activation="silu")
    tensors, dy = make(case, CPU), OPERATOR.output_gradient(case, CPU)
    clean = OPERATOR.run_ours(case, tensors, dy, _variant(backend))
    others = torch.tensor(case.slot) < 0
    tensors.x[others] = torch.nan
    found = OPERATOR.run_ours(case, tensors, dy, _variant(backend))
    compare.assert_bitwise_equal("y", found.y[~others], clean.y[~others])
    for name in ("down_weight", "up_weight", "down_bias", "up_bias", "x"):
        compare.assert_bitwise_equal(name, getattr(found, name), getattr(clean, name))


def test_one_slot_has_the_bits_of_a_call_without_rows() -> None:
    case = Case(ranks=(8,), order="alone", activation="gelu", dtype=torch.bfloat16)
    tensors, dy = make(case, CPU), OPERATOR.output_gradient(case, CPU)
    found = OPERATOR.run_ours(case, tensors, dy, "torch")

    def single(leaves: Tensors) -> torch.Tensor:
        x, down, up, down_bias, up_bias = leaves[:5]
        return pk.bottleneck_adapter(
            x,
            down,
            up,
            down_bias=down_bias,
            up_bias=up_bias[0],
            residual=x,
            activation="gelu",
            scale=0.75,
            backend="torch",
        )

    for name, value in vars(OPERATOR.run(single, tensors, dy)).items():
        compare.assert_bitwise_equal(name, getattr(found, name), value)


def test_one_scale_for_all_slots() -> None:
    case = Case()
    given = {**arguments(case, make(case, CPU)), "scale": 0.5}
    expected = pk.bottleneck_adapter(**{**given, "scale": [0.5] * 3})
    for scale in (torch.tensor(0.5), torch.full((3,), 0.5)):
        compare.assert_bitwise_equal("y", pk.bottleneck_adapter(**{**given, "scale": scale}), expected)
    compare.assert_bitwise_equal("y", pk.bottleneck_adapter(**given), expected)


def test_autocast() -> None:
    """A float32 x that is its own residual is two tensors under it, and y is float32."""
    case = Case()
    given = arguments(case, make(case, CPU))
    with torch.autocast("cpu", torch.bfloat16):
        y = pk.bottleneck_adapter(**given)
    half = {name: value.bfloat16() if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    assert y.dtype == torch.float32
    compare.assert_bitwise_equal("y", y, pk.bottleneck_adapter(**{**half, "residual": given["x"]}))


def test_a_plan_s_rows_may_change_between_calls_of_one_shape() -> None:
    """What is remembered of a call is none of its values."""
    case = Case(order="sorted")
    tensors = make(case, CPU)
    for slot in (case.slot, case.slot[::-1], [0] * case.m, [-1] * case.m):
        given = {**arguments(case, tensors), "rows": pk.Rows.of(slot, known=3)}
        expected = oracle.rows_forward(tensors.x, slots_of(case, tensors), slot, tensors.x)
        torch.testing.assert_close(pk.bottleneck_adapter(**given), expected)


def test_ranks_without_rows_are_refused() -> None:
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"^bottleneck_adapter: ranks are for rows, which are None, got \(3,\)"):
        pk.bottleneck_adapter(x, torch.ones(3, 3), torch.ones(3, 3), ranks=(3,))


def _variant(backend: str) -> str:
    return next(variant for variant in OPERATOR.variants if variant.partition("-")[0] == backend)
