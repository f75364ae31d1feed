"""The error budget itself: what is right passes, and each rule is seen to fail."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from python_ref import compare

HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)
inf, nan = math.inf, math.nan


def _oracle(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _with_error(oracle: Tensor, relative: float, dtype: torch.dtype, seed: int) -> Tensor:
    """The oracle with noise of a relative norm, rounded."""
    noise = _oracle(*oracle.shape, seed=seed)
    return (oracle + noise * (relative * oracle.norm() / noise.norm())).to(dtype)


def _changed(tensor: Tensor, value: float, *index: int) -> Tensor:
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
def test_as_wrong_as_eager_passes(dtype: torch.dtype) -> None:
    oracle, size = _oracle(40, 30), 4 * torch.finfo(dtype).eps
    ours, eager = (_with_error(oracle, size, dtype, seed) for seed in (1, 2))
    report = compare.assert_close("y", ours, eager, oracle)
    assert report.error == compare.relative_error(ours, oracle) == pytest.approx(size, rel=0.05)
    assert report.eager_error == compare.relative_error(eager, oracle)
    assert report.maximum == float((ours.double() - oracle).abs().max())
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.error = 0.0  # type: ignore[misc]


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
@pytest.mark.parametrize("times", [1.5, 2.0])
def test_worse_than_eager_fails(dtype: torch.dtype, times: float) -> None:
    oracle, size = _oracle(40, 30), 4 * torch.finfo(dtype).eps
    ours, eager = _with_error(oracle, times * size, dtype, 1), _with_error(oracle, size, dtype, 2)
    with pytest.raises(AssertionError, match=r"y: relative error .*e-.* exceeds .*eager torch: .*" + str(dtype)):
        compare.assert_close("y", ours, eager, oracle)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_rounding_is_allowed_beside_an_exact_eager(dtype: torch.dtype) -> None:
    """Next to results that are exact, one in twenty may end on the neighbouring number; not one in four."""
    eager = _oracle(40, 30).to(dtype)
    bits, place = eager.view(torch.int16), torch.arange(eager.numel()).view(eager.shape)
    compare.assert_close("y", (bits + (place % 20 == 0)).view(dtype), eager, eager.double())
    with pytest.raises(AssertionError, match="relative error"):
        compare.assert_close("y", (bits + (place % 4 == 0)).view(dtype), eager, eager.double())


def test_float32_sums_may_end_on_neighbouring_numbers() -> None:
    eager = _oracle(40, 30).float()
    bits = eager.view(torch.int32)
    compare.assert_close("y", (bits + 1).view(torch.float32), eager, eager.double())
    with pytest.raises(AssertionError, match="relative error"):
        compare.assert_close("y", (bits + 2).view(torch.float32), eager, eager.double())


def test_truncation_instead_of_rounding_fails_beside_an_exact_eager() -> None:
    value = _oracle(40, 30).float()
    rounded = value.bfloat16()
    truncated = ((value.view(torch.int32) >> 16) << 16).view(torch.float32).bfloat16()
    with pytest.raises(AssertionError, match="relative error"):
        compare.assert_close("y", truncated, rounded, rounded.double())


def test_one_huge_outlier_fails() -> None:
    """In a large tensor the norm forgives an element that is off by its own size; the largest error does not."""
    oracle = _oracle(1000, 1000)
    eager = _with_error(oracle, 0.01, torch.float32, 1)
    ours = _changed(eager, float(oracle[3, 5]) + 1.0, 3, 5)
    assert compare.relative_error(ours, oracle) < 1.1 * compare.relative_error(eager, oracle)
    with pytest.raises(AssertionError, match=r"y: largest error 1\.000e\+00 exceeds .*eager torch: "):
        compare.assert_close("y", ours, eager, oracle)


@pytest.mark.parametrize("value", [nan, inf, -inf])
def test_special_value_out_of_nothing_fails(value: float) -> None:
    oracle = _oracle(6, 7)
    eager = oracle.float()
    with pytest.raises(AssertionError, match=f"y: 1 elements are inf.*the first is {value}, in eager torch .*oracle"):
        compare.assert_close("y", _changed(eager, value, 2, 3), eager, oracle)


@pytest.mark.parametrize("value", [nan, inf, -inf])
def test_special_value_has_its_place_and_sign(value: float) -> None:
    oracle = _changed(_oracle(6, 7), value, 2, 3)
    right = oracle.float()
    compare.assert_close("y", right, right, oracle)
    moved = _changed(_changed(right, 0.5, 2, 3), value, 2, 4)
    for wrong in (moved, _changed(right, 0.5, 2, 3), _changed(right, inf if value == -inf else -inf, 2, 3)):
        with pytest.raises(AssertionError, match="elements are inf"):
            compare.assert_close("y", wrong, right, oracle)


def test_finite_where_the_oracle_is_not_fails_even_if_eager_agrees() -> None:
    oracle = _changed(_oracle(6, 7), inf, 2, 3)
    finite = _changed(oracle.float(), 1.0, 2, 3)
    with pytest.raises(AssertionError, match="elements are inf"):
        compare.assert_close("y", finite, finite, oracle)


def test_overflow_follows_the_rounded_oracle_or_eager() -> None:
    oracle = _changed(_oracle(6, 7), 65519.0, 2, 3)  # rounds down to float16's largest value, 65504
    kept, lost = oracle.half(), _changed(oracle.half(), inf, 2, 3)
    assert kept[2, 3] == 65504.0
    compare.assert_close("y", kept, lost, oracle)
    compare.assert_close("y", lost, lost, oracle)
    with pytest.raises(AssertionError, match="elements are inf"):
        compare.assert_close("y", lost, kept, oracle)


def test_wrong_value_does_not_hide_behind_eager_s_overflow() -> None:
    oracle = _changed(_oracle(6, 7), 70000.0, 2, 3)
    overflowed = oracle.half()
    assert overflowed[2, 3] == inf
    compare.assert_close("y", overflowed, overflowed, oracle)
    saturated = _changed(overflowed, 65504.0, 2, 3)
    with pytest.raises(AssertionError, match="elements are inf"):
        compare.assert_close("y", saturated, overflowed, oracle)

    in_range = _changed(_oracle(6, 7), 60000.0, 2, 3)
    wrong = _changed(in_range.half(), 1.0, 2, 3)
    with pytest.raises(AssertionError, match="relative error"):
        compare.assert_close("y", wrong, _changed(in_range.half(), inf, 2, 3), in_range)


def test_zero_oracle_leaves_no_room_beside_an_exact_eager() -> None:
    oracle = torch.zeros(4, 5, dtype=torch.float64)
    zeros = oracle.float()
    assert compare.assert_close("da", -zeros, zeros, oracle) == compare.Report(0.0, 0.0, 0.0, 0.0)
    with pytest.raises(AssertionError, match="da: relative error"):
        compare.assert_close("da", _changed(zeros, 1e-30, 1, 1), zeros, oracle)


def test_zero_oracle_by_cancellation_is_held_against_eager() -> None:
    oracle = torch.zeros(4, 5, dtype=torch.float64)
    noise = _oracle(4, 5).float() * 1e-7
    compare.assert_close("da", noise, noise.flip(0), oracle)
    with pytest.raises(AssertionError, match="da: relative error"):
        compare.assert_close("da", 2 * noise, noise, oracle)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0)])
def test_empty_tensors_pass(shape: tuple[int, ...]) -> None:
    empty = torch.empty(shape)
    assert compare.assert_close("y", empty, empty, empty.double()) == compare.Report(0.0, 0.0, 0.0, 0.0)
    assert compare.relative_error(empty, empty.double()) == 0.0
    compare.assert_bitwise_equal("y", empty, empty.clone())


def test_shape_and_dtype_have_to_match() -> None:
    oracle = _oracle(4, 5)
    right = oracle.float()
    for ours, eager, exact, message in (
        (right.t(), right, oracle, r"y: shape is \(5, 4\), must be \(4, 5\)"),
        (right[:1], right, oracle, r"y: shape is \(1, 5\), must be \(4, 5\)"),
        (right, right, oracle[:1], r"y: shape of the oracle is \(1, 5\), must be \(4, 5\)"),
        (right.bfloat16(), right, oracle, r"y: dtype is torch\.bfloat16, must be torch\.float32"),
    ):
        with pytest.raises(AssertionError, match=message):
            compare.assert_close("y", ours, eager, exact)


def test_an_oracle_that_cannot_judge_is_refused() -> None:
    oracle = _oracle(4, 5)
    with pytest.raises(ValueError, match="the oracle must be float64"):
        compare.assert_close("y", oracle.float(), oracle.float(), oracle.float())
    with pytest.raises(ValueError, match="the oracle must be float64"):
        compare.assert_close("y", oracle, oracle, oracle)


def test_relative_error_is_computed_in_float64() -> None:
    oracle = _oracle(50, 50)
    value = oracle.half()
    expected = float((value.double() - oracle).norm() / oracle.norm())
    assert compare.relative_error(value, oracle) == expected
    assert compare.relative_error(value, oracle.requires_grad_()) == expected
    large = torch.full((4,), 6e4, dtype=torch.float16)  # squares overflow float16
    assert compare.relative_error(large, large.double()) == 0.0
    assert compare.relative_error(torch.tensor([3.0, 4.0]), torch.zeros(2).double()) == 5.0


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int8, torch.bool],
)
def test_bitwise_equality_of_any_dtype_and_strides(dtype: torch.dtype) -> None:
    base = (_oracle(6, 8) * 3).to(dtype)
    base[0] = 0
    compare.assert_bitwise_equal("a", base, base.clone())
    compare.assert_bitwise_equal("a", base.t(), base.t().contiguous())
    compare.assert_bitwise_equal("a", base[::2, 1::3], base[::2, 1::3].clone())
    compare.assert_bitwise_equal("a", base[0, 0], base[0, 0].clone())
    other = base.clone()
    other[0, 3] = 1
    with pytest.raises(AssertionError, match=r"a: 1 of 48 elements differ in their bits, first at \(0, 3\): "):
        compare.assert_bitwise_equal("a", other, base)
    with pytest.raises(AssertionError, match=r"a: 1 of 48 .* first at \(3, 0\): "):
        compare.assert_bitwise_equal("a", other.t(), base.t())


@pytest.mark.parametrize("dtype", [torch.float64, *HALF_AND_SINGLE])
def test_bitwise_equality_knows_nan_and_signed_zero(dtype: torch.dtype) -> None:
    special = torch.tensor([nan, inf, -inf, 0.0, -0.0], dtype=dtype)
    compare.assert_bitwise_equal("a", special, special.clone())
    with pytest.raises(AssertionError, match=r"first at \(0,\): 0\.0 and -0\.0"):
        compare.assert_bitwise_equal("a", torch.zeros(1, dtype=dtype), -torch.zeros(1, dtype=dtype))
    with pytest.raises(AssertionError, match="1 of 5"):
        compare.assert_bitwise_equal("a", special, _changed(special, 1.0, 0))
    last_bit = torch.nextafter(torch.ones(1, dtype=torch.float32), torch.full((1,), 2.0))
    with pytest.raises(AssertionError, match="1 of 1"):
        compare.assert_bitwise_equal("a", last_bit, torch.ones(1))


def test_bitwise_equality_demands_shape_and_dtype() -> None:
    ones = torch.ones(2, 3)
    with pytest.raises(AssertionError, match=r"a: shape is \(2, 3\), must be \(3, 2\)"):
        compare.assert_bitwise_equal("a", ones, ones.t())
    with pytest.raises(AssertionError, match=r"a: dtype is torch\.float32, must be torch\.int32"):
        compare.assert_bitwise_equal("a", ones, ones.view(torch.int32))
