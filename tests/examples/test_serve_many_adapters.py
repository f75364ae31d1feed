"""The serving example: a short run answers as PEFT does, and an adapter that is off is seen."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("peft")
pytest.importorskip("tqdm")
pytest.importorskip("transformers")

from examples import serve_many_adapters as example
from peft_kernels.lora.slots import Factors, LayerSlots

SHORT = ("--rounds", "2", "--adapters", "6", "--slots", "4", "--batch", "4")


def test_a_short_run_answers_as_peft(capsys: pytest.CaptureFixture[str]) -> None:
    assert example.main(SHORT) == 0
    printed = capsys.readouterr()
    rows = [line for line in printed.out.splitlines() if line.startswith("| ")]
    assert [row.split("|")[1].strip() for row in rows] == [
        "way", "---", "the model without adapters", "PEFT, adapter_names", "AdapterBank",
    ]  # fmt: skip
    # Tokens of a batch by the milliseconds of one.
    for row in rows[2:]:
        rate, milliseconds = (float(cell.replace(",", "")) for cell in row.split("|")[2:4])
        assert rate == pytest.approx(4e3 * example.NEW_TOKENS / milliseconds, rel=0.05)
    assert rows[3].split("|")[4].strip() == "1.00"
    # Four slots for six adapters: a batch may need one that is in none.
    loads = re.search(r"^(\d+) loads", printed.out, re.MULTILINE)
    assert loads is not None and int(loads[1]) >= 3
    assert "ok   logits of both agree" in printed.out
    assert "AdapterBank=" in printed.err and "tokens/s" in printed.err


def test_an_adapter_that_is_off_by_a_hundredth_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    put = LayerSlots.put

    def off(layer: LayerSlots, slot: int, factors: Factors) -> None:
        put(layer, slot, factors._replace(lora_b=1.01 * factors.lora_b))

    monkeypatch.setattr(LayerSlots, "put", off)
    assert example.main(SHORT) == 1
    printed = capsys.readouterr()
    assert "FAIL logits of both agree" in printed.out
    assert "answer differently" in printed.err


@pytest.mark.cpu_only
def test_what_cannot_run_is_refused() -> None:
    assert example.parse(["--quick"]).rounds == example.QUICK_ROUNDS
    assert example.parse(["--quick", "--rounds", "3"]).rounds == 3
    for arguments in (["--rounds", "0"], ["--slots", "3", "--batch", "4"]):
        with pytest.raises(SystemExit):
            example.parse(arguments)
