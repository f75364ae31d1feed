"""PEFT's LoRA files for models with FusedLoRALinear layers: ``adapter_config.json`` and ``adapter_model.safetensors``.

A file that is written here loads in PEFT on the same model with plain linear layers, and the other way round. Keys are
``base_model.model.<path>.lora_A.weight`` (r, K) and ``.lora_B.weight`` (N, r), without the adapter's name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from peft_kernels.integrations.peft import adapter_folder
from peft_kernels.lora import FusedLoRALinear

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


def save(model: nn.Module, folder: str | Path, adapter_name: str) -> None:
    """See ``peft.save_adapter``.

    Raises:
        KeyError: no layer has an adapter of this name.
        ValueError: layers differ in dropout or in ``use_rslora``, which one configuration cannot express.
    """
    layers = {name: layer for name, layer in _layers(model).items() if adapter_name in layer.scaling}
    if not layers:
        raise KeyError(f"save_adapter: no FusedLoRALinear has an adapter {adapter_name!r}")
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = layer.lora_A[adapter_name]
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = layer.lora_B[adapter_name]
    adapter_folder.write(folder, _config(layers, adapter_name), tensors)


def load(model: nn.Module, folder: Path, config: Mapping[str, Any], adapter_name: str) -> None:
    """See ``peft.load_adapter``."""
    _check_config(folder / adapter_folder.CONFIG_FILE, config)
    layers = _layers(model)
    adapters = _adapters(folder, adapter_folder.read_tensors(folder), config, layers)
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


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    for option in _UNSUPPORTED:
        if config.get(option):
            raise ValueError(f"load_adapter: {path} must not set {option}, got {config[option]!r}")
    for option in ("r", "lora_alpha"):
        if isinstance(config.get(option), bool) or not isinstance(config.get(option), (int, float)):
            raise ValueError(f"load_adapter: {path} must have a number {option}, got {config.get(option)!r}")


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
