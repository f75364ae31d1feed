"""How often a step of PEFT's QLoRA and DoRA layers reads or writes an activation of its output's size: less often here.

Counted on the torch backend, whose operations do one thing each; the frozen product's own writing is among them. The
Triton kernels join more of them (benchmarks/counts.py).
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
bnb = pytest.importorskip("bitsandbytes")

import peft_kernels as pk
from benchmarks.counts import FREE

# No two products of sizes are one.
M, N, K, R = 130, 96, 64, 4


class _Passes(TorchDispatchMode):
    """Adds up readings and writings of tensors with M N elements."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ not in FREE:
            tensors = [*args, *(kwargs or {}).values(), *(result if isinstance(result, (tuple, list)) else (result,))]
            self.count += sum(isinstance(each, Tensor) and each.numel() == M * N for each in tensors)
        return result


class _Model(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.is_loaded_in_4bit = isinstance(layer, bnb.nn.Linear4bit)
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def _four_bits() -> nn.Module:
    base = bnb.nn.Linear4bit(K, N, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    base.load_state_dict(nn.Linear(K, N, bias=False).state_dict())
    return base.to("cpu")


def _lora(**options: Any) -> Any:
    return peft.LoraConfig(r=R, target_modules=["layer"], init_lora_weights=False, **options)


LAYERS = {
    "QLoRA": (_four_bits, _lora),
    "DoRA": (lambda: nn.Linear(K, N, bias=False), lambda: _lora(use_dora=True)),
    "QDoRA": (_four_bits, lambda: _lora(use_dora=True)),
}


def _passes(model: nn.Module) -> tuple[int, int]:
    """Of a forward and of a backward pass, with gradients of x and of all that is trained."""
    x, dy = torch.randn(M, K).requires_grad_(), torch.randn(M, N)
    model(x).backward(dy)  # what is made once is made
    model.zero_grad()
    with _Passes() as forward:
        y = model(x)
    with _Passes() as backward:
        y.backward(dy)
    return forward.count, backward.count


@pytest.mark.parametrize("name", LAYERS)
def test_fewer_than_peft_s(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_KERNELS_BACKEND", "torch")
    make, config = LAYERS[name]
    torch.manual_seed(0)
    plain = peft.get_peft_model(_Model(make()), config()).train()
    fused = copy.deepcopy(plain)
    report = pk.apply(fused, strict=True)
    (forward, backward), (theirs_forward, theirs_backward) = _passes(fused), _passes(plain)
    assert not report.fallback_calls
    assert forward < theirs_forward
    # LoRA's own passes over dY are PEFT's; those for the gradient of DoRA's magnitudes are fewer.
    assert backward < theirs_backward if "DoRA" in name else backward == theirs_backward
