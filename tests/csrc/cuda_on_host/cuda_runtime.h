// Stands in for CUDA's own: kernels run on the host, one block after another. The threads of a block take turns in
// their order or backwards, each until it waits for others.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __shared__
#define __shared__ static

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace on_host {

constexpr int WARP = 32;

// Runs `thread` for every thread of the grid. What goes wrong is kept for cudaGetLastError.
void launch(dim3 grid, dim3 block, std::size_t shared, cudaStream_t stream, const std::function<void()> &thread);

// Returns when every thread of the block has come.
void meet_block();

// Returns when every lane of the warp has come, and the last of them has called `work` with what each brought.
void meet_warp(void *brought, void (*work)(void *const *));

}  // namespace on_host

inline void __syncthreads() { on_host::meet_block(); }

using std::min;

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (shift % 32));
}

inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t taken) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<uint32_t>(bytes >> (taken >> 4 * i & 7) * 8 & 255) << 8 * i;
  return result;
}
