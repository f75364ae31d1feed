"""Merging PEFT's layers after ``apply``: sums rounded once, every bit back, all else as PEFT does, no copy too many."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft_kernels as pk
from peft_kernels.integrations import kept
from peft_kernels.integrations.peft import merging
from peft_kernels.integrations.peft.layers import PeftLinear
from peft_kernels.lora import merging as sums
from python_ref import compare
from tests.integrations.merging import (
    DTYPES,
    KINDS,
    K,
    N,
    assert_bits,
    bits,
    exact_sum,
    layer_of,
    model_of,
    of_kind,
    relative_to_one_rounding,
)
from tests.integrations.models import build, lora_layers, run


class TestBits:
    @pytest.mark.parametrize("where", ["device", "host"])
    @pytest.mark.parametrize("safe_merge", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("kind", KINDS)
    def test_unmerge_gives_back_every_bit(self, kind: str, dtype: torch.dtype, safe_merge: bool, where: Any) -> None:
        model = of_kind(kind, dtype, adapters=2)
        report = pk.apply(model, keep_base=where)
        layer = layer_of(model)
        before, pointer, attributes = bits(layer), layer.base_layer.weight.data_ptr(), set(vars(layer))
        for _ in range(3):
            model.merge_adapter(safe_merge=safe_merge)
            assert layer.merged_adapters == ["default", "a1"]
            assert not torch.equal(bits(layer)[0], before[0])
            assert "lora_bias" not in KINDS[kind] or not torch.equal(bits(layer)[1], before[1])
            model.unmerge_adapter()
            assert layer.merged_adapters == []
            assert_bits(layer, before)
        assert layer.base_layer.weight.data_ptr() == pointer and set(vars(layer)) == attributes
        assert not report.fallback_calls

    @pytest.mark.parametrize("factors", ["float32", "the weight's dtype"])
    @pytest.mark.parametrize("adapters", [1, 3])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("kind", KINDS)
    def test_a_merged_weight_is_rounded_once(
        self, kind: str, dtype: torch.dtype, adapters: int, factors: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sums, "_ROWS", 7)
        fused, plain = of_kind(kind, dtype, adapters), of_kind(kind, dtype, adapters)
        if factors != "float32":
            fused.to(dtype), plain.to(dtype)
        pk.apply(fused)
        exact = exact_sum(layer_of(fused))
        for model in (fused, plain):
            model.merge_adapter()
        assert relative_to_one_rounding(layer_of(fused), *exact) <= 1
        # PEFT's roundings, up to two an adapter.
        slack = 6 * torch.finfo(dtype).eps * float(exact[1].max())
        torch.testing.assert_close(bits(layer_of(fused))[0], bits(layer_of(plain))[0], rtol=0, atol=slack)
        if adapters == 3 and dtype in (torch.bfloat16, torch.float16):
            assert relative_to_one_rounding(layer_of(plain), *exact) > 2, "this cannot tell three roundings from one"

    def test_a_merged_bias_is_rounded_once(self) -> None:
        model = of_kind("bias", torch.bfloat16, adapters=3)
        pk.apply(model)
        layer = layer_of(model)
        exact = bits(layer)[1].double()
        for name in layer.active_adapters:
            exact = exact + layer.lora_B[name].bias.detach().double() * layer.scaling[name]
        model.merge_adapter()
        assert torch.equal(bits(layer)[1], exact.bfloat16())

    @pytest.mark.filterwarnings("error")
    @pytest.mark.parametrize("make", [float, torch.tensor, lambda value: nn.Parameter(torch.tensor(value))])
    def test_scalings_in_tensors(self, make: Callable[[float], Any]) -> None:
        model = model_of()
        pk.apply(model)
        layer = layer_of(model)
        before, exact = bits(layer), exact_sum(layer)
        layer.scaling["default"] = make(layer.scaling["default"])
        layer.merge()
        assert relative_to_one_rounding(layer, *exact) <= 1
        layer.unmerge()
        assert_bits(layer, before)

    @pytest.mark.parametrize("changes", [False, True])
    def test_a_thousand_cycles(self, changes: bool) -> None:
        """PEFT's weight moves by a part of its own size; this one by no bit."""
        moved = {}
        for ours in (False, True):
            model = model_of(lora_alpha=2)
            layer = layer_of(model)
            if ours:
                pk.apply(model)
            before, generator = bits(layer), torch.Generator().manual_seed(1)
            for _ in range(1000):
                model.merge_adapter()
                model.unmerge_adapter()
                if changes:
                    layer.lora_B["default"].weight.data.normal_(std=0.1, generator=generator)
            moved[ours] = float((bits(layer)[0].double() - before[0].double()).abs().max() / before[0].abs().mean())
        # Updates are half as large as the weights; 0.75 and 0.38 were seen, and 0.67 by others (huggingface/trl#6688).
        assert moved[True] == 0 and moved[False] > 0.3, moved


