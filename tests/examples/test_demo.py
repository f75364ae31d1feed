"""The demo: its data do not leak, its checks can fail, and a short run writes what it prints."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("tqdm")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from examples import checks, finetune, labels, methods, picture, report, switching, task, train
from examples.methods import lora, prompt_ensemble, prompt_tuning
from examples.model import Texts, mean_token, model_folder
from peft_kernels import FusedLoRALinear, ParallelAdapter, PrefixEncoder, PromptEmbedding, SerialAdapter
from tests.once import made_once

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
    assert task.read_lexicon(lexicon) == [task.Example(":d", 0, strong=0), task.Example("good", 1, strong=1)]


@pytest.mark.cpu_only
def test_strength_is_another_task(data: task.Task) -> None:
    whole = [example for name in task.SHARES for example in getattr(data, name)]
    assert sum(example.strong for example in whole) / len(whole) == pytest.approx(0.5, abs=0.06)
    alike = sum(example.strong == example.label for example in whole) / len(whole)
    assert alike == pytest.approx(0.5, abs=0.06)


@pytest.mark.cpu_only
def test_batches_are_of_like_length_and_repeat_no_text(data: task.Task) -> None:
    lengths = torch.randint(3, 12, (300,), generator=torch.Generator().manual_seed(0))
    drawn = list(train.batches(lengths, 9, seed=0))
    assert [len(rows) for rows in drawn] == [train.BATCH_SIZE] * 9
    assert len(torch.cat(drawn).unique()) == 9 * train.BATCH_SIZE
    assert all(torch.equal(a, b) for a, b in zip(drawn, train.batches(lengths, 9, seed=0), strict=True))
    padding = sum(int((lengths[rows].max() - lengths[rows]).sum()) for rows in drawn)
    shuffled = torch.randperm(300, generator=torch.Generator().manual_seed(1)).split(train.BATCH_SIZE)[:9]
    assert padding < 0.5 * sum(int((lengths[rows].max() - lengths[rows]).sum()) for rows in shuffled)


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


@pytest.mark.thorough
@pytest.mark.parametrize("method", [method for method in methods.discover() if method.fused], ids=lambda m: m.name)
def test_both_models_start_alike_and_a_wrong_scale_is_seen(
    data: task.Task, device: torch.device, method: methods.Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fused layer that is off by a thousandth must not slip through the demo's bound."""
    monkeypatch.setattr(train, "BATCH_SIZE", 8)
    texts = Texts(data.train[:16], device)
    for error, agree in ((0.0, True), (1e-3, False)):
        pair = train.build_pair(method, 0, device)
        assert _put_off(pair["fused"], 1 + error) > 0
        runs = {label: train.start(label, model, method.learning_rate, 3) for label, model in pair.items()}
        train.train(list(runs.values()), texts, 3, 0, "test")
        assert checks.losses_agree(method.name, runs["fused"].losses, runs["unfused"].losses).passed is agree


@torch.no_grad()
def _put_off(model: torch.nn.Module, factor: float) -> int:
    """Multiply what the package's modules add to the encoder; return how many there are."""
    found = 0
    for module in model.modules():
        if isinstance(module, FusedLoRALinear):
            module.scaling = {name: scale * factor for name, scale in module.scaling.items()}
        elif isinstance(module, (SerialAdapter, ParallelAdapter)):
            module.scale *= factor
        elif isinstance(module, PromptEmbedding):
            module.weight *= factor
        elif isinstance(module, PrefixEncoder):
            module.mlp[-1].weight *= factor
        else:
            continue
        found += 1
    return found


