"""The training example: a short run trains as PEFT does one after another, and a wrong mean is seen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

import peft_kernels as pk
from examples import train_many_adapters as example

SHORT = ("--steps", "3", "--adapters", "3", "--batch", "2")


def test_a_short_run_trains_as_one_after_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert example.main([*SHORT, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    table = (tmp_path / example.TABLE).read_text()
    assert table in printed.out and "ok   losses agree" in printed.out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[2:]] == ["together, in one batch", "one after another, PEFT"]
    assert rows[3][2] == "1.00" and all(float(row[1]) > 0 and float(row[3]) > 0 for row in rows[2:])
    assert (tmp_path / example.PICTURE).read_bytes().startswith(b"\x89PNG")
    assert "training" in printed.err


@pytest.mark.thorough
def test_another_adapter_s_mean_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a mean over the whole batch ties an adapter's step to the others' rows."""
    right = pk.Rows.mean

    def of_all(rows: pk.Rows, values: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return 0.5 * (right(rows, values, mask) + values.mean())

    monkeypatch.setattr(pk.Rows, "mean", of_all)
    assert example.main([*SHORT, "--out", str(tmp_path)]) == 1
    assert "learn something else" in capsys.readouterr().err


@pytest.mark.cpu_only
def test_what_cannot_run_is_refused() -> None:
    assert example.parse(["--quick"]).steps == example.QUICK_STEPS
    assert example.parse(["--quick", "--steps", "3"]).steps == 3
    for arguments in (["--steps", "0"], ["--adapters", "0"]):
        with pytest.raises(SystemExit):
            example.parse(arguments)
