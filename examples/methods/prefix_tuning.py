"""Prefix tuning (Li & Liang 2021, arXiv:2101.00190): PrefixEncoder and prefix_attention, and PEFT's beside them.

Both train the prefixes through a small MLP. PEFT runs it for every text of a batch, and hands its result over as a
cache, to which the model concatenates each layer's keys and values. What is served here is the MLP's result alone.
"""

from __future__ import annotations

import torch
from torch import nn

from examples.methods import Method, Serving

LENGTH = 8
# Of the MLP: the encoder's own width, the only one for which PEFT's MLP and PrefixEncoder's have the same shapes.
MLP_WIDTH = 384
# Of 3e-4, 1e-3 and 3e-3 over 163 steps, with one seed, the best accuracy on the validation split.
LEARNING_RATE = 3e-4


def put_fused(encoder: nn.Module) -> nn.Module:
    """Freeze the encoder and put a prefix on each of its attention layers."""
    from peft_kernels.integrations.transformers import add_prefix, prefix_encoder

    encoder.requires_grad_(False)
    add_prefix(encoder, prefix_encoder(encoder, LENGTH, reparam_hidden=MLP_WIDTH))
    return encoder


def put_unfused(encoder: nn.Module) -> nn.Module:
    """Let PEFT do the same."""
    from peft import PrefixTuningConfig, get_peft_model

    config = PrefixTuningConfig(
        task_type="FEATURE_EXTRACTION",
        num_virtual_tokens=LENGTH,
        prefix_projection=True,
        encoder_hidden_size=MLP_WIDTH,
    )
    return get_peft_model(encoder, config)


@torch.no_grad()
def copy_start(fused: nn.Module, unfused: nn.Module) -> None:
    """Give PEFT's table and MLP the values of the fused ones."""
    ours, theirs = fused.prefix_encoder, unfused.prompt_encoder["default"]
    theirs.embedding.weight.copy_(ours.embedding)
    theirs.transform.load_state_dict(ours.mlp.state_dict())


def fold(encoder: nn.Module) -> None:
    """Keep the prefixes and give up the MLP that made them."""
    from peft_kernels.integrations.transformers import add_prefix, remove_prefix

    add_prefix(encoder, remove_prefix(encoder).fold())


METHOD = Method(
    name="prefix tuning",
    settings={"prefix length": LENGTH, "layers": "all", "MLP's width": MLP_WIDTH},
    learning_rate=LEARNING_RATE,
    unfused=put_unfused,
    unfused_by="PEFT",
    fused=put_fused,
    copy_start=copy_start,
    serving=Serving("folded", fold, exact=True),
)
