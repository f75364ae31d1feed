"""Lazy access to the CUDA extension ``peft_kernels._C``, and the reasons why it cannot be had.

The extension is optional. Its build writes ``_build_info.json`` beside it, also where it did not build.
"""

from __future__ import annotations

import importlib
import json
import sysconfig
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_MODULE = "peft_kernels._C"
_PACKAGE = Path(__file__).resolve().parent.parent
_RECORD = _PACKAGE / "_build_info.json"
_WAY_OUT = "`pip install .` or `python setup.py build_ext --inplace` with nvcc on PATH builds it"


def load() -> ModuleType:
    """Import the extension; it imports where there is no driver and no GPU, only its launches then fail.

    Raises:
        ImportError: it is not built, or cannot be imported; says why, and the way out.
    """
    module, reason = _imported()
    if module is None:
        raise ImportError(f"the CUDA extension {_MODULE} cannot be used: {reason}", name=_MODULE)
    return module


def why_not_importable() -> str | None:
    """Reason why the extension cannot be imported, or None."""
    return _imported()[1]


@cache
def why_not() -> str | None:
    """Reason why no kernel of the extension can run in this process, or None."""
    module, reason = _imported()
    if module is None:
        return reason
    if torch.version.cuda is None:
        return "torch is built without CUDA, so no tensor is on a CUDA device"
    no_device: str | None = module.why_no_device()
    return no_device


def build_record() -> dict[str, Any]:
    """Read what the build wrote down: built, reason, archs, ptx, nvcc, python_abi.

    Raises:
        OSError, ValueError: there is no record, or it is not JSON.
    """
    record: dict[str, Any] = json.loads(_RECORD.read_text())
    return record


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


def _why_not_found() -> str:
    try:
        record = build_record()
    except (OSError, ValueError) as error:
        return f"it was never built here, or its build record is unreadable ({error}); {_WAY_OUT}"
    if not record["built"]:
        return f"it was not built: {record['reason']}; {_WAY_OUT}"
    abi = sysconfig.get_config_var("EXT_SUFFIX")
    if record["python_abi"] != abi:
        return f"it was built for {record['python_abi']}, this Python loads {abi}; {_WAY_OUT}"
    return f"it was built, but its file is gone from {_PACKAGE}; {_WAY_OUT}"
