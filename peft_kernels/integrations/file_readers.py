"""Reading what a file claims to be an adapter: nothing is unpickled but tensors, and every fault names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def read_json_object(caller: str, path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON, or no object.
    """
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise ValueError(f"{caller}: {path} must be JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{caller}: {path} must hold an object, got a {type(value).__name__}")
    return value


def read_tensors(caller: str, folder: Path, safe: str, pickled: str) -> tuple[Path, dict[str, Tensor]]:
    """The tensors of a folder by their keys, and the file they are from: the safetensors file where there is one.

    Raises:
        FileNotFoundError: there is neither file.
        ValueError: the file is damaged or holds something else.
    """
    path = next((folder / name for name in (safe, pickled) if (folder / name).exists()), None)
    if path is None:
        raise FileNotFoundError(f"{caller}: {folder} must hold {safe} or {pickled}")
    try:
        tensors = _load(path, path.name == safe)
    except Exception as error:
        # Each format has errors of its own for a damaged file, and torch's unpickler raises whatever the bytes ask for.
        raise ValueError(f"{caller}: {path} cannot be read: {error}") from error
    if not isinstance(tensors, dict):
        raise ValueError(f"{caller}: {path} must hold tensors by name, got a {type(tensors).__name__}")
    for key, value in tensors.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(f"{caller}: {path}: key {key!r} must be a tensor's name, holds a {type(value).__name__}")
    return path, tensors


def _load(path: Path, is_safe: bool) -> Any:
    if is_safe:
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)
