"""The only definition of "close": an error budget measured in the error of eager torch in the same dtypes.

No tolerance is chosen by hand per test. A result may be as wrong as eager torch is on the same rounded inputs, and a
little more; both are measured against a float64 oracle. A tolerance by dtype would be too wide for a sum of ten terms
and too narrow for one of ten thousand; eager torch's error grows with the problem as a right kernel's does.

``assert_close`` and ``assert_bitwise_equal`` are for tests of your own layers too. What this package's kernels have to
keep, on a machine that checks them (``python -m peft_kernels.qualify``) and in this package's tests, is the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# A kernel that sums in another order than eager torch is right if it is not systematically worse. Reversing every sum
# of eager torch itself changed its error by a factor of 1.00 in the median and 1.15 in the 95th percentile over 291
# results of the tests' small shapes (CPU). What lay beyond a tenth, up to 1.9, was mostly float32 results of few terms
# or few elements: comparing those says something only over several draws, which the caller stacks into one tensor.
RELATIVE_TO_EAGER = 1.1

# Where eager happens to be exact (one term, a power of two) no other order may be asked to match it. Rounding once to
# the output dtype costs 0.19 to 0.21 eps in the norm (uniform and normal values, float32 and both half precisions), so
# a quarter admits one rounding beside an exact eager result and not truncation, which costs 0.38 to 0.42.
# A float32 result has no rounding at its end that tells it from its sums, and two orders of one sum differ by more:
# sums of 40 products taken one after another lay 0.4 eps above those of eager's vector units. One eps admits that and
# no mistake: TF32, the least that a kernel can do wrong to float32, costs more than a thousand.
FLOOR_IN_EPS = {torch.float32: 1.0, torch.bfloat16: 0.25, torch.float16: 0.25}

# The largest of many errors scatters more than their norm; a wrong tile, row or edge is off by the size of the values.
MAXIMUM_RELATIVE_TO_EAGER = 2.0

# Between one and two units in the last place of the largest value. Half of one is the last rounding; the rest is for
# roundings of addends before it, where eager's largest error happens to be small.
MAXIMUM_FLOOR_IN_EPS = 1.0


@dataclass(frozen=True)
class Report:
    """Errors of one tensor, and of eager torch beside it.

    Attributes:
        error, eager_error: as ``relative_error``.
        maximum, eager_maximum: largest absolute error.
        allowed, maximum_allowed: what ``error`` and ``maximum`` may be.
    """

    error: float
    eager_error: float
    maximum: float
    eager_maximum: float
    allowed: float = 0.0
    maximum_allowed: float = 0.0

    @property
    def of_budget(self) -> float:
        """How much of the budget the larger of both errors takes: 1.0 is all of it, 0.0 is an exact result."""
        pairs = (self.error, self.allowed), (self.maximum, self.maximum_allowed)
        return max(error / allowed if allowed > 0.0 else error for error, allowed in pairs)


def relative_error(value: Tensor, oracle: Tensor) -> float:
    """||value - oracle|| / ||oracle|| in float64; 0 for empty tensors, the norm of value where the oracle is zero.

    Args:
        value, oracle (...): of one shape, any dtypes and strides.

    Example:
        >>> relative_error(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0], dtype=torch.float64))
        0.2
    """
    oracle = oracle.detach().double()
    difference = torch.linalg.vector_norm(value.detach().double() - oracle).item()
    norm = torch.linalg.vector_norm(oracle).item()
    return difference / norm if norm > 0 else difference


def assert_close(name: str, ours: Tensor, eager: Tensor, oracle: Tensor) -> Report:
    """Hold a result against the budget.

    An oracle of zeros alone leaves no room for rounding: sums of zeros are exact in every order, so the floors, which
    are fractions of the oracle's size, vanish with it, and ours has to be zero wherever eager is.

    Args:
        name: for the message.
        ours (...): the result under test, in less than float64, which would be no worse than the oracle.
        eager (...): eager torch's result from the same inputs in the same dtypes; ours must have its shape and dtype.
        oracle (...): the float64 result from the same inputs.

    Returns:
        Errors over the elements that are finite in the results.

    Raises:
        AssertionError: shape, dtype, the positions of inf or nan, the error or the largest error is off.
        ValueError: the oracle is not float64, or the results are.

    Example:
        >>> x, w = torch.randn(64, 32).bfloat16(), torch.randn(16, 32).bfloat16()
        >>> eager, oracle = torch.nn.functional.linear(x, w), torch.nn.functional.linear(x.double(), w.double())
        >>> assert_close("y", eager.clone(), eager, oracle).of_budget < 1.0
        True
    """
    if oracle.dtype != torch.float64 or ours.dtype == torch.float64:
        raise ValueError(f"{name}: the oracle must be float64 and the result less, got {oracle.dtype}, {ours.dtype}")
    _same(name, "shape", tuple(ours.shape), tuple(eager.shape))
    _same(name, "shape of the oracle", tuple(oracle.shape), tuple(eager.shape))
    _same(name, "dtype", ours.dtype, eager.dtype)
    oracle = oracle.detach()
    ours, eager = ours.detach().to(oracle.device), eager.detach().to(oracle.device)
    _check_special_values(name, ours, eager, oracle)

    finite = ours.isfinite() & oracle.isfinite()
    both = finite & eager.isfinite()
    error, eager_error = relative_error(ours[finite], oracle[finite]), relative_error(eager[both], oracle[both])
    maximum, eager_maximum = (
        _largest(ours[finite].double() - oracle[finite]),
        _largest(eager[both].double() - oracle[both]),
    )
    eps, largest = torch.finfo(ours.dtype).eps, _largest(oracle[finite])
    floor = FLOOR_IN_EPS[ours.dtype] * eps if largest > 0 else 0.0
    allowed = RELATIVE_TO_EAGER * eager_error + floor
    maximum_allowed = MAXIMUM_RELATIVE_TO_EAGER * eager_maximum + MAXIMUM_FLOOR_IN_EPS * eps * largest
    report = Report(error, eager_error, maximum, eager_maximum, allowed, maximum_allowed)
    if not error <= allowed:
        raise AssertionError(
            f"{name}: relative error {error:.3e} exceeds {allowed:.3e} (eager torch: {eager_error:.3e}, {ours.dtype})"
        )
    if not maximum <= maximum_allowed:
        raise AssertionError(
            f"{name}: largest error {maximum:.3e} exceeds {maximum_allowed:.3e} "
            f"(eager torch: {eager_maximum:.3e}, largest value {largest:.3e}, {ours.dtype})"
        )
    return report


def assert_bitwise_equal(name: str, a: Tensor, b: Tensor) -> None:
    """Compare bits: a nan equals itself, 0.0 differs from -0.0. Any dtype, any strides, any devices.

    Args:
        name: for the message.
        a, b (...): the results of two runs.

    Raises:
        AssertionError: shape, dtype or any bit differs.

    Example:
        >>> assert_bitwise_equal("y", torch.tensor([float("nan"), 1.0]), torch.tensor([float("nan"), 1.0]))
    """
    _same(name, "shape", tuple(a.shape), tuple(b.shape))
    _same(name, "dtype", a.dtype, b.dtype)
    a, b = a.detach().cpu(), b.detach().cpu()
    differs = (_bytes(a) != _bytes(b)).any(dim=-1)
    if differs.any():
        first = int(differs.nonzero()[0])
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(first, device="cpu"), a.shape))
        raise AssertionError(
            f"{name}: {int(differs.sum())} of {differs.numel()} elements differ in their bits, "
            f"first at {index}: {a[index].item()!r} and {b[index].item()!r}"
        )


def _check_special_values(name: str, ours: Tensor, eager: Tensor, oracle: Tensor) -> None:
    """Demand inf, -inf and nan where the oracle rounded to the output dtype has them, or where eager torch does.

    Either will do. Next to the largest finite value the last rounding decides, and eager may fall on the other side
    than the exact result; and an intermediate of eager may overflow that a float32 accumulator holds, which is no
    reason to demand the overflow. Nothing slips through: where the oracle is finite before it is rounded, finite
    results are held against that value, and where it is not, a finite result is wrong whatever eager says.
    """
    rounded, kind = _kind(oracle.to(ours.dtype)), _kind(ours)
    wrong = (kind != rounded) & (kind != _kind(eager)) | (kind == 0) & ~oracle.isfinite()
    if wrong.any():
        first = int(wrong.flatten().nonzero()[0])
        values = (float(tensor.flatten()[first]) for tensor in (ours, eager, oracle))
        raise AssertionError(
            f"{name}: {int(wrong.sum())} elements are inf, -inf, nan or finite where they must not be; "
            "the first is {}, in eager torch {}, in the oracle {}".format(*values)
        )


def _kind(tensor: Tensor) -> Tensor:
    """0 finite, 1 inf, 2 -inf, 3 nan."""
    return tensor.isposinf().to(torch.uint8) + 2 * tensor.isneginf() + 3 * tensor.isnan()


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _bytes(tensor: Tensor) -> Tensor:
    """(elements, bytes of each)."""
    return tensor.contiguous().view(-1, 1).view(torch.uint8) if tensor.numel() else torch.empty(0, 1, device="cpu")


def _same(name: str, what: str, got: object, expected: object) -> None:
    if got != expected:
        raise AssertionError(f"{name}: {what} is {got}, must be {expected}")
