"""Every backend on every case, forward and each gradient, against the float64 oracle under the error budget."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend

import peft_kernels as pk
from peft_kernels._core.triton_tools import why_not_environment
from peft_kernels.prefix import torch_blocks, triton_impl
from peft_kernels.prefix.problem import Inputs, describe
from python_ref import compare
from tests.prefix.cases import (
    DTYPES,
    FUSED_SHAPES,
    GRID,
    OTHER_SHAPES,
    SHAPES,
    VARIANTS,
    WITH_SPLIT,
    Case,
    Result,
    check_budget,
    make,
    make_exact,
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


@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.parametrize("case", GRID, ids=str)
def test_error_budget(case: Case, name: str, device: torch.device) -> None:
    _skip_without(name)
    check_budget(case, device, functools.partial(run_ours, name=name))


@pytest.mark.parametrize("name", ["torch-small", "triton-small", "triton-split"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES, *OTHER_SHAPES], ids=str)
def test_error_budget_over_many_blocks(shape: Case, dtype: torch.dtype, name: str, device: torch.device) -> None:
    _skip_without(name)
    check_budget(replace(shape, dtype=dtype), device, functools.partial(run_ours, name=name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", FUSED_SHAPES, ids=str)
def test_error_budget_of_ranges(shape: Case, dtype: torch.dtype, device: torch.device) -> None:
    with mock.patch.object(torch_blocks, "forward", side_effect=AssertionError("not fused")):
        check_budget(replace(shape, dtype=dtype), device, functools.partial(run_ours, name="torch-ranges"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", FUSED_SHAPES, ids=str)
def test_error_budget_of_fused_passes(shape: Case, dtype: torch.dtype, device: torch.device) -> None:
    """Both passes in one call each, which is a GPU's path in half precision, beside the same kernel and a dense mask.

    Torch's CPU kernel takes delta from the rounded y, and in half precision rounds dk and dv of each head of a group
    before it adds them: beside the math path it would break the budget itself.
    """
    yardstick = functools.partial(run_eager, backend=SDPBackend.FLASH_ATTENTION)
    with mock.patch.object(torch_blocks, "forward", side_effect=AssertionError("not fused")):
        check_budget(replace(shape, dtype=dtype), device, functools.partial(run_ours, name="torch-fused"), yardstick)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_peaked_softmax_is_as_accurate_as_torch_s_flash_kernel(dtype: torch.dtype, device: torch.device) -> None:
    """With scores of standard deviation sqrt(D), dy v - delta cancels, and delta comes from the rounded y.

    Torch's math path keeps float32 there and is more accurate; its fused kernels do as ours does, and are what runs.
    """
    _skip_without("triton")
    case = Case(b=1, h=2, scale=1.0, dtype=dtype)
    tensors, dy = make(case, device), output_gradient(case, device)
    ours, exact = run_ours(case, tensors, dy, "triton"), run_oracle(case, tensors, dy)
    fused = run_eager(case, tensors, dy, SDPBackend.FLASH_ATTENTION)
    for label in Result._fields:
        compare.assert_close(label, *(getattr(result, label) for result in (ours, fused, exact)))


@pytest.mark.parametrize("name", VARIANTS)
@settings(max_examples=12, deadline=None)
@given(
    b=st.integers(1, 2),
    h_kv=st.integers(1, 2),
    group=st.integers(1, 3),
    s=st.integers(1, 24),
    l=st.integers(0, 24),
    p=st.integers(1, 20),
    d=st.sampled_from([32, 40, 64]),
    dtypes=st.sampled_from(DTYPES),
    causal=st.booleans(),
    shared=st.booleans(),
    padding=st.sampled_from(["none", "left", "right", "random"]),
    layout=st.sampled_from(["heads", "tokens", "strided", "columns"]),
    seed=st.integers(0, 100),
)
def test_exact_in_every_shape_mask_stride_and_dtype(
    name, b, h_kv, group, s, l, p, d, dtypes, causal, shared, padding, layout, seed, device  # noqa: E741
):  # fmt: skip
    """Each query attends to one key alone and numbers are small integers: nothing is rounded in y and dv."""
    _skip_without(name)
    sizes = {"b": b, "h": group * h_kv, "h_kv": h_kv, "s": s, "l": l, "p": p, "d": d}
    options = {"causal": causal, "shared": shared, "padding": padding, "layout": layout, "scale": 1.0}
    case = Case(**sizes, **options, dtype=dtypes[0], prefix_dtype=dtypes[1])
    tensors, dy = make_exact(case, device, seed)
    got, exact = run_ours(case, tensors, dy, name), run_oracle(case, tensors, dy)
    for label in Result._fields:
        assert torch.equal(getattr(got, label).double(), getattr(exact, label)), f"{case} {label}"


@pytest.mark.parametrize("name", ["torch-small", "torch-ranges", "torch-fused", "triton-small"])
@settings(max_examples=15, deadline=None)
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
    padding=st.sampled_from(["none", "left", "right", "random"]),
    seed=st.integers(0, 100),
)
def test_close_in_every_shape_and_mask(name, b, h_kv, group, s, l, p, d, causal, shared, padding, seed, device):  # noqa: E741
    """What a wrong border, head or batch row would do is of the size of the values; rounding is far below."""
    _skip_without(name)
    case = Case(b, group * h_kv, h_kv, s, l, p, d, causal=causal, shared=shared, padding=padding)
    tensors, dy = make(case, device, seed), output_gradient(case, device, seed)
    got, exact = run_ours(case, tensors, dy, name), run_oracle(case, tensors, dy)
    for label in Result._fields:
        torch.testing.assert_close(getattr(got, label).double(), getattr(exact, label), rtol=1e-4, atol=1e-5)


@contextmanager
def _deterministic() -> Iterator[None]:
    """Torch's flash kernel on CUDA adds dq up in a fixed order only where torch may not warn instead."""
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=warn_only)


