"""What only a compiler makes: the built extension, and a program of the headers' plain C++."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from peft_kernels._core import extension

CSRC = Path(__file__).parents[1] / "csrc"
UNDEFINED_BEHAVIOUR_FAILS = ("-O1", "-fsanitize=undefined", "-fno-sanitize-recover")


def built_extension() -> ModuleType:
    """Import the extension with CUDA; skip where there is no compiler for it, and fail where there is one."""
    reason = extension.why_not_importable()
    if reason is not None:
        home = os.environ.get("CUDA_HOME")
        compiler = shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)
        if compiler is None or os.environ.get("PEFT_KERNELS_NO_CUDA") == "1":
            pytest.skip(reason)
        pytest.fail(f"{compiler} is here, but {reason}; `make build` shows why")
    return extension.load()


def host_extension() -> ModuleType:
    """Import the extension for what a CPU runs; skip where there is no C++ compiler, and fail where there is one."""
    reason = extension.why_no_host()
    if reason is not None:
        compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
        if compiler is None or os.environ.get("PEFT_KERNELS_NO_EXTENSION") == "1":
            pytest.skip(reason)
        pytest.fail(f"{compiler} is here, but {reason}; `make build` shows why")
    return extension.load_host()


def host_program(folder: Path, source: str, *flags: str) -> Path:
    """Compile a program against csrc, or headers of the folder before it, without a warning."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no C++ compiler on PATH")
    (folder / "main.cpp").write_text(source)
    warnings = ("-Wall", "-Wextra", "-Werror")
    command = [compiler, "-std=c++17", *warnings, *flags, "-I.", f"-I{CSRC}", "main.cpp", "-o", "main"]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "main"
