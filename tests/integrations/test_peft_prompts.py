"""apply and revert on PEFT's prefix and prompt tuning models: equal results, and PEFT's features as before."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft_kernels as pk
from peft_kernels.integrations.peft import prompts
from peft_kernels.integrations.transformers import interface
from peft_kernels.prompt import prompt_tuning
from python_ref import compare
from tests.integrations.models import LAYERS, tokens
from tests.integrations.peft_prompts import CONFIGS, TASKS, build, generate, inputs, pair, run, task_base
from tests.integrations.prefixes import CLOSE, P, padding

PROJECTED = {"prefix_projection": True, "encoder_hidden_size": 6}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels' calls by name."""
    made: list[str] = []

    def prefix(*args: object, **kwargs: object) -> Tensor:
        made.append("prefix")
        return pk.prefix_attention(*args, **kwargs)

    def prompt(*args: object) -> Tensor:
        made.append("prompt")
        return prompt_tuning(*args)

    monkeypatch.setattr(interface, "prefix_attention", prefix)
    monkeypatch.setattr(prompts, "prompt_tuning", prompt)
    return made


def _assert_same(fused: nn.Module, plain: nn.Module, arguments: dict[str, Tensor]) -> None:
    (outputs, gradients), (expected, expected_gradients) = run(fused, arguments), run(plain, arguments)
    assert len(outputs) == len(expected)
    for output, other in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, other, **CLOSE)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], **CLOSE, msg=lambda text, n=name: f"{n}: {text}")


class TestEqualsPeft:
    @pytest.mark.parametrize("side", ["none", "left", "right"])
    @pytest.mark.parametrize(("architecture", "task"), TASKS)
    @pytest.mark.parametrize("kind", CONFIGS)
    def test_tasks(self, kind: str, architecture: str, task: str, side: str, calls: list[str]) -> None:
        fused, plain, report = pair(kind, architecture, task)
        assert report.fused == ("the model",) and not report.fallbacks
        # PEFT's own classification of tokens behind a prompt has no labels of its length.
        labels = not (kind == "prompt" and task == "TOKEN_CLS")
        for train in (False, True):
            for model in (fused, plain):
                model.train(train)
            calls.clear()
            _assert_same(fused, plain, inputs(architecture, task, labels, padding(side)))
            assert calls == ["prefix"] * LAYERS if kind == "prefix" else calls == ["prompt"]
        assert not report.fallback_calls

    @pytest.mark.parametrize(("architecture", "task"), [("llama", "CAUSAL_LM"), ("bert", "SEQ_CLS")])
    def test_projection_while_training(self, architecture: str, task: str) -> None:
        fused, plain, report = pair("prefix", architecture, task, **PROJECTED)
        _assert_same(fused.train(), plain.train(), inputs(architecture, task, True, padding("left")))
        assert not report.fallback_calls
        assert len([name for name in run(fused, inputs(architecture, task, True, None))[1] if "transform" in name]) == 4

    def test_prompts_of_an_encoder_decoder(self) -> None:
        fused, plain, report = pair("prompt", "t5", "SEQ_2_SEQ_LM")
        for side in ("none", "left"):
            _assert_same(fused, plain, inputs("t5", "SEQ_2_SEQ_LM", True, padding(side)))
        assert torch.equal(generate(fused, padding("left")), generate(plain, padding("left")))
        assert report.fused and not report.fallback_calls

    @pytest.mark.parametrize("kind", CONFIGS)
    def test_other_inputs(self, kind: str) -> None:
        """Embeddings instead of ids, positions, token types."""
        fused, plain, _ = pair(kind)
        embeddings = fused.get_base_model().get_input_embeddings()(tokens()).detach()
        with warnings.catch_warnings():
            # PEFT says which of these it ignores for prompts.
            warnings.simplefilter("ignore")
            for extra in ({"attention_mask": padding("left")}, {"position_ids": torch.arange(7)[None] * 2}):
                _assert_same(fused, plain, {"inputs_embeds": embeddings, **extra})
            fused, plain, _ = pair(kind, "bert", "SEQ_CLS")
            arguments = {"token_type_ids": (tokens() % 2), "position_ids": torch.arange(7).flip(0)[None].expand(3, 7)}
            _assert_same(fused, plain, {"input_ids": tokens(), **arguments})

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("kind", CONFIGS)
    def test_half_precision_base(self, kind: str, dtype: torch.dtype) -> None:
        """As close to a float64 run as PEFT itself is, by the error budget; errors of a whole model scatter."""
        draws = []
        for seed in range(12):
            plain = build(kind, seed=seed)
            exact = copy.deepcopy(plain).double()
            plain.base_model.to(dtype)
            fused = copy.deepcopy(plain)
            report = pk.apply(fused)
            draws.append([run(model, {"input_ids": tokens()})[0][0] for model in (fused, plain, exact)])
            gradients = run(fused, {"input_ids": tokens()})[1]
            assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
            assert not report.fallback_calls
        compare.assert_close("logits", *(torch.stack(logits) for logits in zip(*draws, strict=True)))

    @pytest.mark.parametrize("window", [6, 9, P + 7])
    def test_sliding_window(self, window: int) -> None:
        """In PEFT it slides over the prefix."""
        plain = peft.get_peft_model(
            task_base("mistral", sliding_window=window), CONFIGS["prefix"](task_type="CAUSAL_LM", num_virtual_tokens=P)
        )
        fused = copy.deepcopy(plain)
        pk.apply(fused)
        for side in ("none", "left"):
            _assert_same(fused, plain, inputs("mistral", "CAUSAL_LM", True, padding(side)))
        assert torch.equal(generate(fused, padding("left")), generate(plain, padding("left")))


