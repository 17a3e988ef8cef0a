// C = A Bᵀ for row-major A [m, depth] and B [n, depth] of any stored type, accumulated in float.
//
// Depth is cut into slices. In each, rows of A are copied as floats and rows of B are transposed into panels; a
// register block then runs over both. One thread computes a block of C from first to last slice order, so the
// result does not depend on the number of threads.
#pragma once

#include "numeric.h"

namespace pycompress::PYCOMPRESS_LEVEL {

constexpr int64_t SLICE = 512;           // a panel of A stays in the first-level cache, a block of B in the second
constexpr int64_t SPACING = SLICE + 16;  // floats between packed rows of A: no power of two, to use all cache sets
constexpr int64_t MR = Vec::gemm_rows, NR = Vec::gemm_columns;
constexpr int64_t BLOCK_ROWS = 16 * MR, BLOCK_COLUMNS = 8 * NR;

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

// NR rows of B as [depth, NR]; rows past the end are zero.
template <class T>
void pack_columns(const Matrix<T> &b, int64_t first, int64_t from, int64_t depth, float *out) {
  for (int64_t j = 0; j < NR; j += Vec::width) {
    const int64_t rows = least(Vec::width, b.rows - first - j);
    int64_t p = 0;
    for (; rows == Vec::width && p + Vec::width <= depth; p += Vec::width) {
      Vec::reg block[Vec::width];
      for (int i = 0; i < Vec::width; ++i) block[i] = Vec::load(b.row(first + j + i) + from + p);
      Vec::transpose(block);
      for (int i = 0; i < Vec::width; ++i) Vec::store(out + (p + i) * NR + j, block[i]);
    }
    for (; p < depth; ++p) {
      for (int64_t i = 0; i < Vec::width; ++i) {
        out[p * NR + j + i] = i < rows ? widen(b.row(first + j + i)[from + p]) : 0.0f;
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

}  // namespace pycompress::PYCOMPRESS_LEVEL
