"""The error budget as the package hands it out; its rules are in test_compare.py."""

from __future__ import annotations

import pytest
import torch

from peft_kernels import testing
from python_ref import compare


def test_there_is_one_definition() -> None:
    for name in compare.__all__:
        assert getattr(compare, name) is getattr(testing, name)


def test_budget_is_what_decides() -> None:
    """A result passes exactly as long as it takes no more than all of the budget."""
    oracle = torch.randn(40, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = torch.randn(40, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    eager = (oracle + 1e-3 * noise).float()
    shares = []
    for size in (0.0, 0.5e-3, 1.05e-3):
        report = testing.assert_close("y", (oracle + size * noise).float(), eager, oracle)
        shares.append(report.of_budget)
        assert report.error <= report.allowed and report.maximum <= report.maximum_allowed
        assert report.allowed == pytest.approx(1.1 * report.eager_error, rel=1e-3)
        assert report.maximum_allowed == pytest.approx(2.0 * report.eager_maximum, rel=1e-3)
    assert shares[0] < 1e-3
    assert shares[1:] == pytest.approx([0.5 / 1.1, 1.05 / 1.1], rel=1e-3)
    with pytest.raises(AssertionError, match="exceeds"):
        testing.assert_close("y", (oracle + 1.2e-3 * noise).float(), eager, oracle)


def test_largest_error_has_its_share() -> None:
    oracle = torch.randn(100, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = torch.randn(100, 100, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    eager = (oracle + 1e-3 * noise).float()
    ours = (oracle + 1e-4 * noise).float()
    ours[3, 5] = float(oracle[3, 5]) + 1.9 * float((eager.double() - oracle).abs().max())
    report = testing.assert_close("y", ours, eager, oracle)
    assert report.error / report.allowed < 0.5 < report.of_budget < 1.0
    assert report.of_budget == report.maximum / report.maximum_allowed


def test_exact_results_take_nothing() -> None:
    zeros = torch.zeros(3, 4)
    assert testing.assert_close("y", zeros, zeros, zeros.double()).of_budget == 0.0
    empty = torch.empty(0, 4)
    assert testing.assert_close("y", empty, empty, empty.double()).of_budget == 0.0
