"""Run a family's launchers with no GPU, compile what they would launch, and read the machine code.

A stand-in driver names the target; ``JITFunction.run`` is told to compile and not to launch; tensors are on the meta
device, whose addresses are aligned zeros. So the signature, the specialisation and the config are those of a real call,
and cannot drift from the launchers. Triton must not interpret, hence a process of its own:

    python tests/codegen/aot.py lora_linear 90          prints one JSON object per compiled kernel
    python tests/codegen/aot.py lora_linear 80 0/3      of every third launch alone, from the first one on
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from peft_kernels._core import device  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
OPCODES = ("HGMMA", "HMMA", "FFMA", "UTMALDG", "UTMASTG", "UTCHMMA", "UTCQMMA", "LDGSTS", "LDG", "STG", "LDL", "STL")

# Multiprocessors of A100, L40S, H100 SXM and B200.
HARDWARE = {
    80: device.Hardware(arch=80, sm_count=108),
    89: device.Hardware(arch=89, sm_count=142),
    90: device.Hardware(arch=90, sm_count=132),
    100: device.Hardware(arch=100, sm_count=148),
}


class CompileOnlyDriver:
    """Answers what Triton asks before a launch."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def record_compiles(launch: Callable[[], None]) -> list[Any]:
    """Run a launcher with every kernel call turned into a compile; return the compiled kernels."""
    compiled = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, **kwargs: Any) -> Any:
        kernel = run(self, *args, **{**kwargs, "warmup": True})
        compiled.append(kernel)
        return kernel

    JITFunction.run = compile_only
    try:
        launch()
    finally:
        JITFunction.run = run
    return compiled


def inspect(kernel: Any) -> dict[str, Any]:
    """Registers, stack, shared memory and instruction counts of a compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        Path(path).write_bytes(kernel.asm["cubin"])
        usage = _tool("cuobjdump", "--dump-resource-usage", path)
        sass = _tool("nvdisasm", path)
    fields = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if fields is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage}")
    return {
        "registers": int(fields[1]),
        "stack": int(fields[2]),
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        **{opcode: len(re.findall(rf"\b{opcode}\b", sass)) for opcode in OPCODES},
    }


def _tool(name: str, *args: str) -> str:
    return subprocess.run([TOOLS / name, *args], capture_output=True, text=True, check=True).stdout


def main(family: str, arch: int, share: str = "0/1") -> None:
    launches = importlib.import_module(f"tests.codegen.{family}_launches")
    driver.set_active(CompileOnlyDriver(arch))
    device.INTERPRETER = HARDWARE[arch]
    seen = set()
    first, step = map(int, share.split("/"))
    for name, launch in itertools.islice(launches.launches(), first, None, step):
        for kernel in record_compiles(launch):
            if kernel.hash in seen:
                continue
            seen.add(kernel.hash)
            row = {"launch": name, "kernel": kernel.metadata.name, "arch": arch, **inspect(kernel)}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
