"""Fine-tune a pre-trained model on real data, fused and unfused side by side: python -m examples.finetune

The first act, for each method: both models start from the same values and take turns on the same batches; then the
held-out words are classified, also by what is served in the model's place, and by what a file brings back. The
second, of LoRA: one model learns a second task, and is switched between the two. Then everything is checked and
written down. It ends with exit status 1 if the curves part, if fine-tuning does not beat what needs none (in an
epoch; earlier it has to beat guessing), or if a merge, a file or a switch changes an answer.
"""

from __future__ import annotations

import argparse
import copy
import os
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import peft_kernels
from examples import baselines, checks, methods, report, switching, task, train
from examples.baselines import Baseline, accuracy
from examples.methods import Method
from examples.model import Classifier, Texts, load_encoder, predict
from examples.report import Report, Row

# One epoch, its smaller last batch left out.
STEPS = 163
# 145 s of one core's time, measured while others used the machine (2026-11-30). Much of a short run is evaluation, so
# it has fewer texts too, a quarter, and sees half of these. The second task is harder, and needs each of them once to
# be better than a guess.
QUICK_STEPS = 20
QUICK_SECOND_STEPS = 33
QUICK_SHARE = 0.25
# The training loss of the table is the mean over this many last batches: one batch's says little.
LAST_BATCHES = 50
ADAPTER_FILE = "{method}_adapter.pt"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo and return the exit status."""
    options = parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)

    data = task.first(task.load_task(), QUICK_SHARE if options.quick else 1.0)
    texts = {name: Texts(getattr(data, name), device) for name in task.SHARES}
    result = Report(facts(options, data, device))
    print("\n".join(f"{name}: {report.plain(value)}" for name, value in result.facts.items()))

    rivals = beat_these(texts, device)
    result.rows += [row_of(rival) for rival in rivals]
    # What was fitted until it converged is no measure of a fraction of an epoch.
    demanded = len(rivals) if options.steps >= STEPS else 1
    chosen = methods.discover(options.methods)
    for method in chosen:
        play(method, texts, rivals[:demanded], result, options)
    if switching.METHOD in chosen:
        second = {name: Texts(getattr(data, name), device, "strong") for name in task.SHARES}
        rivals = beat_these(second, device)
        result.second_rows += [row_of(rival) for rival in rivals]
        switch(second, rivals[:demanded], result, options)

    paths = report.write(result, options.out)
    print("\n" + "\n\n".join([result.title, *report.tables(result), *report.notes(result.rows)]) + "\n")
    print("\n".join(map(str, result.checks)))
    print(f"\nwritten: {', '.join(map(str, paths))}")
    if not result.passed:
        failed = [str(check) for check in result.checks if not check.passed]
        print("\n".join(["\nThe demo failed:", *failed]), file=sys.stderr)
    return 0 if result.passed else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.finetune", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_STEPS} steps, a quarter of the texts")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=methods.names(),
        metavar="METHOD",
        help=f"of {', '.join(methods.names())}; else all",
    )
    parser.add_argument("--steps", type=int, help="steps of training, whatever --quick says")
    parser.add_argument("--seed", type=int, default=0, help="of start values and batches; the split is always the same")
    parser.add_argument("--out", type=Path, default=Path("demo_results"), help="folder for the results")
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="on a CPU; with more than one, a busy machine makes the times meaningless",
    )
    options = parser.parse_args(arguments)
    given = options.steps
    if given is None:
        options.steps = QUICK_STEPS if options.quick else STEPS
    options.second_steps = QUICK_SECOND_STEPS if options.quick and given is None else options.steps
    if options.steps < 1 or options.threads < 1:
        parser.error("--steps and --threads must be at least 1")
    return options


def facts(options: argparse.Namespace, data: task.Task, device: torch.device) -> dict[str, object]:
    """Collect what somebody who reads the results later has to know."""
    on_cpu = device.type == "cpu"
    return {
        "device": f"CPU, threads: {torch.get_num_threads()}" if on_cpu else torch.cuda.get_device_name(device),
        "versions": {"torch": torch.__version__, "peft_kernels": peft_kernels.__version__},
        "backend": os.environ.get("PEFT_KERNELS_BACKEND", "auto") + (" (on a CPU: torch, no kernel)" if on_cpu else ""),
        "model": "all-MiniLM-L6-v2, float32",
        "task": "sign of the mean sentiment rating in the VADER lexicon",
        "second task": f"whether that mean, without its sign, is above {task.STRONG_ABOVE}",
        "texts": {name: len(getattr(data, name)) for name in task.SHARES},
        "steps": options.steps,
        "steps of the second task": options.second_steps,
        "batch": train.BATCH_SIZE,
        "seed": options.seed,
    }


def beat_these(texts: dict[str, Texts], device: torch.device) -> list[Baseline]:
    """Evaluate what needs no fine-tuning."""
    probe = baselines.linear_probe(load_encoder(device), texts["train"], texts["validation"], texts["test"])
    return [baselines.majority(texts["train"], texts["test"]), probe]


def row_of(rival: Baseline) -> Row:
    """Put a baseline into the table."""
    return Row(rival.name, rival.parameters, rival.train_loss, rival.loss, rival.accuracy)


def play(
    method: Method,
    texts: dict[str, Texts],
    rivals: Sequence[Baseline],
    result: Report,
    options: argparse.Namespace,
) -> None:
    """Train a method's models, and add rows, curves and checks to the report."""
    device = texts["train"].labels.device
    pair = train.build_pair(method, options.seed, device)
    runs = {label: train.start(label, model, method.learning_rate, options.steps) for label, model in pair.items()}
    train.train(list(runs.values()), texts["train"], options.steps, options.seed, method.name)
    peaks = {label: train.peak_of_step(run, texts["train"]) for label, run in runs.items()}
    models = pair | served(method, pair)
    logits = {label: predict(model, texts["test"]) for label, model in models.items()}

    if "fused" in pair:
        result.backends |= backends_of(pair["fused"], texts["train"])
    result.facts[method.name] = {**method.settings, "learning rate": method.learning_rate}
    result.curves[method.name] = {label: run.losses for label, run in runs.items()}
    result.rows += rows_of(method, models, runs, peaks, logits, texts["test"])
    if "fused" in runs:
        result.checks.append(checks.losses_agree(method.name, runs["fused"].losses, runs["unfused"].losses))
    best = "fused" if "fused" in runs else "unfused"
    reached = accuracy(pair[best].answers(logits[best]), texts["test"].labels)
    result.checks += [checks.beats(f"{method.name}, {best}", reached, rival.name, rival.accuracy) for rival in rivals]
    result.checks += after_training(method, best, models, logits, texts["test"], options)


