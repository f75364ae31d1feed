"""Tiny random models from configs, with AdapterHub's adapters in them: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable

import adapters
import torch
import transformers
from adapters.composition import Fuse, Stack
from torch import Tensor, nn

VOCABULARY, HIDDEN, LAYERS = 61, 32, 2

_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    # With it, attention sums in another order, and checkpointing turns it off.
    "use_cache": False,
}
_BERT = {**_LLAMA, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 0}
del _BERT["num_key_value_heads"]
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": HIDDEN,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_positions": 64,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "use_cache": False,
}

ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**_BERT)),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**_LLAMA)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**_GPT2)),
}
KINDS = {
    "seq": adapters.SeqBnConfig,
    "double": adapters.DoubleSeqBnConfig,
    "parallel": adapters.ParBnConfig,
}
# Neither a power of two nor alike, so that a result that takes another adapter's weights has another shape.
WIDTHS = (8, 5, 3, 1)


def base(architecture: str = "bert", seed: int = 0) -> nn.Module:
    """The model alone."""
    torch.manual_seed(seed)
    return ARCHITECTURES[architecture]().eval()


def build(
    architecture: str = "bert", kind: str = "seq", names: str = "a", seed: int = 0, **options: object
) -> nn.Module:
    """A model with an adapter per letter of ``names``; all do something, and the first is active and trained."""
    model = base(architecture, seed)
    adapters.init(model)
    for name, width in zip(names, WIDTHS, strict=False):
        model.add_adapter(name, config=KINDS[kind](**{"reduction_factor": HIDDEN / (width + 0.5), **options}))
    randomize(model, seed)
    activate(model, names[0])
    return model


def activate(model: nn.Module, setup: object) -> None:
    """Make a setup active and all adapters trained; ``train_adapter`` takes no nested blocks."""
    for block in [setup, *(setup if isinstance(setup, Stack) else ())]:
        if isinstance(block, Fuse) and block.name not in model.adapters_config.fusions:
            torch.manual_seed(7)
            model.add_adapter_fusion(block.name.split(","))
    model.set_active_adapters(setup)
    for name, parameter in model.named_parameters():
        # A softmax over adapters sees no shift of all keys: the bias's gradient is rounding alone.
        is_shift = "adapter_fusion_layer" in name and name.endswith("key.bias")
        parameter.requires_grad_(("adapters." in name or "adapter_fusion_layer" in name) and not is_shift)
    model.eval()


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Give every adapter parameter values that are neither zero nor alike."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adapters." in name and "adapter_fusion_layer" not in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def tokens(rows: int = 4, length: int = 7, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def run(model: nn.Module, **extra: object) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradient of every parameter that has one."""
    model.zero_grad(set_to_none=True)
    logits = model(input_ids=tokens(), **extra).logits
    if logits.requires_grad:
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))
        (logits.float() * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), gradients
