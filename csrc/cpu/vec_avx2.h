// Eight floats a register: AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "kernels.h"

namespace pycompress::PYCOMPRESS_LEVEL {

struct Vec {
  using reg = __m256;
  static constexpr int width = 8;
  static constexpr int gemm_rows = 6;      // 12 accumulators of the 16 registers
  static constexpr int gemm_columns = 16;  // two registers

  static reg zero() { return _mm256_setzero_ps(); }
  static reg set1(float v) { return _mm256_set1_ps(v); }
  static reg load(const float *p) { return _mm256_loadu_ps(p); }
  static reg load(const Bf16 *p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static reg load(const Half *p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))); }
  static reg load(const int8_t *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p))));
  }
  static void store(float *p, reg v) { _mm256_storeu_ps(p, v); }
  static reg add(reg a, reg b) { return _mm256_add_ps(a, b); }
  static reg fmadd(reg a, reg b, reg c) { return _mm256_fmadd_ps(a, b, c); }

  static void load_pair(const float *p, reg &a, reg &b) { a = load(p), b = load(p + 8); }
  static void load_pair(const Half *p, reg &a, reg &b) { a = load(p), b = load(p + 8); }
  // Even and odd elements: a shift and a mask widen 16 values that one load brought.
  static void load_pair(const Bf16 *p, reg &even, reg &odd) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
    even = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
    odd = _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static void load_pair(const int8_t *p, reg &a, reg &b) { a = load(p), b = load(p + 8); }
  // The first `count` of a pair, zeros behind them; nothing past them is read.
  template <class T>
  static void load_pair(const T *p, int64_t count, reg &a, reg &b) {
    T padded[2 * width] = {};
    std::memcpy(padded, p, static_cast<std::size_t>(count) * sizeof(T));
    load_pair(padded, a, b);
  }

  // Values that alternate: the first, third, … and the second, fourth, … of 16.
  static void load_alternate(const Bf16 *p, reg &first, reg &second) { load_pair(p, first, second); }
  template <class T>
  static void load_alternate(const T *p, reg &first, reg &second) {
    const reg low = load(p), high = load(p + 8);
    first = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(_mm256_shuffle_ps(low, high, 0x88)), 0xd8));
    second = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(_mm256_shuffle_ps(low, high, 0xdd)), 0xd8));
  }

  // Elements of a register one after another, each in all lanes.
  class Each {
   public:
    explicit Each(reg all) : rest(all) {}
    reg next() {
      const reg one = _mm256_broadcastss_ps(_mm256_castps256_ps128(rest));
      rest = _mm256_permutevar8x32_ps(rest, _mm256_setr_epi32(1, 2, 3, 4, 5, 6, 7, 0));
      return one;
    }

   private:
    reg rest;
  };

  // Of four floats, one for each lane: that which the low two bits of its number say.
  using numbers = __m256i;
  static numbers load_bytes(const uint8_t *p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p)));
  }
  static numbers shift(numbers v, int bits) { return _mm256_srli_epi32(v, bits); }
  static reg repeat_four(const float *p) { return _mm256_broadcast_ps(reinterpret_cast<const __m128 *>(p)); }
  static reg choose(reg fours, numbers which) { return _mm256_permutevar_ps(fours, which); }

  // The 32 values of 16 bytes of int4 codes: low halves, then high halves, less 8, times the scale.
  static void load_int4(const uint8_t *p, float scale, reg *values) {
    const reg scales = set1(scale), least = set1(-8.0f * scale);
    for (int i = 0; i < 2; ++i) {
      const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p + 8 * i)));
      const __m256i low = _mm256_and_si256(bytes, _mm256_set1_epi32(15)), high = _mm256_srli_epi32(bytes, 4);
      values[i] = fmadd(_mm256_cvtepi32_ps(low), scales, least);
      values[2 + i] = fmadd(_mm256_cvtepi32_ps(high), scales, least);
    }
  }

  // Sums of four registers, in four neighbouring floats.
  static void store_sums(float *p, reg a, reg b, reg c, reg d) {
    const reg sums = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
  }

  static void transpose(reg (&r)[8]) {
    reg t[8];
    for (int i = 0; i < 8; i += 4) {
      const reg lo0 = _mm256_unpacklo_ps(r[i], r[i + 1]), hi0 = _mm256_unpackhi_ps(r[i], r[i + 1]);
      const reg lo1 = _mm256_unpacklo_ps(r[i + 2], r[i + 3]), hi1 = _mm256_unpackhi_ps(r[i + 2], r[i + 3]);
      t[i] = _mm256_shuffle_ps(lo0, lo1, 0x44), t[i + 1] = _mm256_shuffle_ps(lo0, lo1, 0xee);
      t[i + 2] = _mm256_shuffle_ps(hi0, hi1, 0x44), t[i + 3] = _mm256_shuffle_ps(hi0, hi1, 0xee);
    }
    for (int i = 0; i < 4; ++i) {
      r[i] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x20);
      r[i + 4] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x31);
    }
  }
};

inline float widen(Half v) { return _cvtsh_ss(v.bits); }
inline Half narrow_half(float v) { return {_cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT)}; }

}  // namespace pycompress::PYCOMPRESS_LEVEL
