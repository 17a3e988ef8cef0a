// Symmetric product: the lower triangle of blocks by gemm, then mirrored.
// Compiled once a level: see CMakeLists.txt.
#include PYCOMPRESS_VECTORS

#include "gemm.h"

namespace pycompress::PYCOMPRESS_LEVEL {

// The block of the upper triangle that mirrors the one at row i, column j <= i.
inline void mirror_block(float *out, int64_t n, int64_t i, int64_t j) {
  constexpr int64_t width = Vec::width;
  if (i > j && i + width <= n) {
    Vec::reg block[width];
    for (int64_t a = 0; a < width; ++a) block[a] = Vec::load(out + (i + a) * n + j);
    Vec::transpose(block);
    for (int64_t a = 0; a < width; ++a) Vec::store(out + (j + a) * n + i, block[a]);
    return;
  }
  for (int64_t b = j; b < least(n, j + width); ++b) {
    for (int64_t a = i > b ? i : b + 1; a < least(n, i + width); ++a) out[b * n + a] = out[a * n + b];
  }
}

inline void mirror(float *out, int64_t n, int threads) {
  constexpr int64_t tile = 64;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t top = 0; top < n; top += tile) {
    for (int64_t left = 0; left <= top; left += tile) {
      for (int64_t j = left; j < least(n, left + tile); j += Vec::width) {
        for (int64_t i = left < top ? top : j; i < least(n, top + tile); i += Vec::width) mirror_block(out, n, i, j);
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
