"""The sample of speeds, and what a run of benchmarks says by its status."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")

from benchmarks import __main__ as program
from benchmarks import harness, record, sample
from benchmarks.roofline import Ceilings
from tests.benchmarks.test_harness import HEADER, TOY, ToyProblem

pytestmark = pytest.mark.cpu_only

GOOD = dataclasses.replace(TOY, providers=TOY.providers[:4])


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> harness.Session:
    monkeypatch.setitem(harness.TARGET_US, "cpu", 1000.0)
    return harness.Session(torch.device("cpu"), True, Ceilings(1e12, {"float32": 1e12}), HEADER)


def test_speeds_are_those_of_the_first_provider_s_over_each(session: harness.Session, tmp_path: Path) -> None:
    lines = harness.measure_problem(TOY, ToyProblem(4), session)[: len(TOY.providers)]
    lines = [
        {**line, "median_us": 10.0} if line["provider"] == "base" else {**line, "median_us": 12.5}
        if line["status"] == "ok" else line
        for line in lines
    ]  # fmt: skip
    rows = {line.split()[0]: line.split() for line in sample.ratios(lines).splitlines()}
    assert rows["base"][1:3] == ["10.0", "1.000"]
    assert rows["peft"][1:3] == ["12.5", "0.800"]
    assert "failed: wrong result" in sample.ratios(lines)
    assert "speed, nothing = 1" in sample.ratios([line for line in lines if line["status"] != "ok"])


def test_each_problem_is_on_record_as_soon_as_it_is_timed(session: harness.Session, tmp_path: Path) -> None:
    assert sample.measure(session, tmp_path, [(GOOD, ToyProblem(4)), (GOOD, ToyProblem(8))]) == 0
    folder = tmp_path / "toy-cpu" / sample.NAME
    lines = record.load(folder / "toy.jsonl")
    assert {line["mode"] for line in lines} == {"forward"}
    assert len({record.key(line) for line in lines}) == 2
    assert (folder / "sample.md").read_text().count("speed, base = 1") == 2
    assert sample.measure(session, None, [(TOY, ToyProblem(4))]) == 1


@pytest.mark.parametrize(("family", "problem"), sample.PROBLEMS, ids=lambda value: getattr(value, "name", str(value)))
def test_problems_are_their_families(family: harness.Family, problem: object) -> None:
    assert family.input_bytes(problem) > 0
    assert "forward" in family.modes(problem)
    assert any(provider.role == "ours" and provider.name not in sample.WITHOUT for provider in family.providers)


def test_without_a_gpu_there_is_nothing_to_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert sample.main([]) == sample.NO_GPU
    assert "no GPU" in capsys.readouterr().out


def test_status_tells_what_is_left_and_what_has_failed(
    session: harness.Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "start_session", lambda *_: session)
    monkeypatch.setattr(program, "_print_header", lambda session: None)
    families = {"toy": TOY}
    monkeypatch.setattr(program, "discover", lambda: families)
    run = functools.partial(program.main, ["--device", "cpu", "--out", str(tmp_path), "--resume", "--budget-s", "0"])
    assert run() == harness.MORE
    monkeypatch.setattr(harness, "within_budget", lambda jobs, budget_s: iter(jobs))
    assert run() == 1
    # Nothing is left, and what has failed has still failed; with another session's sources it is no one's.
    assert run() == 1
    families["toy"] = GOOD
    (tmp_path / "toy-cpu" / "toy.jsonl").unlink()
    assert run() == 0
