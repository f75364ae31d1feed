"""What the bottleneck adapter's backends owe beside the contract."""

from __future__ import annotations

import pytest
import torch

from python_ref import compare
from tests.adapter.cases import (
    ACTIVATIONS,
    OPERATOR,
    RESIDUALS,
    VARIANTS,
    Case,
    make,
    output_gradient,
    run_oracle,
    run_ours,
)
from tests.contract.operators import assert_close

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_small_pre_activations(activation: str, name: str, device: torch.device) -> None:
    """An activation that is right beside one may have lost its leading bits beside a thousandth."""
    case = Case(m=16, k=24, r=24, residual="none", activation=activation, down_bias=False, up_bias=False)
    tensors, dy = make(case, device), output_gradient(case, device)
    tensors = tensors._replace(x=tensors.x / 1024)
    given = case, tensors, dy
    assert_close(run_ours(*given, name), OPERATOR.run_eager(*given), run_oracle(*given))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("residual", RESIDUALS)
def test_what_is_not_finite_stays_in_its_row(name: str, residual: str, device: torch.device) -> None:
    case = Case(m=37, residual=residual, activation="relu")
    tensors, dy = make(case, device), output_gradient(case, device)
    clean = run_ours(case, tensors, dy, name)
    tensors.x[3, 7], tensors.x[35, 2] = torch.nan, torch.inf
    got, eager = run_ours(case, tensors, dy, name), OPERATOR.run_eager(case, tensors, dy)
    rows = torch.ones(case.m, dtype=torch.bool, device=device)
    rows[[3, 35]] = False
    for label in ("y", "x"):
        compare.assert_bitwise_equal(label, getattr(got, label)[rows], getattr(clean, label)[rows])
    assert got.y[3].isnan().all()
    assert torch.equal(got.y.isfinite(), eager.y.isfinite())
    assert torch.equal(got.x.isfinite(), eager.x.isfinite())


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("residual", ["none", "x", "wide"])
@pytest.mark.parametrize(
    ("adapter", "scale", "sizes"),
    [
        (torch.float32, 0.5, {"down_weight": 1e6, "up_weight": 1e-6}),  # z
        (None, 1e3, {"down_weight": 2e2, "up_weight": 1e-3, "dy": 1e-3}),  # scale h
        (None, torch.tensor(1e3), {"down_weight": 2e2, "up_weight": 1e-3, "dy": 1e-3}),
    ],
)
def test_range_of_float16_is_eager_s(
    adapter: torch.dtype | None, scale: float, sizes: dict[str, float], residual: str, name: str, device: torch.device
) -> None:
    """What eager torch keeps finite stays so, whatever lies between."""
    case = Case(16, 24, 32, 4, torch.float16, adapter, "relu", residual, False, False, scale)
    drawn, dy = make(case, device), output_gradient(case, device) * sizes.get("dy", 1.0)
    tensors = drawn._replace(**{label: getattr(drawn, label) * by for label, by in sizes.items() if label != "dy"})
    given = case, tensors, dy
    assert_close(run_ours(*given, name), OPERATOR.run_eager(*given), run_oracle(*given))
