"""``prefix_attention`` as an attention implementation of transformers: an attention function and its mask function.

Importing this file registers both, under one name: an attention function without its mask function gets no mask at all,
and padding would be attended to. Only ``add_prefix``, ``apply`` and unpickling a model that has prefixes import it.

Masks, as the mask function makes them and the attention function reads them (n counts keys, with the prefix's or
without):

    None             no padding; causal where the module is, aligned at the lower right
    (B, n) bool      causal, and False at padding
    (B, 1, n) bool   False at padding, and nothing else hidden
    (B, H, S, n)     anything else, bool or added to the scores: behind a concatenation, by transformers' "sdpa"

In the first three every query sees the whole prefix. So it does where the last has columns for the keys alone; as one
row for all (B, 1, 1, L) it is padding again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    bidirectional_mask_function,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.import_utils import is_tracing

from peft_kernels._core.errors import UnsupportedError
from peft_kernels.integrations.transformers.attention_source import eager_function
from peft_kernels.integrations.transformers.config_view import NAME
from peft_kernels.integrations.transformers.prefix_state import ARGUMENT, LayerPrefixes, slot_of
from peft_kernels.integrations.versions import require
from peft_kernels.prefix import prefix_attention

require("transformers")

# What transformers' "sdpa" reads beside q, k, v and the mask, and prefix_attention has no place for.
_LEFT_TO_SDPA = ("position_bias", "cache")
# What "sdpa" does not compute either; older ones say nothing of a cap.
_REFUSED = {"s_aux": "attention sinks", "softcap": "caps on the scores"}

# Whether this thread's call of a model has prefixes: masks are made by a function that sees nothing of the call.
_calls = threading.local()


def begin_call(has_prefixes: bool) -> None:
    """Say whether the call that begins has prefixes; without them masks and attention are the model's own."""
    _calls.has_prefixes = has_prefixes


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend to the module's prefix and to the keys; a call without prefixes is for the model's own implementation.

    Args:
        module: the attention module; its slot says which prefix is its own.
        query (B, H, S, D), key and value (B, H_kv, L, D).
        attention_mask: see the head of this file.
        dropout: of the probabilities; above zero "sdpa" does the work.
        scaling: None is D ** -0.5.
        is_causal: None asks the module.

    Returns:
        (B, S, H, D), and None for the probabilities, which nobody computes.

    Raises:
        UnsupportedError: the module needs a prefix and got none, its keys and values are not those of its cache, or the
            model has attention sinks or caps the scores.
        ValueError: the mask is for another number of keys.
    """
    prefixes: LayerPrefixes | None = kwargs.pop(ARGUMENT, None)
    if prefixes is None:
        own = _own_attention(module)
        if own is not None:
            options = kwargs if is_causal is None else {**kwargs, "is_causal": is_causal}
            output: tuple[Tensor, None] = own(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
            )
            return output
    prefix = None if prefixes is None else _prefix(module, prefixes, key, value)
    for name, what in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise UnsupportedError(f"prefix_attention: {what} ({name}) are not supported; remove the prefix")
    causal = (getattr(module, "is_causal", True) if is_causal is None else is_causal) and query.shape[2] > 1
    length, keys = (0 if prefix is None else prefix[0].shape[1]), key.shape[2]
    if attention_mask is not None and attention_mask.shape[-1] not in (keys, length + keys):
        raise ValueError(
            f"prefix_attention: attention_mask must cover {keys} keys, or {length + keys} with the prefix, "
            f"got {tuple(attention_mask.shape)}"
        )
    plain = dropout == 0.0 and all(kwargs.get(name) is None for name in _LEFT_TO_SDPA)
    causal = causal and (attention_mask is None or attention_mask.dim() == 2)
    if prefix is not None and plain and _is_padding(attention_mask, keys):
        padding = None if attention_mask is None else _padding(attention_mask, query.shape[0], keys)
        y = prefix_attention(query, key, value, *prefix, causal=causal, scale=scaling, key_padding_mask=padding)
        return y.transpose(1, 2).contiguous(), None
    if prefix is not None:
        key, value = (_joined(one, to) for one, to in zip(prefix, (key, value), strict=True))
    elif attention_mask is None and query.shape[2] == keys:
        # The whole sequence at once, for which "sdpa" has kernels that need no mask.
        return sdpa_attention_forward(module, query, key, value, None, dropout, scaling, causal, **kwargs)
    dense = _dense(attention_mask, causal, query, length, keys)
    return sdpa_attention_forward(module, query, key, value, dense, dropout, scaling, False, **kwargs)


def mask(*args: Any, **kwargs: Any) -> Any:
    """Make the mask that ``attention`` reads, or, in a call without prefixes, the model's own implementation's.

    Arguments are those of transformers' ``sdpa_mask``.
    """
    implementation = getattr(kwargs.get("config"), "_attn_implementation_internal", NAME)
    if implementation == NAME or getattr(_calls, "has_prefixes", False):
        return _mask(*args, **kwargs)
    own = ALL_MASK_ATTENTION_FUNCTIONS.get(implementation)
    return None if own is None else own(*args, **kwargs)


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """Make a mask for a prefix.

    It stays compact only where it is exactly causal or bidirectional, up to padding. transformers says so: it allows a
    skip for plain patterns alone, with the size of a local one beside it.
    """
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    padding = None if padding is None else padding[:, kv_offset : kv_offset + kv_length]
    ends = type(q_offset) is int and q_offset + q_length == kv_offset + kv_length and kv_offset == 0
    local = local_size is not None and not (
        # A window that reaches back to the first key hides nothing. Chunks begin anew, wherever they are.
        local_size == getattr(config, "sliding_window", None) and ends and kv_length <= local_size
    )
    known = mask_function is causal_mask_function or local_size is not None
    if allow_is_causal_skip and known and ends and not local:
        return None if _is_all(padding) else padding
    if allow_is_bidirectional_skip and mask_function is bidirectional_mask_function and local_size is None:
        return None if padding is None or _is_all(padding) else padding[:, None]
    return sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        **kwargs,
    )


def _is_all(padding: Tensor | None) -> bool:
    """Whether nothing is padding; while tracing nobody may look."""
    return padding is None or (not is_tracing(padding) and bool(padding.all()))


def _prefix(module: nn.Module, prefixes: LayerPrefixes, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor] | None:
    slot = slot_of(module)
    return None if slot is None else prefixes.take(slot.layer, key, value)


def _own_attention(module: Any) -> Callable[..., Any] | None:
    """The attention function that the module has without this package, for a call without prefixes."""
    slot, implementation = slot_of(module), module.config._attn_implementation_internal
    if slot is not None and slot.required:
        raise UnsupportedError(
            f"prefix_attention: layer {slot.layer} has a prefix that did not reach it: call the model itself, not its "
            "forward, which skips its hooks; every layer must hand its keyword arguments on"
        )
    if implementation == NAME:
        return None
    function: Callable[..., Any] | None = ALL_ATTENTION_FUNCTIONS.get(implementation)
    return eager_function(module) if function is None else function


def _is_padding(attention_mask: Tensor | None, keys: int) -> bool:
    """Whether a mask tells nothing but which keys are padding, beside the causal one."""
    if attention_mask is None or attention_mask.dim() < 4:
        return True
    return attention_mask.dtype == torch.bool and attention_mask.shape[1:] == (1, 1, keys)


def _padding(attention_mask: Tensor, batch: int, keys: int) -> Tensor:
    """(B, L); a prefix's columns come first, and are all attended to."""
    columns = attention_mask[..., attention_mask.shape[-1] - keys :]
    return columns.reshape(columns.shape[0], keys).expand(batch, keys)


def _dense(attention_mask: Tensor | None, causal: bool, query: Tensor, length: int, keys: int) -> Tensor | None:
    """(B, H, S, P + L) for joined keys."""
    dense: Tensor
    if attention_mask is not None and attention_mask.dim() == 4:
        dense = attention_mask
    elif attention_mask is None and not causal:
        return None
    else:
        rows = query.shape[2]
        dense = torch.ones(1, 1, rows, keys, dtype=torch.bool, device=query.device)
        if causal:
            dense = dense.tril(keys - rows)
        if attention_mask is not None:
            dense = dense & _padding(attention_mask, query.shape[0], keys)[:, None, None]
    if dense.shape[-1] == keys and length:
        # Every query sees the whole prefix: True, or nothing added to the scores.
        ahead = torch.ones if dense.dtype == torch.bool else torch.zeros
        dense = torch.cat((ahead(*dense.shape[:-1], length, dtype=dense.dtype, device=dense.device), dense), dim=-1)
    return dense


def _joined(prefix: Tensor, sequence: Tensor) -> Tensor:
    return torch.cat((prefix.to(sequence.dtype).expand(sequence.shape[0], -1, -1, -1), sequence), dim=2)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)