def test_members_of_an_ensemble_learn_as_if_alone(data: task.Task, device: torch.device) -> None:
    batch = Texts(data.train[:8], device).take(torch.arange(8))
    for label, together in train.build_pair(prompt_ensemble.METHOD, 0, device).items():
        loss = train.forward_backward(together, batch)
        alone = []
        for member in range(prompt_ensemble.MEMBERS):
            model = train.build(prompt_tuning.put_fused, 1, device)
            prompts = together.encoder.prompts.prompts if label == "fused" else together.encoder.passes
            prompt = prompts[member] if label == "fused" else prompts[member].prompts
            with torch.no_grad():
                model.encoder.prompts.weight.copy_(prompt.weight)
                model.heads[0].load_state_dict(together.heads[member].state_dict())
            alone.append(train.forward_backward(model, batch))
            torch.testing.assert_close(prompt.weight.grad, model.encoder.prompts.weight.grad, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(together.heads[member].weight.grad, model.heads[0].weight.grad)
        torch.testing.assert_close(loss, torch.stack(alone).mean())


def test_members_vote(device: torch.device) -> None:
    """Each member is outvoted on one text, where it is surer than the two others together."""
    classes = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 1, 1]])
    outvoted = classes != torch.tensor([0, 1, 0])
    logits = torch.nn.functional.one_hot(classes, 2) * (1.0 + 8.0 * outvoted.unsqueeze(-1))
    for model in train.build_pair(prompt_ensemble.METHOD, 0, device).values():
        assert model.answers(logits.flatten(0, 1).to(device)).tolist() == [0, 1, 0]


def test_prompt_is_left_out_of_the_mean_and_padding_too() -> None:
    hidden = torch.arange(2 * 2 * 4.0).view(4, 4, 1)
    mask = torch.tensor([[1, 1], [1, 0]])
    assert mean_token(hidden, mask).flatten().tolist() == [2.5, 6.0, 10.5, 14.0]


@pytest.mark.thorough
def test_model_of_two_tasks_answers_as_two_models(data: task.Task, device: torch.device, tmp_path: Path) -> None:
    """And the check sees a switch that leaves an adapter where it was."""
    texts = Texts(data.test[:16], device)
    files = {}
    for seed, name in enumerate(("sentiment", "strength")):
        model = train.build(lora.put_fused, seed, device)
        with torch.no_grad():
            for value in model.trained().values():
                value.normal_(std=0.05)
        files[name] = tmp_path / f"{name}.pt"
        torch.save(dict(model.trained()), files[name])
    rows, found = switching.play(files, texts, seed=2)
    assert len(rows) == 3
    assert all(row.milliseconds > 0 for row in rows)
    assert len(found) == 2
    assert all(check.passed for check in found)

    set_adapter = FusedLoRALinear.set_adapter
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            FusedLoRALinear, "set_adapter", lambda self, name: len(self.scaling) > 2 or set_adapter(self, name)
        )
        _, found = switching.play(files, texts, seed=2)
    assert not all(check.passed for check in found)


@pytest.mark.cpu_only
def test_steps_that_are_given_come_first() -> None:
    def steps(*arguments: str) -> tuple[int, int]:
        options = finetune.parse(arguments)
        return options.steps, options.second_steps

    assert steps() == (finetune.STEPS, finetune.STEPS)
    assert steps("--quick") == (finetune.QUICK_STEPS, finetune.QUICK_SECOND_STEPS)
    assert steps("--quick", "--steps", "3") == steps("--steps", "3") == (3, 3)


@pytest.mark.cpu_only
def test_chosen_methods_are_found() -> None:
    assert [method.name for method in methods.discover(["prefix_tuning", "lora"])] == ["LoRA", "prefix tuning"]
    assert len(methods.names()) == len(methods.discover())


