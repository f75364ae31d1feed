"""What of csrc/lora a host compiler can test: the mask's recipe, bit for bit that of the oracle."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from peft_kernels.lora.kernels import dropout
from python_ref import lora as oracle
from tests.compiled import host_program

PROGRAM = """
#include <cstdio>
#include <cstdlib>

#include "lora/dropout.h"

// Arguments: seed, first row, rows, cols, threshold. Prints a row of 0 and 1 a line.
int main(int, char** argv) {
  using namespace peft_kernels::lora;
  const int64_t seed = std::atoll(argv[1]), first = std::atoll(argv[2]), rows = std::atoll(argv[3]);
  const int64_t cols = std::atoll(argv[4]);
  const uint32_t threshold = static_cast<uint32_t>(std::atoll(argv[5]));
  for (int64_t row = first; row < first + rows; ++row) {
    for (int64_t col = 0; col < cols; ++col) {
      const Words draws = draw(seed, row, static_cast<uint32_t>(col / kDecisionsPerCall));
      std::putchar(keep(draws, static_cast<int>(col % kDecisionsPerCall), threshold) ? '1' : '0');
    }
    std::putchar('\\n');
  }
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return host_program(tmp_path_factory.mktemp("dropout"), PROGRAM)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 20240229])
@pytest.mark.parametrize("first", [0, 2**32 - 2])
def test_mask(program: Path, seed: int, first: int) -> None:
    """Rows on both sides of 2^32, where the counter's high word sets in."""
    rows, cols, p = 4, 21, 0.3
    arguments = [str(number) for number in (seed, first, rows, cols, dropout.threshold(p))]
    printed = subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout
    got = torch.tensor([[char == "1" for char in line] for line in printed.splitlines()])
    assert torch.equal(got, dropout.keep_bits(torch.tensor(seed), first, rows, cols, dropout.threshold(p)) != 0)
    if first == 0:
        assert torch.equal(got, oracle.dropout_mask(seed, rows, cols, p))