def backends_of(model: Classifier, texts: Texts) -> dict[str, str]:
    """Ask which backend runs each operation of this package in a training step."""
    ids, mask, _ = texts.take(torch.arange(min(train.BATCH_SIZE, len(texts))))
    model.train()
    return dict(re.findall(r"^(\w+): (torch|triton|cuda)\b", peft_kernels.explain(model, ids, mask), re.MULTILINE))


def served(method: Method, pair: dict[str, Classifier]) -> dict[str, Classifier]:
    """Turn a copy of the fused model into what would be served, where that is something else."""
    if method.serving is None:
        return {}
    model = copy.deepcopy(pair["fused"])
    method.serving.change(model.encoder)
    return {f"fused, {method.serving.name}": model}


def rows_of(
    method: Method,
    models: dict[str, Classifier],
    runs: dict[str, train.Run],
    peaks: dict[str, int],
    logits: dict[str, Tensor],
    test: Texts,
) -> list[Row]:
    """Put a method's models into the table, the unfused one first: it is what the others are measured against."""
    forward = train.forward_milliseconds(models, test)
    rows = []
    for label in ("unfused", *(label for label in models if label != "unfused")):
        model, run, theirs = models[label], runs.get(label), label == "unfused"
        # What can be undone still holds what was trained, but does not use it.
        undoable = run is None and method.serving is not None and method.serving.undo is not None
        ratios = {"forward_ratio": train.paired_ratio(forward[label], forward["unfused"])}
        if run is not None:
            ratios["time_ratio"] = train.paired_ratio(train.timed(run), train.timed(runs["unfused"]))
            ratios["memory_ratio"] = peaks[label] / peaks["unfused"]
        rows.append(
            Row(
                method=f"{method.name}, {method.unfused_by if theirs else label}",
                parameters=None if undoable else sum(value.numel() for value in model.trained().values()),
                train_loss=None if run is None else statistics.fmean(run.losses[-LAST_BATCHES:]),
                test_loss=F.cross_entropy(logits[label], test.labels.repeat(model.members)).item(),
                accuracy=accuracy(model.answers(logits[label]), test.labels),
                member_accuracy=None
                if model.members == 1
                else accuracy(logits[label].argmax(dim=1), test.labels.repeat(model.members)),
                milliseconds=None if run is None else statistics.median(train.timed(run)),
                forward_milliseconds=statistics.median(forward[label]),
                peak_bytes=peaks.get(label),
                **({} if theirs else ratios),
            )
        )
    return rows


