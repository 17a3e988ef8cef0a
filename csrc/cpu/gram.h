// Symmetric product: the lower triangle of blocks by gemm, then mirrored.
#pragma once

#include "gemm.h"

namespace pycompress::PYCOMPRESS_LEVEL {

inline void mirror(float *out, int64_t n, int threads) {
  constexpr int64_t block = 32;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t top = 0; top < n; top += block) {
    for (int64_t left = 0; left <= top; left += block) {
      for (int64_t j = left; j < least(n, left + block); ++j) {
        for (int64_t i = top > j ? top : j + 1; i < least(n, top + block); ++i) out[j * n + i] = out[i * n + j];
      }
    }
  }
}

void gram(const GramArgs &s) {
  for (int64_t batch = 0; batch < s.batch; ++batch) {
    float *out = s.out + batch * s.n * s.n;
    const Matrix<float> left{s.left + batch * s.n * s.d, s.n, s.d}, right{s.right + batch * s.n * s.d, s.n, s.d};
    gemm(left, right, s.d, true, s.threads, [&](const float *values, const Piece &piece) {
      accumulate(values, piece, [&](int64_t i) { return out + i * s.n; });
    });
    mirror(out, s.n, s.threads);
  }
}

}  // namespace pycompress::PYCOMPRESS_LEVEL
