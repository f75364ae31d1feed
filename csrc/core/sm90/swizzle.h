// How TMA and the tensor cores permute shared memory, and the descriptors that tell the tensor cores where
// an operand lies. Plain C++, so that a host compiler alone can test it.
//
// A swizzle of W bytes (32, 64, 128) is laid over rows of W bytes that follow each other: the 16-byte chunk number
// within a 128-byte line is exclusive-ored with the line number, modulo W / 16 chunks; the pattern repeats after 8 W
// bytes, and so a tile starts at a multiple of 8 W. (PTX ISA, "Shared Memory Matrix Layout": Swizzle<log2(W / 16), 4,
// 3> over byte addresses.)
#pragma once

#include <cstdint>

namespace peft_kernels::sm90 {

#ifdef __CUDACC__
#define PEFT_KERNELS_SM90_HOST_DEVICE __host__ __device__ __forceinline__ constexpr
#else
#define PEFT_KERNELS_SM90_HOST_DEVICE inline constexpr
#endif

// Where byte `address` of the unpermuted tile is kept.
PEFT_KERNELS_SM90_HOST_DEVICE uint32_t swizzled(uint32_t address, uint32_t width) {
  return address ^ (((address >> 7) & (width / 16 - 1)) << 4);
}

// An operand of wgmma, `width` the swizzle in bytes and the length of its rows (PTX ISA, "Matrix Descriptor Format").
//
// Rows of K (K-major, no transpose): row mn of the tile starts at mn * width; groups of 8 rows follow each other;
// `block_bytes` is not read.
// Rows of M or N (transposed): a tile is made of blocks of width / 2 columns, whose rows k start at k * width; blocks
// are `block_bytes` apart.
// Further along K, the address of the descriptor's first element moves: by 32 bytes a step of 16 for K-major operands,
// by 16 * width for transposed ones.
PEFT_KERNELS_SM90_HOST_DEVICE uint64_t operand_descriptor(uint32_t address, uint32_t width, uint32_t block_bytes = 16) {
  const uint64_t mode = width == 128 ? 1 : width == 64 ? 2 : 3;
  const auto encoded = [](uint32_t bytes) { return static_cast<uint64_t>((bytes & 0x3FFFF) >> 4); };
  return encoded(address) | encoded(block_bytes) << 16 | encoded(8 * width) << 32 | mode << 62;
}

}  // namespace peft_kernels::sm90
