// What      a bottleneck adapter's forward pass in one pass over x, on Hopper
// Equation  z = x Wd^T + bd;  y = residual + s (act(z) Wu^T + bu)     (Houlsby et al. 2019, arXiv:1902.00751)
// Tensors   x (M, K), Wd (r, K), Wu (N, r), residual (M, N): contiguous rows that start at multiples of 16 bytes;
//           bd (r,), bu (N,); z (M, r) float32 and y (M, N), contiguous
// Tiles     a cluster owns 64 rows; a CTA of it owns a run of 64-column chunks of x and y, and 64 / cluster rows of z
// Bound     x in, y and z out, and the residual in where it is not x; 4 r M K flops
// Refused   by the launcher: r > 128; K or N no multiple of 8, or beyond the cluster's shared memory
#pragma once

#include <cstdint>

#include "adapter/activations.h"
#include "adapter/forward_sm90_config.h"
#include "core/sm90/barrier.cuh"
#include "core/sm90/cluster.cuh"
#include "core/sm90/memory.cuh"
#include "core/sm90/tma.cuh"
#include "core/sm90/wgmma.cuh"
#include "core/sm90/wgmma_registers.cuh"

namespace peft_kernels::adapter {

// TMA's tensor maps, all of them with boxes of 64 columns and the 128-byte swizzle. What lies beyond a
// matrix is read as zero and never written: the tails of M, N, K and r need no other mask.
struct ForwardMaps {
  sm90::TensorMap x;            // boxes of kBlockM rows
  sm90::TensorMap down_weight;  // of kRank rows
  sm90::TensorMap up_weight;    // of kBlockC rows
  sm90::TensorMap residual;     // of kBlockM rows; made only where `loads_residual`
  sm90::TensorMap y;            // of kBlockM rows
};

// The kernel's other arguments.
struct ForwardArguments {
  const uint16_t* gDownBias;  // (r,) of the half-precision type, or null
  const uint16_t* gUpBias;    // (N,), or null
  const float* gScale;        // 0-d, or null: then `scale` counts
  float* gZ;                  // (M, r)
  int m;
  int n;
  int k;
  int r;
  float scale;
  bool adds_residual;   // x, or another tensor:
  bool loads_residual;  // it is another tensor
  Activation activation;
};

// One CTA: what it owns, and where its shared memory has what.
template <int kRank>
struct Cta {
  using Plan = ForwardPlan<kRank>;

  uint8_t* shared;
  int slots;
  int row;  // the first of the cluster's rows
  int rank;
  int cluster;
  int thread;
  Slice in;   // its chunks of x
  Slice out;  // its chunks of y

  // Tiles of weights in the order of their use: a chunk of Wd for each of x, then one of Wu for each of y.
  PEFT_KERNELS_DEVICE int tiles() const { return in.count + out.count; }
  PEFT_KERNELS_DEVICE uint8_t* sWeights(int tile) const {
    return shared + Plan::kStagesAt + tile % kStages * Plan::kStageBytes;
  }
  PEFT_KERNELS_DEVICE uint8_t* sSlot(int slot) const { return shared + Plan::slot_at(slot); }
  PEFT_KERNELS_DEVICE uint8_t* sHidden() const { return shared + Plan::kHiddenAt; }
  PEFT_KERNELS_DEVICE float* sPartial() const { return reinterpret_cast<float*>(shared + Plan::kPartialAt); }

