"""Every backend on every case, forward and each gradient, against the float64 oracle under the error budget."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import peft_kernels as pk
from peft_kernels._core.triton_tools import why_not_environment
from python_ref import compare
from tests.adapter.cases import (
    ACTIVATIONS,
    DTYPES,
    GRID,
    RESIDUALS,
    VARIANTS,
    Case,
    arguments,
    check_budget,
    make,
    make_exact,
    named,
    output_gradient,
    run_eager,
    run_oracle,
    run_ours,
    variant,
)

pytestmark = pytest.mark.usefixtures("poison")


def _skip_without(name: str) -> None:
    if name.startswith("triton") and (reason := why_not_environment()):
        pytest.skip(reason)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("case", GRID, ids=str)
def test_error_budget(case: Case, name: str, device: torch.device) -> None:
    _skip_without(name)
    check_budget(case, device, functools.partial(run_ours, name=name))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_small_pre_activations(activation: str, name: str, device: torch.device) -> None:
    """An activation that is right beside one may have lost its leading bits beside a thousandth."""
    _skip_without(name)
    case = Case(m=16, k=24, r=24, residual="none", activation=activation, down_bias=False, up_bias=False)
    tensors, dy = make(case, device), output_gradient(case, device)
    tensors = tensors._replace(x=tensors.x / 1024)
    ours, eager, exact = run_ours(case, tensors, dy, name), run_eager(case, tensors, dy), run_oracle(case, tensors, dy)
    for label, value in named(ours).items():
        compare.assert_close(label, value, getattr(eager, label), getattr(exact, label))


@pytest.mark.parametrize("name", VARIANTS)
@settings(max_examples=50, deadline=None)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    k=st.integers(1, 40),
    r=st.integers(1, 40),
    dtypes=st.sampled_from(DTYPES),
    activation=st.sampled_from(["relu", "identity"]),
    residual=st.sampled_from(RESIDUALS),
    biases=st.tuples(st.booleans(), st.booleans()),
    layout=st.sampled_from(["rows", "columns", "strided", "expanded"]),
    seed=st.integers(0, 100),
)
@example(
    m=1, n=1, k=1, r=1, dtypes=DTYPES[0], activation="relu", residual="x", biases=(True, True), layout="rows", seed=0
)
@example(
    m=2,
    n=1,
    k=1,
    r=1,
    dtypes=DTYPES[3],
    activation="identity",
    residual="wide",
    biases=(False, False),
    layout="rows",
    seed=0,
)
def test_exact_in_every_shape_stride_and_dtype(
    name, m, n, k, r, dtypes, activation, residual, biases, layout, seed, device
):
    """Integers leave nothing to round, so nothing may differ from the oracle, whatever the order of the sums."""
    _skip_without(name)
    case = Case(m, n, k, r, *dtypes, activation, residual, *biases, 0.5, layout)
    tensors, dy = make_exact(case, device, seed)
    got, exact = run_ours(case, tensors, dy, name), run_oracle(case, tensors, dy)
    for label, value in named(got).items():
        assert torch.equal(value.double(), getattr(exact, label)), f"{case} {label}"


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("m", [5, 260])
@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[3]])
def test_two_runs_give_the_same_bits(
    name: str, m: int, dtypes: tuple[torch.dtype, torch.dtype | None], device: torch.device
) -> None:
    _skip_without(name)
    case = Case(m=m, k=600 if m == 5 else 136, r=8, dtype=dtypes[0], adapter_dtype=dtypes[1], activation="gelu")
    tensors, dy = make(case, device), output_gradient(case, device)
    first, second = run_ours(case, tensors, dy, name), run_ours(case, tensors, dy, name)
    for label, bits in named(first).items():
        compare.assert_bitwise_equal(label, bits, named(second)[label])


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[1]])
def test_tensor_scale_equals_float_scale(
    name: str, residual: str, dtypes: tuple[torch.dtype, torch.dtype | None], device: torch.device
) -> None:
    _skip_without(name)
    case = Case(residual=residual, dtype=dtypes[0], adapter_dtype=dtypes[1], r=20)
    by_tensor = dataclasses.replace(case, scale=torch.tensor(case.scale, device=device))
    tensors, dy = make(case, device), output_gradient(case, device)
    got = run_ours(by_tensor, tensors, dy, name)
    eager, exact = run_eager(case, tensors, dy), run_oracle(case, tensors, dy)
    for label, value in named(got).items():
        compare.assert_close(label, value, getattr(eager, label), getattr(exact, label))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("residual", RESIDUALS)
def test_what_is_not_finite_stays_in_its_row(name: str, residual: str, device: torch.device) -> None:
    _skip_without(name)
    case = Case(m=37, residual=residual, activation="relu")
    tensors, dy = make(case, device), output_gradient(case, device)
    clean = run_ours(case, tensors, dy, name)
    tensors.x[3, 7], tensors.x[35, 2] = torch.nan, torch.inf
    got, eager = run_ours(case, tensors, dy, name), run_eager(case, tensors, dy)
    rows = torch.ones(case.m, dtype=torch.bool, device=device)
    rows[[3, 35]] = False
    for label in ("y", "x"):
        compare.assert_bitwise_equal(label, getattr(got, label)[rows], getattr(clean, label)[rows])
    assert got.y[3].isnan().all()
    assert torch.equal(got.y.isfinite(), eager.y.isfinite())
    assert torch.equal(got.x.isfinite(), eager.x.isfinite())


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("needs", ["x", "down_weight", "up_weight", "down_bias", "up_bias", "residual"])
def test_each_gradient_alone(name: str, needs: str, device: torch.device) -> None:
    """A gradient does not depend on which others are asked for, and nothing else gets one."""
    _skip_without(name)
    case = Case(r=20, residual="tensor", activation="silu")
    tensors, dy = make(case, device), output_gradient(case, device)
    expected = getattr(run_ours(case, tensors, dy, name), needs)
    leaves = tensors._make(
        tensor.detach().requires_grad_(field == needs) for field, tensor in tensors._asdict().items()
    )
    with variant(name) as backend:
        pk.bottleneck_adapter(**arguments(case, leaves), backend=backend).backward(dy)
    compare.assert_bitwise_equal(needs, getattr(leaves, needs).grad, expected)
    assert all(leaf.grad is None for field, leaf in leaves._asdict().items() if field != needs)


@pytest.mark.parametrize("name", VARIANTS)
def test_rows_beyond_two_to_the_31_elements(name: str, device: torch.device) -> None:
    """Offsets are 64-bit: x, residual and dy are rows 2^30 elements apart, of which only these rows are touched."""
    _skip_without(name)
    case = Case(m=4, n=24, k=16, r=4, dtype=torch.bfloat16, residual="tensor")
    tensors, dy = make(case, device), output_gradient(case, device)
    stride = 2**30
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # poison would touch all of it
    try:
        far = torch.empty(3 * stride + 128, dtype=torch.bfloat16, device=device)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled
    far_x, far_dy, far_residual = (
        far.as_strided((4, width), (stride, 1), start) for width, start in ((16, 0), (24, 32), (24, 64))
    )
    far_x.copy_(tensors.x)
    far_dy.copy_(dy)
    far_residual.copy_(tensors.residual)
    near = run_ours(case, tensors, dy, name)
    got = run_ours(case, tensors._replace(x=far_x, residual=far_residual), far_dy, name)
    for label, bits in named(got).items():
        compare.assert_bitwise_equal(label, bits, getattr(near, label))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("residual", ["x", "tensor"])
@pytest.mark.parametrize("shape", [(16,), (2, 3, 16), (2, 1, 3, 16), (0, 16), (3, 0, 16)])
def test_leading_dimensions(name: str, residual: str, shape: tuple[int, ...], device: torch.device) -> None:
    _skip_without(name)
    case = Case(m=max(1, torch.Size(shape[:-1]).numel()), n=24, k=16, r=4, residual=residual)
    tensors = make(case, device)
    x = torch.randn(shape, device=device, requires_grad=True)
    other = torch.randn(*shape[:-1], case.out, device=device, requires_grad=True)
    given = arguments(case, tensors)
    with variant(name) as backend:
        y = pk.bottleneck_adapter(**{**given, "x": x, "residual": x if residual == "x" else other}, backend=backend)
        flat = x.reshape(-1, 16)
        beside = flat if residual == "x" else other.reshape(-1, case.out)
        expected = pk.bottleneck_adapter(**{**given, "x": flat, "residual": beside}, backend=backend)
        y.sum().backward()
    assert y.shape == (*shape[:-1], case.out)
    assert y.is_contiguous()
    compare.assert_bitwise_equal("y", y.reshape(-1, case.out), expected)
    assert x.grad.shape == x.shape
    assert torch.isfinite(x.grad).all()
