"""Compile what a Triton launcher would launch, with no GPU, and read the machine code.

A stand-in driver names the target; ``JITFunction.run`` is told to compile and not to launch; tensors are on the meta
device, whose addresses are aligned zeros. So the signature, the specialisation and the config are those of a real call,
and cannot drift from the launchers. Triton must not interpret.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peft_kernels._core import device

OPCODES = ("HGMMA", "HMMA", "FFMA", "UTMALDG", "UTMASTG", "UTCHMMA", "UTCQMMA", "LDGSTS", "LDG", "STG", "LDL", "STL")
# Loads and stores of 16 bytes a thread, which are counted among LDG and STG too.
WIDE = ("LDG.E.128", "STG.E.128")
_OPCODE = re.compile(rf"\b(?:{'|'.join(OPCODES)})\b")

# Multiprocessors of A100, L40S, H100 SXM and B200.
HARDWARE = {
    80: device.Hardware(arch=80, sm_count=108),
    89: device.Hardware(arch=89, sm_count=142),
    90: device.Hardware(arch=90, sm_count=132),
    100: device.Hardware(arch=100, sm_count=148),
}

# Bytes of shared memory that a block may take: CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability".
SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}

# Columns of tensor memory of a multiprocessor: PTX ISA, "Tensor Memory Addressing". Of a kernel that asks for more,
# Triton compiles an empty one, and raises where that is launched.
TENSOR_MEMORY_LIMIT = 512


def target(arch: int) -> None:
    """From here on this process compiles for an architecture, and launches nothing."""
    from triton.runtime import driver

    driver.set_active(_CompileOnlyDriver(arch))
    # Meta tensors are described as the interpreter's CPU tensors are.
    device.INTERPRETER = HARDWARE[arch]


def record_compiles(launch: Callable[[], object]) -> list[Any]:
    """Run a launcher with every kernel call turned into a compile; return the compiled kernels."""
    from triton.runtime.jit import JITFunction

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
    """Registers, stack, shared and tensor memory and instruction counts of a compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        Path(path).write_bytes(kernel.asm["cubin"])
        usage = _tool("cuobjdump", "--dump-resource-usage", path)
        sass = _tool("nvdisasm", "--print-code", path)
    fields = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if fields is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage}")
    counts = Counter(_OPCODE.findall(sass))
    return {
        "registers": int(fields[1]),
        "stack": int(fields[2]),
        "shared": kernel.metadata.shared,
        "tensor_memory": kernel.metadata.tmem_size or 0,
        "warps": kernel.metadata.num_warps,
        **{opcode: counts[opcode] for opcode in OPCODES},
        **{opcode: len(re.findall(rf"\b{re.escape(opcode)}\b", sass)) for opcode in WIDE},
    }


def complaints(row: Mapping[str, Any], arch: int) -> list[str]:
    """What a kernel must not show on any account: memory of its own, or more shared or tensor memory than there is."""
    found = []
    if row["stack"]:
        found.append(f"{row['stack']} bytes of stack")
    if row["LDL"] or row["STL"]:
        found.append(f"spills: {row['STL']} stores and {row['LDL']} loads of local memory")
    if row["shared"] > SHARED_LIMIT[arch]:
        found.append(f"{row['shared']} bytes of shared memory, sm_{arch} has {SHARED_LIMIT[arch]}")
    if row["tensor_memory"] > TENSOR_MEMORY_LIMIT:
        found.append(f"{row['tensor_memory']} columns of tensor memory, there are {TENSOR_MEMORY_LIMIT}")
    return found


class _CompileOnlyDriver:
    """Answers what Triton asks before a launch."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _tool(name: str, *args: str) -> str:
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return subprocess.run([folder / name, *args], capture_output=True, text=True, check=True).stdout
