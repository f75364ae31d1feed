"""What prompt tuning's backends owe beside the contract."""

from __future__ import annotations

import pytest
import torch

from tests.contract.operators import assert_close
from tests.prompt.cases import BACKENDS, OPERATOR, Case, make


@pytest.mark.thorough
@pytest.mark.usefixtures("poison")
@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_large_batch_is_summed_as_well_as_by_torch(backend: str, device: torch.device) -> None:
    """In order and without compensation, float32 sums of so many terms would be several times as wrong."""
    case = Case(n=1, b=600, p=1, l=1, d=64)
    given = case, make(case, device), OPERATOR.output_gradient(case, device)
    assert_close(OPERATOR.run_ours(*given, backend), OPERATOR.run_eager(*given), OPERATOR.run_oracle(*given))
