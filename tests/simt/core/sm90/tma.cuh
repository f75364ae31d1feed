// Twin of csrc/core/sm90/tma.cuh: boxes are copied element by element at a random later step, with the tensor's bounds,
// the zeros beyond them, and the swizzle over addresses of shared memory.
#pragma once

#include <cstdint>
#include <vector>

#include "core/sm90/arch.cuh"
#include "core/sm90/barrier.cuh"
#include "core/sm90/memory.cuh"

namespace peft_kernels::sm90 {

struct TensorMap {
  char* data = nullptr;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t stride = 0;  // elements
  int box_rows = 0;
  int box_cols = 0;

  int line_bytes() const { return 2 * box_cols; }
  size_t box_bytes() const { return static_cast<size_t>(box_rows) * static_cast<size_t>(line_bytes()); }

  // Element (row, col) of the tensor, or null beyond its edges.
  char* at(int64_t row, int64_t col) const {
    return row < 0 || col < 0 || row >= rows || col >= cols ? nullptr : data + 2 * (row * stride + col);
  }
};

// Where TMA keeps byte `offset` of a box that starts at `start`: bits 4 to 6 of the address are
// exclusive-ored with bits 7 to 9, as many of them as lines of this length have 16-byte chunks.
inline uint32_t tma_address(uint32_t start, int offset, int line_bytes) {
  const uint32_t plain = start + static_cast<uint32_t>(offset);
  const uint32_t bits = line_bytes == 128 ? 0x70 : line_bytes == 64 ? 0x30 : 0x10;
  return plain ^ (plain >> 3 & bits);
}

template <typename Visit>
void for_box(const TensorMap& map, char* shared, uint32_t start, int row, int col, Visit visit) {
  for (int i = 0; i < map.box_rows; ++i) {
    for (int j = 0; j < map.box_cols; ++j) {
      const uint32_t address = tma_address(start, i * map.line_bytes() + 2 * j, map.line_bytes());
      visit(shared + address, map.at(row + i, col + j));
    }
  }
}

inline uint32_t box_start(const TensorMap& map, const void* pointer) {
  const uint32_t start = simt::shared_address(pointer) & 0xFFFFFFu;
  if (start % 128 != 0 || start + map.box_bytes() > simt::g_machine->config().shared_bytes) {
    simt::fail("a copy's box must start at a multiple of 128 bytes and lie in the CTA's shared memory");
  }
  return start;
}

inline void prefetch_tensor_map(const TensorMap*) {}

inline void tma_load_to(simt::Cta& cta, const TensorMap* map, uint64_t* barrier, uint32_t start, int row, int col) {
  Mbarrier& state = mbarrier_at(cta, barrier);
  const auto end = start + static_cast<uint32_t>(map->box_bytes());
  cta.state<PendingReads>().check(start, end, "a TMA load");
  simt::defer("TMA load", [&cta, &state, map, start, end, row, col] {
    cta.state<PendingReads>().check(start, end, "a TMA load");
    const auto& unfenced_shared = cta.state<UnfencedShared>();
    const auto& unfenced_global = simt::g_machine->state<UnfencedGlobal>();
    for_box(*map, cta.shared, start, row, col, [&](char* shared, const char* global) {
      unfenced_shared.check(shared, 2, "a TMA load");
      if (global != nullptr) {
        unfenced_global.check(global, 2, "a TMA load");
        std::memcpy(shared, global, 2);
      } else {
        std::memset(shared, 0, 2);
      }
    });
    state.complete(static_cast<uint32_t>(map->box_bytes()));
  });
  simt::preempt("tma_load");
}

inline void tma_load(void* destination, const TensorMap* map, uint64_t* barrier, int row, int col) {
  tma_load_to(*simt::self().cta, map, barrier, box_start(*map, destination), row, col);
}

inline void tma_load_multicast(
    void* destination, const TensorMap* map, uint64_t* barrier, int row, int col, uint16_t ranks) {
  const uint32_t start = box_start(*map, destination);
  const uint32_t offset = simt::shared_address(barrier) & 0xFFFFFFu;
  for (uint32_t rank = 0; rank < simt::cluster_size(); ++rank) {
    if (ranks >> rank & 1) {
      auto* remote = static_cast<uint64_t*>(simt::shared_pointer(rank << 24 | offset));
      tma_load_to(*simt::self().cta->cluster->ctas[rank], map, remote, start, row, col);
    }
  }
}

// A thread's bulk groups: first their boxes are read, in order, then written.
struct BulkGroups {
  struct Store {
    const TensorMap* map;
    uint32_t start;
    int row, col;
    std::list<PendingReads::Range>::iterator read;
  };
  std::vector<Store> open;
  char reads, writes;  // their addresses order the two halves
};

inline void tma_store(const TensorMap* map, const void* source, int row, int col) {
  const uint32_t start = box_start(*map, source);
  auto& reads = simt::self().cta->state<PendingReads>();
  const auto read = reads.add(start, start + static_cast<uint32_t>(map->box_bytes()), "a TMA store");
  simt::self().state<BulkGroups>().open.push_back({map, start, row, col, read});
}

inline void tma_store_commit() {
  auto& groups = simt::self().state<BulkGroups>();
  simt::Cta& cta = *simt::self().cta;
  simt::defer(
      "TMA store",
      [&cta, &groups, stores = groups.open] {
        std::vector<std::pair<char*, uint16_t>> values;
        for (const auto& store : stores) {
          for_box(*store.map, cta.shared, store.start, store.row, store.col, [&](const char* shared, char* global) {
            cta.state<UnfencedShared>().check(shared, 2, "a TMA store");
            if (global != nullptr) {
              uint16_t value;
              std::memcpy(&value, shared, 2);
              values.emplace_back(global, value);
            }
          });
          cta.state<PendingReads>().ranges.erase(store.read);
        }
        simt::defer(
            "TMA store's writes",
            [values] {
              for (const auto& [global, value] : values) {
                std::memcpy(global, &value, 2);
              }
            },
            &groups.writes);
      },
      &groups.reads);
  groups.open.clear();
  simt::preempt("tma_store_commit");
}

template <int kPending>
void tma_store_wait_read() {
  simt::finish_deferred(&simt::self().state<BulkGroups>().reads, kPending);
  simt::preempt("tma_store_wait_read");
}

template <int kPending>
void tma_store_wait() {
  simt::finish_deferred(&simt::self().state<BulkGroups>().reads, kPending);
  simt::finish_deferred(&simt::self().state<BulkGroups>().writes, kPending);
  simt::preempt("tma_store_wait");
}

}  // namespace peft_kernels::sm90
