"""``lora_rows``'s decode kernel on a GPU. What the host's emulator shows without one is in test_csrc_decode_rows.py."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from torch import Tensor

import peft_kernels as pk
from peft_kernels._core.rows import Rows
from python_ref import compare
from tests.lora.simt_decode_rows import Case, Tensors, eager, expected, make
from tests.lora.test_csrc_decode_rows import GRID

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poison")]

# Blocks of all multiprocessors: an adapter for each token, one for all, none, and more ranks than tiles of W.
WIDE = [
    Case(slots, ranks, n=4096, k=4096, bias=False)
    for slots, ranks in (
        (tuple(range(16)), (16,) * 16),
        ((0,) * 16, (16,) * 16),
        ((-1,) * 16, (16,) * 16),
        ((3, -1, 1, 3, 0), (64, 8, 16, 200, 0)),
        (tuple(range(15, -1, -1)), (300,) * 16),
    )
]


def _slot(case: Case) -> list[int]:
    return [slot if 0 <= slot < len(case.ranks) else -1 for slot in case.slots]


def _call(case: Case, given: Tensors, rows: Rows) -> Tensor:
    x, weight, a, b, bias, scales = given
    return pk.lora_linear(x, weight, a, b, scales, bias, rows=rows, ranks=case.ranks, backend="cuda")


def _on(device: torch.device, tensors: Tensors) -> Tensors:
    return Tensors(*(None if tensor is None else tensor.to(device) for tensor in tensors))


@pytest.mark.parametrize("case", [*(case for case, _ in GRID), *WIDE], ids=str)
def test_error_budget(case: Case, device: torch.device) -> None:
    """The device alone knows the slots, and what no token uses is nan."""
    draws = []
    for seed in range(max(1, min(8, 256 // (case.m * case.n)))):
        tensors = make(case, seed)
        rows = Rows.of(torch.tensor(_slot(case), device=device), known=len(case.ranks))
        y = _call(case, _on(device, tensors), rows).cpu()
        draws.append((y, eager(case, tensors)[0], expected(case, tensors)[0]))
    compare.assert_close(str(case), *(torch.cat([draw[which].flatten() for draw in draws]) for which in range(3)))


@pytest.mark.parametrize("case", WIDE, ids=str)
def test_same_bits(case: Case, device: torch.device) -> None:
    rows = Rows.of(torch.tensor(_slot(case), device=device), known=len(case.ranks))
    call = functools.partial(_call, case, _on(device, make(case)), rows)
    first = call()
    for _ in range(50):
        compare.assert_bitwise_equal("y", call(), first)


def test_tokens_without_an_adapter_have_the_bits_of_the_frozen_layer(device: torch.device) -> None:
    case, given = WIDE[3], _on(device, make(WIDE[3]))
    y = _call(case, given, Rows.of(torch.tensor(case.slots, device=device), known=len(case.ranks)))
    nobody = torch.full((case.m,), -1, device=device)
    frozen = _call(case, given, Rows.of(nobody, known=len(case.ranks)))
    compare.assert_bitwise_equal("y", y[1], frozen[1])


def test_graph_replays_with_other_slots(device: torch.device) -> None:
    """A replay takes the slots, factors and scales that are in memory then; nothing is captured again."""
    case = WIDE[0]
    given = _on(device, make(case))
    slots = torch.tensor(case.slots, device=device)
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))

    def call() -> Tensor:
        return _call(case, given, Rows.of(slots, known=len(case.ranks)))

    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    for seed in range(20):
        other = torch.randint(-1, len(case.ranks), (case.m,), generator=torch.Generator().manual_seed(seed))
        slots.copy_(other)
        given.x.copy_(make(dataclasses.replace(case, slots=tuple(other.tolist())), seed).x)
        graph.replay()
        compare.assert_bitwise_equal("y", y, call())
