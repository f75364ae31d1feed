"""What of csrc/adapter a host compiler alone can test: who owns what, where it lies, and the activations."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from peft_kernels.adapter.kernels import config
from peft_kernels.adapter.kernels.activations import ACTIVATIONS
from python_ref import adapter as oracle
from python_ref import compare
from tests.compiled import host_program

# Shared memory of a multiprocessor of compute capability 9.0, of which each block costs 1 KB more than it asks for:
# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
SHARED_OF_SM = 228 * 1024
BLOCK_COST = 1024
BANK_BYTES = 4
BANKS = 32

PROGRAM = r"""
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "adapter/activations.h"
#include "adapter/forward_sm90_config.h"

using namespace peft_kernels::adapter;

template <int kRank>
void print_plan(int slots) {
  using Plan = ForwardPlan<kRank>;
  std::printf("%d %d %d %d %d %d %d %d\n", Plan::kStagesAt, Plan::kHiddenAt, Plan::kPartialAt, Plan::kSlotsAt,
              Plan::slot_at(slots - 1), Plan::barriers_at(slots), Plan::bytes(slots), Plan::kMaxSlots);
}

int main(int, char** argv) {
  const auto number = [&](int i) { return std::atoi(argv[i]); };
  if (!std::strcmp(argv[1], "slices")) {
    for (int64_t columns = 8; columns <= 1200; columns += 8) {
      for (int rank = 0; rank < number(2); ++rank) {
        const Slice slice = slice_of(columns, number(2), rank);
        std::printf("%ld %d %d %d\n", static_cast<long>(columns), slots_of(columns, columns / 2, number(2)),
                    slice.first, slice.count);
      }
    }
  } else if (!std::strcmp(argv[1], "offsets")) {
    for (int row = 0; row < kBlockM; ++row) {
      for (int col = 0; col < number(2); ++col) {
        const int partial = number(2) == 64 ? partial_offset<64>(row, col) : partial_offset<128>(row, col);
        std::printf("%d %d\n", tile_offset(row, col), partial * 4);
      }
    }
  } else if (!std::strcmp(argv[1], "fragments")) {
    for (int thread = 0; thread < kThreads; ++thread) {
      std::printf("%d %d\n", fragment_of(thread).row, fragment_of(thread).col);
    }
  } else if (!std::strcmp(argv[1], "plan")) {
    number(2) == 64 ? print_plan<64>(number(3)) : print_plan<128>(number(3));
  } else if (!std::strcmp(argv[1], "names")) {
    for (const auto& entry : names_of(Activation{})) {
      std::puts(entry.name);
    }
  } else {
    const Activation activation = peft_kernels::value_of<Activation>(argv[2], "activation");
    float z;
    while (std::fread(&z, sizeof(z), 1, stdin) == 1) {
      const float h = activate(z, activation);
      std::fwrite(&h, sizeof(h), 1, stdout);
    }
  }
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return host_program(tmp_path_factory.mktemp("adapter"), PROGRAM)


def _numbers(program: Path, *arguments: object) -> list[tuple[int, ...]]:
    printed = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=True).stdout
    return [tuple(map(int, line.split())) for line in printed.splitlines()]


