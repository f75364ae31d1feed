"""Every variant of every operator on every case: results, their bits, and what is not touched."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.contract.draw import laid_out
from tests.contract.operators import Operator, assert_bitwise_equal, assert_close, assert_exact, label_of, over

pytestmark = pytest.mark.usefixtures("poison")

each_variant = over("variant", lambda operator: itertools.product(operator.variants))
each_variant_with_gradients = over("variant", lambda operator: itertools.product(operator.variants), gradients=True)


@over("case, variant", lambda operator: operator.budget)
def test_error_budget(operator: Operator, case: Any, variant: str, device: torch.device) -> None:
    operator.check_budget(case, device, functools.partial(operator.run_ours, variant=variant))


def _smallest_in_float32(operator: Operator) -> list[tuple[Any]]:
    cases = dict.fromkeys(case for case, _ in operator.budget if case.y_dtype == torch.float32)
    return [(case,) for case in sorted(cases, key=lambda case: math.prod(case.y_shape))[:6]]


@over("case", _smallest_in_float32, gradients=True)
@pytest.mark.parametrize("layout", ["columns", "strided"])
def test_error_budget_of_other_strides(operator: Operator, case: Any, layout: str, device: torch.device) -> None:
    """Of parameters: BLAS has other loops for them, which may add to a result what should be added to each other."""

    def make(case: Any, device: torch.device, seed: int = 0) -> Any:
        tensors = operator.make(case, device, seed)
        given = {
            name: getattr(tensors, name)
            for name in operator.differentiable
            if name not in operator.op.OPERATOR.activations
        }
        return tensors._replace(
            **{name: laid_out(x, layout) for name, x in given.items() if x is not None and x.dim() == 2}
        )

    for variant in {"torch", "auto"}.intersection(operator.variants):
        replace(operator, make=make).check_budget(case, device, functools.partial(operator.run_ours, variant=variant))


@each_variant
def test_exact_in_every_shape_stride_and_dtype(operator: Operator, variant: str, device: torch.device) -> None:
    """Integers leave nothing to round, so nothing may differ from the oracle, whatever the order of the sums."""

    draws = operator.exact_draws

    # Triton's interpreter takes much longer, and each run draws others.
    @settings(max_examples=max(draws // 4, 8) if variant.startswith("triton") else draws, deadline=None)
    @given(case=operator.exact, seed=st.integers(0, 100))
    def check(case: Any, seed: int) -> None:
        tensors, dy = operator.make_exact(case, device, seed)
        got, exact = operator.run_ours(case, tensors, dy, variant), operator.run_oracle(case, tensors, dy)
        assert_exact(got, exact, str(case))

    for case in operator.exact_examples:
        check = example(case=case, seed=0)(check)
    check()


@each_variant_with_gradients
def test_gradient_of_a_sum(operator: Operator, variant: str, device: torch.device) -> None:
    """sum() hands over an expanded gradient, whose strides are all zero."""
    case = operator.exact_examples[0]
    tensors, dy = operator.make_exact(case, device)
    ones = torch.ones((), dtype=dy.dtype, device=device).expand(dy.shape)
    assert_exact(operator.run_ours(case, tensors, ones, variant), operator.run_oracle(case, tensors, ones))


@contextlib.contextmanager
def _as_deterministic_as_asked(operator: Operator) -> Iterator[None]:
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=warn_only and not operator.deterministic)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=warn_only)


@over("case, variant", lambda operator: operator.repeated)
def test_two_runs_give_the_same_bits(operator: Operator, case: Any, variant: str, device: torch.device) -> None:
    tensors, dy = operator.make(case, device), operator.output_gradient(case, device)
    with _as_deterministic_as_asked(operator):
        first, second = (operator.run_ours(case, tensors, dy, variant) for _ in range(2))
    assert_bitwise_equal(first, second)


@over("case", lambda operator: itertools.product(operator.kinds))
def test_default_device_plays_no_part(operator: Operator, case: Any, device: torch.device) -> None:
    """Everything that an operator makes is on its tensors' device."""
    tensors, dy = operator.make(case, device), operator.output_gradient(case, device)
    expected = operator.run_ours(case, tensors, dy, "torch")
    with torch.device("meta"):
        got = operator.run_ours(case, tensors, dy, "torch")
    assert_bitwise_equal(got, expected)


