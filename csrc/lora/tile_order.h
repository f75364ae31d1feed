// In which order the persistent blocks of gemm_sm90 take the output's tiles. Plain C++ for host and device, so that a
// host compiler alone can test it.
//
// A cluster of one or two blocks takes the same column of one or two neighbouring row blocks at a time, a tile each:
// what is numbered are these units, (row unit, column). Cluster i of G takes units i, i + G, i + 2 G, ... Where the row
// blocks are odd in number, the last row unit has a ghost below it, which lies past the end of y: it is read as zeros
// and not written, and needs no rule of its own.
//
// Row units form groups, whose tiles run together, so that their rows of x and a few columns of W stay in L2. The tile
// n = 0 of a row block makes S for the others, which need it at their end; it takes longer than they do, so the units
// n = 0 of a group come one group earlier:
//
//     first(0), first(1), rest(0), first(2), rest(1), ..., first(last), rest(last - 1), rest(last)
//
// with first(g) the units n = 0 of group g and rest(g) its others, both down the rows first.
//
// Why nobody waits forever: the unit n = 0 of a row unit has a lower number than the row unit's other units, the only
// ones that wait for its flags, and it waits for no flag. All G clusters run at the same time (a cooperative launch)
// and both blocks of a cluster take its units in the order of their numbers. Suppose some units are never finished by
// all blocks of their cluster, and let u be the lowest. Both blocks have finished all of their units before u, which
// have lower numbers, so all flags of units below u are raised, and those are the only ones that a block waits for in
// u. Take the steps of u in their order, and a step whose predecessors are done in both blocks. The producer of either
// block starts its copies for the step, those for both blocks among them, once the slot is free in both, whose last use
// is an earlier step or unit; whatever it waits for in between are flags that are raised. A producer that is ahead, in
// a later unit, has started all copies of u. So the step's copies arrive in both blocks, and their consumers, who wait
// for nothing else, finish the step; so they finish u, and there is no such u. What a producer waits for before it
// loads down, that y of the unit before has left, happens without it once that unit's steps are done.
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
  int tiles_m;  // row units
  int tiles_n;
  int group_rows;  // row units of a group

  PEFT_KERNELS_TILE_ORDER int64_t count() const { return static_cast<int64_t>(tiles_m) * tiles_n; }

  PEFT_KERNELS_TILE_ORDER TileIndex at(int64_t number) const {
    const int last = (tiles_m - 1) / group_rows;
    if (number < rows_of(0)) {
      return {static_cast<int>(number), 0};
    }
    // first(g + 1), rest(g) is as long as group g for every g before the last but one.
    const int64_t behind = number - rows_of(0);
    const int64_t group_tiles = static_cast<int64_t>(group_rows) * tiles_n;
    const int group = static_cast<int>(min_of(behind / group_tiles, last > 0 ? last - 1 : 0));
    int64_t inside = behind - group * group_tiles;
    if (group < last) {
      const int next_rows = rows_of(group + 1);
      if (inside < next_rows) {
        return {(group + 1) * group_rows + static_cast<int>(inside), 0};
      }
      inside -= next_rows;
      const int64_t rest = static_cast<int64_t>(group_rows) * (tiles_n - 1);
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
    return static_cast<int>(min_of(group_rows, tiles_m - group * group_rows));
  }

  PEFT_KERNELS_TILE_ORDER TileIndex rest_tile(int group, int64_t inside) const {
    const int rows = rows_of(group);
    return {group * group_rows + static_cast<int>(inside % rows), 1 + static_cast<int>(inside / rows)};
  }
};

}  // namespace peft_kernels::lora
