"""aLoRA: tokens from the invocation on have an adapter, those before have none; PEFT's logits and gradients."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.variants import calculate_alora_offsets
from torch import Tensor

import peft_kernels as pk
from tests.integrations import models
from tests.integrations.mixed import BASE, assert_close, layer_of

INVOCATION = [7, 8]
ROWS, LENGTH = 5, 12
TARGETS = ["q_proj", "k_proj", "v_proj", "down_proj"]

# Sums over tokens, which PEFT takes from a copy of those that are adapted, and here another product sums.
GRADIENT = 1e-13


def build(p: float = 0.0) -> Any:
    torch.manual_seed(0)
    options = {"init_lora_weights": False, "target_modules": TARGETS, "task_type": "CAUSAL_LM", "lora_dropout": p}
    late = {"alora_invocation_tokens": INVOCATION, **options}
    model = peft.get_peft_model(
        models.ARCHITECTURES["llama"][0](), peft.LoraConfig(r=4, lora_alpha=8, **late), autocast_adapter_dtype=False
    )
    model.add_adapter("other", peft.LoraConfig(r=3, **{**late, "alora_invocation_tokens": [9, 9, 9]}))
    model.add_adapter("plain", peft.LoraConfig(r=5, **options))
    model.double().train()
    model.set_requires_grad(["default", "other", "plain"])
    return model


def pair(**options: Any) -> tuple[Any, Any, pk.integrations.Report]:
    plain = build(**options)
    fused = copy.deepcopy(plain)
    return fused, plain, pk.apply(fused, strict=True)


def tokens() -> Tensor:
    """Invoked in the middle, at the end, at the beginning, nowhere, and by the other adapter."""
    ids = torch.randint(10, models.VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    invocation = torch.tensor(INVOCATION)
    ids[0, 3:5] = ids[1, 10:12] = ids[2, 0:2] = invocation
    ids[4, 5:8] = 9
    return ids


def outcome(model: Any, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    logits = model(tokens(), **options).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    (logits * weights).mean().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(fused: Any, plain: Any, **options: Any) -> dict[str, Tensor]:
    (logits, gradients), (expected, theirs) = outcome(fused, **options), outcome(plain, **options)
    assert_close(logits, expected)
    assert gradients.keys() == theirs.keys()
    for name, gradient in gradients.items():
        assert_close(gradient, theirs[name], GRADIENT, name)
    return gradients


def test_training() -> None:
    fused, plain, report = pair()
    gradients = assert_same(fused, plain)
    assert len(gradients) == 2 * 2 * len(TARGETS) and not report.fallback_calls


def test_where_nothing_is_invoked_gradients_are_zeros() -> None:
    fused, plain, report = pair()
    gradients = assert_same(fused, plain, alora_offsets=[None] * ROWS)
    assert gradients and not any(gradient.any() for gradient in gradients.values()) and not report.fallback_calls


@pytest.mark.parametrize("offsets", [[1, LENGTH, 40, 0, None], [2, 2, 2, 2, 2]])
def test_offsets_of_the_caller(offsets: list[int | None]) -> None:
    fused, plain, report = pair()
    assert_same(fused, plain, alora_offsets=offsets)
    assert not report.fallback_calls


def test_a_layer_without_offsets_is_its_base_layer() -> None:
    fused, plain, _ = pair()
    x = torch.randn(3, 4, models.HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(layer_of(fused)(x), layer_of(plain)(x))
    assert torch.equal(layer_of(fused)(x), layer_of(fused).base_layer(x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    """PEFT puts the offsets on the layers of a checkpointed call again when it is repeated."""
    fused, plain, report = pair()
    for model in (fused, plain):
        model.enable_input_require_grads()
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(fused, plain)
    assert not report.fallback_calls


def test_names_beside_plain_lora() -> None:
    fused, plain, report = pair()
    names = ["default", "plain", "default", BASE, "other"]
    for model in (fused, plain):
        model.eval()
    assert_same(fused, plain, adapter_names=names)
    assert not report.fallback_calls


@pytest.mark.parametrize("names", [None, ["default", "plain", "default", BASE, "other"]])
def test_generate(names: list[str] | None) -> None:
    fused, plain, report = pair()
    options: dict[str, Any] = {"max_new_tokens": 5, "pad_token_id": 0, "do_sample": False, "output_scores": True}
    options |= {"return_dict_in_generate": True} | ({} if names is None else {"adapter_names": names})
    got, expected = (model.eval().generate(input_ids=tokens(), **options) for model in (fused, plain))
    assert torch.equal(got.sequences, expected.sequences) and not report.fallback_calls
    for one, other in zip(got.scores, expected.scores, strict=True):
        assert_close(one, other, GRADIENT)


def test_dropout_reaches_invoked_tokens_alone() -> None:
    """The masks are others than PEFT's; tokens before the invocation are those of the base layer, to the bit."""
    fused, _, report = pair(p=0.5)
    layer = layer_of(fused)
    x = torch.randn(2, 6, models.HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    first, second = (layer(x, alora_offsets=[2, None]) for _ in range(2))
    base = layer.base_layer(x)
    for y in (first, second):
        assert torch.equal(y[0, :4], base[0, :4]) and torch.equal(y[1], base[1])
    assert not torch.equal(first[0, 4:], second[0, 4:]) and not report.fallback_calls


class TestPeftS:
    def test_beside_other_active_adapters(self) -> None:
        fused, plain, report = pair()
        for model in (fused, plain):
            model.base_model.set_adapter(["default", "plain"])
        assert_same(fused, plain, alora_offsets=[2, 5, None, 0, 12])
        assert set(report.fallback_calls) == {"an aLoRA adapter of it is active beside others"}
        again = pk.apply(fused)
        assert set(again.fallbacks.values()) == set(report.fallback_calls)

    def test_merging_is_refused(self) -> None:
        fused, _, _ = pair()
        with pytest.raises(NotImplementedError):
            fused.merge_adapter()

    def test_more_dimensions(self) -> None:
        found = []
        fused, plain, report = pair()
        for model in (fused, plain):
            with pytest.raises(IndexError) as caught:
                layer_of(model)(torch.zeros(2, 3, 4, models.HIDDEN, dtype=torch.float64), alora_offsets=[1, 1])
            found.append(str(caught.value))
        assert found[0] == found[1] and set(report.fallback_calls) == {"alora_offsets do not fit x's rows"}


def test_the_offsets_are_those_of_the_tokens() -> None:
    """The tests above rest on it: in the middle, at the end, at the beginning, and not at all."""
    assert calculate_alora_offsets(build().peft_config, "default", tokens()) == [9, 2, 12, None, None]


def test_groups() -> None:
    """Members of a group that were made for it know nothing of invocations."""
    plain = build()
    fused = copy.deepcopy(plain)
    report = pk.apply(fused, groups=[("q_proj", "k_proj", "v_proj")])
    assert_same(fused, plain)
    for model in (fused, plain):
        model.set_adapter("plain")
    assert_same(fused, plain)
    assert not report.fallback_calls
