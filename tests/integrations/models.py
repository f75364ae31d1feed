"""Tiny random models from configs, with PEFT's LoRA on them: nothing is downloaded."""

from __future__ import annotations

import copy
from collections.abc import Callable

import peft
import torch
import transformers
from torch import Tensor, nn

import peft_kernels as pk
from peft_kernels.integrations.peft.layers import PeftLinear

VOCABULARY, HIDDEN, LAYERS, HEADS = 61, 32, 2, 4

_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": 0,
}
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": HIDDEN,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_positions": 64,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": HIDDEN,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": LAYERS,
    "num_heads": HEADS,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}

ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "llama": (
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**_DECODER)),
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    ),
    "qwen2": (lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**_DECODER)), ["q_proj", "v_proj"]),
    "mistral": (
        lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**_DECODER)),
        ["q_proj", "down_proj"],
    ),
    "gpt2": (lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**_GPT2)), ["c_attn", "c_proj", "c_fc"]),
    "bert": (lambda: transformers.BertForMaskedLM(transformers.BertConfig(**_BERT)), ["query", "value", "dense"]),
    "t5": (lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**_T5)), ["q", "v", "wo"]),
}


def build(architecture: str = "llama", seed: int = 0, adapters: int = 1, **options: object) -> peft.PeftModel:
    """A PEFT model whose adapters all do something."""
    torch.manual_seed(seed)
    make, targets = ARCHITECTURES[architecture]
    options = {"r": 4, "lora_alpha": 8, "target_modules": targets, **options}
    if architecture == "gpt2":
        options = {"fan_in_fan_out": True, **options}
    model = peft.get_peft_model(make().eval(), peft.LoraConfig(**options))
    for index in range(1, adapters):
        model.add_adapter(f"other{index}", peft.LoraConfig(**{**options, "r": 4 + index}))
    randomize(model, seed)
    return model


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Give every adapter parameter values that are neither zero nor alike."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def tokens(rows: int = 3, length: int = 7, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def run(model: nn.Module, **extra: object) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradient of every parameter that has one."""
    ids = tokens()
    model.zero_grad(set_to_none=True)
    inputs = {"input_ids": ids, **extra}
    if model.config.model_type == "t5":
        inputs["decoder_input_ids"] = ids.flip(1)
    logits = model(**inputs).logits
    if logits.requires_grad:
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))
        (logits.float() * weights).mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), gradients


# Two orders of the same float32 sums through two layers; logits and gradients here are of the order of one.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def assert_same(model: nn.Module, other: nn.Module, **extra: object) -> None:
    """Logits and gradients are close."""
    (logits, gradients), (expected, expected_gradients) = run(model, **extra), run(other, **extra)
    torch.testing.assert_close(logits, expected, **CLOSE)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, expected_gradients[name], **CLOSE, msg=lambda text, name=name: f"{name}: {text}"
        )


def pair(architecture: str = "llama", **options: object) -> tuple[nn.Module, nn.Module, pk.integrations.Report]:
    """The same model applied, and as it was."""
    plain = build(architecture, **options)
    fused = copy.deepcopy(plain)
    return fused, plain, pk.apply(fused)


def lora_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, PeftLinear)]
