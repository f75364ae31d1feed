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

// Arguments: seed, first row, rows, cols, threshold, lane. Prints a row of 0 and 1 a line.
int main(int, char** argv) {
  using namespace peft_kernels::lora;
  const int64_t seed = std::atoll(argv[1]), first = std::atoll(argv[2]), rows = std::atoll(argv[3]);
  const int64_t cols = std::atoll(argv[4]);
  const uint32_t threshold = static_cast<uint32_t>(std::atoll(argv[5]));
  const uint32_t lane = static_cast<uint32_t>(std::atoll(argv[6]));
  for (int64_t row = first; row < first + rows; ++row) {
    for (int64_t col = 0; col < cols; ++col) {
      const Words draws = draw(seed, row, static_cast<uint32_t>(col / kDecisionsPerCall), lane);
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
@pytest.mark.parametrize("lane", [0, 5, 2**32 - 1])
def test_mask(program: Path, seed: int, first: int, lane: int) -> None:
    """Rows on both sides of 2^32, where the counter's high word sets in."""
    rows, cols, p = 4, 21, 0.3
    limit = dropout.threshold(p)
    arguments = [str(number) for number in (seed, first, rows, cols, limit, lane)]
    printed = subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout
    got = torch.tensor([[char == "1" for char in line] for line in printed.splitlines()])
    assert torch.equal(got, dropout.keep_bits(torch.tensor(seed), first, rows, cols, limit, lane) != 0)
    if first == 0:
        assert torch.equal(got, oracle.dropout_mask(seed, rows, cols, p, lane))


# Every function at every level on memory that ends where its tensors end; values are of no interest.
ON_EVERY_LEVEL = """
#include <cstdio>
#include <vector>

#include "lora/dropout_host.cpp"

using namespace peft_kernels::lora::host;

int main(int, char** argv) {
  const int64_t rows = std::atoll(argv[1]), cols = std::atoll(argv[2]), seed = 42;
  const int threads = std::atoi(argv[3]);
  const Element elements[] = {Element::kBfloat16, Element::kFloat16, Element::kFloat32, Element::kFloat64};
  for (const auto& level : names_of(Level{})) {
    if (!has_level(level.value)) {
      continue;
    }
    const Mask mask{&seed, 7, rows, cols, 30000, 3, threads, level.value};
    std::vector<uint8_t> kept(rows * cols);
    keep({mask, kept.data()});
    for (const Element from : elements) {
      for (const Element to : elements) {
        const bool is_half = from == Element::kBfloat16 || from == Element::kFloat16;
        if (from != to && !(is_half && to == Element::kFloat32)) {
          continue;
        }
        // The last row ends with its last element, not with its stride.
        std::vector<char> a(size_of(from) * (rows * (cols + 3) - 3)), b(size_of(to) * rows * cols);
        for (const double factor : {1.0, 1.5}) {
          drop({mask, a.data(), b.data(), cols + 3, cols, factor, from, to});
          add_dropped({mask, a.data(), b.data(), cols + 3, cols, factor, from, to});
        }
      }
    }
  }
  std::puts("done");
}
"""


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "rows", "cols", "threads"),
    [("address,undefined", 3, 515, 1), ("address,undefined", 2, 1, 1), ("thread", 530, 1001, 3)],
)
def test_sanitizers_find_nothing(tmp_path: Path, flag: str, rows: int, cols: int, threads: int) -> None:
    """Neither a byte beside the tensors, nor one that two threads write."""
    size_of = (
        "size_t size_of(peft_kernels::lora::host::Element e) {\n"
        "  using peft_kernels::lora::host::Element;\n"
        "  return e == Element::kFloat64 ? 8 : e == Element::kFloat32 ? 4 : 2;\n}\n"
    )
    source = ON_EVERY_LEVEL.replace("using namespace", size_of + "using namespace", 1)
    flags = ("-O1", f"-fsanitize={flag}", "-fno-sanitize-recover=all", "-pthread")
    program = host_program(tmp_path, source, *flags)
    result = subprocess.run([program, str(rows), str(cols), str(threads)], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr[-2000:]
