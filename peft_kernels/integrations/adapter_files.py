"""Adapter folders of other libraries: a configuration in JSON, and a file of tensors.

Reading unpickles nothing but tensors, and every fault names the file; writing leaves the old files or the new ones.
"""

from __future__ import annotations

import contextlib
import json
import os
import reprlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Floating for torch, and without a conversion to anything.
_PACKED = getattr(torch, "float4_e2m1fn_x2", None)


class AdapterFolder(NamedTuple):
    """What a folder holds, and in which files."""

    config_file: Path
    config: dict[str, Any]
    weights_file: Path
    tensors: dict[str, Tensor]


def read_folder(caller: str, folder: str | os.PathLike[str], config: str, safe: str, pickled: str) -> AdapterFolder:
    """Read both files of a local folder; the tensors are in the safetensors file where there is one.

    Raises:
        FileNotFoundError: there is no such folder, or a file is missing.
        ValueError: a file is damaged or holds something else, or was replaced in the meantime.
    """
    path = _local_folder(caller, folder, config)
    config_file, weights_file = path / config, next((path / n for n in (safe, pickled) if (path / n).exists()), None)
    text = _bytes(caller, config_file)
    value = _json_object(caller, config_file, text)
    if weights_file is None:
        raise FileNotFoundError(f"{caller}: {path} must hold {safe} or {pickled}")
    tensors = _tensors(caller, weights_file, weights_file.name == safe)
    if _bytes(caller, config_file) != text:
        raise ValueError(f"{caller}: {config_file} was replaced while {weights_file.name} was read; load it again")
    return AdapterFolder(config_file, value, weights_file, tensors)


def _local_folder(caller: str, folder: str | os.PathLike[str], config: str) -> Path:
    path = as_path(caller, folder)
    if os.path.isfile(path):
        raise ValueError(f"{caller}: folder must be the folder that holds {config}, got the file {path}")
    if not os.path.isdir(path):
        hint = (
            "huggingface_hub.snapshot_download makes one of a hub id"
            if path.parts[:1] != ("~",)
            else "'~' is not expanded"
        )
        raise FileNotFoundError(f"{caller}: folder must be a local folder, there is none at {path} ({hint})")
    if not (path / config).exists():
        named = sorted(file.parent.name for file in path.glob(f"*/{config}"))
        inside = f"; its folders {', '.join(named)} do" if named else ""
        raise FileNotFoundError(f"{caller}: {path} must hold {config}{inside}")
    return path


def as_path(caller: str, folder: str | os.PathLike[str]) -> Path:
    """A folder's path.

    Raises:
        ValueError: it is something else.
    """
    try:
        return Path(folder)
    except TypeError:
        raise ValueError(f"{caller}: folder must be a path, got a {type(folder).__name__}") from None


