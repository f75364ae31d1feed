"""``python -m benchmarks.end_to_end [--quick] [--out DIR]``: training steps of whole decoders, with and without us.

For each decoder and method four variants take turns on the same parameters: as the library has it ("unpatched"), that
under torch.compile ("compiled"), on this package's kernels ("patched"), and both. A step is forward, backward and
optimizer, launched as a user launches it, without a CUDA graph. A variant whose loss or gradient is not the unpatched
one's is recorded as failed, and not timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

# As in __main__: read when torch is loaded.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

import torch
from torch import Tensor, nn

import peft_kernels as pk
from benchmarks import decoders, harness, record, tables, timing
from benchmarks.decoders import DECODERS, METHODS, Step
from benchmarks.memory import peak_bytes
from benchmarks.roofline import roofline_us

NAME = "end_to_end"
REFERENCE = "unpatched"
VARIANTS = (REFERENCE, "compiled", "patched", "patched, compiled")

TARGET_US = {"cuda": 5e6, "cpu": 5e6}
LEAST_REPETITIONS = 5
QUICK_REPETITIONS = 3
WARM_UPS = 2
LEARNING_RATE = 1e-4

# Relative. Loss, a mean over many tokens: two orders of the same sums in float32; in half precision the roundings of
# single tokens average out. Gradient of everything that is trained, in the Euclidean norm: what the layers make of a
# rounding. Patched against unpatched, tiny, 4 layers, CPU, 2026-11-25: losses 0, 5e-5 and 6e-6, gradients 3e-7, 8e-3
# and 1e-3; and with one scale of 28 wrong by a hundredth, in float32, 1e-7 and 2e-4.
LOSS_BOUND = {"float32": 1e-6, "bfloat16": 2.0**-10, "float16": 2.0**-13}
GRADIENT_BOUND = {"float32": 1e-5, "bfloat16": 5e-2, "float16": 1e-2}


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to run the model: what is called, and in which context; or why it cannot."""

    name: str
    model: nn.Module | None
    why_not: str | None
    context: Callable[[], AbstractContextManager[object]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status is 75 if a budget ended it, else 1 if a variant failed or was wrong."""
    options = _parser().parse_args(arguments)
    if options.resume and options.out is None:
        raise SystemExit("--resume goes by the records in --out DIR")
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    session = harness.start_session(device, options.quick, options.commit, options.without)
    print(f"{session.header['device']['name']}, torch {session.header['versions']['torch']}", flush=True)
    failed = False
    jobs = steps(options, device)
    left = _left(jobs, session, options) if options.resume else jobs
    done = 0
    for step in harness.within_budget(left, options.budget_s):
        done += 1
        lines = measure(step, session, options.backend)
        failed |= any(line["status"] == "failed" for line in lines)
        print(f"\n{tables.label(dataclasses.asdict(step))}\n{table(lines)}", flush=True)
        if options.out is not None:
            record.append(_file(options.out, session, step.model), lines)
    if done < len(left):
        print(f"\nbudget spent: {len(left) - done} of {len(jobs)} steps left; --resume goes on with them")
        return harness.MORE
    return int(failed)


def _file(folder: Path, session: harness.Session, model: str) -> Path:
    """A folder down from the records of the families, which README's tables are made from."""
    return folder / session.device_slug / NAME / f"{model}.jsonl"


def _left(jobs: Sequence[Step], session: harness.Session, options: argparse.Namespace) -> list[Step]:
    """Leave out what was measured with this backend."""
    files = {_file(options.out, session, step.model) for step in jobs}
    lines = [line for file in sorted(files) if file.exists() for line in record.load(file)]
    ours = _provider("patched", options.backend)
    return harness.remaining(jobs, [line for line in lines if line["provider"] == ours], session)


def _provider(name: str, backend: str) -> str:
    """Name a variant in a record: ours by a forced backend too."""
    return f"{name} ({backend})" if name.startswith("patched") and backend != "auto" else name


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end", description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", choices=DECODERS, help="repeatable; CPU: tiny, GPU: the others")
    parser.add_argument("--method", action="append", choices=METHODS, help="repeatable; all if not given")
    parser.add_argument("--batch", type=int, help="texts in a step")
    parser.add_argument("--sequence", type=int, help="tokens of a text")
    parser.add_argument("--layers", type=int, help="fewer than the model has, where it does not fit")
    parser.add_argument("--size", type=int, default=16, help="rank, prefix length or bottleneck width")
    parser.add_argument("--dtype", choices=LOSS_BOUND, help="CPU: float32, GPU: bfloat16")
    parser.add_argument(
        "--backend", default="auto", choices=("auto", "torch", "triton", "cuda"), help="of this package"
    )
    parser.add_argument("--without", action="append", default=[], choices=VARIANTS[1:], help="repeatable")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, two layers")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"append records to DIR/<device>/{NAME}/<model>.jsonl")
    parser.add_argument("--resume", action="store_true", help="leave out what DIR has of these sources and versions")
    parser.add_argument("--budget-s", type=float, metavar="N", help="start no step that would end after N seconds")
    parser.add_argument("--commit", help="what to record as the commit where the tree is no git checkout")
    return parser


