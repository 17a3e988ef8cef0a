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

// Products of one row with the slice's tokens: every lane ends with all of them.
template <class T, class X>
__device__ void dot_row(const T *row, const X *x, int x_stride, int size, int tokens, float (&sums)[SLICE]) {
  for (int t = 0; t < SLICE; ++t) sums[t] = 0.0f;
  for (int p = threadIdx.x; p < size; p += WARP) {
    const float value = widen(row[p]);
    for (int t = 0; t < SLICE; ++t) {
      if (t < tokens) sums[t] += value * widen(x[t * x_stride + p]);
    }
  }
  for (int t = 0; t < SLICE; ++t) sums[t] = warp_sum(sums[t]);
}

// Warp `row` of the grid: rows below `summed` sum x by label, the others multiply by a row of `matrix`.
template <class T>
__global__ void reduce_kernel(const T *x, const T *matrix, const int16_t *labels, float *reduced, int tokens,
                              int inputs, int width, int summed) {
  const int row = blockIdx.x * WARPS + threadIdx.y, first = blockIdx.y * SLICE;
  if (row >= width) return;
  const int here = min(SLICE, tokens - first);
  x += static_cast<int64_t>(first) * inputs;
  float sums[SLICE] = {};
  if (row < summed) {
    for (int p = threadIdx.x; p < inputs; p += WARP) {
      if (labels[p] != row) continue;
      for (int t = 0; t < SLICE; ++t) {
        if (t < here) sums[t] += widen(x[t * inputs + p]);
      }
    }
    for (int t = 0; t < SLICE; ++t) sums[t] = warp_sum(sums[t]);
  } else {
    dot_row(matrix + static_cast<int64_t>(row - summed) * inputs, x, inputs, inputs, here, sums);
  }
  for (int t = 0; t < SLICE; ++t) {
    if (t < here && threadIdx.x == 0) reduced[static_cast<int64_t>(first + t) * width + row] = sums[t];
  }
}

// One output a warp: the product of its row of `matrix` with `reduced` from `at` on, its centroid's product, its bias.
template <class T>
__global__ void finish_kernel(const float *reduced, const T *matrix, const int16_t *labels, const T *bias, T *y,
                              int tokens, int outputs, int width, int at) {
  const int row = blockIdx.x * WARPS + threadIdx.y, first = blockIdx.y * SLICE;
  if (row >= outputs) return;
  const int here = min(SLICE, tokens - first), size = width - at;
  reduced += static_cast<int64_t>(first) * width;
  float sums[SLICE];
  dot_row(matrix + static_cast<int64_t>(row) * size, reduced + at, width, size, here, sums);
  for (int t = 0; t < SLICE; ++t) {
    if (t >= here || threadIdx.x != 0) continue;
    float value = sums[t];
    if (labels) value += reduced[t * width + labels[row]];
    if (bias) value += widen(bias[row]);
    y[static_cast<int64_t>(first + t) * outputs + row] = static_cast<T>(value);
  }
}

template <class T>
cudaError_t launch(const SharedLinearArgs &s) {
  const auto *x = static_cast<const T *>(s.x), *weight = static_cast<const T *>(s.weight);
  const auto *factor = static_cast<const T *>(s.factor), *bias = static_cast<const T *>(s.bias);
  const auto stream = static_cast<cudaStream_t>(s.stream);
  const int width = s.k + s.r, slices = (s.tokens + SLICE - 1) / SLICE;
  const dim3 block(WARP, WARPS), reduce_grid((width + WARPS - 1) / WARPS, slices);
  const dim3 finish_grid((s.outputs + WARPS - 1) / WARPS, slices);
  if (!s.tokens || !s.outputs) return cudaSuccess;
  const bool gathers = !s.share_input && s.k > 0;
  if (width > 0) {
    reduce_kernel<T><<<reduce_grid, block, 0, stream>>>(x, s.share_input ? factor : weight, s.labels, s.reduced,
                                                        s.tokens, s.inputs, width, s.share_input ? s.k : 0);
  }
  finish_kernel<T><<<finish_grid, block, 0, stream>>>(s.reduced, s.share_input ? weight : factor,
                                                      gathers ? s.labels : nullptr, bias, static_cast<T *>(s.y),
                                                      s.tokens, s.outputs, width, s.share_input ? 0 : s.k);
  return cudaGetLastError();
}

}  // namespace

const char *shared_linear(const SharedLinearArgs &args) {
  const cudaError_t error = args.dtype == 0   ? launch<float>(args)
                            : args.dtype == 1 ? launch<__nv_bfloat16>(args)
                                              : launch<__half>(args);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace pycompress::cuda
