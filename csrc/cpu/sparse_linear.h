// Linear layer whose weight is stored without its zeros. Few tokens: products of its rows. Many: each value times its
// column of all tokens, so that zeros cost nothing.
#pragma once

#include <omp.h>

#include <array>
#include <utility>

#include "sparse.h"

namespace pycompress::PYCOMPRESS_LEVEL {
namespace sparse {

constexpr int64_t TILE = 16;           // rows that stay in the second-level cache while all tokens use them
constexpr int64_t MIN_WORK = 1 << 16;  // weights below which waking a thread costs more than it saves

constexpr int MOST = Vec::width == 16 ? 8 : 4;  // registers of tokens that a value is multiplied with
constexpr int64_t ROWS = 512;                   // rows whose sums for them stay in the second-level cache
constexpr int64_t AHEAD = 8;                    // rows, in which a cache line comes

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

// sums [R registers] += the values of one WORD of a row, each times its column of x [WORD, R registers].
template <int R>
void add_word(const float *values, uint64_t kept, const float *x, float *sums) {
  constexpr int64_t W = Vec::width;
  Vec::reg even[R], odd[R];  // two sums, for additions to follow each other without waiting
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) even[i] = Vec::load(sums + i * W), odd[i] = Vec::zero();
  const auto add_next = [&](Vec::reg *to) {
    const float *column = x + __builtin_ctzll(kept) * R * W;
    const Vec::reg value = Vec::set1(*values++);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) to[i] = Vec::fmadd(value, Vec::load(column + i * W), to[i]);
    kept &= kept - 1;
  };
  while (kept) {
    add_next(even);
    if (kept) add_next(odd);
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) Vec::store(sums + i * W, Vec::add(even[i], odd[i]));
}

// add_word by the number of registers less one.
template <std::size_t... I>
constexpr auto adders(std::index_sequence<I...>) {
  return std::array{&add_word<static_cast<int>(I) + 1>...};
}
constexpr auto ADDERS = adders(std::make_index_sequence<MOST>());

// sums [rows, width] = the rows times `width` tokens, x [inputs, width].
template <bool exact, class Weight>
void add_rows(const Weight &w, Range rows, const float *x, int64_t width, float *sums) {
  const auto add = ADDERS[width / Vec::width - 1];
  const int64_t count = rows.end - rows.begin;
  decltype(w.start(0)) next[ROWS + AHEAD];
  for (int64_t i = 0; i < count + AHEAD; ++i) next[i] = w.start(least(rows.begin + i, rows.end - 1));
  std::memset(sums, 0, count * width * sizeof(float));
  for (int64_t p = 0; p < w.size; p += WORD) {
    for (int64_t i = 0; i < count; ++i) {
      __builtin_prefetch(next[i + AHEAD]);
      __builtin_prefetch(w.word_at(rows.begin + i + AHEAD, p));
      const uint64_t kept = w.word(rows.begin + i, p);
      const int64_t values = __builtin_popcountll(kept);
      alignas(64) float wide[WORD];
      widen_all(next[i], exact ? values : round_up(values, Vec::width), wide);
      add(wide, kept, x + p * width, sums + i * width);
      next[i] += values;
    }
  }
}

// Outputs of sums [rows, width], a column a token.
template <class T, class Weight>
void finish_rows(const Layer<T, Weight> &layer, Range rows, Range tokens, const float *sums, int64_t width) {
  constexpr int64_t W = Vec::width;
  for (int64_t i = rows.begin; i < rows.end; i += W) {
    for (int64_t t = tokens.begin; t < tokens.end; t += W) {
      Vec::reg block[W];
      for (int64_t j = 0; j < W; ++j) {
        const int64_t row = least(i + j, rows.end - 1) - rows.begin;
        block[j] = Vec::load(sums + row * width + t - tokens.begin);
      }
      Vec::transpose(block);
      for (int64_t j = 0; j < least(W, tokens.end - t); ++j) {
        float products[W];
        Vec::store(products, block[j]);
        layer.finish(t + j, i, least(W, rows.end - i), products);
      }
    }
  }
}

template <class T, class Weight>
void many_tokens(const Layer<T, Weight> &layer) {
  constexpr int64_t W = Vec::width;
  const SparseLinearArgs &s = layer.s;
  const Matrix<T> tokens{layer.x, s.tokens, s.x_stride};
  const Weight &w = layer.weight;
  for (int64_t first = 0; first < s.tokens; first += MOST * W) {
    const int64_t count = least(MOST * W, s.tokens - first), width = round_up(count, W);
    float *x = scratch(Slot::wide, s.inputs * width);
#pragma omp parallel num_threads(s.threads)
    {
      const Range columns = share_of(s.inputs, WORD, omp_get_thread_num(), omp_get_num_threads());
      pack_columns(tokens, first, columns.begin, columns.end - columns.begin, x + columns.begin * width, width);
#pragma omp barrier
      const Range all = share_of(s.outputs, W, omp_get_thread_num(), omp_get_num_threads());
      float *sums = scratch(Slot::small, ROWS * width);
      for (int64_t from = all.begin; from < all.end; from += ROWS) {
        const Range rows{from, least(from + ROWS, all.end)};
        if (w.near_end(rows.end - 1)) {
          add_rows<true>(w, rows, x, width, sums);
        } else {
          add_rows<false>(w, rows, x, width, sums);
        }
        finish_rows(layer, rows, {first, first + count}, sums, width);
      }
    }
  }
}

template <class T, class Weight>
void run(const SparseLinearArgs &s) {
  const Layer<T, Weight> layer{s};
  s.tokens <= FEW_VECTORS ? few_tokens(layer) : many_tokens(layer);
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
