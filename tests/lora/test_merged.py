"""FusedLoRALinear merged: its weight, what changes it, what is saved of it, and wrong use."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from peft_kernels import FusedLoRALinear
from python_ref import compare
from tests.lora.modules import K, N, expected, lora_layer, saved_and_loaded


class TestMerge:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_merged_weight_is_rounded_once(self, dtype: torch.dtype) -> None:
        """W + s B A accumulates in float32 (or float64) and is rounded to the weight's dtype at the end."""
        layer = lora_layer(dtype=dtype).eval()
        weight = layer.weight.clone()
        a, b = layer.lora_A["default"].double(), layer.lora_B["default"].double()
        exact = weight.double() + layer.scaling["default"] * b @ a
        layer.merge()
        x = torch.eye(K, dtype=dtype)
        merged = (layer(x) - layer.bias).t() if dtype == torch.float64 else layer._merged_weight
        # Half an eps of the largest addend for the last rounding, as much again for a float32 sum of five terms.
        slack = 2 * torch.finfo(dtype).eps * exact.abs().max()
        assert (merged.double() - exact).abs().max() <= slack

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_unmerge_restores_every_bit(self, dtype: torch.dtype) -> None:
        layer, x = lora_layer(dtype=dtype), torch.randn(5, K, dtype=dtype)
        weight, before = layer.weight.clone(), layer(x).detach()
        pointer = layer.weight.data_ptr()
        layer.merge()
        assert layer.merged and layer.weight.data_ptr() == pointer
        compare.assert_bitwise_equal("weight while merged", layer.weight, weight)
        layer.unmerge()
        assert not layer.merged
        compare.assert_bitwise_equal("weight", layer.weight, weight)
        compare.assert_bitwise_equal("y", layer(x).detach(), before)

    def test_merged_forward_is_one_product(self) -> None:
        layer, x = lora_layer(lora_dropout=0.5), torch.randn(5, K)
        layer.eval()
        apart = layer(x).detach()
        layer.merge()
        torch.testing.assert_close(layer(x), apart, rtol=1e-5, atol=1e-5)
        layer.train().requires_grad_(False)
        compare.assert_bitwise_equal("no dropout is left", layer(x), layer(x))

    def test_overwriting_keeps_no_copy(self) -> None:
        layer, x = lora_layer().eval(), torch.randn(5, K)
        apart, pointer = layer(x).detach(), layer.weight.data_ptr()
        layer.merge(keep_base=False)
        assert layer.merged and layer.weight.data_ptr() == pointer and layer._merged_weight is None
        torch.testing.assert_close(layer(x), apart, rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match=r"merge\(keep_base=False\) overwrote the base weight"):
            layer.unmerge()

    def test_checkpoint_of_a_merged_layer_is_that_of_the_base(self) -> None:
        layer = lora_layer()
        before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        layer.merge()
        assert list(layer.state_dict()) == list(before)
        for name, tensor in layer.state_dict().items():
            compare.assert_bitwise_equal(name, tensor, before[name])

    @pytest.mark.parametrize(
        ("action", "message"),
        [
            (lambda layer: layer.merge(), "'default' is merged already"),
            (lambda layer: layer.set_adapter("second"), r"call unmerge\(\) before set_adapter\('second'\)"),
            (lambda layer: layer.set_adapter(None), r"call unmerge\(\) before set_adapter\(None\)"),
            (lambda layer: layer.delete_adapter("default"), "is active"),
        ],
    )
    def test_a_merged_layer_refuses(self, action: Callable[[FusedLoRALinear], None], message: str) -> None:
        layer, x = lora_layer().eval(), torch.randn(5, K)
        layer.add_adapter("second")
        layer.merge()
        before = layer(x)
        with pytest.raises(ValueError, match=message):
            action(layer)
        assert layer.merged and layer.active_adapter == "default"
        compare.assert_bitwise_equal("y", layer(x), before)

    def test_nothing_to_merge(self) -> None:
        layer = lora_layer()
        layer.set_adapter(None)
        with pytest.raises(ValueError, match="no active adapter to merge"):
            layer.merge()


def _changed(change: str, layer: FusedLoRALinear) -> None:
    """One way of changing what a merged weight was made from."""
    other = lora_layer(1)
    if change == "load":
        layer.load_state_dict(other.state_dict())
    elif change == "assign":
        layer.load_state_dict(other.state_dict(), assign=True)
    elif change == "optimizer":
        parameters = [layer.lora_A["default"], layer.lora_B["default"]]
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        torch.optim.AdamW(parameters, lr=0.1).step()
    elif change == "scaling":
        layer.scaling["default"] *= 2
    elif change == "parameter":
        layer.lora_B["default"] = other.lora_B["default"]
    else:
        with torch.no_grad():
            layer.get_parameter(change).add_(1)