  PEFT_KERNELS_DEVICE uint64_t* barriers() const {
    return reinterpret_cast<uint64_t*>(shared + Plan::barriers_at(slots));
  }
  PEFT_KERNELS_DEVICE uint64_t* w_full(int tile) const { return barriers() + tile % kStages; }
  PEFT_KERNELS_DEVICE uint64_t* slot_full(int slot) const { return barriers() + kStages + slot; }
};

// Order the accesses of all threads of the CTA.
PEFT_KERNELS_DEVICE void sync_cta() {
  sm90::named_barrier_sync(1, kThreads);
}

template <sm90::HalfType kType>
PEFT_KERNELS_DEVICE float load_half(const uint16_t* gValue) {
  return sm90::unpack_halves<kType>(*gValue).x;
}

template <int kRank>
PEFT_KERNELS_DEVICE void init_barriers(const Cta<kRank>& cta) {
  if (cta.thread == 0) {
    for (int i = 0; i < kStages + cta.slots; ++i) {
      sm90::barrier_init(cta.barriers() + i, 1);
    }
    sm90::fence_barrier_init();
  }
  sync_cta();
}

// One thread: load chunks of a matrix with the cluster's rows into the slots.
template <int kRank>
PEFT_KERNELS_DEVICE void load_chunks(const Cta<kRank>& cta, const sm90::TensorMap* map, Slice chunks) {
  for (int i = 0; i < chunks.count; ++i) {
    sm90::barrier_expect(cta.slot_full(i), kChunkBytes);
    sm90::tma_load(cta.sSlot(i), map, cta.slot_full(i), cta.row, (chunks.first + i) * kBlockC);
  }
}

// One thread: load a tile of weights, if there is one of this number, into its stage, which nobody reads any more.
template <int kRank>
PEFT_KERNELS_DEVICE void load_weights(const Cta<kRank>& cta, const ForwardMaps& maps, int tile) {
  if (tile >= cta.tiles()) {
    return;
  }
  uint8_t* sWeights = cta.sWeights(tile);
  uint64_t* w_full = cta.w_full(tile);
  sm90::barrier_expect(w_full, ForwardPlan<kRank>::kStageBytes);
  if (tile < cta.in.count) {
    sm90::tma_load(sWeights, &maps.down_weight, w_full, 0, (cta.in.first + tile) * kBlockC);
  } else {
    const int row = (cta.out.first + tile - cta.in.count) * kBlockC;
#pragma unroll
    for (int col = 0; col < kRank; col += kBlockC) {
      sm90::tma_load(sWeights + col / kBlockC * kChunkBytes, &maps.up_weight, w_full, row, col);
    }
  }
}

template <int kRank>
PEFT_KERNELS_DEVICE void wait_for_weights(const Cta<kRank>& cta, int tile) {
  sm90::barrier_wait(cta.w_full(tile), tile / kStages % 2);
}

// Multiply the CTA's columns of x and Wd: its part of x Wd^T, (kBlockM, kRank) over the warpgroup's registers.
template <sm90::HalfType kType, int kRank>
PEFT_KERNELS_DEVICE void multiply_down(const Cta<kRank>& cta, const ForwardMaps& maps, float (&rPartial)[kRank / 2]) {
#pragma unroll
  for (int i = 0; i < kRank / 2; ++i) {
    rPartial[i] = 0.0f;
  }
  for (int chunk = 0; chunk < cta.in.count; ++chunk) {
    sm90::barrier_wait(cta.slot_full(chunk), 0);
    wait_for_weights(cta, chunk);
    const uint64_t x = sm90::operand_descriptor(sm90::shared_address(cta.sSlot(chunk)), kRowBytes);
    const uint64_t weights = sm90::operand_descriptor(sm90::shared_address(cta.sWeights(chunk)), kRowBytes);
    sm90::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kBlockC / kDepth; ++k) {
      sm90::wgmma<kType, kRank, false>(rPartial, x + k * kDescriptorStep, weights + k * kDescriptorStep, true);
    }
    sm90::wgmma_commit();
    // While these products run, the stage of those before is free once all four warps have finished them.
    if (chunk > 0) {
      sm90::wgmma_wait<1>();
      sync_cta();
      if (cta.thread == 0) {
        load_weights(cta, maps, chunk - 1 + kStages);
      }
    }
  }
  sm90::wgmma_wait<0>();
  sm90::wgmma_results(rPartial);
}

template <int kRank>
PEFT_KERNELS_DEVICE void store_partial(const Cta<kRank>& cta, const float (&rPartial)[kRank / 2]) {
  const Fragment at = fragment_of(cta.thread);
#pragma unroll
  for (int i = 0; i < kRank / 2; i += 2) {
    const int row = at.row + 8 * (i / 2 % 2), col = at.col + 8 * (i / 4);
    *reinterpret_cast<float2*>(cta.sPartial() + partial_offset<kRank>(row, col)) =
        make_float2(rPartial[i], rPartial[i + 1]);
  }
}