class TestAsPeft:
    """What a merge does beside its sum."""

    CALLS: tuple[Callable[[Any], object], ...] = (
        lambda layer: layer.unmerge(),
        lambda layer: layer.merge(adapter_names=["a1"]),
        lambda layer: layer.merge(adapter_names=["a1"]),
        lambda layer: layer.merge(False, ["a1", "default", "unknown"]),
        lambda layer: layer.merge(adapter_names=[]),
        lambda layer: layer.merge(adapter_names=["unknown"]),
        lambda layer: layer.merge(adapter_names="a2"),
        lambda layer: layer.merge(),
        lambda layer: layer.unmerge(),
        lambda layer: layer.unmerge(),
        lambda layer: layer.merge(True),
        lambda layer: layer.unmerge(),
    )

    def test_states_warnings_and_errors(self) -> None:
        found = []
        for ours in (False, True):
            model = model_of(torch.float32, adapters=3)
            layer, steps = layer_of(model), []
            before = bits(layer)
            if ours:
                pk.apply(model)
            for call in self.CALLS:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    try:
                        call(layer)
                        outcome: object = None
                    except TypeError as error:
                        outcome = str(error)
                steps.append((outcome, [str(each.message) for each in caught], list(layer.merged_adapters)))
                if ours and not layer.merged:
                    assert_bits(layer, before)
            found.append(steps)
        assert found[0] == found[1] and found[0][3][2] == ["a1", "default"]

    @pytest.mark.filterwarnings("ignore:.*additionally merging")
    def test_merged_in_steps(self) -> None:
        """The second adapter alone has a bias to merge."""
        model = model_of(adapters=2)
        model.add_adapter("biased", peft.LoraConfig(target_modules=["0"], r=2, lora_bias=True, init_lora_weights=False))
        model.base_model.set_adapter(["default", "a1", "biased"])
        pk.apply(model)
        layer = layer_of(model)
        layer.lora_B["biased"].bias.data.fill_(0.5)
        before = bits(layer)
        layer.merge(adapter_names=["a1"])
        first = bits(layer)
        layer.merge(adapter_names=["biased"])
        second = bits(layer)
        assert not torch.equal(first[0], second[0]) and not torch.equal(first[1], second[1])
        update = layer.get_delta_weight("biased").detach()
        assert torch.equal(second[0], (first[0].float() + update).bfloat16())
        layer.unmerge()
        assert_bits(layer, before)

    @pytest.mark.parametrize("broken", ["weight", "bias", "overflow"])
    def test_safe_merge_refuses_what_is_not_finite(self, broken: str) -> None:
        model = model_of(torch.float16, adapters=2, lora_bias=True)
        pk.apply(model)
        layer = layer_of(model)
        if broken == "bias":
            layer.lora_B["a1"].bias.data[3] = torch.inf
        else:
            layer.lora_B["a1"].weight.data[3] = torch.nan if broken == "weight" else 1e6
        before = bits(layer)
        with pytest.raises(ValueError, match="would not be finite with default, a1"):
            layer.merge(safe_merge=True)
        assert_bits(layer, before)
        assert not layer.merged and kept.of(layer) is None
        layer.merge(safe_merge=True, adapter_names=["default"])
        with pytest.raises(ValueError, match="would not be finite with a1"), pytest.warns(UserWarning, match="Already"):
            layer.merge(safe_merge=True)
        assert layer.merged_adapters == ["default"]
        layer.unmerge()
        assert_bits(layer, before)
        layer.merge()
        assert not all(bool(each.isfinite().all()) for each in bits(layer))
        layer.unmerge()
        assert_bits(layer, before)

    def test_whole_model(self, tmp_path: Path) -> None:
        """Disabling, switching, deleting, hotswapping, saving and training through PEFT's model, while merged."""
        from peft.utils.hotswap import hotswap_adapter

        build(seed=1).save_pretrained(tmp_path / "other")
        fused, never = build(adapters=2), build(adapters=2)
        for model in (fused, never):
            pk.apply(model)
        before = [bits(layer) for layer in lora_layers(fused)]

        def assert_back() -> None:
            assert not any(layer.merged for layer in lora_layers(fused))
            for layer, expected in zip(lora_layers(fused), before, strict=True):
                assert_bits(layer, expected)

        fused.save_pretrained(tmp_path / "apart")
        fused.merge_adapter()
        fused.save_pretrained(tmp_path / "merged")
        apart, merged = (peft.load_peft_weights(str(tmp_path / name), device="cpu") for name in ("apart", "merged"))
        assert apart.keys() == merged.keys() and all(torch.equal(apart[key], merged[key]) for key in apart)
        with fused.disable_adapter():
            run(fused)
        assert_back()
        fused.merge_adapter()
        with pytest.warns(UserWarning, match="Unmerging the model first"):
            fused.set_adapter("other1")
        assert_back()
        fused.merge_adapter(adapter_names=["default"])
        for action in (
            lambda: fused.delete_adapter("default"),
            lambda: hotswap_adapter(fused, str(tmp_path / "other"), adapter_name="default"),
        ):
            with pytest.raises(ValueError, match="merged"):
                action()
        for layer in lora_layers(fused):
            layer.delete_adapter("default")
        fused.unmerge_adapter()
        assert_back()
        never.set_adapter("other1")
        for model in (fused, never):
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
            for _ in range(2):
                run(model)
                optimizer.step()
        compare.assert_bitwise_equal("logits", run(fused)[0], run(never)[0])
        assert not any(kept.of(layer) for layer in lora_layers(fused))

    @pytest.mark.parametrize("change", ["hotswapped", "trained", "scaling"])
    def test_factors_that_change_while_merged(self, change: str) -> None:
        model = model_of()
        pk.apply(model)
        layer = layer_of(model)
        before = bits(layer)
        layer.merge()
        if change == "scaling":
            layer.scaling["default"] *= 2
        elif change == "trained":
            with torch.no_grad():
                layer.lora_A["default"].weight.add_(1)
        else:
            layer.lora_B["default"].weight.data = torch.ones(N, 4)
        layer.unmerge()
        assert_bits(layer, before)

    def test_inference_mode(self) -> None:
        model = model_of()
        pk.apply(model)
        layer, x = layer_of(model), torch.ones(2, K, dtype=torch.bfloat16)
        before = bits(layer)
        with torch.inference_mode():
            layer.merge()
        layer.unmerge()
        assert_bits(layer, before)
        layer.merge()
        with torch.inference_mode():
            layer.unmerge()
        assert_bits(layer, before)
        model(x).sum().backward()

    @pytest.mark.slow
    def test_a_compiled_call_unmerges(self) -> None:
        torch._dynamo.reset()
        model = model_of(torch.float32)
        pk.apply(model)
        layer, x = layer_of(model), torch.ones(2, K)
        before = bits(layer)
        layer.merge()
        whole = torch.compile(model, backend="eager", fullgraph=True)
        with model.disable_adapter(), pytest.raises(torch._dynamo.exc.Unsupported, match=merging._NOT_COMPILED):
            whole(x)
        assert layer.merged
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager")
        with model.disable_adapter():
            y = compiled(x)
        assert_bits(layer, before)
        torch.testing.assert_close(y, layer.base_layer(x))
        assert kept.of(layer) is None


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Tensor]]:
    """Every copy that was made to be kept."""
    made: list[weakref.ref[Tensor]] = []
    copied = kept.copied

    def noted(tensor: Tensor, where: kept.KeepBase) -> Tensor:
        copy = copied(tensor, where)
        made.append(weakref.ref(copy))
        return copy

    monkeypatch.setattr(kept, "copied", noted)
    return made