@pytest.mark.parametrize("cluster", [1, 2, 4, 8])
def test_slices_share_the_columns_out(program: Path, cluster: int) -> None:
    """Every chunk has one owner, owners follow each other, and none has more chunks than slots."""
    owned: dict[int, list[tuple[int, int, int]]] = {}
    for columns, slots, first, count in _numbers(program, "slices", cluster):
        owned.setdefault(columns, []).append((slots, first, count))
    assert len(owned) == 150
    for columns, slices in owned.items():
        chunks = [first + i for _, first, count in slices for i in range(count)]
        assert chunks == list(range(-(-columns // config.CUDA_BLOCK)))
        assert all(0 <= count <= slots for slots, _, count in slices)


@pytest.mark.parametrize("width", [64, 128])
def test_places_in_shared_memory(program: Path, width: int) -> None:
    """Each element has a place of its own, in the bytes that the plan gives them, and pieces stay together."""
    places = _numbers(program, "offsets", width)
    tile, partial = ([place[index] for place in places] for index in range(2))
    assert sorted(tile) == list(range(0, 64 * width * 2, 2))
    assert sorted(partial) == list(range(0, 64 * width * 4, 4))
    for start in range(0, len(places), 8):
        assert tile[start] % 16 == 0 and tile[start : start + 8] == list(range(tile[start], tile[start] + 16, 2))
    for start in range(0, len(places), 4):
        assert partial[start] % 16 == 0
        assert partial[start : start + 4] == list(range(partial[start], partial[start] + 16, 4))


@pytest.mark.parametrize("width", [64, 128])
def test_no_bank_is_met_twice(program: Path, width: int) -> None:
    """Pairs of y and words of h by a warp, pairs of partial sums by the half warp that one cycle serves."""
    places = _numbers(program, "offsets", width)
    lanes = _numbers(program, "fragments")

    def banks(kind: int, lane: int, down: int, right: int) -> set[int]:
        row, col = lanes[lane][0] + down, lanes[lane][1] + right
        size = 4 if kind == 0 else 8
        first = places[row * width + col][kind]
        return {byte // BANK_BYTES % BANKS for byte in range(first, first + size)}

    for kind, group in ((0, 32), (1, 16)):
        for first in range(0, 128, group):
            for down in (0, 8):
                for right in range(0, width, 8):
                    met = [banks(kind, lane, down, right) for lane in range(first, first + group)]
                    assert len(set().union(*met)) == sum(map(len, met)) == BANKS


def test_fragments_cover_a_product(program: Path) -> None:
    lanes = _numbers(program, "fragments")
    covered = [(row + 8 * (i // 2 % 2), col + 8 * (i // 4) + i % 2) for row, col in lanes for i in range(32)]
    assert sorted(covered) == [(row, col) for row in range(64) for col in range(64)]


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("slots", [1, 8, 16])
def test_shared_memory_plan(program: Path, width: int, slots: int) -> None:
    ((stages, hidden, partial, first, last, barriers, size, most),) = _numbers(program, "plan", width, slots)
    assert slots <= most
    assert hidden - stages == 3 * width * 128
    assert partial - hidden == 64 * width * 2
    assert first - partial == 64 * width * 4
    assert last - first == (slots - 1) * 8192
    assert barriers - last == 8192 and barriers % 8 == 0
    assert size - barriers == (3 + slots) * 8
    ((*_, largest, _),) = _numbers(program, "plan", width, most)
    assert largest <= SHARED_OF_SM - BLOCK_COST < largest + 8192 + 8


def test_two_blocks_share_a_multiprocessor_where_the_config_says_so(program: Path) -> None:
    """cuda_forward_config takes clusters that leave eight chunks a block, for this."""
    ((*_, size, _),) = _numbers(program, "plan", 64, 8)
    assert 2 * (size + BLOCK_COST) <= SHARED_OF_SM


def test_activations_are_those_of_python(program: Path) -> None:
    printed = subprocess.run([program, "names"], capture_output=True, text=True, check=True).stdout
    assert printed.split() == list(ACTIVATIONS)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation(program: Path, activation: str) -> None:
    """Values of every size, those beside zero on their own: there an error would not show beside the others."""
    generator = torch.Generator().manual_seed(0)
    functions = oracle.ACTIVATIONS[activation]
    for size in (1e-3, 1.0, 30.0):
        z = size * torch.randn(4096, generator=generator)
        got = _activated(program, activation, z)
        compare.assert_close(f"{activation} at {size}", got, functions.eager(z), functions.value(z.double()))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_of_what_is_not_finite(program: Path, activation: str) -> None:
    z = torch.tensor([torch.inf, -torch.inf, torch.nan])
    *got, of_nan = _activated(program, activation, z).tolist()
    assert of_nan != of_nan
    expected = oracle.ACTIVATIONS[activation].value(z[:2].double())
    torch.testing.assert_close(torch.tensor(got), expected.float(), rtol=0, atol=0, equal_nan=True)


def _activated(program: Path, activation: str, z: torch.Tensor) -> torch.Tensor:
    run = [program, "activate", activation]
    raw = subprocess.run(run, input=z.numpy().tobytes(), capture_output=True, check=True).stdout
    return torch.frombuffer(bytearray(raw), dtype=torch.float32)
