"""apply and revert on PEFT's LoRA models: idempotent, without a trace, and with all of PEFT's features as before."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft_kernels as pk
from peft_kernels.integrations import apply_revert
from peft_kernels.integrations.peft.layers import FusedLoraLinear, PeftLinear
from peft_kernels.integrations.sites import Site
from peft_kernels.integrations.transformers import ApplyCallback
from python_ref import compare
from tests.integrations.models import CLOSE, assert_same, build, lora_layers, pair, run, tokens


class TestApply:
    def test_is_idempotent(self) -> None:
        fused, plain, first = pair()
        second = pk.apply(fused)
        assert first == second
        assert_same(fused, plain)

    def test_revert_leaves_no_trace(self) -> None:
        model = build()
        before = {name: (type(module), set(module.__dict__)) for name, module in model.named_modules()}
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        expected = run(model)[0]
        pk.apply(model)
        run(model)
        pk.revert(model)
        assert {name: (type(module), set(module.__dict__)) for name, module in model.named_modules()} == before
        for name, tensor in model.state_dict().items():
            compare.assert_bitwise_equal(name, tensor, state[name])
        compare.assert_bitwise_equal("logits", run(model)[0], expected)

    def test_new_layers_after_add_adapter(self) -> None:
        model = build(target_modules=["q_proj"])
        assert len(pk.apply(model).fused) == 2
        model.add_adapter("wide", peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        assert {type(layer) for layer in lora_layers(model)} == {PeftLinear, FusedLoraLinear}
        report = pk.apply(model, strict=True)
        assert (len(report.fused), len(report.unused)) == (2, 2)
        assert "2 modules fused, 0 not\n  2 without an active adapter (" in str(report)
        assert {type(layer) for layer in lora_layers(model)} == {FusedLoraLinear}
        model.set_adapter("wide")
        assert len(pk.apply(model).fused) == 4

    @pytest.mark.filterwarnings("ignore:apply. nothing in")
    @pytest.mark.parametrize("reason", [None, "one is too wide"])
    def test_site_of_several_modules(self, reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is swapped as one or not at all, and the report counts its modules."""
        model = build()
        layers = {name: module for name, module in model.named_modules() if isinstance(module, PeftLinear)}
        site = Site(layers, {PeftLinear: FusedLoraLinear}, lambda: reason)
        monkeypatch.setattr(apply_revert, "_sites", lambda _: [site])
        report, names = pk.apply(model), tuple(layers)
        assert (report.fused, report.fallbacks) == (((), dict.fromkeys(names, reason)) if reason else (names, {}))
        assert {type(layer) for layer in layers.values()} == {PeftLinear if reason else FusedLoraLinear}
        pk.revert(model)
        assert {type(layer) for layer in layers.values()} == {PeftLinear}

    def test_strict_changes_nothing(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = build(target_modules=["embed_tokens", "q_proj"])
        with pytest.raises(pk.UnsupportedError, match=r"(?s)strict, and not everything.*1 not fused: .*Embedding"):
            pk.apply(model, strict=True)
        assert {type(layer) for layer in lora_layers(model)} == {PeftLinear}
        assert len(pk.apply(build(), strict=True).fused) == 14

    def test_nothing_to_do_is_said(self) -> None:
        model = nn.Linear(3, 3)
        text = r"(?s)nothing in Linear was put on these kernels.*none of PEFT's layers.*get_peft_model"
        with pytest.warns(UserWarning, match=text):
            assert pk.apply(model).fused == ()
        with pytest.raises(pk.UnsupportedError, match="0 modules fused"):
            pk.apply(model, strict=True)

    @pytest.mark.parametrize("action", [pk.apply, pk.revert])
    def test_no_module(self, action: object) -> None:
        with pytest.raises(ValueError, match=r"model must be a torch\.nn\.Module, got str"):
            action("model")

    def test_report_prints(self) -> None:
        fused, _, report = pair()
        assert str(report) == "peft_kernels: 14 modules fused, 0 not"
        with fused.disable_adapter():
            run(fused)
        assert "14 calls fell back: adapters are disabled" in str(report)


class TestPeftFeatures:
    def test_merge_and_unload(self) -> None:
        fused, plain, _ = pair()
        got, expected = fused.merge_and_unload(), plain.merge_and_unload()
        assert not lora_layers(got)
        # The merged weights are summed in another order than PEFT's.
        torch.testing.assert_close(run(got)[0], run(expected)[0], **CLOSE)

    def test_delete_and_switch(self) -> None:
        fused, plain, _ = pair(adapters=3)
        for model in (fused, plain):
            model.delete_adapter("other1")
            model.set_adapter("other2")
        assert_same(fused, plain)

    def test_copies_are_fused_and_files_are_peft_s(self) -> None:
        fused, plain, _ = pair()
        buffer = io.BytesIO()
        torch.save(fused, buffer)
        assert b"peft_kernels" not in buffer.getvalue()
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
        copied = copy.deepcopy(fused)
        for model, cls in ((copied, FusedLoraLinear), (loaded, PeftLinear)):
            assert {type(layer) for layer in lora_layers(model)} == {cls}
            assert_same(model, plain)
        assert type(copy.copy(lora_layers(fused)[0])) is FusedLoraLinear

    def test_prints_and_reports_its_status_as_peft_s(self) -> None:
        fused, plain, _ = pair()
        assert repr(fused) == repr(plain)
        assert peft.get_layer_status(fused) == peft.get_layer_status(plain)
        assert peft.get_model_status(fused) == peft.get_model_status(plain)

    def test_hotswap(self, tmp_path: Path) -> None:
        from peft.utils.hotswap import hotswap_adapter

        build(seed=1).save_pretrained(tmp_path)
        fused, plain, report = pair()
        for model in (fused, plain):
            hotswap_adapter(model, str(tmp_path), adapter_name="default")
        assert_same(fused, plain)
        assert not report.fallback_calls

    def test_saved_here_loads_where_this_package_is_absent(self, tmp_path: Path) -> None:
        fused, _, _ = pair()
        fused.save_pretrained(tmp_path / "adapter")
        fused.get_base_model().config.save_pretrained(tmp_path / "base")
        base = build().unload()
        torch.save(base.state_dict(), tmp_path / "base.pt")
        torch.save(run(fused)[0], tmp_path / "logits.pt")
        program = f"""
import sys
sys.modules["peft_kernels"] = None
import torch, peft, transformers
folder = {str(tmp_path)!r}
config = transformers.LlamaConfig.from_pretrained(folder + "/base")
base = transformers.LlamaForCausalLM(config).eval()
base.load_state_dict(torch.load(folder + "/base.pt"))
model = peft.PeftModel.from_pretrained(base, folder + "/adapter")
ids = torch.randint(1, {61}, (3, 7), generator=torch.Generator().manual_seed(0))
torch.testing.assert_close(model(ids).logits.detach(), torch.load(folder + "/logits.pt"), rtol=1e-4, atol=1e-5)
print("equal")
"""
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert result.stdout.endswith("equal\n"), result.stderr

    def test_hotswap_into_a_compiled_model(self, tmp_path: Path) -> None:
        """Preparing for it pads ranks and makes scalings tensors."""
        from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

        build(seed=1, r=2).save_pretrained(tmp_path)
        fused, plain, report = pair()
        for model in (fused, plain):
            prepare_model_for_compiled_hotswap(model, target_rank=6)
            hotswap_adapter(model, str(tmp_path), adapter_name="default")
        assert isinstance(lora_layers(fused)[0].scaling["default"], torch.Tensor)
        assert_same(fused, plain)
        assert not report.fallback_calls

    def test_low_cpu_mem_usage(self, tmp_path: Path) -> None:
        saved = build(seed=1)
        saved.save_pretrained(tmp_path)
        fused, plain, _ = pair()
        for model in (fused, plain):
            model.load_adapter(str(tmp_path), "loaded", low_cpu_mem_usage=True)
            model.set_adapter("loaded")
        assert_same(fused, plain)

    def test_layer_replication(self) -> None:
        fused, plain, report = pair(layer_replication=[(0, 2), (1, 2)])
        assert_same(fused, plain)
        assert len(report.fused) == 21

    def test_accelerate_hook_that_came_first(self) -> None:
        accelerate = pytest.importorskip("accelerate")
        fused, plain = build(), build()
        for model in (fused, plain):
            for layer in lora_layers(model):
                accelerate.hooks.add_hook_to_module(layer, accelerate.hooks.ModelHook())
        report = pk.apply(fused)
        assert_same(fused, plain)
        assert not report.fallback_calls
        assert all(layer._old_forward.__func__ is FusedLoraLinear.forward for layer in lora_layers(fused))
        pk.revert(fused)
        assert all(layer._old_forward.__func__ is PeftLinear.forward for layer in lora_layers(fused))

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_gradient_checkpointing(self, use_reentrant: bool) -> None:
        fused, _, _ = pair(lora_dropout=0.3)
        fused.train()
        torch.manual_seed(2)
        expected, expected_gradients = run(fused)
        fused.enable_input_require_grads()
        fused.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        torch.manual_seed(2)
        got, gradients = run(fused)
        compare.assert_bitwise_equal("logits", got, expected)
        for name, gradient in gradients.items():
            compare.assert_bitwise_equal(name, gradient, expected_gradients[name])

    def test_checkpointed_layer_alone(self) -> None:
        fused, _, _ = pair()
        layer, x = lora_layers(fused)[0], torch.randn(3, 32, requires_grad=True)
        checkpoint(layer, x, use_reentrant=False).sum().backward()
        assert layer.lora_A["default"].weight.grad is not None

    @pytest.mark.slow
    def test_compiles_without_graph_break(self) -> None:
        torch._dynamo.reset()
        fused, plain, _ = pair()
        ids = tokens()
        compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(input_ids=ids).logits, plain(input_ids=ids).logits, **CLOSE)


class TestCallback:
    """What a trainer's user sees without configuring any logging."""

    def test_a_model_that_is_fused_is_no_news(self, caplog: pytest.LogCaptureFixture) -> None:
        callback = ApplyCallback()
        callback.on_train_begin(None, None, None, model=build())
        callback.on_train_end(None, None, None)
        assert callback.report.fused and not caplog.records

    def test_fallbacks_are_warnings(self, caplog: pytest.LogCaptureFixture) -> None:
        model, callback = build(), ApplyCallback()
        hooked = lora_layers(model)[0].lora_A["default"].register_forward_hook(lambda *_: None)
        callback.on_train_begin(None, None, None, model=model)
        hooked.remove()
        with model.disable_adapter():
            run(model)
        callback.on_train_end(None, None, None)
        first, last = (record.getMessage() for record in caplog.records)
        assert "13 modules fused, 1 not" in first and "13 calls fell back: adapters are disabled" in last
        assert {record.levelname for record in caplog.records} == {"WARNING"}
