"""The two files of a PEFT adapter, read with every check that needs no model, and written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise ValueError(f"load_adapter: {path} must be JSON: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") not in kinds:
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        expected = " or ".join(map(repr, kinds))
        raise ValueError(f"load_adapter: {path} must have peft_type {expected}, got {kind!r}")
    return config


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read ``adapter_model.safetensors``, or ``adapter_model.bin``, which is unpickled with ``weights_only``.

    Raises:
        FileNotFoundError: there is neither.
        ValueError: it is damaged, or holds something else than tensors by name.
    """
    path = folder / WEIGHTS_FILE
    try:
        if path.exists():
            from safetensors.torch import load_file

            return load_file(path)
        path = folder / PICKLED_FILE
        if path.exists():
            tensors = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
                raise ValueError(f"it holds a {type(tensors).__name__}, not a dict of tensors")
            return tensors
    except Exception as error:
        # Each format has errors of its own for a damaged file, and torch's unpickler raises whatever the bytes ask for.
        raise ValueError(f"load_adapter: {path} cannot be read: {error}") from error
    raise FileNotFoundError(f"load_adapter: {folder} must hold {WEIGHTS_FILE} or {PICKLED_FILE}")


def require(folder: Path, config: Mapping[str, Any], option: str, expected: object) -> None:
    """Raise unless a configuration's option is what the model makes it.

    Raises:
        ValueError: it is not.
    """
    if config.get(option) != expected or isinstance(config.get(option), bool):
        path = folder / CONFIG_FILE
        raise ValueError(f"load_adapter: {path} must have {option} = {expected!r}, got {config.get(option)!r}")
