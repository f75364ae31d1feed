"""What leaves a PEFT model with prefixes is what PEFT hands out, whatever is done with it."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import peft_kernels as pk
from peft_kernels.integrations import transformers as integration
from python_ref import compare
from tests.integrations.models import LAYERS, tokens
from tests.integrations.peft_prompts import CONFIGS, TASKS, build, generate, inputs, pair, run, task_base
from tests.integrations.prefixes import CLOSE, P, padding


@torch.no_grad()
def _cache(model: nn.Module, **extra: object) -> transformers.DynamicCache:
    return model.eval()(input_ids=tokens(), use_cache=True, **extra).past_key_values


def _assert_equal(cache: transformers.Cache, expected: transformers.Cache) -> None:
    assert type(cache) is type(expected) and len(cache) == len(expected)
    for layer, other in zip(cache.layers, expected.layers, strict=True):
        assert layer.get_seq_length() == other.get_seq_length()
        torch.testing.assert_close(layer.keys, other.keys, **CLOSE)
        torch.testing.assert_close(layer.values, other.values, **CLOSE)
        assert type(layer) is type(other) and vars(layer).keys() == vars(other).keys()


def _saved(cache: transformers.Cache) -> transformers.Cache:
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _done(action: Callable[[transformers.Cache], object]) -> Callable[[transformers.Cache], transformers.Cache]:
    def do(cache: transformers.Cache) -> transformers.Cache:
        action(cache)
        return cache

    return do


class TestCacheOfACall:
    USES = {  # noqa: RUF012
        "kept": lambda cache: cache,
        "deepcopy": copy.deepcopy,
        "copy": copy.copy,
        "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
        "save": _saved,
        "a list of its layers": lambda cache: transformers.DynamicCache([layer[:2] for layer in cache]),
        "reorder": _done(lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0]))),
        "crop": _done(lambda cache: cache.crop(-2)),
        "crop into the prefix": _done(lambda cache: cache.crop(-9)),
        "repeat": _done(lambda cache: cache.batch_repeat_interleave(2)),
        "select": _done(lambda cache: cache.batch_select_indices(torch.tensor([1]))),
        "values in place": _done(lambda cache: cache.layers[0].values.mul_(2)),
        "set": _done(lambda cache: setattr(cache.layers[1], "keys", cache.layers[1].keys * 2)),
        "update": _done(lambda cache: cache.update(torch.ones(3, 2, 1, 8), torch.ones(3, 2, 1, 8), 0)),
    }

    @pytest.mark.parametrize("use", USES)
    def test_what_is_done_with_it(self, use: str) -> None:
        fused, plain, _ = pair("prefix")
        ours, theirs = (self.USES[use](_cache(model)) for model in (fused, plain))
        _assert_equal(ours, theirs)

    def test_reset(self) -> None:
        cache = _cache(pair("prefix")[0])
        cache.reset()
        assert cache.get_seq_length() == 0 and cache.layers[0].keys is None

    def test_gemma_3_has_sliding_layers(self) -> None:
        config = transformers.Gemma3TextConfig(
            vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, sliding_window=6, layer_types=["sliding_attention", "full_attention"],
        )  # fmt: skip
        plain = peft.get_peft_model(
            transformers.Gemma3ForCausalLM(config), CONFIGS["prefix"](task_type="CAUSAL_LM", num_virtual_tokens=P)
        )
        fused = copy.deepcopy(plain)
        assert pk.apply(fused).fused
        _assert_equal(_cache(fused), _cache(plain))

    def test_copies_nothing_of_the_model(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fused, plain, _ = pair("prefix")
        ours, theirs = _cache(fused), _cache(plain)
        monkeypatch.setattr(nn.Parameter, "__deepcopy__", None)
        copy.deepcopy(ours)
        assert len(pickle.dumps(ours)) < 1.1 * len(pickle.dumps(theirs))

    @pytest.mark.parametrize("to", ["itself", "a copy", "PEFT's", "the bare model"])
    def test_goes_on_in(self, to: str) -> None:
        """Whoever gets it attends to the prefix once."""
        fused, plain, _ = pair("prefix")
        receivers = {"itself": fused, "a copy": copy.deepcopy(fused), "PEFT's": plain, "the bare model": plain}
        receiver, ids = receivers[to].get_base_model(), tokens()
        with torch.no_grad():
            cache = fused.eval()(ids[:, :4], use_cache=True).past_key_values
            if to == "the bare model":
                receiver = task_base("llama")
            got = receiver(ids[:, 4:], past_key_values=cache)
            assert got.past_key_values is cache and cache.get_seq_length() == P + 7
            torch.testing.assert_close(got.logits, plain.eval()(ids).logits[:, 4:], **CLOSE)

    def test_one_that_was_looked_into_halfway(self) -> None:
        fused, plain, report = pair("prefix")
        ids = tokens()
        with torch.no_grad():
            cache = fused.eval()(ids[:, :4], use_cache=True).past_key_values
            assert cache.layers[1].keys.shape[2] == P + 4
            got = fused.get_base_model()(ids[:, 4:], past_key_values=cache).logits
            torch.testing.assert_close(got, plain.eval()(ids).logits[:, 4:], **CLOSE)
        assert not report.fallback_calls

    def test_outlives_the_parameters_and_the_adapter(self) -> None:
        """Its keys are those of the call, whatever the prefix became since."""
        fused, plain, _ = pair("prefix", adapters=2)
        ours, theirs = _cache(fused), _cache(plain)
        with torch.no_grad():
            fused.prompt_encoder["default"].embedding.weight.zero_()
        fused.set_adapter("other1")
        _assert_equal(ours, theirs)

    @pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
    def test_of_a_generation(self, options: dict[str, object]) -> None:
        results = []
        for model in pair("prefix")[:2]:
            torch.manual_seed(0)
            results.append(generate(model, padding("left"), return_dict_in_generate=True, **options))
        _assert_equal(*(result.past_key_values for result in results))

    def test_none_where_none_is_wanted(self) -> None:
        fused, plain, _ = pair("prefix")
        for model in (fused, plain):
            assert model.eval()(tokens(), use_cache=False).past_key_values is None or model is plain


class TestGetPrompt:
    @pytest.mark.parametrize("train", [False, True])
    @pytest.mark.parametrize(("architecture", "task"), TASKS)
    @pytest.mark.parametrize("kind", CONFIGS)
    def test_is_pefts(self, kind: str, architecture: str, task: str, train: bool) -> None:
        """Before a call, after one, and during one in a hook or in another thread."""
        fused, plain, report = pair(kind, architecture, task)
        expected = plain.train(train).get_prompt(2)
        asked = [fused.train(train).get_prompt(2)]
        backbone = fused.get_base_model().base_model
        backbone.register_forward_pre_hook(lambda *_: asked.append(fused.get_prompt(2)))

        def elsewhere(*_: object) -> None:
            thread = threading.Thread(target=lambda: asked.append(fused.get_prompt(2)))
            thread.start()
            thread.join()

        backbone.register_forward_pre_hook(elsewhere)
        run(fused, inputs(architecture, task, False, None))
        asked.append(fused.get_prompt(2))
        assert len(asked) == 4 and not report.fallback_calls
        for prompt in asked:
            if kind == "prefix":
                _assert_equal(prompt, expected)
            else:
                assert type(prompt) is Tensor
                compare.assert_bitwise_equal("prompt", prompt, expected)

    def test_of_an_encoder_decoder_after_a_generation(self) -> None:
        fused, plain, _ = pair("prompt", "t5", "SEQ_2_SEQ_LM")
        generate(fused, padding("left"))
        compare.assert_bitwise_equal("prompt", fused.get_prompt(3), plain.get_prompt(3))

    @pytest.mark.parametrize("where", ["get_prompt", "encoder"])
    def test_one_replaced_by_another_tool_runs(self, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
        for kind in CONFIGS:
            fused, plain, report = pair(kind)
            owner = peft.PeftModel if where == "get_prompt" else type(plain.prompt_encoder["default"])
            name = where if where == "get_prompt" else "forward"
            original = getattr(owner, name)
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, functools.wraps(original)(lambda *args, o=original, **kw: o(*args, **kw)))
                torch.testing.assert_close(fused(tokens()).logits, plain(tokens()).logits, **CLOSE)
                assert set(report.fallback_calls) == {"get_prompt or its encoder's forward is not PEFT's own"}


class TestConfiguration:
    """An attention implementation stands in a configuration, which may be shared."""

    def test_shared_by_two_models(self) -> None:
        first = task_base("llama", _attn_implementation="eager")
        second, (ids, config) = type(first)(first.config).eval(), (tokens(), first.config)
        expected = second(ids, output_attentions=True)
        for put in ("add_prefix", "apply"):
            if put == "apply":
                pk.apply(peft.get_peft_model(first, build("prefix").active_peft_config))
            else:
                integration.add_prefix(first, integration.prefix_encoder(first, P))
            assert first.config is config and second.model.config is config and config._attn_implementation == "eager"
            got = second(ids, output_attentions=True)
            compare.assert_bitwise_equal("attentions", got.attentions[0], expected.attentions[0])
            if put == "add_prefix":
                integration.remove_prefix(first)

    @pytest.mark.parametrize("through", ["the same model", "a deepcopy", "a pickle"])
    def test_attributes_are_of_the_model_s_own(self, through: str) -> None:
        model = task_base("llama")
        integration.add_prefix(model, integration.prefix_encoder(model, P))
        if through != "the same model":
            model = copy.deepcopy(model) if through == "a deepcopy" else pickle.loads(pickle.dumps(model))
        model.config.use_cache = False
        assert model(tokens()).past_key_values is None
        model.model.config.use_cache = True
        assert model.config.use_cache and model(tokens()).past_key_values is not None
        assert isinstance(model.model.config, transformers.LlamaConfig)
        assert model.model.config.to_dict() == model.config.to_dict()

    @pytest.mark.parametrize("order", [(0, 1), (1, 0)])
    def test_two_peft_models_of_one_base(self, order: tuple[int, int]) -> None:
        base = task_base("llama")
        config = base.config
        models = [peft.PeftModelForCausalLM(base, build("prefix").active_peft_config) for _ in range(2)]
        expected = [model(tokens()).logits for model in models]
        for model in models:
            assert pk.apply(model).fused
        pk.apply(models[0])
        for index in order:
            for model, logits in zip(models, expected, strict=True):
                torch.testing.assert_close(model(tokens()).logits, logits, **CLOSE)
            pk.revert(models[index])
            assert bool(base.model._forward_pre_hooks) == (index == order[0]), "the other one is on these kernels still"
        pk.revert(models[0])
        assert all(getattr(module, "config", config) is config for module in base.modules())
        assert not any("slot" in name for module in base.modules() for name in vars(module))
        assert not base.model._forward_pre_hooks and not base.model._forward_hooks

    def test_apply_over_add_prefix(self) -> None:
        base = task_base("llama")
        encoder = integration.prefix_encoder(base, 3)
        integration.add_prefix(base, encoder)
        alone = base(tokens()).logits
        model = peft.PeftModelForCausalLM(base, build("prefix").active_peft_config)
        both = model(tokens()).logits
        with pytest.warns(UserWarning, match="has a prefix of its own"):
            pk.apply(model)
        compare.assert_bitwise_equal("both", model(tokens()).logits, both)
        pk.revert(model)
        compare.assert_bitwise_equal("alone", base(tokens()).logits, alone)
        assert integration.remove_prefix(base) is encoder and base.config._attn_implementation == "sdpa"

    def test_add_prefix_over_apply(self) -> None:
        model = build("prefix")
        pk.apply(model)
        expected, base = model(tokens()).logits, model.get_base_model()
        with pytest.raises(ValueError, match="remove them first \\(revert"):
            integration.add_prefix(base, integration.prefix_encoder(base, 3))
        compare.assert_bitwise_equal("logits", model(tokens()).logits, expected)


def test_a_call_without_prefixes_is_the_model_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its own attention and masks: disabled, of the base model, or after a call that failed."""
    plain = peft.get_peft_model(task_base("llama", _attn_implementation="eager"), build("prefix").active_peft_config)
    fused = copy.deepcopy(plain)
    pk.apply(fused)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="broken"):
        patch.setattr(fused.get_base_model().lm_head, "forward", _broken)
        fused(tokens())
    arguments = {"input_ids": tokens(), "attention_mask": padding("left"), "output_attentions": True}
    got, expected = (model.get_base_model()(**arguments) for model in (fused, plain))
    assert len(got.attentions) == LAYERS
    compare.assert_bitwise_equal("logits", got.logits, expected.logits)
    compare.assert_bitwise_equal("attentions", got.attentions[1], expected.attentions[1])


def _broken(*args: object) -> None:
    raise RuntimeError("broken")
