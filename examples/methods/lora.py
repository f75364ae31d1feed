"""LoRA on all six linear layers of every block: FusedLoRALinear, and PEFT's lora.Linear beside it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from examples.methods import Method, Serving
from peft_kernels import FusedLoRALinear

RANK = 8
ALPHA = 16
# Of 1e-3, 2e-3 and 4e-3 over 163 steps, with one seed, the best accuracy on the validation split.
LEARNING_RATE = 2e-3
# "output.dense" ends the names of both the attention's output projection and the second feed-forward projection.
TARGETS = ("query", "key", "value", "intermediate.dense", "output.dense")


def put_fused(encoder: nn.Module) -> nn.Module:
    """Replace the targets in place by layers that share their weights."""
    encoder.requires_grad_(False)
    targets = [
        name for name, module in encoder.named_modules() if isinstance(module, nn.Linear) and name.endswith(TARGETS)
    ]
    for name in targets:
        layer = FusedLoRALinear.from_linear(encoder.get_submodule(name), r=RANK, lora_alpha=ALPHA)
        encoder.set_submodule(name, layer)
    return encoder


def put_unfused(encoder: nn.Module) -> nn.Module:
    """Let PEFT replace the same targets, without the wrapper around the model, whose time is not the layer's."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, bias="none", target_modules=list(TARGETS))
    return inject_adapter_in_model(config, encoder)


@torch.no_grad()
def copy_start(fused: nn.Module, unfused: nn.Module) -> None:
    """Give PEFT's layers the A and B of the fused ones.

    Raises:
        ValueError: the two encoders carry adapters in different places.
    """
    from peft.tuners.lora import Linear

    ours = dict(fused_layers(fused))
    theirs = {name: module for name, module in unfused.named_modules() if isinstance(module, Linear)}
    if ours.keys() != theirs.keys():
        raise ValueError(f"lora: fused and unfused layers differ: {sorted(ours.keys() ^ theirs.keys())}")
    for name, layer in ours.items():
        theirs[name].lora_A["default"].weight.copy_(layer.lora_A["default"])
        theirs[name].lora_B["default"].weight.copy_(layer.lora_B["default"])


def fused_layers(encoder: nn.Module) -> Iterator[tuple[str, FusedLoRALinear]]:
    """Walk through the package's layers and their names."""
    for name, module in encoder.named_modules():
        if isinstance(module, FusedLoRALinear):
            yield name, module


def merge(encoder: nn.Module) -> None:
    """Merge every adapter into a copy of its weight."""
    for _, layer in fused_layers(encoder):
        layer.merge()


def unmerge(encoder: nn.Module) -> None:
    """Go back to weights and adapters apart."""
    for _, layer in fused_layers(encoder):
        layer.unmerge()


METHOD = Method(
    name="LoRA",
    settings={"rank": RANK, "alpha": ALPHA, "dropout": 0.0, "targets": TARGETS},
    learning_rate=LEARNING_RATE,
    unfused=put_unfused,
    unfused_by="PEFT",
    fused=put_fused,
    copy_start=copy_start,
    serving=Serving("merged", merge, exact=False, undo=unmerge),
)
