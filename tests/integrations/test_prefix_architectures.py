"""Which models carry prefixes, with the results of the same prefix in a cache; and what is refused, with the reason."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import transformers

import peft_kernels as pk
from peft_kernels import PrefixEncoder
from peft_kernels.integrations import transformers as integration
from peft_kernels.integrations.transformers import prefix_encoder
from peft_kernels.integrations.transformers.prefix_state import PrefixCache, unmark
from tests.integrations.models import LAYERS, tokens
from tests.integrations.prefixes import CLOSE, P, base, padding, with_prefix


def _other(name: str, **options: object) -> nn.Module:
    sizes = {
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.3,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **{**sizes, **options})
    return transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


_FALCON_H1 = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
_GEMMA = {
    "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 61,
}  # fmt: skip


class TestOtherArchitectures:
    """Positions, masks and caches are each model's own, so each is asked."""

    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
            ("gpt_neox", {}),
            ("phi", {}),
            ("roberta", {}),
            ("mixtral", {"num_local_experts": 2}),
            ("gemma3_text", {"query_pre_attn_scalar": 8, "sliding_window": 6}),
            ("llama4_text", {"num_local_experts": 2, "num_experts_per_tok": 1, "attention_chunk_size": 5}),
        ],
    )
    def test_equals_the_prefix_in_a_cache(self, name: str, options: dict[str, object]) -> None:
        model = _other(name, **options)
        plain, encoder = copy.deepcopy(model), integration.prefix_encoder(model, P)
        integration.add_prefix(model, encoder)
        pairs = [tuple(part[None].expand(3, -1, -1, -1) for part in pair) for pair in encoder()]
        for side in ("none", "left", "right"):
            mask = padding(side)
            widened = None if mask is None else torch.cat((mask.new_ones(3, P), mask), dim=1)
            expected = plain(tokens(), attention_mask=widened, past_key_values=transformers.DynamicCache(pairs)).logits
            torch.testing.assert_close(model(tokens(), attention_mask=mask).logits, expected, **CLOSE)

    @pytest.mark.parametrize(
        ("name", "options", "reason"),
        [
            ("stablelm", {}, r"layers\.0 hands no keyword arguments on"),
            ("deepseek_v3", {}, "keys and values are compressed"),
            ("gpt_oss", {"num_local_experts": 2}, "AttentionInterface, or not as SDPA does"),
            ("bloom", {}, "AttentionInterface, or not as SDPA does"),
            ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2}, "AttentionInterface, or not as SDPA does"),
            ("mamba", {}, "AttentionInterface, or not as SDPA does"),
            ("minimax", {"num_local_experts": 2, "block_size": 4}, "not every layer has one self-attention"),
            ("falcon_h1", _FALCON_H1, "more than keys and values"),
            ("diffllama", {}, "the keys and values that its cache returned"),
            ("jetmoe", {"kv_channels": 8, "num_local_experts": 2}, "the keys and values that its cache returned"),
            (
                "gemma3n_text",
                _GEMMA | {"laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 4},
                "its cache returned",
            ),
            ("gemma4_text", _GEMMA, "the keys and values that its cache returned"),
            ("minimax_m3_vl_text", {}, "takes block_indices"),
        ],
    )
    def test_refused(self, name: str, options: dict[str, object], reason: str) -> None:
        """By all that put prefixes on, before anything changes; a PEFT model runs PEFT's own code."""
        model = _other(name, **options)
        for put in (lambda: integration.add_prefix(model, PrefixEncoder(2, 2, 8, P)), lambda: prefix_encoder(model, P)):
            with pytest.raises(pk.UnsupportedError, match=reason):
                put()
        peft = pytest.importorskip("peft")
        config = peft.PrefixTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=P, num_layers=2, token_dim=32, num_attention_heads=4
        )
        with pytest.warns(UserWarning, match=reason):
            assert not pk.apply(peft.PeftModelForCausalLM(model, config)).fused


