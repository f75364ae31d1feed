"""The two files of a PEFT adapter, read with every check that needs no model, and written."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from peft_kernels.integrations.adapter_files import (
    AdapterFolder,
    check_tensor,
    fitted,
    is_plain,
    read_folder,
    short,
    typed,
    write_folder,
)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_FILE = "adapter_model.bin"

# The modules on top of a model that PEFT trains and saves with the adapter, by its task.
_CLASSIFIER = ("classifier", "score")
_HEADS = {"SEQ_CLS": _CLASSIFIER, "TOKEN_CLS": _CLASSIFIER, "QUESTION_ANS": ("qa_outputs",)}
_TASKS = (*_HEADS, "CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION")

# The end of a transformers class's name tells the task.
_TASK_OF_CLASS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "Model": "FEATURE_EXTRACTION",
}

# Options of every kind of adapter that say nothing about what it computes.
_PROVENANCE = (
    "peft_type",
    "task_type",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "peft_version",
)


def write(folder: str | os.PathLike[str], config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write both files, or neither.

    Raises:
        ValueError: a tensor is not a dense one with values.
        OSError: the files cannot be written.
    """
    from safetensors.torch import save_file

    for key, tensor in tensors.items():
        if not is_plain(tensor):
            raise ValueError(f"save_adapter: {key} must be a dense tensor with values, is a {type(tensor).__name__}")
    # Copies, because two keys of a file may not share memory.
    on_cpu = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"

    def save(path: Path) -> None:
        save_file(on_cpu, path, metadata={"format": "pt"})

    write_folder("save_adapter", folder, (CONFIG_FILE, text), (WEIGHTS_FILE, save))


def read(folder: str | os.PathLike[str], kinds: tuple[str, ...]) -> AdapterFolder:
    """Read both files of an adapter, whose ``peft_type`` must be one of the kinds.

    Raises:
        FileNotFoundError: there is no such folder, or a file is missing.
        ValueError: a file is damaged, or the adapter is of another kind.
    """
    files = read_folder("load_adapter", folder, CONFIG_FILE, WEIGHTS_FILE, PICKLED_FILE)
    where, kind, task = where_of(files), files.config.get("peft_type"), files.config.get("task_type")
    if kind not in kinds:
        raise ValueError(f"{where} must have peft_type {' or '.join(map(repr, kinds))}, got {short(kind)}")
    if task is not None and task not in _TASKS:
        raise ValueError(f"{where} must have a task_type of {', '.join(_TASKS)}, got {short(task)}")
    return files


def where_of(files: AdapterFolder) -> str:
    """How an error about the configuration begins."""
    return f"load_adapter: {files.config_file}"


def refuse_others(files: AdapterFolder, known: tuple[str, ...]) -> None:
    """Raise where a configuration sets what is neither known nor says where the adapter is from.

    Raises:
        ValueError: it does.
    """
    for option in sorted(files.config.keys() - {*known, *_PROVENANCE}):
        if files.config[option]:
            raise ValueError(f"{where_of(files)} must not set {option}, got {short(files.config[option])}")


def _task_of(model: nn.Module, task_type: str | None) -> str | None:
    """The given task, or that of a transformers model's class."""
    if task_type is not None:
        if task_type not in _TASKS:
            raise ValueError(f"save_adapter: task_type must be one of {', '.join(_TASKS)}, got {task_type!r}")
        return _TASKS[_TASKS.index(task_type)]
    if not hasattr(model, "base_model_prefix"):
        return None
    task = next((task for end, task in _TASK_OF_CLASS.items() if type(model).__name__.endswith(end)), None)
    if task == "SEQ_2_SEQ_LM":
        # PEFT's model of that task hands token ids to an encoder and a decoder.
        both = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        return task if both and getattr(model, "main_input_name", "") == "input_ids" else None
    return None if task == "FEATURE_EXTRACTION" and getattr(model, "base_model", None) is not model else task


