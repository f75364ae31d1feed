"""Every backend on every case: y bit for bit, each gradient against the float64 oracle under the error budget."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_kernels._core.triton_tools import why_not_environment
from peft_kernels.prompt.op import prompt_tuning
from python_ref import compare
from tests.prompt.cases import BACKENDS, DTYPES, GRID, Case, Result, make, run_eager, run_oracle, run_ours

pytestmark = pytest.mark.usefixtures("poison")


def _skip_without(backend: str) -> None:
    if backend == "triton" and (reason := why_not_environment()):
        pytest.skip(reason)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", GRID, ids=str)
def test_error_budget(case: Case, backend: str, device: torch.device) -> None:
    _skip_without(backend)
    draws = []
    for seed in range(max(1, min(8, 200 // (case.n * case.d)))):
        arguments = make(case, device, seed)
        before = [tensor.clone() for tensor in arguments]
        ours = run_ours(case, *arguments, backend)
        for old, new in zip(before, arguments, strict=True):
            compare.assert_bitwise_equal("an input after the call", new, old)
        draws.append((ours, run_eager(case, *arguments), run_oracle(case, *arguments)))
        compare.assert_bitwise_equal("y", draws[-1][0].y, draws[-1][1].y)
    for label in Result._fields:
        ours, eager, exact = (torch.stack([getattr(draw[index], label) for draw in draws]) for index in range(3))
        compare.assert_close(f"{case} {label}", ours, eager, exact)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 4),
    b=st.integers(1, 4),
    p=st.integers(0, 20),
    l=st.integers(0, 20),
    d=st.integers(1, 40),
    dtypes=st.sampled_from(DTYPES),
    strided=st.booleans(),
)
def test_exact_in_every_shape_stride_and_dtype(backend, n, b, p, l, d, dtypes, strided, device):  # noqa: E741
    """Sums of a few small integers leave nothing to round."""
    _skip_without(backend)
    case = Case(n, b, p, l, d, dtypes[0], dtypes[1], strided)
    prompts, tokens, dy = make(case, device)
    dy = dy.mul(4).round()
    got, exact = run_ours(case, prompts, tokens, dy, backend), run_oracle(case, prompts, tokens, dy)
    for label in Result._fields:
        assert torch.equal(getattr(got, label).double(), getattr(exact, label)), f"{case} {label}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_give_the_same_bits(backend: str, device: torch.device) -> None:
    _skip_without(backend)
    case = Case(b=30, dtype=torch.bfloat16)
    arguments = make(case, device)
    first, second = run_ours(case, *arguments, backend), run_ours(case, *arguments, backend)
    for label in Result._fields:
        compare.assert_bitwise_equal(label, getattr(first, label), getattr(second, label))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_large_batch_is_summed_as_well_as_by_torch(backend: str, device: torch.device) -> None:
    """In order and without compensation, float32 sums of so many terms would be several times as wrong."""
    _skip_without(backend)
    case = Case(n=1, b=600, p=1, l=1, d=64)
    arguments = make(case, device)
    results = run_ours(case, *arguments, backend), run_eager(case, *arguments), run_oracle(case, *arguments)
    compare.assert_close("prompts", *(result.prompts for result in results))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needs", ["prompts", "tokens"])
def test_each_gradient_alone(backend: str, needs: str, device: torch.device) -> None:
    _skip_without(backend)
    case = Case()
    prompts, tokens, dy = make(case, device)
    expected = getattr(run_ours(case, prompts, tokens, dy, backend), needs)
    leaves = {"prompts": prompts.requires_grad_(needs == "prompts"), "tokens": tokens.requires_grad_(needs == "tokens")}
    prompt_tuning(**leaves, backend=backend).backward(dy)
    compare.assert_bitwise_equal(needs, leaves[needs].grad, expected)
    assert all(leaf.grad is None for name, leaf in leaves.items() if name != needs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_a_sum(backend: str, device: torch.device) -> None:
    """sum() hands over an expanded gradient, whose strides are all zero."""
    _skip_without(backend)
    case = Case()
    prompts, tokens, _ = make(case, device)
    leaves = prompts.requires_grad_(), tokens.requires_grad_()
    got = torch.autograd.grad(prompt_tuning(*leaves, backend=backend).sum(), leaves)
    assert torch.equal(got[0], torch.full_like(prompts, case.b))
    assert torch.equal(got[1], torch.full_like(tokens, case.n))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_beyond_two_to_the_31_elements(backend: str, device: torch.device) -> None:
    """Offsets are 64-bit: rows of tokens and of dy lie 2^30 elements apart, and nothing between them is touched."""
    _skip_without(backend)
    case = Case(n=1, b=3, dtype=torch.bfloat16)
    prompts, tokens, dy = make(case, device)
    stride = 2**30
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # poison would touch all of it
    try:
        far = torch.empty(2 * stride + 1024, dtype=torch.bfloat16, device=device)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled
    far_tokens = far.as_strided(tokens.shape, (stride, case.d, 1)).copy_(tokens)
    far_dy = far.as_strided(dy.shape, (stride, case.d, 1), 512).copy_(dy)
    near, got = run_ours(case, prompts, tokens, dy, backend), run_ours(case, prompts, far_tokens, far_dy, backend)
    for label in Result._fields:
        compare.assert_bitwise_equal(label, getattr(got, label), getattr(near, label))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [{"b": 0}, {"n": 0}, {"p": 0, "l": 0}, {"d": 0}], ids=str)
def test_empty(backend: str, sizes: dict[str, int], device: torch.device) -> None:
    _skip_without(backend)
    case = replace(Case(), **sizes)
    prompts, tokens, dy = make(case, device)
    got = run_ours(case, prompts, tokens, dy, backend)
    assert got.y.shape == (case.n * case.b, case.p + case.l, case.d)
    assert got.prompts.shape == prompts.shape and got.tokens.shape == tokens.shape
    assert not got.prompts.any() and not got.tokens.any()
