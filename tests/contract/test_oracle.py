"""Every operator's oracle, whose backward pass is derived by hand: against autograd, and against differences."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from tests.contract.operators import CPU, Operator, label_of, over

each_case = over("case", lambda operator: [(case,) for case in operator.gradcheck])


@each_case
def test_oracle_is_eager_s_autograd(operator: Operator, case: Any) -> None:
    """In float64 eager is the equation itself."""
    tensors, dy = operator.make(case, CPU), operator.output_gradient(case, CPU)
    got, expected = operator.run_oracle(case, tensors, dy), operator.run_eager(case, tensors, dy)
    assert vars(got).keys() == vars(expected).keys()
    for label, value in vars(expected).items():
        torch.testing.assert_close(getattr(got, label), value, rtol=1e-12, atol=1e-12, msg=label)


@each_case
def test_gradients_are_the_slopes_of_y(operator: Operator, case: Any) -> None:
    """Central differences; at these points no value is near a kink."""
    tensors, dy = operator.make(case, CPU), operator.output_gradient(case, CPU)
    got, step = operator.run_oracle(case, tensors, dy), 2.0**-14

    def loss(name: str, index: tuple[int, ...], by: float) -> float:
        moved = getattr(tensors, name).clone()
        moved[index] += by
        return float((dy * operator.oracle(case, tensors._replace(**{name: moved}), dy)[0]).sum())

    for name, tensor in operator.wanted(tensors).items():
        for index in itertools.product(*map(range, tensor.shape)):
            slope = (loss(name, index, step) - loss(name, index, -step)) / (2 * step)
            assert slope == pytest.approx(float(getattr(got, label_of(name))[index]), rel=1e-6, abs=1e-6), (name, index)
