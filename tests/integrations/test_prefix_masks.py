"""What a model may mask beside the future and padding: never ignored, whatever path it takes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("transformers")

import transformers
from transformers import masking_utils

import peft_kernels as pk
from peft_kernels.integrations.transformers import interface
from peft_kernels.integrations.transformers.prefix_state import LayerPrefixes, PrefixSlot, mark
from tests.integrations.models import HEADS, LAYERS, tokens
from tests.integrations.prefixes import CLOSE, P, base, loss_of, padding, train_step, with_cache, with_prefix

B, L = 3, 7


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """The keyword arguments of each call of prefix_attention."""
    calls: list[dict[str, object]] = []

    def recorded(*args: object, **kwargs: object) -> Tensor:
        calls.append(kwargs)
        return pk.prefix_attention(*args, **kwargs)

    monkeypatch.setattr(interface, "prefix_attention", recorded)
    return calls


class TestMaskFunction:
    """A compact mask stands for exactly the dense one that transformers makes of the same arguments."""

    PATTERNS: ClassVar = {
        "causal": (masking_utils.causal_mask_function, {"allow_is_causal_skip": True}),
        "causal, no skip": (masking_utils.causal_mask_function, {"allow_is_causal_skip": False}),
        "sliding": (masking_utils.sliding_window_causal_mask_function(4), {"local_size": 4}),
        "wide sliding": (masking_utils.sliding_window_causal_mask_function(40), {"local_size": 40}),
        "chunked": (masking_utils.chunked_causal_mask_function(40, torch.tensor([0, 3, 0])), {"local_size": 40}),
        "bidirectional": (
            masking_utils.bidirectional_mask_function,
            {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": True},
        ),
        "bidirectional, no skip": (masking_utils.bidirectional_mask_function, {"allow_is_causal_skip": False}),
        "custom": (lambda b, h, q, k: (q + k) % 3 > 0, {"allow_is_causal_skip": False}),
    }

    @pytest.fixture(autouse=True)
    def _a_call_with_prefixes(self) -> Iterator[None]:
        interface.begin_call(has_prefixes=True)
        yield
        interface.begin_call(has_prefixes=False)

    @pytest.mark.parametrize("padded", ["no mask", "all ones", "left", "short"])
    @pytest.mark.parametrize(("q_length", "q_offset"), [(7, 0), (1, 6), (3, 4), (3, 0), (3, torch.tensor(4))])
    @pytest.mark.parametrize("pattern", PATTERNS)
    def test_stands_for_the_dense_mask(self, pattern: str, q_length: int, q_offset: object, padded: str) -> None:
        function, options = self.PATTERNS[pattern]
        mask = {
            "no mask": None,
            "all ones": torch.ones(B, L, dtype=torch.bool),
            "left": torch.arange(L) >= torch.tensor([3, 0, 1])[:, None],
            "short": torch.ones(B, L - 2, dtype=torch.bool),
        }[padded]
        config = transformers.MistralConfig(sliding_window=options.get("local_size"))
        if pattern == "chunked":
            config = transformers.LlamaConfig()
        common = {"q_offset": q_offset, "mask_function": function, "attention_mask": mask}
        got = interface.mask(B, q_length, L, **common, **options, config=config, device="cpu", use_vmap=False)
        dense = masking_utils.sdpa_mask(B, q_length, L, **common, allow_is_causal_skip=False)
        causal = pattern not in ("bidirectional", "bidirectional, no skip", "custom")
        query = torch.zeros(B, 1, q_length, 1)
        read = interface._dense(got, causal and q_length > 1 and (got is None or got.dim() == 2), query, 0, L)
        read = torch.ones(1, 1, 1, 1, dtype=torch.bool) if read is None else read
        assert torch.equal(read.expand(dense.shape), dense)

    def test_compact_where_it_can_be(self) -> None:
        causal, options = self.PATTERNS["causal"]
        ones = torch.ones(B, L, dtype=torch.bool)
        assert interface.mask(B, L, L, mask_function=causal, attention_mask=ones, **options) is None
        ones[0, 0] = False
        assert interface.mask(B, L, L, mask_function=causal, attention_mask=ones, **options).dim() == 2


class _Attention(nn.Module):
    is_causal = True
    num_key_value_groups = 2


class TestAttentionFunction:
    """Every form of mask, against F.scaled_dot_product_attention on keys joined with the prefix."""

    @staticmethod
    def _run(mask: Tensor | None, **options: object) -> tuple[Tensor, tuple[Tensor, ...]]:
        torch.manual_seed(0)
        q, k, v = torch.randn(B, 4, 3, 8), torch.randn(B, 2, L, 8), torch.randn(B, 2, L, 8)
        pair = torch.randn(2, P, 8), torch.randn(2, P, 8)
        module = _Attention()
        mark(module, PrefixSlot(0, True))
        prefixes = LayerPrefixes(lambda: (pair,), P)
        y, weights = interface.attention(
            module, q, k, v, mask, scaling=0.3, **{interface.ARGUMENT: prefixes, **options}
        )
        assert weights is None and prefixes.taken == {0}
        return y.transpose(1, 2), (q, k, v, *pair)

    @staticmethod
    def _expected(tensors: tuple[Tensor, ...], mask: Tensor) -> Tensor:
        q, k, v, prefix_k, prefix_v = tensors
        k, v = (torch.cat((p.expand(B, -1, -1, -1), x), dim=2) for p, x in ((prefix_k, k), (prefix_v, v)))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True)

    FORMS = ("causal padding", "padding", "rows", "heads", "added", "one row for all")

    @pytest.mark.parametrize(("form", "ahead"), [("none", 0), *((form, n) for form in FORMS for n in (0, P))])
    def test_forms(self, form: str, ahead: int, fused: list[dict[str, object]]) -> None:
        generator = torch.Generator().manual_seed(1)
        visible = torch.rand(B, L, generator=generator) > 0.3
        causal = torch.ones(3, L, dtype=torch.bool).tril(L - 3)
        rows = torch.rand(B, 1, 3, L, generator=generator) > 0.3
        heads = torch.rand(B, 4, 3, L, generator=generator) > 0.3
        one = torch.rand(1, 1, 1, L, generator=generator) > 0.3
        added = torch.randn(B, 1, 3, L, generator=generator)
        given, dense = {
            "none": (None, causal[None, None].expand(B, 1, 3, L)),
            "causal padding": (visible, causal & visible[:, None, None]),
            "padding": (visible[:, None], visible[:, None, None].expand(B, 1, 3, L)),
            "rows": (rows, rows),
            "heads": (heads, heads),
            "added": (added, added),
            "one row for all": (one, one.expand(B, 1, 3, L)),
        }[form]
        if given is not None and ahead:
            fill = torch.zeros if given.is_floating_point() else torch.ones
            given = torch.cat((fill(*given.shape[:-1], P, dtype=given.dtype), given), dim=-1)
        y, tensors = self._run(given)
        fill = torch.zeros if dense.is_floating_point() else torch.ones
        joined = torch.cat((fill(*dense.shape[:-1], P, dtype=dense.dtype), dense), dim=-1)
        torch.testing.assert_close(y, self._expected(tensors, joined), **CLOSE)
        # Columns of the prefix in a mask with rows may hide some of it, and nobody looks.
        assert bool(fused) == (
            form in ("none", "causal padding", "padding") or (form == "one row for all" and not ahead)
        )

    @pytest.mark.parametrize("rows", [1, 3])
    def test_a_prefix_may_be_masked_by_rows(self, rows: int, fused: list[dict[str, object]]) -> None:
        """As by a sliding window, which slides over the prefix too."""
        mask = torch.rand(B, 1, rows, P + L, generator=torch.Generator().manual_seed(1)) > 0.4
        y, tensors = self._run(mask)
        torch.testing.assert_close(y, self._expected(tensors, mask.expand(-1, -1, 3, -1)), **CLOSE)
        assert not fused

    def test_is_causal_of_the_call_counts(self) -> None:
        y, tensors = self._run(None, is_causal=False)
        everything = torch.ones(B, 1, 3, P + L, dtype=torch.bool)
        torch.testing.assert_close(y, self._expected(tensors, everything), **CLOSE)

    def test_position_bias(self) -> None:
        bias = torch.randn(1, 4, 3, P + L, generator=torch.Generator().manual_seed(2))
        y, tensors = self._run(None, is_causal=False, position_bias=bias)
        torch.testing.assert_close(y, self._expected(tensors, bias.expand(B, -1, -1, -1)), **CLOSE)

    def test_what_nobody_computes_raises(self) -> None:
        with pytest.raises(pk.UnsupportedError, match="attention sinks"):
            self._run(None, s_aux=torch.zeros(4))
        with pytest.raises(pk.UnsupportedError, match="softcap"):
            self._run(None, softcap=30.0)
        with pytest.raises(ValueError, match=r"must cover 7 keys, or 12 with the prefix, got \(3, 9\)"):
            self._run(torch.ones(B, 9, dtype=torch.bool))


class TestSlidingWindow:
    @pytest.mark.parametrize("side", ["none", "left", "right"])
    @pytest.mark.parametrize("window", [3, 6, P + L, 40])
    def test_equals_the_prefix_in_a_cache(self, window: int, side: str, fused: list[dict[str, object]]) -> None:
        model, encoder = with_prefix("mistral", sliding_window=window)
        mask = padding(side)
        logits, gradients = train_step(model.train(), mask)
        assert len(fused) == (LAYERS if window >= P + L else 0)
        expected = with_cache(base("mistral", sliding_window=window), encoder, tokens(), mask)
        encoder.zero_grad()
        loss_of(expected, mask).backward()
        torch.testing.assert_close(logits, expected.detach(), **CLOSE)
        torch.testing.assert_close(next(iter(gradients.values())), encoder.embedding.grad, **CLOSE)

    @pytest.mark.parametrize("side", ["none", "left"])
    def test_generation_beyond_the_window(self, side: str) -> None:
        """The window slides over the prefix and leaves it behind, whether or not the cache drops keys."""
        model, _ = with_prefix("mistral", sliding_window=9)
        options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        options |= {"attention_mask": padding(side), "output_logits": True, "return_dict_in_generate": True}
        with torch.no_grad():
            expected = torch.stack(model.generate(tokens(), use_cache=False, **options).logits)
            for cache in (None, transformers.DynamicCache()):
                got = model.generate(tokens(), past_key_values=cache, **options)
                torch.testing.assert_close(torch.stack(got.logits), expected, **CLOSE)
            assert got.past_key_values.get_seq_length() == 7 + 11
            with pytest.raises(pk.UnsupportedError, match="no static cache for sliding windows"):
                model.generate(tokens(), cache_implementation="static", disable_compile=True, **options)


class TestPackedSequences:
    POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])

    def test_each_sees_the_prefix_and_itself(self) -> None:
        model, _ = with_prefix("llama")
        ids = tokens()
        packed = model(ids, position_ids=self.POSITIONS).logits
        apart = torch.cat((model(ids[:, :3]).logits, model(ids[:, 3:]).logits), dim=1)
        torch.testing.assert_close(packed, apart, **CLOSE)

    @pytest.mark.slow
    def test_compiled(self) -> None:
        torch._dynamo.reset()
        model, _ = with_prefix("llama")
        expected = model(tokens(), position_ids=self.POSITIONS).logits
        compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(tokens(), position_ids=self.POSITIONS).logits, expected, **CLOSE)

    def test_in_a_window(self) -> None:
        model, _ = with_prefix("mistral")
        with pytest.raises(pk.UnsupportedError, match="packed sequences in a model with a sliding window"):
            model(tokens(), position_ids=self.POSITIONS)

    def test_lengths_without_positions(self) -> None:
        model, _ = with_prefix("llama")
        with pytest.raises(pk.UnsupportedError, match="packed sequences need position_ids"):
            model(tokens(), cu_seq_lens_q=torch.tensor([0, 3, 7]))

    @pytest.mark.parametrize("added", [False, True])
    def test_the_caller_s_own_mask(self, added: bool) -> None:
        model, _ = with_prefix("llama")
        ids = tokens()
        blocks = torch.block_diag(torch.ones(3, 3), torch.ones(4, 4)).bool().tril()[None, None].expand(B, 1, L, L)
        mask = torch.zeros(B, 1, L, L).masked_fill(~blocks, torch.finfo(torch.float32).min) if added else blocks
        got = model(ids, attention_mask=mask, position_ids=self.POSITIONS).logits
        torch.testing.assert_close(got, model(ids, position_ids=self.POSITIONS).logits, **CLOSE)

    def test_masks_of_other_kinds(self) -> None:
        model, _ = with_prefix("llama")
        with pytest.raises(pk.UnsupportedError, match=r"must be a tensor \(B, L\) or \(B, 1, S, L\), got list"):
            model(tokens(), attention_mask=[[1] * 7] * 3)


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize(("architecture", "option"), [("llama", "attention_dropout"), ("gpt2", "attn_pdrop")])
def test_dropout_in_training(architecture: str, option: str, side: str, fused: list[dict[str, object]]) -> None:
    """The same draws as "sdpa" makes behind a cache; in evaluation there are none, and the kernel runs."""
    model, encoder = with_prefix(architecture, **{option: 0.5})
    plain = base(architecture, **{option: 0.5}).train()
    torch.manual_seed(1)
    logits, _ = train_step(model.train(), padding(side))
    assert not fused
    torch.manual_seed(1)
    torch.testing.assert_close(logits, with_cache(plain, encoder, tokens(), padding(side)), **CLOSE)
    model.eval()(tokens())
    assert len(fused) == LAYERS


@pytest.mark.parametrize("side", ["none", "left"])
def test_a_decoder_that_is_told_to_look_ahead(side: str) -> None:
    model, encoder = with_prefix("llama")
    got = model(tokens(), attention_mask=padding(side), is_causal=False).logits
    expected = with_cache(base("llama"), encoder, tokens(), padding(side), is_causal=False)
    torch.testing.assert_close(got, expected, **CLOSE)
    assert (got - model(tokens(), attention_mask=padding(side)).logits).abs().max() > 0.01


@pytest.mark.parametrize("side", ["none", "left"])
def test_a_bert_that_decodes(side: str) -> None:
    model, encoder = with_prefix("bert", is_decoder=True)
    got = model(tokens(), attention_mask=padding(side))[0]
    expected = with_cache(base("bert", is_decoder=True), encoder, tokens(), padding(side))
    torch.testing.assert_close(got, expected, **CLOSE)


def test_several_tokens_after_a_cache_with_padding() -> None:
    """Causal at the lower right, with a mask over all that came before."""
    model, _ = with_prefix("llama")
    mask = padding("left")
    with torch.no_grad():
        first = model(tokens()[:, :4], attention_mask=mask[:, :4], use_cache=True)
        second = model(tokens()[:, 4:], attention_mask=mask, past_key_values=first.past_key_values)
        whole = model(tokens(), attention_mask=mask)
    torch.testing.assert_close(second.logits, whole.logits[:, 4:], **CLOSE)


def test_head_counts_are_those_of_the_models() -> None:
    """The grouped-query models here have fewer key heads than query heads, so that a mix-up would fail."""
    assert with_prefix("llama")[1].num_kv_heads == HEADS // 2
    assert with_prefix("bert")[1].num_kv_heads == HEADS
