// The matrices of a layer as they are stored: floats, or integer codes with scales (pycompress/storage.py). Each gives
// its products with a few vectors, and panels for gemm, where codes are widened while they are packed.
#pragma once

#include "dot.h"
#include "gemm.h"

namespace pycompress::PYCOMPRESS_LEVEL {

template <class T>
struct Floats : Matrix<T> {
  using Exact = Direct<T>;  // how vectors of T are prepared, and vectors of float
  using Wide = Widened<T>;

  Floats(const void *values, const void *, int64_t rows, int64_t size)
      : Matrix<T>{static_cast<const T *>(values), rows, size} {}

  template <class P>
  void dot(Range range, const Vectors<typename P::X> &x, float *out, int64_t out_stride) const {
    dot_all(Rows<P, T>{this->data, this->stride}, range, x, out, out_stride);
  }
};

template <class T>
struct Int8 {
  using Exact = Widened<int8_t>;
  using Wide = Widened<int8_t>;
  const int8_t *codes;
  const T *scales;  // one a row
  int64_t rows, size;

  Int8(const void *codes, const void *scales, int64_t rows, int64_t size)
      : codes(static_cast<const int8_t *>(codes)), scales(static_cast<const T *>(scales)), rows(rows), size(size) {}

  template <class P>
  void dot(Range range, const Vectors<float> &x, float *out, int64_t out_stride) const {
    dot_all(Rows<P, int8_t>{codes, size}, range, x, out, out_stride);
    for (int64_t v = 0; v < x.count; ++v) {
      for (int64_t i = range.begin; i < range.end; ++i) out[v * out_stride + i - range.begin] *= widen(scales[i]);
    }
  }
  void unpack(int64_t row, int64_t from, int64_t count, float *out) const {
    const int8_t *at = codes + row * size + from;
    const float scale = widen(scales[row]);
    for (int64_t p = 0; p < count; ++p) out[p] = static_cast<float>(at[p]) * scale;
  }
};

template <class T>
struct Int4 {
  using Exact = Widened<int8_t>;
  using Wide = Widened<int8_t>;
  using X = float;
  static constexpr int64_t BLOCK = 32, GROUP = 64;      // columns of 16 bytes, and of a scale
  static constexpr int REGISTERS = BLOCK / Vec::width;  // of a block's values
  static constexpr int BLOCKS = REGISTERS > 2 ? 1 : 2;  // of a load
  static constexpr int64_t UNIT = BLOCKS * BLOCK;
  struct Loaded {
    Vec::reg values[BLOCKS * REGISTERS];
  };
  const uint8_t *codes;
  const T *scales;
  int64_t rows, size, groups = (size + GROUP - 1) / GROUP;

  Int4(const void *codes, const void *scales, int64_t rows, int64_t size)
      : codes(static_cast<const uint8_t *>(codes)), scales(static_cast<const T *>(scales)), rows(rows), size(size) {}

  Loaded load(int64_t row, int64_t p, int64_t count = UNIT) const {
    const uint8_t *at = codes + (row * size + p) / 2;
    const float scale = widen(scales[row * groups + p / GROUP]);
    Loaded loaded{};
    for (int i = 0; i < BLOCKS && i * BLOCK < count; ++i) {
      Vec::load_int4(at + i * BLOCK / 2, scale, loaded.values + i * REGISTERS);
    }
    return loaded;
  }
  static Vec::reg step(Vec::reg sum, const Loaded &loaded, const float *x) {
    for (int i = 0; i < BLOCKS * REGISTERS; ++i) {
      sum = Vec::fmadd(loaded.values[i], Vec::load(x + i * Vec::width), sum);
    }
    return sum;
  }

  template <class P>
  void dot(Range range, const Vectors<float> &x, float *out, int64_t out_stride) const {
    dot_all(*this, range, x, out, out_stride);
  }
  void unpack(int64_t row, int64_t from, int64_t count, float *out) const {
    for (int64_t p = from; p < from + count; p += BLOCK) {
      Vec::reg values[REGISTERS];
      Vec::load_int4(codes + (row * size + p) / 2, widen(scales[row * groups + p / GROUP]), values);
      for (int i = 0; i < REGISTERS; ++i, out += Vec::width) Vec::store(out, values[i]);
    }
  }
};

template <class Codes>
void widen_columns(const Codes &b, int64_t first, int64_t from, int64_t depth, float *out) {
  alignas(64) float values[NR * SLICE];
  const int64_t rows = least(NR, b.rows - first);
  for (int64_t i = 0; i < rows; ++i) b.unpack(first + i, from, depth, values + i * SLICE);
  pack_columns(Matrix<float>{values, rows, SLICE}, 0, 0, depth, out);
}

template <class T>
void pack_columns(const Int8<T> &b, int64_t first, int64_t from, int64_t depth, float *out) {
  widen_columns(b, first, from, depth, out);
}

template <class T>
void pack_columns(const Int4<T> &b, int64_t first, int64_t from, int64_t depth, float *out) {
  widen_columns(b, first, from, depth, out);
}

}  // namespace pycompress::PYCOMPRESS_LEVEL
