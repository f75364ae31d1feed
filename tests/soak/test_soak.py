"""Many launches of mixed shapes: each problem has the same bits every time, and no memory is kept.

No GPU has run this file yet; without one, a few launches go through Triton's interpreter.
"""

from __future__ import annotations

import random

import pytest
import torch

from tests.soak import problems

# Relative, in the Euclidean norm, Triton against torch: another function, not a rounding (those are the oracle's to
# judge, in each family's own tests). float32 on a GPU may be TF32 on one side.
DIFFERENT = 0.05


def soak(device: torch.device, count: int, launches: int, backend: str = "triton") -> None:
    """Run ``count`` problems in random order until there were ``launches`` calls, forward and backward."""
    drawn = [problems.draw(index, device) for index in range(count)]
    before = [tuple(tensor.detach().clone() for tensor in problem.inputs) for problem in drawn]
    first = [problem.run(backend) for problem in drawn]
    for problem, ours in zip(drawn, first, strict=True):
        for mine, theirs in zip(ours, problem.run("torch"), strict=True):
            difference = (mine.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-30)
            # Written so that nan, which compares false with everything, is a failure.
            assert difference.item() <= DIFFERENT, f"{problem.name}: {tuple(mine.shape)} is off by {difference.item()}"

    held = _allocated(device)
    # Counted where the kernels run: a question to the device after each launch would keep the launches apart.
    others = torch.zeros(count, dtype=torch.int64, device=device)
    order = random.Random(0)
    for launch in range(launches):
        index = launch if launch < count else order.randrange(count)
        for got, expected in zip(drawn[index % count].run(backend), first[index % count], strict=True):
            others[index % count] += _bits(got).ne(_bits(expected)).sum()
    found = {drawn[index].name: bits for index, bits in enumerate(others.tolist()) if bits}
    assert not found, f"other values than the first time: {found}"
    del got, expected
    assert _allocated(device) <= held + others.numel() * others.element_size() + 512, "launches keep memory"
    for problem, values in zip(drawn, before, strict=True):
        for tensor, value in zip(problem.inputs, values, strict=True):
            assert torch.equal(tensor, value), f"{problem.name}: an input was written"


def _bits(x: torch.Tensor) -> torch.Tensor:
    """Integers that are equal where the bits are; -0.0 and nan compare otherwise."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32}[x.element_size()])


def _allocated(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    return torch.cuda.memory_allocated(device)


@pytest.mark.thorough
def test_a_few_launches(device: torch.device) -> None:
    """Also the subset for compute-sanitizer, under which a launch takes a hundred times as long."""
    soak(device, count=8, launches=12)


@pytest.mark.cpu_only
@pytest.mark.parametrize("what", ["bits", "values", "input"])
def test_soak_sees(what: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the torch backend: what is shown is that the soak can fail."""
    calls = []
    run = problems.Problem.run

    def broken(problem: problems.Problem, backend: str) -> tuple[torch.Tensor, ...]:
        results = run(problem, backend)
        calls.append(problem)
        if what == "bits" and len(calls) == 20:
            results[0].view(-1)[0] += 1  # a product could be of a zero
        if what == "values" and len(calls) == 1:
            results[-1].mul_(1.1)
        if what == "input" and len(calls) == 20:
            data = problem.inputs[0].data
            data[(0,) * data.dim()] += 1  # of any strides
        return results

    monkeypatch.setattr(problems.Problem, "run", broken)
    message = {"bits": "other values", "values": "is off by", "input": "other values|was written"}[what]
    with pytest.raises(AssertionError, match=message):
        soak(device, count=4, launches=16, backend="torch")


@pytest.mark.gpu
@pytest.mark.slow
def test_ten_thousand_launches(device: torch.device) -> None:
    soak(device, count=96, launches=10_000)
