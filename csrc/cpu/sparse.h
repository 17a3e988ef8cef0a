// Matrices stored without their zeros, TILE rows at a time in the order in which products read them
// (pycompress/formats/zeros.py), and their products with a few vectors.
#pragma once

#include "dot.h"
#include "gemm.h"
#include "stored.h"

namespace pycompress::PYCOMPRESS_LEVEL {

constexpr int64_t TILE = SPARSE_TILE;
constexpr int64_t WORD = 64;  // columns that are expanded together

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

// Rows of which a part, or all, are stored together; `first` is a multiple of TILE.
struct Tile {
  int64_t first, rows;
};

inline Tile tile_of(int64_t row, int64_t rows) {
  const int64_t first = row - row % TILE;
  return {first, least(TILE, rows - first)};
}

// Two of every four columns: the pairs of a tile's rows for one group of columns, then those for the next; bytes of
// positions, each of two groups, likewise.
template <class T>
struct Sparse24 {
  using Order = Natural;                  // of a vector's elements
  static constexpr int64_t TOGETHER = 8;  // vectors for which rows are read once
  const T *values;
  const uint8_t *positions;
  int64_t rows, size;

  explicit Sparse24(const SparseLinearArgs &s)
      : values(static_cast<const T *>(s.values)), positions(s.kept), rows(s.outputs), size(s.inputs) {}

  Tile tile(int64_t row) const { return tile_of(row, rows); }

  // Room for what a tile of fewer than TILE rows lacks.
  struct Room {
    T pairs[2 * TILE] = {};
    uint8_t codes[TILE] = {};
  };
  // The pairs of a tile's rows, [TILE, 2], for the group at `column`, and the bytes for that and the next group.
  template <bool whole>
  const T *pairs(const Tile &tile, int64_t column, Room &room) const {
    const T *from = values + tile.first * size / 2 + (whole ? column * (TILE / 2) : column / 2 * tile.rows);
    if (whole) return from;
    std::memcpy(room.pairs, from, 2 * tile.rows * sizeof(T));
    return room.pairs;
  }
  template <bool whole>
  const uint8_t *codes(const Tile &tile, int64_t column, Room &room) const {
    const uint8_t *from = positions + tile.first * size / 8 + (whole ? column * (TILE / 8) : column / 8 * tile.rows);
    if (whole) return from;
    std::memcpy(room.codes, from, tile.rows);
    return room.codes;
  }
};

// Any columns: the words of a tile's rows for WORD columns, then those for the next; values in that order.
template <class T>
struct Bitmap {
  using Order = Ordered<T>;
  static constexpr int64_t TOGETHER = 4;
  static constexpr int64_t FEW = 24;  // the most vectors for which expanding rows pays
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

  Tile tile(int64_t row) const { return tile_of(row, rows); }
  const uint8_t *words(const Tile &tile) const { return bits + tile.first * bytes; }
  const T *start(const Tile &tile) const { return values + offsets[tile.first / TILE]; }
  // Whether fewer than WORD values follow a tile's own.
  bool near_end(const Tile &tile) const {
    return offsets[(rows + TILE - 1) / TILE] - offsets[tile.first / TILE + 1] < WORD;
  }
};

inline uint64_t word_at(const uint8_t *from) {
  uint64_t found;
  std::memcpy(&found, from, sizeof found);
  return found;
}

// Products with V vectors of B registers of rows, those from `skipped` on of the tiles from `tile` on: the elements
// that a row takes of a vector are chosen in registers, a lane a row.
template <int B, int V, bool whole, class T>
inline void dot_lanes(const Sparse24<T> &w, const Tile &tile, int64_t skipped, const Vectors<float> &x, float *out,
                      int64_t stride) {
  constexpr int64_t W = Vec::width, STEP = 8;
  constexpr int64_t AHEAD = 24 * TILE * 2;  // values that are asked for before they are needed
  typename Sparse24<T>::Room room;
  Vec::reg sums[B][V];
  for (auto &block : sums)
    for (auto &sum : block) sum = Vec::zero();
  for (int64_t p = 0; p < w.size; p += STEP) {
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
      const Tile at{tile.first + (skipped + b * W) / TILE * TILE, tile.rows};
      const int64_t lane = (skipped + b * W) % TILE;
      const uint8_t *codes = w.template codes<whole>(at, p, room) + lane;
      if (whole) __builtin_prefetch(codes + AHEAD / 4);
      const Vec::numbers places = Vec::load_bytes(codes);
#pragma GCC unroll 2
      for (int g = 0; g < 2; ++g) {
        const T *pairs = w.template pairs<whole>(at, p + 4 * g, room) + 2 * lane;
        if (whole) __builtin_prefetch(pairs + AHEAD);
        Vec::reg first, second;
        Vec::load_alternate(pairs, first, second);
        const Vec::numbers of_first = Vec::shift(places, 4 * g), of_second = Vec::shift(places, 4 * g + 2);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
          const Vec::reg four = Vec::repeat_four(x.data + v * x.stride + p + 4 * g);
          sums[b][v] = Vec::fmadd(first, Vec::choose(four, of_first), sums[b][v]);
          sums[b][v] = Vec::fmadd(second, Vec::choose(four, of_second), sums[b][v]);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int b = 0; b < B; ++b) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) Vec::store(out + v * stride + b * W, sums[b][v]);
  }
}