_CHANGES = ("load", "assign", "optimizer", "scaling", "parameter", "weight", "lora_A.default", "lora_B.default")


@pytest.mark.parametrize("duplicate", [lambda layer: layer, copy.deepcopy, saved_and_loaded])
@pytest.mark.parametrize("change", _CHANGES)
def test_merged_weight_follows_every_change(change: str, duplicate: Callable[[nn.Module], nn.Module]) -> None:
    # A copy's counters of changes begin at zero, so that those of a copy of it are no other.
    layer, x = copy.deepcopy(lora_layer()).eval(), torch.randn(5, K)
    layer.merge()
    before = layer(x)
    _changed(change, layer)
    layer = duplicate(layer)
    torch.testing.assert_close(layer(x).double(), expected(layer, x), rtol=1e-5, atol=1e-5)
    assert layer.merged and not torch.equal(layer(x), before)
    pointer = layer._merged_weight.data_ptr()
    layer(x)
    assert layer._merged_weight.data_ptr() == pointer, "merged anew without a change"


def test_compiled_merged_layer_follows_a_loaded_state() -> None:
    torch._dynamo.reset()
    layer, x = lora_layer().eval(), torch.randn(5, K)
    layer.merge()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    compiled(x)
    layer.load_state_dict(lora_layer(1).state_dict())
    torch.testing.assert_close(compiled(x).double(), expected(layer, x), rtol=1e-5, atol=1e-5)


def test_merged_in_inference_mode_serves_outside_of_it() -> None:
    layer, x = lora_layer().eval(), torch.randn(5, K, requires_grad=True)
    with torch.inference_mode():
        layer.merge()
    layer(x).sum().backward()
    assert x.grad is not None


class TestOverwritten:
    def _overwritten(self) -> FusedLoRALinear:
        layer = lora_layer().eval()
        layer.merge(keep_base=False)
        return layer

    def test_its_state_is_what_it_computes(self) -> None:
        layer, x = nn.Sequential(self._overwritten()), torch.randn(5, K)
        fresh = nn.Sequential(FusedLoRALinear(K, N, r=4))
        fresh.load_state_dict(layer.state_dict())
        assert torch.equal(fresh(x), layer(x))
        assert torch.count_nonzero(layer[0].lora_B["default"]), "the adapter itself is kept"

    @pytest.mark.parametrize("assign", [False, True])
    def test_a_whole_state_undoes_it(self, assign: bool) -> None:
        layer, other, x = nn.Sequential(self._overwritten()), nn.Sequential(lora_layer(1)), torch.randn(5, K)
        layer.load_state_dict(other.state_dict(), assign=assign)
        assert not layer[0].merged
        assert torch.equal(layer(x), other(x))

    @pytest.mark.parametrize("part", ["weight", "lora_"])
    def test_part_of_a_state_is_refused(self, part: str) -> None:
        layer, x = self._overwritten(), torch.randn(5, K)
        before, state = layer(x), {name: value for name, value in lora_layer(1).state_dict().items() if part in name}
        with pytest.raises(
            ValueError, match=r"overwrote the base weight; a state dict for this layer must have .*weight"
        ):
            layer.load_state_dict(state, strict=False)
        assert torch.equal(layer(x), before) and layer.merged

    def test_a_computed_weight_is_not_overwritten(self) -> None:
        layer, x = lora_layer().eval(), torch.randn(5, K)
        nn.utils.parametrizations.weight_norm(layer)
        before = layer(x)
        with pytest.raises(ValueError, match="weight is computed, so that it cannot be overwritten"):
            layer.merge(keep_base=False)
        assert torch.equal(layer(x), before) and not layer.merged
        layer.merge()
        with torch.no_grad():
            layer.parametrizations.weight.original0.mul_(2)
        torch.testing.assert_close(layer(x).double(), expected(layer, x), rtol=1e-5, atol=1e-5)

    def test_autograd_sees_the_overwriting(self) -> None:
        layer, x = lora_layer(), torch.randn(5, K, requires_grad=True)
        y = layer(x)
        layer.merge(keep_base=False)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("keep_base", [False, True])
def test_training_a_merged_layer_warns(keep_base: bool, recwarn: pytest.WarningsRecorder) -> None:
    layer, x = lora_layer(), torch.randn(5, K)
    layer.merge(keep_base)
    with torch.no_grad():
        layer(x)
    layer.eval()(x)
    layer.train()
    layer.lora_A.requires_grad_(False)
    layer(x)
    assert not recwarn.list
    layer.lora_A.requires_grad_()
    with pytest.warns(
        UserWarning, match=r"'default' is merged and gets no gradient; call unmerge\(\) to train it"
    ) as said:
        layer(x)
    assert said[0].filename == __file__
