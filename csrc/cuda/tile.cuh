// What kernels of few tokens on tensor cores share: their tiles' sizes, loads of 16 bytes, products, sums over warps.
//
// The rows of a matrix are the tall operand of mma.m16n8, the tokens the narrow one.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#include "ptx.cuh"

namespace pycompress::cuda {

constexpr int WARP = 32, WARPS = 8, THREADS = WARP * WARPS;
constexpr int ROWS = 32;    // of a tile: two products' rows
constexpr int TOKENS = 16;  // of a tile: two products' columns

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

template <class T>
constexpr int VECTOR = 16 / static_cast<int>(sizeof(T));

template <class T>
__device__ float to_float(T value) {
  return static_cast<float>(value);
}

__device__ inline uint32_t word(uint4 vector, int i) {
  return i == 0 ? vector.x : i == 1 ? vector.y : i == 2 ? vector.z : vector.w;
}

template <class T>
__device__ uint4 packed(const T (&values)[VECTOR<T>]) {
  uint4 vector;
  std::memcpy(&vector, values, sizeof vector);
  return vector;
}

// 16 bytes of which the first `bytes` are there; the others, which may belong to another row, are zero.
__device__ inline uint4 load16(const void *from, int bytes, bool aligned) {
  if (bytes <= 0) return {0, 0, 0, 0};
  if (aligned && bytes >= 16) return *static_cast<const uint4 *>(from);
  const auto address = reinterpret_cast<uintptr_t>(from);
  const auto *words = reinterpret_cast<const uint32_t *>(address & ~uintptr_t{3});
  const int before = static_cast<int>(address & 3);
  uint32_t found[5], kept[4];
#pragma unroll
  for (int i = 0; i < 5; ++i) {
    const int left = before + bytes - 4 * i;  // of this word; what is behind them may be behind the tensor's end
    found[i] = left >= 4 ? words[i] : 0;
    const auto *ends = reinterpret_cast<const uint8_t *>(words + i);
#pragma unroll
    for (int byte = 0; byte < 3; ++byte)
      found[i] |= left < 4 && byte < left ? static_cast<uint32_t>(ends[byte]) << (8 * byte) : 0;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int left = bytes - 4 * i;
    kept[i] = __funnelshift_r(found[i], found[i + 1], 8 * before);
    kept[i] = left >= 4 ? kept[i] : left <= 0 ? 0 : kept[i] & ((1u << (8 * left)) - 1);
  }
  return {kept[0], kept[1], kept[2], kept[3]};
}

// What TF32 keeps of two floats, and what it keeps of the rest.
__device__ inline uint2 split_tf32(uint2 bits, uint2 &rest) {
  const uint2 kept{to_tf32(__uint_as_float(bits.x)), to_tf32(__uint_as_float(bits.y))};
  rest = {to_tf32(__uint_as_float(bits.x) - __uint_as_float(kept.x)),
          to_tf32(__uint_as_float(bits.y) - __uint_as_float(kept.y))};
  return kept;
}

// Float32 as three products in TF32: 21 bits of each number take part.
__device__ inline void mma(float, FragC &c, FragA a0, FragA a1, FragB b) {
  FragA a0_rest, a1_rest;
  FragB b_rest;
  a0 = split_tf32(a0, a0_rest);
  a1 = split_tf32(a1, a1_rest);
  b = split_tf32(b, b_rest);
  mma_tf32(c, a0_rest, a1_rest, b);
  mma_tf32(c, a0, a1, b_rest);
  mma_tf32(c, a0, a1, b);
}

template <class T>
struct Inputs {
  const T *x;
  int tokens, n;
  bool aligned;

  __device__ uint4 load(int token, int column) const {
    if (token >= tokens) return {0, 0, 0, 0};
    const T *row = x + static_cast<int64_t>(token) * n;
    return load16(row + column, (n - column) * static_cast<int>(sizeof(T)), aligned);
  }
};

// The warps' sums of one element, added from the first to the last.
__device__ inline float total(const float (&sums)[WARPS][TOKENS][ROWS + 1], int token, int row) {
  float sum = 0.0f;
  for (int warp = 0; warp < WARPS; ++warp) sum += sums[warp][token][row];
  return sum;
}

}  // namespace pycompress::cuda
