"""Train several LoRA adapters on one frozen model at once, each with a learning rate of its own: pk.mixed_batch.

Beside it each of them is trained as it is today: alone, by PEFT, one step after another. Both start from the same
values and see the same texts, so the losses of an adapter must be the same curve. Model and data are the demo's.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peft_kernels as pk
from benchmarks.memory import peak_bytes
from examples import task, train
from examples.model import HIDDEN, Texts, load_encoder, mean_token

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STEPS, QUICK_STEPS = 40, 8
# Steps in which caches fill; they are trained on, but not timed.
UNTIMED_STEPS = 3
TARGETS = ["query", "key", "value", "intermediate.dense", "output.dense"]
RANK = 8
FASTEST = 4e-3
# Of a loss. The two sum in different orders, and AdamW divides by the size of a gradient: where that is next to none,
# what is lost to rounding is as large as the gradient. It grows with steps and rate.
AGREES = 1e-3
PICTURE, TABLE = "many_adapters.png", "many_adapters.md"


@dataclass(frozen=True)
class Learner:
    """An adapter's name and rate; its classifier, which is no part of the model."""

    name: str
    rate: float
    head: nn.Linear


@dataclass
class Way:
    """A way to take a step of all adapters.

    Attributes:
        step: texts -> each adapter's loss.
        pass_: texts -> forward and backward passes alone, of all adapters.
        losses: of each adapter at each step.
    """

    name: str
    step: Callable[[Any], list[float]]
    pass_: Callable[[Any], object]
    losses: list[list[float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it, and return the exit status: 1 where the two train differently."""
    options = parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    texts = Texts(task.load_task().train, device)
    together, apart = build(options, device)
    ways = [mixed(*together), in_turn(*apart)]
    play(ways, texts, options, device)
    peaks = [train_peak(way, texts, options, device) for way in ways]
    text = table(ways, peaks, options)
    (options.out / TABLE).write_text(text + "\n")
    draw(ways, together[1], options.out / PICTURE)
    error = difference(ways)
    passed = error < AGREES
    print(f"\n{text}\n\n{'ok  ' if passed else 'FAIL'} losses agree: {error:.1e} at most, allowed {AGREES:.0e}")
    print(f"written: {options.out / TABLE}, {options.out / PICTURE}")
    if not passed:
        print("Adapters that are trained together learn something else", file=sys.stderr)
    return 0 if passed else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.train_many_adapters", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_STEPS} steps instead of {STEPS}")
    parser.add_argument("--steps", type=int, help="whatever --quick says")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4, help="texts of a step, which every adapter sees")
    parser.add_argument("--seed", type=int, default=0, help="of start values and batches")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--out", type=Path, default=Path("demo_results"), help="folder for table and picture")
    options = parser.parse_args(arguments)
    if options.steps is None:
        options.steps = QUICK_STEPS if options.quick else STEPS
    if min(options.steps, options.adapters, options.batch, options.threads) < 1:
        parser.error("--steps, --adapters, --batch and --threads must be at least 1")
    return options


def build(
    options: argparse.Namespace, device: torch.device
) -> tuple[tuple[nn.Module, list[Learner]], tuple[nn.Module, list[Learner]]]:
    """Two models with the same adapters, the second PEFT's own, and the learners of each."""
    import peft

    torch.manual_seed(options.seed)
    rates = [FASTEST * 0.5**number for number in range(options.adapters)]
    names = [f"rate {rate:.2g}" for rate in rates]
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS)
    # A "." would divide a name of modules.
    model = peft.get_peft_model(load_encoder(device), config, adapter_name=_key(names[0]))
    for name in names[1:]:
        model.add_adapter(_key(name), config)
    heads = [nn.Linear(HIDDEN, len(task.CLASSES), device=device) for _ in names]
    other, other_heads = copy.deepcopy((model, heads))
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    pk.apply(model)
    learners = [
        [Learner(_key(name), rate, head) for name, rate, head in zip(names, rates, of_model, strict=True)]
        for of_model in (heads, other_heads)
    ]
    return (model.train(), learners[0]), (other.train(), learners[1])


def _key(name: str) -> str:
    return name.replace(".", "_").replace(" ", "_")


def _factors(model: nn.Module, learner: Learner) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if f".{learner.name}." in name]