class TestGeneration:
    @pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}], ids=str)
    @pytest.mark.parametrize("side", ["none", "left"])
    @pytest.mark.parametrize("architecture", ["llama", "qwen2", "mistral", "gpt2"])
    @pytest.mark.parametrize("kind", CONFIGS)
    def test_same_tokens(self, kind: str, architecture: str, side: str, options: dict[str, object]) -> None:
        fused, plain, report = pair(kind, architecture)
        results = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for model in (fused, plain):
                torch.manual_seed(0)
                results.append(generate(model, padding(side), **options))
        assert torch.equal(*results)
        assert not report.fallback_calls

    def test_training_fills_no_cache(self) -> None:
        fused, _, _ = pair("prefix")
        assert fused.train()(tokens()).past_key_values is None


@pytest.mark.parametrize("options", [{}, PROJECTED], ids=["rows", "projection"])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(("architecture", "task"), [("llama", "CAUSAL_LM"), ("bert", "SEQ_CLS")])
def test_prefixes_under_gradient_checkpointing(
    architecture: str, task: str, use_reentrant: bool, options: dict[str, object]
) -> None:
    """PEFT refuses it: its prefix is in the cache, which a checkpointed layer does not get."""
    fused, plain, report = pair("prefix", architecture, task, **options)
    arguments = inputs(architecture, task, True, padding("left"))
    (expected, *_), expected_gradients = run(fused.train(), arguments)
    for model in (fused, plain):
        model.get_base_model().enable_input_require_grads()
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    (loss, *_), gradients = run(fused, arguments)
    compare.assert_bitwise_equal("loss", loss, expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-5, atol=1e-7)
    assert not report.fallback_calls
    with pytest.raises(RuntimeError, match=r"size|expand"):
        run(plain.train(), arguments)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "options"), [("prefix", PROJECTED), ("prompt", {})])
def test_compiles_without_graph_break(kind: str, options: dict[str, object]) -> None:
    torch._dynamo.reset()
    fused, plain, _ = pair(kind, **options)
    arguments = inputs("llama", "CAUSAL_LM", True, padding("left"))
    compiled = torch.compile(fused.train(), fullgraph=True, backend="aot_eager")
    outputs, gradients = run(compiled, arguments)
    expected, expected_gradients = run(plain.train(), arguments)
    torch.testing.assert_close(outputs, expected, **CLOSE)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[f"_orig_mod.{name}"], gradient, **CLOSE)


