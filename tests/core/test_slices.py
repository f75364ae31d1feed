"""The plugin that runs tests in slices: real runs of pytest on a few tests of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent

pytestmark = pytest.mark.cpu_only

OUT = Path("out", "cpu", "tests")

# Takes the place of torch and of git, whose answers are not what is tested, and which take seconds.
STUB = """
from tests import slices
header = {"commit": None, "dirty": None, "sources": "new", "versions": {}, "device": "cpu"}
slices.where = lambda: (header, "cpu")
slices._ALL = 0.5
"""
PLUGIN = f"from tests.slices import *\n{STUB}"


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "stub.py").write_text(PLUGIN)
    paths = os.pathsep.join([str(folder), str(ROOT)])
    command = [sys.executable, "-m", "pytest", "-p", "stub", "-p", "no:cacheprovider", "--slices", "out", *options]
    return subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)


def outcomes(folder: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in (folder / OUT / "tests.jsonl").read_text().splitlines()]
    return {line["test"].partition("::")[2]: line["outcome"] for line in lines}


def test_every_outcome_is_recorded_once_and_summed_up(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2, 'one is not two'\n"
        "@pytest.mark.skip(reason='no such device')\n"
        "def test_not_here(): pass\n"
    )
    first = run(tmp_path)
    assert first.returncode == 1, first.stdout
    assert outcomes(tmp_path) == {"test_good": "passed", "test_bad": "failed", "test_not_here": "skipped"}
    summary = (tmp_path / OUT / "summary.md").read_text()
    assert "1 failed, 1 passed, 1 skipped, 0 not run" in summary
    assert "test_it.py::test_bad: AssertionError: one is not two" in summary
    assert "* 1: no such device" in summary

    again = run(tmp_path)
    assert "3 deselected" in again.stdout
    # What failed before has still failed.
    assert again.returncode == 1
    assert (tmp_path / OUT / "summary.md").read_text() == summary


def test_budget_ends_a_run_and_the_next_goes_on(tmp_path: Path) -> None:
    names = [f"test_{number}" for number in range(4)]
    (tmp_path / "test_it.py").write_text("".join(f"def {name}(): pass\n" for name in names))
    (tmp_path / OUT).mkdir(parents=True)
    old = {"sources": "old", "test": "test_it.py::test_2", "outcome": "passed", "reason": None, "seconds": 1000.0}
    (tmp_path / OUT / "tests.jsonl").write_text(json.dumps(old) + "\n")
    first = run(tmp_path, "--budget-s", "500")
    assert first.returncode == 75, first.stdout
    assert "budget spent, 2 tests left" in first.stdout
    second = run(tmp_path)
    assert second.returncode == 0, second.stdout
    assert "2 deselected" in second.stdout
    assert outcomes(tmp_path) == dict.fromkeys(names, "passed")
    assert json.loads((tmp_path / OUT / "summary.json").read_text())["counts"] == {"passed": 4}


@pytest.mark.thorough
def test_a_test_that_kills_its_process_twice_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import os\ndef test_first(): pass\ndef test_kills(): os._exit(7)\ndef test_last(): pass\n"
    )
    assert run(tmp_path).returncode == 7
    # Somebody else may have ended it: once more, when all others are done.
    assert run(tmp_path).returncode == 7
    assert outcomes(tmp_path) == {"test_first": "passed", "test_kills": "started", "test_last": "passed"}
    assert run(tmp_path).returncode == 1
    assert outcomes(tmp_path) == {"test_first": "passed", "test_kills": "crashed", "test_last": "passed"}
    assert "test_kills: started twice, and took its process down" in (tmp_path / OUT / "summary.md").read_text()


@pytest.mark.thorough
def test_whoever_runs_slices_learns_that_a_process_died(tmp_path: Path) -> None:
    """Its status is the dead process's own, which may be any; there is more to do."""
    (tmp_path / "test_it.py").write_text("import os\ndef test_kills(): os._exit(1)\ndef test_last(): pass\n")
    (tmp_path / "stub.py").write_text(STUB)
    program = "import sys, stub; sys.exit(stub.slices.main(sys.argv[1:]))"
    options = ["test_it.py", "-p", "stub", "-p", "no:cacheprovider", "--slices", "out"]
    command = [sys.executable, "-c", program, *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    statuses = [subprocess.run(command, cwd=tmp_path, env=environment, check=False).returncode for _ in range(3)]
    assert statuses == [75, 75, 1]
    assert "1 crashed, 1 passed, 0 not run" in (tmp_path / OUT / "summary.md").read_text()


SLOW = "import os, time\ndef slow(): time.sleep(0 if os.path.exists('quick') else 99)\n"


@pytest.mark.thorough
def test_a_test_that_overruns_is_the_first_of_the_next_slice(tmp_path: Path) -> None:
    tests = "def test_first(): time.sleep(5.5)\ndef test_long(): slow()\ndef test_last(): pass\n"
    (tmp_path / "test_it.py").write_text(SLOW + tests)
    (tmp_path / OUT).mkdir(parents=True)
    old = {"sources": "old", "test": "test_it.py::test_long", "outcome": "passed", "reason": None, "seconds": 0.1}
    (tmp_path / OUT / "tests.jsonl").write_text(json.dumps(old) + "\n")
    first = run(tmp_path, "--budget-s", "10")
    assert first.returncode == 75, first.stdout
    assert "budget spent at test_it.py::test_long, 2 tests left" in first.stderr
    assert outcomes(tmp_path) == {"test_first": "passed", "test_long": "overran"}
    assert "2 not run" in (tmp_path / OUT / "summary.md").read_text()
    (tmp_path / "quick").touch()
    second = run(tmp_path, "-v")
    assert second.returncode == 0, second.stdout
    assert second.stdout.index("test_long PASSED") < second.stdout.index("test_last PASSED")
    assert outcomes(tmp_path) == {"test_first": "passed", "test_long": "passed", "test_last": "passed"}


@pytest.mark.thorough
def test_a_test_that_hangs_costs_one_slice(tmp_path: Path) -> None:
    """With a larger budget it is tried again."""
    (tmp_path / "test_it.py").write_text(SLOW + "def test_hangs(): slow()\ndef test_last(): pass\n")
    assert run(tmp_path, "--budget-s", "10").returncode == 75
    assert run(tmp_path, "--budget-s", "10").returncode == 1
    assert outcomes(tmp_path) == {"test_hangs": "overran", "test_last": "passed"}
    assert "test_hangs: not ready after" in (tmp_path / OUT / "summary.md").read_text()
    (tmp_path / "quick").touch()
    assert run(tmp_path, "--budget-s", "100").returncode == 0


@pytest.mark.thorough
def test_durations_are_learned_from_other_states_of_the_sources(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("def test_short(): pass\ndef test_long(): pass\n")
    (tmp_path / OUT).mkdir(parents=True)
    old = {"commit": None, "dirty": None, "sources": "old", "versions": {}, "device": "cpu"}
    line = {**old, "test": "test_it.py::test_long", "outcome": "passed", "reason": None, "seconds": 100.0}
    (tmp_path / OUT / "tests.jsonl").write_text(json.dumps(line) + "\n")
    assert run(tmp_path, "--budget-s", "50").returncode == 75
    # The other one is the first of the next run, which every slice has room for.
    second = run(tmp_path, "--budget-s", "50")
    assert second.returncode == 0, second.stdout
    assert outcomes(tmp_path) == {"test_short": "passed", "test_long": "passed"}


@pytest.mark.thorough
def test_a_lost_context_ends_the_run(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "def test_faults(): raise RuntimeError('CUDA error: an illegal memory access was encountered')\n"
        "def test_after(): pass\n"
    )
    first = run(tmp_path)
    assert first.returncode == 75, first.stdout
    assert outcomes(tmp_path) == {"test_faults": "failed"}
    assert run(tmp_path).returncode == 1
    assert outcomes(tmp_path) == {"test_faults": "failed", "test_after": "passed"}


@pytest.mark.thorough
def test_what_cannot_be_collected_is_no_reason_to_run_again(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("import nothing_of_this_name\n")
    assert run(tmp_path).returncode == pytest.ExitCode.INTERRUPTED


@pytest.mark.thorough
def test_what_cannot_be_collected_keeps_nothing_else_from_running(tmp_path: Path) -> None:
    (tmp_path / "test_broken.py").write_text("import nothing_of_this_name\n")
    (tmp_path / "test_it.py").write_text("def test_it(): pass\n")
    for _ in range(2):
        assert run(tmp_path, "--continue-on-collection-errors").returncode == 1
        assert outcomes(tmp_path) == {"test_it": "passed"}
        summary = (tmp_path / OUT / "summary.md").read_text()
        assert "test_broken.py: not collected: ModuleNotFoundError" in summary
        assert "1 failed, 1 passed, 0 not run" in summary


@pytest.mark.thorough
@pytest.mark.parametrize(
    "change", [{"commit": "older"}, {"sources": "old"}, {"sources": None}, {"versions": {"torch": 1}}]
)
def test_another_state_starts_anew(tmp_path: Path, change: dict[str, object]) -> None:
    """Both ways: what has failed is mended now, and what has passed may be broken."""
    (tmp_path / "test_it.py").write_text("def test_mended(): pass\ndef test_broken(): assert False\n")
    (tmp_path / OUT).mkdir(parents=True)
    header = {"commit": None, "dirty": None, "sources": "new", "versions": {}, "device": "cpu", **change}
    header = {name: value for name, value in header.items() if (name, value) != ("sources", None)}
    lines = [
        {**header, "test": f"test_it.py::{test}", "outcome": outcome, "reason": None, "seconds": 0.1}
        for test, outcome in (("test_mended", "failed"), ("test_broken", "passed"))
    ]
    (tmp_path / OUT / "tests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run(tmp_path).returncode == 1
    assert outcomes(tmp_path) == {"test_mended": "passed", "test_broken": "failed"}
