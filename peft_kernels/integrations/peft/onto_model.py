"""A PEFT LoRA adapter's files onto any model: FusedLoRALinear where they have factors, with their values."""

from __future__ import annotations

import os

from torch import nn

from peft_kernels.integrations.adapter_files import AdapterFolder
from peft_kernels.integrations.peft import adapter_folder, lora_files
from peft_kernels.integrations.peft.lora_config import LoraConfig, read_config
from peft_kernels.lora import FusedLoRALinear, lora_parameters, set_adapter
from peft_kernels.lora.injection import freeze_all_but_adapters, put_layers


def from_peft(
    model: nn.Module, folder: str | os.PathLike[str], adapter_name: str = "default", is_trainable: bool = False
) -> list[str]:
    """Put a PEFT LoRA adapter on a model without PEFT, and make it the active one.

    FusedLoRALinear takes the place of each linear layer that the file has factors of, with the file's ranks, scalings
    and dropout. Layers that are FusedLoRALinear already keep their dropout, and get a further adapter, or other values
    in that of this name; those that the file does not name have no active adapter then. All parameters that are no
    adapter's are frozen, as ``inject_lora`` does. Everything is read and checked before the model is changed.

    Args:
        model: changed in place; the paths of its layers are those of the model that the adapter was trained on.
        folder: as ``load_adapter``'s.
        adapter_name: of the new adapter; its name is not in the files.
        is_trainable: whether the adapter trains, and a head that ``modules_to_save`` names; PEFT's default too is that
            they do not.

    Returns:
        The paths of the layers that have it.

    Raises:
        FileNotFoundError: the folder or a file is missing.
        ValueError: a file is damaged, no LoRA adapter, or does not fit the model; a layer of the model is merged, or
            one that the file names cannot carry an adapter. The model is as it was.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"from_peft: model must be a torch.nn.Module, got {type(model).__name__}")
    files = adapter_folder.read(folder, ("LORA",))
    config, names = read_config(files), lora_files.layer_names(files)
    for path, part in _lora_layers(model).items():
        if part.merged:
            raise ValueError(f"from_peft: {path or 'model'} is merged; call unmerge() first")
    linears = _linears(model, files, names)
    undo = put_layers(model, linears, lambda name, part: _layer(part, config, name, adapter_name))
    try:
        lora_files.load(model, files, adapter_name, strict=True)
    except BaseException:
        undo()
        raise
    set_adapter(model, adapter_name)
    freeze_all_but_adapters(model)
    for parameter in (*lora_parameters(model, adapter_name), *adapter_folder.head_parameters(model, files)):
        parameter.requires_grad_(is_trainable)
    return [path for path, part in _lora_layers(model).items() if adapter_name in part.scaling]


def _lora_layers(model: nn.Module) -> dict[str, FusedLoRALinear]:
    return {path: part for path, part in model.named_modules() if isinstance(part, FusedLoRALinear)}


def _linears(model: nn.Module, files: AdapterFolder, names: list[str]) -> dict[str, nn.Linear]:
    """The layers that a file names and that are no FusedLoRALinear yet."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found = {}
    for name in names:
        part = modules.get(name)
        if isinstance(part, nn.Linear) and name:
            found[name] = part
        elif not isinstance(part, FusedLoRALinear):
            there = "the model has none there" if part is None else f"there is a {type(part).__name__}"
            raise ValueError(
                f"from_peft: {files.weights_file} has factors of {name!r}, which must be an nn.Linear; {there}"
            )
    return found


def _layer(part: nn.Linear, config: LoraConfig, name: str, adapter_name: str) -> FusedLoRALinear:
    r = config.rank(name)
    try:
        return FusedLoRALinear.from_linear(
            part, r=r, lora_dropout=config.dropout, use_rslora=config.use_rslora, adapter_name=adapter_name
        )
    except ValueError as error:
        raise ValueError(f"from_peft: {name}: {error}") from error
