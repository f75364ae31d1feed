"""The order in which compiled kernels sum a row is one for all numbers of rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_products_are_the_same_for_all_numbers_of_rows() -> None:
    """Kind, shape, layout and order of each product in the compiler's last dialect before threads."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = Path(__file__).with_name("row_invariant.py")
    result = subprocess.run(
        [sys.executable, program, "90"], capture_output=True, text=True, env=environment, check=False
    )
    assert result.returncode == 0, result.stderr[-4000:]
    found = json.loads(result.stdout)
    assert {name.split()[1] for name in found} >= {"product_kernel", "narrow_product_kernel", "rank_product_kernel"}
    for name, by_rows in found.items():
        first, *others = by_rows.values()
        assert len(others) == 3 and all(first), name
        assert all(other == first for other in others), name
