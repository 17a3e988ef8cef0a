// Few tokens through a 2:4 layer: the kept values and their positions are read once, put into their places in registers
// and multiplied on tensor cores.
//
// A lane's share of one product is four consecutive columns of a row, which is one group. Where rows are too few to
// fill the device, columns are split over blocks; their sums are then added in a fixed order, without atomics.
#include "sparse24.h"

#include <cuda_runtime.h>

#include <algorithm>

#include "tile.cuh"

namespace pycompress::cuda {
namespace {

constexpr int MAX_SPLITS = 8;
// Chunks a warp has in flight, as many as its registers hold.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
template <class T>
constexpr int DEPTH = sizeof(T) == 2 ? 3 : 2;
#else
template <class T>
constexpr int DEPTH = 4;
#endif
// Columns of a lane's 16 bytes of values, and of the chunk of a row that four lanes share.
template <class T>
constexpr int SPREAD = 2 * VECTOR<T>;
template <class T>
constexpr int SPAN = 4 * SPREAD<T>;

// Rows of values and of positions; n is a multiple of 8.
template <class T>
struct Rows24 {
  const T *values;
  const uint8_t *positions;
  int end, n;
  bool aligned;

  __device__ bool has(int row, int column) const { return row < end && column < n; }
  __device__ uint4 load(int row, int column) const {
    if (!has(row, column)) return {0, 0, 0, 0};
    const int64_t offset = (static_cast<int64_t>(row) * n + column) / 2;
    return load16(values + offset, (n - column) / 2 * static_cast<int>(sizeof(T)), aligned);
  }
  // A nibble for each group of the lane's columns.
  __device__ uint32_t codes(int row, int column) const {
    if (!has(row, column)) return 0;
    const uint8_t *at = positions + (static_cast<int64_t>(row) * n + column) / 8;
    return SPREAD<T> > 8 && column + 8 < n ? at[0] | at[1] << 8 : at[0];
  }
};

// The numbers that one product takes of a lane: of 16-bit floats a whole group, of float32 half of one.
template <class T>
__device__ uint2 spread(uint4 stored, uint32_t codes, int step) {
  if constexpr (sizeof(T) == 2) {
    const uint32_t code = codes >> (4 * step), pair = word(stored, step);
    // A byte a column, which says what two bytes it takes: those of the first value, of the second or zeros.
    const uint32_t taken = 0x44444444u ^ 0x54u << (code & 3) * 8 ^ 0x76u << (code >> 2 & 3) * 8;
    return {__byte_perm(pair, 0, taken), __byte_perm(pair, 0, taken >> 16)};
  } else {
    const uint32_t code = codes >> (4 * (step / 2)), column = 2 * (step % 2);
    const uint32_t first = word(stored, step & ~1), second = word(stored, step | 1);
    const auto at = [&](uint32_t c) { return c == (code & 3) ? first : c == (code >> 2 & 3) ? second : 0u; };
    return {at(column), at(column + 1)};
  }
}

template <class T>
struct Layer {
  Rows24<T> rows;
  Inputs<T> inputs;
  const T *bias;
  float *parts;
  T *y;
  int tokens;
};

// One row a place of `parts` [splits, tokens, rows], or of y where nothing is split.
template <class T>
__global__ void __launch_bounds__(THREADS) product_kernel(const Layer<T> p) {
  __shared__ float sums[WARPS][TOKENS][ROWS + 1];
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, group = lane / 4, member = lane % 4;
  const int first_row = blockIdx.x * ROWS, split = blockIdx.y, splits = gridDim.y;
  const int chunks = ceil_div(p.rows.n, SPAN<T>), end = chunks * (split + 1) / splits;
  float part[2][TOKENS / 8][4] = {};
  for (int first = chunks * split / splits + warp; first < end; first += DEPTH<T> * WARPS) {
    uint4 stored[DEPTH<T>][4];
    uint32_t codes[DEPTH<T>][4];
#pragma unroll
    for (int ahead = 0; ahead < DEPTH<T>; ++ahead) {
      const int chunk = first + ahead * WARPS;
      const int column = chunk < end ? chunk * SPAN<T> + member * SPREAD<T> : p.rows.n;
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        stored[ahead][r] = p.rows.load(first_row + group + 8 * r, column);
        codes[ahead][r] = p.rows.codes(first_row + group + 8 * r, column);
      }
    }
#pragma unroll
    for (int ahead = 0; ahead < DEPTH<T>; ++ahead) {
      const int chunk = first + ahead * WARPS, column = chunk * SPAN<T> + member * SPREAD<T>;
      if (chunk >= end) break;
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        uint2 tokens[TOKENS / 8];
#pragma unroll
        for (int n = 0; n < TOKENS / 8; ++n) {
          const uint4 numbers = p.inputs.load(group + 8 * n, column + step / 2 * VECTOR<T>);
          tokens[n] = step % 2 ? uint2{numbers.z, numbers.w} : uint2{numbers.x, numbers.y};
        }
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          const uint2 upper = spread<T>(stored[ahead][2 * m], codes[ahead][2 * m], step);
          const uint2 lower = spread<T>(stored[ahead][2 * m + 1], codes[ahead][2 * m + 1], step);
#pragma unroll
          for (int n = 0; n < TOKENS / 8; ++n) multiply(T(), part[m][n], upper, lower, tokens[n]);
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 2 * TOKENS / 8 * 4; ++i) {
    const int m = i / (TOKENS / 2), n = i / 4 % (TOKENS / 8), at = i % 4;
    sums[warp][8 * n + 2 * member + at % 2][16 * m + group + 8 * (at / 2)] = part[m][n][at];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < ROWS * p.tokens; i += THREADS) {
    const int row = first_row + i % ROWS, token = i / ROWS;
    if (row >= p.rows.end) continue;
    const float sum = total(sums, token, i % ROWS);
    const int64_t at = static_cast<int64_t>(token) * p.rows.end + row;
    if (splits > 1) {
      p.parts[static_cast<int64_t>(split) * p.tokens * p.rows.end + at] = sum;
    } else {
      p.y[at] = T(p.bias ? sum + widen(p.bias[row]) : sum);
    }
  }
}

template <class T>
__global__ void fold_kernel(const Layer<T> p, int splits) {
  const int64_t size = static_cast<int64_t>(p.tokens) * p.rows.end;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= size) return;
  float sum = p.bias ? widen(p.bias[i % p.rows.end]) : 0.0f;
  for (int split = 0; split < splits; ++split) sum += p.parts[split * size + i];
  p.y[i] = T(sum);
}

template <class T>
cudaError_t run(const Sparse24LinearArgs &s) {
  int device = 0, processors = 1;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess || !s.tokens || !s.outputs) return error;
  const auto *x = static_cast<const T *>(s.x), *values = static_cast<const T *>(s.values);
  const bool x_aligned = s.inputs % VECTOR<T> == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
  const bool aligned = s.inputs % SPREAD<T> == 0 && reinterpret_cast<uintptr_t>(values) % 16 == 0;
  const Layer<T> layer{{values, static_cast<const uint8_t *>(s.positions), s.outputs, s.inputs, aligned},
                       {x, nullptr, s.tokens, s.inputs, s.inputs, false, x_aligned},
                       static_cast<const T *>(s.bias),
                       static_cast<float *>(s.parts),
                       static_cast<T *>(s.y),
                       s.tokens};
  // A block a multiprocessor, as far as each warp of a block then has work.
  const int tiles = ceil_div(s.outputs, ROWS), most = std::clamp(s.inputs / (SPAN<T> * WARPS), 1, MAX_SPLITS);
  const int splits = std::clamp(processors / tiles, 1, most);
  const auto stream = static_cast<cudaStream_t>(s.stream);
  product_kernel<T><<<dim3(tiles, splits), THREADS, 0, stream>>>(layer);
  if (splits > 1) fold_kernel<T><<<ceil_div(s.tokens * s.outputs, THREADS), THREADS, 0, stream>>>(layer, splits);
  return cudaGetLastError();
}

}  // namespace

int64_t sparse24_parts_needed(int tokens, int outputs) { return int64_t{MAX_SPLITS} * tokens * outputs; }

const char *sparse24_linear(const Sparse24LinearArgs &args) {
  cudaError_t error = cudaErrorInvalidValue;
  if (args.tokens <= TOKENS && args.inputs % 8 == 0) {
    error = args.dtype == 0 ? run<float>(args) : args.dtype == 1 ? run<__nv_bfloat16>(args) : run<__half>(args);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace pycompress::cuda