def _unmerged(model: Any) -> None:
    model.unmerge_adapter()


def _changed_and_unmerged(model: Any) -> None:
    layer_of(model).base_layer.weight.data.add_(1)
    with pytest.warns(UserWarning, match="changed while"):
        model.unmerge_adapter()


def _merged_by_peft(model: Any) -> None:
    with pytest.warns(UserWarning, match="additionally merging"):
        layer_of(model).merge(adapter_names=["dora"])


def _gone(model: Any) -> None:
    model.base_model.model = nn.Sequential()


ENDS: dict[str, Callable[[Any], object]] = {
    "unmerged": _unmerged,
    "changed and unmerged": _changed_and_unmerged,
    "merged by PEFT": _merged_by_peft,
    "reverted": pk.revert,
    "unloaded": lambda model: model.unload(),
    "merged and unloaded": lambda model: model.merge_and_unload(),
    "gone": _gone,
}


class TestMemory:
    @pytest.mark.parametrize("end", ENDS)
    @pytest.mark.filterwarnings("ignore:All adapters are already merged")
    def test_what_is_kept_goes(self, end: str, copies: list[weakref.ref[Tensor]]) -> None:
        model = model_of(lora_bias=True)
        model.add_adapter("dora", peft.LoraConfig(target_modules=["0"], r=2, use_dora=True))
        pk.apply(model)
        model.merge_adapter()
        assert len(copies) == 2 and all(copy() is not None for copy in copies)
        held = None if end == "gone" else layer_of(model)  # as a tool may
        ENDS[end](model)
        gc.collect()
        assert not any(copy() is not None for copy in copies), held

    def test_merge_and_unload_keeps_nothing(self, copies: list[weakref.ref[Tensor]]) -> None:
        model = model_of(adapters=3)
        pk.apply(model)
        layer = layer_of(model)
        exact = exact_sum(layer)
        merged = model.merge_and_unload(safe_merge=True)
        assert type(merged[0]) is nn.Linear and merged[0] is layer.base_layer and not copies
        assert relative_to_one_rounding(layer, *exact) <= 1

    def test_keep_base_false(self, copies: list[weakref.ref[Tensor]]) -> None:
        model = model_of(adapters=3)
        report = pk.apply(model, keep_base=False)
        layer = layer_of(model)
        exact = exact_sum(layer)
        model.merge_adapter()
        assert relative_to_one_rounding(layer, *exact) <= 1 and not copies
        merged = bits(layer)[0]
        model.unmerge_adapter()
        for name in ("a2", "a1", "default"):
            merged = merged - layer.get_delta_weight(name).detach().bfloat16()
        compare.assert_bitwise_equal("weight", bits(layer)[0], merged)
        assert dict(report.fallback_calls) == {merging._NOT_KEPT.text: 1}

    @pytest.mark.filterwarnings("ignore:.*additionally merging")
    def test_the_choice(self) -> None:
        """It is the layer's until another is made, and a merged layer's until it is unmerged."""
        model = model_of(adapters=2)
        layer = layer_of(model)
        pk.apply(model)
        assert kept.chosen(layer) == "device"
        pk.apply(model, keep_base="host")
        pk.apply(model)
        layer.merge(adapter_names=["default"])
        with pytest.warns(UserWarning, match="adapters are merged into the weight"):
            pk.apply(model, keep_base=False)
        layer.merge()
        assert kept.of(layer).where == "host"
        layer.unmerge()
        layer.merge()
        assert kept.of(layer) is None
        pk.revert(model)
        assert kept.chosen(layer) == "device"

    def test_a_wrong_choice_changes_nothing(self) -> None:
        model = model_of()
        with pytest.raises(ValueError, match='apply: keep_base must be "device", "host" or False, got True'):
            pk.apply(model, keep_base=True)
        assert type(layer_of(model)) is PeftLinear
