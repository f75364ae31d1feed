"""However tokens and lengths vary, a family compiles at most so many variants of its kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from peft_kernels._core.triton_tools import why_not_installed

PROGRAM = Path(__file__).parent / "variants.py"
MOST = 24

pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.skipif(why_not_installed() is not None, reason=str(why_not_installed())),
]


def _run(what: str) -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, PROGRAM, what]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout)


@pytest.mark.thorough
@pytest.mark.parametrize("family", ["adapter", "lora", "prefix", "wide", "prompt"])
def test_lengths_of_all_kinds_take_few_variants(family: str) -> None:
    kernels = _run(family)
    count = sum(kernel["variants"] for kernel in kernels.values())
    assert kernels, "no kernel was launched"
    columns = "\n".join(f"{name}: {kernel['variants']}, by {kernel['columns']}" for name, kernel in kernels.items())
    assert count <= MOST, f"{count} variants of {family}'s kernels\n{columns}"


def test_activations_by_columns_keep_their_vectors() -> None:
    """A multiple of 16 rows is compiled as one, or loads fall to single elements and no copy is asynchronous."""
    kernels = _run("by_columns")
    # It writes y and dX, which have contiguous rows whatever x and dY have.
    assert kernels.pop("rank_product_kernel") == ["('i32', None)"]
    assert kernels.keys() == {
        "narrow_product_kernel", "narrow_and_reduce_kernel", "reduce_rows_kernel",
        "bottleneck_kernel", "bottleneck_grad_kernel", "wide_product_kernel",
    }  # fmt: skip
    assert set(map(tuple, kernels.values())) == {("('i32', 'D')",)}
