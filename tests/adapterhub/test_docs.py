"""What docs/integrations.md shows of AdapterHub runs."""

from __future__ import annotations

import pytest

pytest.importorskip("adapters", reason="AdapterHub needs an older transformers; `make test-adapterhub` runs these")

import re
from pathlib import Path
from textwrap import dedent

DOCUMENT = Path(__file__).parents[2] / "docs" / "integrations.md"


def test_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    (section,) = re.findall(r"^## AdapterHub\n(.*?)^## ", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)
    (example,) = re.findall(r"(?:^(?: {4}.*)?\n)+(?=^`adapters`)", section, re.MULTILINE)
    exec(compile(dedent(example), str(DOCUMENT), "exec"), {})
    assert "peft_kernels: 4 modules fused, 0 not" in capsys.readouterr().out
