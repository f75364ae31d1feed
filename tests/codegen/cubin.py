"""Machine code of the built CUDA extension: registers, stack and instructions of each kernel.

It is read from the very file that is loaded. ``cuobjdump`` and ``nvdisasm`` are those of Triton's wheel, since few
machines have the toolkit's.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from peft_kernels._core import extension
from tests.compiled import built_extension

_RESOURCES = re.compile(r"Function (\w+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
# An instruction's address, a predicate that may guard it, and its name with what modifies it.
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.x]*)", re.MULTILINE)


@dataclass(frozen=True)
class Kernel:
    """One kernel's machine code.

    Attributes:
        name: as the C++ compiler mangles it.
        registers: of a thread.
        stack, local: bytes of a thread's local memory; spills are among them.
        opcodes: how often each instruction stands in the code, with its modifiers, such as "LD.E.128".
        code: the listing.
    """

    name: str
    registers: int
    stack: int
    local: int
    opcodes: Counter[str]
    code: str

    def count(self, prefix: str) -> int:
        """Instructions whose names are ``prefix`` or go on from it with a modifier."""
        return sum(count for name, count in self.opcodes.items() if name == prefix or name.startswith(f"{prefix}."))


def kernels(arch: str, pattern: str) -> list[Kernel]:
    """The extension's kernels for an architecture, such as "90a", whose mangled names a pattern matches.

    Skips the test where there is no compiler to build the extension with, no Triton to take the tools from, or the
    extension was built for other architectures.

    Raises:
        AssertionError: the extension is not built although there is a compiler, or has no such kernel.
    """
    if extension.why_not_importable() is None and arch not in extension.load().build_info()["archs"]:
        pytest.skip(f"the extension was not built for sm_{arch}")
    found = [kernel for kernel in _kernels(_binary(), arch) if re.search(pattern, kernel.name)]
    assert found, f"the extension has no kernel {pattern!r} for sm_{arch}"
    return found


def _binary() -> Path:
    return Path(str(built_extension().__file__))


def _tools() -> Path:
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        pytest.skip("the package triton, whose wheel has cuobjdump and nvdisasm, is not installed")
    return Path(triton.origin).parent / "backends" / "nvidia" / "bin"


@functools.cache
def _kernels(binary: Path, arch: str) -> list[Kernel]:
    def dump(option: str) -> str:
        command = [_tools() / "cuobjdump", option, "-arch", f"sm_{arch}", binary]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    resources = {match[1]: tuple(map(int, match.groups()[1:])) for match in _RESOURCES.finditer(dump("-res-usage"))}
    code = dict(part.split("\n", 1) for part in dump("-sass").split("Function : ")[1:])
    assert resources.keys() == code.keys(), "cuobjdump names other kernels than nvdisasm"
    return [
        Kernel(name, registers, stack, local, Counter(_INSTRUCTION.findall(code[name])), code[name])
        for name, (registers, stack, _, local) in resources.items()
    ]
