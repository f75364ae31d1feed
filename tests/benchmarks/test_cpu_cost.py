"""What a call costs on a CPU beside what it replaces: time where the two are far apart, bytes and scores everywhere."""

from __future__ import annotations

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import adapter, harness, prefix, prompt, tables
from benchmarks.family import Call, Family
from peft_kernels._core import operator
from peft_kernels._core.torch_products import is_slow
from tests.contract import observe

pytestmark = pytest.mark.cpu_only

CPU = torch.device("cpu")
ATTENTION = prefix.Problem("16 heads, 4 of keys", 1, 16, 4, 512, 512, 30, 64, "float32")
ADAPTER = adapter.Problem(512, 1024, 16, "float16", "float16", "relu", "serial")

# Rounds of turns; one core that others use gives medians that scatter by a tenth at most.
ROUNDS = 9
# A ratio that is 0.8 or less in truth is above 1 in a median of nine once in a long while, and not three times.
TRIES = 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "problem"),
    [
        (prefix.FAMILY, ATTENTION),
        (prefix.FAMILY, replace(ATTENTION, dtype="bfloat16")),
        (prefix.FAMILY, replace(ATTENTION, b=4, s=128, l=128, dtype="bfloat16", mask="padded")),
        (prefix.FAMILY, replace(ATTENTION, s=64, l=64, dtype="float16")),
        (adapter.FAMILY, ADAPTER),
        (adapter.FAMILY, replace(ADAPTER, form="parallel")),
        (prompt.FAMILY, prompt.Problem("embeddings", 1, 4, 20, 512, 2048, "bfloat16")),
    ],
    ids=lambda value: value.name if isinstance(value, Family) else tables.label(dataclasses.asdict(value)),
)
def test_takes_no_longer_than_what_it_replaces(family: Family, problem: Any) -> None:
    """Forward and backward, in turns, on one thread, in time of this process. Here ours takes 0.2 to 0.8 of the time.

    Where the two are within the noise of each other, what the other tests count says it instead.
    """
    if problem.dtype == "float16" and family is adapter.FAMILY and not is_slow(torch.float16, "cpu"):
        pytest.skip("this processor multiplies float16 itself, and the two are within the noise of each other")
    theirs, ours = _calls(family, problem)
    calls = [harness.closures(call, "both") for call in (theirs, ours)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ratios = []
        for _ in range(TRIES):
            ratios.append(_ratio(*calls))
            if ratios[-1] <= 1.0:
                return
    finally:
        torch.set_num_threads(threads)
    pytest.fail(f"ours takes {ratios} of the time")


def _ratio(theirs: Callable[[], object], ours: Callable[[], object]) -> float:
    taken: dict[Any, list[int]] = {theirs: [], ours: []}
    for call in (theirs, ours):
        call()
    gc.collect()
    for turn in range(ROUNDS):
        for call in (theirs, ours) if turn % 2 else (ours, theirs):
            start = time.process_time_ns()
            call()
            taken[call].append(time.process_time_ns() - start)
    return statistics.median(taken[ours]) / statistics.median(taken[theirs])


class _Scores(TorchDispatchMode):
    """How many scores torch's attention computes for a query head, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = [0, 0]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if "flash_attention_for_cpu" in name:
            backward = "backward" in name
            q, k = args[backward : backward + 2]
            self.passes[backward] += q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("mask", ["causal", "full", "padded"])
@pytest.mark.parametrize(("b", "s", "keys"), [(1, 512, 512), (4, 64, 64), (1, 64, 512)])
def test_no_more_scores_than_one_masked_attention(
    b: int, s: int, keys: int, mask: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once each pass, and of a long causal square little more than half."""
    monkeypatch.setattr(operator, "why_not_opaque", lambda call: None)  # the mode is to see the call as it runs
    problem = replace(ATTENTION, b=b, s=s, l=keys, mask=mask, dtype=dtype)
    passes = []
    for call in _calls(prefix.FAMILY, problem):
        with _Scores() as scores:
            harness.closures(call, "both")()
        passes.append(scores.passes)
    theirs, ours = passes
    square = problem.b * problem.h * s * (problem.p + keys)
    assert theirs == [square, square]
    assert ours[0] == ours[1] <= (0.65 * square if s == keys == 512 and mask != "full" else square)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("mask", ["causal", "full", "padded"])
@pytest.mark.parametrize("h_kv", [4, 16])
def test_prefix_attention_saves_no_more_than_torch_does(h_kv: int, mask: str, dtype: str) -> None:
    """Besides its arguments: y and a number a query and head, where torch has these, the joined keys and the mask."""
    problem = replace(ATTENTION, h_kv=h_kv, s=64, l=64, mask=mask, dtype=dtype)
    inputs = prefix.make_inputs(problem, CPU, 0)
    saved = []
    for provider in ("peft", "ours_torch"):
        call = next(each for each in prefix.FAMILY.providers if each.name == provider).make(problem, inputs)
        with observe.saved([x for x in inputs if isinstance(x, Tensor)]) as (added, _):
            y = call.apply()
        saved.append(sum(added.values()))
    theirs, ours = saved
    assert ours == y.untyped_storage().nbytes() + 4 * problem.b * problem.h * problem.s
    assert theirs - ours >= y.element_size() * 2 * problem.b * h_kv * (problem.p + problem.l) * problem.d


def _calls(family: Family, problem: Any) -> tuple[Call, Call]:
    inputs = family.make_inputs(problem, CPU, 0)
    theirs = next(provider for provider in family.providers if provider.role == "baseline")
    ours = next(provider for provider in family.providers if provider.name == "ours_auto")
    return theirs.make(problem, inputs), ours.make(problem, inputs)
