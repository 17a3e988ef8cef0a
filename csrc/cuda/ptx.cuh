// The instructions that CUDA C++ has no word for. tests/csrc/cuda_on_host/ptx.cuh says in plain C++ what each of them
// does.
//
// Of one product a lane of a warp holds four pairs of the 16 rows' numbers and two of the 8 tokens', as the PTX manual
// lays them out: `upper` of row lane / 4, `lower` of the row eight below it, `tokens` of token lane / 4; and four sums.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace pycompress::cuda {

// Of a kernel launched while the one before it still runs: nothing that kernel wrote is read before this, and nothing
// is written. Then the next kernel may come.
__device__ inline void wait_for_the_kernel_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ inline void prefetch(const void *address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

__device__ inline void multiply(__nv_bfloat16, float (&sums)[4], uint2 upper, uint2 lower, uint2 tokens) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(upper.x), "r"(lower.x), "r"(upper.y), "r"(lower.y), "r"(tokens.x), "r"(tokens.y));
}

__device__ inline void multiply(__half, float (&sums)[4], uint2 upper, uint2 lower, uint2 tokens) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(upper.x), "r"(lower.x), "r"(upper.y), "r"(lower.y), "r"(tokens.x), "r"(tokens.y));
}

__device__ inline void multiply_tf32(float (&sums)[4], uint2 upper, uint2 lower, uint2 tokens) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(upper.x), "r"(lower.x), "r"(upper.y), "r"(lower.y), "r"(tokens.x), "r"(tokens.y));
}

__device__ inline uint32_t to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

}  // namespace pycompress::cuda