def after_training(
    method: Method,
    label: str,
    models: dict[str, Classifier],
    logits: dict[str, Tensor],
    test: Texts,
    options: argparse.Namespace,
) -> list[checks.Check]:
    """Save what was trained and read it back, undo what was done for serving, and compare the answers each time."""
    path = adapter_file(options.out, method.name)
    torch.save({name: value.detach() for name, value in models[label].trained().items()}, path)
    put_on = method.fused if label == "fused" and method.fused is not None else method.unfused
    # Another seed: what the file does not hold must not be right by chance.
    fresh = train.build(put_on, options.seed + 1, test.labels.device)
    fresh.load_trained(torch.load(path, map_location=test.labels.device, weights_only=True))
    title = f"{method.name}: saved, and read into a fresh model"
    found = [checks.same_bits(title, logits[label], predict(fresh, test))]
    if method.serving is not None:
        served_as = f"fused, {method.serving.name}"
        same = checks.same_bits if method.serving.exact else checks.same_predictions
        found.append(same(f"{method.name}: {method.serving.name}", logits["fused"], logits[served_as]))
        if method.serving.undo is not None:
            method.serving.undo(models[served_as].encoder)
            undone = predict(models[served_as], test)
            found.append(checks.same_bits(f"{method.name}: no longer {method.serving.name}", logits["fused"], undone))
    return found


def adapter_file(folder: Path, name: str) -> Path:
    """Name the file for what a method, or a method on another task, has trained."""
    return folder / ADAPTER_FILE.format(method=name.lower().replace(" ", "_").replace("-", "_"))


def switch(texts: dict[str, Texts], rivals: Sequence[Baseline], result: Report, options: argparse.Namespace) -> None:
    """Train LoRA on the second task, then switch one model between the two, and add what that says to the report."""
    name = f"{switching.METHOD.name} strength"
    run = switching.learn(texts["train"], options.second_steps, options.seed)
    logits = predict(run.model, texts["test"])
    reached = accuracy(run.model.answers(logits), texts["test"].labels)
    result.second_rows.append(
        Row(
            method=f"{switching.METHOD.name}, fused",
            parameters=sum(value.numel() for value in run.model.trained().values()),
            train_loss=statistics.fmean(run.losses[-LAST_BATCHES:]),
            test_loss=F.cross_entropy(logits, texts["test"].labels).item(),
            accuracy=reached,
        )
    )
    result.checks += [checks.beats(f"{name}, fused", reached, rival.name, rival.accuracy) for rival in rivals]
    files = {
        "sentiment": adapter_file(options.out, switching.METHOD.name),
        "strength": adapter_file(options.out, name),
    }
    torch.save({key: value.detach() for key, value in run.model.trained().items()}, files["strength"])
    result.switch_rows, found = switching.play(files, texts["test"], options.seed)
    result.checks += found


if __name__ == "__main__":
    raise SystemExit(main())
