"""Programs against the headers of CuTe, NVIDIA's own description of Hopper's operands, fragments and tensor maps.

They come with the package nvidia-cutlass, of which nothing is imported.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
from pathlib import Path

import pytest

from tests.simt import build

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-function", "-Wno-class-memaccess")
# What CuTe says on the host before it takes the address of shared memory for zero.
NO_ADDRESS = "ERROR: cast_smem_ptr_to_uint not supported but used."


def headers() -> Path:
    """Where CuTe's headers are; skips the test where the package is absent."""
    try:
        distribution = importlib.metadata.distribution("nvidia-cutlass")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package nvidia-cutlass, which brings CuTe's headers, is not installed")
    found = Path(str(distribution.locate_file("cutlass_library/source/include")))
    assert (found / "cute/tensor.hpp").is_file(), f"nvidia-cutlass {distribution.version} has no CuTe in {found}"
    return found


def lines(folder: Path, source: str, *flags: str) -> list[str]:
    """Compile a program of this folder and return what it prints.

    Optimised it would compile twice as long, and it runs for a tenth of a second.
    """
    cxx, *toolkit = build.host_compiler()
    includes = [f"-I{CSRC}", "-isystem", str(headers()), *toolkit]
    command = [cxx, "-std=c++17", "-O0", *WARNINGS, *flags, *includes, str(HERE / source), "-o", str(folder / "main")]
    compiled = subprocess.run(command, capture_output=True, text=True, check=False)
    assert compiled.returncode == 0, compiled.stderr[-6000:]
    result = subprocess.run([folder / "main"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr
    return [line for line in result.stdout.splitlines() if line != NO_ADDRESS]
