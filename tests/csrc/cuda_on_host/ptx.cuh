// Stands in for csrc/cuda/ptx.cuh: the same functions in plain C++, from the PTX manual's own tables of which lane
// holds what of a product ("Matrix Fragments for mma.m16n8k16", "for mma.m16n8k8").
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace pycompress::cuda {

// What a lane holds of the product C += A B: of eight of the 16 rows of A, of B, of C.
using FragA = uint2;
using FragB = uint2;
using FragC = float[4];

// What a lane brings to a product: its registers of A [16, K], of B [K, 8] and of C [16, 8], in the manual's order.
struct Fragments {
  uint32_t a[4], b[2];
  float *c;
};

template <class T>
struct Elements {
  static constexpr int WORD = 2;
  static float at(uint32_t word, int i) {
    T values[2];
    std::memcpy(values, &word, sizeof values);
    return static_cast<float>(values[i]);
  }
};

template <>
struct Elements<float> {
  static constexpr int WORD = 1;
  // TF32 is what the upper 19 bits say.
  static float at(uint32_t word, int) { return __uint_as_float(word & ~0x1fffu); }
};

template <class T>
void mma_of_fragments(void *const *lanes) {
  constexpr int WORD = Elements<T>::WORD, K = 8 * WORD;
  const auto lane = [&](int i) -> const Fragments & { return *static_cast<const Fragments *>(lanes[i]); };
  float a[16][K], b[K][8];
  for (int k = 0; k < K; ++k) {
    const int member = k / WORD % 4, half = k / WORD / 4;
    for (int i = 0; i < 16; ++i) a[i][k] = Elements<T>::at(lane(i % 8 * 4 + member).a[i / 8 + 2 * half], k % WORD);
    for (int j = 0; j < 8; ++j) b[k][j] = Elements<T>::at(lane(j * 4 + member).b[half], k % WORD);
  }
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      float sum = 0.0f;
      for (int k = 0; k < K; ++k) sum += a[i][k] * b[k][j];
      lane(i % 8 * 4 + j / 2).c[i / 8 * 2 + j % 2] += sum;
    }
  }
}

template <class T>
void mma_by_warp(FragC &c, FragA a0, FragA a1, FragB b) {
  Fragments own{{a0.x, a1.x, a0.y, a1.y}, {b.x, b.y}, c};
  on_host::meet_warp(&own, mma_of_fragments<T>);
}

inline void mma(__nv_bfloat16, FragC &c, FragA a0, FragA a1, FragB b) { mma_by_warp<__nv_bfloat16>(c, a0, a1, b); }

inline void mma(__half, FragC &c, FragA a0, FragA a1, FragB b) { mma_by_warp<__half>(c, a0, a1, b); }

inline void mma_tf32(FragC &c, FragA a0, FragA a1, FragB b) { mma_by_warp<float>(c, a0, a1, b); }

// To the nearest, of two as near the one away from zero.
inline uint32_t to_tf32(float value) { return (__float_as_uint(value) + 0x1000u) & ~0x1fffu; }

}  // namespace pycompress::cuda
