"""Serve requests for many adapters on one model: pk.AdapterBank beside PEFT's adapter_names, in turns.

The model is a small Llama with random weights, and the adapters are random too: what is shown is what serving costs,
not what is said. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import peft_kernels as pk

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import LlamaForCausalLM

ROUNDS, QUICK_ROUNDS = 12, 4
PROMPT, NEW_TOKENS = 16, 12
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANKS = (4, 8, 16)
# Of the largest logit: float32 sums in two orders, through the layers of this model, differ by a thousandth of it.
AGREES = 1e-4


@dataclass(frozen=True)
class Way:
    """A way to answer a batch: ``answer(names, ids)`` gives the new tokens, ``look`` the first step's logits."""

    name: str
    answer: Callable[[list[str], Tensor], Tensor]
    look: Callable[[list[str], Tensor], Tensor] | None = None
    seconds: list[float] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it, and return the exit status: 1 where the two answer differently."""
    options = parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        theirs = adapters(Path(folder), options.adapters, options.seed, device)
        served = model(options.seed, device)
        bank = pk.AdapterBank(served, slots=options.slots, max_rank=max(RANKS), target_modules=TARGETS)
        for name in names_of(options.adapters):
            bank.add(name, Path(folder) / name)
    print(f"on {device}, {options.adapters} adapters, batches of {options.batch}\n{bank}\n")
    ways = [
        Way("the model without adapters", with_generate(model(options.seed, device))),
        Way("PEFT, adapter_names", with_generate(theirs, named=True), with_logits(theirs, named=True)),
        Way("AdapterBank", with_bank(bank, with_generate(served)), with_bank(bank, with_logits(served))),
    ]
    loaded, error = play(ways, bank, options, device)
    print("\n" + table(ways, options.batch) + f"\n\n{loaded} loads of an adapter into a slot")
    passed = error < AGREES
    print(f"{'ok  ' if passed else 'FAIL'} logits of both agree: {error:.1e} of the largest, at most {AGREES:.0e}")
    if not passed:
        print("The bank and PEFT answer differently", file=sys.stderr)
    return 0 if passed else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.serve_many_adapters", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} batches instead of {ROUNDS}")
    parser.add_argument("--rounds", type=int, help="batches, whatever --quick says")
    parser.add_argument("--adapters", type=int, default=64)
    parser.add_argument("--slots", type=int, default=32, help="adapters that stay on the device")
    parser.add_argument("--batch", type=int, default=8, help="requests that are answered at once")
    parser.add_argument("--seed", type=int, default=0, help="of weights and requests")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    options = parser.parse_args(arguments)
    if options.rounds is None:
        options.rounds = QUICK_ROUNDS if options.quick else ROUNDS
    if min(options.rounds, options.adapters, options.batch, options.threads) < 1:
        parser.error("--rounds, --adapters, --batch and --threads must be at least 1")
    if options.slots < min(options.batch, options.adapters):
        parser.error("--slots must be enough for a batch")
    return options


def names_of(count: int) -> list[str]:
    """The names of all adapters."""
    return [f"customer-{number:03d}" for number in range(count)]


def model(seed: int, device: torch.device) -> LlamaForCausalLM:
    """The frozen model, with the same weights each time."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=128,
    )
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(config).eval().requires_grad_(False).to(device)


def adapters(folder: Path, count: int, seed: int, device: torch.device) -> PeftModel:
    """Save adapters of several ranks with random factors, each in a folder of its own; return PEFT's model of all."""
    import peft

    generator, found = torch.Generator().manual_seed(seed), None
    for number, name in enumerate(names_of(count)):
        rank = RANKS[number % len(RANKS)]
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS, task_type="CAUSAL_LM")
        if found is None:
            found = peft.get_peft_model(model(seed, device), config, adapter_name=name)
        else:
            found.add_adapter(name, config)
    assert found is not None
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    found.save_pretrained(folder)
    return found.eval()


def with_generate(model: torch.nn.Module, named: bool = False) -> Callable[[list[str], Tensor], Tensor]:
    """Answer by ``generate``, the model's own loop."""

    def answer(names: list[str], ids: Tensor) -> Tensor:
        extra = {"adapter_names": names} if named else {}
        return model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
            **extra,
        )

    return answer


def with_logits(model: torch.nn.Module, named: bool = False) -> Callable[[list[str], Tensor], Tensor]:
    """The logits of a batch of prompts."""

    @torch.no_grad()
    def look(names: list[str], ids: Tensor) -> Tensor:
        return model(input_ids=ids, **({"adapter_names": names} if named else {})).logits

    return look


def with_bank(
    bank: pk.AdapterBank, answer: Callable[[list[str], Tensor], Tensor]
) -> Callable[[list[str], Tensor], Tensor]:
    """The same with a bank's adapters; loading those that are in no slot is a part of it."""

    def answer_with(names: list[str], ids: Tensor) -> Tensor:
        bank.use(names)
        return answer(names, ids)

    return answer_with


def play(
    ways: Sequence[Way], bank: pk.AdapterBank, options: argparse.Namespace, device: torch.device
) -> tuple[int, float]:
    """Answer the same requests in each way, in turns; return how many adapters were loaded, and how far logits differ.

    Requests are for few adapters often and for many rarely, as a server's are: the n-th comes as often as 1 / n.
    """
    from tqdm import tqdm

    known, draw = names_of(options.adapters), random.Random(options.seed)
    weights = [1 / (place + 1) for place in range(len(known))]
    loaded, error = 0, 0.0
    progress = tqdm(range(-1, options.rounds), desc="serving", unit="batch", dynamic_ncols=True)
    for turn in progress:
        names = draw.choices(known, weights, k=options.batch)
        ids = torch.tensor([[draw.randrange(1, 1024) for _ in range(PROMPT)] for _ in names], device=device)
        loaded += len(set(names) - set(bank.resident))
        for way in ways if turn % 2 else reversed(ways):
            wait(device)
            begin = time.perf_counter()
            way.answer(names, ids)
            wait(device)
            # The first batch is for what is made once.
            if turn >= 0:
                way.seconds.append(time.perf_counter() - begin)
        theirs, ours = (way.look(names, ids) for way in ways if way.look is not None)
        error = max(error, ((ours - theirs).abs().max() / theirs.abs().max()).item())
        if turn >= 0:
            progress.set_postfix({way.name: f"{rate(way, options.batch):,.0f} tokens/s" for way in ways[1:]})
    return loaded, error


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rate(way: Way, batch: int) -> float:
    """New tokens in a second, by the median batch."""
    return batch * NEW_TOKENS / statistics.median(way.seconds)


def table(ways: Sequence[Way], batch: int) -> str:
    """Lay the medians out in Markdown, with that of each turn's quotients to PEFT."""
    lines = ["| way | tokens/s | ms a batch | times PEFT's |", "| --- | --- | --- | --- |"]
    peft = ways[1].seconds
    for way in ways:
        quotient = statistics.median(theirs / ours for theirs, ours in zip(peft, way.seconds, strict=True))
        milliseconds = 1e3 * statistics.median(way.seconds)
        lines.append(f"| {way.name} | {rate(way, batch):,.0f} | {milliseconds:.1f} | {quotient:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