def steps(options: argparse.Namespace, device: torch.device) -> list[Step]:
    """Fill in what the options leave open: sizes that fit the device."""
    on_gpu = device.type == "cuda"
    models = options.model or ([name for name in DECODERS if name != "tiny"] if on_gpu else ["tiny"])
    found = []
    for model in models:
        layers = DECODERS[model].layers
        wanted = options.layers or (min(2, layers) if options.quick else layers)
        if not 1 <= wanted <= layers:
            raise SystemExit(f"--layers must be from 1 to {layers}, those of {model}, got {wanted}")
        for method in options.method or METHODS:
            found.append(
                Step(
                    model=model,
                    method=method,
                    batch=options.batch or 2,
                    sequence=options.sequence or (2048 if on_gpu else 128),
                    layers=wanted,
                    size=options.size,
                    dtype=options.dtype or ("bfloat16" if on_gpu else "float32"),
                )
            )
    return found


def measure(step: Step, session: harness.Session, backend: str = "auto") -> list[dict[str, Any]]:
    """Return a record for each variant.

    One that cannot run is recorded as skipped, one that raises something else or computes something else as failed;
    neither keeps the others from being timed.
    """
    device = session.device
    torch._dynamo.reset()
    model = decoders.build(step, device)
    generator = torch.Generator().manual_seed(0)
    shape = (step.batch, step.sequence)
    ids = torch.randint(DECODERS[step.model].vocabulary, shape, generator=generator).to(device)
    start = [parameter.detach().clone() for parameter in decoders.trained(model)]

    verdicts: dict[str, harness.Verdict] = {}
    runs: dict[str, Callable[[], object]] = {}
    expected: tuple[Tensor, Tensor] | None = None
    for variant in variants(model, backend):
        if variant.name in session.without:
            verdicts[variant.name] = harness.Verdict("skipped", "left out with --without", {})
            continue
        verdict, answer = _examine(variant, ids, expected, step.dtype)
        verdicts[variant.name] = verdict
        if variant.name == REFERENCE:
            expected = answer
        if verdict.status == "ok" and variant.model is not None:
            runs[variant.name] = training_step(variant, ids, decoders.trained(model))

    timings, peaks = _time_and_weigh(runs, session)
    with torch.no_grad():
        for parameter, value in zip(decoders.trained(model), start, strict=True):
            parameter.copy_(value)
    work = decoders.work(step, model)
    least_us = roofline_us(work, getattr(torch, step.dtype), session.ceilings)
    lines = []
    for name, verdict in verdicts.items():
        line = {
            **session.header,
            "family": NAME,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "problem": dataclasses.asdict(step),
            "provider": _provider(name, backend),
            "role": "ours" if name.startswith("patched") else "baseline",
            "mode": "both",
            "status": verdict.status,
            "reason": verdict.reason,
        }
        if verdict.status == "ok":
            fields = dataclasses.asdict(timings[name])
            line |= {"timing_note": fields.pop("note"), **fields, **dataclasses.asdict(work)}
            line |= {"roofline_us": least_us, "roofline_fraction": least_us / timings[name].median_us}
            line |= {"peak_memory_bytes": peaks[name], "error": dict(verdict.errors)}
        lines.append(line)
    return lines


