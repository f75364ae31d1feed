"""Models with this package's own adapters where AdapterHub would have its own, and what tests of their files do."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from peft_kernels import ParallelAdapter, SerialAdapter, insert_adapters
from tests.adapterhub.models import HIDDEN, base, randomize, tokens

BOTH = ("attention", "feed_forward")
# Where AdapterHub taps these blocks; insert_adapters knows BERT's.
SUBLAYERS = {
    "bert": None,
    "llama": {
        "attention": ("input_layernorm", "self_attn.o_proj"),
        "feed_forward": ("post_attention_layernorm", "mlp"),
    },
    "gpt2": {"attention": ("ln_1", "attn.resid_dropout"), "feed_forward": ("ln_2", "mlp")},
}
BLOCKS = {"bert": "encoder.layer", "llama": "layers", "gpt2": "h"}
TYPES = {"double": SerialAdapter, "parallel": ParallelAdapter}


def with_adapters(
    kind: str = "double",
    architecture: str = "bert",
    names: tuple[str, ...] = BOTH,
    layers: tuple[int, ...] = (0, 1),
    widths: tuple[int, int] = (5, 5),
    **options: object,
) -> nn.Module:
    """A model with adapters of this package's, which all do something; ``widths`` are those of the two layers."""
    model = base(architecture)
    blocks = model.base_model.get_submodule(BLOCKS[architecture])
    for index in layers:
        inserted = {name: TYPES[kind](HIDDEN, widths[index], **options) for name in names}
        insert_adapters(blocks[index], inserted, SUBLAYERS[architecture])
    randomize(model, 3)
    return model


def logits_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens())[0]


def edit_config(folder: Path, key: str, value: object) -> None:
    path = folder / "adapter_config.json"
    outer = json.loads(path.read_text())
    outer["config"][key] = value
    path.write_text(json.dumps(outer))
