"""Host time of a small applied layer beside PEFT's: what tiny calls, such as those of decoding, are made of."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft_kernels as pk

ROUNDS, CALLS = 15, 100

# A median of 15 rounds in turns scatters by some hundredths on a shared machine, and by more while a neighbour's load
# lasts. A layer that is slower than the bound by more than that stays above it however often it is measured.
ATTEMPTS = 5


@pytest.fixture
def layers() -> Iterator[tuple[Any, Any]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    config = peft.LoraConfig(target_modules=["0"], init_lora_weights=False)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(256, 256)), config).eval()
    plain = copy.deepcopy(model)
    pk.apply(model)
    yield plain.base_model.model[0], model.base_model.model[0]
    torch.set_num_threads(threads)


def _seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    for _ in range(CALLS):
        call()
    return time.process_time() - start


def _ratio(ours: Callable[[], object], theirs: Callable[[], object]) -> float:
    """Of medians over rounds in turns, after one round of each that does not count."""
    _seconds(theirs), _seconds(ours)
    times = [(_seconds(theirs), _seconds(ours)) for _ in range(ROUNDS)]
    return statistics.median(each for _, each in times) / statistics.median(each for each, _ in times)


def _least_ratio(ours: Callable[[], object], theirs: Callable[[], object], bound: float) -> float:
    """The first ratio below the bound, or the least of several."""
    least = float("inf")
    for _ in range(ATTEMPTS):
        least = min(least, _ratio(ours, theirs))
        if least <= bound:
            break
    return least


def test_one_token_without_gradient(layers: tuple[Any, Any]) -> None:
    """0.66 was measured on one core of a shared Xeon, and at most 0.72 on another one.

    Torch's four operators alone are 0.36 of PEFT's layer on the first.
    """
    plain, fused = layers
    x = torch.randn(1, 1, 256)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-5)
        assert _least_ratio(lambda: fused(x), lambda: plain(x), 0.75) <= 0.75


def test_forward_and_backward_of_four_tokens(layers: tuple[Any, Any]) -> None:
    """0.86 was measured there: most of it is torch's engine, which both pay."""
    plain, fused = layers
    x = torch.randn(4, 256)
    assert _least_ratio(lambda: fused(x).sum().backward(), lambda: plain(x).sum().backward(), 1.0) <= 1.0
