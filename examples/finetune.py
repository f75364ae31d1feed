"""Fine-tune a pre-trained model on real data, fused and unfused side by side: python -m examples.finetune

The acts, for each method: both models start from the same values and take turns on the same batches; then the
held-out words are classified, merged and read back; then everything is checked and written down. It ends with exit
status 1 if the curves part, if fine-tuning does not beat what needs none, or if a merge or a file changes an answer.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

import peft_kernels
from examples import baselines, checks, methods, report, task, train
from examples.baselines import Baseline, accuracy
from examples.methods import Method
from examples.model import Classifier, Texts, load_encoder, predict
from examples.report import Report, Row

# Two epochs and one, the smaller last batch of each left out; a third did nothing for the validation split.
STEPS = 326
QUICK_STEPS = 163
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

    data = task.load_task()
    texts = {name: Texts(getattr(data, name), device) for name in task.SHARES}
    result = Report(facts(options, data, device))
    print("\n".join(f"{name}: {report.plain(value)}" for name, value in result.facts.items()))

    rivals = beat_these(texts, device)
    result.rows += [row_of(rival) for rival in rivals]
    for method in methods.discover():
        play(method, texts, rivals, result, options, device)

    paths = report.write(result, options.out)
    print(f"\n{report.table(result.rows)}\n")
    print("\n".join(map(str, result.checks)))
    print(f"\nwritten: {', '.join(map(str, paths))}")
    if not result.passed:
        failed = [str(check) for check in result.checks if not check.passed]
        print("\n".join(["\nThe demo failed:", *failed]), file=sys.stderr)
    return 0 if result.passed else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.finetune", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_STEPS} steps instead of {STEPS}")
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
    if options.steps is None:
        options.steps = QUICK_STEPS if options.quick else STEPS
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
        "texts": {name: len(getattr(data, name)) for name in task.SHARES},
        "steps": options.steps,
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
    device: torch.device,
) -> None:
    """Train a method's models, and add rows, curves and checks to the report."""
    pair = train.build_pair(method, options.seed, device)
    runs = {label: train.start(label, model, method.learning_rate, options.steps) for label, model in pair.items()}
    train.train(list(runs.values()), texts["train"], options.steps, options.seed, method.name)
    logits = {label: predict(model, texts["test"]) for label, model in pair.items()}

    result.facts[method.name] = {**method.settings, "learning rate": method.learning_rate}
    result.curves[method.name] = {label: run.losses for label, run in runs.items()}
    result.rows += rows_of(method, runs, logits, texts)
    if "fused" in runs:
        result.checks.append(checks.losses_agree(method.name, runs["fused"].losses, runs["unfused"].losses))
    best = "fused" if "fused" in runs else "unfused"
    reached = accuracy(logits[best], texts["test"].labels)
    result.checks += [checks.beats(f"{method.name}, {best}", reached, rival.name, rival.accuracy) for rival in rivals]
    result.checks += after_training(method, best, pair[best], logits[best], texts["test"], options)


def rows_of(
    method: Method, runs: dict[str, train.Run], logits: dict[str, torch.Tensor], texts: dict[str, Texts]
) -> list[Row]:
    """Put a method's runs into the table, the unfused one first: it is what the other is measured against."""
    peaks = {label: train.peak_of_step(run, texts["train"]) for label, run in runs.items()}
    labels = texts["test"].labels
    rows = []
    for label in sorted(runs, reverse=True):
        run, fused = runs[label], label == "fused"
        rows.append(
            Row(
                method=f"{method.name}, {'fused' if fused else method.unfused_by}",
                parameters=sum(parameter.numel() for parameter in run.model.trained().values()),
                train_loss=statistics.fmean(run.losses[-LAST_BATCHES:]),
                test_loss=F.cross_entropy(logits[label], labels).item(),
                accuracy=accuracy(logits[label], labels),
                milliseconds=statistics.median(train.timed(run)),
                peak_bytes=peaks[label],
                time_ratio=train.paired_ratio(run, runs["unfused"]) if fused else None,
                memory_ratio=peaks[label] / peaks["unfused"] if fused else None,
            )
        )
    return rows


def after_training(
    method: Method,
    label: str,
    model: Classifier,
    logits: torch.Tensor,
    test: Texts,
    options: argparse.Namespace,
) -> list[checks.Check]:
    """Merge, unmerge, save and read back, and compare the answers each time."""
    found = []
    if method.merge is not None and method.unmerge is not None:
        method.merge(model.encoder)
        found.append(checks.same_predictions(f"{method.name}: merged", logits, predict(model, test)))
        method.unmerge(model.encoder)
        found.append(checks.same_bits(f"{method.name}: unmerged", logits, predict(model, test)))
    path = options.out / ADAPTER_FILE.format(method=method.name.lower().replace(" ", "_"))
    torch.save({name: value.detach() for name, value in model.trained().items()}, path)
    put_on = method.fused if label == "fused" and method.fused is not None else method.unfused
    # Another seed: what the file does not hold must not be right by chance.
    fresh = train.build(put_on, options.seed + 1, test.labels.device)
    fresh.load_trained(torch.load(path, map_location=test.labels.device, weights_only=True))
    found.append(checks.same_bits(f"{method.name}: saved, and read into a fresh model", logits, predict(fresh, test)))
    return found


if __name__ == "__main__":
    raise SystemExit(main())
