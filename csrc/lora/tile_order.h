// In which order the persistent blocks of gemm_sm90 take the output's tiles. Plain C++ for host and device, so that a
// host compiler alone can test it.
//
// Tiles are numbered; block i of G takes tiles i, i + G, i + 2 G, ... Row blocks of tiles form groups of kGroup, whose
// tiles run together, so that their rows of x and a few columns of W stay in L2. The tile n = 0 of a row block makes S
// for the others, which need it at their end; it takes longer than they do, so the tiles n = 0 of a group come one
// group earlier:
//
//     first(0), first(1), rest(0), first(2), rest(1), ..., first(last), rest(last - 1), rest(last)
//
// with first(g) the tiles n = 0 of group g and rest(g) its others, both down the rows first.
//
// Why nobody waits forever: the tile n = 0 of a row block has a lower number than the row block's other tiles, the only
// ones that wait for it, and it waits for no tile. All G blocks run at the same time (a cooperative launch) and take
// their tiles in the order of their numbers. Suppose some tiles are never finished, and let t be the lowest. Its block
// has finished all of its tiles before t, which have lower numbers, so it is at t. If t is a tile n = 0 it waits for
// nobody and finishes. Else it waits at most for the flags of a tile with a lower number, which is finished, so its
// flags are set, and t finishes too: there is no such t. Within a block the argument holds for every step of a tile:
// the producer waits for slots whose last use is an earlier step, the consumers for copies that were started, and the
// producer waits for a flag only after it has started all copies that the steps before the wait need.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define PEFT_KERNELS_TILE_ORDER __host__ __device__ __forceinline__
#else
#define PEFT_KERNELS_TILE_ORDER inline
#endif

namespace peft_kernels::lora {

struct TileIndex {
  int m;
  int n;
};

struct TileOrder {
  static constexpr int kGroup = 8;

  int tiles_m;
  int tiles_n;

  PEFT_KERNELS_TILE_ORDER int64_t count() const { return static_cast<int64_t>(tiles_m) * tiles_n; }

  PEFT_KERNELS_TILE_ORDER TileIndex at(int64_t number) const {
    const int last = (tiles_m - 1) / kGroup;
    if (number < rows_of(0)) {
      return {static_cast<int>(number), 0};
    }
    // first(g + 1), rest(g) is as long as group g for every g before the last but one.
    const int64_t behind = number - rows_of(0);
    const int64_t group_tiles = static_cast<int64_t>(kGroup) * tiles_n;
    const int group = static_cast<int>(min_of(behind / group_tiles, last > 0 ? last - 1 : 0));
    int64_t inside = behind - group * group_tiles;
    if (group < last) {
      const int next_rows = rows_of(group + 1);
      if (inside < next_rows) {
        return {(group + 1) * kGroup + static_cast<int>(inside), 0};
      }
      inside -= next_rows;
      const int64_t rest = static_cast<int64_t>(kGroup) * (tiles_n - 1);
      if (inside < rest) {
        return rest_tile(group, inside);
      }
      inside -= rest;
    }
    return rest_tile(last, inside);
  }

 private:
  PEFT_KERNELS_TILE_ORDER static int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

  PEFT_KERNELS_TILE_ORDER int rows_of(int group) const {
    return static_cast<int>(min_of(kGroup, tiles_m - group * kGroup));
  }

  PEFT_KERNELS_TILE_ORDER TileIndex rest_tile(int group, int64_t inside) const {
    const int rows = rows_of(group);
    return {group * kGroup + static_cast<int>(inside % rows), 1 + static_cast<int>(inside / rows)};
  }
};

}  // namespace peft_kernels::lora
