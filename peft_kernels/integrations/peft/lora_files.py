"""PEFT's LoRA files for models with FusedLoRALinear layers: ``adapter_config.json`` and ``adapter_model.safetensors``.

A file that is written here loads in PEFT on the same model with plain linear layers, and the other way round. Keys are
``base_model.model.<path>.lora_A.weight`` (r, K) and ``.lora_B.weight`` (N, r), without the adapter's name; a model with
a task's head has it beside them, as ``base_model.model.<path>``.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Mapping

from torch import Tensor, nn

from peft_kernels.integrations.adapter_files import AdapterFolder, check_tensor, fitted, write_values
from peft_kernels.integrations.peft import adapter_folder
from peft_kernels.integrations.peft.lora_config import LoraConfig, Targets, make_config, read_config
from peft_kernels.lora import FusedLoRALinear

_PREFIX = "base_model.model."
_FACTORS = (".lora_A.weight", ".lora_B.weight")
_KEYS = (_PREFIX, f"{_PREFIX}<path>.lora_A.weight or lora_B's")
_ADAPTERS = (FusedLoRALinear,)

_Pair = tuple[Tensor, Tensor]


def save(model: nn.Module, folder: str | os.PathLike[str], adapter_name: str, task_type: str | None) -> None:
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
        factors = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
        r = max(1, factors[0].shape[0])
        for end, factor, shape in zip(_FACTORS, factors, _shapes(layer, r), strict=True):
            check_tensor(f"save_adapter: {name}{end} (whole: gather one that is sharded)", factor, shape)
            tensors[f"{_PREFIX}{name}{end}"] = factor
    task, head = adapter_folder.task_and_head(model, task_type, _ADAPTERS)
    others = (name for name, _ in model.named_modules() if name not in layers)
    config = {**make_config(layers, adapter_name, others), **adapter_folder.base_of(model, task, head)}
    adapter_folder.write(folder, config, {**tensors, **{f"{_PREFIX}{name}": value for name, value in head.items()}})


def load(model: nn.Module, files: AdapterFolder, adapter_name: str, strict: bool) -> None:
    """See ``peft.load_adapter``."""
    config, layers = read_config(files), _layers(model)
    factors, others = _split(files)
    if strict:
        _check_names(files, factors.keys(), layers, config.targets, adapter_name)
    chosen = [name for name in factors if name in layers and config.targets.include(name) is not False]
    if not chosen:
        raise ValueError(f"load_adapter: {files.weights_file} must hold factors of at least one layer, holds none")
    pairs = {name: _pair(files, name, factors[name], _shapes(layers[name], config.rank(name))) for name in chosen}
    for name in pairs:
        if layers[name].merged:
            raise ValueError(f"load_adapter: {name} is merged; call unmerge() before loading")
    scalings = {name: config.scaling(name) for name in pairs}
    head = adapter_folder.head_values(model, files, others, _KEYS, _ADAPTERS, strict)
    _put({layers[name]: pair for name, pair in pairs.items()}, adapter_name, head)
    for name, scaling in scalings.items():
        layers[name].scaling[adapter_name] = layers[name].full_scaling[adapter_name] = scaling


def layer_names(files: AdapterFolder) -> list[str]:
    """Paths of the layers that a file has factors of."""
    return list(_split(files)[0])


def factors_by_layer(
    files: AdapterFolder, config: LoraConfig, sizes: Mapping[str, tuple[int, int]]
) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of each layer that a file has an adapter for.

    Args:
        sizes: in- and out-features of the layers that may have one, by path.

    Raises:
        ValueError: the file has something else, lacks what its configuration says, or does not fit the layers.
    """
    factors, others = _split(files)
    where = f"load_adapter: {files.weights_file}"
    if others:
        raise ValueError(f"{where}: key {next(iter(others))!r} must be {_KEYS[1]}")
    for name in factors:
        if name not in sizes or config.targets.include(name) is False:
            what = "in target_modules" if name in sizes else f"one of {len(sizes)}"
            raise ValueError(
                f"{where}: key '{_PREFIX}{name}{_FACTORS[0]}' must be of a layer that is {what}; it is not"
            )
    for name in sizes:
        if name not in factors and config.targets.include(name):
            raise ValueError(f"{where} must hold factors of {name}, since it is in target_modules")
    if not factors:
        raise ValueError(f"{where} must hold factors of at least one layer, holds none")
    found = {}
    for name, given in factors.items():
        (k, n), r = sizes[name], config.rank(name)
        found[name] = _pair(files, name, given, ((r, k), (n, r)))
    return found


