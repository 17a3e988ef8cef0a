// Few tokens through a 2:4 layer: the kept values and their positions are read once, put into their places in registers
// and multiplied on tensor cores.
//
// A lane's share of one product is four consecutive columns of a row, which is one group. The same group of four
// consecutive rows is stored together, so that 16 bytes of a lane are all four rows' share of a product, and a warp's
// are what is stored one after another; the products' rows are in that order, and their sums are put back into the
// matrix's. Where rows are too few to fill the device, columns are split over blocks; their sums are then added in a
// fixed order, without atomics.
#include "sparse24.h"

#include <cuda_runtime.h>

#include <algorithm>

#include "tile.cuh"

namespace pycompress::cuda {
namespace {

constexpr int MAX_SPLIT_K = 8;
// Chunks a warp has in flight, as many as its registers hold.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
template <class T>
constexpr int DEPTH = sizeof(T) == 2 ? 3 : 2;
#else
template <class T>
constexpr int DEPTH = 4;
#endif
constexpr int TILE = 16;  // rows stored together, but for the last ones
// A lane takes four rows of a tile, and of a chunk one or two pairs of groups: 16 bytes a group, 32 of float32.
constexpr int LANE_ROWS = 4, PAIR = 8;  // columns
template <class T>
constexpr int PAIRS = 4 / static_cast<int>(sizeof(T));
template <class T>
constexpr int SPAN = WARP / 8 * PAIRS<T> * PAIR;

// Values and positions of a lane's rows, which are those from `first` on of a tile's `rows`.
template <class T>
struct LaneRows {
  const T *values;  // of the tile
  const uint8_t *positions;
  int rows, first, pairs;
  bool whole;  // 16 rows on 16 bytes, and positions on 4

  static constexpr int ROWS_OF_VECTOR = VECTOR<T> / 2, VECTORS_OF_GROUP = LANE_ROWS / ROWS_OF_VECTOR;
  static constexpr int VECTORS = 2 * VECTORS_OF_GROUP;  // of a pair

  __device__ uint4 load(int pair, int vector) const {
    const int group = 2 * pair + vector / VECTORS_OF_GROUP;
    const int row = first + vector % VECTORS_OF_GROUP * ROWS_OF_VECTOR;
    const T *from = values + 2 * (group * rows + row);
    if (pair >= pairs || row >= rows) return {0, 0, 0, 0};
    if (whole) return *reinterpret_cast<const uint4 *>(from);
    T found[VECTOR<T>];
#pragma unroll
    for (int i = 0; i < VECTOR<T>; ++i) found[i] = row + i / 2 < rows ? from[i] : T(0.0f);
    return packed(found);
  }
  // A byte a row, with a nibble for each group of the pair.
  __device__ uint32_t codes(int pair) const {
    const uint8_t *from = positions + pair * rows + first;
    if (pair >= pairs || first >= rows) return 0;
    if (whole) return *reinterpret_cast<const uint32_t *>(from);
    uint32_t found = 0;
#pragma unroll
    for (int i = 0; i < LANE_ROWS; ++i) found |= first + i < rows ? static_cast<uint32_t>(from[i]) << (8 * i) : 0;
    return found;
  }
};

template <class T>
struct Rows24 {
  const T *values;
  const uint8_t *positions;
  int end, n;  // n is a multiple of 8
  bool aligned;

