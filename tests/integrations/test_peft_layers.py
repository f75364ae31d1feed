"""apply and revert on PEFT models: equal logits and gradients, every fallback counted, PEFT's features as before."""

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
from peft_kernels.integrations.peft_layers import FusedLoraLinear, PeftLinear
from python_ref import compare
from tests.integrations.models import ARCHITECTURES, build, randomize, run, tokens

# Two orders of the same float32 sums through two layers; logits and gradients here are of the order of one.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
_DRAWS = 12


def _assert_same(model: nn.Module, other: nn.Module, **extra: object) -> None:
    (logits, gradients), (expected, expected_gradients) = run(model, **extra), run(other, **extra)
    torch.testing.assert_close(logits, expected, **CLOSE)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, expected_gradients[name], **CLOSE, msg=lambda text, name=name: f"{name}: {text}"
        )


def _pair(architecture: str = "llama", **options: object) -> tuple[nn.Module, nn.Module, pk.integrations.Report]:
    plain = build(architecture, **options)
    fused = copy.deepcopy(plain)
    return fused, plain, pk.apply(fused)


def _layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, PeftLinear)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architectures(architecture: str) -> None:
    fused, plain, report = _pair(architecture)
    assert report.fused and not report.fallbacks
    _assert_same(fused, plain)
    assert not report.fallback_calls
    assert {type(layer) for layer in _layers(fused)} == {FusedLoraLinear}


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
    fused, plain, report = _pair(**options)
    assert not report.fallbacks
    _assert_same(fused, plain)
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
        fused, plain, report = _pair(seed=seed)
        exact = run(copy.deepcopy(plain).double())[0]
        with torch.autocast("cpu", torch.bfloat16):
            (ours, gradients), (theirs, expected) = run(fused), run(plain)
        assert {name: g.dtype for name, g in gradients.items()} == {name: g.dtype for name, g in expected.items()}
        assert not report.fallback_calls
        draws.append([ours, theirs, exact])
    compare.assert_close("logits", *(torch.stack(logits) for logits in zip(*draws, strict=True)))


def test_several_active_adapters_are_one_call() -> None:
    fused, plain, report = _pair(adapters=3)
    names = ["default", "other1", "other2"]
    for model in (fused, plain):
        model.base_model.set_adapter(names)
    _assert_same(fused, plain)
    assert not report.fallback_calls


def test_tensor_scaling() -> None:
    """What prepare_model_for_compiled_hotswap leaves."""
    fused, plain, report = _pair()
    for model in (fused, plain):
        for layer in _layers(model):
            layer.scaling["default"] = torch.tensor(layer.scaling["default"])
    _assert_same(fused, plain)
    assert not report.fallback_calls


