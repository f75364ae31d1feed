"""The search for configs: what is tried, that it is in force where it should be, and the step that needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pytest

from benchmarks import candidates, tune
from benchmarks.candidates import Change
from benchmarks.family import discover
from peft_kernels._core.triton_tools import why_not_installed
from peft_kernels.lora.kernels import config as lora_config

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Config:
    BLOCK_M: int
    BLOCK_R: int
    splits: int
    num_warps: int
    num_stages: int


def chosen(m: int) -> Config:
    return Config(BLOCK_M=m, BLOCK_R=16, splits=1, num_warps=8, num_stages=1)


def path(m: int) -> Literal["one", "other"]:
    return "one"


def once(m: int) -> bool:
    return True


def size(m: int) -> int:
    return m


def _module() -> ModuleType:
    module = ModuleType("toy")
    for function in (chosen, path, once, size):
        setattr(module, function.__name__, function)
    return module


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = _module()
    for function in (chosen, path, once, size):
        monkeypatch.setattr(function, "__module__", "toy")
    return module


def test_what_can_be_tuned(toy: ModuleType) -> None:
    """A plain number has no neighbours that are known to make sense."""
    assert set(candidates.tunables(toy)) == {"chosen", "path", "once"}
    assert {"rank_product_config", "reads_dy_once"} <= set(candidates.tunables(lora_config))


def test_candidates_start_with_what_is_and_change_each_field_once() -> None:
    one = candidates.candidates(chosen, most_changes=1)
    assert one[0] == ()
    assert {change.field for (change,) in one[1:]} == {"BLOCK_M", "splits", "num_warps", "num_stages"}
    two = candidates.candidates(chosen, most_changes=2)
    assert len(set(two)) == len(two)
    assert all(len({change.field for change in candidate}) == len(candidate) for candidate in two)
    # 8 single changes in 4 fields of 2; each pair of fields has 4 combinations.
    assert len(two) == 1 + 8 + 6 * 4


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (Change("BLOCK_M", "*2"), {"BLOCK_M": 64}),
        (Change("splits", "*2"), {"splits": 2}),
        (Change("num_warps", "=4"), {"num_warps": 4}),
        (Change("num_stages", "+1"), {"num_stages": 2}),
    ],
)
def test_apply(change: Change, expected: dict[str, int]) -> None:
    before = chosen(32)
    assert candidates.apply((change,), before) == Config(**{**vars(before), **expected})


@pytest.mark.parametrize("change", [Change("BLOCK_M", "/2"), Change("splits", "/2"), Change("num_stages", "-1")])
def test_what_makes_no_sense_is_no_candidate(change: Change) -> None:
    assert candidates.apply((change,), chosen(16)) is None


def test_values_that_are_no_config(toy: ModuleType) -> None:
    assert candidates.candidates(path) == [(), (Change("", "=one"),), (Change("", "=other"),)]
    assert candidates.apply((Change("", "=other"),), "one") == "other"
    assert candidates.apply((Change("", "=False"),), True) is False


def test_in_force_inside_the_block_alone(toy: ModuleType) -> None:
    original = toy.chosen
    with candidates.in_force(toy, "chosen", (Change("BLOCK_M", "*2"),)) as seen:
        assert toy.chosen(32).BLOCK_M == 64
        assert toy.chosen(m=64).BLOCK_M == 128
        with pytest.raises(ValueError, match="out of what makes sense"):
            toy.chosen(512)
    assert [(own.BLOCK_M, new.BLOCK_M) for own, new in seen] == [(32, 64), (64, 128)]
    assert toy.chosen is original


def test_every_family_has_the_provider_that_is_tuned() -> None:
    for family in discover().values():
        assert tune.PROVIDER in family.names("ours")


def test_table_puts_the_fastest_first() -> None:
    lines: list[dict[str, Any]] = [
        {"candidate": "as is", "status": "ok", "median_us": 10.0},
        {"candidate": "BLOCK_M*2", "status": "ok", "median_us": 8.0},
        {"candidate": "BLOCK_M/2", "status": "AssertionError: y"},
    ]
    _, title, _, first, second, failed = tune._table({"m": 1}, lines).split("\n")
    assert title == "m=1"
    assert first.split() == ["BLOCK_M*2", "8.0", "0.800"]
    assert second.split() == ["as", "is", "10.0", "1.000"]
    assert failed == "  BLOCK_M/2: AssertionError: y"


def _tune(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the stand-in driver stays in force where it was put."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.tune", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.cpu_only
@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.skipif(why_not_installed() is not None, reason=str(why_not_installed()))
def test_prune(tmp_path: Path) -> None:
    """No compile ends within the budget, so each run starts one problem, and goes on after what is on file."""
    command = ("prompt_tuning", "concatenate_config", "--prune", "90", "--changes", "1", "--out", str(tmp_path))
    for _ in range(2):
        result = _tune(*command, "--budget-s", "0.01")
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("candidates left") == 1
    (written,) = tmp_path.glob("sm_90/tuning/prompt_tuning-concatenate_config.jsonl")
    lines = [json.loads(line) for line in written.read_text().splitlines()]
    own = [line for line in lines if line["candidate"] == "as is"]
    assert len(own) == len({json.dumps(line["problem"]) for line in lines}) == 2
    assert all(line["reasons"] == [] and line["registers"] > 0 for line in own)
    assert len({line["candidate"] for line in lines}) > 2


@pytest.mark.cpu_only
def test_unknown_function() -> None:
    with pytest.raises(SystemExit, match=r"no function 'product' to tune; it has .*rank_product_config"):
        tune.main(["lora_linear", "product"])
