"""What prompts.py needs for prefix tuning: PEFT's prefixes as ``LayerPrefixes``, and the hooks that carry them.

PEFT hands the model a cache whose layers count the prefix and do not hold it, where it would hand it keys and values of
every row. A hook on the backbone takes the prefixes out of it and gives them to the attention function as an argument,
which activation checkpointing keeps. Whoever else reads the cache finds in it what PEFT would have put there.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING
from peft.utils.integrations import get_layer_device_map
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from peft_kernels.integrations.hooks import named_arguments, remove_hooks
from peft_kernels.integrations.report import count_fallback
from peft_kernels.integrations.rules import Support
from peft_kernels.integrations.transformers import cache_argument, interface, prefix_model
from peft_kernels.integrations.transformers.prefix_state import (
    ARGUMENT,
    LayerPrefixes,
    Pairs,
    PrefixCache,
    PrefixedLayer,
    prefixes_in,
    slot_of,
)

SUPPORT = Support("PEFT: prefixes alone")
_OTHER_LAYOUT = SUPPORT.rule(
    "model types that PEFT rearranges prefixes for",
    "PEFT has a layout of its own for prefixes of this model type",
)
_OTHER_LAYERS = SUPPORT.rule(
    "a configuration for another number of layers", "its prefix is for another number of layers"
)
_OVER_PREFIX = SUPPORT.rule("a base model with `add_prefix`", "its base model has a prefix of its own (add_prefix)")

# Parts of the model types whose cache has the layers that the configuration asks for; PEFT's others are all plain.
_CONFIGURED = ("gemma2", "gemma3_text", "gemma4")


def why_not(model: Any) -> str | None:
    """Reason why the prefixes of PEFT's model cannot be fused, None if they can."""
    if getattr(model.config, "model_type", None) in TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING:
        return _OTHER_LAYOUT()
    base = model.get_base_model()
    slots = [slot for slot in map(slot_of, base.modules()) if slot is not None]
    return _OVER_PREFIX() if slots and slots[0].required else prefix_model.why_not(base)


def why_not_call(model: Any) -> str | None:
    """Reason that lies in the active adapter's sizes."""
    layers, heads, head_dim = prefix_model.sizes(model.get_base_model())
    config = model.active_peft_config
    if (config.num_layers, config.num_attention_heads, config.token_dim) != (layers, heads, heads * head_dim):
        return _OTHER_LAYERS()
    return None


def attach(model: Any) -> None:
    """Set the attention implementation of PEFT's base model, and hook its backbone."""
    base = model.get_base_model()
    if prefix_model.attach(base, required=False):
        prefix_model.backbone(base).register_forward_pre_hook(_before, with_kwargs=True)
        prefix_model.backbone(base).register_forward_hook(_after, with_kwargs=True)


def detach(model: Any) -> None:
    """Undo ``attach``."""
    base = model.get_base_model()
    if prefix_model.detach(base):
        remove_hooks(prefix_model.backbone(base), _before, _after)


def cache_of(model: Any, rows: int) -> DynamicCache:
    """What PEFT's ``get_prompt`` returns, without keys and values in it until they are asked for."""
    prefixes = _Prefixes(model)
    base, cache = model.get_base_model(), DynamicCache()
    text = base.config.get_text_config()
    configured = any(part in base.config.model_type for part in _CONFIGURED)
    plain = DynamicCache(config=text).layers if configured else [DynamicLayer() for _ in prefixes.pairs]
    devices: Any = get_layer_device_map(base) if hasattr(base, "hf_device_map") else {}
    cache.layers = [
        PrefixedLayer(prefixes, index, rows, layer, model.base_model_torch_dtype, devices.get(index))
        for index, layer in enumerate(plain)
    ]
    return cache


class _Prefixes(LayerPrefixes):
    """A PEFT model's prefixes."""

    def __init__(self, model: Any) -> None:
        super().__init__(functools.partial(_pairs, model), model.active_peft_config.num_virtual_tokens)
        self.model = model


def _pairs(model: Any) -> Pairs:
    """PEFT's prefixes, layer by layer, without its repetition for each row."""
    config, encoder = model.active_peft_config, model.prompt_encoder[model.active_adapter]
    table = encoder.embedding.weight
    if encoder.prefix_projection and not config.inference_mode:
        table = encoder.transform(table)
    heads = config.num_attention_heads
    rows = table.view(config.num_virtual_tokens, 2 * config.num_layers, heads, config.token_dim // heads)
    # A copy, not views of the parameter, whose values a cache may outlive.
    pieces = rows.permute(1, 2, 0, 3).clone(memory_format=torch.contiguous_format).unbind(0)
    return tuple(zip(pieces[::2], pieces[1::2], strict=True))


def _before(base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Take the prefixes out of the cache, which layers may not see, and give them to the attention."""
    kwargs = named_arguments(base, args, kwargs)
    cache: Any = cache_argument.cache_in(kwargs)
    prefixes: Any = prefixes_in(cache)
    reason = None if prefixes is None else prefix_model.why_not_call(base, kwargs)
    if reason is not None:
        count_fallback(prefixes.model, reason)
        prefixes = None
    interface.begin_call(has_prefixes=prefixes is not None)
    if prefixes is not None:
        prefixes.begin()
        stored = cache.get_seq_length() > prefixes.length or prefix_model.stores(base, kwargs)
        kwargs[ARGUMENT] = prefixes
        cache_argument.replace(kwargs, PrefixCache(prefixes, cache if stored else None))
    return (), kwargs


def _after(base: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Check that each layer took its prefix, and hand out the cache that came in, or none if nothing was stored."""
    cache = cache_argument.cache_in(kwargs)
    if not isinstance(cache, PrefixCache):
        return output
    prefix_model.check_all_taken(cache.prefixes)
    return prefix_model.with_cache(output, cache, cache.inner)
