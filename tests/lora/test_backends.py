"""What the LoRA linear backends owe beside the contract: the mask of a seed, and float16's range."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import peft_kernels as pk
from peft_kernels.lora.linear import torch_steps
from tests.contract.draw import DTYPES
from tests.contract.operators import assert_close
from tests.lora.cases import OPERATOR, SEED, VARIANTS, WITH_AUTO, Case, Tensors, check_budget, keep_mask, make

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("name", VARIANTS)
def test_dropout_draws_the_published_mask(name: str, device: torch.device) -> None:
    """With x all ones, one rank and identity-like factors, the output is the mask itself."""
    m, k, p = 48, 24, 0.4
    x, weight = torch.ones(m, k, device=device), torch.zeros(k, k, device=device)
    with OPERATOR.using(name) as backend:
        y = pk.lora_linear(
            x, weight, torch.eye(k, device=device), torch.eye(k, device=device), dropout_p=p, seed=SEED, backend=backend
        )
    mask = keep_mask(Case(m=m, k=k, p=p), device)
    assert torch.equal(y != 0, mask)
    assert torch.equal(y != 0, pk.lora_linear_dropout_mask(SEED, m, k, p, device))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(
    ("adapter", "p", "scale", "sizes"),
    [
        (torch.float32, 0.0, 0.5, {"lora_a": 1e6, "lora_b": 1e-6}),  # S
        (torch.float32, 0.3, 0.5, {"lora_a": 1e-6, "lora_b": 1e6}),  # dS
        (None, 0.5, 1.0, {"lora_b": 3.0, "dy": 3e3, "lora_a": 1e-2, "x": 1e-3}),  # dS / (1 - p)
        (None, 0.0, 1e3, {"lora_a": 2e2, "lora_b": 1e-3, "dy": 1e-3}),  # scale S
        (None, 0.0, torch.tensor(1e3), {"lora_a": 2e2, "lora_b": 1e-3, "dy": 1e-3}),
        (None, 0.0, 1e-5, {"lora_a": 1e-2, "lora_b": 1e3, "dy": 1e2}),  # scale S below it
    ],
)
def test_range_of_float16_is_eager_s(
    adapter: torch.dtype | None, p: float, scale: float, sizes: dict[str, float], name: str, device: torch.device
) -> None:
    """What eager torch keeps finite, and above zero, stays so, whatever lies between."""
    case = Case(m=16, n=24, k=32, r=4, dtype=torch.float16, adapter_dtype=adapter, p=p, scale=scale, bias=False)
    drawn, dy = make(case, device), OPERATOR.output_gradient(case, device) * sizes.get("dy", 1.0)
    tensors = drawn._replace(**{label: getattr(drawn, label) * by for label, by in sizes.items() if label != "dy"})
    given = case, tensors, dy
    assert_close(OPERATOR.run_ours(*given, name), OPERATOR.run_eager(*given), OPERATOR.run_oracle(*given))


@pytest.mark.parametrize("name", WITH_AUTO)
@pytest.mark.parametrize(
    ("adapter", "update", "bias"),
    [
        (torch.float32, 1e5, None),  # eager rounds no such update
        (torch.float16, 4e4, 4e4),  # and adds a bias to the base product
    ],
)
def test_what_base_product_and_update_leave_of_each_other_is_finite(
    adapter: torch.dtype, update: float, bias: float | None, name: str, device: torch.device
) -> None:
    half = torch.full((4, 8), 1.0, device=device, dtype=torch.float16)
    tensors = Tensors(
        x=half,
        weight=torch.full((16, 8), -6e4 / 8, device=device, dtype=torch.float16),
        lora_a=torch.full((2, 8), 0.25, device=device, dtype=adapter),
        lora_b=torch.full((16, 2), update / 4, device=device, dtype=adapter),
        bias=None if bias is None else torch.full((16,), bias, device=device, dtype=torch.float16),
    )
    case = Case(m=4, n=16, k=8, r=2, dtype=torch.float16, adapter_dtype=adapter, scale=1.0)
    with OPERATOR.using(name) as backend:
        y = OPERATOR.call(case, tensors, None if backend == "auto" else backend)
    expected = torch.full_like(y, update + (bias or 0.0) - 6e4)
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=0.0)
    torch.testing.assert_close(OPERATOR.eager(case, tensors), expected, rtol=1e-3, atol=0.0)


@pytest.mark.parametrize(
    "case",
    [
        replace(Case(m=70, n=136, k=264, r=12), dtype=dtype, adapter_dtype=adapter, p=p, bias=bias, scale=scale)
        for dtype, adapter in DTYPES
        for p, bias, scale in ((0.0, True, 0.75), (0.0, False, torch.tensor(-1.5)), (0.3, True, torch.tensor(0.5)))
    ],
    ids=str,
)
def test_order_of_a_gpu_keeps_the_budget(case: Case, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the torch backend adds base products last for some dtypes alone; on a GPU for all that keep range."""
    monkeypatch.setattr(torch_steps, "adds_base_last", lambda problem: True)
    check_budget(case, device, lambda *given: OPERATOR.run_ours(*given, "torch"))
