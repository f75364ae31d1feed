"""Whole decoders for ``benchmarks.end_to_end``: Llama-shaped, random weights, with a method of fine-tuning on them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import peft_kernels as pk
from benchmarks import shapes
from benchmarks.family import Work

# Large enough that what was trained changes the losses: all methods start without an effect.
_START_DEVIATION = 0.02


@dataclass(frozen=True)
class Decoder:
    """A decoder's sizes beyond those of one layer.

    Attributes:
        tied: whether the output layer's weight is that of the embedding.
    """

    shape: shapes.Model
    layers: int
    vocabulary: int
    tied: bool


TINY = Decoder(shapes.Model("tiny", 256, 704, 8, 4, 32, "none: a size for a CPU"), 4, 1024, tied=True)
LLAMA_32_1B = Decoder(shapes.LLAMA_32_1B, 16, 128256, tied=True)
LLAMA_3_8B = Decoder(shapes.LLAMA_3_8B, 32, 128256, tied=False)
DECODERS = {decoder.shape.name.lower(): decoder for decoder in (TINY, LLAMA_32_1B, LLAMA_3_8B)}


@dataclass(frozen=True)
class Step:
    """What is trained: the ``problem`` of a record.

    Attributes:
        model: the decoder's name.
        method: a key of METHODS.
        batch, sequence: texts and tokens of each.
        layers: of the decoder, which may be cut short.
        size: rank, prefix length or bottleneck width.
        dtype: of the frozen weights. What is trained has the dtype that its library gives it: PEFT's LoRA float32.
    """

    model: str
    method: str
    batch: int
    sequence: int
    layers: int
    size: int
    dtype: str


def build(step: Step, device: torch.device) -> nn.Module:
    """Build the decoder with random weights, frozen, and the method's parameters on it, all away from zero."""
    from transformers import LlamaConfig, LlamaForCausalLM

    decoder = DECODERS[step.model]
    shape = decoder.shape
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=step.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=decoder.vocabulary,
        tie_word_embeddings=decoder.tied,
        use_cache=False,
    )
    torch.manual_seed(0)
    # Made where it stays and in its dtype: a copy in float32 on the host would be twice as large.
    with torch.device(device):
        dtype_before = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, step.dtype))
        try:
            model = LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(dtype_before)
    model.requires_grad_(False)
    model = METHODS[step.method](model, step.size).to(device)
    with torch.no_grad():
        for parameter in trained(model):
            parameter.normal_(std=_START_DEVIATION)
    return model.train()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def patched(model: nn.Module) -> tuple[nn.Module | None, str | None]:
    """Return a double of the model on this package's kernels, every parameter shared; or None and why not."""
    double = share(model)
    swapped = [module for module in double.modules() if isinstance(module, TorchSerialAdapter)]
    for module in swapped:
        module.__class__ = pk.SerialAdapter
    if swapped:
        return double, None
    with warnings.catch_warnings():
        # Said by the reason that is returned.
        warnings.simplefilter("ignore")
        report = pk.apply(double)
    if report.fused and not report.fallbacks:
        return double, None
    return None, f"apply: {len(report.fused)} modules fused, {len(report.fallbacks)} not: " + "; ".join(
        sorted(set(report.fallbacks.values())) or ["nothing of a known kind"]
    )


def share(model: nn.Module) -> nn.Module:
    """Copy a model's modules, not its parameters: an 8-billion-parameter model is there once for all variants."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def work(step: Step, model: nn.Module) -> Work:
    """Count the least that a step must do: frozen weights read once, products of the forward and the backward pass.

    Left out, as small: what the method adds, norms, the gradients of what is trained.
    """
    shape = DECODERS[step.model].shape
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and not m.weight.requires_grad)
    tokens = step.batch * step.sequence
    # Two products over half of the (causal) score matrix; their gradients are four more.
    attention = 6 * step.batch * step.sequence**2 * shape.heads * shape.head_dim * step.layers
    size = torch.empty(0, dtype=getattr(torch, step.dtype)).element_size()
    return Work(bytes=linear * size, flops=4 * tokens * linear + attention)


class TorchSerialAdapter(pk.SerialAdapter):
    """The serial adapter, op by op."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.up(nn.functional.gelu(self.down(x)))


def _put_lora(model: nn.Module, size: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=size, lora_alpha=2 * size, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


def _put_prefix(model: nn.Module, size: int) -> nn.Module:
    from peft import PrefixTuningConfig, get_peft_model

    return get_peft_model(model, PrefixTuningConfig(num_virtual_tokens=size, task_type="CAUSAL_LM"))


def _put_adapters(model: nn.Module, size: int) -> nn.Module:
    hidden, weight = model.config.hidden_size, model.lm_head.weight
    sublayers = {"attention": ("self_attn", "self_attn.o_proj"), "feed_forward": ("mlp", "mlp.down_proj")}
    for block in model.model.layers:
        adapters = {
            name: TorchSerialAdapter(hidden, size, "gelu", device=weight.device, dtype=weight.dtype)
            for name in sublayers
        }
        pk.insert_adapters(block, adapters, sublayers)
    return model


METHODS: dict[str, Callable[[nn.Module, int], nn.Module]] = {
    "lora": _put_lora,
    "prefix": _put_prefix,
    "adapter": _put_adapters,
}
