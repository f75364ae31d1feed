"""Kernels that were compiled beforehand are those that launches ask for, and are found where they were carried."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from peft_kernels._core.triton_tools import why_not_installed
from tests.on_gpu import cache

pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.slow,
    pytest.mark.skipif(why_not_installed() is not None, reason=str(why_not_installed())),
]

COMPILES = "from tests.on_gpu import compiles; compiles.install(); end = lambda: print(compiles.said())"
# Triton's own path to a launch, and a driver that only lacks the device.
LAUNCHES = """
import triton
from benchmarks import host_time
launched, found = [], []
host_time.install(90, lambda *arguments: launched.append(arguments))
triton.knobs.compilation.listener = lambda *, cache_hit, **_: found.append(cache_hit)
end = lambda: print(f"{len(launched)} launched, {found.count(True)} found, {found.count(False)} compiled")
"""
CALLS = """
import torch, peft_kernels as pk
make = lambda *shape: torch.zeros(*shape, dtype=torch.bfloat16)
pk.prompt_tuning(make(2, 32, 64), make(1, 16, 64), backend="triton")
with torch.no_grad():
    pk.lora_linear(make(48, 64), make(32, 64), make(16, 64), make(32, 16), backend="triton")
end()
"""


def _run(program: str, folder: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder), "TRITON_STORE_BINARY_ONLY": "1"}
    command = [sys.executable, "-c", program + CALLS]
    result = subprocess.run(command, cwd=cache.ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout.splitlines()[-1]


@pytest.mark.thorough
def test_launches_find_what_was_compiled_elsewhere(tmp_path: Path) -> None:
    made, there, copied = tmp_path / "made", tmp_path / "far" / "cache", tmp_path / "copied"
    assert _run(f"{COMPILES}\n", made) == "kernels asked for: 0 in the cache, 3 compiled, 0 failed"
    there.parent.mkdir()
    cache.pack(made).rename(cache.packed(there))
    assert cache.bring(there)
    shutil.copytree(made, copied)
    shutil.rmtree(made)
    assert _run(LAUNCHES, there) == "3 launched, 3 found, 0 compiled"
    # Else nobody would need to bring it: keys alone find nothing.
    assert _run(LAUNCHES, copied) == "3 launched, 0 found, 3 compiled"
