"""PEFT's LoRA layers on lora_linear: equal logits and gradients, and every fallback counted."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft.tuners.lora.variants import DoraLinearVariant

import peft_kernels as pk
from peft_kernels.integrations.peft.layers import FusedLoraLinear
from python_ref import compare
from tests.integrations.models import (
    ARCHITECTURES,
    CLOSE,
    assert_same,
    build,
    lora_layers,
    pair,
    randomize,
    run,
    tokens,
)

_DRAWS = 12


class _Variant(DoraLinearVariant):
    pass


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architectures(architecture: str) -> None:
    fused, plain, report = pair(architecture)
    assert report.fused and not report.fallbacks
    assert_same(fused, plain)
    assert not report.fallback_calls
    assert {type(layer) for layer in lora_layers(fused)} == {FusedLoraLinear}


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"lora_bias": True, "architecture": "bert"},
        {"lora_bias": True, "architecture": "gpt2"},
        {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"q_proj": 3}},
        {"bias": "all", "architecture": "bert"},
        {"bias": "lora_only", "architecture": "bert"},
        {"modules_to_save": ["lm_head"]},
        {"init_lora_weights": "pissa"},
        {"target_modules": "all-linear"},
    ],
    ids=str,
)
def test_options(options: dict[str, object]) -> None:
    fused, plain, report = pair(**options)
    assert not report.fallbacks
    assert_same(fused, plain)
    assert not report.fallback_calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, None])
def test_half_precision_base(dtype: torch.dtype, adapter_dtype: torch.dtype | None) -> None:
    """As close to a float64 run as PEFT itself is, by the error budget; errors of a whole model scatter, so several."""
    draws = []
    for seed in range(_DRAWS):
        plain = build(seed=seed).to(dtype)
        exact = copy.deepcopy(plain).double()
        if adapter_dtype is not None:
            for name, parameter in plain.named_parameters():
                if "lora_" in name:
                    parameter.data = parameter.data.to(adapter_dtype)
        fused = copy.deepcopy(plain)
        report = pk.apply(fused)
        draws.append([run(model)[0] for model in (fused, plain, exact)])
        assert not report.fallback_calls
    compare.assert_close("logits", *(torch.stack(logits) for logits in zip(*draws, strict=True)))


def test_autocast() -> None:
    draws = []
    for seed in range(_DRAWS):
        fused, plain, report = pair(seed=seed)
        exact = run(copy.deepcopy(plain).double())[0]
        with torch.autocast("cpu", torch.bfloat16):
            (ours, gradients), (theirs, expected) = run(fused), run(plain)
        assert {name: g.dtype for name, g in gradients.items()} == {name: g.dtype for name, g in expected.items()}
        assert not report.fallback_calls
        draws.append([ours, theirs, exact])
    compare.assert_close("logits", *(torch.stack(logits) for logits in zip(*draws, strict=True)))


def test_several_active_adapters_are_one_call() -> None:
    fused, plain, report = pair(adapters=3)
    names = ["default", "other1", "other2"]
    for model in (fused, plain):
        model.base_model.set_adapter(names)
    assert_same(fused, plain)
    assert not report.fallback_calls


def test_several_active_adapters_with_dropout_are_one_call() -> None:
    fused, _, report = pair(adapters=2, lora_dropout=0.5)
    fused.base_model.set_adapter(["default", "other1"])
    fused.train()
    results = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        results.append(run(fused)[0])
    compare.assert_bitwise_equal("logits", results[0], results[1])
    assert not torch.equal(results[0], results[2]) and not report.fallback_calls


def test_tensor_scaling() -> None:
    """What prepare_model_for_compiled_hotswap leaves."""
    fused, plain, report = pair()
    for model in (fused, plain):
        for layer in lora_layers(model):
            layer.scaling["default"] = torch.tensor(layer.scaling["default"])
    assert_same(fused, plain)
    assert not report.fallback_calls


def test_dropout_is_fused_and_replayed() -> None:
    fused, _, report = pair(lora_dropout=0.5)
    fused.train()
    torch.manual_seed(1)
    first, gradients = run(fused)
    torch.manual_seed(1)
    again, same_gradients = run(fused)
    compare.assert_bitwise_equal("logits", first, again)
    for name, gradient in gradients.items():
        compare.assert_bitwise_equal(name, gradient, same_gradients[name])
    assert not torch.equal(run(fused)[0], first)
    assert not report.fallback_calls


def test_dropout_is_off_in_evaluation() -> None:
    fused, plain, _ = pair(lora_dropout=0.5)
    assert_same(fused.eval(), plain.eval())


class TestFallbacks:
    """Where PEFT's forward does something else, it is PEFT's forward that runs."""

    @staticmethod
    def _assert_falls_back(fused: nn.Module, plain: nn.Module, report: pk.integrations.Report, reason: str) -> None:
        logits, gradients = run(fused)
        expected, expected_gradients = run(plain)
        compare.assert_bitwise_equal("logits", logits, expected)
        for name, gradient in gradients.items():
            compare.assert_bitwise_equal(name, gradient, expected_gradients[name])
        assert report.fallback_calls, "nothing fell back"
        assert all(reason in text for text in report.fallback_calls), report.fallback_calls

    def test_disabled_adapters(self) -> None:
        fused, plain, report = pair()
        with fused.disable_adapter(), plain.disable_adapter():
            self._assert_falls_back(fused, plain, report, "disabled")

    def test_merged(self) -> None:
        fused, plain, report = pair()
        fused.merge_adapter()
        plain.merge_adapter()
        self._assert_falls_back(fused, plain, report, "merged")
        fused.unmerge_adapter()
        plain.unmerge_adapter()
        assert_same(fused, plain)

    def test_adapter_names(self) -> None:
        fused, plain, report = pair(adapters=2)
        names = ["default", "other1", "__base__"]
        with torch.no_grad():
            got, expected = (m(input_ids=tokens(), adapter_names=names).logits for m in (fused.eval(), plain.eval()))
        torch.testing.assert_close(got, expected, **CLOSE)
        assert not report.fallback_calls

    def test_hooks_on_parts_run(self) -> None:
        fused, _, report = pair()
        seen = []
        lora_layers(fused)[0].lora_A["default"].register_forward_hook(lambda *_: seen.append(1))
        run(fused)
        assert seen and set(report.fallback_calls) == {"there are hooks on its adapters"}

    def test_adapters_in_less_than_the_base(self) -> None:
        fused, plain, report = pair()
        for model in (fused, plain):
            for layer in lora_layers(model):
                layer.lora_A["default"].bfloat16()
                layer.lora_B["default"].bfloat16()
        self._assert_falls_back(fused, plain, report, "the adapters are torch.bfloat16")

    def test_variants(self) -> None:
        """One that nobody knows."""
        plain = build(use_dora=True)
        for layer in lora_layers(plain):
            layer.lora_variant["default"] = _Variant()
        fused = copy.deepcopy(plain)
        with pytest.warns(UserWarning, match="0 modules fused, 14 not"):
            report = pk.apply(fused)
        assert not report.fused and "its adapter is a _Variant" in next(iter(report.fallbacks.values()))
        compare.assert_bitwise_equal("logits", run(fused)[0], run(plain)[0])

    def test_variant_that_comes_later(self) -> None:
        fused, _, report = pair()
        fused.add_adapter("dora", peft.LoraConfig(r=4, use_dora=True, target_modules=["q_proj"]))
        for layer in lora_layers(fused):
            if "dora" in layer.lora_variant:
                layer.lora_variant["dora"] = _Variant()
        plain = copy.deepcopy(fused)
        pk.revert(plain)
        for model in (fused, plain):
            model.set_adapter("dora")
        compare.assert_bitwise_equal("logits", run(fused)[0], run(plain)[0])
        assert any("its adapter is a _Variant" in reason for reason in report.fallback_calls)

    def test_no_adapter_of_the_layer_is_active(self) -> None:
        fused, _, report = pair()
        fused.add_adapter("elsewhere", peft.LoraConfig(r=4, target_modules=["o_proj"]))
        plain = copy.deepcopy(fused)
        pk.revert(plain)
        for model in (fused, plain):
            model.set_adapter("elsewhere")
        assert_same(fused, plain)
        assert set(report.fallback_calls) == {"no adapter is active"}

    def test_offsets_mean_nothing_to_plain_lora(self) -> None:
        fused, plain, report = pair()
        x = torch.randn(3, 32)
        got, expected = (lora_layers(model)[0](x, alora_offsets=[1, 1, 1]) for model in (fused, plain))
        torch.testing.assert_close(got, expected, **CLOSE)
        assert not report.fallback_calls

    def test_adapters_of_several_dtypes(self) -> None:
        fused, plain, report = pair(adapters=2)
        for model in (fused, plain):
            model.base_model.set_adapter(["default", "other1"])
            for layer in lora_layers(model):
                layer.lora_A["other1"].double()
                layer.lora_B["other1"].double()
        with torch.no_grad():
            x = torch.randn(3, 32)
            compare.assert_bitwise_equal("y", *(lora_layers(model)[0](x) for model in (fused, plain)))
        assert set(report.fallback_calls) == {"its adapters have several dtypes"}

    def test_input_of_another_dtype(self) -> None:
        fused, plain, report = pair()
        for model in (fused, plain):
            lora_layers(model)[0].base_layer.bfloat16()
        for model in (fused, plain):
            with pytest.raises(RuntimeError, match="dtype"):
                lora_layers(model)[0](torch.randn(3, 32))
        assert set(report.fallback_calls) == {"x is torch.float32, the base weight torch.bfloat16"}

    def test_several_devices(self) -> None:
        fused, _, report = pair()
        lora_layers(fused)[0].lora_A["default"].to("meta")
        lora_layers(fused)[0](torch.randn(3, 32))
        assert set(report.fallback_calls) == {"its tensors are on several devices"}

    def test_dropout_of_another_class(self) -> None:
        plain = build()
        for layer in lora_layers(plain):
            layer.lora_dropout["default"] = nn.AlphaDropout(0.5)
        with pytest.warns(UserWarning, match="0 modules fused"):
            report = pk.apply(plain)
        assert set(report.fallbacks.values()) == {"its dropout is AlphaDropout(p=0.5, inplace=False), not nn.Dropout"}

    def test_weights_of_another_class(self) -> None:
        """Quantized and distributed tensors are subclasses."""

        class Subclass(torch.Tensor):
            pass

        plain = build()
        down = lora_layers(plain)[0].lora_A["default"]
        down.weight = nn.Parameter(down.weight.detach().as_subclass(Subclass))
        report = pk.apply(plain)
        (reason,) = report.fallbacks.values()
        assert reason == "a weight of it is a Subclass, not a plain tensor"

    def test_embedding_is_reported(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _, _, report = pair(target_modules=["embed_tokens", "q_proj"])
        assert any("layer.Embedding" in reason for reason in report.fallbacks.values())
        assert len(report.fused) == 2


def test_randomized_adapters_do_something() -> None:
    """The other tests would pass with a LoRA that is switched off, if B were zero."""
    model = build()
    with model.disable_adapter():
        base = run(model)[0]
    assert (run(model)[0] - base).abs().max() > 0.1
    randomize(model, 1)