def _layers(model: nn.Module) -> dict[str, FusedLoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FusedLoRALinear)}


def _shapes(layer: FusedLoRALinear, r: int) -> tuple[tuple[int, int], tuple[int, int]]:
    return (r, layer.in_features), (layer.out_features, r)


def _split(files: AdapterFolder) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The factors by layer and end of their key, and all other tensors by key."""
    factors: dict[str, dict[str, Tensor]] = {}
    others = {}
    for key, tensor in files.tensors.items():
        end = next((end for end in _FACTORS if key.startswith(_PREFIX) and key.endswith(end)), None)
        if end is None:
            others[key] = tensor
        else:
            factors.setdefault(key[len(_PREFIX) : -len(end)], {})[end] = tensor
    return factors, others


def _pair(files: AdapterFolder, name: str, given: dict[str, Tensor], shapes: tuple[tuple[int, int], ...]) -> _Pair:
    where = f"load_adapter: {files.weights_file}: {name}"
    for end, shape in zip(_FACTORS, shapes, strict=True):
        factor = end.split(".")[1]
        if end not in given:
            raise ValueError(f"{where} must have lora_A and lora_B, lacks {factor}")
        check_tensor(f"{where}.{factor}", given[end], shape)
    return given[_FACTORS[0]], given[_FACTORS[1]]


def _check_names(
    files: AdapterFolder,
    names: Collection[str],
    layers: Mapping[str, FusedLoRALinear],
    targets: Targets,
    adapter_name: str,
) -> None:
    """Raise unless the file has every layer that has this adapter, or is to have it, and no other."""
    where = f"load_adapter: {files.weights_file}"
    for name in names:
        key = f"{where}: key '{_PREFIX}{name}{_FACTORS[0]}'"
        if name not in layers:
            raise ValueError(
                f"{key} must name a FusedLoRALinear, the model has none there (strict=False leaves it out)"
            )
        if targets.include(name) is False:
            raise ValueError(f"{key} must be of a layer in target_modules (strict=False leaves it out)")
    for name, layer in layers.items() if names else ():
        if name not in names and (adapter_name in layer.scaling or targets.include(name)):
            why = "the model has this adapter there" if adapter_name in layer.scaling else "it is in target_modules"
            raise ValueError(f"{where} must hold factors of {name}, since {why} (strict=False leaves it as it is)")


def _put(pairs: Mapping[FusedLoRALinear, _Pair], adapter_name: str, head: list[tuple[nn.Parameter, Tensor]]) -> None:
    """Write the values, after everything that may fail."""
    added, copies, replaced = [], list(head), []
    try:
        for layer, pair in pairs.items():
            if adapter_name not in layer.scaling:
                layer.add_adapter(adapter_name, pair[0].shape[0])
                added.append(layer)
            for factors, value in zip((layer.lora_A, layer.lora_B), pair, strict=True):
                old = factors[adapter_name]
                if old.dim() != 2:
                    raise ValueError(f"load_adapter: {adapter_name} must be whole, is {tuple(old.shape)}: gather it")
                value = fitted(f"load_adapter: {adapter_name}", value, old)
                if old.shape == value.shape:
                    copies.append((old, value))
                else:
                    replaced.append((factors, nn.Parameter(value.clone(), old.requires_grad)))
    except BaseException:
        for layer in added:
            layer.delete_adapter(adapter_name)
        raise
    write_values(copies)
    for factors, parameter in replaced:
        factors[adapter_name] = parameter
    if any(parameter.requires_grad for _, parameter in replaced):
        warnings.warn(
            f"load_adapter: adapter {adapter_name!r} has another rank now, and new parameters: an optimizer that was "
            "made before trains the old ones",
            stacklevel=4,
        )
