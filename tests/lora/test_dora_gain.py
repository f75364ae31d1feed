"""``dora_gain``: norms of W + s B A, what flows through them, and weights that change."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import peft_kernels as pk
from python_ref.lora import row_norms
from tests.contract.draw import Draw

N, K, R = 24, 40, 5
HALF = torch.bfloat16


def _drawn(update: float = 0.1, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W, A, B and magnitudes in float64; the update is about so many times the weight."""
    draw = Draw(seed)
    weight, lora_a = draw.normal(N, K), draw.normal(R, K, std=R**-0.5)
    return weight, lora_a, draw.normal(N, R, std=update), draw.normal(N)


def _error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("update", [0.0, 0.02, 1.0, 20.0])
@pytest.mark.parametrize(
    ("dtype", "adapter"), [(torch.float32, torch.float32), (HALF, torch.float32), (HALF, HALF), (torch.float16,) * 2]
)
def test_norms(dtype: torch.dtype, adapter: torch.dtype, update: float) -> None:
    weight, lora_a, lora_b, magnitude = _drawn(update)
    weight, lora_a, lora_b, magnitude = (
        weight.to(dtype), lora_a.to(adapter), lora_b.to(adapter), magnitude.to(adapter)
    )  # fmt: skip
    gain = pk.dora_gain(weight, lora_a, lora_b, 1.5, magnitude)
    assert gain.dtype == torch.float32 and gain.shape == (N,)
    exact = magnitude.double() / row_norms(weight.double(), lora_a.double(), lora_b.double(), 1.5)
    assert _error(gain, exact) < 1e-6


def test_float64() -> None:
    *factors, magnitude = _drawn()
    gain = pk.dora_gain(*factors, -0.7, magnitude)
    torch.testing.assert_close(gain, magnitude / row_norms(*factors, -0.7), rtol=1e-14, atol=0.0)


@pytest.mark.parametrize("left", [1e-1, 1e-3, 1e-5])
def test_an_update_that_cancels_the_weight(left: float) -> None:
    """As exact as the sum of the two in float32 is: by the parts of a square, nothing would be left of the smallest."""
    _, lora_a, lora_b, magnitude = _drawn(1.0)
    rest = left * Draw(7).normal(N, K)
    weight = (rest - lora_b @ lora_a).float()
    exact = magnitude.float().double() / row_norms(weight.double(), lora_a.float().double(), lora_b.float().double())
    gain = pk.dora_gain(weight, lora_a.float(), lora_b.float(), 1.0, magnitude.float())
    assert _error(gain, exact) < 1e-6 / left


def test_rows_of_zeros_have_a_gain_of_zero() -> None:
    weight, lora_a, lora_b, magnitude = (each.float() for each in _drawn())
    weight[:3], lora_b[:3] = 0.0, 0.0
    magnitude = magnitude.requires_grad_()
    gain = pk.dora_gain(weight, lora_a, lora_b, 1.0, magnitude)
    (gradient,) = torch.autograd.grad(gain.sum(), magnitude)
    assert not gain[:3].any() and not gradient[:3].any()
    assert gain.isfinite().all() and gradient.isfinite().all() and gradient[3:].all()


def test_a_gradient_flows_to_the_magnitudes_alone() -> None:
    tensors = [each.requires_grad_() for each in _drawn()]
    gain = pk.dora_gain(*tensors[:3], 2.0, tensors[3])
    dy = Draw(1).normal(N)
    found = torch.autograd.grad(gain, tensors, dy, allow_unused=True)
    assert found[:3] == (None, None, None)
    assert found[3] is not None
    torch.testing.assert_close(found[3], dy / row_norms(*tensors[:3], 2.0).detach(), rtol=1e-14, atol=0.0)


def _changes() -> dict[str, Any]:
    def data(weight: Tensor) -> Tensor:
        weight.data.mul_(3.0)
        return weight

    def in_place(weight: Tensor) -> Tensor:
        return weight.mul_(3.0)

    def other_memory(weight: Tensor) -> Tensor:
        weight.data = weight.data * 3.0
        return weight

    def same_address(weight: Tensor) -> Tensor:
        address = weight.data_ptr()
        values = copy.deepcopy(weight) * 3.0
        del weight
        for _ in range(64):
            other = torch.empty(N, K)
            if other.data_ptr() == address:
                break
        return other.copy_(values)

    return {each.__name__: each for each in (data, in_place, other_memory, same_address)}


@pytest.mark.parametrize("change", _changes().values(), ids=_changes())
def test_a_weight_that_changed_has_other_norms(change: Any) -> None:
    """However it changed: nothing is remembered of a weight."""
    with torch.inference_mode():
        values, lora_a, lora_b, magnitude = (each.float() for each in _drawn())
        for weight in (values.clone(), torch.nn.Parameter(values.clone(), requires_grad=False)):
            before = pk.dora_gain(weight, lora_a, lora_b, 0.0, magnitude)
            after = pk.dora_gain(change(weight), lora_a, lora_b, 0.0, magnitude)
            torch.testing.assert_close(after, before / 3.0)


def test_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [each.float() for each in _drawn()]
    whole = pk.dora_gain(*given[:3], 1.0, given[3])
    monkeypatch.setattr("peft_kernels.lora.gain.dora.torch_rows_per_block", lambda width, device: 7)
    torch.testing.assert_close(pk.dora_gain(*given[:3], 1.0, given[3]), whole, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("scale", [0.5, torch.tensor(0.5)])
def test_compiled(scale: float | Tensor) -> None:
    *factors, magnitude = (each.float() for each in _drawn())
    magnitude.requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(pk.dora_gain, backend="aot_eager", fullgraph=True)
    got, expected = (run(*factors, scale, magnitude) for run in (compiled, pk.dora_gain))
    torch.testing.assert_close(got, expected)
    ours, theirs = (torch.autograd.grad(gain.square().sum(), magnitude) for gain in (got, expected))
    torch.testing.assert_close(ours, theirs)


def test_autocast_plays_no_part() -> None:
    *factors, magnitude = (each.float() for each in _drawn())
    expected = pk.dora_gain(*factors, 1.0, magnitude)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pk.dora_gain(*factors, 1.0, magnitude), expected)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight": torch.ones(3)}, r"weight must be \(N, K\)"),
        ({"weight": torch.ones(3, 4, dtype=torch.int64)}, "weight must have one of the dtypes"),
        ({"lora_a": torch.ones(2, 5)}, r"lora_a must be \(r, K\) = \(2, 4\), got \(2, 5\)"),
        ({"lora_b": torch.ones(3, 1)}, r"lora_b must be \(N, r\) = \(3, 2\), got \(3, 1\)"),
        ({"lora_b": torch.ones(3, 2, dtype=torch.int64)}, "lora_b must have a floating dtype, got torch.int64"),
        ({"magnitude": torch.ones(3, 1)}, r"magnitude must be \(N,\) = \(3,\), got \(3, 1\)"),
        ({"magnitude": torch.ones(3, device="meta")}, r"magnitude must be on the device of weight \(cpu\)"),
        ({"scale": "1"}, "scale must be a float or a 0-d floating tensor, got str"),
    ],
)
def test_wrong_input_is_named(changed: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "weight": torch.ones(3, 4),
        "lora_a": torch.ones(2, 4),
        "lora_b": torch.ones(3, 2),
        "scale": 1.0,
        "magnitude": torch.ones(3),
    }
    with pytest.raises(ValueError, match=f"^dora_gain: {message}"):
        pk.dora_gain(**given | changed)
