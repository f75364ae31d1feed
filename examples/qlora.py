"""QLoRA: train LoRA on a model whose frozen weights have 4 bits, by PEFT with bitsandbytes, and the same by pk.apply.

Both start from the same values and see the same texts, so their losses must be the same curve. Model and data are the
demo's; its linear layers become bitsandbytes' (NF4, scales quantized too). They train without dropout, because masks
would differ; the memory of a pass is measured with it too.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peft_kernels as pk
from examples import task
from examples.model import HIDDEN, Texts, load_encoder, mean_token
from examples.train_many_adapters import UNTIMED_STEPS, Way, difference, play, train_peak

STEPS, QUICK_STEPS = 40, 6
TARGETS = ["query", "key", "value", "intermediate.dense", "output.dense"]
RANK, RATE, DROPOUT = 8, 1e-3, 0.1
# Of a loss: the two sum in different orders, and AdamW makes whole steps of what rounding leaves of a tiny gradient.
AGREES = 1e-3
PICTURE, TABLE = "qlora.png", "qlora.md"
OURS, THEIRS = "peft_kernels", "PEFT and bitsandbytes"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it, and return the exit status: 1 where the two train differently, or a layer fell back."""
    options = parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    texts = Texts(task.load_task().train, device)
    model, head, sizes = build(options, device)
    other, other_head = copy.deepcopy((model, head))
    # On a CPU auto would leave 4-bit layers to PEFT, whose library decodes faster there.
    forced = pk.use_backend("torch") if device.type == "cpu" else contextlib.nullcontext()
    with forced:
        return compare(options, device, texts, (model, head), (other, other_head), sizes)


def compare(
    options: argparse.Namespace,
    device: torch.device,
    texts: Texts,
    ours: tuple[nn.Module, nn.Module],
    theirs: tuple[nn.Module, nn.Module],
    sizes: tuple[int, int],
) -> int:
    """Train both, and return the exit status."""
    (model, head), (other, other_head) = ours, theirs
    report = pk.apply(model)
    ways = [way(OURS, model, head), way(THEIRS, other, other_head)]
    play(ways, texts, options, device)
    peaks = [peaks_of(each, of_way, texts, options, device) for each, of_way in zip(ways, (model, other), strict=True)]
    text = table(ways, peaks, sizes, options)
    (options.out / TABLE).write_text(text + "\n")
    draw(ways, peaks, options.out / PICTURE)
    error = difference(ways)
    passed = error < AGREES and not report.fallbacks and not report.fallback_calls
    print(f"\n{text}\n\n{report}")
    print(f"{'ok  ' if passed else 'FAIL'} losses agree: {error:.1e} at most, allowed {AGREES:.0e}")
    print(f"written: {options.out / TABLE}, {options.out / PICTURE}")
    if not passed:
        print("The fused layers learn something else, or did not run", file=sys.stderr)
    return 0 if passed else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.qlora", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_STEPS} steps instead of {STEPS}")
    parser.add_argument("--steps", type=int, help="whatever --quick says")
    parser.add_argument("--batch", type=int, default=16, help="texts of a step")
    parser.add_argument("--seed", type=int, default=0, help="of start values and batches")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--out", type=Path, default=Path("demo_results"), help="folder for table and picture")
    options = parser.parse_args(arguments)
    if options.steps is None:
        options.steps = QUICK_STEPS if options.quick else STEPS
    if min(options.steps, options.batch, options.threads) < 1:
        parser.error("--steps, --batch and --threads must be at least 1")
    return options


def build(options: argparse.Namespace, device: torch.device) -> tuple[nn.Module, nn.Linear, tuple[int, int]]:
    """PEFT's model on 4-bit layers, a classifier, and the bytes of these layers' weights before and after."""
    import peft

    torch.manual_seed(options.seed)
    encoder: Any = load_encoder(device)
    sizes = quantize(encoder, device)
    # What transformers sets where it loads a model with a BitsAndBytesConfig: PEFT asks for it.
    encoder.is_loaded_in_4bit = True
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS, lora_dropout=DROPOUT)
    model: nn.Module = peft.get_peft_model(encoder, config)
    set_dropout(model, 0.0)
    return model.train(), nn.Linear(HIDDEN, len(task.CLASSES), device=device), sizes


def set_dropout(model: nn.Module, p: float) -> None:
    """Of all adapters; the encoder has none at work."""
    for name, module in model.named_modules():
        if "lora_dropout" in name and isinstance(module, nn.Dropout):
            module.p = p


