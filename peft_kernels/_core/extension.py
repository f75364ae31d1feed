"""Lazy access to the extension ``peft_kernels._C``, and the reasons why it cannot be had.

The extension is optional, and so is either part of it: the CUDA kernels, and what a CPU runs, which is there wherever
the extension is. Its build writes ``_build_info.json`` beside it, also where it did not build.
"""

from __future__ import annotations

import importlib
import json
import re
import sysconfig
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from peft_kernels._core import device

_MODULE = "peft_kernels._C"
_PACKAGE = Path(__file__).resolve().parent.parent
_RECORD = _PACKAGE / "_build_info.json"
_BUILD = "`pip install .` or `python setup.py build_ext --inplace` with"
_WAY_OUT = f"{_BUILD} nvcc on PATH builds it"
_HOST_WAY_OUT = f"{_BUILD} a C++ compiler on PATH builds it"
_HOST_INTERFACE = 1  # that of csrc/module.cpp, whose arguments this package's calls have


def load() -> ModuleType:
    """Import the extension with its CUDA kernels; where there is no driver and no GPU, only their launches fail.

    Raises:
        ImportError: it is not built, or cannot be imported; says why, and the way out.
    """
    module, reason = _with_cuda()
    if module is None:
        raise ImportError(f"the CUDA extension {_MODULE} cannot be used: {reason}", name=_MODULE)
    return module


def why_not_importable() -> str | None:
    """Reason why the extension with its CUDA kernels cannot be imported, or None."""
    return _with_cuda()[1]


def load_host() -> ModuleType:
    """Import the extension for what of it a CPU runs.

    Raises:
        ImportError: as ``load``.
    """
    module, reason = _with_host()
    if module is None:
        raise ImportError(f"the compiled host code of {_MODULE} cannot be used: {reason}", name=_MODULE)
    return module


def why_no_host() -> str | None:
    """Reason why what a CPU runs of the extension cannot be had, or None."""
    return _with_host()[1]


@cache
def why_not() -> str | None:
    """Reason why no kernel of the extension can run in this process, or None."""
    if torch.version.hip is not None:
        return device.not_nvidia()
    module, reason = _with_cuda()
    if module is None:
        return reason
    if torch.version.cuda is None:
        return "torch is built without CUDA, so no tensor is on a CUDA device"
    no_device: str | None = module.why_no_device()
    return no_device


def build_record() -> dict[str, Any]:
    """Read what the build wrote down: built, cuda, reason (why not both), archs, ptx, nvcc, python_abi.

    Raises:
        OSError, ValueError: there is no record, or it is not JSON, or not of that shape.
    """
    record = json.loads(_RECORD.read_text())
    if not isinstance(record, dict) or not isinstance(record.get("built"), bool):
        raise ValueError(f"it must be an object in which built is true or false, got {str(record)[:80]}")
    # Records that do not name it are of builds that had CUDA or nothing.
    if not isinstance(record.setdefault("cuda", record["built"]), bool):
        raise ValueError(f"cuda must be true or false, got {record['cuda']!r}")
    archs, ptx = record.setdefault("archs", []), record.setdefault("ptx", None)
    record["reason"], record["python_abi"] = record.get("reason"), record.get("python_abi")
    if not isinstance(archs, list) or not all(_is_match(r"\d+[af]?", arch) for arch in archs):
        raise ValueError(f'archs must be names such as "90a", got {archs!r}')
    if ptx is not None and not _is_match(r"\d+", ptx):
        raise ValueError(f'ptx must be null or a number such as "90" in quotes, got {ptx!r}')
    return record


def why_no_record() -> str | None:
    """Reason why the build record cannot be read, or None."""
    reason = _record_fault()
    return None if reason is None else f"{reason}; {_WAY_OUT}"


def _is_match(pattern: str, value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(pattern, value) is not None


def _with_cuda() -> tuple[ModuleType | None, str | None]:
    """The module with CUDA kernels and None, or None and the reason."""
    module, reason = _imported()
    if module is None:
        return None, f"{reason}; {_WAY_OUT}"
    # Binaries that do not say so are of sources that had CUDA alone.
    if not getattr(module, "HAS_CUDA", True):
        return None, f"{_why_no_cuda()}; {_WAY_OUT}"
    return module, None


def _with_host() -> tuple[ModuleType | None, str | None]:
    """The module with host code and None, or None and the reason."""
    module, reason = _imported()
    if module is None:
        return None, f"{reason}; {_HOST_WAY_OUT}"
    if getattr(module, "HOST_INTERFACE", None) != _HOST_INTERFACE:
        return None, f"it was built from other sources than these; {_HOST_WAY_OUT}"
    return module, None


@cache
def _imported() -> tuple[ModuleType | None, str | None]:
    """The module and None, or None and the reason; a failed import is not tried again."""
    try:
        return importlib.import_module(_MODULE), None
    except ModuleNotFoundError as error:
        if error.name != _MODULE:
            return None, f"its import fails: {error}"
        return None, _why_not_found()
    except ImportError as error:
        return None, f"its import fails: {error}"


def _record_fault() -> str | None:
    try:
        build_record()
    except (OSError, ValueError) as error:
        return f"its build record is unreadable ({error})"
    return None


def _why_not_found() -> str:
    fault = _record_fault()
    if fault is not None:
        return f"it was never built here, or {fault}"
    record = build_record()
    if not record["built"]:
        return _not_built(record)
    abi = sysconfig.get_config_var("EXT_SUFFIX")
    if record["python_abi"] != abi:
        return f"it was built for {record['python_abi'] or 'an unknown Python'}, this Python loads {abi}"
    return f"it was built, but its file is gone from {_PACKAGE}"


def _why_no_cuda() -> str:
    fault = _record_fault()
    return f"it has no CUDA kernels, and {fault}" if fault is not None else _not_built(build_record())


def _not_built(record: dict[str, Any]) -> str:
    return f"it was not built: {record['reason'] or 'no reason was written down'}"
