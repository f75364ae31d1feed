"""The oracle against what it does not share: autograd, finite differences, torch's attention, single loops."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from python_ref import prefix as oracle

NAMES = ("q", "k", "v", "prefix_k", "prefix_v")
B, H, H_KV, D = 2, 4, 2, 3


def _tensors(s: int, length: int, p: int, shared: bool, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    prefix = (H_KV, p, D) if shared else (B, H_KV, p, D)
    shapes = ((B, H, s, D), (B, H_KV, length, D), (B, H_KV, length, D), prefix, prefix)
    drawn = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return dict(zip(NAMES, drawn, strict=True))


def _mask(length: int) -> Tensor:
    mask = torch.rand(B, length, generator=torch.Generator().manual_seed(7)) < 0.6
    mask[:1] = False
    return mask


@pytest.mark.parametrize("shared", [False, True])
def test_forward_is_the_equation_element_by_element(shared: bool) -> None:
    s, length, p, scale = 3, 4, 2, 0.8
    tensors, mask = _tensors(s, length, p, shared), _mask(length)
    y = oracle.forward(**tensors, causal=True, scale=scale, key_padding_mask=mask)
    for b, h, i in itertools.product(range(B), range(H), range(s)):
        head = h // (H // H_KV)
        at = (head,) if shared else (b, head)
        seen = [(tensors["prefix_k"][at][j], tensors["prefix_v"][at][j]) for j in range(p)]
        visible = [j for j in range(length) if j <= i + length - s and mask[b, j]]
        seen += [(tensors["k"][b, head, j], tensors["v"][b, head, j]) for j in visible]
        weights = [math.exp(scale * float(tensors["q"][b, h, i] @ key)) for key, _ in seen]
        for n in range(D):
            mean = sum(w * float(value[n]) for w, (_, value) in zip(weights, seen, strict=True)) / sum(weights)
            assert float(y[b, h, i, n]) == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize("s", [3, 5])
def test_causal_is_torch_s_lower_right(s: int) -> None:
    """Without a prefix; and with one, which torch's bias sees as further keys at the front."""
    tensors = _tensors(s, 5, 2, shared=True)
    q, *rest = tensors.values()
    k, v, prefix_k, prefix_v = (tensor.repeat_interleave(2, dim=-3) for tensor in rest)
    keys, values = (
        torch.cat((prefix.expand(B, -1, -1, -1), rows), 2) for prefix, rows in ((prefix_k, k), (prefix_v, v))
    )
    joined = F.scaled_dot_product_attention(q, keys, values, attn_mask=causal_lower_right(s, 7))
    torch.testing.assert_close(oracle.forward(**tensors, causal=True), joined)
    empty = {**tensors, "prefix_k": tensors["prefix_k"][:, :0], "prefix_v": tensors["prefix_v"][:, :0]}
    plain = F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(s, 5))
    torch.testing.assert_close(oracle.forward(**empty, causal=True), plain)


def test_query_without_a_key_gives_zeros() -> None:
    tensors = _tensors(4, 2, 0, shared=True)
    y = oracle.forward(**tensors, causal=True)
    assert not y[:, :, :2].any() and y[:, :, 2:].all()
    grads = oracle.backward(torch.ones_like(y), **tensors, causal=True)
    assert not grads.q[:, :, :2].any()
    assert all(gradient.isfinite().all() for gradient in grads)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_oracle_keeps_its_arguments_dtype(dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in _tensors(3, 4, 2, shared=True).items()}
    y = oracle.forward(**tensors, causal=True)
    assert {y.dtype, *(gradient.dtype for gradient in oracle.backward(y, **tensors, causal=True))} == {dtype}
    assert oracle.eager(**tensors, causal=True).dtype == dtype


def test_eager_casts_a_float32_prefix() -> None:
    tensors = {name: tensor.float() for name, tensor in _tensors(3, 4, 2, shared=True).items()}
    half = {name: tensor if name.startswith("prefix") else tensor.bfloat16() for name, tensor in tensors.items()}
    assert torch.equal(oracle.eager(**half), oracle.eager(**{name: t.bfloat16() for name, t in tensors.items()}))


def test_peft_s_path_is_eager() -> None:
    """PEFT hands the prefix over as a cache; transformers' attention then sees it as past keys, all visible."""
    transformers = pytest.importorskip("transformers")
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    assert transformers
    s, p = 4, 3
    tensors = {name: tensor.float() for name, tensor in _tensors(s, s, p, shared=True).items()}
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = H // H_KV, True
    cache = transformers.DynamicCache()
    cache.update(*(tensors[name].expand(B, -1, -1, -1) for name in ("prefix_k", "prefix_v")), 0)
    keys, values = cache.update(tensors["k"], tensors["v"], 0)
    mask = torch.ones(s, p + s, dtype=torch.bool).tril(p)[None, None]
    y, _ = sdpa_attention_forward(module, tensors["q"], keys, values, attention_mask=mask, scaling=D**-0.5)
    torch.testing.assert_close(y.transpose(1, 2), oracle.eager(**tensors, causal=True))
