"""Host time of one call where the arithmetic is nothing: ``pytest benchmarks --benchmark-only``."""

from __future__ import annotations

import pytest
import torch

from benchmarks import lora
from benchmarks.family import Provider
from benchmarks.harness import closures

PROBLEM = lora.Problem("tiny", "square", m=2, n=16, k=16, r=4, dtype="float32", adapter_dtype="float32", p=0.0)
NAMES = ("base", "peft", "addmm", "ours_torch")
PROVIDERS = [provider for provider in lora.FAMILY.providers if provider.name in NAMES]


@pytest.mark.parametrize("mode", ["forward", "both"])
@pytest.mark.parametrize("provider", PROVIDERS, ids=lambda provider: provider.name)
def test_host_overhead(benchmark, provider: Provider, mode):
    benchmark.group = mode
    inputs = lora.make_inputs(PROBLEM, torch.device("cpu"), seed=0)
    benchmark(closures(provider.make(PROBLEM, inputs), mode))