// Rows [begin, end), of which the first starts a register; `out` has room for whole registers.
template <int B, int V, class T>
void dot_range(const Sparse24<T> &w, Range rows, const Vectors<float> &x, float *out, int64_t stride) {
  constexpr int64_t W = Vec::width;
  const int64_t whole = rows.end - rows.end % TILE;
  for (; rows.begin + B * W <= whole; rows.begin += B * W, out += B * W) {
    dot_lanes<B, V, true>(w, w.tile(rows.begin), rows.begin % TILE, x, out, stride);
  }
  if constexpr (B > 1) return dot_range<B / 2, V>(w, rows, x, out, stride);
  for (; rows.begin < rows.end; rows.begin += W, out += W) {
    dot_lanes<1, V, false>(w, w.tile(rows.begin), rows.begin % TILE, x, out, stride);
  }
}

// Products with V vectors of the rows of a tile, of which TILE and WORD values behind its own are there if `whole`.
template <int V, bool whole, class T>
inline void dot_tile(const Bitmap<T> &w, const Tile &tile, const Vectors<float> &x, float *out, int64_t stride) {
  constexpr int64_t AHEAD = 1024;  // values, and bytes of words, that are asked for before they are needed
  constexpr int TOGETHER = 4;      // rows that are multiplied by what is loaded once of a vector
  Vec::reg sums[TILE][V];
  for (auto &row : sums)
    for (auto &sum : row) sum = Vec::zero();
  const T *next = w.start(tile);
  const uint8_t *words = w.words(tile);
  const auto expand_next = [&] {
    __builtin_prefetch(next + AHEAD);
    const uint64_t kept = word_at(words);
    const Columns columns = expand_ordered<!whole>(next, kept);
    next += __builtin_popcountll(kept);
    words += WORD / 8;
    return columns;
  };
  const auto add = [&](const Columns &columns, Vec::reg(&row)[V], int v, int64_t p) {
    row[v] = columns.add_product(row[v], x.data + v * x.stride + p);
  };
  for (int64_t p = 0; p < x.size; p += WORD) {
    for (int64_t line = 0; line < TILE * WORD / 8; line += 64) __builtin_prefetch(words + AHEAD + line);
    if constexpr (whole && V == 1) {
#pragma GCC unroll 16
      for (int i = 0; i < TILE; ++i) add(expand_next(), sums[i], 0, p);
    } else if constexpr (whole) {
      for (int i = 0; i < TILE; i += TOGETHER) {
        const Columns rows[TOGETHER] = {expand_next(), expand_next(), expand_next(), expand_next()};
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
#pragma GCC unroll 4
          for (int j = 0; j < TOGETHER; ++j) add(rows[j], sums[i + j], v, p);
        }
      }
    } else {
      for (int64_t i = 0; i < tile.rows; ++i) {
        const Columns columns = expand_next();
        for (int v = 0; v < V; ++v) add(columns, sums[i], v, p);
      }
    }
  }
  for (int64_t i = 0; i < tile.rows; i += 4) {
    for (int v = 0; v < V; ++v) {
      Vec::store_sums(out + v * stride + i, sums[i][v], sums[i + 1][v], sums[i + 2][v], sums[i + 3][v]);
    }
  }
}

template <int, int V, class T>
void dot_range(const Bitmap<T> &w, Range rows, const Vectors<float> &x, float *out, int64_t stride) {
  for (int64_t i = rows.begin; i < rows.end; i += TILE, out += TILE) {
    const Tile tile = w.tile(i);
    if (w.near_end(tile)) {
      dot_tile<V, false>(w, tile, x, out, stride);
    } else {
      dot_tile<V, true>(w, tile, x, out, stride);
    }
  }
}

// Products of rows [begin, end) with all vectors; out[v * stride] is row `begin`, a tile's first.
template <class M>
void dot_tiles(const M &w, Range rows, Vectors<float> x, float *out, int64_t stride) {
  constexpr int ALONE = Vec::width == 16 ? 8 : 4;  // registers of rows for one vector
  while (x.count > 0) {
    const int64_t done = x.count >= M::TOGETHER ? M::TOGETHER : least(x.count, 4);
    if (done == 1) dot_range<ALONE, 1>(w, rows, x, out, stride);
    if (done == 2) dot_range<2, 2>(w, rows, x, out, stride);
    if (done == 3) dot_range<2, 3>(w, rows, x, out, stride);
    if (done == 4) dot_range<2, 4>(w, rows, x, out, stride);
    if constexpr (M::TOGETHER > 4) {
      if (done == M::TOGETHER) dot_range<1, M::TOGETHER>(w, rows, x, out, stride);
    }
    x.data += done * x.stride, x.count -= done, out += done * stride;
  }
}

}  // namespace pycompress::PYCOMPRESS_LEVEL
