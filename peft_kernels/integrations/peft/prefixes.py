"""What prompts.py needs for prefix tuning: PEFT's prefixes as ``LayerPrefixes``, and the hooks that carry them.

PEFT hands the model a ``PrefixCache`` where it would hand it keys and values of every row. A hook on the backbone takes
the prefixes out of it and gives them to the attention function as an argument, which activation checkpointing keeps.
"""

from __future__ import annotations

import functools
from typing import Any

from peft.utils.constants import TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING
from transformers import DynamicCache

from peft_kernels.integrations.hooks import named_arguments, remove_hooks
from peft_kernels.integrations.rules import Support
from peft_kernels.integrations.transformers import interface, prefix_model
from peft_kernels.integrations.transformers.prefix_state import ARGUMENT, LayerPrefixes, Pairs, PrefixCache, slot_of

SUPPORT = Support("PEFT: prefixes alone")
_OTHER_LAYOUT = SUPPORT.rule(
    "model types that PEFT rearranges prefixes for",
    "PEFT has a layout of its own for prefixes of this model type",
)
_OTHER_LAYERS = SUPPORT.rule(
    "a configuration for another number of layers", "its prefix is for another number of layers"
)
_OTHER_ATTENTION = SUPPORT.rule(
    "`set_attn_implementation` after `apply`", f"the attention implementation is no longer {interface.NAME!r}"
)


def why_not(model: Any) -> str | None:
    """Reason why the prefixes of PEFT's model cannot be fused, None if they can."""
    if model.config.model_type in TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING:
        return _OTHER_LAYOUT()
    return prefix_model.why_not(model.get_base_model())


def why_not_call(model: Any) -> str | None:
    """Reason that lies in the active adapter's sizes, or in what became of the base model."""
    modules = prefix_model.attention_modules(model.get_base_model())
    if model.active_peft_config.num_layers != len(modules):
        return _OTHER_LAYERS()
    if any(slot_of(part) is None or part.config._attn_implementation != interface.NAME for part in modules):
        return _OTHER_ATTENTION()
    return None


def attach(model: Any) -> None:
    """Set the attention implementation of PEFT's base model, and hook its backbone."""
    base = model.get_base_model()
    prefix_model.attach(base, required=False)
    prefix_model.backbone(base).register_forward_pre_hook(_before, with_kwargs=True)
    prefix_model.backbone(base).register_forward_hook(_after, with_kwargs=True)


def detach(model: Any) -> None:
    """Undo ``attach``."""
    base = model.get_base_model()
    prefix_model.detach(base)
    remove_hooks(prefix_model.backbone(base), _before, _after)


def cache_of(model: Any) -> PrefixCache:
    """What PEFT's ``get_prompt`` returns, without keys and values in it."""
    prefixes = LayerPrefixes(functools.partial(_pairs, model), model.active_peft_config.num_virtual_tokens)
    return PrefixCache(prefixes, DynamicCache())


def _pairs(model: Any) -> Pairs:
    """PEFT's prefixes, layer by layer, without its repetition for each row."""
    config, encoder = model.active_peft_config, model.prompt_encoder[model.active_adapter]
    table = encoder.embedding.weight
    if encoder.prefix_projection and not config.inference_mode:
        table = encoder.transform(table)
    heads = config.num_attention_heads
    rows = table.view(config.num_virtual_tokens, 2 * config.num_layers, heads, config.token_dim // heads)
    pieces = rows.permute(1, 2, 0, 3).unbind(0)
    return tuple(zip(pieces[::2], pieces[1::2], strict=True))


def _before(base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Take the prefixes out of the cache, which layers may not see, and give them to the attention."""
    kwargs = named_arguments(base, args, kwargs)
    cache = kwargs.get("past_key_values")
    if isinstance(cache, PrefixCache):
        prefix_model.check_call(base, kwargs)
        cache.prefixes.taken.clear()
        kwargs[ARGUMENT] = cache.prefixes
        if cache.get_seq_length() == cache.prefixes.length and not prefix_model.stores(base, kwargs):
            cache = PrefixCache(cache.prefixes, None)
        kwargs["past_key_values"] = cache.delivered()
    return (), kwargs


def _after(base: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Check that each layer took its prefix, and hand out no cache that holds nothing."""
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, PrefixCache):
        return output
    prefix_model.check_all_taken(cache.prefixes)
    return output if cache.inner is not None else prefix_model.with_cache(output, cache, None)
