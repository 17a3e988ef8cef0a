// C = A Bᵀ for row-major A [m, depth] and B [n, depth] of any stored type, accumulated in float.
//
// Depth is cut into slices. In each, rows of A are copied as floats and rows of B are transposed into panels; a
// register block then runs over both. One thread computes a block of C from first to last slice order, so the
// result does not depend on the number of threads. `gemm` is for many rows of both, `multiply` for a B that is read
// once or a few times, the weight of a layer.
#pragma once

#include "numeric.h"

namespace pycompress::PYCOMPRESS_LEVEL {

constexpr int64_t SLICE = 512;           // a panel of A stays in the first-level cache, a block of B in the second
constexpr int64_t SPACING = SLICE + 16;  // floats between packed rows of A: no power of two, to use all cache sets
constexpr int64_t MR = Vec::gemm_rows, NR = Vec::gemm_columns;
constexpr int64_t BLOCK_ROWS = 16 * MR, BLOCK_COLUMNS = 8 * NR;
constexpr int64_t SHARED_ROWS = 32 * MR;  // of A, whose part of one SLICE stays in the second-level cache

template <class T>
struct Matrix {
  const T *data;
  int64_t rows, stride;
  const int64_t *index = nullptr;  // row i is row index[i] of the data when given

  const T *row(int64_t i) const { return data + (index ? index[i] : i) * stride; }
};

// MR rows of A, SPACING floats apart; rows past the end are zero.
template <class T>
void pack_rows(const Matrix<T> &a, int64_t first, int64_t from, int64_t depth, float *out) {
  for (int64_t i = 0; i < MR; ++i, out += SPACING) {
    if (first + i >= a.rows) {
      std::memset(out, 0, SLICE * sizeof(float));
      continue;
    }
    const T *row = a.row(first + i) + from;
    int64_t p = 0;
    for (; p + Vec::width <= depth; p += Vec::width) Vec::store(out + p, Vec::load(row + p));
    for (; p < depth; ++p) out[p] = widen(row[p]);
  }
}

// `width` rows of B as [depth, width]; rows past the end are zero.
template <class T>
void pack_columns(const Matrix<T> &b, int64_t first, int64_t from, int64_t depth, float *out, int64_t width = NR) {
  for (int64_t j = 0; j < width; j += Vec::width) {
    const int64_t rows = least(Vec::width, b.rows - first - j);
    int64_t p = 0;
    for (; rows == Vec::width && p + Vec::width <= depth; p += Vec::width) {
      Vec::reg block[Vec::width];
      for (int i = 0; i < Vec::width; ++i) block[i] = Vec::load(b.row(first + j + i) + from + p);
      Vec::transpose(block);
      for (int i = 0; i < Vec::width; ++i) Vec::store(out + (p + i) * width + j, block[i]);
    }
    for (; p < depth; ++p) {
      for (int64_t i = 0; i < Vec::width; ++i) {
        out[p * width + j + i] = i < rows ? widen(b.row(first + j + i)[from + p]) : 0.0f;
      }
    }
  }
}

// out [MR, NR] = product of two panels; of the columns, whole registers past `columns` are left out.
template <int parts = NR / Vec::width>
void multiply_block(const float *a, const float *b, int64_t columns, int64_t depth, float *out) {
  if constexpr (parts > 1) {
    if (columns <= (parts - 1) * Vec::width) return multiply_block<parts - 1>(a, b, columns, depth, out);
  }
  Vec::reg sums[MR][parts];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < parts; ++j) sums[i][j] = Vec::zero();
  }
  for (int64_t p = 0; p < depth; ++p, b += NR) {
    Vec::reg values[parts];
#pragma GCC unroll 4
    for (int j = 0; j < parts; ++j) values[j] = Vec::load(b + j * Vec::width);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const Vec::reg value = Vec::set1(a[i * SPACING + p]);
#pragma GCC unroll 4
      for (int j = 0; j < parts; ++j) sums[i][j] = Vec::fmadd(value, values[j], sums[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < parts; ++j) Vec::store(out + i * NR + j * Vec::width, sums[i][j]);
  }
}

// Where a register block of C goes, and whether its slice is the first and the last of the depth.
struct Piece {
  int64_t row, column, rows, columns;
  bool first, last;
};

// Stores the first slice's values and adds the others'; `row(i)` is where row i of C starts.
template <class Row>
void accumulate(const float *values, const Piece &piece, const Row &row) {
  for (int64_t i = 0; i < piece.rows; ++i, values += NR) {
    float *to = row(piece.row + i) + piece.column;
    int64_t j = 0;
    for (; j + Vec::width <= piece.columns; j += Vec::width) {
      const Vec::reg value = Vec::load(values + j);
      Vec::store(to + j, piece.first ? value : Vec::add(value, Vec::load(to + j)));
    }
    for (; j < piece.columns; ++j) to[j] = piece.first ? values[j] : to[j] + values[j];
  }
}