@pytest.mark.cpu_only
@pytest.mark.parametrize("seed", range(4))
def test_no_label_lies_on_a_point_or_on_a_label(seed: int) -> None:
    """Points in clusters, as methods with about the same parameters and accuracies are."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    draw = random.Random(seed)
    figure, axes = plt.subplots(figsize=(9.5, 4.5))
    points = [(10 ** draw.choice((3.0, 3.1, 5.5, 7.3)), draw.choice((0.8, 0.801, 0.83, 0.9))) for _ in range(12)]
    axes.plot(*zip(*points, strict=True), "o", markersize=10)
    axes.set_xscale("log")
    axes.set_xlim(200, 2e8)
    axes.set_ylim(0.75, 0.95)
    figure.draw_without_rendering()
    rival = ((2e8, 0.83), "linear probe 83 %")
    labels.place(axes, [rival, *((point, f"method number {n} 80 %") for n, point in enumerate(points))], points)
    renderer = figure.canvas.get_renderer()
    boxes = [text.get_window_extent(renderer) for text in axes.texts]
    drawn = [axes.transData.transform(point) for point in points]
    assert len(boxes) == 13
    assert not any(a.overlaps(b) for n, a in enumerate(boxes) for b in boxes[:n])
    assert not any(box.padded(2).contains(*point) for box in boxes for point in drawn)
    inside = axes.get_window_extent(renderer).padded(1)
    assert all(inside.contains(*corner) for box in boxes for corner in box.corners())
    plt.close(figure)


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    ("values", "longest"),
    [
        ([0.5, 0.9, 1.1, 7.0], 1.1),
        ([0.2, 0.3], 1.0),
        ([1.2, 1.3, 1.5], 1.5),
        ([], 1.0),
        ([30.0, 0.9, 0.8], 1.0),
        ([1.9, 2.0, 9.0], 2.0),
    ],
)
def test_an_outlier_sets_no_scale(values: list[float], longest: float) -> None:
    assert picture.longest_bar(values) == longest


def row(method: str, step: float | None, forward: float, **ratios: float) -> report.Row:
    return report.Row(method, 1, 0.5, 0.5, 0.8, milliseconds=step, forward_milliseconds=forward, **ratios)


@pytest.mark.cpu_only
def test_quotients_that_disagree_with_their_medians_are_explained() -> None:
    unfused = row("LoRA, PEFT", 10.0, 4.0)
    agrees = row("LoRA, fused", 8.0, 4.4, time_ratio=0.81, forward_ratio=1.09)
    assert report.notes([row("other, torch", 1.0, 1.0), unfused, agrees]) == []
    (note,) = report.notes([unfused, row("LoRA, fused", 8.0, 4.0, time_ratio=0.95, forward_ratio=1.0)])
    assert note.startswith("LoRA, fused: its quotient of a step is 0.95,") and "would give 0.80" in note
    (note,) = report.notes([unfused, row("LoRA, fused, merged", None, 4.04, forward_ratio=0.99)])
    assert note.startswith("LoRA, fused, merged: its quotient of a forward is 0.99,") and "would give 1.01" in note


@pytest.mark.cpu_only
def test_the_title_says_which_backend_ran() -> None:
    on_cpu = report.Report({"device": "CPU"}, backends={"lora_linear": "torch", "prompt_tuning": "torch"})
    assert on_cpu.title == "on CPU; fused runs by the torch backend, without a kernel"
    mixed = report.Report({"device": "H200"}, backends={"prompt_tuning": "torch", "lora_linear": "triton"})
    assert mixed.title == "on H200; lora_linear by triton, prompt_tuning by torch"
    assert report.Report({"device": "CPU"}).title == "on CPU; nothing fused"


@pytest.mark.thorough
def test_one_method_alone(data: task.Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not LoRA: no second task, and no switch."""
    few = task.Task(data.train[:32], data.validation[:8], data.test[:8])
    monkeypatch.setattr(task, "load_task", lambda: few)
    monkeypatch.setattr(train, "BATCH_SIZE", 8)
    monkeypatch.setattr(train, "FORWARD_REPETITIONS", 2)
    finetune.main(["--steps", "2", "--out", str(tmp_path), "--methods", "prompt_tuning"])
    numbers = json.loads((tmp_path / report.NUMBERS_FILE).read_text())
    assert [row["method"] for row in numbers["rows"]][2:] == ["prompt tuning, PEFT", "prompt tuning, fused"]
    assert not numbers["second_rows"] and not numbers["switch_rows"]
    assert "second task |" not in (tmp_path / report.TABLE_FILE).read_text()
    assert (tmp_path / report.PICTURE_FILE).exists()


