"""The demo: its data do not leak, its checks can fail, and a short run writes what it prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from examples import checks, finetune, methods, report, task, train
from examples.model import Texts, model_folder
from peft_kernels import FusedLoRALinear, ParallelAdapter, SerialAdapter

pytest.importorskip("peft")
pytest.importorskip("tqdm")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

try:
    model_folder()
    task.lexicon_path()
except FileNotFoundError as missing:
    pytest.skip(str(missing), allow_module_level=True)


@pytest.fixture(scope="module")
def data() -> task.Task:
    return task.load_task()


@pytest.mark.cpu_only
def test_split_is_the_same_every_time(data: task.Task) -> None:
    assert task.load_task() == data


@pytest.mark.cpu_only
def test_split_keeps_every_text_once(data: task.Task) -> None:
    texts = [example.text for name in task.SHARES for example in getattr(data, name)]
    assert len(texts) == len(set(texts)) == len({text.lower() for text in texts})
    assert set(texts) == {example.text for example in task.read_lexicon(task.lexicon_path())}


@pytest.mark.cpu_only
def test_no_relative_in_another_split(data: task.Task) -> None:
    """Written out instead of calling ``family``, whose faults it would share."""
    seen = {example.text for example in data.train + data.validation}
    beginnings = {text[:3] for text in seen if text[:3].isalpha() and len(text) >= 3}
    held_out = [example.text for example in data.test]
    assert not [text for text in held_out if len(text) >= 3 and text[:3] in beginnings]
    assert not {"".join(sorted(text)) for text in held_out} & {"".join(sorted(text)) for text in seen if len(text) < 3}


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    ("left", "right"), [("love", "lovingly"), (":-)", "(:"), (":)", ":-)"), ("fed up", "fedora"), (":d", "d:")]
)
def test_relatives_are_of_one_family(left: str, right: str) -> None:
    assert task.family(left) == task.family(right)


@pytest.mark.cpu_only
def test_split_is_stratified(data: task.Task) -> None:
    whole = [example for name in task.SHARES for example in getattr(data, name)]
    positive = sum(example.label for example in whole) / len(whole)
    for name, share in task.SHARES.items():
        part = getattr(data, name)
        assert len(part) / len(whole) == pytest.approx(share, abs=0.01)
        assert sum(example.label for example in part) / len(part) == pytest.approx(positive, abs=0.01)


@pytest.mark.cpu_only
def test_ratings_of_texts_that_differ_in_capitals_are_pooled(tmp_path: Path) -> None:
    lexicon = tmp_path / "lexicon.txt"
    lexicon.write_text(
        ":D\t1.5\t0.5\t[1, 2]\n:d\t-2.0\t1.0\t[-3, -1]\nmeh\t0.0\t1.0\t[-1, 1]\ngood\t2.0\t0.0\t[2, 2]\n"
    )
    assert task.read_lexicon(lexicon) == [task.Example(":d", 0), task.Example("good", 1)]


@pytest.mark.cpu_only
def test_equal_curves_agree() -> None:
    curve = [0.7, 0.5, 0.3]
    assert checks.losses_agree("x", curve, [loss * (1 + checks.EPS) for loss in curve]).passed


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    "fused",
    [[0.7, 0.5, 0.31], [0.7001, 0.5, 0.3], [0.7, float("nan"), 0.3], [0.7, 0.5], []],
    ids=["late", "at once", "nan", "short", "none"],
)
def test_curves_that_part_are_a_failure(fused: list[float]) -> None:
    check = checks.losses_agree("x", fused, [0.7, 0.5, 0.3])
    assert not check.passed
    assert str(check).startswith("FAIL x")


@pytest.mark.cpu_only
def test_no_curve_is_a_failure() -> None:
    assert not checks.losses_agree("x", [], []).passed


@pytest.mark.cpu_only
@pytest.mark.parametrize(("reached", "passed"), [(0.81, True), (0.8, False), (0.79, False)])
def test_accuracy_has_to_beat_the_baseline(reached: float, passed: bool) -> None:
    assert checks.beats("x", reached, "probe", 0.8).passed is passed


@pytest.mark.cpu_only
def test_changed_answers_are_a_failure() -> None:
    before = torch.tensor([[1.0, 0.0], [0.0, 1e-8]])
    assert checks.same_predictions("x", before, before + 1e-6).passed
    assert not checks.same_predictions("x", before, before + 1e-3).passed
    assert not checks.same_predictions("x", before, before.flip(1)).passed
    assert not checks.same_predictions("x", before, before * float("nan")).passed
    assert checks.same_bits("x", before, before.clone()).passed
    assert not checks.same_bits("x", before, before + torch.finfo(torch.float32).eps).passed


@pytest.mark.cpu_only
def test_a_report_without_checks_has_not_passed() -> None:
    assert not report.Report({}).passed


@pytest.mark.cpu_only
def test_every_method_is_found() -> None:
    folder = Path(methods.__file__).parent
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    found = methods.discover()
    assert len(found) == len(files) == len({method.name for method in found})


@pytest.mark.parametrize("method", [method for method in methods.discover() if method.fused], ids=lambda m: m.name)
def test_both_models_start_alike_and_a_wrong_scale_is_seen(
    data: task.Task, device: torch.device, method: methods.Method
) -> None:
    """A fused layer that is off by a thousandth in its scale must not slip through the demo's bound."""
    texts = Texts(data.train[:64], device)
    for error, agree in ((0.0, True), (1e-3, False)):
        pair = train.build_pair(method, 0, device)
        for module in pair["fused"].modules():
            if isinstance(module, FusedLoRALinear):
                module.scaling = {name: scale * (1 + error) for name, scale in module.scaling.items()}
            elif isinstance(module, (SerialAdapter, ParallelAdapter)):
                module.scale *= 1 + error
        runs = {label: train.start(label, model, method.learning_rate, 4) for label, model in pair.items()}
        train.train(list(runs.values()), texts, 4, 0, "test")
        assert runs["fused"].losses[0] == pytest.approx(runs["unfused"].losses[0], rel=1e-5)
        assert checks.losses_agree(method.name, runs["fused"].losses, runs["unfused"].losses).passed is agree


