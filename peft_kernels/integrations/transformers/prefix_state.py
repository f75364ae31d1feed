"""What travels with a forward call of a model that has prefixes: the prefixes themselves, and a cache without them.

``LayerPrefixes`` goes as a keyword argument from the model to its attention function, so that activation checkpointing
keeps it with the call it belongs to. ``PrefixCache`` counts the prefix where models ask how many tokens came before,
for positions and masks, and stores nothing of it; it lives as long as the call. ``PrefixedLayer`` is what stays in a
cache that is handed out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from peft_kernels._core.errors import UnsupportedError

Pairs = tuple[tuple[Tensor, Tensor], ...]

# The keyword argument.
ARGUMENT = "layer_prefixes"
_SLOT = "prefix_slot"
# Attributes of a layer of a cache that it does not have before its first update.
_SET_BY_UPDATE = ("dtype", "device")


class PrefixSlot(NamedTuple):
    """Marks an attention module that takes a prefix.

    Attributes:
        layer: whose prefix it takes.
        required: whether a call without prefixes is an error.
        users: how many have put prefixes on the model.
    """

    layer: int
    required: bool
    users: int = 1


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
        self._updated: dict[int, tuple[Tensor, Tensor, bool]] = {}
        self._compute, self.pairs = compute, compute()
        self._with_gradients, self._apart = torch.is_grad_enabled(), False

    @property
    def layers(self) -> int:
        """How many layers have a prefix."""
        return len(self.pairs)

    def begin(self) -> None:
        """Forget the call before, of the same prefixes."""
        self.taken.clear()
        self._updated.clear()

    def updated(self, layer: int, key: Tensor, value: Tensor, out_of_sight: bool) -> tuple[Tensor, Tensor]:
        """Remember what a layer's cache returned until the layer takes its prefix, and whether no query sees that."""
        self._updated[layer] = key, value, out_of_sight
        return key, value

    def take(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return a layer's prefix in its keys' dtype and on their device; float32 stays beside half precision.

        Returns:
            None where a sliding window has left the prefix behind.

        Raises:
            UnsupportedError: the keys and values are not those that the layer's cache returned.
        """
        updated = self._updated.pop(layer, None)
        if updated is not None and (updated[0] is not key or updated[1] is not value):
            raise UnsupportedError(
                f"prefix_attention: layer {layer} attends to keys and values other than those that its cache returned, "
                "and a prefix would not be treated as they are; take the prefixes off (remove_prefix, revert)"
            )
        self.taken.add(layer)
        if updated is not None and updated[2]:
            return None
        if self._with_gradients and not torch.is_grad_enabled():
            self._apart = True
        prefix_k, prefix_v = (self._compute() if self._apart else self.pairs)[layer]
        masters = prefix_k.dtype == torch.float32 and key.dtype in (torch.bfloat16, torch.float16)
        dtype = torch.float32 if masters else key.dtype
        return prefix_k.to(key.device, dtype), prefix_v.to(key.device, dtype)


class PrefixedLayer(DynamicLayer):
    """A layer of a cache that counts a prefix and does not hold it, until somebody asks for its keys or values.

    It becomes the layer that it stands for then, with the prefix in every row; whoever keeps, copies, pickles or cuts
    the cache, or gives it to another model, has what the library hands out.

    Args:
        prefixes: whose layer's prefix belongs here.
        index: of the layer.
        rows: of the batch.
        plain: an empty layer of the library's, to become.
        dtype, device: of the prefix's keys and values in it; None is what the prefix has.
    """

    own: Any
    plain: Any

    def __init__(
        self,
        prefixes: LayerPrefixes,
        index: int,
        rows: int,
        plain: Any,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> None:
        self.prefixes, self.index, self.rows, self.plain = prefixes, index, rows, plain
        self.own = DynamicLayer()
        self._to = {"dtype": dtype, "device": device}
        self.is_initialized = True

    def join(self) -> None:
        """Become the layer that it stands for."""
        own, plain = self.own, self.plain
        rows = own.keys.shape[0] if own.is_initialized else self.rows
        prefix = [one.to(**self._to).expand(rows, -1, -1, -1) for one in self.prefixes.pairs[self.index]]
        if own.is_initialized:
            prefix = [one.to(own.keys.device) for one in prefix]
        plain.update(*prefix)
        if own.is_initialized:
            plain.update(own.keys, own.values)
        self.__class__: Any = type(plain)
        self.__dict__ = plain.__dict__

    def __getattr__(self, name: str) -> Any:
        known = "plain" in self.__dict__ and (name in _SET_BY_UPDATE or hasattr(self.plain, name))
        if not known:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        self.join()
        return getattr(self, name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        self.join()
        return self.__reduce_ex__(protocol)

    @property
    def keys(self) -> Tensor:
        """The layer's keys, with the prefix's."""
        self.join()
        return self.keys

    @keys.setter
    def keys(self, keys: Tensor) -> None:
        self.join()
        self.keys = keys

    @property
    def values(self) -> Tensor:
        """The layer's values, with the prefix's."""
        self.join()
        return self.values

    @values.setter
    def values(self, values: Tensor) -> None:
        self.join()
        self.values = values

    @property
    def is_sliding(self) -> bool:  # type: ignore[override]
        """As that of the layer it stands for."""
        return self.plain.is_sliding

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As DynamicLayer's, for a model that knows nothing of the prefix."""
        self.join()
        joined: tuple[Tensor, Tensor] = self.update(*args, **kwargs)
        return joined

    def get_seq_length(self) -> int:
        """Tokens in the layer, the prefix's among them."""
        return self.prefixes.length + self.own.get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As DynamicLayer's."""
        return self.get_seq_length() + query_length, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """As DynamicLayer's; all rows have the same prefix."""
        self.own.reorder_cache(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """As DynamicLayer's."""
        if -tokens_to_remove > self.own.get_seq_length():
            self.join()
            self.crop(tokens_to_remove)
        else:
            self.own.crop(tokens_to_remove)


def prefixes_in(cache: Any) -> LayerPrefixes | None:
    """The prefixes that a cache counts in every layer and holds in none."""
    layers = getattr(cache, "layers", ())
    if not layers or any(type(layer) is not PrefixedLayer for layer in layers):
        return None
    prefixes: LayerPrefixes = layers[0].prefixes
    return prefixes


class PrefixCache(Cache):
    """A cache for one call, which counts a prefix that it does not hold, over one whose layers it shares, or over none.

    Args:
        prefixes: whose length counts.
        inner: where keys and values go; None stores nothing, and hands every layer its own keys back.
    """

    def __init__(self, prefixes: LayerPrefixes, inner: Cache | None) -> None:
        super().__init__(layers=[])
        self.layers: list[Any]
        self.prefixes, self.inner = prefixes, inner
        # The inner cache's layers count the prefix themselves.
        self._is_counted = inner is not None and prefixes_in(inner) is prefixes
        self._uncounted = 0 if self._is_counted else prefixes.length
        if inner is not None:
            # The list of layers is shared, not copied: both caches grow together.
            self.__dict__.update(inner.__dict__)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As Cache's; the prefix is not among the results."""
        out_of_sight = False
        if self._is_counted:
            joined = self.layers[layer_idx].own.update(key_states, value_states)
        elif self.inner is not None:
            out_of_sight = super().get_mask_sizes(key_states.shape[2], layer_idx)[1] > 0
            joined = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        else:
            joined = key_states, value_states
        return self.prefixes.updated(layer_idx, joined[0], joined[1], out_of_sight)

    @property
    def is_initialized(self) -> bool:
        """As of a cache that holds the prefix."""
        return True

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before the next one, the prefix's among them."""
        length: int = self._uncounted + super().get_seq_length(layer_idx)
        return length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Keys that a mask must cover, the prefix's first, and the index of the first.

        A layer that has dropped keys outside of its window has no query that could see the prefix before them.
        """
        length, offset = super().get_mask_sizes(query_length, layer_idx)
        return (length, self._uncounted + offset) if offset > 0 else (self._uncounted + length, 0)
