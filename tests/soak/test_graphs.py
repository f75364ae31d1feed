"""CUDA graphs: forward and backward are captured, and a replay has the bits of an eager call on the new values.

No GPU has run this file yet.
"""

from __future__ import annotations

import pytest
import torch

import peft_kernels as pk
from tests.soak import problems

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("index", range(12), ids=lambda index: f"problem {index}")
def test_replay_has_the_bits_of_a_call(device: torch.device, index: int) -> None:
    problem = problems.draw(index, device)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            problem.run("triton")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = problem.run("triton")
    torch.cuda.current_stream(device).wait_stream(stream)

    for factor in (1.0, -0.5):
        with torch.no_grad():
            for tensor in (*problem.inputs, problem.dy):
                if tensor.is_floating_point():
                    tensor.mul_(factor)
        expected = problem.run("triton")
        for result in captured:
            result.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize(device)
        for got, wanted in zip(captured, expected, strict=True):
            assert torch.equal(got, wanted), problem.name


def test_each_replay_drops_others(device: torch.device) -> None:
    """Without a seed, dropout draws from torch's generator, which a graph advances with each replay."""
    x = torch.ones(64, 256, device=device)
    weight = torch.zeros(32, 256, device=device)
    lora_a, lora_b = torch.ones(1, 256, device=device), torch.ones(32, 1, device=device)

    def call() -> torch.Tensor:
        return pk.lora_linear(x, weight, lora_a, lora_b, dropout_p=0.5, backend="triton")

    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            y = call()
    torch.cuda.current_stream(device).wait_stream(stream)
    results = []
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize(device)
        results.append(y.clone())
    assert not torch.equal(results[0], results[1])
    assert not torch.equal(results[1], results[2])