  __device__ LaneRows<T> of_lane(int row) const {
    const int tile = row / TILE, rows = min(TILE, end - tile * TILE);
    const int64_t before = static_cast<int64_t>(tile) * TILE * n;
    return {values + before / 2, positions + before / 8, rows, row % TILE, n / PAIR, aligned && rows == TILE};
  }
};

// The numbers that one product takes of a lane's row: of 16-bit floats a whole group, of float32 half of one.
template <class T>
__device__ uint2 spread(const uint4 (&stored)[4], const uint32_t (&codes)[PAIRS<T>], int row, int step) {
  if constexpr (sizeof(T) == 2) {
    const uint32_t code = codes[step / 2] >> (8 * row + 4 * (step % 2)), pair = word(stored[step], row);
    // A byte a column, which says what two bytes it takes: those of the first value, of the second or zeros.
    const uint32_t taken = 0x44444444u ^ 0x54u << (code & 3) * 8 ^ 0x76u << (code >> 2 & 3) * 8;
    return {__byte_perm(pair, 0, taken), __byte_perm(pair, 0, taken >> 16)};
  } else {
    const uint32_t code = codes[0] >> (8 * row + 4 * (step / 2)), column = 2 * (step % 2);
    const uint4 rows = stored[step / 2 * 2 + row / 2];
    const uint32_t first = word(rows, row % 2 * 2), second = word(rows, row % 2 * 2 + 1);
    const auto at = [&](uint32_t c) { return c == (code & 3) ? first : c == (code >> 2 & 3) ? second : 0u; };
    return {at(column), at(column + 1)};
  }
}

template <class T>
struct Layer {
  Rows24<T> rows;
  Inputs<T> inputs;
  const T *bias;
  float *partials;
  T *y;
  int tokens;
};

// A token's numbers of 16 bytes.
template <bool WHOLE, class T>
__device__ uint4 load(const Inputs<T> &inputs, int token, int column) {
  if (!WHOLE) return inputs.load(token, column);
  if (token >= inputs.tokens || column >= inputs.n) return {0, 0, 0, 0};
  return *reinterpret_cast<const uint4 *>(inputs.x + static_cast<int64_t>(token) * inputs.n + column);
}

// One row a place of `partials` [split_k, tokens, rows], or of y where nothing is split. WHOLE where every tile and
// every token is: the paths for others, long as they are, are then not in the way of the loads.
template <class T, bool WHOLE>
__global__ void __launch_bounds__(THREADS) product_kernel(const Layer<T> p) {
  __shared__ float sums[WARPS][TOKENS][ROWS + 1];
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, group = lane / 4, member = lane % 4;
  const int first_row = blockIdx.x * ROWS, split = blockIdx.y, split_k = gridDim.y;
  const int chunks = ceil_div(p.rows.n, SPAN<T>), end = chunks * (split + 1) / split_k;
  LaneRows<T> rows = p.rows.of_lane(first_row + group * LANE_ROWS);
  if (WHOLE) rows.whole = true;
  float part[2][TOKENS / 8][4] = {};
  for (int first = chunks * split / split_k + warp; first < end; first += DEPTH<T> * WARPS) {
    uint4 stored[DEPTH<T>][4];
    uint32_t codes[DEPTH<T>][PAIRS<T>];
#pragma unroll
    for (int ahead = 0; ahead < DEPTH<T>; ++ahead) {
      const int chunk = first + ahead * WARPS;
#pragma unroll
      for (int i = 0; i < PAIRS<T>; ++i) {
        const int pair = chunk < end ? (chunk * PAIRS<T> + i) * 4 + member : rows.pairs;
#pragma unroll
        for (int v = 0; v < rows.VECTORS; ++v) stored[ahead][i * rows.VECTORS + v] = rows.load(pair, v);
        codes[ahead][i] = rows.codes(pair);
      }
    }
#pragma unroll
    for (int ahead = 0; ahead < DEPTH<T>; ++ahead) {
      const int chunk = first + ahead * WARPS;
      if (chunk >= end) break;
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        // Two steps take 16 bytes of a token: of 16-bit floats those of a pair of groups, of float32 those of a group.
        const int i = PAIRS<T> == 2 ? step / 2 : 0, skipped = PAIRS<T> == 2 ? 0 : step / 2 * VECTOR<T>;
        const int column = ((chunk * PAIRS<T> + i) * 4 + member) * PAIR + skipped;
        uint2 tokens[TOKENS / 8];
#pragma unroll
        for (int n = 0; n < TOKENS / 8; ++n) {
          const uint4 numbers = load<WHOLE>(p.inputs, group + 8 * n, column);
          tokens[n] = step % 2 ? uint2{numbers.z, numbers.w} : uint2{numbers.x, numbers.y};
        }
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          const FragA a0 = spread<T>(stored[ahead], codes[ahead], 2 * m, step);
          const FragA a1 = spread<T>(stored[ahead], codes[ahead], 2 * m + 1, step);
#pragma unroll
          for (int n = 0; n < TOKENS / 8; ++n) mma(T(), part[m][n], a0, a1, tokens[n]);
        }
      }
    }
  }
  // Row `group` of product m is the lane's row 2m, and row `group + 8` the one after it.
#pragma unroll
  for (int i = 0; i < 2 * TOKENS / 8 * 4; ++i) {
    const int m = i / (TOKENS / 2), n = i / 4 % (TOKENS / 8), at = i % 4;
    sums[warp][8 * n + 2 * member + at % 2][group * LANE_ROWS + 2 * m + at / 2] = part[m][n][at];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < ROWS * p.tokens; i += THREADS) {
    const int row = first_row + i % ROWS, token = i / ROWS;
    if (row >= p.rows.end) continue;
    const float sum = total(sums, token, i % ROWS);
    const int64_t at = static_cast<int64_t>(token) * p.rows.end + row;
    if (split_k > 1) {
      p.partials[static_cast<int64_t>(split) * p.tokens * p.rows.end + at] = sum;
    } else {
      p.y[at] = T(p.bias ? sum + to_float(p.bias[row]) : sum);
    }
  }
}

