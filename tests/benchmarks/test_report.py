"""Tables from records: what is compared with what, what counts as a loss, and the part of the README."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import counts, gpus, pictures, record, report, tables
from benchmarks.family import discover

FIRST, SECOND = "2026-01-01T00:00:00+00:00", "2026-01-02T00:00:00+00:00"
PROBLEM = {
    "model": "Toy", "projection": "q", "m": 8, "n": 4, "k": 2, "r": 1, "dtype": "bfloat16", "adapter_dtype": "float32",
    "p": 0.0,
}  # fmt: skip
ROLES = {"base": "limit", "peft": "baseline", "addmm": "baseline", "ours_torch": "ours", "ours_triton": "ours"}


def line(provider: str, us: float | None, mode: str = "both", run: str = FIRST, **problem: Any) -> dict[str, Any]:
    """One record; without a time a skipped one."""
    common = {
        "schema": record.SCHEMA,
        "family": "lora_linear",
        "run": run,
        "date": run,
        "commit": "abcdef0123456789",
        "dirty": False,
        "device": {"type": "cpu", "name": "Toy", "driver": None, "sm_clock_mhz": None, "max_sm_clock_mhz": None},
        "versions": {"torch": "2.13", "triton": None, "peft": "0.21"},
        "ceilings": {"copy_bytes_per_s": 3e10, "matmul_flops_per_s": {"bfloat16": 2e11}},
        "problem": {**PROBLEM, **problem},
        "provider": provider,
        "role": ROLES[provider],
        "mode": mode,
    }
    if us is None:
        return {**common, "status": "skipped", "reason": "not here"}
    measured = {
        "status": "ok", "reason": None, "timing": "host", "timing_note": None, "repetitions": 9, "calls": 1,
        "median_us": us, "p20_us": us, "p80_us": us, "bytes": 1, "flops": 1, "roofline_us": 1.0,
        "roofline_fraction": 1.0 / us, "peak_memory_bytes": int(us), "error": {"y": 1e-3},
    }  # fmt: skip
    return {**common, **measured}


def problem_lines(times: dict[str, float | None], **rest: Any) -> list[dict[str, Any]]:
    return [line(provider, us, **rest) for provider, us in times.items()]


TIMES = {"base": 80.0, "peft": 150.0, "addmm": 110.0, "ours_torch": 120.0, "ours_triton": 100.0}


def test_lines_are_valid_records() -> None:
    for one in problem_lines({**TIMES, "addmm": None}):
        record.check(one)


def test_the_fastest_of_ours_counts() -> None:
    (found,) = tables.compare(problem_lines(TIMES))
    assert found.best("ours") == "ours_triton"
    assert found.best("baseline") == "addmm"
    assert found.speed_up("peft") == pytest.approx(1.5)
    assert found.speed_up("base") == pytest.approx(0.8)
    assert found.memory_ratio("peft") == pytest.approx(100 / 150)


def test_what_was_not_measured_has_no_ratio() -> None:
    (found,) = tables.compare(problem_lines({"base": 1.0, "peft": None, "ours_torch": None}))
    assert found.best("baseline") is None
    assert found.best("ours") is None
    assert found.speed_up("peft") is None
    assert found.speed_up("base") is None
    assert found.memory_ratio("peft") is None


def test_only_the_last_run_of_a_problem_counts() -> None:
    later = problem_lines({"base": 81.0, "peft": 100.0, "ours_torch": 125.0}, run=SECOND)
    other = problem_lines(TIMES, m=16)
    found = tables.compare([*later, *problem_lines(TIMES), *other])
    assert {(one.problem["m"], one.run) for one in found} == {(8, SECOND), (16, FIRST)}
    (last,) = [one for one in found if one.run == SECOND]
    # addmm and ours_triton are of the first run: they were never side by side with these.
    assert set(last.records) == {"base", "peft", "ours_torch"}


def test_losses_are_all_listed_worst_first() -> None:
    records = [
        *problem_lines({"peft": 90.0, "ours_torch": 100.0}),
        *problem_lines({"peft": 50.0, "ours_torch": 100.0}, m=16),
        *problem_lines({"peft": 100.0, "ours_torch": 100.0}, m=32),
        *problem_lines({"base": 10.0, "peft": 101.0, "ours_torch": 100.0}, m=64),
    ]
    found = tables.losses(tables.compare(records))
    assert [(comparison.problem["m"], baseline) for comparison, baseline, _ in found] == [(16, "peft"), (8, "peft")]
    assert found[0][2] == pytest.approx(0.5)


def test_label_is_one_readable_line() -> None:
    assert tables.label(PROBLEM) == "Toy q m=8 n=4 k=2 r=1 bf16 fp32 p=0"


def test_summary_groups_by_fields_and_takes_medians() -> None:
    records = [
        entry
        for m, us in ((1, 100.0), (2, 200.0), (4, 400.0))
        for entry in problem_lines({"base": 50.0, "peft": us, "ours_torch": 100.0}, m=m)
    ]
    records += problem_lines({"base": 50.0, "peft": 70.0, "ours_torch": 100.0}, p=0.1)
    rows = tables.summary_table(tables.compare(records), ["p"], ["base", "peft"]).splitlines()
    assert rows[2].startswith("| both | 0 | 3 | 0.50 (0.50 to 0.50) | 2.00 (1.00 to 4.00) |")
    assert rows[3].startswith("| both | 0.1 | 1 | 0.50 | 0.70 |")


def test_problem_table_marks_the_fastest() -> None:
    table = tables.problem_table(tables.compare(problem_lines({**TIMES, "addmm": None})), list(TIMES))
    assert table.splitlines()[2].endswith("| both | **80.0** | 150.0 | - | 120.0 | 100.0 | 1.50 | 1% |")


def test_terminal_table_gives_reasons_once() -> None:
    records = problem_lines({"peft": 1.0, "addmm": None}) + problem_lines({"peft": 2.0, "addmm": None}, mode="forward")
    text = tables.terminal_table(records)
    assert text.count("addmm skipped: not here") == 1
    header, *rows = text.splitlines()
    assert header.split()[:2] == ["provider", "mode"]
    assert len(rows) == 3


def test_aligned_columns() -> None:
    assert tables.aligned(["a", "bb"], [["long", "1"]]) == "a     bb\nlong   1"


def test_replace_part_keeps_the_rest() -> None:
    text = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    assert report.replace_part(text, "new") == f"before\n{report.BEGIN}\nnew\n{report.END}\nafter\n"


@pytest.mark.parametrize(
    "text",
    ["nothing", report.BEGIN, f"{report.END}{report.BEGIN}", f"{report.BEGIN}{report.END}{report.BEGIN}{report.END}"],
)
def test_replace_part_needs_both_marks_once(text: str) -> None:
    with pytest.raises(ValueError, match="once each"):
        report.replace_part(text, "new")


def _write(folder: Path, records: list[dict[str, Any]]) -> list[str]:
    record.append(record.path(folder / "results", "toy", "lora_linear"), records)
    readme = folder / "README.md"
    if not readme.exists():
        blocks = ((gpus.BEGIN, gpus.END), (counts.BEGIN, counts.END), (report.BEGIN, report.END))
        readme.write_text("\n".join(["# Title", *(line for block in blocks for line in block), ""]))
        design = folder / report.DESIGN
        design.parent.mkdir(parents=True)
        design.write_text(f"before\n{counts.BEGIN_GROUPS}\n{counts.END_GROUPS}\nafter\n")
    return ["--results", str(folder / "results"), "--checks", str(folder / "checks"), "--root", str(folder)]


def test_check_fails_until_all_files_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = _write(tmp_path, problem_lines(TIMES))
    assert report.main([*options, "--check"]) == 1
    assert "make report" in capsys.readouterr().err
    assert report.main(options) == 0
    assert report.main([*options, "--check"]) == 0
    for name in (report.README, report.DESIGN, report.DETAILS):
        path = tmp_path / name
        written = path.read_text()
        changed = (
            written.replace("the 0 in", "the 7 in").replace("No baseline", "A baseline").replace("15 + 23", "1 + 1")
        )
        assert changed != written
        path.write_text(changed)
        assert (report.main([*options, "--check"]) == 1) == (path.read_text() != written)
        path.write_text(written)
    _write(tmp_path, problem_lines({**TIMES, "ours_torch": 70.0}, run=SECOND))
    assert report.main([*options, "--check"]) == 1


def test_files_say_device_date_commit_and_losses(tmp_path: Path) -> None:
    options = _write(tmp_path, problem_lines(TIMES) + problem_lines({**TIMES, "addmm": 50.0}, m=16))
    assert report.main(options) == 0
    readme, details = ((tmp_path / name).read_text() for name in (report.README, report.DETAILS))
    assert readme.startswith("# Title\n")
    assert "On Toy (a CPU has no kernels: the torch backend is timed): time of a step" in readme
    assert "\n* PEFT: `lora_linear` 1.50 (1.50 to 1.50)\n" in readme
    assert "\n* the frozen product, then `addmm_`: `lora_linear` 0.80 (0.50 to 1.10)\n" in readme
    assert "eager PyTorch" not in readme
    assert "has all 2 measurements, and lists the 1 in which a baseline is faster." in readme
    assert "## lora_linear on Toy" in details
    assert "2026-01-01, commit abcdef012345;" in details
    assert "A baseline is faster in 1 of 2 measurements" in details
    assert "* Toy q m=16 n=4 k=2 r=1 bf16 fp32 p=0, both: addmm takes 0.50 of our time" in details
    assert "| Toy | q | 16 | 4 | 2 | 1 | bf16 | fp32 | 0 | both | 80.0 | 150.0 | - | **50.0** |" in details
    assert "| both | bf16 | fp32 | 0 | 2 | 0.80 (0.80 to 0.80) | 1.50 (1.50 to 1.50) |" in details


def test_the_frozen_layer_alone_is_no_baseline(tmp_path: Path) -> None:
    """It computes something else; a layer with an adapter cannot be faster."""
    assert report.main(_write(tmp_path, problem_lines({**TIMES, "base": 1.0, "addmm": None}))) == 0
    readme = (tmp_path / report.README).read_text()
    assert "lists the 0 in which" in readme
    assert "base" not in readme.partition(report.BEGIN)[2].replace("baseline", "")


def test_summary_is_of_whole_steps(tmp_path: Path) -> None:
    records = problem_lines(TIMES) + problem_lines({**TIMES, "peft": 1.0}, mode="forward")
    assert report.main(_write(tmp_path, records)) == 0
    assert "* PEFT: `lora_linear` 1.50\n" in (tmp_path / report.README).read_text()


def test_a_readme_without_marks_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = _write(tmp_path, problem_lines(TIMES))
    (tmp_path / "README.md").write_text("# Title\n")
    assert report.main(options) == 1
    assert "needs <!-- benchmarks:begin -->" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == "# Title\n"
    assert not (tmp_path / report.DETAILS).exists()


def test_a_design_without_marks_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = _write(tmp_path, problem_lines(TIMES))
    before = (tmp_path / report.README).read_text()
    (tmp_path / report.DESIGN).write_text("# LoRA\n")
    assert report.main(options) == 1
    assert f"{report.DESIGN}: needs {counts.BEGIN_GROUPS}" in capsys.readouterr().err
    assert (tmp_path / report.README).read_text() == before


def test_gpus_come_first_and_nothing_is_said_plainly(tmp_path: Path) -> None:
    _write(tmp_path, problem_lines(TIMES))
    cuda = [{**one, "device": {**one["device"], "type": "cuda", "name": "Zed GPU"}} for one in problem_lines(TIMES)]
    record.append(record.path(tmp_path / "results", "z-gpu", "lora_linear"), cuda)
    results, families = report.load_results(tmp_path / "results"), discover()
    for text in (report.render_summary(results, families), report.render_details(results, families, tmp_path)):
        assert text.index("n Zed GPU") < text.index("n Toy")
    assert report.render_summary({}, families) == "No measurements are recorded yet."


@pytest.mark.cpu_only
def test_counts() -> None:
    """By hand for LoRA, in passes over x: W is half a pass, what has rank 16 next to nothing."""
    layer = next(counts.layers())
    today, here = counts.count_today(layer), counts.count_here(layer)
    # x W', x A', S B', times s, the sum; times s, dY B, dY'S, dS A, dS'x, dY W, the sum of x's two gradients.
    assert (today.forward, today.backward) == (5, 7)
    assert today.bytes / layer.activation == pytest.approx(2.5 + 1 + 1 + 2 + 3 + 2 + 1 + 1 + 1 + 1 + 2.5 + 3, abs=0.05)
    # S, the update of y, and y, which is read and written; dS and dB, three sums, the same two of dX, dA, two casts.
    # The partial dS are half of x.
    assert (here.forward, here.backward) == (3, 9)
    assert here.bytes / layer.activation == pytest.approx(1 + 1 + 3.5 + 1.25 + 0.25 + 1 + 3.5 + 1, abs=0.15)
    assert today.kept / layer.activation == pytest.approx(1, abs=0.01)
    assert here.kept == layer.activation + 4 * 8192 * 16


@pytest.mark.cpu_only
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("grouped", [False, True])
def test_counts_of_members(grouped: bool, p: float) -> None:
    """By hand for q, k, v, in passes over x: together their y are 1.5, their W 0.75; partial dS are half of dY."""
    layer = counts.lora("q, k, v", counts.QKV, torch.bfloat16, p, grouped)
    today, here = counts.count_today(layer), counts.count_here(layer)
    y, w, each = 1.5, 0.75, 3
    # As one layer's, where what is as large as x counts for each member; then two sums of the gradients of x. Dropout
    # reads and writes x, and a mask of bytes, each way.
    assert (today.forward, today.backward) == ((18, 26) if p else (15, 23))
    dropout = each * 2 * (2 + 0.5) if p else 0
    theirs = (each * (1 + 1) + w + 7 * y) + (each * (1 + 1 + 1 + 3) + w + 5 * y) + 2 * 3
    assert today.bytes / layer.activation == pytest.approx(theirs + dropout, abs=0.2)
    assert today.kept / layer.activation == pytest.approx(each * (1 + 0.5) if p else 1, abs=0.03)
    # The products read x and W, and read and write the y, or dX, to which they add.
    forward = (each + w + 2 * y) + y
    backward = (y + w + each * 2) + (1 + 0.5) * y
    if grouped:
        # Both ways A's under each other. S, and an update and a product each; dS, dB, two sums and a cast each, the
        # updates' part of dX, dA with its sum and three casts, and the products. Lanes are programs enough for dA
        # without ranges of rows.
        assert (here.forward, here.backward) == (1 + 1 + 2 * 3, 1 + 4 * 3 + 1 + 5 + 3 - (p > 0))
        ours = forward + 1 + backward + 1 + 1
    else:
        assert (here.forward, here.backward) == (3 * 3, 3 * 9 + 2)
        ours = forward + each + backward + each * (1 + 1) + 2 * 3
    # A hundredth for each time that something of rank 16 is read or written.
    assert here.bytes / layer.activation == pytest.approx(ours, abs=0.5)
    assert here.kept == layer.activation + each * 4 * 8192 * 16


@pytest.mark.cpu_only
def test_an_expanded_tensor_counts_once() -> None:
    assert counts.bytes_of(torch.empty(4, 1, device="meta").expand(4, 100)) == 16
    assert counts.bytes_of(torch.empty(0, 3, device="meta")) == 0


@pytest.mark.cpu_only
def test_what_is_committed_is_what_the_records_give() -> None:
    """A number that somebody typed, or a record without its tables."""
    assert report.main(["--check"]) == 0


def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    records = problem_lines(TIMES) + problem_lines({**TIMES, "addmm": None}, p=0.1)
    results, families = {("toy", "lora_linear"): records}, discover()
    (picture,) = pictures.draw(results, families, tmp_path / "images")
    assert picture.name == "lora_linear-toy-both.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "(images/lora_linear-toy-both.png)" in report.render_details(results, families, tmp_path / "images")
    assert "images/" not in report.render_details(results, families, tmp_path)
