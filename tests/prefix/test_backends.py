"""What the prefix attention's backends owe beside the contract: paths of torch's own, masks, split keys."""

from __future__ import annotations

import functools
from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend

from peft_kernels.prefix import torch_blocks, triton_impl
from peft_kernels.prefix.problem import Inputs, default_scale, make_problem
from python_ref import compare
from tests.contract.operators import assert_bitwise_equal, assert_close
from tests.prefix.cases import (
    FUSED_SHAPES,
    OPERATOR,
    PADDINGS,
    VARIANTS,
    WITH_SPLIT,
    Case,
    eager,
    make,
)

pytestmark = pytest.mark.usefixtures("poison")

run_ours, run_oracle, output_gradient = OPERATOR.run_ours, OPERATOR.run_oracle, OPERATOR.output_gradient

BESIDE_FLASH = replace(OPERATOR, eager=functools.partial(eager, backend=SDPBackend.FLASH_ATTENTION))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", FUSED_SHAPES, ids=str)
def test_error_budget_of_ranges(shape: Case, dtype: torch.dtype, device: torch.device) -> None:
    """Without a prefix and a mask eager torch takes the same kernel itself, whose float32 is not the math path's."""
    operator = BESIDE_FLASH if shape.p == 0 and dtype == torch.float32 else OPERATOR
    with mock.patch.object(torch_blocks, "forward", side_effect=AssertionError("not fused")):
        operator.check_budget(replace(shape, dtype=dtype), device, functools.partial(run_ours, variant="torch-ranges"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", FUSED_SHAPES, ids=str)
def test_error_budget_of_fused_passes(shape: Case, dtype: torch.dtype, device: torch.device) -> None:
    """Both passes in one call each, which is a GPU's path in half precision, beside the same kernel and a dense mask.

    Torch's CPU kernel takes delta from the rounded y, and in half precision rounds dk and dv of each head of a group
    before it adds them: beside the math path it would break the budget itself.
    """
    with mock.patch.object(torch_blocks, "forward", side_effect=AssertionError("not fused")):
        BESIDE_FLASH.check_budget(
            replace(shape, dtype=dtype), device, functools.partial(run_ours, variant="torch-fused")
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_peaked_softmax_is_as_accurate_as_torch_s_flash_kernel(dtype: torch.dtype, device: torch.device) -> None:
    """With scores of standard deviation sqrt(D), dy v - delta cancels, and delta comes from the rounded y.

    Torch's math path keeps float32 there and is more accurate; its fused kernels do as ours does, and are what runs.
    """
    case = Case(b=1, h=2, scale=1.0, dtype=dtype)
    tensors, dy = make(case, device), output_gradient(case, device)
    given = case, tensors, dy
    assert_close(run_ours(*given, "triton"), BESIDE_FLASH.run_eager(*given), run_oracle(*given))


@pytest.mark.parametrize(
    "name", ["torch-small", "torch-ranges", "torch-fused", pytest.param("triton-small", marks=pytest.mark.slow)]
)
@settings(max_examples=6, deadline=None)
@given(
    b=st.integers(1, 2),
    h_kv=st.integers(1, 2),
    group=st.integers(1, 3),
    s=st.integers(1, 33),
    l=st.integers(0, 33),
    p=st.integers(0, 20),
    d=st.integers(1, 40),
    causal=st.booleans(),
    shared=st.booleans(),
    padding=st.sampled_from(PADDINGS),
    seed=st.integers(0, 100),
)
def test_close_in_every_shape_and_mask(name, b, h_kv, group, s, l, p, d, causal, shared, padding, seed, device):  # noqa: E741
    """What a wrong border, head or batch row would do is of the size of the values; rounding is far below."""
    case = Case(b, group * h_kv, h_kv, s, l, p, d, causal=causal, shared=shared, padding=padding)
    tensors, dy = make(case, device, seed), output_gradient(case, device, seed)
    got, exact = run_ours(case, tensors, dy, name), run_oracle(case, tensors, dy)
    for label in vars(got):
        torch.testing.assert_close(getattr(got, label).double(), getattr(exact, label), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", WITH_SPLIT)
@pytest.mark.parametrize("causal", [False, True])
def test_query_without_a_key_gives_zeros(name: str, causal: bool, device: torch.device) -> None:
    """Without a prefix, a padded row attends to nothing, and so do the first queries where there are more than keys."""
    case = Case(h=2, h_kv=1, s=24, l=18, p=0, causal=causal, padding="random")
    tensors, dy = make(case, device), output_gradient(case, device)
    got = run_ours(case, tensors, dy, name)
    nothing = torch.zeros(case.b, case.s, dtype=torch.bool, device=device)
    nothing[0] = True
    if causal:
        first_key = int(tensors.mask[1].nonzero()[0])
        nothing[1, : case.s - case.l + first_key] = True
    assert torch.equal(got.y.abs().sum((1, 3)) == 0, nothing)
    assert not got.q.transpose(1, 2)[nothing].any()
    padded = ~tensors.mask[:, None, :, None]
    for label in ("k", "v"):
        gradient = getattr(got, label)
        assert gradient.isfinite().all()
        assert not gradient.masked_select(padded).any(), label


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padded_keys_may_hold_anything_finite(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Large enough for scores of 1e17, positive and negative, and for probabilities that overflow."""
    case = Case(h=2, h_kv=1, s=9, l=12, p=3, d=16, dtype=dtype, padding="right")
    tensors, dy = make(case, device), output_gradient(case, device)
    padded = ~tensors.mask[:, None, :, None]
    results = [
        run_ours(case, tensors._replace(k=torch.where(padded, filler, tensors.k)), dy, name)
        for filler in (0.0, 1e17 * torch.randn(tensors.k.shape, device=device).to(dtype))
    ]
    assert_bitwise_equal(*results)


@pytest.mark.parametrize("p", [0, pytest.param(20, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("empty", [(), (0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)], ids=str)
def test_ranges_of_split_keys_without_a_key(empty: tuple[int, ...], p: int, device: torch.device) -> None:
    """48 keys are three ranges of 16, of which a padding mask takes all keys; the prefix belongs to the first."""
    case = Case(b=2, h=4, h_kv=2, s=3, l=48, p=p)
    tensors, dy = make(case, device), output_gradient(case, device)
    mask = torch.ones(case.b, case.l, dtype=torch.bool, device=device)
    mask[0] = torch.tensor([index // 16 not in empty for index in range(case.l)])
    tensors = tensors._replace(mask=mask)
    split, exact = run_ours(case, tensors, dy, "triton-split"), run_oracle(case, tensors, dy)
    for label in vars(split):
        torch.testing.assert_close(getattr(split, label).double(), getattr(exact, label), rtol=1e-5, atol=1e-5)
    assert p > 0 or len(empty) < 3 or not split.y[0].any()


def test_split_keys_keep_the_same_statistics(device: torch.device) -> None:
    """The largest score is the same number however keys are split; the backward pass reads both."""
    case = Case(s=2, l=40, p=5, padding="random")
    tensors = make(case, device)
    inputs = Inputs(*tensors[:5], case.causal, default_scale(case.d), tensors.mask)
    problem = make_problem(inputs)
    stats = {}
    for name in ("triton-small", "triton-split"):
        with OPERATOR.using(name):
            _, stats[name] = triton_impl.forward(problem, inputs)
    compare.assert_bitwise_equal("top", *(stat[0] for stat in stats.values()))
    torch.testing.assert_close(*(stat[1] for stat in stats.values()), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", VARIANTS)
def test_prefix_is_keys_that_all_see(name: str, device: torch.device) -> None:
    """The prefix moved to the front of an unmasked sequence gives the same; so does attention in one piece, P = 0."""
    case = Case(h=2, h_kv=1, s=20, l=30, p=7)
    tensors, dy = make(case, device), output_gradient(case, device)
    joined = tensors._replace(
        k=torch.cat((tensors.prefix_k.expand(case.b, -1, -1, -1), tensors.k), 2),
        v=torch.cat((tensors.prefix_v.expand(case.b, -1, -1, -1), tensors.v), 2),
        prefix_k=tensors.prefix_k[:, :0],
        prefix_v=tensors.prefix_v[:, :0],
    )
    apart, together = run_ours(case, tensors, dy, name), run_ours(case, joined, dy, name)
    close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
    close(apart.y, together.y)
    close(apart.q, together.q)
    for label in ("k", "v"):
        both = getattr(together, label)
        close(getattr(apart, label), both[:, :, case.p :])
        close(getattr(apart, f"prefix_{label}"), both[:, :, : case.p].sum(0))


@pytest.mark.parametrize("name", VARIANTS)
def test_shared_prefix_sums_what_own_ones_get(name: str, device: torch.device) -> None:
    shared = Case(b=3, s=10, l=9, p=9)
    tensors, dy = make(shared, device), output_gradient(shared, device)
    own = tensors._replace(
        prefix_k=tensors.prefix_k.expand(3, -1, -1, -1), prefix_v=tensors.prefix_v.expand(3, -1, -1, -1)
    )
    one, three = run_ours(shared, tensors, dy, name), run_ours(shared, own, dy, name)
    compare.assert_bitwise_equal("y", one.y, three.y)
    for label in ("prefix_k", "prefix_v"):
        assert getattr(three, label).shape == (3, 2, 9, 32)
        torch.testing.assert_close(getattr(one, label), getattr(three, label).sum(0), rtol=1e-5, atol=1e-5)
