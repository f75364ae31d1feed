"""What travels with a forward call of a model that has prefixes: the prefixes themselves, and a cache without them.

``LayerPrefixes`` goes as a keyword argument from the model to its attention function, so that activation checkpointing
keeps it with the call it belongs to. ``PrefixCache`` counts the prefix where models ask how many tokens came before,
for positions and masks, and stores nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache

from peft_kernels._core.errors import UnsupportedError

Pairs = tuple[tuple[Tensor, Tensor], ...]

# The keyword argument.
ARGUMENT = "layer_prefixes"
_SLOT = "prefix_slot"


class PrefixSlot(NamedTuple):
    """Marks an attention module that takes a prefix.

    Attributes:
        layer: whose prefix it takes.
        required: whether a call without prefixes is an error.
        implementation: the model's attention implementation before, for ``remove``.
    """

    layer: int
    required: bool
    implementation: str


def slot_of(module: nn.Module) -> PrefixSlot | None:
    """The mark of an attention module."""
    slot: PrefixSlot | None = getattr(module, _SLOT, None)
    return slot


def mark(module: nn.Module, slot: PrefixSlot) -> None:
    """Set the mark: a plain attribute, which copies and pickles with the module."""
    setattr(module, _SLOT, slot)


def unmark(module: nn.Module) -> None:
    """Remove the mark."""
    delattr(module, _SLOT)


class LayerPrefixes:
    """The prefixes of one forward call, without a batch dimension.

    They are computed once, and shared by all layers. Reentrant checkpointing needs another way: it runs a layer without
    gradients and again during the backward pass, where each layer's graph is freed before the next one's turn, so that
    no graph may be shared. A layer that is run without gradients although the call has them gives that away, and from
    then on each layer computes what it needs from the parameters, inside its own graph.

    Args:
        compute: returns (prefix_k, prefix_v) of each layer, each (H_kv, P, D).
        length: P.
    """

    def __init__(self, compute: Callable[[], Pairs], length: int) -> None:
        self.length = length
        self.taken: set[int] = set()
        self._compute, self._pairs = compute, compute()
        self._with_gradients, self._apart = torch.is_grad_enabled(), False

    @property
    def layers(self) -> int:
        """How many layers have a prefix."""
        return len(self._pairs)

    def take(self, layer: int, key: Tensor) -> tuple[Tensor, Tensor]:
        """Return a layer's prefix in its keys' dtype and on their device; float32 stays beside half precision."""
        self.taken.add(layer)
        if self._with_gradients and not torch.is_grad_enabled():
            self._apart = True
        prefix_k, prefix_v = (self._compute() if self._apart else self._pairs)[layer]
        masters = prefix_k.dtype == torch.float32 and key.dtype in (torch.bfloat16, torch.float16)
        dtype = torch.float32 if masters else key.dtype
        return prefix_k.to(key.device, dtype), prefix_v.to(key.device, dtype)


class PrefixCache(Cache):
    """A cache that counts a prefix it does not hold, over a cache whose layers it shares, or over none.

    Args:
        prefixes: whose length counts.
        inner: where keys and values go; None stores nothing, and hands every layer its own keys back.
    """

    def __init__(self, prefixes: LayerPrefixes, inner: Cache | None) -> None:
        super().__init__(layers=[])
        self.prefixes, self.inner, self._is_delivered = prefixes, inner, False
        if inner is not None:
            # The list of layers is shared, not copied: both caches grow together.
            self.__dict__.update(inner.__dict__)

    def delivered(self) -> PrefixCache:
        """Mark that the prefixes are on their way to the attention, and return this cache.

        A model that never comes by the hook that does so would count a prefix that nobody attends to; its layers and
        masks ask this cache, which refuses then.
        """
        self._is_delivered = True
        return self

    def _check_delivered(self) -> None:
        if not self._is_delivered:
            raise UnsupportedError(
                "prefix_attention: the prefixes did not come by the hook of the model's backbone; take them off "
                "(remove_prefix, revert)"
            )

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As Cache's; the prefix is not among the results."""
        self._check_delivered()
        if self.inner is None:
            return key_states, value_states
        joined: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return joined

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before the next one, the prefix's among them."""
        length: int = self.prefixes.length + super().get_seq_length(layer_idx)
        return length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Keys that a mask must cover, the prefix's first, and the index of the first."""
        self._check_delivered()
        length, offset = super().get_mask_sizes(query_length, layer_idx)
        if offset:
            raise UnsupportedError(
                "prefix_attention: the cache has dropped keys outside of a sliding window, so the prefix is no longer "
                "next to them; pass past_key_values=DynamicCache(), which keeps all keys"
            )
        return self.prefixes.length + length, 0
