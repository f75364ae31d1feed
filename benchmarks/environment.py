"""Where a record comes from: the device and its state, the versions, the commit, the sources. What cannot be had is
None."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmarks.roofline import matmul_operands
from peft_kernels._core import extension

ROOT = Path(__file__).resolve().parent.parent

# What the result of a test or a measurement may depend on.
SOURCES = ("peft_kernels", "csrc", "python_ref", "tests", "benchmarks", "examples", "setup.py", "pyproject.toml")
_SUFFIXES = (".py", ".toml", ".cpp", ".h", ".cu", ".cuh")

# Assumed where the kernel does not say.
_CPU_CACHE_BYTES = 32 << 20
_CPUINFO = Path("/proc/cpuinfo")
_CPU_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
# Enough 8192^3 products that the query below returns while they run.
_LOAD_PRODUCTS = 1000


def describe_device(device: torch.device) -> dict[str, Any]:
    """The ``device`` part of a record."""
    return _describe_cuda(device) if device.type == "cuda" else _describe_cpu()


def versions() -> dict[str, str | None]:
    """The ``versions`` part of a record."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _distribution("triton"),
        "peft": _distribution("peft"),
        "extension": _extension(),
    }


def commit() -> tuple[str | None, bool | None]:
    """The checked-out commit, and whether tracked files differ from it; None twice where this is no git checkout.

    Files that git does not know are told apart by ``sources``.
    """
    head = _output(["git", "-C", str(ROOT), "rev-parse", "HEAD"])
    if head is None:
        return None, None
    # The records themselves are what a run changes.
    changed = _output(
        ["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results"]
    )
    return head, bool(changed)


def sources(root: Path = ROOT) -> str:
    """Hash of the contents of the sources: what tells one state of a tree from another where no commit does.

    A commit does not where there is no git, as in a copied tree, or where tracked files differ from it.
    """
    digest = hashlib.sha256()
    for name in SOURCES:
        top = root / name
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.is_file() and path.suffix in _SUFFIXES:
                content = path.read_bytes()
                digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


def slug(name: str) -> str:
    """A device's name as the name of a folder: "NVIDIA H100 80GB HBM3" is nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _describe_cuda(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    driver, sm_clock, max_sm_clock, memory_clock = _clocks_under_load(device) or (None, None, None, None)
    return {
        "type": "cuda",
        "name": properties.name,
        "architecture": f"sm_{properties.major}{properties.minor}"
        if torch.version.hip is None
        else properties.gcnArchName,
        "memory_bytes": properties.total_memory,
        "cache_bytes": properties.L2_cache_size,
        "processors": properties.multi_processor_count,
        "driver": driver,
        "sm_clock_mhz": _number(sm_clock),
        "max_sm_clock_mhz": _number(max_sm_clock),
        "memory_clock_mhz": _number(memory_clock),
    }


def _describe_cpu() -> dict[str, Any]:
    return {
        "type": "cpu",
        "name": _cpu_name(),
        "architecture": platform.machine(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "cache_bytes": _cpu_cache_bytes(),
        "processors": torch.get_num_threads(),
        "driver": None,
        "sm_clock_mhz": None,
        "max_sm_clock_mhz": None,
        "memory_clock_mhz": None,
    }


def _clocks_under_load(device: torch.device) -> tuple[str, str, str, str] | None:
    """Driver, current and largest SM clock, memory clock; asked for under load, because idle clocks say nothing."""
    a, b = matmul_operands(device, torch.bfloat16)
    out = torch.empty_like(a)
    for _ in range(_LOAD_PRODUCTS):
        torch.mm(a, b, out=out)
    fields = "driver_version,clocks.sm,clocks.max.sm,clocks.mem"
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    line = _output(["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={fields}", "--format=csv,noheader,nounits"])
    torch.cuda.synchronize(device)
    if line is None:
        return None
    driver, sm_clock, max_sm_clock, memory_clock = (field.strip() for field in line.split(","))
    return driver, sm_clock, max_sm_clock, memory_clock


def _cpu_name() -> str:
    if _CPUINFO.exists():
        for line in _CPUINFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cpu_cache_bytes() -> int:
    if not _CPU_CACHE.exists():
        return _CPU_CACHE_BYTES
    text = _CPU_CACHE.read_text().strip()
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text)


def _output(command: list[str]) -> str | None:
    """Standard output of a command, or None where it is not installed or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _extension() -> str | None:
    """What the extension was built for, by which compiler; without a kernel there is another result than with it."""
    try:
        built = extension.build_record()
    except (OSError, ValueError):
        return None
    return f"{'+'.join(built['archs']) or 'host'}, nvcc {built.get('nvcc')}" if built["built"] else None


def _number(text: str | None) -> float | None:
    return float(text) if text is not None and re.fullmatch(r"\d+(\.\d+)?", text) else None


def _distribution(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
