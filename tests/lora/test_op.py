"""What the LoRA linear operator owes beside the contract: seeds, autocast, saved memory, dropout probabilities."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import peft_kernels as pk
from peft_kernels.lora.kernels import dropout
from python_ref import compare
from python_ref import lora as oracle
from tests.contract import observe
from tests.contract.operators import CPU
from tests.lora.cases import OPERATOR, Case, Tensors, make


def test_compiled_dropout_draws_its_seed() -> None:
    """Under compile a fresh seed comes from torch's generator: the same after the same manual_seed, else another."""
    torch._dynamo.reset()
    x, w, a, b = torch.randn(64, 16), torch.zeros(8, 16), torch.randn(4, 16), torch.randn(8, 4)
    compiled = torch.compile(lambda x: pk.lora_linear(x, w, a, b, dropout_p=0.5), fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    first, second = compiled(x), compiled(x)
    torch.manual_seed(1)
    assert torch.equal(compiled(x), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_replays_the_mask(use_reentrant: bool) -> None:
    case = Case(m=64, p=0.5)
    tensors = OPERATOR.leaves(make(case, CPU))

    def call(x: Tensor, w: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
        return pk.lora_linear(x, w, a, b, 0.5, bias, dropout_p=0.5)

    torch.manual_seed(3)
    y = call(*tensors)
    expected = torch.autograd.grad(y.square().sum(), tensors)
    torch.manual_seed(3)
    again = checkpoint(call, *tensors, use_reentrant=use_reentrant)
    compare.assert_bitwise_equal("y", again.detach(), y.detach())
    again.square().sum().backward()  # reentrant checkpointing knows no autograd.grad
    for tensor, gradient in zip(tensors, expected, strict=True):
        compare.assert_bitwise_equal("gradient", tensor.grad, gradient)


def test_dropout_is_unbiased_and_fresh() -> None:
    torch.manual_seed(0)
    x, a, b, w = torch.ones(400, 512), torch.ones(1, 512) / 512, torch.ones(1, 1), torch.zeros(1, 512)
    p = 0.3
    y = pk.lora_linear(x, w, a, b, dropout_p=p)
    # Each row is a mean of 512 draws of variance p / (1 - p); five standard errors of the mean over 400 rows.
    error = math.sqrt(p / (1 - p) / (400 * 512))
    assert abs(y.mean().item() - 1.0) < 5 * error
    assert not torch.equal(y, pk.lora_linear(x, w, a, b, dropout_p=p))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_linear_s_dtype(dtype: torch.dtype) -> None:
    x, w, a, b = torch.randn(4, 8, requires_grad=True), torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2)
    a.requires_grad_()
    with torch.autocast("cpu", dtype):
        y = pk.lora_linear(x, w, a, b, 0.5)
        assert y.dtype == torch.nn.functional.linear(x, w).dtype == dtype
        y.float().sum().backward()
    assert x.grad.dtype == a.grad.dtype == torch.float32
    direct = pk.lora_linear(x.detach().to(dtype), w.to(dtype), a.detach(), b, 0.5)
    compare.assert_bitwise_equal("y", y.detach(), direct)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize(
    ("needs", "keeps", "keeps_s"),
    [
        (set(Tensors._fields), {"x", "weight", "lora_a", "lora_b"}, True),
        ({"x"}, {"weight", "lora_a", "lora_b"}, False),
        ({"weight"}, {"x"}, False),
        ({"lora_a"}, {"x", "lora_b"}, False),
        ({"lora_b"}, set(), True),
        ({"bias"}, set(), False),
        (set(), set(), False),
    ],
)
def test_saves_only_what_a_gradient_needs(needs: set[str], keeps: set[str], keeps_s: bool, p: float) -> None:
    """Beside x and parameters S (M, r) and an 8-byte seed: no mask, no cast or dropped x."""
    case = Case(m=256, n=128, k=128, r=4, dtype=torch.bfloat16, adapter_dtype=torch.float32, p=p)
    leaves = replace(OPERATOR, differentiable=tuple(needs)).leaves(make(case, CPU))
    with observe.saved(leaves) as (added, kept):
        y = pk.lora_linear(*leaves[:4], 0.5, leaves.bias, dropout_p=p)
    assert {leaves._fields[index] for index in kept} == keeps
    masked = p > 0 and bool(needs & {"x", "lora_a"})
    assert sum(added.values()) == case.m * case.r * 4 * keeps_s + 8 * masked
    assert (y.grad_fn is None) == (not needs)


@pytest.mark.parametrize("p", [2**-18, 0.1, 0.5, 1 - 2**-17])
def test_dropout_probability_is_quantised(p: float) -> None:
    limit = dropout.threshold(p)
    assert abs(limit / 65536 - p) <= 2**-17 or limit == 65535
    assert dropout.keep_scale(limit) == pytest.approx(1 / (1 - oracle.effective_dropout(p)), rel=0)


def test_mask_refuses_bad_arguments() -> None:
    for arguments in ((0, 2, 3, 1.0), (0, -1, 3, 0.5), ("seed", 2, 3, 0.5), (True, 2, 3, 0.5)):
        with pytest.raises(ValueError):
            pk.lora_linear_dropout_mask(*arguments)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_float16_keeps_eagers_range_under_dropout(backend: str) -> None:
    """dS / (1 - p) leaves float16, and dS does not: the factor belongs to x, as in eager torch."""
    half, m, k = torch.float16, 4, 16
    x, a = (torch.full((m, k), 1e-3, dtype=half), torch.full((1, k), 1e-2, dtype=half))
    weight, b, dy = (
        torch.zeros(1, k, dtype=half),
        torch.full((1, 1), 4.0, dtype=half),
        torch.full((m, 1), 1e4, dtype=half),
    )
    leaves = [tensor.requires_grad_() for tensor in (x, a, b)]
    y = pk.lora_linear(x, weight, a, b, dropout_p=0.5, seed=1, backend=backend)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(y, leaves, dy))


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_one_row_in_float32_rounds_as_eager_does_under_dropout(backend: str) -> None:
    """No sum evens dB out there: S has to be eager's S, whose x was scaled before the product."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        x, a = (torch.randn(*shape, generator=generator) for shape in ((1, 512), (16, 512)))
        weight, b = torch.zeros(8, 512), torch.ones(8, 16, requires_grad=True)
        kept = x * pk.lora_linear_dropout_mask(seed, 1, 512, 0.1) * dropout.keep_scale(dropout.threshold(0.1))
        (got,) = torch.autograd.grad(
            pk.lora_linear(x, weight, a, b, dropout_p=0.1, seed=seed, backend=backend).sum(), b
        )
        assert torch.equal(got, F.linear(kept, a).expand(8, -1))
