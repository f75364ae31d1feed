"""PEFT's (IA)^3 layers: `apply` names them with a reason of their own, and leaves them as they are."""

from __future__ import annotations

import copy

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import peft_kernels as pk
from tests.integrations import models


def _build() -> peft.PeftModel:
    torch.manual_seed(0)
    make, _ = models.ARCHITECTURES["llama"]
    targets = ["k_proj", "v_proj", "down_proj"]
    config = peft.IA3Config(target_modules=targets, feedforward_modules=["down_proj"], init_ia3_weights=False)
    return peft.get_peft_model(make().eval(), config)


def test_it_is_left_to_peft() -> None:
    plain = _build()
    model = copy.deepcopy(plain)
    with pytest.warns(UserWarning, match="0 modules fused, 6 not"):
        report = pk.apply(model)
    assert set(report.fallbacks.values()) == {"it is (IA)^3, whose one multiplication PEFT makes"}
    assert [type(each) for each in model.modules()] == [type(each) for each in plain.modules()]
    (logits, gradients), (expected, wanted) = models.run(model), models.run(plain)
    assert torch.equal(logits, expected) and gradients.keys() == wanted.keys()
    assert all(torch.equal(gradient, wanted[name]) for name, gradient in gradients.items())


def test_strict_refuses_it() -> None:
    with pytest.raises(pk.UnsupportedError, match=r"\(IA\)\^3"):
        pk.apply(_build(), strict=True)
