// Dot products of the rows of a stored matrix with a few vectors: each weight is read once and widened in registers.
#pragma once

#include "numeric.h"

namespace pycompress::PYCOMPRESS_LEVEL {

constexpr int64_t PAIR = 2 * Vec::width;

template <class T>
void widen_all(const T *from, int64_t count, float *to) {
  int64_t i = 0;
  for (; i + Vec::width <= count; i += Vec::width) Vec::store(to + i, Vec::load(from + i));
  for (; i < count; ++i) to[i] = widen(from[i]);
}

// Room of a prepared vector: the most that one load of a matrix takes, which is two blocks of int4, may begin in it.
inline int64_t padded(int64_t count) { return round_up(count, 64); }

// Products in float. Vectors are widened beforehand, into the order in which load_pair brings a row: evens then odds of
// each PAIR for Bf16, natural otherwise; zeros fill the last PAIR.
template <class T>
struct Widened {
  using X = float;
  struct Loaded {
    Vec::reg low, high;
  };

  static void prepare(const T *from, int64_t count, float *to) {
    int64_t p = 0;
    for (; p + PAIR <= count; p += PAIR) put(load(from + p), to + p);
    if (p < count) put(load(from + p, count - p), to + p);
  }
  template <class S>
  static void prepare(const S *from, int64_t count, float *to) {
    for (int64_t p = 0; p < padded(count); ++p) {
      const int64_t source = p - p % PAIR + position(p % PAIR, T{});
      to[p] = source < count ? widen(from[source]) : 0.0f;
    }
  }
  static Loaded load(const T *row) {
    Loaded loaded;
    Vec::load_pair(row, loaded.low, loaded.high);
    return loaded;
  }
  static Loaded load(const T *row, int64_t count) {
    Loaded loaded;
    Vec::load_pair(row, count, loaded.low, loaded.high);
    return loaded;
  }
  static Vec::reg step(Vec::reg sum, const Loaded &row, const float *x) {
    return Vec::fmadd(row.high, Vec::load(x + Vec::width), Vec::fmadd(row.low, Vec::load(x), sum));
  }

 private:
  static void put(const Loaded &loaded, float *to) {
    Vec::store(to, loaded.low);
    Vec::store(to + Vec::width, loaded.high);
  }
  static int64_t position(int64_t p, Bf16) { return p < Vec::width ? 2 * p : 2 * (p - Vec::width) + 1; }
  template <class Other>
  static int64_t position(int64_t p, Other) {
    return p;
  }
};

template <class T>
struct Direct : Widened<T> {};

#ifdef __AVX512BF16__
// Two bfloat16 products a lane and instruction; the vector stays bfloat16.
template <>
struct Direct<Bf16> {
  using X = Bf16;
  using Loaded = __m512i;

  static void prepare(const Bf16 *from, int64_t count, Bf16 *to) {
    for (int64_t p = 0; p < padded(count); ++p) to[p] = p < count ? from[p] : Bf16{0};
  }
  static Loaded load(const Bf16 *row) { return _mm512_loadu_si512(row); }
  static Loaded load(const Bf16 *row, int64_t count) { return _mm512_maskz_loadu_epi16((1u << count) - 1, row); }
  static Vec::reg step(Vec::reg sum, Loaded row, const Bf16 *x) {
    return _mm512_dpbf16_ps(sum, (__m512bh)row, (__m512bh)_mm512_loadu_si512(x));
  }
};
#endif

// A few prepared vectors, and where the products go: out[vector * out_stride + row].
template <class X>
struct Vectors {
  const X *data;
  int64_t count, size, stride;
};

// A matrix of values in memory, its rows `stride` apart, read as P does.
template <class P, class T>
struct Rows {
  using X = typename P::X;
  static constexpr int64_t UNIT = PAIR;  // columns of one load
  static constexpr int TOGETHER = 8;     // rows that are multiplied with one vector at a time
  const T *data;
  int64_t stride;

  const void *at(int64_t row, int64_t p) const { return data + row * stride + p; }
  auto load(int64_t row, int64_t p) const { return P::load(data + row * stride + p); }
  auto load(int64_t row, int64_t p, int64_t count) const { return P::load(data + row * stride + p, count); }
  template <class Loaded>
  static Vec::reg step(Vec::reg sum, const Loaded &loaded, const X *x) {
    return P::step(sum, loaded, x);
  }
};

template <int R, int VECTORS>
inline void store_products(const Vec::reg (&sums)[R][VECTORS], float *out, int64_t out_stride) {
#pragma GCC unroll 4
  for (int v = 0; v < VECTORS; ++v) {
    float all[R < 4 ? 4 : R];
#pragma GCC unroll 2
    for (int i = 0; i < R; i += 4) {
      Vec::store_sums(all + i, sums[i][v], R > 1 ? sums[(i + 1) % R][v] : Vec::zero(),
                      R > 2 ? sums[(i + 2) % R][v] : Vec::zero(), R > 3 ? sums[(i + 3) % R][v] : Vec::zero());
    }
    for (int i = 0; i < R; ++i) out[v * out_stride + i] = all[i];
  }
}

template <int R, int VECTORS, class M>
inline void dot_rows(const M &w, int64_t row, const Vectors<typename M::X> &x, float *out, int64_t out_stride) {
  Vec::reg sums[R][VECTORS];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) sums[i][v] = Vec::zero();
  }
  int64_t p = 0;
  for (; p + M::UNIT <= x.size; p += M::UNIT) {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      __builtin_prefetch(w.at(row + i + R, p));  // the rows after these: rows are too short for the hardware to follow
      const auto loaded = w.load(row + i, p);
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sums[i][v] = M::step(sums[i][v], loaded, x.data + v * x.stride + p);
    }
  }
  if (p < x.size) {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const auto loaded = w.load(row + i, p, x.size - p);
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sums[i][v] = M::step(sums[i][v], loaded, x.data + v * x.stride + p);
    }
  }
  store_products<R, VECTORS>(sums, out, out_stride);
}

// Rows [begin, end) in groups of R, the rest one by one.
template <int R, int VECTORS, class M>
inline void dot_range(const M &w, Range rows, const Vectors<typename M::X> &x, float *out, int64_t out_stride) {
  int64_t i = rows.begin;
  for (; i + R <= rows.end; i += R) dot_rows<R, VECTORS>(w, i, x, out + i - rows.begin, out_stride);
  for (; i < rows.end; ++i) dot_rows<1, VECTORS>(w, i, x, out + i - rows.begin, out_stride);
}

// Products of rows [begin, end) with all vectors, four at a time; out[v * out_stride] is row `begin`.
template <class M>
inline void dot_all(const M &w, Range rows, Vectors<typename M::X> x, float *out, int64_t out_stride) {
  for (; x.count > 0; x.data += 4 * x.stride, x.count -= 4, out += 4 * out_stride) {
    if (x.count == 1) {
      dot_range<M::TOGETHER, 1>(w, rows, x, out, out_stride);
    } else if (x.count == 2) {
      dot_range<4, 2>(w, rows, x, out, out_stride);
    } else if (x.count == 3) {
      dot_range<4, 3>(w, rows, x, out, out_stride);
    } else {
      dot_range<4, 4>(w, rows, x, out, out_stride);
    }
  }
}

}  // namespace pycompress::PYCOMPRESS_LEVEL