// Sum this CTA's rows of the cluster's partial products, in the order of the ranks; make z and h of them; write z out
// and h into the shared memory of every CTA.
template <sm90::HalfType kType, int kRank>
PEFT_KERNELS_DEVICE void make_hidden(const Cta<kRank>& cta, const ForwardArguments& args) {
  constexpr int kQuads = kRank / 4;  // of a row
  const int rows = kBlockM / cta.cluster;
  for (int quad = cta.thread; quad < rows * kQuads; quad += kThreads) {
    const int row = cta.rank * rows + quad / kQuads, col = quad % kQuads * 4;
    float4 rParts[kMaxCluster];
#pragma unroll
    for (int rank = 0; rank < kMaxCluster; ++rank) {
      if (rank < cta.cluster) {
        const float* sPeer = sm90::map_shared_rank(cta.sPartial() + partial_offset<kRank>(row, col), rank);
        rParts[rank] = *reinterpret_cast<const float4*>(sPeer);
      }
    }
    float rZ[4] = {rParts[0].x, rParts[0].y, rParts[0].z, rParts[0].w};
#pragma unroll
    for (int rank = 1; rank < kMaxCluster; ++rank) {
      if (rank < cta.cluster) {
        rZ[0] += rParts[rank].x;
        rZ[1] += rParts[rank].y;
        rZ[2] += rParts[rank].z;
        rZ[3] += rParts[rank].w;
      }
    }
    float rHidden[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // What a column beyond r holds meets a zero of Wu, and must be zero where an infinite x made it nan.
      rHidden[i] = 0.0f;
      if (col + i < args.r) {
        rZ[i] += args.gDownBias == nullptr ? 0.0f : load_half<kType>(args.gDownBias + col + i);
        rHidden[i] = activate(rZ[i], args.activation);
        if (cta.row + row < args.m) {
          args.gZ[static_cast<int64_t>(cta.row + row) * args.r + col + i] = rZ[i];
        }
      }
    }
    const uint2 words =
        make_uint2(sm90::pack_halves<kType>(rHidden[0], rHidden[1]), sm90::pack_halves<kType>(rHidden[2], rHidden[3]));
    for (int rank = 0; rank < cta.cluster; ++rank) {
      *reinterpret_cast<uint2*>(sm90::map_shared_rank(cta.sHidden() + tile_offset(row, col), rank)) = words;
    }
  }
}

// h as operands of the second product: four words for 16 of its columns.
template <int kRank>
PEFT_KERNELS_DEVICE void load_hidden(const Cta<kRank>& cta, uint32_t (&rHidden)[kRank / kDepth][4]) {
  const Fragment at = fragment_of(cta.thread);
#pragma unroll
  for (int k = 0; k < kRank / kDepth; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = at.row + i % 2 * 8, col = k * kDepth + at.col + i / 2 * 8;
      rHidden[k][i] = *reinterpret_cast<const uint32_t*>(cta.sHidden() + tile_offset(row, col));
    }
  }
}

// Start the products of h with a chunk of Wu: (kBlockM, kBlockC) over the warpgroup's registers.
template <sm90::HalfType kType, int kRank>
PEFT_KERNELS_DEVICE void multiply_up(const Cta<kRank>& cta,
                                     int tile,
                                     const uint32_t (&rHidden)[kRank / kDepth][4],
                                     float (&rBranch)[kBlockC / 2]) {
  wait_for_weights(cta, tile);
  const uint32_t weights = sm90::shared_address(cta.sWeights(tile));
  sm90::wgmma_fence();
#pragma unroll
  for (int k = 0; k < kRank / kDepth; ++k) {
    const int half = k * kDepth / kBlockC;
    const uint64_t tile_half = sm90::operand_descriptor(weights + half * kChunkBytes, kRowBytes);
    sm90::wgmma_registers<kType>(rBranch, rHidden[k], tile_half + k % (kBlockC / kDepth) * kDescriptorStep, k > 0);
  }
  sm90::wgmma_commit();
}

template <sm90::HalfType kType>
PEFT_KERNELS_DEVICE void load_up_bias(const ForwardArguments& args, int first, float2 (&rBias)[kBlockC / 8]) {
#pragma unroll
  for (int i = 0; i < kBlockC / 8; ++i) {
    const int col = first + 8 * i;
    rBias[i] = make_float2(0.0f, 0.0f);
    // N is even, and so is the column.
    if (args.gUpBias != nullptr && col < args.n) {
      rBias[i] = make_float2(load_half<kType>(args.gUpBias + col), load_half<kType>(args.gUpBias + col + 1));
    }
  }
}

