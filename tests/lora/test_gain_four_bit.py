"""``lora_linear`` with a gain, and ``dora_gain``, on 4-bit weights beyond the contract: bits, and decodings."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

import peft_kernels as pk
from peft_kernels._core.triton_tools import why_not_environment
from peft_kernels.four_bit_weight import torch_impl as decoder
from python_ref import compare
from tests.contract import observe
from tests.lora.four_bit_cases import PACKED, decoded, quantized
from tests.lora.gain_four_bit_cases import SMALL, Case, Tensors, make

CPU = torch.device("cpu")
BF16, FP32 = torch.bfloat16, torch.float32
# M < K, where the gain meets dY on the way to dX, and M >= K, where it meets the weight.
FEW, MANY = 28, 60
needs_triton = pytest.mark.skipif(why_not_environment() is not None, reason=str(why_not_environment()))
each_backend = pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])


def _drawn(m: int, dtype: torch.dtype = FP32) -> tuple[Case, Tensors, pk.four_bit.QuantizedWeight]:
    """A problem, its tensors as leaves, and the weight, whose dtype is x's."""
    case = Case(m=m, k=40, dtype=dtype, gain_dtype=FP32, second=2)
    tensors = make(case, CPU)
    leaves = {name: getattr(tensors, name).requires_grad_() for name in ("x", "lora_a", "lora_b", "gain", "bias")}
    weight = quantized(case, case.n, [getattr(tensors, part) for part in PACKED])._replace(dtype=dtype)
    return case, tensors._replace(**leaves), weight


def _call(tensors: Tensors, weight: Any, p: float = 0.3, backend: str | None = "torch") -> Tensor:
    x, a, b, gain, bias = (getattr(tensors, name) for name in ("x", "lora_a", "lora_b", "gain", "bias"))
    return pk.lora_linear(x, weight, a, b, 0.5, bias, gain=gain, dropout_p=p, seed=7, backend=backend)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("m", [FEW, MANY])
@each_backend
def test_bits_are_those_on_a_decoded_weight(m: int, dtype: torch.dtype, backend: str) -> None:
    _, tensors, weight = _drawn(m, dtype)
    results = []
    for given in (weight, decoded(weight, dtype)):
        y = _call(tensors, given, backend=backend)
        wrt = [each for each in tensors if each is not None and each.requires_grad]
        results.append([y, *torch.autograd.grad(y.float().sin().sum(), wrt)])
    for got, expected in zip(*results, strict=True):
        compare.assert_bitwise_equal("result", got, expected)


@pytest.mark.parametrize("needs_x", [True, False])
@pytest.mark.parametrize("m", [FEW, MANY])
def test_a_weight_is_decoded_for_its_product_alone(m: int, needs_x: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """None is there between the passes, and none is made where x has no gradient."""
    _, tensors, weight = _drawn(m)
    tensors = tensors._replace(x=tensors.x.detach().requires_grad_(needs_x))
    made: list[weakref.ref[Tensor]] = []
    forward = decoder.IMPLEMENTATION.forward

    def watched(*arguments: Any) -> Tensor:
        found: Tensor = forward(*arguments)
        made.append(weakref.ref(found))
        return found

    object.__setattr__(decoder.IMPLEMENTATION, "forward", watched)
    try:
        y = _call(tensors, weight)
        assert len(made) == 1 and made[0]() is None
        y.sum().backward()
    finally:
        object.__setattr__(decoder.IMPLEMENTATION, "forward", forward)
    assert len(made) == 1 + needs_x and made[-1]() is None


def test_the_gain_meets_a_decoded_weight_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside it there is no g * W."""
    _, tensors, weight = _drawn(MANY)
    y = _call(tensors, weight, p=0.0)
    sizes: list[int] = []
    empty_like = torch.empty_like

    def watched(tensor: Tensor, **options: Any) -> Tensor:
        sizes.append(tensor.numel())
        return empty_like(tensor, **options)

    monkeypatch.setattr(torch, "empty_like", watched)
    y.sum().backward()
    assert weight.shape[0] * weight.shape[1] not in sizes


def test_nothing_of_the_weight_s_size_is_kept() -> None:
    _, tensors, weight = _drawn(FEW)
    known = [each for each in (*tensors, *weight, *(weight.nested or ())) if isinstance(each, Tensor)]
    with observe.saved(known) as (added, _):
        loss = _call(tensors, weight).sum()
    assert loss.grad_fn is not None
    assert 4 * weight.shape[0] * weight.shape[1] not in added.values() and len(added) > 0


def test_under_autocast_the_weight_is_decoded_to_its_dtype() -> None:
    _, tensors, weight = _drawn(FEW)
    with torch.autocast("cpu", BF16):
        y, expected = (_call(tensors, given, p=0.0) for given in (weight, decoded(weight, FP32)))
    assert y.dtype == BF16
    compare.assert_bitwise_equal("y", y, expected)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_norms_are_those_of_the_decoded_weight(dtype: torch.dtype) -> None:
    """In its own dtype, which says in what it is multiplied."""
    _, tensors, weight = _drawn(FEW, dtype)
    rest = tensors.lora_a, tensors.lora_b, 1.5, tensors.gain
    assert torch.equal(pk.dora_gain(weight, *rest), pk.dora_gain(decoded(weight, dtype), *rest))


def test_a_weight_that_is_no_matrix_has_no_norms() -> None:
    _, tensors, weight = _drawn(FEW)
    with pytest.raises(ValueError, match=r"^dora_gain: weight must be \(N, K\), got a tensor of shape \(960,\)"):
        pk.dora_gain(weight._replace(shape=(960,)), tensors.lora_a, tensors.lora_b, 1.0, tensors.gain)


def test_compiled_dora_decodes_without_a_break() -> None:
    tensors = make(SMALL, CPU)
    weight = quantized(SMALL, SMALL.n, [getattr(tensors, part) for part in PACKED])._replace(dtype=FP32)
    magnitude = tensors.gain.detach().requires_grad_()

    def layer(x: Tensor) -> Tensor:
        gain = pk.dora_gain(weight, tensors.lora_a, tensors.lora_b, 0.5, magnitude)
        return pk.lora_linear(x, weight, tensors.lora_a, tensors.lora_b, 0.5, gain=gain)

    torch._dynamo.reset()
    x = tensors.x.detach().requires_grad_()
    results = []
    for run in (torch.compile(layer, fullgraph=True, backend="aot_eager"), layer):
        y = run(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, magnitude])])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)
