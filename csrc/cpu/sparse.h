// Matrices stored without their zeros (pycompress/sparse.py): which columns of a row are kept, and products of rows
// with a few vectors, for which values are expanded or, where that is cheaper, the vectors' elements are looked up.
#pragma once

#include "dot.h"
#include "gemm.h"
#include "stored.h"

namespace pycompress::PYCOMPRESS_LEVEL {

constexpr int64_t WORD = 64;           // columns that are expanded together
constexpr int64_t LINE_OF_BITS = 512;  // columns whose bits, or positions, are a cache line
constexpr int64_t FEW_VECTORS = 32;    // the most that rows are multiplied with, each read once for four of them

// WORD columns of a row in registers.
struct Columns {
  static constexpr int COUNT = WORD / Vec::width;
  Vec::reg values[COUNT];

  Vec::reg add_product(Vec::reg sum, const float *x) const {
#pragma GCC unroll 16
    for (int i = 0; i < COUNT; ++i) sum = Vec::fmadd(values[i], Vec::load(x + i * Vec::width), sum);
    return sum;
  }
};

#ifdef __AVX512F__
// The first `count` of up to 16 values; nothing past them is read.
inline __m512 widen_some(const float *from, int64_t count) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from);
}
inline __m512 widen_some(const Bf16 *from, int64_t count) {
  const __m256i bits = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), from);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline __m512 widen_some(const Half *from, int64_t count) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), from));
}
#endif

#ifndef __AVX512F__
template <class T>
[[gnu::noinline]] void expand_floats(const T *values, uint64_t kept, float *out) {
  for (int64_t p = 0; p < WORD; ++p, kept >>= 1) out[p] = kept & 1 ? widen(*values++) : 0.0f;
}
#endif

// Puts values at the columns whose bits are set, in their order, and zeros elsewhere. Where `exact`, nothing past the
// values is read, otherwise up to WORD of them.
template <bool exact, class T>
Columns expand(const T *values, uint64_t kept) {
  Columns columns;
#ifdef __AVX512F__
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i, kept >>= 16) {
    const auto mask = static_cast<__mmask16>(kept);
    const int count = __builtin_popcount(mask);
    columns.values[i] = _mm512_maskz_expand_ps(mask, exact ? widen_some(values, count) : Vec::load(values));
    values += count;
  }
#else
  float floats[WORD];
  expand_floats(values, kept, floats);
  for (int i = 0; i < Columns::COUNT; ++i) columns.values[i] = Vec::load(floats + i * Vec::width);
#endif
  return columns;
}

// The same in the order of vectors that Ordered<T> prepares, whichever is cheapest to get.
#ifdef __AVX512VBMI2__
template <class T>
using Ordered = Widened<T>;

inline void widen_words(Bf16, __m512i bits, Vec::reg *to) {
  to[0] = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
  to[1] = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}
inline void widen_words(Half, __m512i bits, Vec::reg *to) {
  to[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(bits));
  to[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(bits, 1));
}
template <bool exact, class T>
Columns expand_ordered(const T *values, uint64_t kept) {
  if constexpr (sizeof(T) == 4) {
    return expand<exact>(values, kept);
  } else {
    const auto low = static_cast<__mmask32>(kept), high = static_cast<__mmask32>(kept >> 32);
    const T *second = values + __builtin_popcount(low);
    Columns columns;
    widen_words(T{},
                exact ? _mm512_maskz_expandloadu_epi16(low, values)
                      : _mm512_maskz_expand_epi16(low, _mm512_loadu_si512(values)),
                columns.values);
    widen_words(T{},
                exact ? _mm512_maskz_expandloadu_epi16(high, second)
                      : _mm512_maskz_expand_epi16(high, _mm512_loadu_si512(second)),
                columns.values + 2);
    return columns;
  }
}
#else
template <class>
using Ordered = Natural;

template <bool exact, class T>
Columns expand_ordered(const T *values, uint64_t kept) {
  return expand<exact>(values, kept);
}
#endif

// Two of every four columns.
template <class T>
struct Sparse24 {
  const T *values;
  const uint8_t *positions;
  int64_t rows, size;

  explicit Sparse24(const SparseLinearArgs &s)
      : values(static_cast<const T *>(s.values)), positions(s.kept), rows(s.outputs), size(s.inputs) {}

  const uint8_t *word_at(int64_t row, int64_t column) const { return positions + (row * size + column) / 8; }
  uint64_t word(int64_t row, int64_t column) const { return read(word_at(row, column), least(WORD, size - column)); }
  // A bit for each of the `count` next columns, at most WORD, that is kept.
  static uint64_t read(const uint8_t *from, int64_t count) {
    constexpr uint64_t ONES = 0x1111111111111111;  // a bit a group
    uint64_t codes = 0;
    if (count == WORD) std::memcpy(&codes, from, sizeof codes);
    for (int64_t i = 0; count < WORD && i < count / 8; ++i) codes |= static_cast<uint64_t>(from[i]) << 8 * i;
    const uint64_t a = codes, b = codes >> 1, c = codes >> 2, d = codes >> 3;  // bits of the first and of the second
    const uint64_t kept = (ONES & ~(a | b)) | (ONES & ((a & ~b) | (c & ~d))) << 1 |
                          (ONES & ((b & ~a) | (d & ~c))) << 2 | (ONES & c & d) << 3;
    return count < WORD ? kept & ((uint64_t{1} << count) - 1) : kept;
  }
  // The values from that of the first kept column at or behind `column` on.
  const T *start(int64_t row, int64_t column = 0) const { return values + (row * size + column) / 2; }
  static int64_t count(uint64_t) { return WORD / 2; }  // of a word's values
  // Whether fewer than WORD values follow a row's own.
  bool near_end(int64_t row) const { return (rows - row - 1) * size < 2 * WORD; }
};

