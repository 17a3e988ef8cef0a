// Few tokens through a shared-channel layer, two launches: products and label sums into `reduced`, then y from it.
//
// A warp takes one row of a stored matrix for all tokens of its slice, so each weight is read once; its lanes add in a
// fixed tree, and no atomics are used, so two runs give the same bits.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "shared_linear.h"

namespace pycompress::cuda {
namespace {

constexpr int WARP = 32, WARPS = 4;
constexpr int SLICE = 4;  // tokens a warp carries at once; blockIdx.y counts slices

template <class T>
__device__ float widen(T value) {
  return static_cast<float>(value);
}

__device__ float warp_sum(float value) {
  for (int offset = WARP / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// Products of one row with the slice's tokens, whose inputs are taken by `order` when there is one: every lane ends
// with all of them.
template <class T, class I, class X>
__device__ void dot_row(const T *row, const X *x, int x_stride, const I *order, int size, int tokens,
                        float (&sums)[SLICE]) {
  for (int t = 0; t < SLICE; ++t) sums[t] = 0.0f;
  for (int p = threadIdx.x; p < size; p += WARP) {
    const float value = widen(row[p]);
    const int column = order ? order[p] : p;
    for (int t = 0; t < SLICE; ++t) {
      if (t < tokens) sums[t] += value * widen(x[t * x_stride + column]);
    }
  }
  for (int t = 0; t < SLICE; ++t) sums[t] = warp_sum(sums[t]);
}

// Warp `row` of the grid: rows below `summed` sum x by label, the others multiply by a row of `matrix`, to which
// channels add their pivot's input.
template <class T, class I>
__global__ void reduce_kernel(const T *x, const T *matrix, const I *labels, const I *channels, float *reduced,
                              int tokens, int inputs, int width, int summed) {
  const int row = blockIdx.x * WARPS + threadIdx.y, first = blockIdx.y * SLICE;
  if (row >= width) return;
  const int here = min(SLICE, tokens - first), product = row - summed, pivots = channels ? width - summed : 0;
  x += static_cast<int64_t>(first) * inputs;
  float sums[SLICE] = {};
  if (product < 0) {
    for (int p = threadIdx.x; p < inputs; p += WARP) {
      if (labels[p] != row) continue;
      for (int t = 0; t < SLICE; ++t) {
        if (t < here) sums[t] += widen(x[t * inputs + p]);
      }
    }
    for (int t = 0; t < SLICE; ++t) sums[t] = warp_sum(sums[t]);
  } else {
    const int size = inputs - pivots;
    const I *order = channels ? channels + pivots : nullptr;
    dot_row(matrix + static_cast<int64_t>(product) * size, x, inputs, order, size, here, sums);
  }
  for (int t = 0; t < SLICE; ++t) {
    if (t >= here || threadIdx.x != 0) continue;
    if (product >= 0 && pivots) sums[t] += widen(x[t * inputs + channels[product]]);
    reduced[static_cast<int64_t>(first + t) * width + row] = sums[t];
  }
}

// One output a warp: its low-rank part, which is the product of its row of `matrix` with `reduced` from `at` on, or for
// a pivot an element of it; its centroid's product, its bias.
template <class T, class I>
__global__ void finish_kernel(const float *reduced, const T *matrix, const I *labels, const I *channels, const T *bias,
                              T *y, int tokens, int outputs, int width, int at) {
  const int position = blockIdx.x * WARPS + threadIdx.y, first = blockIdx.y * SLICE;
  if (position >= outputs) return;
  const int here = min(SLICE, tokens - first), size = width - at, pivots = channels ? size : 0;
  const int row = channels ? channels[position] : position;
  reduced += static_cast<int64_t>(first) * width;
  float sums[SLICE];
  if (position < pivots) {
    for (int t = 0; t < SLICE; ++t) sums[t] = t < here ? reduced[t * width + at + position] : 0.0f;
  } else {
    const T *own = matrix + static_cast<int64_t>(position - pivots) * size;
    dot_row<T, I>(own, reduced + at, width, nullptr, size, here, sums);
  }
  for (int t = 0; t < SLICE; ++t) {
    if (t >= here || threadIdx.x != 0) continue;
    float value = sums[t];
    if (labels) value += reduced[t * width + labels[row]];
    if (bias) value += widen(bias[row]);
    y[static_cast<int64_t>(first + t) * outputs + row] = static_cast<T>(value);
  }
}

template <class T, class I>
cudaError_t launch(const SharedLinearArgs &s) {
  const auto *x = static_cast<const T *>(s.x), *weight = static_cast<const T *>(s.weight);
  const auto *factor = static_cast<const T *>(s.factor), *bias = static_cast<const T *>(s.bias);
  const auto *labels = static_cast<const I *>(s.labels), *channels = static_cast<const I *>(s.channels);
  const I *none = nullptr;
  const auto stream = static_cast<cudaStream_t>(s.stream);
  const int width = s.k + s.r, slices = (s.tokens + SLICE - 1) / SLICE;
  const dim3 block(WARP, WARPS), reduce_grid((width + WARPS - 1) / WARPS, slices);
  const dim3 finish_grid((s.outputs + WARPS - 1) / WARPS, slices);
  if (!s.tokens || !s.outputs) return cudaSuccess;
  if (width > 0) {
    reduce_kernel<<<reduce_grid, block, 0, stream>>>(x, s.share_input ? factor : weight, labels,
                                                     s.share_input ? channels : none, s.reduced, s.tokens, s.inputs,
                                                     width, s.share_input ? s.k : 0);
  }
  finish_kernel<<<finish_grid, block, 0, stream>>>(s.reduced, s.share_input ? weight : factor,
                                                   s.share_input || !s.k ? none : labels,
                                                   s.share_input ? none : channels, bias, static_cast<T *>(s.y),
                                                   s.tokens, s.outputs, width, s.share_input ? 0 : s.k);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch(const SharedLinearArgs &s) {
  return s.wide_indices ? launch<T, int32_t>(s) : launch<T, int16_t>(s);
}

}  // namespace

const char *shared_linear(const SharedLinearArgs &args) {
  const cudaError_t error = args.dtype == 0   ? launch<float>(args)
                            : args.dtype == 1 ? launch<__nv_bfloat16>(args)
                                              : launch<__half>(args);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace pycompress::cuda
