// Few tokens through a shared-channel layer: products of the stacked matrix, split over its columns, into `partials`;
// with shared inputs a pass that folds the partials into the first; then y, from the partials and the other matrix.
//
// Each launch may begin while the one before it ends. Sums have a fixed order and there are no atomics: two runs give
// the same bits.
#include "shared_linear.h"

#include <cuda_runtime.h>

#include <algorithm>

#include "tile.cuh"

namespace pycompress::cuda {
namespace {

constexpr int MAX_SPLIT_K = 8;
// Blocks a multiprocessor is to hold: dequantizing codes and splitting float32 take registers.
template <class T, Storage S>
constexpr int BLOCKS = S == Storage::FLOAT && sizeof(T) == 2 ? 2 : 1;
constexpr int STAGED = 256;  // columns of a low-rank part that a block adds up for itself

int round_up(int value, int to) { return ceil_div(value, to) * to; }

// Columns of the partials: k, then, on 16 bytes where it is read alone, r.
struct Columns {
  int clusters, low, stride;
};

Columns columns_of(int k, int r, bool share_input) {
  const int low = share_input ? k : round_up(k, 8);
  return {k, low, round_up(low + r, 8)};
}

// Element `at` of the partials of a product, each `size` floats, added from the first to the last.
__device__ float sum_of_split_k(const float *partials, int64_t at, int64_t size, int split_k) {
  float sum = 0.0f;
#pragma unroll
  for (int split = 0; split < MAX_SPLIT_K; ++split) sum += split < split_k ? partials[split * size + at] : 0.0f;
  return sum;
}

template <class T, Storage S>
struct Product {
  StoredRows<T, S> rows;
  LabelRows<T> labels;
  Inputs<T> stored_inputs, label_inputs;
  const void *pivots;  // their channels, null where there are none
  float *partials;
  Columns columns;
  int label_tiles, tokens;
  bool wide;
};

template <class T, Storage S>
__global__ void __launch_bounds__(THREADS, BLOCKS<T, S>) product_kernel(const Product<T, S> p) {
  __shared__ float sums[WARPS][TOKENS][ROWS + 1];
  const bool of_labels = static_cast<int>(blockIdx.x) < p.label_tiles;
  const int tile = of_labels ? blockIdx.x : blockIdx.x - p.label_tiles;
  const int split = blockIdx.y, split_k = gridDim.y, first_token = blockIdx.z * TOKENS;
  const int chunks = of_labels ? ceil_div(p.labels.n, CHUNK<T, Storage::FLOAT>) : ceil_div(p.rows.n, CHUNK<T, S>);
  const int begin = chunks * split / split_k, end = chunks * (split + 1) / split_k;
  if (!of_labels) prefetch_tile<T, S>(p.rows, tile * ROWS, begin, end);
  griddepcontrol_wait();
  if (of_labels) {
    multiply_tile<T, Storage::FLOAT>(p.labels, p.label_inputs, tile * ROWS, first_token, begin, end, sums);
  } else {
    multiply_tile<T, S>(p.rows, p.stored_inputs, tile * ROWS, first_token, begin, end, sums);
  }
  const int rows = of_labels ? p.columns.clusters : p.rows.end;
  for (int i = threadIdx.x; i < ROWS * TOKENS; i += THREADS) {
    const int row = tile * ROWS + i % ROWS, token = first_token + i / ROWS;
    if (row >= rows || token >= p.tokens) continue;
    float value = total(sums, i / ROWS, i % ROWS);
    int stacked = row;
    if (!of_labels) {
      value *= p.rows.row_scale(row);
      stacked += p.label_tiles ? p.columns.clusters : 0;
      if (p.pivots && split == 0) {
        const int channel = index_at(p.pivots, row, p.wide);
        value += to_float(p.label_inputs.x[static_cast<int64_t>(token) * p.label_inputs.stride + channel]);
      }
    }
    const int column = stacked < p.columns.clusters ? stacked : p.columns.low + stacked - p.columns.clusters;
    p.partials[(static_cast<int64_t>(split) * p.tokens + token) * p.columns.stride + column] = value;
  }
}

template <class T>
__global__ void fold_kernel(float *partials, T *reduced, int size, int split_k) {
  griddepcontrol_wait();
  const int i = blockIdx.x * THREADS + threadIdx.x;
  if (i >= size) return;
  const float sum = sum_of_split_k(partials, i, size, split_k);
  partials[i] = sum;
  reduced[i] = T(sum);
}

template <class T, Storage S>
struct Finish {
  StoredRows<T, S> rows;  // by position: those below `first` are pivots
  const float *partials;
  const T *reduced;  // the folded partials, or null
  Columns columns;
  int split_k, inputs;            // `inputs`: first column of the partials that the rows multiply
  const void *labels, *channels;  // of the outputs, or null
  const T *bias;
  T *y;
  int tokens, outputs;
  bool wide;
};

template <class T, Storage S>
__global__ void __launch_bounds__(THREADS, BLOCKS<T, S>) finish_kernel(const Finish<T, S> p) {
  constexpr int STRIDE = STAGED + VECTOR<T>;  // rows that start in different banks
  __shared__ float sums[WARPS][TOKENS][ROWS + 1];
  __shared__ __align__(16) T staged[TOKENS * STRIDE];
  const int first = blockIdx.x * ROWS, first_token = blockIdx.z * TOKENS;
  const int tokens = min(TOKENS, p.tokens - first_token), chunks = ceil_div(p.rows.n, CHUNK<T, S>);
  const int64_t size = static_cast<int64_t>(p.tokens) * p.columns.stride;
  const int64_t start = static_cast<int64_t>(first_token) * p.columns.stride;
  prefetch_tile<T, S>(p.rows, first, 0, chunks);
  griddepcontrol_wait();
  if (!p.reduced) {
    for (int i = threadIdx.x; i < tokens * p.rows.n; i += THREADS) {
      const int token = i / p.rows.n, column = i % p.rows.n;
      const int64_t at = start + static_cast<int64_t>(token) * p.columns.stride + p.inputs + column;
      staged[token * STRIDE + column] = T(sum_of_split_k(p.partials, at, size, p.split_k));
    }
    __syncthreads();
  }
  const T *x = p.reduced ? p.reduced + start + p.inputs : staged;
  const Inputs<T> inputs{x, nullptr, tokens, p.reduced ? p.columns.stride : STRIDE, p.rows.n, false, true};
  multiply_tile<T, S>(p.rows, inputs, first, 0, 0, chunks, sums);
  for (int i = threadIdx.x; i < ROWS * tokens; i += THREADS) {
    const int position = first + i % ROWS, token = i / ROWS;
    if (position >= p.outputs) continue;
    const int channel = p.channels ? index_at(p.channels, position, p.wide) : position;
    const int64_t row = start + static_cast<int64_t>(token) * p.columns.stride;
    float value = position < p.rows.first ? sum_of_split_k(p.partials, row + p.inputs + position, size, p.split_k)
                                          : total(sums, token, i % ROWS) * p.rows.row_scale(position);
    if (p.labels) value += sum_of_split_k(p.partials, row + index_at(p.labels, channel, p.wide), size, p.split_k);
    if (p.bias) value += to_float(p.bias[channel]);
    p.y[static_cast<int64_t>(first_token + token) * p.outputs + channel] = T(value);
  }
}

// A launch that may begin while the one before it ends, where the device can do that.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, void *stream, bool early, const Arguments &...arguments) {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.gridDim = grid;
  config.blockDim = dim3(THREADS);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = early ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <class T, Storage S>
StoredRows<T, S> rows_of(const void *numbers, const void *scales, int first, int end, int n) {
  const bool whole = static_cast<int64_t>(n) * StoredRows<T, S>::BITS % 128 == 0;
  return {
      numbers, static_cast<const T *>(scales), first, end, n, whole && reinterpret_cast<uintptr_t>(numbers) % 16 == 0};
}

template <class T, Storage S>
cudaError_t multiply_stacked(const SharedLinearCudaArgs &s, const Columns &columns, int split_k, bool early) {
  const int pivots = s.channels && s.share_input ? s.r : 0, n = s.inputs - pivots;
  const auto *x = static_cast<const T *>(s.x);
  const bool aligned = s.inputs % VECTOR<T> == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
  Product<T, S> p{};
  p.rows = s.share_input ? rows_of<T, S>(s.factor, s.factor_scales, 0, s.r, n)
                         : rows_of<T, S>(s.weight, s.weight_scales, 0, s.k + s.r, n);
  p.labels = {s.labels, s.inputs, s.wide_indices};
  p.label_inputs = {x, nullptr, s.tokens, s.inputs, s.inputs, s.wide_indices, aligned};
  p.stored_inputs = {x, nullptr, s.tokens, s.inputs, n, s.wide_indices, aligned};
  if (pivots) {
    p.pivots = s.channels;
    p.stored_inputs.channels = static_cast<const char *>(s.channels) + pivots * (s.wide_indices ? 4 : 2);
  }
  p.partials = static_cast<float *>(s.workspace);
  p.columns = columns;
  p.label_tiles = s.share_input ? ceil_div(s.k, ROWS) : 0;
  p.tokens = s.tokens;
  p.wide = s.wide_indices;
  const int tiles = p.label_tiles + ceil_div(p.rows.end, ROWS);
  return launch(product_kernel<T, S>, dim3(tiles, split_k, ceil_div(s.tokens, TOKENS)), s.stream, early, p);
}

template <class T, Storage S>
cudaError_t finish(const SharedLinearCudaArgs &s, const Columns &columns, int split_k, const T *reduced, bool early) {
  const bool output = !s.share_input;
  const int pivots = s.channels && output ? s.r : 0;
  Finish<T, S> f{};
  f.rows = output ? rows_of<T, S>(s.factor, s.factor_scales, pivots, s.outputs, s.r)
                  : rows_of<T, S>(s.weight, s.weight_scales, 0, s.outputs, s.k + s.r);
  f.partials = static_cast<const float *>(s.workspace);
  f.reduced = reduced;
  f.columns = columns;
  f.split_k = split_k;
  f.inputs = output ? columns.low : 0;
  f.labels = output && s.k ? s.labels : nullptr;
  f.channels = output ? s.channels : nullptr;
  f.bias = static_cast<const T *>(s.bias);
  f.y = static_cast<T *>(s.y);
  f.tokens = s.tokens;
  f.outputs = s.outputs;
  f.wide = s.wide_indices;
  const dim3 grid(ceil_div(s.outputs, ROWS), 1, ceil_div(s.tokens, TOKENS));
  return launch(finish_kernel<T, S>, grid, s.stream, early, f);
}

template <class T, Storage S>
cudaError_t run(const SharedLinearCudaArgs &s, int processors, bool early) {
  const Columns columns = columns_of(s.k, s.r, s.share_input);
  const int rows = s.k + s.r, blocks = ceil_div(rows, ROWS) * ceil_div(s.tokens, TOKENS);
  int split_k = 1;
  cudaError_t error = cudaSuccess;
  if (rows) {
    // Two blocks a multiprocessor, as far as each warp of a block then has work.
    const int most = std::clamp(s.inputs / (CHUNK<T, S> * WARPS), 1, MAX_SPLIT_K);
    split_k = std::clamp(2 * processors / blocks, 1, most);
    error = multiply_stacked<T, S>(s, columns, split_k, early);
  }
  T *reduced = nullptr;
  if (error == cudaSuccess && rows && (s.share_input || s.r > STAGED)) {
    auto *partials = static_cast<float *>(s.workspace);
    const int size = s.tokens * columns.stride;
    reduced = reinterpret_cast<T *>(partials + static_cast<int64_t>(MAX_SPLIT_K) * size);
    error = launch(fold_kernel<T>, dim3(ceil_div(size, THREADS)), s.stream, early, partials, reduced, size, split_k);
    split_k = 1;
  }
  return error == cudaSuccess ? finish<T, S>(s, columns, split_k, reduced, early) : error;
}

template <class T>
cudaError_t run(const SharedLinearCudaArgs &s) {
  int device = 0, processors = 1, major = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess || !s.tokens || !s.outputs) return error;
  const bool early = major >= 9;
  return s.storage == 0   ? run<T, Storage::FLOAT>(s, processors, early)
         : s.storage == 1 ? run<T, Storage::INT8>(s, processors, early)
                          : run<T, Storage::INT4>(s, processors, early);
}

}  // namespace

int64_t shared_linear_workspace(int tokens, int k, int r) {
  return (MAX_SPLIT_K + int64_t{1}) * tokens * columns_of(k, r, false).stride;
}

const char *shared_linear(const SharedLinearCudaArgs &args) {
  const cudaError_t error = args.dtype == 0   ? run<float>(args)
                            : args.dtype == 1 ? run<__nv_bfloat16>(args)
                                              : run<__half>(args);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace pycompress::cuda
