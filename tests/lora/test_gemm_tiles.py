"""Which tiles the Hopper GEMM cuts y into, and in which order its clusters take them."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.compiled import CSRC, UNDEFINED_BEHAVIOUR_FAILS, host_program

pytestmark = pytest.mark.cpu_only

TILE_ORDER_PROGRAM = r"""
#include <algorithm>
#include <cstdio>
#include <vector>

#include "lora/ORDER"

using peft_kernels::lora::TileIndex;
using peft_kernels::lora::TileOrder;

#define DEMAND(condition)                                                                              \
  if (!(condition)) {                                                                                  \
    std::printf("%s: %d x %d tiles, %d blocks\n", #condition, order.tiles_m, order.tiles_n, blocks);   \
    return 1;                                                                                          \
  }

int main() {
  int blocks = 0;
  for (int tiles_m = 1; tiles_m <= 40; ++tiles_m) {
    for (int tiles_n = 1; tiles_n <= 12; ++tiles_n) {
      const int group = tiles_n % 3 == 0 ? 8 : tiles_n % 3 == 1 ? 3 : 1;
      const TileOrder order = {tiles_m, tiles_n, group};
      std::vector<int> seen(tiles_m * tiles_n, 0), first(tiles_m, -1);
      std::vector<TileIndex> tiles;
      for (int64_t number = 0; number < order.count(); ++number) {
        const TileIndex tile = order.at(number);
        DEMAND(tile.m >= 0 && tile.m < tiles_m && tile.n >= 0 && tile.n < tiles_n);
        DEMAND(seen[tile.m * tiles_n + tile.n]++ == 0);
        if (tile.n == 0) {
          first[tile.m] = static_cast<int>(number);
        }
        DEMAND(first[tile.m] >= 0);
        // From the second group on, S is made a whole group's rest before it is needed.
        const int rest = group * (tiles_n - 1);
        DEMAND(tile.n == 0 || tile.m < group || number - first[tile.m] >= rest);
        tiles.push_back(tile);
      }
      // Clusters in lockstep, each stuck where it waits: everybody gets through, however many blocks there are.
      for (blocks = 1; blocks <= static_cast<int>(tiles.size()) + 1 && blocks <= 140; ++blocks) {
        std::vector<size_t> at(blocks);
        std::vector<bool> raised(tiles_m, false);
        size_t done = 0;
        for (int block = 0; block < blocks; ++block) {
          at[block] = block;
        }
        for (bool moved = true; moved;) {
          moved = false;
          for (int block = blocks - 1; block >= 0; --block) {
            if (at[block] < tiles.size() && (tiles[at[block]].n == 0 || raised[tiles[at[block]].m])) {
              raised[tiles[at[block]].m] = raised[tiles[at[block]].m] || tiles[at[block]].n == 0;
              at[block] += blocks;
              ++done;
              moved = true;
            }
          }
        }
        DEMAND(done == tiles.size());
      }
    }
  }
  // Numbers past 2^31.
  const TileOrder order = {1 << 20, 1 << 12, 8};
  const TileIndex last = order.at(order.count() - 1);
  DEMAND(last.m == (1 << 20) - 1 && last.n == (1 << 12) - 1);
  return 0;
}
"""


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("", "", None),
        ("return {static_cast<int>(number), 0};", "return {static_cast<int>(number), tiles_n - 1};", "first"),
        ("1 + static_cast<int>(inside / rows)", "static_cast<int>(inside / rows)", "seen"),
        ("last > 0 ? last - 1 : 0", "last", "seen|tile.m"),
    ],
    ids=["right", "tile n = 0 late", "a tile twice", "the last group alone"],
)
def test_tile_order(tmp_path: Path, old: str, new: str, complaint: str | None) -> None:
    """Each tile once, the tile n = 0 of a row block first and early, no deadlock for any number of blocks."""
    header = (CSRC / "lora" / "tile_order.h").read_text()
    assert old in header
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "changed.h").write_text(header.replace(old, new) if old else header)
    source = TILE_ORDER_PROGRAM.replace("ORDER", "changed.h", 1)
    program = host_program(tmp_path, source, *UNDEFINED_BEHAVIOUR_FAILS)
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    if complaint is None:
        assert result.returncode == 0, result.stdout + result.stderr
    else:
        assert result.returncode != 0 and re.search(complaint, result.stdout), result.stdout + result.stderr


SHAPE_PROGRAM = r"""
#include <cstdio>
#include <cstdlib>

#include "lora/gemm_sm90_shape.h"

using namespace peft_kernels::lora;

int main(int, char** argv) {
  const auto number = [&](int i) { return std::atoll(argv[i]); };
  const GemmShape shape = gemm_shape(number(1), number(2), number(3), 256, kGemmNarrow, static_cast<int>(number(4)));
  std::printf("%d %d %d %f\n", shape.block_n, shape.cluster, shape.group_rows,
              gemm_busy(number(1), number(2), shape, static_cast<int>(number(4))));
}
"""


class Shape(NamedTuple):
    block_n: int
    cluster: int
    group_rows: int
    busy: float


@pytest.fixture(scope="module")
def shape_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Shape]:
    program = host_program(tmp_path_factory.mktemp("shape"), SHAPE_PROGRAM, *UNDEFINED_BEHAVIOUR_FAILS)

    def call(m: int, n: int, k: int, multiprocessors: int = 132) -> Shape:
        sizes = map(str, (m, n, k, multiprocessors))
        text = subprocess.run([program, *sizes], capture_output=True, text=True, check=True).stdout.split()
        return Shape(*map(int, text[:3]), busy=float(text[3]))

    return call


@pytest.mark.parametrize(
    ("m", "n", "block_n", "cluster"),
    [
        (8192, 4096, 256, 2),
        (4096, 14336, 256, 2),
        (1024, 4096, 256, 2),  # 64 clusters of 66
        (512, 4096, 128, 2),  # 32 clusters of wide tiles
        (128, 4096, 128, 1),  # one row block has no mate
        (128, 128256, 256, 1),
        (17, 4096, 128, 1),
    ],
)
def test_shape(shape_of: Callable[..., Shape], m: int, n: int, block_n: int, cluster: int) -> None:
    assert shape_of(m, n, 4096)[:2] == (block_n, cluster)


def test_narrow_tiles_where_wide_ones_are_few(shape_of: Callable[..., Shape]) -> None:
    for m in range(160, 2049, 32):
        chosen, wide_tiles = shape_of(m, 4096, 4096), -(-m // 128) * 16
        if wide_tiles <= 66:
            assert chosen.block_n == 128, (m, chosen)
        if 120 <= wide_tiles <= 132:
            assert chosen.block_n == 256, (m, chosen)
        assert 0.0 < chosen.busy <= 1.0


@pytest.mark.parametrize(("m", "n", "multiprocessors"), [(8192, 4096, 132), (2048, 8192, 132), (4096, 4096, 78)])
def test_order_reads_little(
    shape_of: Callable[..., Shape], tmp_path: Path, m: int, n: int, multiprocessors: int
) -> None:
    """A host model of a launch: rows of x and columns of W that each wave of clusters brings into L2, if nothing of the
    wave before is left there, and those that blocks take out of it, where a multicast counts once."""
    chosen = shape_of(m, n, 4096, multiprocessors)
    program = host_program(tmp_path, TRAFFIC_PROGRAM, *UNDEFINED_BEHAVIOUR_FAILS)

    def traffic(group: int) -> tuple[float, float]:
        sizes = map(str, (m, n, chosen.block_n, chosen.cluster, group, multiprocessors))
        into, out_of = subprocess.run([program, *sizes], capture_output=True, text=True, check=True).stdout.split()
        return float(into), float(out_of)

    groups = range(1, m // 128 // chosen.cluster + 1)
    best = min(traffic(group)[0] for group in groups)
    into, out_of = traffic(chosen.group_rows)
    assert into <= 1.1 * best
    assert chosen.cluster == 2
    assert out_of == m // 128 * (n // chosen.block_n) * (128 + chosen.block_n / 2)


# Rows of x and columns of W, each K long: into L2 wave by wave, and out of it into blocks.
TRAFFIC_PROGRAM = r"""
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <set>

#include "lora/tile_order.h"

using namespace peft_kernels::lora;

int main(int, char** argv) {
  const auto number = [&](int i) { return std::atoi(argv[i]); };
  const int block_n = number(3), cluster = number(4), wave = number(6) / cluster;
  const TileOrder order = {number(1) / 128 / cluster, number(2) / block_n, number(5)};
  double into = 0.0, out_of = 0.0;
  for (int64_t first = 0; first < order.count(); first += wave) {
    std::set<int> rows, cols;
    for (int64_t i = first; i < std::min(order.count(), first + wave); ++i) {
      rows.insert(order.at(i).m);
      cols.insert(order.at(i).n);
      out_of += cluster * 128 + block_n;
    }
    into += static_cast<double>(rows.size()) * cluster * 128 + static_cast<double>(cols.size()) * block_n;
  }
  std::printf("%f %f\n", into, out_of);
}
"""
