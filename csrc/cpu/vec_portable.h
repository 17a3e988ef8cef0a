// Four floats a register by the compiler's vector extension: runs wherever GCC or Clang compiles.
#pragma once

#include <cstring>

#include "kernels.h"

namespace pycompress::PYCOMPRESS_LEVEL {

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Shifts exponent and mantissa into place; the product rescales the exponent and makes subnormals normal.
inline float widen(Half v) {
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000u) << 16, rest = v.bits & 0x7fffu;
  if (rest >= 0x7c00u) return from_bits(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  return from_bits(sign | to_bits(from_bits(rest << 13) * 0x1p112f));
}

inline Half narrow_half(float v) {
  const uint32_t bits = to_bits(v), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (rest >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // 65520 and up round to infinity
  if (rest < 0x38800000u) {  // below 2^-14 the sum with 0.5 leaves the rounded subnormal in the low bits
    return {static_cast<uint16_t>(sign | (to_bits(from_bits(rest) + 0.5f) - to_bits(0.5f)))};
  }
  const uint32_t even = rest >> 13 & 1u;
  return {static_cast<uint16_t>(sign | (rest - 0x38000000u + 0xfffu + even) >> 13)};
}

struct Vec {
  typedef float reg __attribute__((vector_size(16)));
  static constexpr int width = 4;
  static constexpr int gemm_rows = 4;     // 8 accumulators of the 16 registers
  static constexpr int gemm_columns = 8;  // two registers

  static reg zero() { return reg{}; }
  static reg set1(float v) { return reg{v, v, v, v}; }
  static reg load(const float *p) {
    reg v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static reg load(const Bf16 *p) { return reg{wide(p[0]), wide(p[1]), wide(p[2]), wide(p[3])}; }
  static reg load(const Half *p) { return reg{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])}; }
  static reg load(const int8_t *p) {
    return reg{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]), static_cast<float>(p[3])};
  }
  static void store(float *p, reg v) { std::memcpy(p, &v, sizeof v); }
  static reg add(reg a, reg b) { return a + b; }
  static reg fmadd(reg a, reg b, reg c) { return a * b + c; }

  static void load_pair(const float *p, reg &a, reg &b) { a = load(p), b = load(p + 4); }
  static void load_pair(const Half *p, reg &a, reg &b) { a = load(p), b = load(p + 4); }
  static void load_pair(const int8_t *p, reg &a, reg &b) { a = load(p), b = load(p + 4); }
  // Even and odd elements, the order of the wider levels.
  static void load_pair(const Bf16 *p, reg &even, reg &odd) {
    even = reg{wide(p[0]), wide(p[2]), wide(p[4]), wide(p[6])};
    odd = reg{wide(p[1]), wide(p[3]), wide(p[5]), wide(p[7])};
  }
  template <class T>
  static void load_pair(const T *p, int64_t count, reg &a, reg &b) {
    T padded[2 * width] = {};
    std::memcpy(padded, p, static_cast<std::size_t>(count) * sizeof(T));
    load_pair(padded, a, b);
  }

  // Values that alternate: the first, third, … and the second, fourth, … of eight.
  static void load_alternate(const Bf16 *p, reg &first, reg &second) { load_pair(p, first, second); }
  template <class T>
  static void load_alternate(const T *p, reg &first, reg &second) {
    const reg low = load(p), high = load(p + 4);
    first = reg{low[0], low[2], high[0], high[2]};
    second = reg{low[1], low[3], high[1], high[3]};
  }

  // Elements of a register one after another, each in all lanes.
  class Each {
   public:
    explicit Each(reg all) : rest(all) {}
    reg next() {
      const reg one = set1(rest[0]);
      rest = reg{rest[1], rest[2], rest[3], rest[0]};
      return one;
    }

   private:
    reg rest;
  };

  // Of four floats, one for each lane: that which the low two bits of its number say.
  typedef int32_t numbers __attribute__((vector_size(16)));
  static numbers load_bytes(const uint8_t *p) { return numbers{p[0], p[1], p[2], p[3]}; }
  static numbers shift(numbers v, int bits) { return v >> bits; }
  static reg repeat_four(const float *p) { return load(p); }
  static reg choose(reg four, numbers which) {
    return reg{four[which[0] & 3], four[which[1] & 3], four[which[2] & 3], four[which[3] & 3]};
  }

  // The 32 values of 16 bytes of int4 codes: low halves, then high halves, less 8, times the scale.
  static void load_int4(const uint8_t *p, float scale, reg *values) {
    for (int i = 0; i < 16; ++i) {
      values[i / width][i % width] = static_cast<float>((p[i] & 15) - 8) * scale;
      values[4 + i / width][i % width] = static_cast<float>((p[i] >> 4) - 8) * scale;
    }
  }

  static void store_sums(float *p, reg a, reg b, reg c, reg d) {
    p[0] = sum(a), p[1] = sum(b), p[2] = sum(c), p[3] = sum(d);
  }

  static void transpose(reg (&r)[4]) {
    for (int i = 0; i < 4; ++i) {
      for (int j = i + 1; j < 4; ++j) {
        const float kept = r[i][j];
        r[i][j] = r[j][i];
        r[j][i] = kept;
      }
    }
  }

 private:
  static float wide(Bf16 v) { return from_bits(static_cast<uint32_t>(v.bits) << 16); }
  static float sum(reg v) { return (v[0] + v[1]) + (v[2] + v[3]); }
};

}  // namespace pycompress::PYCOMPRESS_LEVEL
