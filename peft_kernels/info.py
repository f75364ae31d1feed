"""``python -m peft_kernels.info [--json]``: what this environment is, and what of the package runs in it.

Begins with one sentence on what LoRA runs on here, and why. Works where imports are broken, torch's too, or where torch
is absent: every probe stands alone, and what it raises becomes its answer. The file also runs by its path, which needs
only Python: ``python path/to/peft_kernels/info.py``.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

AVAILABLE = "available"
_PACKAGE = Path(__file__).resolve().parent
_BACKENDS = ("auto", "torch", "triton", "cuda")
_LIBRARIES = ("triton", "numpy", "peft", "transformers", "adapters", "accelerate")


def collect() -> dict[str, Any]:
    """Gather the report.

    Returns:
        A dict that ``json.dumps`` takes. A probe that failed has ``{"error": "<exception>: <text>"}`` for its value.
    """
    report = _probe_all()
    return {"summary": summary(report), **report}


def _probe_all() -> dict[str, Any]:
    return {
        "python": _python(),
        "peft_kernels": _attempt(_package),
        "torch_import": _attempt(_import, "torch"),
        "torch": _attempt(_torch),
        "cuda_driver": _attempt(_cuda_driver),
        "gpus": _attempt(_gpus),
        "libraries": {name: _attempt(_version, name) for name in _LIBRARIES},
        "triton_import": _attempt(_import, "triton"),
        "extension": _attempt(_extension),
        "operators": _attempt(_operators),
        "forced_backend": os.environ.get("PEFT_KERNELS_BACKEND") or "auto",
        "checks": _attempt(_checks),
    }


def summary(report: dict[str, Any]) -> str:
    """One sentence on what LoRA runs on here, and why, from what ``collect`` found."""
    machine, gpus = "this machine", report["gpus"]
    if isinstance(gpus, list) and gpus:
        others = f", the first of {len(gpus)} GPUs" if len(gpus) > 1 else ""
        machine = f"this machine ({gpus[0]['name']}{others})"
    what, why = _what_runs(report)
    return f"On {machine} {what}, because {why}."


def _what_runs(report: dict[str, Any]) -> tuple[str, str]:
    broken = report["peft_kernels"].get("error")
    if broken is not None:
        return "nothing of peft_kernels runs", _why_broken(broken, report["torch_import"])
    if "error" in report["operators"]:
        return "nothing of peft_kernels runs", f"its operators cannot be asked ({_first_line(report['operators'])})"
    forced, lora = report["forced_backend"], report["operators"]["lora_linear"]
    if forced not in _BACKENDS:
        return "every call of LoRA raises ValueError", f"PEFT_KERNELS_BACKEND={forced} names no backend"
    if forced != "auto":
        reason = _why_unavailable(lora.get(forced))
        if reason is None:
            return f"LoRA runs on the {forced} backend", f"PEFT_KERNELS_BACKEND={forced} forces it"
        return "every call of LoRA raises UnsupportedError", f"PEFT_KERNELS_BACKEND={forced} is set, and {reason}"
    torch_runs = "LoRA runs on the torch backend, which is PyTorch's own operators"
    reason = _why_no_kernel(report)
    return (torch_runs, reason) if reason is not None else _by_verdicts(report["checks"], torch_runs)


def _why_broken(error: str, torch_import: Any) -> str:
    if error == "ModuleNotFoundError: No module named 'torch'":
        return "torch is not installed"
    what = "the package" if torch_import == "ok" else "torch"
    return f"{what} cannot be imported ({_first_line({'error': error})})"


def _why_unavailable(status: Any) -> str | None:
    """Reason why a backend of LoRA's cannot run in here, or None."""
    if isinstance(status, dict):
        return _first_line(status)
    return None if status is not None and status.startswith(AVAILABLE) else str(status)


def _why_no_kernel(report: dict[str, Any]) -> str | None:
    """Reason why no kernel can run in here, before any was checked; or None."""
    torch, gpus = report["torch"], report["gpus"]
    if isinstance(gpus, dict):
        return f"torch cannot be asked for GPUs ({_first_line(gpus)})"
    if not gpus:
        has_driver = report["cuda_driver"].get("cuda") is not None
        seen = "an NVIDIA driver is here, but " if has_driver else ""
        if torch["cuda"] is None and torch["hip"] is None:
            return f"{seen}torch {torch['version']} is built without CUDA"
        return f"{seen}torch {torch['version']} sees no GPU"
    if (reason := _why_unavailable(gpus[0]["kernels"])) is not None:
        return reason
    lora = report["operators"]["lora_linear"]
    reasons = {name: _why_unavailable(status) for name, status in lora.items() if name != "torch"}
    if None in reasons.values():
        return None
    return "no kernel can run in here: " + "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


def _by_verdicts(checks: dict[str, Any], torch_runs: str) -> tuple[str, str]:
    """What ``auto`` may take on the first GPU, by what its record says of LoRA's kernels."""
    machine = checks if "error" in checks else checks["machines"][0]
    if "error" in machine:
        return torch_runs, f"what is on record of its kernels cannot be read ({_first_line(machine)})"
    verdicts = {key: text for key, text in (machine["verdicts"] or {}).items() if key.startswith("lora_linear/")}
    right = [key for key, text in verdicts.items() if text.startswith("right")]
    if right:
        backends = " and ".join(sorted({key.split("/")[1] for key in right}, reverse=True))
        found = f"its check found {len(right)} of {len(verdicts)} parts of them right"
        return f"LoRA runs on the {backends} kernels where they are fastest", found
    if verdicts:
        return torch_runs, f"its check found none of the kernels right ({next(iter(verdicts.values()))})"
    if checks["policy"].endswith("=never"):
        rest = f"{checks['policy']} lets no call check them (python -m peft_kernels.qualify does)"
    else:
        rest = "the first call that could take one checks them (python -m peft_kernels.qualify does so now)"
    return torch_runs, f"its kernels have not been checked on it yet: {rest}"


def _first_line(failed: dict[str, Any]) -> str:
    return str(failed["error"]).partition("\n")[0]


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
    if parser.parse_args(arguments).json:
        print(json.dumps(report, indent=2))
    else:
        print(report.pop("summary"), format_report(report), sep="\n\n")
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

    # What its import raised for python -m; importing torch once more may raise something else.
    error = getattr(peft_kernels, "_import_error", None)
    if error is not None:
        raise error
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
                "kernels": _attempt(_kernels, index),
            }
        )
    return gpus


def _kernels(index: int) -> str:
    """Whether the kernels are for such a GPU, or why not."""
    import torch

    from peft_kernels._core import device, triton_tools

    if torch.version.hip is not None:
        return device.not_nvidia()
    arch = device.hardware(torch.device("cuda", index)).arch
    return (
        AVAILABLE if arch >= triton_tools.MINIMUM_ARCH else f"its kernels need sm_{triton_tools.MINIMUM_ARCH} or newer"
    )


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
