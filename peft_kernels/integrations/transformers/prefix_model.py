"""Prefixes on a transformers model: which models can carry them, and the hooks that bring them to each call.

The model is left as it is but for a mark on each attention module, and on the backbone, the part that takes
the cache: hooks, and another attention implementation, in a view of the configuration. Heads are not touched.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import find_packed_sequence_indices

from peft_kernels._core.errors import UnsupportedError
from peft_kernels.integrations.hooks import hands_on_arguments, named_arguments, remove_hooks
from peft_kernels.integrations.rules import Support
from peft_kernels.integrations.transformers import attention_source, cache_argument, interface
from peft_kernels.integrations.transformers.config_view import view_of, viewed
from peft_kernels.integrations.transformers.prefix_state import (
    ARGUMENT,
    LayerPrefixes,
    PrefixCache,
    PrefixSlot,
    mark,
    slot_of,
    unmark,
)
from peft_kernels.prefix import PrefixEncoder

ENCODER = "prefix_encoder"

SUPPORT = Support(
    "Prefixes on transformers' models: `add_prefix`, and `apply` on PEFT's",
    (
        "tested: Llama, Llama 4, Qwen2, Mistral, Mixtral, GPT-2, GPT-NeoX, OPT, Phi, Gemma 3, BERT, RoBERTa",
        "other decoders and encoders that no rule below excludes",
    ),
)
_NO_MODEL = SUPPORT.rule("a module that is no `PreTrainedModel`", "it is no transformers model")
_ENCODER_DECODER = SUPPORT.rule("T5, BART and other encoder-decoders", "it is an encoder-decoder model")
_SOFTCAP = SUPPORT.rule("Gemma 2", "its attention caps the scores (attn_logit_softcapping)")
_NO_INTERFACE = SUPPORT.rule(
    "models whose attention is code of their own, or knows no SDPA (gpt-oss, with its sinks)",
    "its attention does not go through transformers' AttentionInterface, or not as SDPA does",
)
_CROSS_ATTENTION = SUPPORT.rule("BERT as a decoder of an encoder's states", "it has cross-attention")
_NO_LAYERS = SUPPORT.rule(
    "hybrids with recurrent layers; ALBERT, whose layers are one",
    "not every layer has one self-attention module with the layer's index",
)
_LATENT = SUPPORT.rule("DeepSeek V2 and V3", "its keys and values are compressed (multi-head latent attention)")
_NO_CACHE = SUPPORT.rule("backbones that cannot decode", "its backbone takes no {name}")
_OTHER_KEYS = SUPPORT.rule(
    "keys or values changed behind the cache, or taken from another layer: DiffLlama, JetMoe, Gemma 3n and 4",
    "its attention does not attend to the keys and values that its cache returned",
)
_OTHER_STATES = SUPPORT.rule(
    "hybrids whose layers have attention beside a recurrent state (Falcon H1)",
    "its layers keep more than keys and values of their own",
)
_OTHER_ARGUMENTS = SUPPORT.rule(
    "attention sinks, caps and biases", "its attention function takes {names}, which a prefix has no place for"
)
_OTHER_SIZES = SUPPORT.rule(
    "layers of several sizes, or values of another size than keys", "its layers' keys and values differ in size"
)
_NO_KWARGS = SUPPORT.rule(
    "layers that drop keyword arguments: StableLM, Nemotron",
    "its {part} hands no keyword arguments on to the attention",
)
_MASKS_OUTSIDE = SUPPORT.rule(
    "a text model inside another that makes its masks (Gemma 3), but for SDPA and eager attention",
    "its masks are made outside of the text model for {name!r}",
)
_OTHER_ATTENTION = SUPPORT.rule(
    "a call after `set_attn_implementation`", "the attention implementation was changed to {name!r}"
)
_PROBABILITIES = SUPPORT.rule("a call with `output_attentions`", "attention probabilities are not computed")

# Layers of a cache that hold keys and values alone.
_KEYS_AND_VALUES = (DynamicLayer, DynamicSlidingWindowLayer)


def why_not(model: Any) -> str | None:
    """Reason why a model cannot carry prefixes, None if it can."""
    if not isinstance(model, PreTrainedModel):
        return _NO_MODEL()
    if model.config.is_encoder_decoder:
        return _ENCODER_DECODER()
    text = model.config.get_text_config()
    if getattr(text, "attn_logit_softcapping", None) is not None:
        return _SOFTCAP()
    if not (model._supports_sdpa and model._can_set_attn_implementation()):
        return _NO_INTERFACE()
    if any(_is_cross_attention(module) for module in model.modules()):
        return _CROSS_ATTENTION()
    modules = attention_modules(model)
    if not modules or [module.layer_idx for module in modules] != list(range(text.num_hidden_layers)):
        return _NO_LAYERS()
    if hasattr(modules[0], "kv_lora_rank"):
        return _LATENT()
    if cache_argument.NAME not in inspect.signature(backbone(model).forward).parameters:
        return _NO_CACHE(name=cache_argument.NAME)
    return _why_not_attention(model, modules)


def _why_not_attention(model: Any, modules: list[Any]) -> str | None:
    """Reason that lies in what the attention modules do, or in how they are called."""
    if not all(attention_source.hands_over_its_own(module) for module in modules):
        return _OTHER_KEYS()
    layers = DynamicCache(config=model.config).layers
    if len(layers) != len(modules) or any(type(layer) not in _KEYS_AND_VALUES for layer in layers):
        return _OTHER_STATES()
    names = sorted({name for module in modules for name in attention_source.unknown_arguments(module)})
    if names:
        return _OTHER_ARGUMENTS(names=", ".join(names))
    if len({_size(model, module) for module in modules}) > 1 or hasattr(modules[0], "v_head_dim"):
        return _OTHER_SIZES()
    base = backbone(model)
    if viewed(base.config) is not viewed(modules[0].config) and _implementation(base) not in ("eager", "sdpa"):
        return _MASKS_OUTSIDE(name=_implementation(base))
    for name, module in base.named_modules():
        inside = any(part is attention for part in module.modules() for attention in modules)
        if inside and not isinstance(module, nn.ModuleList) and not hands_on_arguments(module):
            return _NO_KWARGS(part=name or "backbone")
    return None


def attention_modules(model: nn.Module) -> list[Any]:
    """The self-attention modules by layer."""
    found: list[Any] = list(filter(_is_attention, model.modules()))
    return sorted(found, key=lambda module: module.layer_idx)


def _is_attention(module: nn.Module) -> bool:
    return isinstance(getattr(module, "layer_idx", None), int) and hasattr(module, "is_causal")


def backbone(model: Any) -> Any:
    """The outermost model that makes masks for all layers; else the innermost that has them.

    What is around it may call it, or parts of itself, as it likes.
    """
    layers = attention_modules(model)
    inside = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    inside = [part for part in inside if attention_modules(part) == layers]
    makers = [part for part in inside if attention_source.makes_masks(part)]
    return makers[0] if makers else inside[-1]


def attach(model: Any, required: bool) -> bool:
    """Mark the attention modules and set their implementation; whether the model had no prefixes before."""
    modules, base = attention_modules(model), backbone(model)
    users = _users(modules)
    for module in modules:
        mark(module, PrefixSlot(module.layer_idx, required, users + 1))
    if not users:
        views = {id(module.config): view_of(module.config, _implementation(module)) for module in (base, *modules)}
        for module in base.modules():
            if id(getattr(module, "config", None)) in views:
                module.config = views[id(module.config)]
    return not users


def detach(model: Any) -> bool:
    """Undo ``attach``; whether the model has no prefixes any more."""
    modules = attention_modules(model)
    users = _users(modules)
    for module in modules if users else ():
        if users == 1:
            unmark(module)
        else:
            mark(module, PrefixSlot(module.layer_idx, required=False, users=users - 1))
    for module in backbone(model).modules() if users == 1 else ():
        if hasattr(module, "config"):
            module.config = viewed(module.config)
    return users == 1


def _users(modules: list[Any]) -> int:
    slot = slot_of(modules[0])
    return 0 if slot is None else slot.users


def _implementation(module: Any) -> Any:
    return module.config._attn_implementation_internal


def add(model: Any, encoder: PrefixEncoder) -> None:
    """See ``transformers.add_prefix``."""
    if not isinstance(encoder, PrefixEncoder):
        raise ValueError(f"add_prefix: encoder must be a PrefixEncoder, got {type(encoder).__name__}")
    check("add_prefix", model)
    base, slot = backbone(model), slot_of(attention_modules(model)[0])
    if slot is not None:
        how = "remove_prefix" if slot.required else "revert, of the PEFT model around it"
        raise ValueError(f"add_prefix: {type(model).__name__} has prefixes already; remove them first ({how})")
    expected, got = sizes(model), (encoder.num_layers, encoder.num_kv_heads, encoder.head_dim)
    if got != expected:
        raise ValueError(f"add_prefix: encoder must have (num_layers, num_kv_heads, head_dim) = {expected}, got {got}")
    attach(model, required=True)
    setattr(base, ENCODER, encoder)
    base.register_forward_pre_hook(_before, with_kwargs=True)
    base.register_forward_hook(_after, with_kwargs=True)


def remove(model: Any) -> PrefixEncoder:
    """See ``transformers.remove_prefix``."""
    bases = [part for part in model.modules() if isinstance(getattr(part, ENCODER, None), PrefixEncoder)]
    if not bases:
        raise ValueError(f"remove_prefix: {type(model).__name__} has no prefixes")
    base: Any = bases[-1]
    encoder: PrefixEncoder = getattr(base, ENCODER)
    detach(model)
    delattr(base, ENCODER)
    remove_hooks(base, _before, _after)
    return encoder


def check(caller: str, model: Any) -> None:
    """Raise UnsupportedError, with the reason, if a model cannot carry prefixes."""
    reason = why_not(model)
    if reason is not None:
        raise UnsupportedError(f"{caller}: {type(model).__name__} cannot have prefixes: {reason}")


def sizes(model: Any) -> tuple[int, int, int]:
    """(num_layers, num_kv_heads, head_dim) of a model that can carry prefixes."""
    first = next(filter(_is_attention, model.modules()))
    return model.config.get_text_config().num_hidden_layers, *_size(model, first)


def _size(model: Any, attention: Any) -> tuple[int, int]:
    """(num_kv_heads, head_dim) of a layer."""
    text = model.config.get_text_config()
    heads = text.num_attention_heads
    head_dim = getattr(attention, "head_dim", None) or text.hidden_size // heads
    # Not the configuration's num_key_value_heads, which models without grouped queries carry along and ignore.
    return heads // getattr(attention, "num_key_value_groups", 1), head_dim


def why_not_call(base: Any, kwargs: dict[str, Any]) -> str | None:
    """Reason why a call of the backbone cannot have prefixes: another attention, or its probabilities."""
    implementation = base.config._attn_implementation
    if implementation != interface.NAME:
        return _OTHER_ATTENTION(name=implementation)
    wanted = kwargs.get("output_attentions")
    return _PROBABILITIES() if (base.config.output_attentions if wanted is None else wanted) else None


def check_all_taken(prefixes: LayerPrefixes) -> None:
    """Raise if some layer did not attend to its prefix: its result would be the base model's."""
    if len(prefixes.taken) != prefixes.layers:
        raise UnsupportedError(
            f"prefix_attention: only the layers {sorted(prefixes.taken)} of {prefixes.layers} attended to their "
            "prefixes; a layer must hand its keyword arguments on to its attention"
        )