def quantize(model: nn.Module, device: torch.device) -> tuple[int, int]:
    """Put bitsandbytes' layers in the place of those that are adapted, and return bytes of weights before and after."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    before = after = 0
    for name, layer in list(model.named_modules()):
        if not name.endswith(tuple(TARGETS)) or not isinstance(layer, nn.Linear):
            continue
        quantized = Linear4bit(layer.in_features, layer.out_features, compute_dtype=torch.float32, quant_type="nf4")
        quantized.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=quantized)
        quantized.bias = layer.bias
        quantized.to(device)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, quantized)
        weight = pk.four_bit.from_quant_state(quantized.weight)
        assert weight.nested is not None
        before += layer.weight.nbytes
        after += weight.packed.nbytes + weight.scales.nbytes + weight.nested[1].nbytes
    return before, after


def way(name: str, model: nn.Module, head: nn.Linear) -> Way:
    """Steps of AdamW on adapters and classifier."""
    parameters = [each for each in (*model.parameters(), *head.parameters()) if each.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.01)

    def pass_(texts: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        ids, mask, labels = texts
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
        loss = F.cross_entropy(head(mean_token(hidden, mask)), labels)
        loss.backward()
        return loss.detach()

    def step(texts: tuple[Tensor, Tensor, Tensor]) -> list[float]:
        loss = pass_(texts)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return [loss.item()]

    return Way(name, step, pass_)


def peaks_of(
    way: Way, model: nn.Module, texts: Texts, options: argparse.Namespace, device: torch.device
) -> tuple[int, int]:
    """Bytes of forward and backward passes above the weights, without dropout and with it."""
    found = []
    for p in (0.0, DROPOUT):
        set_dropout(model, p)
        found.append(train_peak(way, texts, options, device))
    return found[0], found[1]


def table(
    ways: Sequence[Way], peaks: Sequence[tuple[int, int]], sizes: tuple[int, int], options: argparse.Namespace
) -> str:
    """Lay the medians out in Markdown, with that of the turns' quotients to the second way."""
    theirs = _timed(ways[-1])
    before, after = (size / 2**20 for size in sizes)
    lines = [
        f"{options.batch} texts a step, {options.steps} steps; frozen weights {after:.1f} MiB instead of {before:.1f}.",
        "",
        f"| LoRA on 4-bit weights by | ms a step | times as fast | peak MiB | with dropout {DROPOUT} | last loss |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for each, peak in zip(ways, peaks, strict=True):
        seconds = _timed(each)
        quotient = statistics.median(other / mine for other, mine in zip(theirs, seconds, strict=True))
        milliseconds = 1e3 * statistics.median(seconds)
        memory = " | ".join(f"{each_peak / 2**20:.1f}" for each_peak in peak)
        lines.append(f"| {each.name} | {milliseconds:.1f} | {quotient:.2f} | {memory} | {each.losses[-1][0]:.4f} |")
    return "\n".join(lines)


def _timed(way: Way) -> list[float]:
    return way.seconds[UNTIMED_STEPS:] or way.seconds


def draw(ways: Sequence[Way], peaks: Sequence[tuple[int, int]], path: Path) -> None:
    """Draw the losses of both, how long steps took, and what a pass needs, into a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(15.0, 4.8), width_ratios=(2, 1, 1), layout="constrained")
    losses, times, memory = panels
    ours, theirs = ([of_step[0] for of_step in each.losses] for each in ways)
    losses.set_title(f"losses: line {OURS}, dots {THEIRS}")
    losses.plot(range(1, len(ours) + 1), ours, color="#1d3557")
    losses.plot(range(1, len(theirs) + 1), theirs, "o", color="#f4a259", markersize=4)
    losses.set_xlabel("step")
    losses.set_ylabel("loss")
    names = [each.name.replace(" and ", "\nand ") for each in ways]
    times.set_title("time of a step")
    times.boxplot([[1e3 * second for second in _timed(each)] for each in ways], widths=0.5)
    times.set_xticks(range(1, len(ways) + 1), names)
    times.set_ylabel("ms")
    memory.set_title("peak of a pass above the weights")
    for number, (label, shade) in enumerate(((f"dropout {DROPOUT}", 0.45), ("no dropout", 1.0))):
        sizes = [peak[1 - number] / 2**20 for peak in peaks]
        memory.bar(names, sizes, width=0.5, color=("#1d3557", "#f4a259"), alpha=shade, label=label)
    memory.set_ylabel("MiB")
    memory.legend(fontsize="small")
    for axes in panels:
        axes.grid(axis="y", alpha=0.25)
    for axes in (times, memory):
        axes.set_ylim(bottom=0)
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
