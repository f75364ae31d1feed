"""Two tasks, one model: an adapter and a linear layer for each, and a switch between them that moves no weight."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.timing import HostClock, Runner, interleave
from examples import checks, train
from examples.methods import lora
from examples.model import Classifier, Texts, load_encoder, predict

METHOD = lora.METHOD
REPETITIONS = 7
# As FusedLoRALinear calls the adapter that it was made with, whose values a file holds.
_DEFAULT = "default"


@dataclass(frozen=True)
class SwitchRow:
    """A way to have the other task's model, and the median time that it takes."""

    way: str
    milliseconds: float


class TwoTasks(nn.Module):
    """An encoder with an adapter, and a linear layer, for each of several tasks.

    Args:
        files: what ``Classifier.trained`` held for each task after training.
        device: of everything.
    """

    def __init__(self, files: Mapping[str, Path], device: torch.device) -> None:
        super().__init__()
        self.classifier = Classifier(lora.put_fused(load_encoder(device)))
        self.heads = nn.ModuleDict()
        for task, file in files.items():
            values = torch.load(file, map_location=device, weights_only=True)
            self.heads[task] = nn.ModuleList(nn.Linear(*head.weight.T.shape, device=device) for head in self._heads)
            for _, layer in lora.fused_layers(self.classifier.encoder):
                layer.add_adapter(task, lora.RANK, lora.ALPHA)
            self.switch(task)
            self._load(task, values)

    @property
    def _heads(self) -> nn.ModuleList:
        return self.classifier.heads

    def switch(self, task: str) -> None:
        """Make a task's adapter and linear layer the ones that are used; nothing is copied."""
        for _, layer in lora.fused_layers(self.classifier.encoder):
            layer.set_adapter(task)
        self.classifier.heads = self.heads[task]

    @torch.no_grad()
    def _load(self, task: str, values: Mapping[str, Tensor]) -> None:
        mine = dict(self.classifier.named_parameters())
        for name, value in values.items():
            mine[name.replace(f".{_DEFAULT}", f".{task}")].copy_(value)


def learn(texts: Texts, steps: int, seed: int) -> train.Run:
    """Train LoRA, fused, on other labels, with what was chosen for the first ones."""
    if METHOD.fused is None:
        raise ValueError(f"{METHOD.name} has no fused form")
    model = train.build(METHOD.fused, seed, texts.labels.device)
    run = train.start("fused", model, METHOD.learning_rate, steps)
    train.train([run], texts, steps, seed, f"{METHOD.name}, second task")
    return run


def play(files: Mapping[str, Path], test: Texts, seed: int) -> tuple[list[SwitchRow], list[checks.Check]]:
    """Switch back and forth, compare with models that were built for one task alone, and time it."""
    device = test.labels.device
    expected = {task: predict(_built_anew(file, seed + 1, device), test) for task, file in files.items()}
    tasks = TwoTasks(files, device)
    got: dict[str, list[Tensor]] = {task: [] for task in files}
    for task in (*files, *files):
        tasks.switch(task)
        got[task].append(predict(tasks.classifier, test))
    found = [
        checks.same_bits(
            f"switched to {task}, twice: as a model built for it", expected[task].repeat(2, 1), torch.cat(got[task])
        )
        for task in files
    ]
    return _timed(tasks, files, seed, device), found


def _built_anew(file: Path, seed: int, device: torch.device) -> Classifier:
    model = train.build(lora.put_fused, seed, device)
    model.load_trained(torch.load(file, map_location=device, weights_only=True))
    return model


def _timed(tasks: TwoTasks, files: Mapping[str, Path], seed: int, device: torch.device) -> list[SwitchRow]:
    one = _built_anew(next(iter(files.values())), seed, device)
    size = next(iter(files.values())).stat().st_size / 2**20
    layers = sum(1 for _ in lora.fused_layers(one.encoder))
    ways: dict[str, Callable[[str], object]] = {
        f"switch the {layers} layers of the model in memory": tasks.switch,
        f"read the adapter's file, {size:.1f} MiB, into the model": lambda task: one.load_trained(
            torch.load(files[task], map_location=device, weights_only=True)
        ),
        "load the model, put the adapter on, read its file": lambda task: _built_anew(files[task], seed, device),
    }
    runners = {way: Runner(_to_the_next(do, list(files), device), calls=1, timing="host") for way, do in ways.items()}
    taken = interleave(runners, REPETITIONS, HostClock())
    return [SwitchRow(way, statistics.median(times) / 1e3) for way, times in taken.items()]


def _to_the_next(do: Callable[[str], object], tasks: list[str], device: torch.device) -> Callable[[], None]:
    """Go on to the other task with every call."""
    position = 0

    def run() -> None:
        nonlocal position
        position += 1
        do(tasks[position % len(tasks)])
        train.wait(device)

    return run