def stores(base: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a call without a cache makes one: as transformers decides, but not in training unless asked to."""
    wanted = kwargs.get("use_cache")
    if wanted is None:
        wanted = getattr(base.config.get_text_config(), "use_cache", False) and not (
            base.training and torch.is_grad_enabled()
        )
    return bool(wanted) and next(module for module in base.modules() if slot_of(module) is not None).is_causal


def with_cache(output: Any, cache: PrefixCache, instead: Cache | None) -> Any:
    """A model's output with another cache in place of one."""
    if isinstance(output, tuple):
        return tuple(instead if part is cache else part for part in output)
    if getattr(output, cache_argument.NAME, None) is cache:
        setattr(output, cache_argument.NAME, instead)
    return output


def _is_cross_attention(module: nn.Module) -> bool:
    return bool(getattr(module, "is_cross_attention", False)) or "CrossAttention" in type(module).__name__


def _before(base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
    """Bring the prefixes, a cache that counts them, and mask and positions that leave room for them."""
    kwargs = named_arguments(base, args, kwargs)
    reason = why_not_call(base, kwargs)
    if reason is not None:
        raise UnsupportedError(f"add_prefix: {reason}; take the prefix off for this call (remove_prefix)")
    interface.begin_call(has_prefixes=True)
    encoder: PrefixEncoder = getattr(base, ENCODER)
    prefixes = LayerPrefixes(encoder, encoder.prefix_length)
    inner: Any = cache_argument.cache_in(kwargs)
    positions = kwargs.get("position_ids")
    if isinstance(inner, (PrefixCache, EncoderDecoderCache)):
        name = cache_argument.name_in(kwargs)
        raise UnsupportedError(f"add_prefix: {name} must be a plain cache, got {type(inner).__name__}")
    if getattr(inner, "is_compileable", False) and any(inner.is_sliding):
        raise UnsupportedError("add_prefix: no static cache for sliding windows, whose masks leave out the prefix")
    if positions is not None:
        if inner is None and kwargs.get("attention_mask") is None:
            kwargs["attention_mask"] = _packed_mask(base, positions)
        kwargs["position_ids"] = positions + prefixes.length
    elif kwargs.get("cu_seq_lens_q") is not None:
        raise UnsupportedError("add_prefix: packed sequences need position_ids that begin anew with each")
    kwargs["attention_mask"] = _widened(kwargs.get("attention_mask"), prefixes.length)
    if inner is None and stores(base, kwargs):
        inner = DynamicCache(config=base.config)
    cache_argument.replace(kwargs, PrefixCache(prefixes, inner))
    kwargs[ARGUMENT] = prefixes
    return (), kwargs


def _after(base: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Check that each layer took its prefix, and hand out the cache that holds the keys."""
    check_all_taken(kwargs[ARGUMENT])
    cache: PrefixCache = cache_argument.cache_in(kwargs)
    return with_cache(output, cache, cache.inner)


def _packed_mask(base: Any, positions: Tensor) -> Tensor | None:
    """The mask (B, 1, S, S) of sequences packed into a row, None if positions tell of none."""
    causal = next(module for module in base.modules() if slot_of(module) is not None).is_causal
    if not causal or positions.dim() != 2:
        return None
    packed = find_packed_sequence_indices(positions)
    if packed is None:
        return None
    text = base.config.get_text_config()
    if getattr(text, "sliding_window", None) or getattr(text, "attention_chunk_size", None):
        raise UnsupportedError("add_prefix: packed sequences in a model with a sliding window or chunks; pass a mask")
    same = packed[:, None, :, None] == packed[:, None, None, :]
    return same.tril()


def _widened(attention_mask: Any, length: int) -> Any:
    """A mask with the prefix's columns, where it has one column a key; one with rows of its own is widened later."""
    if attention_mask is None:
        return None
    if isinstance(attention_mask, dict):
        # By the kind of layer.
        return {kind: _widened(one, length) for kind, one in attention_mask.items()}
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() not in (2, 4):
        got = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise UnsupportedError(f"add_prefix: attention_mask must be a tensor (B, L) or (B, 1, S, L), got {got}")
    if attention_mask.dim() == 4:
        return attention_mask
    ahead = attention_mask.new_ones(attention_mask.shape[0], length)
    return torch.cat((ahead, attention_mask), dim=1)
