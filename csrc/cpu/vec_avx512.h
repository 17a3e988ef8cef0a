// Sixteen floats a register: AVX-512 F, BW, VL and DQ.
#pragma once

#include <immintrin.h>

#include "kernels.h"

namespace pycompress::PYCOMPRESS_LEVEL {

struct Vec {
  using reg = __m512;
  static constexpr int width = 16;
  static constexpr int gemm_rows = 8;      // 24 accumulators of the 32 registers
  static constexpr int gemm_columns = 48;  // three registers

  static reg zero() { return _mm512_setzero_ps(); }
  static reg set1(float v) { return _mm512_set1_ps(v); }
  static reg load(const float *p) { return _mm512_loadu_ps(p); }
  static reg load(const Bf16 *p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static reg load(const Half *p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p))); }
  static void store(float *p, reg v) { _mm512_storeu_ps(p, v); }
  static reg add(reg a, reg b) { return _mm512_add_ps(a, b); }
  static reg fmadd(reg a, reg b, reg c) { return _mm512_fmadd_ps(a, b, c); }

  static void load_pair(const float *p, reg &a, reg &b) { a = load(p), b = load(p + 16); }
  static void load_pair(const Half *p, reg &a, reg &b) { a = load(p), b = load(p + 16); }
  static void load_pair(const Bf16 *p, reg &a, reg &b) { split(_mm512_loadu_si512(p), a, b); }
  static void load_pair(const int8_t *p, reg &a, reg &b) {
    widen_bytes(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)), a, b);
  }

  // The first `count` of a pair, zeros behind them; nothing past them is read.
  static void load_pair(const float *p, int64_t count, reg &a, reg &b) {
    const uint32_t mask = (1u << count) - 1;
    a = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p);
    b = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), p + 16);
  }
  static void load_pair(const Half *p, int64_t count, reg &a, reg &b) {
    const __m512i bits = _mm512_maskz_loadu_epi16((1u << count) - 1, p);
    a = _mm512_cvtph_ps(_mm512_castsi512_si256(bits));
    b = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(bits, 1));
  }
  static void load_pair(const Bf16 *p, int64_t count, reg &a, reg &b) {
    split(_mm512_maskz_loadu_epi16((1u << count) - 1, p), a, b);
  }
  static void load_pair(const int8_t *p, int64_t count, reg &a, reg &b) {
    widen_bytes(_mm256_maskz_loadu_epi8((1u << count) - 1, p), a, b);
  }

  // Values that alternate: the first, third, … and the second, fourth, … of 32.
  static void load_alternate(const Bf16 *p, reg &first, reg &second) { load_pair(p, first, second); }
  template <class T>
  static void load_alternate(const T *p, reg &first, reg &second) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const reg low = load(p), high = load(p + 16);
    first = _mm512_permutex2var_ps(low, even, high);
    second = _mm512_permutex2var_ps(low, _mm512_or_si512(even, _mm512_set1_epi32(1)), high);
  }

  // Elements of a register one after another, each in all lanes.
  class Each {
   public:
    explicit Each(reg all) : rest(_mm512_castps_si512(all)) {}
    reg next() {
      const reg one = _mm512_broadcastss_ps(_mm512_castps512_ps128(_mm512_castsi512_ps(rest)));
      rest = _mm512_alignr_epi32(rest, rest, 1);
      return one;
    }

   private:
    __m512i rest;
  };

  // Of four floats, one for each lane: that which the low two bits of its number say.
  using numbers = __m512i;
  static numbers load_bytes(const uint8_t *p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
  }
  static numbers shift(numbers v, int bits) { return _mm512_srli_epi32(v, static_cast<unsigned>(bits)); }
  static reg repeat_four(const float *p) { return _mm512_broadcast_f32x4(_mm_loadu_ps(p)); }
  static reg choose(reg fours, numbers which) { return _mm512_permutevar_ps(fours, which); }

  // The 32 values of 16 bytes of int4 codes: low halves, then high halves, less 8, times the scale.
  static void load_int4(const uint8_t *p, float scale, reg *values) {
    const reg codes = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    const reg table = _mm512_mul_ps(codes, _mm512_set1_ps(scale));
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
    values[0] = _mm512_permutexvar_ps(bytes, table);  // looks at the low four bits alone
    values[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), table);
  }

  // Sums of four registers, in the lanes of one.
  static __m128 sum4(reg a, reg b, reg c, reg d) {
    const __m128 p = quarter(a), q = quarter(b), r = quarter(c), s = quarter(d);
    const __m128 pq = _mm_add_ps(_mm_unpacklo_ps(p, q), _mm_unpackhi_ps(p, q));
    const __m128 rs = _mm_add_ps(_mm_unpacklo_ps(r, s), _mm_unpackhi_ps(r, s));
    return _mm_add_ps(_mm_movelh_ps(pq, rs), _mm_movehl_ps(rs, pq));
  }
  static void store_sums(float *p, reg a, reg b, reg c, reg d) { _mm_storeu_ps(p, sum4(a, b, c, d)); }

  static void transpose(reg (&r)[16]) {
    reg t[16];
    for (int i = 0; i < 16; i += 4) {
      const reg lo0 = _mm512_unpacklo_ps(r[i], r[i + 1]), hi0 = _mm512_unpackhi_ps(r[i], r[i + 1]);
      const reg lo1 = _mm512_unpacklo_ps(r[i + 2], r[i + 3]), hi1 = _mm512_unpackhi_ps(r[i + 2], r[i + 3]);
      t[i] = _mm512_shuffle_ps(lo0, lo1, 0x44), t[i + 1] = _mm512_shuffle_ps(lo0, lo1, 0xee);
      t[i + 2] = _mm512_shuffle_ps(hi0, hi1, 0x44), t[i + 3] = _mm512_shuffle_ps(hi0, hi1, 0xee);
    }
    for (int i = 0; i < 4; ++i) {
      const reg even0 = _mm512_shuffle_f32x4(t[i], t[i + 4], 0x88), odd0 = _mm512_shuffle_f32x4(t[i], t[i + 4], 0xdd);
      const reg even1 = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0x88);
      const reg odd1 = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0xdd);
      r[i] = _mm512_shuffle_f32x4(even0, even1, 0x88), r[i + 8] = _mm512_shuffle_f32x4(even0, even1, 0xdd);
      r[i + 4] = _mm512_shuffle_f32x4(odd0, odd1, 0x88), r[i + 12] = _mm512_shuffle_f32x4(odd0, odd1, 0xdd);
    }
  }

 private:
  // Even and odd elements: a shift and a mask widen 32 values that one load brought.
  static void split(__m512i bits, reg &even, reg &odd) {
    even = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static void widen_bytes(__m256i bytes, reg &a, reg &b) {
    a = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes)));
    b = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1)));
  }
  static __m128 quarter(reg v) {
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  }
};

inline float widen(Half v) { return _cvtsh_ss(v.bits); }
inline Half narrow_half(float v) { return {_cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT)}; }

}  // namespace pycompress::PYCOMPRESS_LEVEL
