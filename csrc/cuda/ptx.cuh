// The instructions that CUDA C++ has no word for. tests/csrc/cuda_on_host/ptx.cuh says in plain C++ what each of them
// does.
//
// Of one product a lane of a warp holds four pairs of the 16 rows' numbers and two of the 8 tokens', as the PTX manual
// lays them out: `a0` of row lane / 4, `a1` of the row eight below it, `b` of token lane / 4; and four sums `c`.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace pycompress::cuda {

// What a lane holds of the product C += A B: of eight of the 16 rows of A, of B, of C.
using FragA = uint2;
using FragB = uint2;
using FragC = float[4];

__device__ inline void mma(__nv_bfloat16, FragC &c, FragA a0, FragA a1, FragB b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0.x), "r"(a1.x), "r"(a0.y), "r"(a1.y), "r"(b.x), "r"(b.y));
}

__device__ inline void mma(__half, FragC &c, FragA a0, FragA a1, FragB b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0.x), "r"(a1.x), "r"(a0.y), "r"(a1.y), "r"(b.x), "r"(b.y));
}

__device__ inline void mma_tf32(FragC &c, FragA a0, FragA a1, FragB b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0.x), "r"(a1.x), "r"(a0.y), "r"(a1.y), "r"(b.x), "r"(b.y));
}

__device__ inline uint32_t to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

}  // namespace pycompress::cuda