def test_dropout_is_fused_and_replayed() -> None:
    fused, _, report = _pair(lora_dropout=0.5)
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
    fused, plain, _ = _pair(lora_dropout=0.5)
    _assert_same(fused.eval(), plain.eval())


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
        fused, plain, report = _pair()
        with fused.disable_adapter(), plain.disable_adapter():
            self._assert_falls_back(fused, plain, report, "disabled")

    def test_merged(self) -> None:
        fused, plain, report = _pair()
        fused.merge_adapter()
        plain.merge_adapter()
        self._assert_falls_back(fused, plain, report, "merged")
        fused.unmerge_adapter()
        plain.unmerge_adapter()
        _assert_same(fused, plain)

    def test_adapter_names(self) -> None:
        fused, plain, report = _pair(adapters=2)
        names = ["default", "other1", "__base__"]
        with torch.no_grad():
            got, expected = (m(input_ids=tokens(), adapter_names=names).logits for m in (fused.eval(), plain.eval()))
        compare.assert_bitwise_equal("logits", got, expected)
        assert set(report.fallback_calls) == {"adapter_names mixes adapters within a batch"}

    def test_hooks_on_parts_run(self) -> None:
        fused, _, report = _pair()
        seen = []
        _layers(fused)[0].lora_A["default"].register_forward_hook(lambda *_: seen.append(1))
        run(fused)
        assert seen and set(report.fallback_calls) == {"there are hooks on its base layer or on its adapters"}

    def test_several_adapters_with_dropout(self) -> None:
        fused, plain, report = _pair(adapters=2, lora_dropout=0.5)
        results = []
        for model in (fused, plain):
            model.base_model.set_adapter(["default", "other1"])
            model.train()
            torch.manual_seed(3)
            results.append(run(model)[0])
        compare.assert_bitwise_equal("logits", *results)
        assert "draw a mask each" in next(iter(report.fallback_calls))

    def test_adapters_in_less_than_the_base(self) -> None:
        fused, plain, report = _pair()
        for model in (fused, plain):
            for layer in _layers(model):
                layer.lora_A["default"].bfloat16()
                layer.lora_B["default"].bfloat16()
        self._assert_falls_back(fused, plain, report, "the adapters are torch.bfloat16")

    def test_variants(self) -> None:
        plain = build(use_dora=True)
        fused = copy.deepcopy(plain)
        with pytest.warns(UserWarning, match="0 modules fused, 14 not"):
            report = pk.apply(fused)
        assert not report.fused and "DoraLinearVariant" in next(iter(report.fallbacks.values()))
        compare.assert_bitwise_equal("logits", run(fused)[0], run(plain)[0])

    def test_variant_that_comes_later(self) -> None:
        fused, _, report = _pair()
        fused.add_adapter("dora", peft.LoraConfig(r=4, use_dora=True, target_modules=["q_proj"]))
        plain = copy.deepcopy(fused)
        pk.revert(plain)
        for model in (fused, plain):
            model.set_adapter("dora")
        compare.assert_bitwise_equal("logits", run(fused)[0], run(plain)[0])
        assert any("DoraLinearVariant" in reason for reason in report.fallback_calls)

    def test_embedding_is_reported(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _, _, report = _pair(target_modules=["embed_tokens", "q_proj"])
        assert any("layer.Embedding" in reason for reason in report.fallbacks.values())
        assert len(report.fused) == 2

    def test_parametrized_weight(self) -> None:
        plain = build()
        nn.utils.parametrizations.weight_norm(_layers(plain)[0].base_layer)
        report = pk.apply(plain)
        assert "base layer is ParametrizedLinear" in next(iter(report.fallbacks.values()))


class TestApply:
    def test_is_idempotent(self) -> None:
        fused, plain, first = _pair()
        second = pk.apply(fused)
        assert first == second
        _assert_same(fused, plain)

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
        assert {type(layer) for layer in _layers(model)} == {PeftLinear, FusedLoraLinear}
        assert len(pk.apply(model).fused) == 4
        assert {type(layer) for layer in _layers(model)} == {FusedLoraLinear}

    def test_strict_changes_nothing(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = build(target_modules=["embed_tokens", "q_proj"])
        with pytest.raises(pk.UnsupportedError, match=r"(?s)strict, and not everything.*1 not fused: .*Embedding"):
            pk.apply(model, strict=True)
        assert {type(layer) for layer in _layers(model)} == {PeftLinear}
        assert len(pk.apply(build(), strict=True).fused) == 14

    def test_nothing_to_do_is_said(self) -> None:
        model = nn.Linear(3, 3)
        with pytest.warns(UserWarning, match="nothing in Linear was put on these kernels"):
            assert pk.apply(model).fused == ()
        with pytest.raises(pk.UnsupportedError, match="0 modules fused"):
            pk.apply(model, strict=True)

    @pytest.mark.parametrize("action", [pk.apply, pk.revert])
    def test_no_module(self, action: object) -> None:
        with pytest.raises(ValueError, match=r"model must be a torch\.nn\.Module, got str"):
            action("model")

    def test_report_prints(self) -> None:
        fused, _, report = _pair()
        assert str(report) == "peft_kernels: 14 modules fused, 0 not"
        with fused.disable_adapter():
            run(fused)
        assert "14 calls fell back: adapters are disabled" in str(report)


class TestPeftFeatures:
    def test_merge_and_unload(self) -> None:
        fused, plain, _ = _pair()
        got, expected = fused.merge_and_unload(), plain.merge_and_unload()
        assert not _layers(got)
        compare.assert_bitwise_equal("logits", run(got)[0], run(expected)[0])

    def test_delete_and_switch(self) -> None:
        fused, plain, _ = _pair(adapters=3)
        for model in (fused, plain):
            model.delete_adapter("other1")
            model.set_adapter("other2")
        _assert_same(fused, plain)

    def test_deepcopy_and_torch_save(self) -> None:
        fused, plain, _ = _pair()
        buffer = io.BytesIO()
        torch.save(fused, buffer)
        buffer.seek(0)
        for copied in (copy.deepcopy(fused), torch.load(buffer, weights_only=False)):
            assert {type(layer) for layer in _layers(copied)} == {FusedLoraLinear}
            _assert_same(copied, plain)

    def test_hotswap(self, tmp_path: Path) -> None:
        from peft.utils.hotswap import hotswap_adapter

        build(seed=1).save_pretrained(tmp_path)
        fused, plain, report = _pair()
        for model in (fused, plain):
            hotswap_adapter(model, str(tmp_path), adapter_name="default")
        _assert_same(fused, plain)
        assert not report.fallback_calls

    def test_saved_here_loads_where_this_package_is_absent(self, tmp_path: Path) -> None:
        fused, _, _ = _pair()
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

    def test_low_cpu_mem_usage(self, tmp_path: Path) -> None:
        saved = build(seed=1)
        saved.save_pretrained(tmp_path)
        fused, plain, _ = _pair()
        for model in (fused, plain):
            model.load_adapter(str(tmp_path), "loaded", low_cpu_mem_usage=True)
            model.set_adapter("loaded")
        _assert_same(fused, plain)

    def test_layer_replication(self) -> None:
        fused, plain, report = _pair(layer_replication=[(0, 2), (1, 2)])
        _assert_same(fused, plain)
        assert len(report.fused) == 21

    def test_accelerate_hook_that_came_first(self) -> None:
        accelerate = pytest.importorskip("accelerate")
        fused, plain = build(), build()
        for model in (fused, plain):
            for layer in _layers(model):
                accelerate.hooks.add_hook_to_module(layer, accelerate.hooks.ModelHook())
        report = pk.apply(fused)
        _assert_same(fused, plain)
        assert not report.fallback_calls
        assert all(layer._old_forward.__func__ is FusedLoraLinear.forward for layer in _layers(fused))
        pk.revert(fused)
        assert all(layer._old_forward.__func__ is PeftLinear.forward for layer in _layers(fused))

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_gradient_checkpointing(self, use_reentrant: bool) -> None:
        fused, _, _ = _pair(lora_dropout=0.3)
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
        fused, _, _ = _pair()
        layer, x = _layers(fused)[0], torch.randn(3, 32, requires_grad=True)
        checkpoint(layer, x, use_reentrant=False).sum().backward()
        assert layer.lora_A["default"].weight.grad is not None

    @pytest.mark.slow
    def test_compiles_without_graph_break(self) -> None:
        torch._dynamo.reset()
        fused, plain, _ = _pair()
        ids = tokens()
        compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(input_ids=ids).logits, plain(input_ids=ids).logits, **CLOSE)


@pytest.mark.slow
def test_trainer_with_callback_and_resume(tmp_path: Path) -> None:
    """Losses equal those of the unpatched model, also from a checkpoint on."""
    pytest.importorskip("accelerate")
    import transformers

    from peft_kernels.integrations.transformers import ApplyCallback

    rows = [{"input_ids": row, "labels": row} for row in tokens(24, 7)]

    def losses(folder: Path, callbacks: list, steps: int, resume: bool) -> list[float]:
        arguments = transformers.TrainingArguments(
            str(folder), max_steps=steps, save_steps=3, logging_steps=1, per_device_train_batch_size=4, report_to=[],
            use_cpu=True, disable_tqdm=True, learning_rate=1e-2, lr_scheduler_type="constant",
        )  # fmt: skip
        trainer = transformers.Trainer(build(), arguments, train_dataset=rows, callbacks=callbacks)
        trainer.train(resume_from_checkpoint=resume or None)
        return [line["loss"] for line in trainer.state.log_history if "loss" in line]

    callback = ApplyCallback(strict=True)
    expected = losses(tmp_path / "plain", [], 6, False)
    losses(tmp_path / "fused", [callback], 3, False)
    resumed = losses(tmp_path / "fused", [ApplyCallback()], 6, True)
    assert len(callback.report.fused) == 14
    assert resumed == pytest.approx(expected, rel=1e-4)


def test_randomized_adapters_do_something() -> None:
    """The other tests would pass with a LoRA that is switched off, if B were zero."""
    model = build()
    with model.disable_adapter():
        base = run(model)[0]
    assert (run(model)[0] - base).abs().max() > 0.1
    randomize(model, 1)