// Calls store(values [MR, NR], piece) for each block and slice; with `lower`, only for blocks that reach the lower
// triangle. An empty depth stores zeros. A and B have `rows`, and overloads of pack_rows and pack_columns.
template <class A, class B, class Store>
void gemm(const A &a, const B &b, int64_t depth, bool lower, int threads, const Store &store) {
  const int64_t row_panels = (a.rows + MR - 1) / MR, column_panels = (b.rows + NR - 1) / NR;
  const int64_t high = (a.rows + BLOCK_ROWS - 1) / BLOCK_ROWS, wide = (b.rows + BLOCK_COLUMNS - 1) / BLOCK_COLUMNS;
  float *rows = scratch(Slot::rows, row_panels * MR * SPACING),
        *columns = scratch(Slot::columns, column_panels * NR * SLICE);
#pragma omp parallel num_threads(threads)
  for (int64_t from = 0; from == 0 || from < depth; from += SLICE) {
    const int64_t size = least(SLICE, depth - from);
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < row_panels; ++i) pack_rows(a, i * MR, from, size, rows + i * MR * SPACING);
#pragma omp for schedule(static)
    for (int64_t j = 0; j < column_panels; ++j) pack_columns(b, j * NR, from, size, columns + j * NR * SLICE);
#pragma omp for schedule(dynamic)
    for (int64_t tile = high * wide - 1; tile >= 0; --tile) {
      const int64_t top = tile / wide * BLOCK_ROWS, left = tile % wide * BLOCK_COLUMNS;
      const int64_t bottom = least(a.rows, top + BLOCK_ROWS), right = least(b.rows, left + BLOCK_COLUMNS);
      // Along rows of C, whose lines the hardware then prefetches.
      for (int64_t i = top; i < bottom; i += MR) {
        for (int64_t j = left; j < right && !(lower && j >= i + MR); j += NR) {
          const Piece piece{i, j, least(MR, a.rows - i), least(NR, b.rows - j), from == 0, from + SLICE >= depth};
          alignas(64) float values[MR * NR];
          multiply_block(rows + i * SPACING, columns + j * SLICE, piece.columns, size, values);
          store(values, piece);
        }
      }
    }
  }
}

// Asks for some columns of some rows of B before they are needed: such pieces are too short for the hardware to see
// them coming.
inline void prefetch_bytes(const void *data, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char *>(data) + i, 0, 2);
}
template <class T>
void prefetch(const Matrix<T> &b, Range rows, Range columns) {
  const int64_t bytes = (columns.end - columns.begin) * static_cast<int64_t>(sizeof(T));
  for (int64_t i = rows.begin; i < rows.end; ++i) prefetch_bytes(b.row(i) + columns.begin, bytes);
}

// Products of packed rows of A, [slices, rounded count, SPACING], with some rows of B, into [count, rows].
template <class B>
void multiply_rows(const float *a, int64_t count, const B &b, Range rows, int64_t depth, float *products) {
  const int64_t width = rows.end - rows.begin;
  for (int64_t from = 0; from == 0 || from < depth; from += SLICE, a += round_up(count, MR) * SPACING) {
    const int64_t next = least(from + SLICE, depth);
    prefetch(b, rows, {next, least(next + SLICE, depth)});
    for (int64_t j = 0; j < width; j += NR) {
      alignas(64) float panel[NR * SLICE], values[MR * NR];
      pack_columns(b, rows.begin + j, from, next - from, panel);
      for (int64_t i = 0; i < count; i += MR) {
        const Piece piece{i, j, least(MR, count - i), least(NR, width - j), from == 0, next == depth};
        multiply_block(a + i * SPACING, panel, piece.columns, next - from, values);
        accumulate(values, piece, [&](int64_t row) { return products + row * width; });
      }
    }
  }
}

// Calls finish(row, column, count, products) for pieces of rows of C. Threads share the packed rows of A, SHARED_ROWS
// at a time, and multiply them with rows of B of their own through the whole depth: B is packed where it is used, and
// nobody waits between slices. B has `rows`, and overloads of pack_columns and prefetch.
template <class T, class B, class Finish>
void multiply(const Matrix<T> &a, const B &b, int64_t depth, int threads, const Finish &finish) {
  constexpr int64_t TOGETHER = 4;  // panels of B that one pass over A serves, but for the last ones, which even out
  const int64_t panels = (b.rows + NR - 1) / NR, groups = panels * 3 / 4 / TOGETHER,
                slices = (depth + SLICE - 1) / SLICE;
  float *packed = scratch(Slot::rows, round_up(least(a.rows, SHARED_ROWS), MR) * (slices ? slices : 1) * SPACING);
#pragma omp parallel num_threads(threads)
  for (int64_t top = 0; top < a.rows; top += SHARED_ROWS) {
    const int64_t count = least(SHARED_ROWS, a.rows - top), rows = round_up(count, MR);
#pragma omp for schedule(static)
    for (int64_t slice = 0; slice < slices; ++slice) {
      const int64_t from = slice * SLICE, size = least(SLICE, depth - from);
      for (int64_t i = 0; i < count; i += MR) pack_rows(a, top + i, from, size, packed + (slice * rows + i) * SPACING);
    }
#pragma omp for schedule(dynamic)
    for (int64_t piece = 0; piece < groups + panels - groups * TOGETHER; ++piece) {
      const int64_t panel = piece < groups ? piece * TOGETHER : piece + groups * (TOGETHER - 1);
      const int64_t left = panel * NR, width = least((piece < groups ? TOGETHER : 1) * NR, b.rows - left);
      float *products = scratch(Slot::columns, count * width);
      multiply_rows(packed, count, b, {left, left + width}, depth, products);
      for (int64_t i = 0; i < count; ++i) finish(top + i, left, width, products + i * width);
    }
  }
}

}  // namespace pycompress::PYCOMPRESS_LEVEL
