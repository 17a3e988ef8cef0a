// Scalars: one value to and from float, ranges for threads.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace pycompress::PYCOMPRESS_LEVEL {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

inline float widen(float v) { return v; }
inline float widen(Bf16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
T narrow(float v);
template <>
inline float narrow<float>(float v) {
  return v;
}
template <>
inline Half narrow<Half>(float v) {
  return narrow_half(v);
}
template <>
inline Bf16 narrow<Bf16>(float v) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return {static_cast<uint16_t>(v != v ? 0x7fc0u : rounded)};
}

// The part of [0, count) that falls to one of `parts`, cut at multiples of `grain`.
struct Range {
  int64_t begin, end;
};
inline Range share_of(int64_t count, int64_t grain, int part, int parts) {
  const int64_t pieces = (count + grain - 1) / grain;
  return {least(count, pieces * part / parts * grain), least(count, pieces * (part + 1) / parts * grain)};
}

}  // namespace pycompress::PYCOMPRESS_LEVEL
