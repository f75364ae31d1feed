"""Compile a test program against csrc and the emulator, once for all workers, and run it on tensors.

A program is C++ text that includes device code of csrc and hands its arguments to ``simt::main_of``. Where there is no
nvcc the toolkit's headers are missing and the test is skipped with that reason; where there is one, whatever goes wrong
is a failure.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.once import made_once

ROOT = Path(__file__).parents[2]
EMULATOR = Path(__file__).parent
FLAGS = (
    "-std=c++17",
    "-O1",
    "-g1",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",  # unroll
    "-Wno-unused-function",
    "-Wno-class-memaccess",  # memcpy is how device code, too, takes a word for a pair of bf16
    "-fsanitize=alignment,shift,signed-integer-overflow,integer-divide-by-zero",
    "-fno-sanitize-recover",
)


class SimtError(AssertionError):
    """The program ended with what the emulator found wrong."""


@functools.cache
def compiler() -> tuple[str, ...]:
    """The host compiler with its flags; skips the test where there is no nvcc."""
    cxx, *includes = host_compiler()
    return (cxx, *FLAGS, f"-I{EMULATOR}", f"-I{ROOT / 'csrc'}", *includes, "-include", "simt.h")


def host_compiler() -> tuple[str, ...]:
    """The host compiler and the toolkit's include folders; skips the test where there is no nvcc."""
    includes, cxx = _toolkit_includes(), shutil.which("g++")
    assert cxx is not None, "nvcc is here, but there is no g++ on PATH"
    return (cxx, *includes)


def build(source: str, *definitions: str) -> Path:
    """Compile a program's text; a text that was compiled before in this session is not compiled again.

    Args:
        source: C++17. definitions: preprocessor definitions, such as "TYPE=__half".

    Raises:
        AssertionError: it does not compile.
    """
    command = [*compiler(), *(f"-D{definition}" for definition in definitions)]
    return _built(source, tuple(command))


def run(
    program: Path,
    inputs: Mapping[str, Tensor | None] | None = None,
    outputs: Mapping[str, tuple[Sequence[int], torch.dtype]] | None = None,
    schedules: int = 4,
    first_seed: int = 0,
    **numbers: float | str,
) -> dict[str, Tensor]:
    """Run a program and return its outputs.

    Args:
        inputs: tensors by the names that the program asks for; None leaves one out.
        outputs: shape and dtype by name.
        schedules, first_seed: for ``simt::run_schedules``.
        numbers: what the program asks its arguments for.

    Raises:
        SimtError: the emulator found something wrong; holds its report.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name, tensor in (inputs or {}).items():
            if tensor is not None:
                Path(folder, name).write_bytes(_to_bytes(tensor))
        values = {"folder": folder, "schedules": schedules, "first_seed": first_seed, **numbers}
        command = [str(program), *(f"{name}={value}" for name, value in values.items())]
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        if result.returncode != 0:
            text = result.stderr.strip() or f"exit status {result.returncode}"
            raise SimtError(f"{text[:6000]}\n({shlex.join(command[1:])})")
        read = {}
        for name, (shape, dtype) in (outputs or {}).items():
            content = Path(folder, name).read_bytes()
            read[name] = torch.frombuffer(bytearray(content), dtype=dtype).reshape(tuple(shape))
        return read


def _to_bytes(tensor: Tensor) -> bytes:
    if tensor.numel() == 0:
        return b""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@functools.cache
def _toolkit_includes() -> tuple[str, ...]:
    """The include flags that nvcc itself would give its host compiler; skips the test where there is no nvcc."""
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)
    if nvcc is None:
        pytest.skip("there is no nvcc, and so no cuda_bf16.h, to compile device code for the host")
    result = subprocess.run(
        [nvcc, "--dryrun", "-E", "-x", "c++", os.devnull], capture_output=True, text=True, check=True
    )
    found = dict(re.findall(r"^#\$ (INCLUDES|SYSTEM_INCLUDES)=(.*)$", result.stderr, re.MULTILINE))
    assert "INCLUDES" in found, f"{nvcc} --dryrun names no include folder: {result.stderr}"
    own = [flag.replace("-I", "-isystem", 1) for flag in shlex.split(found["INCLUDES"])]
    return (*own, *shlex.split(found.get("SYSTEM_INCLUDES", "")))


@functools.cache
def _built(source: str, command: tuple[str, ...]) -> Path:
    def make(folder: Path) -> None:
        text = folder / "main.cpp"
        text.write_text(source)
        made = [*command, str(text), "-o", str(folder / "main")]
        result = subprocess.run(made, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr[-6000:]

    name = hashlib.sha256(source.encode() + shlex.join(command).encode()).hexdigest()[:16]
    return made_once(name, make) / "main"
