// Linear layer whose weight is stored without its zeros. Few tokens: products of its rows. Many: gemm, for which rows
// are expanded while they are packed.
#pragma once

#include <omp.h>

#include "sparse.h"

namespace pycompress::PYCOMPRESS_LEVEL {
namespace sparse {

constexpr int64_t TILE = 16;           // rows that stay in the second-level cache while all tokens use them
constexpr int64_t MIN_WORK = 1 << 16;  // weights below which waking a thread costs more than it saves

template <class T, class Weight>
struct Layer {
  const SparseLinearArgs &s;
  const T *x = static_cast<const T *>(s.x), *bias = static_cast<const T *>(s.bias);
  T *y = static_cast<T *>(s.y);
  const Weight weight{s};

  void finish(int64_t token, int64_t from, int64_t count, const float *product) const {
    T *to = y + token * s.outputs + from;
    for (int64_t i = 0; i < count; ++i) to[i] = narrow<T>(bias ? product[i] + widen(bias[from + i]) : product[i]);
  }
};

template <class T, class Weight>
void few_tokens(const Layer<T, Weight> &layer) {
  using Product = Products<Weight>;
  using Order = typename Product::template Order<T>;
  const SparseLinearArgs &s = layer.s;
  const int64_t stride = padded(s.inputs);
  float *x = scratch(Slot::wide, s.tokens * stride);
  for (int64_t t = 0; t < s.tokens; ++t) Order::prepare(layer.x + t * s.x_stride, s.inputs, x + t * stride);
  const int threads = static_cast<int>(least(s.threads, s.outputs * s.inputs / MIN_WORK + 1));
#pragma omp parallel num_threads(threads)
  {
    const Range range = share_of(s.outputs, TILE, omp_get_thread_num(), omp_get_num_threads());
    for (int64_t from = range.begin; from < range.end; from += TILE) {
      float products[FEW_VECTORS * TILE];
      const int64_t count = least(TILE, range.end - from);
      Product::dot(layer.weight, {from, from + count}, {x, s.tokens, s.inputs, stride}, products, TILE);
      for (int64_t t = 0; t < s.tokens; ++t) layer.finish(t, from, count, products + t * TILE);
    }
  }
}

template <class T, class Weight>
void run(const SparseLinearArgs &s) {
  const Layer<T, Weight> layer{s};
  if (s.tokens <= FEW_VECTORS) return few_tokens(layer);
  multiply(Matrix<T>{layer.x, s.tokens, s.x_stride}, layer.weight, s.inputs, s.threads,
           [&](int64_t token, int64_t from, int64_t count, const float *products) {
             layer.finish(token, from, count, products);
           });
}

template <template <class> class Weight>
void run(const SparseLinearArgs &s) {
  if (s.dtype == Dtype::f32) run<float, Weight<float>>(s);
  if (s.dtype == Dtype::bf16) run<Bf16, Weight<Bf16>>(s);
  if (s.dtype == Dtype::f16) run<Half, Weight<Half>>(s);
}

}  // namespace sparse

void sparse24_linear(const SparseLinearArgs &s) { sparse::run<Sparse24>(s); }
void bitmap_linear(const SparseLinearArgs &s) { sparse::run<Bitmap>(s); }

}  // namespace pycompress::PYCOMPRESS_LEVEL