@over(
    "case, variant",
    lambda operator: itertools.product((operator.typical, operator.kinds[0]), operator.variants),
    gradients=True,
)
def test_each_gradient_alone(operator: Operator, case: Any, variant: str, device: torch.device) -> None:
    """A gradient does not depend on which others are asked for, and nothing else gets one."""
    tensors, dy = operator.make(case, device), operator.output_gradient(case, device)
    together = operator.run_ours(case, tensors, dy, variant)
    for name in operator.wanted(tensors):
        alone = replace(operator, differentiable=(name,))
        leaves = alone.leaves(tensors)
        with operator.using(variant) as backend:
            operator.call(case, leaves, backend).backward(dy)
        gradients = {label_of(each): leaf.grad for each, leaf in operator.wanted(leaves).items()}
        got = {label: gradient for label, gradient in gradients.items() if gradient is not None}
        label = label_of(name)
        assert_bitwise_equal(type(together)(**got), type(together)(**{label: getattr(together, label)}))


@over("variant", lambda operator: itertools.product(operator.variants if operator.far else ()))
def test_tensors_beyond_two_to_the_31_elements(operator: Operator, variant: str, device: torch.device) -> None:
    """Offsets are 64-bit: first dimensions have strides of 2^30, and nothing between what they hold is touched."""
    case, names = operator.far
    tensors, dy = operator.make(case, device), operator.output_gradient(case, device)
    stride, rows = 2**30, max(len(tensor) for tensor in (dy, *(getattr(tensors, name) for name in names)))
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # poison would touch all of it
    try:
        far = torch.empty((rows - 1) * stride + 4096, dtype=dy.dtype, device=device)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled
    starts = iter(range(0, 4096, 512))

    def moved(tensor: Tensor) -> Tensor:
        return far.as_strided(tensor.shape, (stride, *tensor.stride()[1:]), next(starts)).copy_(tensor)

    apart = tensors._replace(**{name: moved(getattr(tensors, name)) for name in names})
    near, got = operator.run_ours(case, tensors, dy, variant), operator.run_ours(case, apart, moved(dy), variant)
    assert_bitwise_equal(got, near)


@over("case, variant", lambda operator: itertools.product(operator.empty, operator.variants))
def test_empty(operator: Operator, case: Any, variant: str, device: torch.device) -> None:
    tensors, dy = operator.make(case, device), operator.output_gradient(case, device)
    got, exact = operator.run_ours(case, tensors, dy, variant), operator.run_oracle(case, tensors, dy)
    for label, value in vars(got).items():
        torch.testing.assert_close(value.double(), getattr(exact, label), rtol=1e-5, atol=1e-5)


@over("case, names, variant", lambda operator: ((*row, each) for row in operator.rows for each in operator.variants))
@pytest.mark.parametrize("leading", [(), (2, 3), (2, 1, 3), (0,), (3, 0)], ids=str)
def test_leading_dimensions(
    operator: Operator, case: Any, names: tuple[str, ...], variant: str, leading: tuple[int, ...], device: torch.device
) -> None:
    case = replace(case, m=torch.Size(leading).numel())
    tensors, dy = operator.make(case, device), operator.output_gradient(case, device)

    def shaped(matrix: Tensor) -> Tensor:
        return matrix.view(*leading, matrix.shape[-1])

    several = tensors._replace(**{name: shaped(getattr(tensors, name)) for name in names})
    expected = operator.run_ours(case, tensors, dy, variant)
    got = operator.run_ours(case, several, shaped(dy), variant)
    assert got.y.is_contiguous()
    for label in ("y", *map(label_of, names)):
        setattr(expected, label, shaped(getattr(expected, label)))
    assert_bitwise_equal(got, expected)