@pytest.mark.parametrize("name", WITH_SPLIT)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_give_the_same_bits(name: str, shared: bool, dtype: torch.dtype, device: torch.device) -> None:
    _skip_without(name)
    case = Case(b=3, h=2, h_kv=1, s=18, l=20, p=20, dtype=dtype, shared=shared, padding="random")
    tensors, dy = make(case, device), output_gradient(case, device)
    with _deterministic():
        first, second = run_ours(case, tensors, dy, name), run_ours(case, tensors, dy, name)
    for label in Result._fields:
        compare.assert_bitwise_equal(label, getattr(first, label), getattr(second, label))


@pytest.mark.parametrize("name", WITH_SPLIT)
@pytest.mark.parametrize("causal", [False, True])
def test_query_without_a_key_gives_zeros(name: str, causal: bool, device: torch.device) -> None:
    """Without a prefix, a padded row attends to nothing, and so do the first queries where there are more than keys."""
    _skip_without(name)
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
    _skip_without(name)
    case = Case(h=2, h_kv=1, s=9, l=12, p=3, d=16, dtype=dtype, padding="right")
    tensors, dy = make(case, device), output_gradient(case, device)
    padded = ~tensors.mask[:, None, :, None]
    results = [
        run_ours(case, tensors._replace(k=torch.where(padded, filler, tensors.k)), dy, name)
        for filler in (0.0, 1e17 * torch.randn(tensors.k.shape, device=device).to(dtype))
    ]
    for label in Result._fields:
        compare.assert_bitwise_equal(label, *(getattr(result, label) for result in results))