// Turn a slot from a chunk of the residual into one of y. A thread reads what it overwrites, and nothing else.
template <sm90::HalfType kType>
PEFT_KERNELS_DEVICE void add_branch(uint8_t* sSlot,
                                    Fragment at,
                                    const float (&rBranch)[kBlockC / 2],
                                    const float2 (&rBias)[kBlockC / 8],
                                    float scale,
                                    bool adds_residual) {
#pragma unroll
  for (int i = 0; i < kBlockC / 2; i += 2) {
    uint8_t* sPair = sSlot + tile_offset(at.row + 8 * (i / 2 % 2), at.col + 8 * (i / 4));
    float2 sum =
        adds_residual ? sm90::unpack_halves<kType>(*reinterpret_cast<const uint32_t*>(sPair)) : make_float2(0.0f, 0.0f);
    sum.x += scale * (rBranch[i] + rBias[i / 4].x);
    sum.y += scale * (rBranch[i + 1] + rBias[i / 4].y);
    sm90::store_shared(sm90::shared_address(sPair), sm90::pack_halves<kType>(sum.x, sum.y));
  }
}

// Make and store the CTA's chunks of y.
template <sm90::HalfType kType, int kRank>
PEFT_KERNELS_DEVICE void write_chunks(const Cta<kRank>& cta, const ForwardMaps& maps, const ForwardArguments& args) {
  const Fragment at = fragment_of(cta.thread);
  const float scale = args.gScale == nullptr ? args.scale : *args.gScale;
  uint32_t rHidden[kRank / kDepth][4];
  load_hidden(cta, rHidden);
  for (int chunk = 0; chunk < cta.out.count; ++chunk) {
    const int tile = cta.in.count + chunk, col = (cta.out.first + chunk) * kBlockC;
    float rBranch[kBlockC / 2];
    multiply_up<kType>(cta, tile, rHidden, rBranch);
    float2 rBias[kBlockC / 8];
    load_up_bias<kType>(args, col + at.col, rBias);
    if (args.loads_residual) {
      // The slot's first phase was a chunk of x, if it had one.
      sm90::barrier_wait(cta.slot_full(chunk), chunk < cta.in.count ? 1 : 0);
    }
    sm90::wgmma_wait<0>();
    sm90::wgmma_results(rBranch);
    add_branch<kType>(cta.sSlot(chunk), at, rBranch, rBias, scale, args.adds_residual);
    // Publishes this thread's part of the chunk to TMA, which the sync below lets run.
    sm90::fence_async_shared();
    sync_cta();
    if (cta.thread == 0) {
      sm90::tma_store(&maps.y, cta.sSlot(chunk), cta.row, col);
      sm90::tma_store_commit();
      load_weights(cta, maps, tile + kStages);
    }
  }
}

// The whole of a CTA's work; `shared` is aligned to kTileAlign.
template <sm90::HalfType kType, int kRank>
PEFT_KERNELS_DEVICE void forward_cta(uint8_t* shared, const ForwardMaps& maps, const ForwardArguments& args) {
  const int cluster = static_cast<int>(sm90::cluster_size()), rank = static_cast<int>(sm90::cluster_rank());
  const Cta<kRank> cta{shared,
                       slots_of(args.k, args.n, cluster),
                       static_cast<int>(blockIdx.x) / cluster * kBlockM,
                       rank,
                       cluster,
                       static_cast<int>(threadIdx.x),
                       slice_of(args.k, cluster, rank),
                       slice_of(args.n, cluster, rank)};
  if (cta.thread == 0) {
    sm90::prefetch_tensor_map(&maps.x);
    sm90::prefetch_tensor_map(&maps.down_weight);
    sm90::prefetch_tensor_map(&maps.up_weight);
    sm90::prefetch_tensor_map(&maps.y);
  }
  init_barriers(cta);
  if (cta.thread == 0) {
    load_chunks(cta, &maps.x, cta.in);
    for (int tile = 0; tile < kStages; ++tile) {
      load_weights(cta, maps, tile);
    }
  }
  {
    float rPartial[kRank / 2];
    multiply_down<kType>(cta, maps, rPartial);
    store_partial(cta, rPartial);
  }
  // Every CTA's partial product is there for all of them; and, within this one, all warps are done with x's chunks and
  // with the last tile of Wd.
  sm90::cluster_sync();
  if (cta.thread == 0) {
    if (cta.in.count > 0) {
      load_weights(cta, maps, cta.in.count - 1 + kStages);
    }
    if (args.loads_residual) {
      load_chunks(cta, &maps.residual, cta.out);
    }
  }
  make_hidden<kType>(cta, args);
  // Every CTA has all of h; and nobody touches another's shared memory after this, so that each may exit.
  sm90::cluster_sync();
  write_chunks<kType>(cta, maps, args);
  // TMA still reads this CTA's shared memory.
  if (cta.thread == 0) {
    sm90::tma_store_wait<0>();
  }
}

}  // namespace peft_kernels::adapter