template <class T>
__global__ void fold_kernel(const Layer<T> p, int split_k) {
  const int64_t size = static_cast<int64_t>(p.tokens) * p.rows.end;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= size) return;
  float sum = p.bias ? to_float(p.bias[i % p.rows.end]) : 0.0f;
  for (int split = 0; split < split_k; ++split) sum += p.partials[split * size + i];
  p.y[i] = T(sum);
}

template <class T>
cudaError_t run(const Sparse24LinearCudaArgs &s) {
  int device = 0, processors = 1;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess || !s.tokens || !s.outputs) return error;
  const auto *x = static_cast<const T *>(s.x), *values = static_cast<const T *>(s.values);
  const bool x_aligned = s.inputs % VECTOR<T> == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
  const auto *positions = static_cast<const uint8_t *>(s.positions);
  const bool aligned = reinterpret_cast<uintptr_t>(values) % 16 == 0 && reinterpret_cast<uintptr_t>(positions) % 4 == 0;
  const Layer<T> layer{{values, positions, s.outputs, s.inputs, aligned},
                       {x, s.tokens, s.inputs, x_aligned},
                       static_cast<const T *>(s.bias),
                       static_cast<float *>(s.workspace),
                       static_cast<T *>(s.y),
                       s.tokens};
  // A block a multiprocessor, as far as each warp of a block then has work.
  const int tiles = ceil_div(s.outputs, ROWS), most = std::clamp(s.inputs / (SPAN<T> * WARPS), 1, MAX_SPLIT_K);
  const int split_k = std::clamp(processors / tiles, 1, most);
  const auto stream = static_cast<cudaStream_t>(s.stream);
  if (aligned && x_aligned && s.outputs % TILE == 0) {
    product_kernel<T, true><<<dim3(tiles, split_k), THREADS, 0, stream>>>(layer);
  } else {
    product_kernel<T, false><<<dim3(tiles, split_k), THREADS, 0, stream>>>(layer);
  }
  if (split_k > 1) fold_kernel<T><<<ceil_div(s.tokens * s.outputs, THREADS), THREADS, 0, stream>>>(layer, split_k);
  return cudaGetLastError();
}

}  // namespace

int64_t sparse24_linear_workspace(int tokens, int outputs) { return int64_t{MAX_SPLIT_K} * tokens * outputs; }

const char *sparse24_linear(const Sparse24LinearCudaArgs &args) {
  cudaError_t error = cudaErrorInvalidValue;
  if (args.tokens <= TOKENS && args.inputs % 8 == 0) {
    error = args.dtype == 0 ? run<float>(args) : args.dtype == 1 ? run<__nv_bfloat16>(args) : run<__half>(args);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace pycompress::cuda
