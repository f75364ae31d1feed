"""What a FusedLoRALinear can wrap, and which modules of torch can hold one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from peft_kernels import FusedLoRALinear
from tests.lora.modules import K, N, lora_layer, saved_and_loaded

# Older torch lacks it.
_LINEAR_LOSSES = [(lambda: nn.LinearCrossEntropyLoss(K, 5), "linear")] if hasattr(nn, "LinearCrossEntropyLoss") else []


class _Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class _Renamed(nn.Linear):
    """A subclass that computes nothing of its own."""


def _with_forward(linear: nn.Linear) -> nn.Linear:
    linear.forward = lambda x: x
    return linear


def _hooked(register: str, linear: nn.Linear) -> nn.Linear:
    getattr(linear, register)(lambda *args: None)
    return linear


def _packed(linear: nn.Linear) -> nn.Linear:
    linear.weight = nn.Parameter(linear.weight.detach().to(torch.int8), requires_grad=False)
    return linear


_HOOKS = (
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
    "register_state_dict_pre_hook",
    "register_load_state_dict_post_hook",
)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda linear: nn.Conv1d(2, 2, 1), "must be an nn.Linear, got Conv1d"),
        (lambda linear: linear.weight, "must be an nn.Linear, got Parameter"),
        (lambda linear: lora_layer(), "must be an nn.Linear, got FusedLoRALinear"),
        (lambda linear: _Doubled(K, N), "must have nn.Linear's own forward, got a _Doubled"),
        (_with_forward, "must have nn.Linear's own forward, got a Linear"),
        (lambda linear: nn.MultiheadAttention(8, 2).out_proj, "reads its out_proj's weight and never calls it"),
        *((partial(_hooked, register), "must have no hooks, which would be lost, got _") for register in _HOOKS),
        (nn.utils.parametrizations.weight_norm, "must have a parameter weight, got one that is computed"),
        (nn.utils.spectral_norm, "must have a parameter weight"),
        (lambda linear: prune.l1_unstructured(linear, "bias", 0.5), "must have a parameter bias"),
        (
            lambda linear: nn.LazyLinear(N),
            "must have a floating weight that is a plain tensor, got UninitializedParameter",
        ),
        (_packed, "must have a floating weight that is a plain tensor, got Parameter of torch.int8"),
    ],
)
def test_from_linear_refuses_what_does_more(make: Callable[[nn.Linear], nn.Module], message: str) -> None:
    given = make(nn.Linear(K, N))
    with pytest.raises(ValueError, match=f"FusedLoRALinear: linear .*{message}"):
        FusedLoRALinear.from_linear(given)
    if not isinstance(given, (Tensor, FusedLoRALinear)) and given.weight.is_floating_point():
        assert all(parameter.requires_grad for parameter in given.parameters()), "a refused layer was frozen"


def test_from_linear_takes_a_subclass_that_computes_the_same() -> None:
    linear, x = _Renamed(K, N), torch.randn(3, K)
    assert torch.equal(FusedLoRALinear.from_linear(linear)(x), linear(x))


class TestReadersOfWeights:
    """Modules of torch that read ``linear.weight`` instead of calling the linear layer."""

    @pytest.mark.parametrize("norm_first", [False, True])
    @pytest.mark.parametrize("duplicate", [lambda layer: layer, copy.deepcopy, saved_and_loaded])
    def test_encoder_layer_calls_the_adapters(
        self, norm_first: bool, duplicate: Callable[[nn.Module], nn.Module]
    ) -> None:
        block = nn.TransformerEncoderLayer(K, 4, N, dropout=0.0, batch_first=True, norm_first=norm_first)
        for name in ("linear1", "linear2"):
            fused = FusedLoRALinear.from_linear(block.get_submodule(name), r=4)
            nn.init.normal_(fused.lora_B["default"])
            block.add_module(name, fused) if norm_first else setattr(block, name, fused)
        block, x = duplicate(block), torch.randn(2, 5, K)
        want = block.train()(x)
        with torch.no_grad():
            torch.testing.assert_close(block.eval()(x), want)

    def test_encoder_with_padding_says_how_to_go_on(self) -> None:
        block = nn.TransformerEncoderLayer(K, 4, N, dropout=0.0, batch_first=True)
        block.linear1 = lora_layer()
        encoder = nn.TransformerEncoder(block, 2).eval()
        padding = torch.arange(5) >= torch.tensor([[5], [3]])
        with torch.no_grad(), pytest.raises(ValueError, match="use_nested_tensor = False"):
            encoder(torch.randn(2, 5, K), src_key_padding_mask=padding)
        encoder.use_nested_tensor = False
        x = torch.randn(2, 5, K)
        want = encoder.train()(x, src_key_padding_mask=padding)
        with torch.no_grad():
            torch.testing.assert_close(encoder.eval()(x, src_key_padding_mask=padding), want)

    @pytest.mark.parametrize(("make", "name"), [(lambda: nn.MultiheadAttention(K, 4), "out_proj"), *_LINEAR_LOSSES])
    def test_others_refuse(self, make: Callable[[], nn.Module], name: str) -> None:
        holder = make()
        before = holder.get_submodule(name)
        for register in (setattr, nn.Module.add_module):
            with pytest.raises(
                ValueError, match=f"{type(holder).__name__} reads the weight of its {name} and never calls it"
            ):
                register(holder, name, FusedLoRALinear(K, K))
        assert holder.get_submodule(name) is before

    def test_a_forward_that_calls_it_is_fine(self) -> None:
        class Calling(nn.MultiheadAttention):
            def forward(self, x: Tensor) -> Tensor:
                return self.out_proj(x)

        holder = Calling(K, 4)
        holder.out_proj = FusedLoRALinear(K, N)
        assert holder(torch.randn(2, K)).shape == (2, N)