def _bytes(caller: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{caller}: {path} cannot be read: {error}") from error


def _json_object(caller: str, path: Path, text: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} stands twice")
        return result

    try:
        value = json.loads(text.decode(), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{caller}: {path} must be JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{caller}: {path} must hold an object, got a {type(value).__name__}")
    return value


def _tensors(caller: str, path: Path, is_safe: bool) -> dict[str, Tensor]:
    try:
        tensors = _load(path, is_safe)
    except Exception as error:
        # Each format has errors of its own for a damaged file, and torch's unpickler raises whatever the bytes ask for.
        raise ValueError(f"{caller}: {path} cannot be read: {error}") from error
    if not isinstance(tensors, dict):
        raise ValueError(f"{caller}: {path} must hold tensors by name, got a {type(tensors).__name__}")
    for key, value in tensors.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(f"{caller}: {path}: key {key!r} must be a tensor's name, holds a {type(value).__name__}")
        if not is_plain(value):
            raise ValueError(f"{caller}: {path}: {key!r} must be a dense tensor with values, is {_kind(value)}")
    return tensors


def _load(path: Path, is_safe: bool) -> Any:
    if is_safe:
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor has its own values: it is dense, of no subclass, and on a device that has memory."""
    ordinary = type(tensor) in (Tensor, nn.Parameter) and not tensor.is_nested
    return ordinary and tensor.layout is torch.strided and not tensor.is_meta


def _kind(tensor: Tensor) -> str:
    return f"a {type(tensor).__name__} on {tensor.device.type}, {'nested' if tensor.is_nested else tensor.layout}"


def check_tensor(where: str, value: Tensor, shape: tuple[int, ...]) -> None:
    """Check a tensor's shape, and that it is floating.

    Raises:
        ValueError: it is another. The text starts with ``where``, as those of the checks below.
    """
    if tuple(value.shape) != shape or not value.is_floating_point() or value.dtype == _PACKED:
        raise ValueError(f"{where} must be floating {shape}, got {value.dtype} {tuple(value.shape)}")


def fitted(where: str, value: Tensor, parameter: Tensor) -> Tensor:
    """A floating tensor in the dtype and on the device of the parameter that it is for, so that a copy cannot fail.

    Raises:
        ValueError: the parameter is no ordinary one.
    """
    if not is_plain(parameter):
        raise ValueError(f"{where} is for a parameter that must be a dense tensor with values, is {_kind(parameter)}")
    return value.detach().to(parameter.device, parameter.dtype)


def number(where: str, key: str, value: object) -> float:
    """A finite number of a configuration.

    Raises:
        ValueError: it is none.
    """
    largest = sys.float_info.max
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -largest <= value <= largest:
        raise ValueError(f"{where} must have a finite number as {key}, got {short(value)}")
    return value


def typed(where: str, key: str, value: object, *kinds: type | None) -> Any:
    """A value of a configuration that is of one of the types, or None where that is among them.

    Raises:
        ValueError: it is not.
    """
    if type(value) not in [type(None) if kind is None else kind for kind in kinds]:
        names = " or ".join("null" if kind is None else kind.__name__ for kind in kinds)
        raise ValueError(f"{where} must have {key} of type {names}, got {short(value)}")
    return value


def short(value: object) -> str:
    """A value for an error's text, however long or deep it is."""
    return reprlib.repr(value)


def write_values(values: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy what ``fitted`` made into its parameters: in place, for an optimizer that holds them."""
    for parameter, value in values:
        parameter.data.copy_(value)


def write_folder(
    caller: str,
    folder: str | os.PathLike[str],
    config: tuple[str, str],
    weights: tuple[str, Callable[[Path], object]],
    obsolete: tuple[str, ...] = (),
) -> None:
    """Write both files of a folder, which is made if it does not exist: beside the old ones, which then give way.

    After an error the old files are there as they were. A crash leaves the old pair, the new one, or no configuration,
    and ``read_folder`` meanwhile finds one of these: never one file of each.

    Args:
        config: name and text.
        weights: name, and what writes the file at a path.
        obsolete: names of files that would be read instead of these.

    Raises:
        ValueError: there is a file where the folder would be, or a folder where a file would be.
        OSError: the files cannot be written.
    """
    path, names = as_path(caller, folder), (config[0], weights[0], *obsolete)
    if path.parts[:1] == ("~",) and not path.exists():
        raise ValueError(f"{caller}: folder must be a path, '~' in {path} is not expanded")
    if os.path.lexists(path) and not path.is_dir():
        raise ValueError(f"{caller}: folder must be a folder, got the file {path}")
    for name in names:
        if (path / name).is_dir():
            raise ValueError(f"{caller}: {path / name} must be a file, is a folder")
    path.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=path))
    moved: list[tuple[Path, Path]] = []
    try:
        weights[1](staging / weights[0])
        (staging / config[0]).write_text(config[1], encoding="utf-8")
        _replace(path, staging, names, moved)
    except BaseException:
        # Where this fails, the old files stay in the staging folder.
        for source, target in reversed(moved):
            os.replace(target, source)
        shutil.rmtree(staging)
        raise
    shutil.rmtree(staging)


def _replace(folder: Path, staging: Path, names: tuple[str, ...], moved: list[tuple[Path, Path]]) -> None:
    """Move the staged files in. The configuration goes first and comes last: without it nothing is an adapter."""
    config, weights, *obsolete = names
    same = (folder / config).is_file() and (folder / config).read_bytes() == (staging / config).read_bytes()
    if same and not any((folder / name).exists() for name in obsolete):
        # One step, and nothing to undo.
        os.replace(staging / weights, folder / weights)
        return
    old = staging / "old"
    old.mkdir()
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            _move(folder / name, old / name, moved)
    for name in (weights, config):
        _move(staging / name, folder / name, moved)


def _move(source: Path, target: Path, moved: list[tuple[Path, Path]]) -> None:
    os.replace(source, target)
    moved.append((source, target))
