"""PEFT's LoRA files for models with FusedLoRALinear layers: ``adapter_config.json`` and ``adapter_model.safetensors``.

A file that is written here loads in PEFT on the same model with plain linear layers, and the other way round. Keys are
``base_model.model.<path>.lora_A.weight`` (r, K) and ``.lora_B.weight`` (N, r), without the adapter's name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from peft_kernels.integrations.file_readers import read_json_object, read_tensors
from peft_kernels.lora_linear import FusedLoRALinear

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_FILE = "adapter_model.bin"
_PREFIX = "base_model.model."
_FACTORS = {".lora_A.weight": 0, ".lora_B.weight": 1}

# What a configuration may ask for that plain LoRA on a linear layer has no place for; each must be absent or empty.
_UNSUPPORTED = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "layer_replication",
    "megatron_config",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "arrow_config",
    "use_qalora",
    "use_bdlora",
)


class _Adapter(NamedTuple):
    """One layer's part of a file."""

    lora_a: Tensor
    lora_b: Tensor
    scaling: float


def save_adapter(model: nn.Module, folder: str | Path, adapter_name: str = "default") -> None:
    """Write an adapter of all FusedLoRALinear layers that have one of the name.

    Args:
        model: contains FusedLoRALinear layers; their paths become the file's keys.
        folder: is made if it does not exist; its two files are overwritten.
        adapter_name: which adapter; the name itself is not stored.

    Raises:
        KeyError: no layer has an adapter of this name.
        ValueError: layers differ in dropout or in ``use_rslora``, which one configuration cannot express.
    """
    from safetensors.torch import save_file

    layers = {name: layer for name, layer in _layers(model).items() if adapter_name in layer.scaling}
    if not layers:
        raise KeyError(f"save_adapter: no FusedLoRALinear has an adapter {adapter_name!r}")
    config = _config(layers, adapter_name)
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = layer.lora_A[adapter_name].detach().cpu().contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = layer.lora_B[adapter_name].detach().cpu().contiguous()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load_adapter(model: nn.Module, folder: str | Path, adapter_name: str = "default") -> None:
    """Read an adapter file into the FusedLoRALinear layers of a model, as an adapter of the given name.

    An adapter of that name is replaced, whatever its rank; which adapter is active does not change. Everything is read
    and checked before the first layer is touched.

    Args:
        model: has a FusedLoRALinear at every path that the file names.
        folder: holds ``adapter_config.json``, and ``adapter_model.safetensors`` or ``adapter_model.bin``; the latter
            is unpickled with ``weights_only``.
        adapter_name: new name.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, is no plain LoRA adapter, or does not fit the model; or a layer that it names is
            merged. The text names the file or key, what it must be and what it was. The model is as it was.
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG_FILE)
    layers = _layers(model)
    _, tensors = read_tensors("load_adapter", folder, WEIGHTS_FILE, PICKLED_FILE)
    adapters = _adapters(folder, tensors, config, layers)
    for name in adapters:
        if layers[name].merged:
            raise ValueError(f"load_adapter: {name} is merged; call unmerge() before loading")
    for name, adapter in adapters.items():
        _put(layers[name], adapter_name, adapter)


def _layers(model: nn.Module) -> dict[str, FusedLoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FusedLoRALinear)}


def _config(layers: Mapping[str, FusedLoRALinear], adapter: str) -> dict[str, Any]:
    shared = {(layer.lora_dropout, layer.use_rslora) for layer in layers.values()}
    if len(shared) > 1:
        raise ValueError(f"save_adapter: layers must share dropout and use_rslora, got {sorted(shared)}")
    ((dropout, use_rslora),) = shared
    ranks = {name: layer.lora_A[adapter].shape[0] for name, layer in layers.items()}
    alphas = {
        name: layer.scaling[adapter] * (math.sqrt(ranks[name]) if use_rslora else ranks[name])
        for name, layer in layers.items()
    }
    r, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "target_modules": sorted(layers),
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != r},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        "lora_dropout": dropout,
        "use_rslora": use_rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json_object("load_adapter", path)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"load_adapter: {path} must have peft_type 'LORA', got {config.get('peft_type')!r}")
    for option in _UNSUPPORTED:
        if config.get(option):
            raise ValueError(f"load_adapter: {path} must not set {option}, got {config[option]!r}")
    for option in ("r", "lora_alpha"):
        if isinstance(config.get(option), bool) or not isinstance(config.get(option), (int, float)):
            raise ValueError(f"load_adapter: {path} must have a number {option}, got {config.get(option)!r}")
    return config


def _adapters(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], layers: Mapping[str, FusedLoRALinear]
) -> dict[str, _Adapter]:
    """Pair the factors by layer, and check them against the layers and the configuration."""
    factors: dict[str, list[Tensor | None]] = {}
    for key, tensor in tensors.items():
        suffix = next((suffix for suffix in _FACTORS if key.endswith(suffix)), None)
        if suffix is None or not key.startswith(_PREFIX):
            raise ValueError(f"load_adapter: {folder}: key {key!r} must be {_PREFIX}<path>.lora_A.weight or lora_B's")
        name = key[len(_PREFIX) : -len(suffix)]
        if name not in layers:
            raise ValueError(
                f"load_adapter: {folder}: key {key!r} must name a FusedLoRALinear, the model has none there"
            )
        factors.setdefault(name, [None, None])[_FACTORS[suffix]] = tensor
    if not factors:
        raise ValueError(f"load_adapter: {folder} must hold factors of at least one layer, holds none")
    return {name: _checked(folder, name, a, b, config, layers[name]) for name, (a, b) in factors.items()}


def _checked(
    folder: Path,
    name: str,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    config: Mapping[str, Any],
    layer: FusedLoRALinear,
) -> _Adapter:
    where = f"load_adapter: {folder}: {name}"
    if lora_a is None or lora_b is None:
        raise ValueError(f"{where} must have lora_A and lora_B, lacks {'lora_A' if lora_a is None else 'lora_B'}")
    r = int(_by_pattern(config.get("rank_pattern"), name, config["r"]))
    for label, tensor, expected in (
        ("lora_A", lora_a, (r, layer.in_features)),
        ("lora_B", lora_b, (layer.out_features, r)),
    ):
        if tuple(tensor.shape) != expected or not tensor.is_floating_point():
            raise ValueError(f"{where}.{label} must be floating {expected}, got {tensor.dtype} {tuple(tensor.shape)}")
    alpha = _by_pattern(config.get("alpha_pattern"), name, config["lora_alpha"])
    return _Adapter(lora_a, lora_b, alpha / (math.sqrt(r) if config.get("use_rslora") else r))


def _by_pattern(patterns: Mapping[str, float] | None, name: str, default: float) -> float:
    """PEFT's rule: a pattern is a regular expression for the whole path, or for its end after a dot."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def _put(layer: FusedLoRALinear, adapter_name: str, adapter: _Adapter) -> None:
    r = adapter.lora_a.shape[0]
    if adapter_name not in layer.scaling:
        layer.add_adapter(adapter_name, r)
    for factors, value in ((layer.lora_A, adapter.lora_a), (layer.lora_B, adapter.lora_b)):
        old = factors[adapter_name]
        if old.shape == value.shape:
            # In place, for an optimizer that holds the parameter.
            old.data.copy_(value)
        else:
            factors[adapter_name] = nn.Parameter(value.to(old.device, old.dtype, copy=True), old.requires_grad)
    layer.scaling[adapter_name] = adapter.scaling
