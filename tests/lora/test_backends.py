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
from tests.lora.cases import (
    DTYPES,
    GRID,
    SEED,
    VARIANTS,
    Case,
    check_budget,
    keep_mask,
    make,
    make_exact,
    named,
    output_gradient,
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
@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    k=st.integers(1, 40),
    r=st.integers(1, 40),
    dtypes=st.sampled_from(DTYPES),
    p=st.sampled_from([0.0, 0.5]),
    bias=st.booleans(),
    layout=st.sampled_from(["rows", "columns", "strided", "expanded"]),
    seed=st.integers(0, 100),
)
@example(m=2, n=1, k=1, r=1, dtypes=DTYPES[0], p=0.0, bias=True, layout="rows", seed=0)
@example(m=1, n=1, k=1, r=1, dtypes=DTYPES[3], p=0.5, bias=False, layout="rows", seed=0)
def test_exact_in_every_shape_rank_stride_and_dtype(name, m, n, k, r, dtypes, p, bias, layout, seed, device):
    """Integers leave nothing to round, so nothing may differ from the oracle, whatever the order of the sums."""
    _skip_without(name)
    case = Case(m, n, k, r, dtypes[0], dtypes[1], p, bias, 0.5, layout)
    tensors, dy = make_exact(case, device, seed)
    got, exact = run_ours(case, tensors, dy, name), run_oracle(case, tensors, dy)
    for label, value in named(got).items():
        assert torch.equal(value.double(), getattr(exact, label)), f"{case} {label}"


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "adapter"), [(torch.float32, None), (torch.bfloat16, torch.float32)])
def test_two_runs_give_the_same_bits(
    name: str, p: float, dtype: torch.dtype, adapter: torch.dtype | None, device: torch.device
) -> None:
    _skip_without(name)
    case = Case(m=260, n=136, k=72, r=8, dtype=dtype, adapter_dtype=adapter, p=p)
    tensors, dy = make(case, device), output_gradient(case, device)
    first, second = run_ours(case, tensors, dy, name), run_ours(case, tensors, dy, name)
    for label, bits in named(first).items():
        compare.assert_bitwise_equal(label, bits, named(second)[label])


@pytest.mark.parametrize("name", VARIANTS)
def test_tensor_scale_equals_float_scale(name: str, device: torch.device) -> None:
    _skip_without(name)
    case = Case(p=0.3)
    tensors, dy = make(case, device), output_gradient(case, device)
    by_tensor = dataclasses.replace(case, scale=torch.tensor(case.scale, device=device))
    expected, got = run_ours(case, tensors, dy, name), run_ours(by_tensor, tensors, dy, name)
    exact = run_oracle(case, tensors, dy)
    for label, value in named(got).items():
        compare.assert_close(label, value, getattr(expected, label), getattr(exact, label))


@pytest.mark.parametrize("name", VARIANTS)
def test_dropout_draws_the_published_mask(name: str, device: torch.device) -> None:
    """With x all ones, one rank and identity-like factors, the output is the mask itself."""
    _skip_without(name)
    m, k, p = 48, 24, 0.4
    x, weight = torch.ones(m, k, device=device), torch.zeros(k, k, device=device)
    with variant(name) as backend:
        y = pk.lora_linear(
            x, weight, torch.eye(k, device=device), torch.eye(k, device=device), dropout_p=p, seed=SEED, backend=backend
        )
    mask = keep_mask(Case(m=m, k=k, p=p), device)
    assert torch.equal(y != 0, mask)
    assert torch.equal(y != 0, pk.lora_linear_dropout_mask(SEED, m, k, p, device))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("needs", ["x", "weight", "lora_a", "lora_b", "bias"])
def test_each_gradient_alone(name: str, needs: str, device: torch.device) -> None:
    """A gradient does not depend on which others are asked for, and nothing else gets one."""
    _skip_without(name)
    case = Case(p=0.3, r=40)
    tensors, dy = make(case, device), output_gradient(case, device)
    expected = getattr(run_ours(case, tensors, dy, name), needs)
    leaves = {field: getattr(tensors, field).detach().requires_grad_(field == needs) for field in tensors._fields}
    with variant(name) as backend:
        y = pk.lora_linear(scale=case.scale, dropout_p=case.p, seed=SEED, backend=backend, **leaves)
        y.backward(dy)
    compare.assert_bitwise_equal(needs, leaves[needs].grad, expected)
    assert all(leaf.grad is None for field, leaf in leaves.items() if field != needs)


@pytest.mark.parametrize("name", VARIANTS)
def test_rows_beyond_two_to_the_31_elements(name: str, device: torch.device) -> None:
    """Offsets are 64-bit: rows of x and dY lie 2^30 elements apart, and nothing between them is touched."""
    _skip_without(name)
    case = Case(m=4, n=24, k=16, r=4, dtype=torch.bfloat16)
    tensors, dy = make(case, device), output_gradient(case, device)
    stride = 2**30
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # poison would touch all of it
    try:
        far = torch.empty(3 * stride + 64, dtype=torch.bfloat16, device=device)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled
    far_x, far_dy = far.as_strided((4, 16), (stride, 1)), far.as_strided((4, 24), (stride, 1), 32)
    far_x.copy_(tensors.x)
    far_dy.copy_(dy)
    near = run_ours(case, tensors, dy, name)
    got = run_ours(case, tensors._replace(x=far_x), far_dy, name)
    for label, bits in named(got).items():
        compare.assert_bitwise_equal(label, bits, getattr(near, label))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("shape", [(16,), (2, 3, 16), (2, 1, 3, 16), (0, 16), (3, 0, 16)])
def test_leading_dimensions(name: str, shape: tuple[int, ...], device: torch.device) -> None:
    _skip_without(name)
    case = Case(m=max(1, torch.Size(shape[:-1]).numel()), n=24, k=16, r=4)
    tensors = make(case, device)
    x = torch.randn(shape, device=device, requires_grad=True)
    with variant(name) as backend:
        y = pk.lora_linear(x, *tensors[1:4], case.scale, tensors.bias, backend=backend)
        flat = pk.lora_linear(x.reshape(-1, 16), *tensors[1:4], case.scale, tensors.bias, backend=backend)
        y.sum().backward()
    assert y.shape == (*shape[:-1], 24)
    compare.assert_bitwise_equal("y", y.reshape(-1, 24), flat)
    assert x.grad.shape == x.shape
    assert torch.isfinite(x.grad).all()
