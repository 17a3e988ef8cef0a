// Tiles of 32 rows of a stored matrix times up to 16 tokens on tensor cores, for the kernels of few tokens.
//
// The rows are the tall operand of mma.m16n8, the tokens the narrow one. Every sum may be taken in any order of its
// columns, so a lane's 16 bytes are consecutive columns of one row, loaded at once, and are handed to as many products
// as they fill; the tokens' numbers are loaded in the same order. A step is what one product takes of a lane: 8 bytes
// of either operand's numbers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#include "ptx.cuh"

namespace pycompress::cuda {

enum class Storage { FLOAT, INT8, INT4 };

constexpr int WARP = 32, WARPS = 8, THREADS = WARP * WARPS;
constexpr int ROWS = 32;    // of a tile: two products' rows
constexpr int TOKENS = 16;  // of a tile: two products' columns
constexpr int GROUP = 64;   // columns of a scale in int4

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Columns of a lane's 16 bytes, and of the chunk of a row that four lanes share.
template <class T, Storage S>
constexpr int COLUMNS = S == Storage::INT4   ? 32
                        : S == Storage::INT8 ? 16
                                             : 16 / static_cast<int>(sizeof(T));
template <class T, Storage S>
constexpr int CHUNK = 4 * COLUMNS<T, S>;
// Chunks a warp has in flight: those of codes are wider, and there are fewer of them.
template <Storage S>
constexpr int AHEAD = S == Storage::FLOAT ? 4 : 2;
template <class T>
constexpr int VECTOR = 16 / static_cast<int>(sizeof(T));

template <class T>
__device__ float to_float(T value) {
  return static_cast<float>(value);
}

__device__ inline uint32_t word(uint4 vector, int i) {
  return i == 0 ? vector.x : i == 1 ? vector.y : i == 2 ? vector.z : vector.w;
}

template <class T>
__device__ uint4 packed(const T (&values)[VECTOR<T>]) {
  uint4 vector;
  std::memcpy(&vector, values, sizeof vector);
  return vector;
}

__device__ inline int index_at(const void *indices, int i, bool wide) {
  return wide ? static_cast<const int32_t *>(indices)[i] : static_cast<const int16_t *>(indices)[i];
}

// 16 bytes of which the first `bytes` are there; the others, which may belong to another row, are zero.
__device__ inline uint4 load16(const void *from, int bytes, bool aligned) {
  if (bytes <= 0) return {0, 0, 0, 0};
  if (aligned && bytes >= 16) return *static_cast<const uint4 *>(from);
  const auto address = reinterpret_cast<uintptr_t>(from);
  const auto *words = reinterpret_cast<const uint32_t *>(address & ~uintptr_t{3});
  const int before = static_cast<int>(address & 3);
  uint32_t found[5], kept[4];
#pragma unroll
  for (int i = 0; i < 5; ++i) {
    const int left = before + bytes - 4 * i;  // of this word; what is behind them may be behind the tensor's end
    found[i] = left >= 4 ? words[i] : 0;
    if (left > 0 && left < 4) {
      const auto *ends = reinterpret_cast<const uint8_t *>(words + i);
      for (int byte = 0; byte < left; ++byte) found[i] |= static_cast<uint32_t>(ends[byte]) << (8 * byte);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int left = bytes - 4 * i;
    kept[i] = __funnelshift_r(found[i], found[i + 1], 8 * before);
    kept[i] = left >= 4 ? kept[i] : left <= 0 ? 0 : kept[i] & ((1u << (8 * left)) - 1);
  }
  return {kept[0], kept[1], kept[2], kept[3]};
}

// What TF32 keeps of two floats, and what it keeps of the rest.
__device__ inline uint2 split_tf32(uint2 bits, uint2 &rest) {
  const uint2 kept{to_tf32(__uint_as_float(bits.x)), to_tf32(__uint_as_float(bits.y))};
  rest = {to_tf32(__uint_as_float(bits.x) - __uint_as_float(kept.x)),
          to_tf32(__uint_as_float(bits.y) - __uint_as_float(kept.y))};
  return kept;
}

// Float32 as three products in TF32: 21 bits of each number take part.
__device__ inline void mma(float, FragC &c, FragA a0, FragA a1, FragB b) {
  FragA a0_rest, a1_rest;
  FragB b_rest;
  a0 = split_tf32(a0, a0_rest);
  a1 = split_tf32(a1, a1_rest);
  b = split_tf32(b, b_rest);
  mma_tf32(c, a0_rest, a1_rest, b);
  mma_tf32(c, a0, a1, b_rest);
  mma_tf32(c, a0, a1, b);
}

// Four codes of int4 as 16-bit floats: under the bits of 1024 (128 in bfloat16) a code is added to that number.
__device__ inline uint2 from_int4(uint32_t codes, __half scale) {
  const __half2 scales{scale, scale}, offset{__ushort_as_half(0x6408), __ushort_as_half(0x6408)};
  uint32_t bits[2]{(codes & 0x000f000f) | 0x64006400, ((codes >> 8) & 0x000f000f) | 0x64006400};
  __half2 values[2];
  std::memcpy(values, bits, sizeof bits);
  for (auto &pair : values) pair = __hmul2(__hsub2(pair, offset), scales);
  std::memcpy(bits, values, sizeof bits);
  return {bits[0], bits[1]};
}

__device__ inline uint2 from_int4(uint32_t codes, __nv_bfloat16 scale) {
  const __nv_bfloat162 scales{scale, scale}, offset{__ushort_as_bfloat16(0x4308), __ushort_as_bfloat16(0x4308)};
  uint32_t bits[2]{(codes & 0x000f000f) | 0x43004300, ((codes >> 8) & 0x000f000f) | 0x43004300};
  __nv_bfloat162 values[2];
  std::memcpy(values, bits, sizeof bits);
  for (auto &pair : values) pair = __hmul2(__hsub2(pair, offset), scales);
  std::memcpy(bits, values, sizeof bits);
  return {bits[0], bits[1]};
}

// The numbers of one step of a lane's 16 bytes; those of int8 still without their row's scale.
template <class T, Storage S>
__device__ uint2 step_of(uint4 stored, int step, T scale) {
  if constexpr (S == Storage::FLOAT) {
    return step == 0 ? uint2{stored.x, stored.y} : uint2{stored.z, stored.w};
  } else if constexpr (S == Storage::INT4 && sizeof(T) == 2) {
    // The codes 4w to 4w + 3 lie in the low halves of a word's bytes; the order 0, 2, 1, 3 makes pairs of neighbours.
    const uint32_t codes = __byte_perm(word(stored, step % 4), 0, 0x3120);
    return from_int4(step < 4 ? codes : codes >> 4, scale);
  } else {
    constexpr int STEP = 8 / sizeof(T);
    T values[STEP];
    uint2 bits;
#pragma unroll
    for (int i = 0; i < STEP; ++i) {
      const int column = step * STEP + i, byte = S == Storage::INT4 ? column % 16 : column;
      const uint32_t code = word(stored, byte / 4) >> (8 * (byte % 4));
      values[i] =
          S == Storage::INT4
              ? T(static_cast<float>(static_cast<int>(code >> (column < 16 ? 0 : 4) & 15) - 8) * to_float(scale))
              : T(static_cast<float>(static_cast<int8_t>(code & 255)));
    }
    std::memcpy(&bits, values, sizeof bits);
    return bits;
  }
}

// Rows of a matrix [., n] as it is stored, of which those below `first` are not: they are zero.
template <class T, Storage S>
struct StoredRows {
  const void *numbers;
  const T *scales;
  int first, end, n;
  bool aligned;

  // Only scales are T where codes are stored; bytes of n columns and of one are both whole.
  static constexpr int BITS = S == Storage::INT4 ? 4 : S == Storage::INT8 ? 8 : 8 * static_cast<int>(sizeof(T));

  __device__ const char *at(int row, int column) const {
    const int64_t offset = static_cast<int64_t>(row - first) * n + column;
    return static_cast<const char *>(numbers) + (BITS == 4 ? offset / 2 : offset * (BITS / 8));
  }
  __device__ bool has(int row, int column) const { return row >= first && row < end && column < n; }
  __device__ uint4 load(int row, int column) const {
    if (!has(row, column)) return {0, 0, 0, 0};
    return load16(at(row, column), (n - column) * BITS / 8, aligned);
  }
  __device__ T scale(int row, int column) const {
    if (S != Storage::INT4 || !has(row, column)) return T(0.0f);
    return scales[static_cast<int64_t>(row - first) * ceil_div(n, GROUP) + column / GROUP];
  }
  __device__ float row_scale(int row) const { return S == Storage::INT8 ? to_float(scales[row - first]) : 1.0f; }
};

// A row a cluster, with ones where the label is its own.
template <class T>
struct LabelRows {
  const void *labels;
  int n;
  bool wide;

  __device__ bool has(int, int) const { return false; }
  __device__ const char *at(int, int) const { return nullptr; }
  __device__ uint4 load(int row, int column) const {
    T values[VECTOR<T>];
#pragma unroll
    for (int i = 0; i < VECTOR<T>; ++i) {
      const bool own = column + i < n && index_at(labels, column + i, wide) == row;
      values[i] = T(own ? 1.0f : 0.0f);
    }
    return packed(values);
  }
  __device__ T scale(int, int) const { return T(0.0f); }
};

// Tokens' inputs, in the order of `channels` where there are any.
template <class T>
struct Inputs {
  const T *x;
  const void *channels;
  int tokens, stride, n;
  bool wide, aligned;

  __device__ uint4 load(int token, int column) const {
    if (token >= tokens) return {0, 0, 0, 0};
    const T *row = x + static_cast<int64_t>(token) * stride;
    if (!channels) return load16(row + column, (n - column) * static_cast<int>(sizeof(T)), aligned);
    T values[VECTOR<T>];
#pragma unroll
    for (int i = 0; i < VECTOR<T>; ++i) {
      values[i] = column + i < n ? row[index_at(channels, column + i, wide)] : T(0.0f);
    }
    return packed(values);
  }
};

// Asks for what `multiply_tile` reads of the rows first.
template <class T, Storage S, class Rows>
__device__ void prefetch_tile(const Rows &rows, int row, int begin, int end) {
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, ahead = lane / 8;
  const int column = (begin + warp + ahead * WARPS) * CHUNK<T, S>;
  if (ahead >= AHEAD<S> || begin + warp + ahead * WARPS >= end) return;
  for (int r = lane % 8; r < ROWS; r += 8) {
    if (rows.has(row + r, column)) prefetch(rows.at(row + r, column));
  }
}

// Products of a tile's rows from `row` on with TOKENS tokens from `token` on, over the chunks from `begin` to `end`,
// those of all warps added: in `sums`, by token and row.
template <class T, Storage S, class Rows, class Columns>
__device__ void multiply_tile(const Rows &rows, const Columns &columns, int row, int token, int begin, int end,
                              float (&sums)[WARPS][TOKENS][ROWS + 1]) {
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, group = lane / 4, member = lane % 4;
  row += group;
  token += group;
  float part[2][TOKENS / 8][4] = {};
  for (int first = begin + warp; first < end; first += AHEAD<S> * WARPS) {
    uint4 stored[AHEAD<S>][4];
    T scales[AHEAD<S>][4];
#pragma unroll
    for (int ahead = 0; ahead < AHEAD<S>; ++ahead) {
      const int chunk = first + ahead * WARPS, column = chunk * CHUNK<T, S> + member * COLUMNS<T, S>;
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        stored[ahead][r] = chunk < end ? rows.load(row + 8 * r, column) : uint4{0, 0, 0, 0};
        scales[ahead][r] = chunk < end ? rows.scale(row + 8 * r, column) : T(0.0f);
      }
    }
#pragma unroll
    for (int ahead = 0; ahead < AHEAD<S>; ++ahead) {
      const int chunk = first + ahead * WARPS, column = chunk * CHUNK<T, S> + member * COLUMNS<T, S>;
      if (chunk >= end) break;
#pragma unroll
      for (int vector = 0; vector < COLUMNS<T, S> / VECTOR<T>; ++vector) {
        uint4 inputs[TOKENS / 8];
#pragma unroll
        for (int n = 0; n < TOKENS / 8; ++n) inputs[n] = columns.load(token + 8 * n, column + vector * VECTOR<T>);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            const FragA a0 = step_of<T, S>(stored[ahead][2 * m], 2 * vector + half, scales[ahead][2 * m]);
            const FragA a1 = step_of<T, S>(stored[ahead][2 * m + 1], 2 * vector + half, scales[ahead][2 * m + 1]);
#pragma unroll
            for (int n = 0; n < TOKENS / 8; ++n) {
              mma(T(), part[m][n], a0, a1, half ? uint2{inputs[n].z, inputs[n].w} : uint2{inputs[n].x, inputs[n].y});
            }
          }
        }
      }
    }
  }
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < TOKENS / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[warp][8 * n + 2 * member + i % 2][16 * m + group + 8 * (i / 2)] = part[m][n][i];
    }
  }
  __syncthreads();
}

// The warps' sums of one element, added from the first to the last.
__device__ inline float total(const float (&sums)[WARPS][TOKENS][ROWS + 1], int token, int row) {
  float sum = 0.0f;
  for (int warp = 0; warp < WARPS; ++warp) sum += sums[warp][token][row];
  return sum;
}

}  // namespace pycompress::cuda
