"""The QLoRA example: a short run trains as PEFT with bitsandbytes does, and layers that fall back are seen."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

from examples import qlora as example
from peft_kernels.integrations.peft import four_bit, given

SHORT = ("--steps", "2", "--batch", "2")


def test_a_short_run_trains_as_peft_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert example.main([*SHORT, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    table = (tmp_path / example.TABLE).read_text()
    assert table in printed.out and "36 modules fused, 0 not" in printed.out and "ok   losses agree" in printed.out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")]
    ours, theirs = rows[2:]
    assert (ours[0], theirs[0]) == (example.OURS, example.THEIRS)
    assert theirs[2] == "1.00" and ours[5] == theirs[5]
    # Masks are drawn again from a seed, where PEFT keeps them and what they leave of x.
    assert float(ours[4]) < float(theirs[4])
    assert (tmp_path / example.PICTURE).read_bytes().startswith(b"\x89PNG")


def test_a_layer_that_falls_back_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(four_bit, "_call", lambda *call: None)
    monkeypatch.setattr(given, "factors_of_call", lambda *call: "for a reason")
    monkeypatch.setattr(example, "STEPS", 1)
    monkeypatch.setattr(example, "draw", lambda *arguments: None)
    assert example.main(["--batch", "1", "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert "for a reason" in printed.out and "did not run" in printed.err