@pytest.mark.parametrize("p", [0, 20])
@pytest.mark.parametrize("empty", [(), (0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)], ids=str)
def test_ranges_of_split_keys_without_a_key(empty: tuple[int, ...], p: int, device: torch.device) -> None:
    """48 keys are three ranges of 16, of which a padding mask takes all keys; the prefix belongs to the first."""
    _skip_without("triton-split")
    case = Case(b=2, h=4, h_kv=2, s=3, l=48, p=p)
    tensors, dy = make(case, device), output_gradient(case, device)
    mask = torch.ones(case.b, case.l, dtype=torch.bool, device=device)
    mask[0] = torch.tensor([index // 16 not in empty for index in range(case.l)])
    tensors = tensors._replace(mask=mask)
    split, exact = run_ours(case, tensors, dy, "triton-split"), run_oracle(case, tensors, dy)
    for label in Result._fields:
        torch.testing.assert_close(getattr(split, label).double(), getattr(exact, label), rtol=1e-5, atol=1e-5)
    assert p > 0 or len(empty) < 3 or not split.y[0].any()


def test_split_keys_keep_the_same_statistics(device: torch.device) -> None:
    """The largest score is the same number however keys are split; the backward pass reads both."""
    _skip_without("triton-split")
    case = Case(s=2, l=40, p=5, padding="random")
    tensors = make(case, device)
    problem = describe(*tensors[:5], case.causal, None, tensors.mask)
    stats = {}
    for name in ("triton-small", "triton-split"):
        with variant(name):
            _, stats[name] = triton_impl.forward(problem, Inputs(*tensors))
    compare.assert_bitwise_equal("top", *(stat[0] for stat in stats.values()))
    torch.testing.assert_close(*(stat[1] for stat in stats.values()), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", VARIANTS)
def test_prefix_is_keys_that_all_see(name: str, device: torch.device) -> None:
    """The prefix moved to the front of an unmasked sequence gives the same; so does attention in one piece, P = 0."""
    _skip_without(name)
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
    _skip_without(name)
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


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("needs", ["q", "k", "v", "prefix_k", "prefix_v"])
def test_each_gradient_alone(name: str, needs: str, device: torch.device) -> None:
    """A gradient does not depend on which others are asked for, and nothing else gets one."""
    _skip_without(name)
    case = Case(h=2, h_kv=1, s=17, l=19, padding="random")
    tensors, dy = make(case, device), output_gradient(case, device)
    expected = getattr(run_ours(case, tensors, dy, name), needs)
    leaves = {field: getattr(tensors, field).detach().requires_grad_(field == needs) for field in Result._fields[1:]}
    with variant(name) as backend:
        y = pk.prefix_attention(**leaves, causal=True, key_padding_mask=tensors.mask, backend=backend)
        y.backward(dy)
    compare.assert_bitwise_equal(needs, leaves[needs].grad, expected)
    assert all(leaf.grad is None for field, leaf in leaves.items() if field != needs)


@pytest.mark.parametrize("name", VARIANTS)
def test_gradient_of_a_sum(name: str, device: torch.device) -> None:
    """sum() hands over an expanded gradient, whose strides are all zero."""
    _skip_without(name)
    case = Case(b=1, s=17, l=20)
    tensors = make(case, device)
    leaves = [tensor.requires_grad_() for tensor in tensors[:5]]
    with variant(name) as backend:
        got = torch.autograd.grad(pk.prefix_attention(*leaves, causal=True, backend=backend).sum(), leaves)
    expected = run_ours(case, tensors, torch.ones_like(tensors.q), name)
    for label, gradient in zip(Result._fields[1:], got, strict=True):
        compare.assert_bitwise_equal(label, gradient, getattr(expected, label))


@pytest.mark.parametrize("name", VARIANTS)
def test_tensors_beyond_two_to_the_31_elements(name: str, device: torch.device) -> None:
    """Offsets are 64-bit: batch rows lie 2^30 elements apart, and nothing between them is touched."""
    _skip_without(name)
    case = Case(b=3, h=2, h_kv=1, s=6, l=6, d=16, dtype=torch.bfloat16)
    tensors, dy = make(case, device), output_gradient(case, device)
    stride = 2**30
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # poison would touch all of it
    try:
        far = torch.empty(2 * stride + 4096, dtype=torch.bfloat16, device=device)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled

    def moved(tensor: torch.Tensor, start: int) -> torch.Tensor:
        view = far.as_strided(tensor.shape, (stride, *tensor.stride()[1:]), start)
        return view.copy_(tensor)

    apart = tensors._replace(q=moved(tensors.q, 0), k=moved(tensors.k, 512), v=moved(tensors.v, 1024))
    near, got = run_ours(case, tensors, dy, name), run_ours(case, apart, moved(dy, 2048), name)
    for label in Result._fields:
        compare.assert_bitwise_equal(label, getattr(got, label), getattr(near, label))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(
    "sizes",
    [{"b": 0}, {"s": 0}, {"l": 0, "p": 0}, {"l": 0}, {"b": 0, "p": 0}, {"s": 0, "l": 0}, {"h": 0, "h_kv": 1}],
    ids=str,
)
@pytest.mark.parametrize("shared", [False, True])
def test_empty(name: str, sizes: dict[str, int], shared: bool, device: torch.device) -> None:
    _skip_without(name)
    case = replace(Case(s=6, l=6, d=16, padding="left", shared=shared), **sizes)
    tensors, dy = make(case, device), output_gradient(case, device)
    got, exact = run_ours(case, tensors, dy, name), run_oracle(case, tensors, dy)
    for label in Result._fields:
        value = getattr(got, label)
        assert value.shape == getattr(exact, label).shape
        torch.testing.assert_close(value.double(), getattr(exact, label), rtol=1e-5, atol=1e-5)
