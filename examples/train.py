"""Training: fused and unfused model take turns on every batch, so that loss and time can be compared step by step."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.memory import peak_bytes
from benchmarks.timing import HostClock, Runner, interleave
from examples.methods import Method, PutOn
from examples.model import Classifier, Texts, load_encoder

BATCH_SIZE = 32
# Texts for so many batches are drawn at once and sorted into them by length: a quarter less of a batch is padding.
SORTED_BATCHES = 4
WARM_UP_SHARE = 0.1
# Steps in which caches fill and kernels are looked up or compiled; they are trained on, but not timed.
UNTIMED_STEPS = 5
FORWARD_REPETITIONS = 15


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
    unfused.heads.load_state_dict(fused.heads.state_dict())
    return {"fused": fused, "unfused": unfused}


def start(label: str, model: Classifier, learning_rate: float, steps: int) -> Run:
    """Give a model its optimizer, and a rate that rises linearly and falls linearly to zero."""
    rise = max(1, round(WARM_UP_SHARE * steps))
    # fused: else full fine-tuning, with its 22 million weights, waits for the optimizer about as long as for the model.
    optimizer = torch.optim.AdamW(model.trained().values(), lr=learning_rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rise, (steps - step) / max(1, steps - rise))
    )
    return Run(label, model, optimizer, schedule)


def batches(lengths: Tensor, steps: int, seed: int) -> Iterator[Tensor]:
    """Draw the rows of each batch, texts of like length: a new order in each epoch, a smaller batch left out."""
    generator = torch.Generator().manual_seed(seed)
    count, drawn = len(lengths), 0
    while drawn < steps:
        for rows in torch.randperm(count, generator=generator).split(SORTED_BATCHES * BATCH_SIZE):
            parts = rows[torch.argsort(lengths[rows], stable=True)].split(BATCH_SIZE)
            for part in torch.randperm(len(parts), generator=generator).tolist():
                if drawn < steps and len(parts[part]) == min(BATCH_SIZE, count):
                    yield parts[part]
                    drawn += 1


def train(runs: Sequence[Run], texts: Texts, steps: int, seed: int, title: str) -> None:
    """Train all runs on the same batches in turn; who goes first changes with every step."""
    from tqdm import tqdm

    for run in runs:
        run.model.train()
    progress = tqdm(batches(texts.lengths, steps, seed), total=steps, desc=title, unit="step", dynamic_ncols=True)
    for step, rows in enumerate(progress):
        batch = texts.take(rows)
        for run in runs if step % 2 == 0 else reversed(runs):
            _step(run, batch)
        progress.set_postfix({run.label: f"{run.losses[-1]:.4f}" for run in runs})


def _step(run: Run, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    device = batch[0].device
    wait(device)
    begin = time.perf_counter()
    loss = forward_backward(run.model, batch)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    wait(device)
    run.milliseconds.append(1e3 * (time.perf_counter() - begin))
    run.schedule.step()
    run.losses.append(loss.item())


def forward_backward(model: Classifier, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Return a batch's cross-entropy, the mean over members too, with gradients in the parameters.

    What is differentiated is the sum over the members: each has the gradient that it would have alone.
    """
    ids, mask, labels = batch
    total = torch.zeros((), device=ids.device)
    for logits in model.passes(ids, mask):
        members = len(logits) // len(labels)
        loss = members * F.cross_entropy(logits, labels.repeat(members))
        loss.backward()
        total += loss.detach()
    return total / model.members


def wait(device: torch.device) -> None:
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


def forward_milliseconds(models: Mapping[str, Classifier], texts: Texts) -> dict[str, list[float]]:
    """Let models that are no longer trained classify the same batch in turn, some times over."""
    ids, mask, _ = texts.take(torch.arange(min(BATCH_SIZE, len(texts))))

    def turn(model: Classifier) -> Callable[[], None]:
        @torch.no_grad()
        def run() -> None:
            model(ids, mask)
            wait(ids.device)

        model.eval()
        run()
        return run

    runners = {name: Runner(turn(model), calls=1, timing="host") for name, model in models.items()}
    taken = interleave(runners, FORWARD_REPETITIONS, HostClock())
    return {name: [microseconds / 1e3 for microseconds in times] for name, times in taken.items()}


def paired_ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """Return the median over the turns of one time as a part of the other's in the same turn."""
    return statistics.median(mine / theirs for mine, theirs in zip(times, others, strict=True))