@pytest.fixture(scope="module")
def short_run(data: task.Task) -> tuple[int, Path, dict]:
    """Run the whole program on a few texts, once for all workers; so few that it need not learn anything."""
    few = task.Task(data.train[:64], data.validation[:20], data.test[:24])

    def run(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(task, "load_task", lambda: few)
            patch.setattr(train, "BATCH_SIZE", 8)
            patch.setattr(train, "FORWARD_REPETITIONS", 2)
            patch.setattr(switching, "REPETITIONS", 2)
            status = finetune.main(["--steps", "3", "--out", str(folder), "--threads", "1"])
        (folder / "status").write_text(str(status))

    folder = made_once("demo", run)
    return int((folder / "status").read_text()), folder, json.loads((folder / report.NUMBERS_FILE).read_text())


def test_short_run_writes_its_files(short_run: tuple[int, Path, dict]) -> None:
    _, folder, _ = short_run
    assert (folder / report.PICTURE_FILE).read_bytes().startswith(b"\x89PNG")
    saved = torch.load(folder / "lora_adapter.pt", weights_only=True)
    assert sum(value.numel() for value in saved.values()) == 332_546


def test_table_holds_the_numbers_of_the_json_file(short_run: tuple[int, Path, dict]) -> None:
    _, folder, numbers = short_run
    lines = (folder / report.TABLE_FILE).read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")][1:]
    expected = 2 + sum(1 + (m.fused is not None) + (m.serving is not None) for m in methods.discover())
    assert len(numbers["rows"]) == expected
    # After them the second task's, and the ways to switch.
    assert len(rows) == expected + 1 + len(numbers["second_rows"]) + 1 + len(numbers["switch_rows"])
    for cells, row in zip(rows[:expected], numbers["rows"], strict=True):
        assert cells == list(report.Row(**row).cells())
        assert cells[0] == row["method"]
        assert cells[1] == ("-" if row["parameters"] is None else f"{row['parameters']:,}")
        assert float(cells[3]) == pytest.approx(row["test_loss"], abs=1e-4)
        assert float(cells[4].partition("%")[0]) == pytest.approx(100 * row["accuracy"], abs=0.01)
    fused = next(row for row in numbers["rows"] if row["method"] == "LoRA, fused")
    unfused = next(row for row in numbers["rows"] if row["method"] == "LoRA, PEFT")
    assert fused["memory_ratio"] == pytest.approx(fused["peak_bytes"] / unfused["peak_bytes"])
    assert fused["parameters"] == unfused["parameters"]
    last = numbers["curves"]["LoRA"]["fused"][-finetune.LAST_BATCHES :]
    assert fused["train_loss"] == pytest.approx(sum(last) / len(last))


def test_backends_are_those_that_ran(short_run: tuple[int, Path, dict], device: torch.device) -> None:
    _, folder, numbers = short_run
    operators = {"bottleneck_adapter", "lora_linear", "prefix_attention", "prompt_tuning"}
    assert numbers["backends"].keys() == operators
    if device.type == "cpu":
        assert set(numbers["backends"].values()) == {"torch"}
        assert "fused runs by the torch backend, without a kernel" in (folder / report.TABLE_FILE).read_text()


def test_short_run_status_is_that_of_its_checks(short_run: tuple[int, Path, dict]) -> None:
    status, _, numbers = short_run
    passed = [check["passed"] for check in numbers["checks"]]
    # Of each method: the guess beaten, a file read back; fused ones agree with unfused; what is served answers alike,
    # and what is undone. Of the second task: the guess, two switches.
    assert len(passed) == 3 + sum(
        2 + (m.fused is not None) + (m.serving is not None) + (m.serving is not None and m.serving.undo is not None)
        for m in methods.discover()
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
    monkeypatch.setattr(finetune, "switch", lambda *_: None)
    assert finetune.main(["--out", str(tmp_path)]) == 1
    assert "FAIL x: fused and unfused losses agree" in capsys.readouterr().err
    assert json.loads((tmp_path / report.NUMBERS_FILE).read_text())["passed"] is False
