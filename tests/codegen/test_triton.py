"""Every Triton kernel, compiled ahead of time with its default configs: no spills, shared memory that fits, TMA and
the tensor cores where they belong.

Which launches are compiled, and which instructions a kernel must show, is in ``<family>_launches.py``: half of them,
each for one architecture, since compiling takes a second or two a kernel. ``make codegen`` compiles everything for all
four. CONTRIBUTING.md says how another Triton is put to the same test; older ones may spill a little.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import aot
from peft_kernels._core.triton_tools import why_not_installed

FOLDER = Path(__file__).parent
FAMILIES = sorted(path.name.removesuffix("_launches.py") for path in FOLDER.glob("*_launches.py"))
ALL = os.environ.get("PEFT_KERNELS_CODEGEN") == "all"
# Bytes of stack that are known of Triton before 3.8, which deals out registers otherwise. What spills is right, and the
# clock passes it over where it is slow; no call takes product_kernel where K is 4095. Within the general bound lies
# grad_kv_kernel where D is 80 and causal: 8 bytes on sm_90 with 3.6; 96 and 104 on sm_80 and 89 with 3.4.
OLDER_SPILLS = 128
OLDER_SPILLS_OF = {("product_kernel", "K4095"): 504, ("attention_kernel", "fp32/fp32/D256"): 408}
# A twelfth of the launches, each for one architecture; `make codegen` compiles all for all.
SHARES = {90: "0/24", 80: "2/72", 89: "26/72", 100: "50/72"}

pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.slow,
    pytest.mark.skipif(why_not_installed() is not None, reason=str(why_not_installed())),
]


@pytest.mark.parametrize("arch", SHARES)
@pytest.mark.parametrize("family", FAMILIES)
def test_machine_code(family: str, arch: int) -> None:
    rows = _compile(family, arch)
    launches = importlib.import_module(f"tests.codegen.{family}_launches")
    required, forbidden = launches.required_opcodes, getattr(launches, "FORBIDDEN_OPCODES", ())
    version = tuple(map(int, importlib.metadata.version("triton").split(".")[:2]))
    wrong = []
    for row in rows:
        spilled = _spilled_by(version, row["kernel"], row["launch"])
        wrong += _complaints(row, required(row["kernel"], row["launch"], arch), spilled)
        wrong += [f"{row['kernel']} ({row['launch']}) on sm_{arch}: {name}" for name in forbidden if row[name]]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"stack": 8}, "8 bytes of stack"),
        ({"LDL": 1}, "spills"),
        ({"STL": 2}, "spills"),
        ({"shared": 227 * 1024 + 1}, "shared memory"),
        ({"tensor_memory": 513}, "tensor memory"),
        ({"HGMMA": 0}, "no HGMMA"),
    ],
)
def test_each_fault_is_seen(change: dict[str, int], complaint: str) -> None:
    row = dict.fromkeys(("stack", "LDL", "STL", "shared", "tensor_memory"), 0)
    row |= {"launch": "case", "kernel": "kernel", "arch": 90, "HGMMA": 4}
    assert _complaints(row, ("HGMMA",)) == []
    (text,) = _complaints({**row, **change}, ("HGMMA",))
    assert complaint in text


def test_too_much_tensor_memory_is_seen() -> None:
    """Triton compiles it without a word, to a kernel that does nothing."""
    fits, empty = _run("tensor_memory.py")
    assert _complaints(fits, ("UTCHMMA",)) == []
    assert not empty["UTCHMMA"] and not empty["STG"]
    assert any("768 columns of tensor memory" in text for text in _complaints(empty, ()))


def test_older_versions_alone_may_spill_what_is_known() -> None:
    case = "attention_kernel", "fp32/fp32/D256/causal"
    assert [_spilled_by(version, *case) for version in ((3, 4), (3, 7), (3, 8), (3, 10))] == [408, 408, 0, 0]
    assert _spilled_by((3, 5), "attention_kernel", "bf16/fp32/D256/causal") == 128
    assert [_spilled_by(version, "grad_kv_kernel", "bf16/bf16/D80/causal") for version in ((3, 6), (3, 8))] == [128, 0]
    row = {"launch": "case", "kernel": "kernel", "arch": 90, "stack": 96, "LDL": 9, "STL": 9}
    row |= {"shared": 0, "tensor_memory": 0}
    assert [len(_complaints(row, (), spilled)) for spilled in (0, 95, 96)] == [2, 2, 0]


def _compile(family: str, arch: int) -> list[dict[str, Any]]:
    return _run("aot.py", family, str(arch), "0/1" if ALL else SHARES[arch])


def _run(program: str, *arguments: str) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, FOLDER / program, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert rows, "no kernel was compiled"
    return rows


def _spilled_by(version: tuple[int, ...], kernel: str, launch: str) -> int:
    """Bytes of stack that a version of Triton may take for a kernel."""
    if version >= (3, 8):
        return 0
    known = (size for (name, part), size in OLDER_SPILLS_OF.items() if name == kernel and part in launch)
    return next(known, OLDER_SPILLS)


def _complaints(row: dict[str, Any], required: tuple[str, ...], spilled: int = 0) -> list[str]:
    judged = {**row, "stack": 0, "LDL": 0, "STL": 0} if 0 < row["stack"] <= spilled else row
    found = aot.complaints(judged, row["arch"])
    found += [f"no {opcodes}" for opcodes in required if not any(row[opcode] for opcode in opcodes.split("|"))]
    return [f"{row['kernel']} ({row['launch']}) on sm_{row['arch']}: {text}" for text in found]
