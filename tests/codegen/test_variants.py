"""However tokens and lengths vary, a family compiles at most so many variants of its kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from peft_kernels._core.triton_tools import why_not_installed

PROGRAM = Path(__file__).parent / "variants.py"
MOST = 24

pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.skipif(why_not_installed() is not None, reason=str(why_not_installed())),
]


@pytest.mark.parametrize("family", ["adapter", "lora", "prefix", "prompt"])
def test_lengths_of_all_kinds_take_few_variants(family: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, PROGRAM, family]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    kernels = json.loads(result.stdout)
    count = sum(kernel["variants"] for kernel in kernels.values())
    assert kernels, "no kernel was launched"
    columns = "\n".join(f"{name}: {kernel['variants']}, by {kernel['columns']}" for name, kernel in kernels.items())
    assert count <= MOST, f"{count} variants of {family}'s kernels\n{columns}"