@pytest.fixture(scope="module")
def short_run(data: task.Task, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path, dict]:
    """Run the whole program on a few texts; so few that it need not learn anything."""
    folder = tmp_path_factory.mktemp("demo")
    few = task.Task(data.train[:200], data.validation[:50], data.test[:60])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task, "load_task", lambda: few)
        status = finetune.main(["--steps", "6", "--out", str(folder), "--threads", "1"])
    return status, folder, json.loads((folder / report.NUMBERS_FILE).read_text())


def test_short_run_writes_its_files(short_run: tuple[int, Path, dict]) -> None:
    _, folder, _ = short_run
    assert (folder / report.PICTURE_FILE).read_bytes().startswith(b"\x89PNG")
    saved = torch.load(folder / "lora_adapter.pt", weights_only=True)
    assert sum(value.numel() for value in saved.values()) == 332_546


def test_table_holds_the_numbers_of_the_json_file(short_run: tuple[int, Path, dict]) -> None:
    _, folder, numbers = short_run
    lines = (folder / report.TABLE_FILE).read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")][1:]
    assert len(rows) == len(numbers["rows"]) == 2 + sum(1 + (method.fused is not None) for method in methods.discover())
    for cells, row in zip(rows, numbers["rows"], strict=True):
        assert cells == list(report.Row(**row).cells())
        assert cells[0] == row["method"]
        assert int(cells[1].replace(",", "")) == row["parameters"]
        assert float(cells[3]) == pytest.approx(row["test_loss"], abs=1e-4)
        assert float(cells[4].rstrip("%")) == pytest.approx(100 * row["accuracy"], abs=0.01)
    fused = next(row for row in numbers["rows"] if row["method"] == "LoRA, fused")
    unfused = next(row for row in numbers["rows"] if row["method"] == "LoRA, PEFT")
    assert fused["memory_ratio"] == pytest.approx(fused["peak_bytes"] / unfused["peak_bytes"])
    assert fused["parameters"] == unfused["parameters"]
    last = numbers["curves"]["LoRA"]["fused"][-finetune.LAST_BATCHES :]
    assert fused["train_loss"] == pytest.approx(sum(last) / len(last))


def test_short_run_status_is_that_of_its_checks(short_run: tuple[int, Path, dict]) -> None:
    status, _, numbers = short_run
    passed = [check["passed"] for check in numbers["checks"]]
    # Of each method: two rivals beaten, a file read back; fused ones agree with unfused; merged and unmerged answers.
    assert len(passed) == sum(
        3 + (method.fused is not None) + 2 * (method.merge is not None) for method in methods.discover()
    )
    assert status == (0 if all(passed) else 1)
    assert numbers["passed"] is all(passed)
    exact = [check for check in numbers["checks"] if "better than" not in check["name"]]
    assert all(check["passed"] for check in exact), exact


def test_a_failed_check_ends_the_program_with_an_error(
    data: task.Task, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def parted(*arguments: object) -> None:
        result = arguments[3]
        assert isinstance(result, report.Report)
        result.curves["x"] = {"fused": [0.7, 0.6], "unfused": [0.7, 0.5]}
        result.checks.append(checks.losses_agree("x", [0.7, 0.6], [0.7, 0.5]))

    monkeypatch.setattr(task, "load_task", lambda: task.Task(data.train[:40], data.validation[:8], data.test[:8]))
    monkeypatch.setattr(finetune, "play", parted)
    monkeypatch.setattr(finetune, "beat_these", lambda *_: [])
    assert finetune.main(["--out", str(tmp_path)]) == 1
    assert "FAIL x: fused and unfused losses agree" in capsys.readouterr().err
    assert json.loads((tmp_path / report.NUMBERS_FILE).read_text())["passed"] is False
