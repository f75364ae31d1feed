"""The benchmark of updates of a given base: the least work, and what is checked against the oracle."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("peft")

import peft_kernels as pk
from benchmarks import lora, lora_update
from benchmarks.family import discover

CPU = torch.device("cpu")
PROVIDERS = {provider.name: provider for provider in lora_update.FAMILY.providers}
TINY = lora.Problem("m", "q", m=21, n=40, k=32, r=5, dtype="float32", adapter_dtype="float32", p=0.0)


def test_it_is_found() -> None:
    assert lora_update.FAMILY in discover().values()


def test_bytes_are_lora_linears_and_what_two_operations_pass_again() -> None:
    x, _, _, _, dy = lora.make_inputs(TINY, CPU, seed=0)
    for mode, again in {"forward": 2 * dy.nbytes + x.nbytes, "backward": dy.nbytes + 4 * x.nbytes}.items():
        least = lora.work(TINY, mode, PROVIDERS["ours_torch"])
        assert lora_update.work(TINY, mode, PROVIDERS["ours_torch"]) == replace(least, bytes=least.bytes + again)
        assert lora_update.work(TINY, mode, PROVIDERS["base"]) == lora.work(TINY, mode, PROVIDERS["base"])


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_every_provider_that_runs_here_is_right(p: float) -> None:
    problem = replace(TINY, p=p)
    check = lora_update.FAMILY.checker(problem, lora.make_inputs(problem, CPU, seed=0))
    for name in ("peft", "ours_auto", "ours_torch"):
        is_compared = not p or name.startswith("ours")
        for error in check(PROVIDERS[name]).values():
            assert error is not None and error < 1e-5 if is_compared else error is None


def test_a_wrong_mask_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = replace(TINY, p=0.5)
    check = lora_update.FAMILY.checker(problem, lora.make_inputs(problem, CPU, seed=0))
    update = pk.lora_update
    monkeypatch.setattr(pk, "lora_update", lambda *args, seed, **rest: update(*args, seed=seed + 1, **rest))
    with pytest.raises(AssertionError):
        check(PROVIDERS["ours_torch"])