class TestFeatures:
    @pytest.mark.parametrize("kind", CONFIGS)
    def test_revert_leaves_no_trace(self, kind: str) -> None:
        model = build(kind)
        before = {name: _traces(module) for name, module in model.named_modules()}
        expected, _ = run(model, {"input_ids": tokens()})
        pk.apply(model)
        run(model, {"input_ids": tokens()})
        pk.revert(model)
        assert {name: _traces(module) for name, module in model.named_modules()} == before
        compare.assert_bitwise_equal("logits", run(model, {"input_ids": tokens()})[0][0], expected[0])

    @pytest.mark.parametrize("kind", CONFIGS)
    def test_applying_twice_changes_nothing(self, kind: str) -> None:
        fused, plain, first = pair(kind)
        hooks = len(fused.get_base_model().base_model._forward_pre_hooks)
        assert pk.apply(fused) == first
        assert len(fused.get_base_model().base_model._forward_pre_hooks) == hooks
        _assert_same(fused, plain, {"input_ids": tokens()})

    @pytest.mark.parametrize("kind", CONFIGS)
    def test_disable_adapter(self, kind: str) -> None:
        fused, plain, report = pair(kind)
        base = task_base("llama")
        for side in ("none", "left"):
            arguments = inputs("llama", "CAUSAL_LM", False, padding(side))
            with fused.disable_adapter(), plain.disable_adapter(), torch.no_grad():
                got, expected = fused(**arguments).logits, plain(**arguments).logits
                torch.testing.assert_close(got, expected, **CLOSE)
                torch.testing.assert_close(got, base(**arguments).logits, **CLOSE)
                assert torch.equal(generate(fused, padding(side)), generate(plain, padding(side)))
            _assert_same(fused, plain, arguments)
        assert not report.fallback_calls

    @pytest.mark.parametrize("kind", CONFIGS)
    def test_several_adapters(self, kind: str) -> None:
        fused, plain, report = pair(kind, adapters=3)
        for name in ("other2", "default", "other1"):
            for model in (fused, plain):
                model.set_adapter(name)
            _assert_same(fused, plain, {"input_ids": tokens()})
        for model in (fused, plain):
            model.delete_adapter("default")
            model.add_adapter("late", CONFIGS[kind](task_type="CAUSAL_LM", num_virtual_tokens=2))
        plain.prompt_encoder["late"].load_state_dict(fused.prompt_encoder["late"].state_dict())
        for model in (fused, plain):
            model.set_adapter("late")
        _assert_same(fused, plain, {"input_ids": tokens()})
        assert not report.fallback_calls

    @pytest.mark.parametrize("kind", CONFIGS)
    def test_copies(self, kind: str) -> None:
        fused, plain, _ = pair(kind)
        buffer = io.BytesIO()
        torch.save(fused, buffer)
        buffer.seek(0)
        copies = copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), torch.load(buffer, weights_only=False)
        for copied in copies:
            assert type(copied) is type(fused)
            _assert_same(copied, plain, {"input_ids": tokens()})

    @pytest.mark.parametrize(("kind", "options"), [("prefix", {}), ("prefix", PROJECTED), ("prompt", {})])
    def test_save_and_load(self, kind: str, options: dict[str, object], tmp_path: Path) -> None:
        """What an applied model saves, PEFT loads, and a loaded model can be applied; files have no projection."""
        fused, _, _ = pair(kind, **options)
        fused.save_pretrained(tmp_path)
        expected = run(fused.eval(), {"input_ids": tokens()})[0][0]
        loaded = peft.PeftModel.from_pretrained(task_base("llama"), tmp_path)
        with torch.no_grad():
            torch.testing.assert_close(loaded(tokens()).logits, expected, **CLOSE)
            report = pk.apply(loaded)
            torch.testing.assert_close(loaded(tokens()).logits, expected, **CLOSE)
        assert report.fused and not report.fallback_calls

    def test_saved_here_loads_where_this_package_is_absent(self, tmp_path: Path) -> None:
        """Adapters, and a base model that carries no attention implementation of ours along."""
        for kind in CONFIGS:
            fused, _, _ = pair(kind)
            fused.save_pretrained(tmp_path / kind)
            fused.get_base_model().save_pretrained(tmp_path / f"{kind} base")
            torch.save(run(fused, {"input_ids": tokens()})[0][0], tmp_path / f"{kind}.pt")
        program = f"""
import sys
sys.modules["peft_kernels"] = None
import torch, peft, transformers
folder = {str(tmp_path)!r}
ids = torch.randint(1, {fused.config.vocab_size}, (3, 7), generator=torch.Generator().manual_seed(0))
for kind in ("prefix", "prompt"):
    base = transformers.LlamaForCausalLM.from_pretrained(f"{{folder}}/{{kind}} base").eval()
    model = peft.PeftModel.from_pretrained(base, f"{{folder}}/{{kind}}")
    torch.testing.assert_close(model(ids).logits.detach(), torch.load(f"{{folder}}/{{kind}}.pt"), rtol=1e-5, atol=1e-5)
print("equal")
"""
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert result.stdout.endswith("equal\n"), result.stderr

    @pytest.mark.parametrize("kind", CONFIGS)
    def test_loading_into_an_applied_model(self, kind: str, tmp_path: Path) -> None:
        build(kind, seed=3).save_pretrained(tmp_path)
        fused, plain, report = pair(kind)
        for model in (fused, plain):
            model.load_adapter(str(tmp_path), "loaded")
            model.set_adapter("loaded")
        _assert_same(fused, plain, {"input_ids": tokens()})
        assert not report.fallback_calls


def _traces(module: nn.Module) -> tuple[object, ...]:
    hooks = [getattr(module, name) for name in vars(module) if "hooks" in name]
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
    return type(module), set(vars(module)), set(module._modules), [dict(hook) for hook in hooks if hook], implementation


