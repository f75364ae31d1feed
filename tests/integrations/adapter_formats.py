"""One small model for each format of adapter files, and how it is written and read: no other library is needed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from peft_kernels import (
    FusedLoRALinear,
    ParallelAdapter,
    PrefixEncoder,
    PromptEmbedding,
    SerialAdapter,
    insert_adapters,
)
from peft_kernels.integrations import adapterhub, peft

WHERE = {"attention": "somewhere"}


def _lora(value: float) -> nn.Module:
    # The alpha is in the configuration, so that the files of two values are no pair.
    return filled(
        nn.ModuleDict({"a": FusedLoRALinear(4, 6, r=2, lora_alpha=value), "b": FusedLoRALinear(6, 4, r=3)}), value
    )


def _prompt(value: float) -> nn.Module:
    return filled(PromptEmbedding(3, 4), value)


def _prefix(value: float) -> nn.Module:
    return filled(PrefixEncoder(2, 2, 4, 3), value)


def _bottleneck(adapter: type[nn.Module]) -> Callable[[float], nn.Module]:
    def make(value: float) -> nn.Module:
        blocks = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0) for _ in range(2))
        for block in blocks:
            insert_adapters(block, {"attention": adapter(8, 3, "tanh", scale=value)})
        return filled(nn.ModuleDict({"blocks": blocks}), value)

    return make


def filled(model: nn.Module, value: float) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


class Format(NamedTuple):
    """How one library's files are written and read.

    Attributes:
        options: where the adapter's options stand in the configuration.
        numbers: options that must be numbers.
    """

    make: Callable[[float], nn.Module]
    save: Callable[..., None]
    load: Callable[..., None]
    safe: str
    pickled: str
    numbers: tuple[str, ...]
    options: tuple[str, ...] = ()

    def edit(self, folder: Path, **changes: object) -> None:
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text())
        inner = config
        for key in self.options:
            inner = inner[key]
        inner.update(changes)
        path.write_text(json.dumps(config))

    def pickle(self, folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
        """Change the tensors, in a file that can hold any."""
        safe, pickled = folder / self.safe, folder / self.pickled
        tensors = safetensors.torch.load_file(safe) if safe.exists() else torch.load(pickled)
        safe.unlink(missing_ok=True)
        change(tensors)
        torch.save(tensors, pickled)


PEFT = ("adapter_model.safetensors", "adapter_model.bin")
HUB = ("adapter.safetensors", "pytorch_adapter.bin")


def _hub(make: Callable[[float], nn.Module], safe: bool) -> Format:
    def save(model: nn.Module, folder: Any) -> None:
        adapterhub.save_adapter(model, folder, "task", locations=WHERE, use_safetensors=safe)

    def load(model: nn.Module, folder: Any, **options: Any) -> None:
        adapterhub.load_adapter(model, folder, locations=WHERE, **options)

    return Format(make, save, load, *HUB, ("scaling", "reduction_factor"), ("config",))


def _rows(model: nn.Module, folder: Any) -> None:
    peft.save_adapter(model, folder, task_type="CAUSAL_LM")


FORMATS = {
    "lora": Format(_lora, peft.save_adapter, peft.load_adapter, *PEFT, ("r", "lora_alpha", "lora_dropout")),
    "prompt": Format(_prompt, _rows, peft.load_adapter, *PEFT, ("num_virtual_tokens", "token_dim")),
    "prefix": Format(
        _prefix, _rows, peft.load_adapter, *PEFT, ("num_virtual_tokens", "num_layers", "num_attention_heads")
    ),
    "serial": _hub(_bottleneck(SerialAdapter), safe=False),
    "parallel": _hub(_bottleneck(ParallelAdapter), safe=True),
}


def _state(model: nn.Module) -> dict[str, Any]:
    scalings = {name: dict(m.scaling) for name, m in model.named_modules() if isinstance(m, FusedLoRALinear)}
    scales = {
        n: (m.scale, m.activation) for n, m in model.named_modules() if isinstance(m, SerialAdapter | ParallelAdapter)
    }
    tensors = {name: (parameter, parameter.detach().clone()) for name, parameter in model.named_parameters()}
    return {"tensors": tensors, "numbers": (scalings, scales)}


def _assert_as_before(model: nn.Module, before: dict[str, Any]) -> None:
    after = _state(model)
    assert after["numbers"] == before["numbers"]
    assert list(after["tensors"]) == list(before["tensors"])
    for name, (parameter, value) in after["tensors"].items():
        assert parameter is before["tensors"][name][0] and torch.equal(value, before["tensors"][name][1]), name


def assert_refused(files: Format, folder: Any, message: str = "", error: type[Exception] = ValueError) -> None:
    model = files.make(9.0)
    before = _state(model)
    with pytest.raises(error, match=message) as raised:
        files.load(model, folder)
    assert raised.type is error and str(folder) in str(raised.value)
    _assert_as_before(model, before)
