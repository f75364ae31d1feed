"""The two files of a PEFT adapter, read with every check that needs no model, and written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from peft_kernels.integrations import file_readers
from peft_kernels.integrations.file_readers import read_json_object

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_FILE = "adapter_model.bin"


def write(folder: str | Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write both files; the folder is made if it does not exist."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    on_cpu = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    save_file(on_cpu, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def read_config(folder: Path, kinds: tuple[str, ...]) -> dict[str, Any]:
    """Read ``adapter_config.json``, whose ``peft_type`` must be one of the kinds.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged or of another kind.
    """
    path = folder / CONFIG_FILE
    config = read_json_object("load_adapter", path)
    if config.get("peft_type") not in kinds:
        expected = " or ".join(map(repr, kinds))
        raise ValueError(f"load_adapter: {path} must have peft_type {expected}, got {config.get('peft_type')!r}")
    return config


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read ``adapter_model.safetensors``, or ``adapter_model.bin``, which is unpickled with ``weights_only``.

    Raises:
        FileNotFoundError: there is neither.
        ValueError: it is damaged, or holds something else than tensors by name.
    """
    return file_readers.read_tensors("load_adapter", folder, WEIGHTS_FILE, PICKLED_FILE)[1]


def require(folder: Path, config: Mapping[str, Any], option: str, expected: object) -> None:
    """Raise unless a configuration's option is what the model makes it.

    Raises:
        ValueError: it is not.
    """
    if config.get(option) != expected or isinstance(config.get(option), bool):
        path = folder / CONFIG_FILE
        raise ValueError(f"load_adapter: {path} must have {option} = {expected!r}, got {config.get(option)!r}")
