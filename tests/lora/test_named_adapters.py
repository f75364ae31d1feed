"""What FusedLoRALinear does with its adapters beside switching: scaling, disabling, the update alone, names."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from peft_kernels import FusedLoRALinear
from python_ref import compare
from tests.lora.modules import K, N, expected, lora_layer


@pytest.mark.parametrize(
    "make", [FusedLoRALinear, lambda *sizes, **given: FusedLoRALinear.from_linear(nn.Linear(*sizes), **given)]
)
def test_the_first_adapter_has_the_name_that_is_given(make: Callable[..., FusedLoRALinear]) -> None:
    layer = make(K, N, r=2, adapter_name="task")
    assert layer.active_adapter == "task" and layer.active_adapters == ["task"]
    assert set(layer.lora_A) == set(layer.lora_B) == set(layer.scaling) == {"task"}
    with pytest.raises(ValueError, match=r"without dots, got 'a\.b'"):
        make(K, N, adapter_name="a.b")
    layer.set_adapter(None)
    assert layer.active_adapters == []


class TestScale:
    @pytest.mark.parametrize("merged", [False, True])
    def test_is_relative_to_what_the_adapter_was_added_with(self, merged: bool) -> None:
        layer, x = lora_layer().eval(), torch.randn(5, K)
        layer.add_adapter("second", r=2, lora_alpha=3)
        if merged:
            layer.merge()
        for scale in (0.5, 0.0, -2, 1):
            layer.set_scale("default", scale)
            assert layer.scaling == {"default": scale * 16 / 4, "second": 3 / 2}
            torch.testing.assert_close(layer(x).double(), expected(layer, x), rtol=1e-5, atol=1e-5)

    def test_survives_copies(self) -> None:
        layer = lora_layer()
        layer.set_scale("default", 0.5)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            other.set_scale("default", 2)
            assert other.scaling == {"default": 8.0} and layer.scaling == {"default": 2.0}

    def test_is_peft_s(self) -> None:
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["q"])
        theirs = peft.inject_adapter_in_model(config, nn.ModuleDict({"q": nn.Linear(K, N)}))["q"]
        ours = FusedLoRALinear(K, N, r=4, lora_alpha=12)
        for layer in (theirs, ours):
            layer.set_scale("default", 0.25)
            layer.set_scale("default", 0.5)
        assert ours.scaling == theirs.scaling


class TestDisabled:
    @pytest.mark.parametrize("merged", [False, True])
    @pytest.mark.parametrize("train", [False, True])
    def test_computes_the_base(self, merged: bool, train: bool) -> None:
        layer, x = lora_layer(lora_dropout=0.5).train(train), torch.randn(5, K)
        if merged:
            layer.merge()
        layer.disable_adapters()
        assert not layer.enabled and layer.active_adapter == "default" and layer.merged == merged
        assert "merged=" in repr(layer) and ", disabled" in repr(layer)
        compare.assert_bitwise_equal("y", layer(x), F.linear(x, layer.weight, layer.bias))
        layer.enable_adapters()
        layer.eval()
        torch.testing.assert_close(layer(x).double(), expected(layer, x), rtol=1e-5, atol=1e-5)

    def test_a_block_enables_what_it_has_disabled(self) -> None:
        layer = lora_layer()
        with layer.disable_adapters():
            assert not layer.enabled
            with layer.disable_adapters():
                assert not layer.enabled
            assert not layer.enabled, "the inner block has disabled nothing"
        assert layer.enabled
        with pytest.raises(ZeroDivisionError), layer.disable_adapters():
            raise ZeroDivisionError
        assert layer.enabled

    def test_merging_and_switching_meanwhile(self) -> None:
        layer, x = lora_layer().eval(), torch.randn(5, K)
        layer.add_adapter("second", r=2)
        nn.init.normal_(layer.lora_B["second"])
        with layer.disable_adapters():
            base = layer(x)
            layer.set_adapter("second")
            compare.assert_bitwise_equal("switched", layer(x), base)
            layer.merge()
            compare.assert_bitwise_equal("merged", layer(x), base)
        assert layer.merged
        torch.testing.assert_close(layer(x).double(), expected(layer, x), rtol=1e-5, atol=1e-5)
        layer.disable_adapters()
        layer.unmerge()
        compare.assert_bitwise_equal("unmerged", layer(x), base)

    def test_survives_copies(self) -> None:
        layer, x = lora_layer(), torch.randn(5, K)
        layer.disable_adapters()
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            compare.assert_bitwise_equal("y", other(x), F.linear(x, layer.weight, layer.bias))

    def test_a_compiled_layer_is_traced_again(self) -> None:
        torch._dynamo.reset()
        layer, x = lora_layer().eval(), torch.randn(5, K)
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        for _ in range(2):
            torch.testing.assert_close(compiled(x).double(), expected(layer, x), rtol=1e-5, atol=1e-5)
            with layer.disable_adapters():
                compare.assert_bitwise_equal("y", compiled(x), F.linear(x, layer.weight, layer.bias))


class TestDeltaWeight:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_is_what_a_merge_adds(self, dtype: torch.dtype) -> None:
        layer = lora_layer(dtype=dtype, adapter_dtype=dtype)
        layer.add_adapter("second", r=2, lora_alpha=3)
        nn.init.normal_(layer.lora_B["second"])
        layer.set_adapter("second")
        delta, weight = layer.get_delta_weight("second"), layer.weight.clone()
        assert delta.shape == (N, K) and delta.dtype == torch.promote_types(dtype, torch.float32)
        layer.merge(keep_base=False)
        total = weight.to(delta.dtype) + delta
        # Half an eps of the largest value for each rounding: to the weight's dtype, of the update, of both sums.
        slack = 2 * torch.finfo(dtype).eps * total.abs().max()
        assert (layer.weight.to(delta.dtype) - total).abs().max() <= slack

    def test_has_gradients(self) -> None:
        layer = lora_layer()
        layer.get_delta_weight("default").square().sum().backward()
        assert layer.lora_A["default"].grad is not None and layer.lora_B["default"].grad is not None


@pytest.mark.parametrize(
    ("action", "error", "message"),
    [
        (
            lambda layer: layer.set_scale("x", 1),
            KeyError,
            r"FusedLoRALinear: there is no adapter 'x'; there are \['default'\]",
        ),
        (lambda layer: layer.set_scale("default", "1"), ValueError, "scale must be a finite number, got '1'"),
        (lambda layer: layer.set_scale("default", float("nan")), ValueError, "scale must be a finite number, got nan"),
        (lambda layer: layer.get_delta_weight("x"), KeyError, "no adapter 'x'"),
    ],
)
def test_wrong_use_changes_nothing(
    action: Callable[[FusedLoRALinear], object], error: type[Exception], message: str
) -> None:
    layer = lora_layer()
    with pytest.raises(error, match=message):
        action(layer)
    assert layer.scaling == {"default": 4.0}


def test_an_overwritten_base_cannot_be_had_back() -> None:
    layer, x = lora_layer().eval(), torch.randn(5, K)
    layer.disable_adapters()
    with pytest.raises(ValueError, match=r"disabled; call enable_adapters\(\) before merge\(keep_base=False\)"):
        layer.merge(keep_base=False)
    assert not layer.merged
    layer.enable_adapters()
    layer.add_adapter("second")
    layer.merge(keep_base=False)
    before = layer(x)
    with pytest.raises(ValueError, match="overwrote the base weight; adapters cannot be disabled"):
        layer.disable_adapters()
    with pytest.raises(ValueError, match="overwrote the base weight with 'default' as it was scaled"):
        layer.set_scale("default", 2)
    layer.set_scale("second", 2)
    assert layer.enabled and layer.scaling == {"default": 4.0, "second": 4.0}
    compare.assert_bitwise_equal("y", layer(x), before)