class TestFallbacks:
    """Where PEFT does something else, it is PEFT's code that runs, counted; or nothing is touched, with a reason."""

    @pytest.mark.parametrize("kind", CONFIGS)
    def test_hooks_on_the_encoder_run(self, kind: str) -> None:
        fused, plain, report = pair(kind)
        seen = []
        fused.prompt_encoder["default"].embedding.register_forward_hook(lambda *_: seen.append(1))
        for side in ("none", "left"):
            _assert_same(fused, plain, inputs("llama", "CAUSAL_LM", True, padding(side)))
        assert torch.equal(generate(fused, padding("left")), generate(plain, padding("left")))
        assert seen and set(report.fallback_calls) == {"there are hooks on its encoder"}

    def test_another_attention_implementation(self) -> None:
        fused, plain, report = pair("prefix")
        for model in (fused, plain):
            model.get_base_model().set_attn_implementation("eager")
        _assert_same(fused, plain, inputs("llama", "CAUSAL_LM", True, padding("left")))
        assert set(report.fallback_calls) == {"the attention implementation was changed to 'eager'"}

    @pytest.mark.parametrize("kind", CONFIGS)
    def test_an_encoder_of_another_kind(self, kind: str) -> None:
        fused, plain, report = pair(kind)
        encoder = fused.prompt_encoder["default"]
        encoder.__class__ = type("Derived", (type(encoder),), {})
        _assert_same(fused, plain, {"input_ids": tokens()})
        assert "its encoder is a Derived" in next(iter(report.fallback_calls))

    @pytest.mark.parametrize("prefixes", [True, False])
    def test_attention_probabilities(self, prefixes: bool) -> None:
        """A call that wants them is PEFT's own, and one without prefixes the model's own."""
        plain = peft.get_peft_model(
            task_base("llama", _attn_implementation="eager"), build("prefix").active_peft_config
        )
        fused = copy.deepcopy(plain)
        report = pk.apply(fused)
        arguments = {"input_ids": tokens(), "attention_mask": padding("left"), "output_attentions": True}
        with (
            nullcontext() if prefixes else fused.disable_adapter(),
            nullcontext() if prefixes else plain.disable_adapter(),
        ):
            got, expected = fused(**arguments), plain(**arguments)
        compare.assert_bitwise_equal("logits", got.logits, expected.logits)
        assert len(expected.attentions) == LAYERS
        for one, other in zip(got.attentions, expected.attentions, strict=True):
            compare.assert_bitwise_equal("attentions", one, other)
        assert set(report.fallback_calls) == ({"attention probabilities are not computed"} if prefixes else set())

    def test_models_that_are_left_alone(self) -> None:
        encoder_decoder = build("prefix", "t5", "SEQ_2_SEQ_LM")
        p_tuning = peft.get_peft_model(
            task_base("llama"),
            peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=P, encoder_hidden_size=6),
        )
        for model, reason in ((encoder_decoder, "encoder-decoder"), (p_tuning, "it is PEFT's P_TUNING")):
            cls, expected = type(model), run(model, inputs(model.config.model_type, "CAUSAL_LM", True, None))
            with pytest.warns(UserWarning, match="0 modules fused, 1 not"):
                report = pk.apply(model)
            assert reason in report.fallbacks["the model"]
            with pytest.raises(pk.UnsupportedError, match=reason):
                pk.apply(model, strict=True)
            got = run(model, inputs(model.config.model_type, "CAUSAL_LM", True, None))
            compare.assert_bitwise_equal("loss", got[0][0], expected[0][0])
            assert type(model) is cls


class TestRepeatedPrompt:
    """It stands for the tensor that PEFT would make, in the only place where it may."""

    def test_joins_and_cuts(self) -> None:
        weight, embeddings = torch.randn(4, 3), torch.randn(2, 5, 3)
        prompt = prompts.RepeatedPrompt(weight)
        joined = torch.cat((prompt.to(torch.float32)[:, :3], embeddings), dim=1)
        assert torch.equal(joined, torch.cat((weight[:3].expand(2, 3, 3), embeddings), dim=1))

    def test_elsewhere_it_is_refused(self) -> None:
        prompt, embeddings = prompts.RepeatedPrompt(torch.randn(4, 3)), torch.randn(2, 5, 3)
        for wrong in (lambda: torch.cat((embeddings, prompt), dim=1), lambda: torch.cat((prompt, embeddings), dim=0)):
            with pytest.raises(ValueError, match="can only be joined with token embeddings that follow it"):
                wrong()
        with pytest.raises(ValueError, match="cut by its tokens alone"):
            prompt[:1, :2]
        with pytest.raises(TypeError):
            torch.stack((prompt, embeddings))