def variants(model: nn.Module, backend: str) -> list[Variant]:
    """Make the four, which share every parameter."""
    ours, why_not = decoders.patched(model)
    context = nullcontext if backend == "auto" else lambda: pk.use_backend(backend)
    return [
        Variant(REFERENCE, model, None, nullcontext),
        Variant("compiled", torch.compile(decoders.share(model)), None, nullcontext),
        Variant("patched", ours, why_not, context),
        Variant("patched, compiled", None if ours is None else torch.compile(decoders.share(ours)), why_not, context),
    ]


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Predict every token but the first from those before it."""
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss


def training_step(variant: Variant, ids: Tensor, parameters: Sequence[nn.Parameter]) -> Callable[[], None]:
    """Make a function that trains once, as a user would, and leaves no gradients behind."""
    model = variant.model
    if model is None:
        raise ValueError(f"{variant.name}: {variant.why_not}")
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)

    def run() -> None:
        with variant.context():
            loss_of(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def _examine(
    variant: Variant, ids: Tensor, expected: tuple[Tensor, Tensor] | None, dtype: str
) -> tuple[harness.Verdict, tuple[Tensor, Tensor] | None]:
    """Compare a variant's loss and gradient with the unpatched ones, of which it returns the first."""
    if variant.model is None:
        return harness.Verdict("skipped", variant.why_not, {}), None
    try:
        with variant.context():
            loss = loss_of(variant.model, ids)
            gradients = torch.autograd.grad(loss, decoders.trained(variant.model))
    except (pk.UnsupportedError, torch.OutOfMemoryError) as error:
        return harness.Verdict("skipped", _text(error), {}), None
    except Exception as error:  # one broken variant must not cost the others' measurements; the run's status tells
        return harness.Verdict("failed", _text(error), {}), None
    answer = loss.detach().double(), torch.cat([gradient.flatten().double() for gradient in gradients])
    if expected is None:
        if variant.name != REFERENCE:
            return harness.Verdict("failed", "there is no unpatched result to compare with", {}), None
        return harness.Verdict("ok", None, {"loss": None, "gradient": None}), answer
    errors = {
        name: ((mine - theirs).norm() / theirs.norm()).item()
        for name, mine, theirs in zip(("loss", "gradient"), answer, expected, strict=True)
    }
    # Written so that nan, which compares false with everything, is a failure.
    if not (errors["loss"] <= LOSS_BOUND[dtype] and errors["gradient"] <= GRADIENT_BOUND[dtype]):
        return harness.Verdict("failed", f"wrong result: relative differences {errors}", {}), None
    return harness.Verdict("ok", None, errors), answer


def _time_and_weigh(
    runs: Mapping[str, Callable[[], object]], session: harness.Session
) -> tuple[dict[str, timing.Timing], dict[str, int]]:
    on_gpu = session.device.type == "cuda"
    clock: timing.Clock = timing.EventClock() if on_gpu else timing.HostClock()
    kind = "events" if on_gpu else "host"
    runners = {name: timing.Runner(run, calls=1, timing=kind) for name, run in runs.items()}
    round_us = 0.0
    peaks = {}
    for name, run in runs.items():
        for _ in range(WARM_UPS):
            run()
        marks = clock.mark(), run(), clock.mark()
        clock.finish()
        round_us += clock.elapsed_us(marks[0], marks[2])
        peaks[name] = peak_bytes(run, session.device)
    repetitions = (
        QUICK_REPETITIONS
        if session.quick
        else timing.repetition_count(round_us, TARGET_US[session.device.type], LEAST_REPETITIONS, most=50)
    )
    samples = timing.interleave(runners, repetitions, clock)
    return {name: timing.summarize(runners[name], samples[name]) for name in runs}, peaks


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Lay out one step's records: tokens per second, memory above the weights, and both against the unpatched model."""
    reference = lines[0]
    rows = []
    for line in lines:
        if line["status"] != "ok":
            rows.append([line["provider"], "-", "-", "-", f"{line['status']}: {line['reason']}"])
            continue
        tokens = line["problem"]["batch"] * line["problem"]["sequence"]
        compared = "-"
        if line is not reference and reference["status"] == "ok":
            memory = line["peak_memory_bytes"] / reference["peak_memory_bytes"]
            compared = f"time {line['median_us'] / reference['median_us']:.2f}, memory {memory:.2f}"
        rows.append(
            [
                line["provider"],
                f"{line['median_us'] / 1e3:.1f}",
                f"{tokens / line['median_us'] * 1e6:,.0f}",
                f"{line['peak_memory_bytes'] / 2**20:.1f} MiB",
                compared,
            ]
        )
    return tables.aligned(("variant", "ms", "tokens/s", "peak memory", f"as a part of {REFERENCE}"), rows)


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


if __name__ == "__main__":
    sys.exit(main())
