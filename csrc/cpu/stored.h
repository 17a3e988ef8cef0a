// The matrices of a layer as they are stored: floats, or integer codes with scales (pycompress/formats/codes.py). Each
// gives its products with a few vectors, and panels for gemm, where codes are dequantized while they are packed.
#pragma once

#include "dot.h"
#include "gemm.h"

namespace pycompress::PYCOMPRESS_LEVEL {

template <class T>
struct Floats : Matrix<T> {
  using Exact = Direct<T>;  // prepares vectors of T
  using Wide = Widened<T>;  // prepares vectors of float

  Floats(const void *values, const void *, int64_t rows, int64_t size)
      : Matrix<T>{static_cast<const T *>(values), rows, size} {}

  template <class P>
  void dot(Range range, const Vectors<typename P::X> &x, float *out, int64_t out_stride) const {
    dot_all(Rows<P, T>{this->data, this->stride}, range, x, out, out_stride);
  }
};

// Vectors for codes: floats in their own order.
struct Natural : Widened<int8_t> {
  template <class S>
  static void prepare(const S *from, int64_t count, float *to) {
    widen_all(from, count, to);
    for (int64_t p = count; p < padded(count); ++p) to[p] = 0.0f;
  }
};

template <class T>
struct Int8 {
  using Exact = Natural;
  using Wide = Natural;
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

// Rows of int4 codes, their scales widened.
struct Int4Rows {
  using X = float;
  static constexpr int64_t BLOCK = 32, GROUP = 64;      // columns of 16 bytes, and of a scale
  static constexpr int REGISTERS = BLOCK / Vec::width;  // of a block's values
  static constexpr int BLOCKS = REGISTERS > 2 ? 1 : 2;  // of a load
  static constexpr int64_t UNIT = BLOCKS * BLOCK;
  static constexpr int TOGETHER = 4;  // two pointers a row
  struct Loaded {
    Vec::reg values[BLOCKS * REGISTERS];
  };
  const uint8_t *codes;
  const float *scales;
  int64_t bytes, groups;  // of a row

  const void *at(int64_t row, int64_t p) const { return codes + row * bytes + (p >> 1); }
  Loaded load(int64_t row, int64_t p, int64_t count = UNIT) const {
    const uint8_t *at = codes + row * bytes + (p >> 1);
    Loaded loaded{};
    for (int i = 0; i < BLOCKS && i * BLOCK < count; ++i) {
      Vec::load_int4(at + i * BLOCK / 2, scales[row * groups + (p >> 6)], loaded.values + i * REGISTERS);
    }
    return loaded;
  }
  static Vec::reg step(Vec::reg sum, const Loaded &loaded, const float *x) {
    for (int i = 0; i < BLOCKS * REGISTERS; ++i) {
      sum = Vec::fmadd(loaded.values[i], Vec::load(x + i * Vec::width), sum);
    }
    return sum;
  }
};

template <class T>
struct Int4 {
  using Exact = Natural;
  using Wide = Natural;
  const uint8_t *codes;
  const T *scales;  // one a GROUP of a row
  int64_t rows, bytes, groups;

  Int4(const void *codes, const void *scales, int64_t rows, int64_t size)
      : codes(static_cast<const uint8_t *>(codes)),
        scales(static_cast<const T *>(scales)),
        rows(rows),
        bytes(size / 2),
        groups((size + Int4Rows::GROUP - 1) / Int4Rows::GROUP) {}

  template <class P>
  void dot(Range range, const Vectors<float> &x, float *out, int64_t out_stride) const {
    constexpr int64_t SOME = 16;  // rows whose widened scales stay in the first-level cache
    float *wide = scratch(Slot::scales, SOME * groups);
    for (int64_t from = range.begin; from < range.end; from += SOME, out += SOME) {
      const int64_t count = least(SOME, range.end - from);
      widen_all(scales + from * groups, count * groups, wide);
      dot_all(Int4Rows{codes + from * bytes, wide, bytes, groups}, Range{0, count}, x, out, out_stride);
    }
  }
  void unpack(int64_t row, int64_t from, int64_t count, float *out) const {
    for (int64_t p = from; p < from + count; p += Int4Rows::BLOCK) {
      Vec::reg values[Int4Rows::REGISTERS];
      Vec::load_int4(codes + row * bytes + p / 2, widen(scales[row * groups + p / Int4Rows::GROUP]), values);
      for (const Vec::reg &value : values) {
        Vec::store(out, value);
        out += Vec::width;
      }
    }
  }
};

template <class Codes>
void dequantize_columns(const Codes &b, int64_t first, int64_t from, int64_t depth, float *out) {
  alignas(64) float values[NR * SLICE];
  const int64_t rows = least(NR, b.rows - first);
  for (int64_t i = 0; i < rows; ++i) b.unpack(first + i, from, depth, values + i * SLICE);
  pack_columns(Matrix<float>{values, rows, SLICE}, 0, 0, depth, out);
}

template <class T>
void prefetch(const Int8<T> &b, Range rows, Range columns) {
  prefetch(Matrix<int8_t>{b.codes, b.rows, b.size}, rows, columns);
}

template <class T>
void prefetch(const Int4<T> &b, Range rows, Range columns) {
  prefetch(Matrix<uint8_t>{b.codes, b.rows, b.bytes}, rows, {columns.begin / 2, columns.end / 2});
}

template <class T>
void pack_columns(const Int8<T> &b, int64_t first, int64_t from, int64_t depth, float *out) {
  dequantize_columns(b, first, from, depth, out);
}

template <class T>
void pack_columns(const Int4<T> &b, int64_t first, int64_t from, int64_t depth, float *out) {
  dequantize_columns(b, first, from, depth, out);
}

}  // namespace pycompress::PYCOMPRESS_LEVEL
