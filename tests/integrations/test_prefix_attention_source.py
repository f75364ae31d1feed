"""What the source of an attention's forward tells: which keys and values a prefix would stand beside."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peft_kernels.integrations.transformers import attention_source


def _plain(self: Any, q: Any, k: Any, v: Any, mask: Any, cache: Any = None, **kwargs: Any) -> Any:
    if cache is not None:
        k, v = cache.update(k, v, self.layer_idx)
    function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
    return function(self, q, k, v, mask[..., : k.shape[2]], dropout=0.0, scaling=self.scaling, **kwargs)


@functools.wraps(_plain)
def _wrapped(*args: Any, **kwargs: Any) -> Any:
    return _plain(*args, **kwargs)


def _before_the_update(self: Any, q: Any, k: Any, v: Any, mask: Any, cache: Any = None, **kwargs: Any) -> Any:
    k = 2 * k
    if cache is not None and mask is not None:
        k, v = cache.update(k, v, self.layer_idx, {"sin": q})
    function = ALL_ATTENTION_FUNCTIONS["sdpa"]
    y = function(self, q, k, v, mask, s_aux=self.sinks, window=3)
    return y, k.sum()


def _another_branch(self: Any, q: Any, k: Any, v: Any, mask: Any, cache: Any = None, **kwargs: Any) -> Any:
    if cache is not None:
        k, v = cache.update(k, v, self.layer_idx)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
    if self.upcast:
        return self.own(q, k, v)
    else:
        return function(self, q, k, v, mask)


def _changed(self: Any, q: Any, k: Any, v: Any, mask: Any, cache: Any = None, **kwargs: Any) -> Any:
    k, v = cache.update(k, v, self.layer_idx)
    v = torch.cat((v, v), dim=1)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
    return function(self, q, k, v, mask)


def _changed_in_place(self: Any, q: Any, k: Any, v: Any, mask: Any, cache: Any = None, **kwargs: Any) -> Any:
    k, v = cache.update(k, v, self.layer_idx)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
    k[:, :, 0] = 0
    return function(self, q, k, v, mask)


def _changed_in_the_call(self: Any, q: Any, k: Any, v: Any, mask: Any, cache: Any = None, **kwargs: Any) -> Any:
    k, v = cache.update(k, v, self.layer_idx)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
    return function(self, q, self.k_norm(k), v, mask)


def _read(self: Any, q: Any, k: Any, v: Any, mask: Any, cache: Any = None, **kwargs: Any) -> Any:
    k, v = cache.update(k, v, self.layer_idx)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
    mask = mask + self.bias(v)
    return function(self, q, k, v, mask)


def _exchanged(self: Any, q: Any, k: Any, v: Any, mask: Any, cache: Any = None, **kwargs: Any) -> Any:
    v, k = cache.update(k, v, self.layer_idx)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
    return function(self, q, k, v, mask)


def _another_layer(self: Any, q: Any, k: Any, v: Any, mask: Any, cache: Any = None, **kwargs: Any) -> Any:
    k, v = cache.update(k, v, self.layer_idx + self.turn)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
    return function(self, q, k, v, mask)


def _some_layers(self: Any, q: Any, k: Any, v: Any, mask: Any, cache: Any = None, **kwargs: Any) -> Any:
    if cache is not None and not self.is_shared:
        k, v = cache.update(k, v, self.layer_idx)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
    return function(self, q, k, v, mask)


def _twice(self: Any, q: Any, k: Any, v: Any, mask: Any, cache: Any = None, **kwargs: Any) -> Any:
    k, v = cache.update(k, v, self.layer_idx)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
    return function(self, q, k, v, mask) - function(self, -q, k, v, mask)


def _a_loop(self: Any, q: Any, k: Any, v: Any, mask: Any, cache: Any = None, **kwargs: Any) -> Any:
    for _ in range(2):
        k, v = cache.update(k, v, self.layer_idx)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
    return function(self, q, k, v, mask)


def _no_update(self: Any, q: Any, k: Any, v: Any, mask: Any, cache: Any = None, **kwargs: Any) -> Any:
    function = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
    return function(self, q, k, v, mask)


def _no_interface(self: Any, q: Any, k: Any, v: Any, mask: Any, cache: Any = None, **kwargs: Any) -> Any:
    k, v = cache.update(k, v, self.layer_idx)
    return nn.functional.scaled_dot_product_attention(q, k, v, mask)


def _module(forward: Callable[..., Any]) -> nn.Module:
    return type("Attention", (nn.Module,), {"forward": forward})()


@pytest.mark.parametrize("forward", [_plain, _wrapped, _before_the_update, _another_branch])
def test_its_own(forward: Callable[..., Any]) -> None:
    assert attention_source.hands_over_its_own(_module(forward))


@pytest.mark.parametrize(
    "forward",
    [
        _changed, _changed_in_place, _changed_in_the_call, _read, _exchanged, _another_layer, _some_layers, _twice,
        _a_loop, _no_update, _no_interface,
    ],
)  # fmt: skip
def test_not_its_own(forward: Callable[..., Any]) -> None:
    assert not attention_source.hands_over_its_own(_module(forward))


def test_no_source_is_no_proof() -> None:
    names: dict[str, Any] = {"ALL_ATTENTION_FUNCTIONS": ALL_ATTENTION_FUNCTIONS}
    exec("def forward(self, q, k, v, mask): return ALL_ATTENTION_FUNCTIONS['sdpa'](self, q, k, v, mask)", names)
    assert not attention_source.hands_over_its_own(_module(names["forward"]))


def test_a_forward_on_the_instance_counts() -> None:
    module = _module(_plain)
    module.forward = functools.partial(_changed, module)
    assert not attention_source.hands_over_its_own(module)


def test_arguments_beside() -> None:
    assert attention_source.unknown_arguments(_module(_plain)) == []
    assert attention_source.unknown_arguments(_module(_before_the_update)) == ["s_aux", "window"]
