"""PEFT's adapter files, both ways, for models built from this package's own modules."""

from __future__ import annotations

import os

from torch import nn

from peft_kernels.integrations.peft import adapter_folder, lora_files, prompt_files
from peft_kernels.lora import FusedLoRALinear
from peft_kernels.prefix import PrefixEncoder
from peft_kernels.prompt import PromptEmbedding

_KINDS: dict[str, type[nn.Module]] = {
    "LORA": FusedLoRALinear,
    "PREFIX_TUNING": PrefixEncoder,
    "PROMPT_TUNING": PromptEmbedding,
}


def save_adapter(
    model: nn.Module, folder: str | os.PathLike[str], adapter_name: str = "default", task_type: str | None = None
) -> None:
    """Write what a model trains as PEFT's ``adapter_config.json`` and ``adapter_model.safetensors``: both, or neither.

    With them goes the head of a classifying or question answering model, which PEFT trains and saves too.

    Args:
        model: contains FusedLoRALinear layers, whose paths become the file's keys; or one PrefixEncoder; or one
            PromptEmbedding; or is one of these.
        folder: is made if it does not exist; its two files are replaced together, and whole after an error.
        adapter_name: which adapter of FusedLoRALinear layers; the name itself is not stored.
        task_type: PEFT's; None takes it from the class of a transformers model. A prefix or a prompt needs one.

    Raises:
        KeyError: no layer has an adapter of this name.
        ValueError: the model has several kinds, or none; ``task_type`` is missing or unknown; one configuration cannot
            express what layers differ in; a tensor is sharded or without values; or ``folder`` is a file.
        OSError: the files cannot be written.
    """
    found = {kind: _of_kind(model, kind) for kind in _KINDS}
    kinds = [kind for kind, modules in found.items() if modules]
    if len(kinds) > 1:
        raise ValueError(f"save_adapter: model must have one kind of adapter, got {kinds}; save each part by itself")
    if kinds and kinds != ["LORA"]:
        prompt_files.save(model, _only(found[kinds[0]], "save_adapter", kinds[0]), folder, task_type)
    else:
        lora_files.save(model, folder, adapter_name, task_type)


def load_adapter(
    model: nn.Module, folder: str | os.PathLike[str], adapter_name: str = "default", strict: bool = True
) -> None:
    """Read a PEFT adapter's files into a model, or into a PrefixEncoder or PromptEmbedding alone.

    An adapter of FusedLoRALinear layers of that name is replaced, with new parameters where its rank is another; which
    one is active does not change, nor do the layers' dropouts. Everything is read and checked before the first tensor
    is touched, and only the adapter and a task's head that ``modules_to_save`` names are written.

    Args:
        model: has what the file is for: a FusedLoRALinear at every path that it names; one PrefixEncoder or
            PromptEmbedding of its sizes; and the head, if it has one.
        folder: a local folder with ``adapter_config.json``, and ``adapter_model.safetensors`` or
            ``adapter_model.bin``; the latter is unpickled with ``weights_only``.
        adapter_name: new name, of an adapter of FusedLoRALinear layers.
        strict: whether file and model must have the same layers and head: those that are in ``target_modules`` or have
            this adapter. False leaves out what only the file has, and leaves as it is what only the model has.

    Raises:
        FileNotFoundError: the folder or a file is missing.
        ValueError: a file is damaged, is none of these kinds, or does not fit the model; or a layer that it names is
            merged. The text names the file or key, what it must be and what it was. The model is as it was.
    """
    files = adapter_folder.read(folder, tuple(_KINDS))
    kind = files.config["peft_type"]
    if kind == "LORA":
        lora_files.load(model, files, adapter_name, strict)
    else:
        prompt_files.load(model, _only(_of_kind(model, kind), "load_adapter", kind), files, strict)


def _of_kind(model: nn.Module, kind: str) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, _KINDS[kind])]


def _only(modules: list[nn.Module], where: str, kind: str) -> prompt_files.Part:
    if len(modules) != 1 or not isinstance(modules[0], (PrefixEncoder, PromptEmbedding)):
        raise ValueError(f"{where}: for {kind} model must have one {_KINDS[kind].__name__}, got {len(modules)}")
    return modules[0]