def task_and_head(
    model: nn.Module, task_type: str | None, adapters: tuple[type[nn.Module], ...]
) -> tuple[str | None, dict[str, nn.Parameter]]:
    """PEFT's task of a model, and by path the parameters that PEFT saves beside an adapter then.

    Raises:
        ValueError: the given task is none, or PEFT would train as a whole what has adapters inside.
    """
    task = _task_of(model, task_type)
    children = _children(model, _HEADS.get(task or "", ()))
    if any(isinstance(module, adapters) for child in children.values() for module in child.modules()):
        if task_type is not None:
            raise ValueError(
                f"save_adapter: {task_type} has PEFT train {', '.join(children)} whole, which has adapters here"
            )
        return None, {}
    return task, _parameters(children)


def base_of(model: nn.Module, task: str | None, head: Iterable[str]) -> dict[str, Any]:
    """What a configuration says about the base model, so that PEFT can make it."""
    kind, name = type(model), getattr(model, "name_or_path", None)
    found = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    return {
        "task_type": task,
        "base_model_name_or_path": str(name) if name else None,
        "auto_mapping": found if task is None and hasattr(model, "base_model_prefix") else None,
        "inference_mode": True,
        "modules_to_save": sorted({name.split(".")[0] for name in head}) or None,
    }


def head_values(
    model: nn.Module,
    files: AdapterFolder,
    others: Mapping[str, Tensor],
    keys: tuple[str, str],
    adapters: tuple[type[nn.Module], ...],
    strict: bool,
) -> list[tuple[nn.Parameter, Tensor]]:
    """Parameters of a task's head, and their values from a file, which may write nothing else beside its adapter.

    Args:
        others: the file's tensors that are none of an adapter, by key.
        keys: what theirs begin with, and what the adapter's are, for the error.
        adapters: classes of modules that a head may not contain.
        strict: whether all of the model's and the file's must be there.

    Raises:
        ValueError: there is something else, or it does not fit.
    """
    prefix, own = keys
    names = _modules_to_save(files)
    children = _children(model, names)
    plain = {k: m for k, m in children.items() if not any(isinstance(module, adapters) for module in m.modules())}
    parameters, found = _parameters(plain), {}
    for key, value in others.items():
        name = key.removeprefix(prefix)
        if name in parameters and key.startswith(prefix):
            where = f"load_adapter: {files.weights_file}: {key!r}"
            check_tensor(where, value, tuple(parameters[name].shape))
            found[name] = fitted(where, value, parameters[name])
        elif strict or name.split(".")[0] not in names:
            raise ValueError(
                f"load_adapter: {files.weights_file}: key {key!r} must be {own}, or {prefix}<path> of a module in "
                f"modules_to_save; {type(model).__name__} has none there"
            )
    for name in parameters.keys() - found.keys() if strict else ():
        raise ValueError(f"load_adapter: {files.weights_file} must hold {prefix}{name}, which is in modules_to_save")
    return [(parameters[name], value) for name, value in found.items()]


def head_parameters(model: nn.Module, files: AdapterFolder) -> list[nn.Parameter]:
    """Parameters of the head that a file has beside its adapter."""
    return list(_parameters(_children(model, _modules_to_save(files))).values())


def _modules_to_save(files: AdapterFolder) -> list[str]:
    where, heads = where_of(files), sorted({name for names in _HEADS.values() for name in names})
    names: list[str] = typed(where, "modules_to_save", files.config.get("modules_to_save"), list, None) or []
    for name in names:
        if name not in heads:
            raise ValueError(f"{where} must not set modules_to_save but to {', '.join(heads)}, got {short(name)}")
    return names


def _children(model: nn.Module, names: Collection[str]) -> dict[str, nn.Module]:
    return {name: child for name, child in model.named_children() if name in names}


def _parameters(children: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    return {f"{name}.{path}": value for name, child in children.items() for path, value in child.named_parameters()}