def mixed(model: nn.Module, learners: list[Learner]) -> Way:
    """All adapters in one batch, which has each text once for every adapter, and one optimizer."""
    groups = [
        {"params": [*_factors(model, each), *each.head.parameters()], "lr": each.rate, "weight_decay": 0.01}
        for each in learners
    ]
    optimizer = torch.optim.AdamW(groups)
    count = len(learners)

    def pass_(texts: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        ids, mask, labels = texts
        names = [each.name for each in learners for _ in labels]
        with pk.mixed_batch(model, names) as batch:
            hidden = model(input_ids=ids.repeat(count, 1), attention_mask=mask.repeat(count, 1)).last_hidden_state
        means = mean_token(hidden, mask.repeat(count, 1)).chunk(count)
        logits = torch.cat([each.head(mean) for each, mean in zip(learners, means, strict=True)])
        of_rows = F.cross_entropy(logits, labels.repeat(count), reduction="none")
        # Each adapter's own mean: its step is as large as if it were alone.
        losses = batch.rows().mean(of_rows)
        losses.sum().backward()
        return losses.detach()[[batch.adapters.index(each.name) for each in learners]]

    def step(texts: tuple[Tensor, Tensor, Tensor]) -> list[float]:
        losses = pass_(texts)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return losses.tolist()

    return Way("together, in one batch", step, pass_)


def in_turn(model: nn.Module, learners: list[Learner]) -> Way:
    """One adapter after another, as PEFT has them: the one that is active trains."""
    optimizers = [
        torch.optim.AdamW([*_factors(model, each), *each.head.parameters()], lr=each.rate, weight_decay=0.01)
        for each in learners
    ]

    def pass_of(learner: Learner, texts: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        ids, mask, labels = texts
        model.set_adapter(learner.name)
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
        loss = F.cross_entropy(learner.head(mean_token(hidden, mask)), labels)
        loss.backward()
        return loss.detach()

    def pass_(texts: tuple[Tensor, Tensor, Tensor]) -> object:
        return [pass_of(each, texts) for each in learners]

    def step(texts: tuple[Tensor, Tensor, Tensor]) -> list[float]:
        losses = []
        for learner, optimizer in zip(learners, optimizers, strict=True):
            losses.append(pass_of(learner, texts))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return torch.stack(losses).tolist()

    return Way("one after another, PEFT", step, pass_)


def play(ways: Sequence[Way], texts: Texts, options: argparse.Namespace, device: torch.device) -> None:
    """Train in both ways on the same texts, in turns; who goes first changes with every step."""
    from tqdm import tqdm

    generator = torch.Generator().manual_seed(options.seed)
    progress = tqdm(range(options.steps), desc="training", unit="step", dynamic_ncols=True)
    for number in progress:
        batch = texts.take(torch.randint(len(texts), (options.batch,), generator=generator))
        for way in ways if number % 2 else reversed(ways):
            train.wait(device)
            begin = time.perf_counter()
            losses = way.step(batch)
            train.wait(device)
            way.seconds.append(time.perf_counter() - begin)
            way.losses.append(losses)
        progress.set_postfix({way.name.partition(",")[0]: f"{1e3 * way.seconds[-1]:.0f} ms" for way in ways})


def train_peak(way: Way, texts: Texts, options: argparse.Namespace, device: torch.device) -> int:
    """Bytes of forward and backward passes above the weights, on texts that are the longest."""
    rows = torch.argsort(texts.lengths)[-options.batch :]
    batch = texts.take(rows)
    return peak_bytes(lambda: way.pass_(batch), device)


def difference(ways: Sequence[Way]) -> float:
    """Between the losses of the two, of a loss at its step."""
    ours, theirs = (torch.tensor(way.losses, dtype=torch.float64) for way in ways)
    return ((ours - theirs).abs() / theirs).max().item()


def table(ways: Sequence[Way], peaks: Sequence[int], options: argparse.Namespace) -> str:
    """Lay the medians out in Markdown, with that of the turns' quotients to the second way."""
    theirs = ways[-1].seconds[UNTIMED_STEPS:] or ways[-1].seconds
    lines = [
        f"{options.adapters} adapters, {options.batch} texts a step, {options.steps} steps.",
        "",
        "| adapters are trained | ms a step of all | times as fast | peak MiB |",
        "| --- | --- | --- | --- |",
    ]
    for way, peak in zip(ways, peaks, strict=True):
        seconds = way.seconds[UNTIMED_STEPS:] or way.seconds
        quotient = statistics.median(other / mine for other, mine in zip(theirs, seconds, strict=True))
        milliseconds = 1e3 * statistics.median(seconds)
        lines.append(f"| {way.name} | {milliseconds:.1f} | {quotient:.2f} | {peak / 2**20:.1f} |")
    return "\n".join(lines)


def draw(ways: Sequence[Way], learners: Sequence[Learner], path: Path) -> None:
    """Draw each adapter's losses in both ways, and how long the steps took, into a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (losses, times) = plt.subplots(1, 2, figsize=(14.0, 5.5), width_ratios=(2.2, 1), layout="constrained")
    _draw_losses(losses, ways, [each.rate for each in learners])
    times.set_title("time of a step of all adapters")
    times.boxplot([[1e3 * second for second in way.seconds[UNTIMED_STEPS:] or way.seconds] for way in ways], widths=0.5)
    times.set_xticks(range(1, len(ways) + 1), [way.name.replace(", ", ",\n") for way in ways])
    times.set_ylim(bottom=0)
    times.set_ylabel("ms")
    times.grid(axis="y", alpha=0.25)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _draw_losses(axes: Axes, ways: Sequence[Way], rates: Sequence[float]) -> None:
    """Smoothed, because one batch's loss says little: lines of the mixed batch, dots of those trained alone."""
    import matplotlib

    ours, theirs = (torch.tensor(way.losses) for way in ways)
    axes.set_title("losses, mean of the last 10 batches: lines together, dots one after another")
    colors = matplotlib.colormaps["viridis"]
    for number, rate in enumerate(rates):
        color = colors(number / max(1, len(rates) - 1) * 0.9)
        steps = range(1, len(ours) + 1)
        axes.plot(steps, _smoothed(ours[:, number]), color=color, label=f"rate {rate:.1e}")
        axes.plot(steps, _smoothed(theirs[:, number]), "o", color=color, markersize=4)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.25)
    axes.legend(fontsize="small", ncols=2)


def _smoothed(losses: Tensor) -> list[float]:
    return [losses[max(0, end - 10) : end].mean().item() for end in range(1, len(losses) + 1)]


if __name__ == "__main__":
    sys.exit(main())
