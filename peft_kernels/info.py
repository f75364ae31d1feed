"""``python -m peft_kernels.info [--json]``: what this environment is, and what of the package runs in it.

Works where imports are broken: every probe stands alone, and what it raises becomes its answer. Where torch itself is
broken the package cannot be imported, and with it nothing below it; then run this file by its path, which needs only
Python: ``python path/to/peft_kernels/info.py``.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import importlib.metadata
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

AVAILABLE = "available"
_PACKAGE = Path(__file__).resolve().parent
_LIBRARIES = ("triton", "numpy", "peft", "transformers", "adapters", "accelerate")


def collect() -> dict[str, Any]:
    """Gather the report.

    Returns:
        A dict that ``json.dumps`` takes. A probe that failed has ``{"error": "<exception>: <text>"}`` for its value.
    """
    return {
        "python": _python(),
        "peft_kernels": _attempt(_package),
        "torch": _attempt(_torch),
        "cuda_driver": _attempt(_cuda_driver),
        "gpus": _attempt(_gpus),
        "libraries": {name: _attempt(_version, name) for name in _LIBRARIES},
        "triton_import": _attempt(_import, "triton"),
        "extension": _attempt(_extension),
        "operators": _attempt(_operators),
        "checks": _attempt(_checks),
    }


def format_report(report: dict[str, Any]) -> str:
    """Lay the report out as text."""
    lines: list[str] = []
    _append(lines, report, 0)
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Print the report; the exit status is 0 whatever it says."""
    parser = argparse.ArgumentParser(
        prog="python -m peft_kernels.info", description="Report what runs here and why not."
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    report = collect()
    print(json.dumps(report, indent=2) if parser.parse_args(arguments).json else format_report(report))
    return 0


def _attempt(probe: Callable[..., Any], *arguments: Any) -> Any:
    # Whatever a broken installation raises is what the reader needs to see.
    try:
        return probe(*arguments)
    except Exception as error:
        return {"error": _text(error)}


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _python() -> dict[str, str]:
    return {
        "version": platform.python_version(),
        "implementation": platform.python_implementation(),
        "executable": sys.executable,
        "platform": platform.platform(),
    }


def _package() -> dict[str, str]:
    import peft_kernels

    return {"version": peft_kernels.__version__, "path": str(_PACKAGE)}


def _torch() -> dict[str, Any]:
    import torch

    accelerator = torch.accelerator.current_accelerator()
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cuda_available": torch.cuda.is_available(),
        "accelerator": accelerator and accelerator.type,
    }


def _cuda_driver() -> dict[str, Any]:
    """Ask the driver itself, because torch may be a CPU build, or broken."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return {"cuda": None, "why_not": f"no driver library: {error}"}
    version = ctypes.c_int()
    status = library.cuDriverGetVersion(ctypes.byref(version))
    if status != 0:
        return {"cuda": None, "why_not": f"cuDriverGetVersion returned {status}"}
    return {"cuda": f"{version.value // 1000}.{version.value % 1000 // 10}"}


def _gpus() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": properties.name,
                "arch": f"sm_{properties.major}{properties.minor}"
                if torch.version.hip is None
                else properties.gcnArchName,
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "multiprocessors": properties.multi_processor_count,
            }
        )
    return gpus


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _import(name: str) -> str:
    importlib.import_module(name)
    return "ok"


def _extension() -> dict[str, Any]:
    from peft_kernels._core import extension

    report: dict[str, Any] = {"status": extension.why_not() or AVAILABLE, "record": _attempt(extension.build_record)}
    report["host_code"] = extension.why_no_host() or AVAILABLE
    if extension.why_not_importable() is None:
        report["binary"] = extension.load().build_info()
    return report


def _operators() -> dict[str, Any]:
    """For each operator and backend: available, or why not. Importing the package declares them."""
    from peft_kernels._core.operator import OPERATORS

    return {
        name: {each.name: _attempt(_implementation, each) for each in operator.implementations}
        for name, operator in sorted(OPERATORS.items())
    }


def _implementation(implementation: Any) -> str:
    status = implementation.why_not_environment() or AVAILABLE
    if implementation.borrows:
        status += f"; what it has no kernels for is done by {', '.join(implementation.borrows)}"
    return status


def _checks() -> dict[str, Any]:
    """For each machine in here what its record says of the kernels, and where the record is."""
    import torch

    from peft_kernels._core import triton_tools, verdicts

    devices = [torch.device("cuda", index) for index in range(len(_gpus()))]
    if not devices and triton_tools.why_not_environment() is None:
        devices = [torch.device("cpu")]
    return {
        "policy": f"{verdicts.POLICY_VARIABLE}={verdicts.policy()}",
        "machines": [_attempt(_machine, device) for device in devices],
    }


def _machine(device: Any) -> dict[str, Any]:
    from peft_kernels._core import records, verdicts

    machine = records.signature(device)
    record = records.read(machine)
    return {
        "machine": machine.gpu,
        "driver": machine.driver,
        "sources": machine.sources,
        "record": str(record.path) if record.path else None,
        "from": record.source,
        "remark": record.reason,
        "verdicts": {key: str(verdict) for key, verdict in sorted(verdicts.of(machine).items())} or None,
    }


def _append(lines: list[str], value: dict[str, Any], depth: int) -> None:
    indent = "  " * depth
    width = max((len(key) for key in value), default=0)
    for key, item in value.items():
        if isinstance(item, dict) and item.keys() == {"error"}:
            item = f"failed: {item['error']}"
        if isinstance(item, dict):
            lines.append(f"{indent}{key}")
            _append(lines, item, depth + 1)
        elif isinstance(item, list) and any(isinstance(each, dict) for each in item):
            lines.append(f"{indent}{key}")
            _append(lines, {str(index): each for index, each in enumerate(item)}, depth + 1)
        else:
            lines.append(f"{indent}{key:<{width}}  {_scalar(item, indent + '  ' + ' ' * width)}")


def _scalar(value: Any, hanging: str) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(str(each) for each in value) or "none"
    if value is None:
        return "none"
    return str(value).replace("\n", f"\n{hanging}")


if __name__ == "__main__":
    if not __package__:
        # Run by its path: Python put this file's folder on the path, where the package's folder belongs.
        sys.path[0] = str(_PACKAGE.parent)
    raise SystemExit(main())
