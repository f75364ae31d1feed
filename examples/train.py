"""Training: fused and unfused model take turns on every batch, so that loss and time can be compared step by step."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.memory import peak_bytes
from examples.methods import Method, PutOn
from examples.model import Classifier, Texts, load_encoder

BATCH_SIZE = 32
WARM_UP_SHARE = 0.1
# Steps in which caches fill and kernels are looked up or compiled; they are trained on, but not timed.
UNTIMED_STEPS = 5


@dataclass
class Run:
    """One model on its way: what it is, and what was measured at each step."""

    label: str
    model: Classifier
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    losses: list[float] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)


def build(put_on: PutOn, seed: int, device: torch.device) -> Classifier:
    """Load a fresh encoder, put a method on it and draw the start values of all that is trained."""
    encoder = load_encoder(device)
    torch.manual_seed(seed)
    return Classifier(put_on(encoder))


def build_pair(method: Method, seed: int, device: torch.device) -> dict[str, Classifier]:
    """Build the unfused model and, where there is one, the fused model with the very same start values."""
    unfused = build(method.unfused, seed, device)
    if method.fused is None:
        return {"unfused": unfused}
    fused = build(method.fused, seed, device)
    if method.copy_start is None:
        raise ValueError(f"{method.name}: a method with a fused form needs copy_start")
    method.copy_start(fused.encoder, unfused.encoder)
    unfused.head.load_state_dict(fused.head.state_dict())
    return {"fused": fused, "unfused": unfused}


def start(label: str, model: Classifier, learning_rate: float, steps: int) -> Run:
    """Give a model its optimizer, and a rate that rises linearly and falls linearly to zero."""
    rise = max(1, round(WARM_UP_SHARE * steps))
    optimizer = torch.optim.AdamW(model.trained().values(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rise, (steps - step) / max(1, steps - rise))
    )
    return Run(label, model, optimizer, schedule)


def batches(count: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Draw the rows of each batch: a new order in each epoch, its last, smaller batch left out."""
    generator = torch.Generator().manual_seed(seed)
    drawn = 0
    while drawn < steps:
        for rows in torch.randperm(count, generator=generator).split(BATCH_SIZE):
            if drawn < steps and len(rows) == min(BATCH_SIZE, count):
                yield rows
                drawn += 1


def train(runs: Sequence[Run], texts: Texts, steps: int, seed: int, title: str) -> None:
    """Train all runs on the same batches in turn; who goes first changes with every step."""
    from tqdm import tqdm

    for run in runs:
        run.model.train()
    progress = tqdm(batches(len(texts), steps, seed), total=steps, desc=title, unit="step", dynamic_ncols=True)
    for step, rows in enumerate(progress):
        batch = texts.take(rows)
        for run in runs if step % 2 == 0 else reversed(runs):
            _step(run, batch)
        progress.set_postfix({run.label: f"{run.losses[-1]:.4f}" for run in runs})


def _step(run: Run, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    device = batch[0].device
    _wait(device)
    begin = time.perf_counter()
    loss = forward_backward(run.model, batch)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    _wait(device)
    run.milliseconds.append(1e3 * (time.perf_counter() - begin))
    run.schedule.step()
    run.losses.append(loss.item())


def forward_backward(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Return a batch's mean cross-entropy, with its gradients in the parameters."""
    ids, mask, labels = batch
    loss = F.cross_entropy(model(ids, mask), labels)
    loss.backward()
    return loss.detach()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_of_step(run: Run, texts: Texts) -> int:
    """Measure the peak memory of one forward and backward pass, gradients included, on the longest texts."""
    batch = texts.take(torch.argsort(texts.lengths, descending=True, stable=True)[:BATCH_SIZE])
    # The profiler that counts allocations reports on itself below this level.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    run.model.train()
    run.optimizer.zero_grad(set_to_none=True)
    peak = peak_bytes(lambda: forward_backward(run.model, batch), batch[0].device)
    run.optimizer.zero_grad(set_to_none=True)
    return peak


def timed(run: Run) -> list[float]:
    """Leave out the steps in which everything happens for the first time, unless there are no others."""
    return run.milliseconds[UNTIMED_STEPS:] or run.milliseconds


def paired_ratio(run: Run, other: Run) -> float:
    """Return the median over the batches of one run's time as a part of the other's."""
    return statistics.median(mine / theirs for mine, theirs in zip(timed(run), timed(other), strict=True))