@over("case, variant", lambda operator: itertools.product(operator.scaled, operator.variants))
def test_tensor_scale_is_its_value(operator: Operator, case: Any, variant: str, device: torch.device) -> None:
    given = operator.make(case, device), operator.output_gradient(case, device)
    got = operator.run_ours(replace(case, scale=torch.tensor(case.scale, device=device)), *given, variant)
    assert_close(got, operator.run_eager(case, *given), operator.run_oracle(case, *given))


@over("case, variant", lambda operator: itertools.product(operator.scaled[:1], operator.variants))
@pytest.mark.parametrize("scale", [3, True, False], ids=str)
def test_whole_numbers_and_bools_are_scales(
    operator: Operator, case: Any, variant: str, scale: int, device: torch.device
) -> None:
    given = operator.make(case, device), operator.output_gradient(case, device)
    got = operator.run_ours(replace(case, scale=scale), *given, variant)
    assert_bitwise_equal(got, operator.run_ours(replace(case, scale=float(scale)), *given, variant))


@each_variant_with_gradients
def test_a_negative_bit_is_read(operator: Operator, variant: str, device: torch.device) -> None:
    """Of the imaginary part of a conjugate: its memory holds the other sign."""
    case = operator.typical
    tensors, dy = operator.make(case, device), operator.output_gradient(case, device)
    lazy = {name: torch.complex(x, -x).conj().imag for name, x in operator.wanted(tensors).items()}
    assert all(x.is_neg() and torch.equal(x, getattr(tensors, name)) for name, x in lazy.items())
    lazy_dy = torch.complex(dy, -dy).conj().imag
    got = operator.run_ours(case, tensors._replace(**lazy), lazy_dy, variant)
    for label, exact in vars(operator.run_oracle(case, tensors, dy)).items():
        # A wrong sign is of the size of the values; rounding is far below.
        torch.testing.assert_close(getattr(got, label).double(), exact, rtol=1e-4, atol=1e-4)


@over(
    "variant, leading", lambda operator: itertools.product(operator.variants, (False, True)[: 1 + bool(operator.rows)])
)
def test_a_result_may_be_changed_in_place(
    operator: Operator, variant: str, leading: bool, device: torch.device
) -> None:
    """It is no view, shares no memory with an argument, and the gradients are those of the changed value."""
    case, names = operator.rows[0] if leading else (operator.typical, ())
    tensors, dy = operator.make(case, device), operator.output_gradient(case, device)
    tensors = tensors._replace(**{name: getattr(tensors, name)[:, None] for name in names})
    dy = dy[:, None] if leading else dy

    def changed(leaves: Any) -> Tensor:
        with operator.using(variant) as backend:
            y = operator.call(case, leaves, backend)
        assert not y._is_view()
        storages = {each.untyped_storage().data_ptr() for each in leaves if each is not None and each.numel()}
        assert y.untyped_storage().data_ptr() not in storages
        y.mul_(2.0)
        y += 1
        return torch.relu_(y)

    def expected(leaves: Any) -> Tensor:
        with operator.using(variant) as backend:
            return (operator.call(case, leaves, backend) * 2.0 + 1).relu()

    try:
        got = operator.run(changed, tensors, dy)
    except RuntimeError as error:
        # As torch's fused attention, which keeps its result too.
        assert "y" in operator.op.OPERATOR.kept and "modified by an inplace operation" in str(error), error
        return
    assert_bitwise_equal(got, operator.run(expected, tensors, dy))


@each_variant
def test_a_result_without_a_graph_may_join_one(operator: Operator, variant: str, device: torch.device) -> None:
    tensors = operator.make(operator.typical, device)
    with torch.no_grad(), operator.using(variant) as backend:
        y = operator.call(operator.typical, tensors, backend)
    y += torch.ones((), dtype=y.dtype, device=device, requires_grad=True)
    assert y.requires_grad