// Any columns.
template <class T>
struct Bitmap {
  const T *values;
  const uint8_t *bits;
  const int32_t *offsets;
  int64_t rows, size, bytes;

  explicit Bitmap(const SparseLinearArgs &s)
      : values(static_cast<const T *>(s.values)),
        bits(s.kept),
        offsets(s.offsets),
        rows(s.outputs),
        size(s.inputs),
        bytes(round_up(s.inputs, WORD) / 8) {}

  const uint8_t *word_at(int64_t row, int64_t column) const { return bits + row * bytes + column / 8; }
  uint64_t word(int64_t row, int64_t column) const { return read(word_at(row, column), WORD); }
  static uint64_t read(const uint8_t *from, int64_t) {
    uint64_t found;
    std::memcpy(&found, from, sizeof found);
    return found;
  }
  const T *start(int64_t row) const { return values + offsets[row]; }
  static int64_t count(uint64_t kept) { return __builtin_popcountll(kept); }
  bool near_end(int64_t row) const { return offsets[rows] - offsets[row + 1] < WORD; }
};

#ifdef __AVX512F__
// The elements of a vector that the values of a 2:4 row belong to: those of 32 columns are two registers.
template <class T>
struct LookUp24 {
  using X = float;
  static constexpr int64_t UNIT = 64;
  static constexpr int TOGETHER = 8;
  struct Loaded {
    Vec::reg values[2];
    __m512i columns[2];
  };
  const Sparse24<T> &w;

  const void *at(int64_t row, int64_t p) const { return w.start(row, p); }
  Loaded load(int64_t row, int64_t p) const {
    if (p % LINE_OF_BITS == 0) __builtin_prefetch(w.word_at(row + TOGETHER, p));
    return pair(w.start(row, p), w.word_at(row, p));
  }
  Loaded load(int64_t row, int64_t p, int64_t count) const {
    T values[UNIT / 2] = {};
    uint8_t positions[UNIT / 8] = {};
    std::memcpy(values, w.start(row, p), count / 2 * sizeof(T));
    std::memcpy(positions, w.word_at(row, p), count / 8);
    return pair(values, positions);
  }
  static Vec::reg step(Vec::reg sum, const Loaded &loaded, const float *x) {
    for (int i = 0; i < 2; ++i, x += 32) {
      const Vec::reg chosen = _mm512_permutex2var_ps(Vec::load(x), loaded.columns[i], Vec::load(x + 16));
      sum = Vec::fmadd(loaded.values[i], chosen, sum);
    }
    return sum;
  }

 private:
  static Loaded pair(const T *values, const uint8_t *positions) {
    const __m512i shifts = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i groups = _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
    Loaded loaded;
    for (int i = 0; i < 2; ++i) {
      int32_t codes;
      std::memcpy(&codes, positions + 4 * i, sizeof codes);
      const __m512i offsets = _mm512_srlv_epi32(_mm512_set1_epi32(codes), shifts);
      loaded.values[i] = Vec::load(values + 16 * i);
      loaded.columns[i] = _mm512_ternarylogic_epi32(offsets, _mm512_set1_epi32(3), groups, 0xea);  // (a & b) | c
    }
    return loaded;
  }
};

#endif

// Rows that are expanded as they are read.
template <class M, bool exact>
struct Expanded {
  using X = float;
  static constexpr int TOGETHER = 4;  // two pointers a row
  const M &w;
};

template <int R, int VECTORS, class M, bool exact>
inline void dot_rows(const Expanded<M, exact> &rows, int64_t row, const Vectors<float> &x, float *out, int64_t stride) {
  const M &w = rows.w;
  Vec::reg sums[R][VECTORS];
  decltype(w.start(0)) next[R];
  const uint8_t *words[R];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) sums[i][v] = Vec::zero();
    next[i] = w.start(row + i);
    words[i] = w.word_at(row + i, 0);
  }
  // To the rows after these, which are too short for the hardware to follow.
  const int64_t ahead = w.start(least(row + R, w.rows - 1)) - next[0];
  for (int64_t p = 0; p < x.size; p += WORD) {
    for (int i = 0; i < R && p % LINE_OF_BITS == 0; ++i) __builtin_prefetch(w.word_at(row + i + R, p));
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      __builtin_prefetch(next[i] + ahead);
      const uint64_t kept = M::read(words[i] + p / 8, least(WORD, x.size - p));
      const Columns columns = expand_ordered<exact>(next[i], kept);
      next[i] += M::count(kept);
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sums[i][v] = columns.add_product(sums[i][v], x.data + v * x.stride + p);
    }
  }
  store_products<R, VECTORS>(sums, out, stride);
}

// Products of rows with a few vectors, out[vector * out_stride + row], and how those vectors are prepared.
template <class M>
struct ByExpansion {
  template <class T>
  using Order = Ordered<T>;

  static void dot(const M &w, Range rows, const Vectors<float> &x, float *out, int64_t stride) {
    if (rows.end > rows.begin && w.near_end(rows.end - 1)) return dot_all(Expanded<M, true>{w}, rows, x, out, stride);
    dot_all(Expanded<M, false>{w}, rows, x, out, stride);
  }
};

template <class M>
struct Products : ByExpansion<M> {};

#ifdef __AVX512F__
template <class T>
struct Products<Sparse24<T>> {
  template <class>
  using Order = Natural;

  static void dot(const Sparse24<T> &w, Range rows, const Vectors<float> &x, float *out, int64_t stride) {
    dot_all(LookUp24<T>{w}, rows, x, out, stride);
  }
};
#endif

}  // namespace pycompress::PYCOMPRESS_LEVEL