class TestMasksMadeOutside:
    """A model around the text model makes its masks, and counts the prefix in them."""

    @pytest.mark.parametrize("side", ["none", "left", "right"])
    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    def test_gemma_3_with_images(self, implementation: str, side: str) -> None:
        model = _gemma3(implementation)
        plain, encoder, mask = copy.deepcopy(model), integration.prefix_encoder(model, P), padding(side)
        config = model.config
        integration.add_prefix(model, encoder)
        pairs = [tuple(part[None].expand(3, -1, -1, -1) for part in pair) for pair in encoder()]
        widened = None if mask is None else torch.cat((mask.new_ones(3, P), mask), dim=1)
        expected = plain(tokens(), attention_mask=widened, past_key_values=transformers.DynamicCache(pairs)).logits
        torch.testing.assert_close(model(tokens(), attention_mask=mask).logits, expected, **CLOSE)
        integration.remove_prefix(model)
        assert model.config is config is model.model.config
        torch.testing.assert_close(model(tokens()).logits, plain(tokens()).logits, **CLOSE)

    def test_other_implementations_are_refused(self) -> None:
        model = _gemma3("sdpa")
        model.model.config._attn_implementation_internal = "flex_attention"
        with pytest.raises(pk.UnsupportedError, match="masks are made outside of the text model for 'flex_attention'"):
            integration.prefix_encoder(model, P)

    def test_masks_by_the_kind_of_layer(self) -> None:
        """As generate makes them for a static cache where the configuration tells kinds of layers apart."""
        model = _other("qwen2")
        integration.add_prefix(model, integration.prefix_encoder(model, P))
        options = {"max_new_tokens": 5, "do_sample": False, "disable_compile": True, "attention_mask": padding("left")}
        expected = model.generate(tokens(), **options)
        assert torch.equal(model.generate(tokens(), cache_implementation="static", **options), expected)


class TestRefused:
    def test_wrong_encoder(self) -> None:
        model = base("llama")
        with pytest.raises(ValueError, match=r"must have .* = \(2, 2, 8\), got \(2, 4, 8\)"):
            integration.add_prefix(model, PrefixEncoder(LAYERS, 4, 8, P))
        with pytest.raises(ValueError, match="encoder must be a PrefixEncoder, got Linear"):
            integration.add_prefix(model, nn.Linear(2, 2))
        assert model.config._attn_implementation == "sdpa"

    def test_twice_and_without(self) -> None:
        model, encoder = with_prefix("llama")
        with pytest.raises(ValueError, match="has prefixes already"):
            integration.add_prefix(model, encoder)
        integration.remove_prefix(model)
        with pytest.raises(ValueError, match="has no prefixes"):
            integration.remove_prefix(model)

    @pytest.mark.parametrize(
        ("model", "reason"),
        [
            (lambda: nn.Linear(2, 2), "no transformers model"),
            (lambda: base("t5"), "encoder-decoder"),
            (lambda: _gemma2(), "caps the scores"),
            (lambda: base("bert", is_decoder=True, add_cross_attention=True), "it has cross-attention"),
            (lambda: _albert(), "not every layer has one self-attention module"),
        ],
    )
    def test_models(self, model: object, reason: str) -> None:
        with pytest.raises(pk.UnsupportedError, match=reason):
            integration.add_prefix(model(), PrefixEncoder(2, 2, 8, P))

    def test_forward_past_the_hooks(self) -> None:
        model, _ = with_prefix("llama")
        with pytest.raises(pk.UnsupportedError, match="layer 0 has a prefix that did not reach it"):
            model.model.forward(tokens())

    @pytest.mark.parametrize("change", ["changes", "exchanges"])
    def test_keys_that_are_not_the_cache_s(self, change: str) -> None:
        """Where no source told, as behind a decorator that changes what it wraps: never a wrong result."""
        model, _ = with_prefix("llama")
        update = PrefixCache.update

        def other(self: PrefixCache, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
            k, v = update(self, k, v, *args, **kwargs)
            return (2 * k, v) if change == "changes" else (v, k)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(pk.UnsupportedError, match="layer 0 attends to keys"):
            patch.setattr(PrefixCache, "update", other)
            model(tokens())

    def test_a_layer_that_passes_its_prefix_over(self) -> None:
        model, _ = with_prefix("llama")
        unmark(model.model.layers[1].self_attn)
        with pytest.raises(pk.UnsupportedError, match=r"only the layers \[0\] of 2 attended"):
            model(tokens())

    def test_another_attention_implementation(self) -> None:
        model, _ = with_prefix("llama")
        model.set_attn_implementation("eager")
        with pytest.raises(pk.UnsupportedError, match="attention implementation was changed to 'eager'"):
            model(tokens())

    def test_output_attentions(self) -> None:
        model, _ = with_prefix("llama")
        with pytest.raises(pk.UnsupportedError, match="attention probabilities are not computed"):
            model(tokens(), output_attentions=True)


def _gemma3(implementation: str) -> nn.Module:
    text = {
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 6, "initializer_range": 0.3,
        "layer_types": ["sliding_attention", "full_attention"],
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    torch.manual_seed(0)
    images = {"image_token_id": 60, "boi_token_id": 58, "eoi_token_id": 59}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, attn_implementation=implementation, **images
    )
    return transformers.Gemma3ForConditionalGeneration(config).eval().requires_grad_(False)


def _gemma2() -> nn.Module:
    config = transformers.Gemma2Config(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    return transformers.Gemma2ForCausalLM(config)


def _albert() -> nn.Module:
    config = transformers.AlbertConfig(
        vocab_size=61, embedding_size=16, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4,
    )  # fmt: skip
    return transformers.AlbertModel(config)
