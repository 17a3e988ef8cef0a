// Few-token shared-channel linear on CUDA; includes no CUDA header, so that module.cpp needs none.
#pragma once

#include <cstdint>

namespace pycompress::cuda {

struct SharedLinearCudaArgs {
  const void *x;         // [tokens, inputs]
  const void *weight;    // output: [k + r, inputs]; input: [outputs, k + r]
  const void *factor;    // output: [outputs - pivots, r]; input: [r, inputs - pivots]
  const void *labels;    // null when k = 0
  const void *channels;  // a permutation with the r pivots first, whose part of the factor is the identity, or null
  const void *bias;      // [outputs] or null
  const void *weight_scales, *factor_scales;  // of codes, in the dtype of x; else null
  void *workspace;                            // shared_linear_workspace() floats, overwritten
  void *y;                                    // [tokens, outputs]
  int tokens, inputs, outputs, k, r;
  int dtype;          // of x: 0 float32, 1 bfloat16, 2 float16
  int storage;        // of weight and factor: 0 the dtype of x, 1 int8, 2 int4
  bool wide_indices;  // labels and channels are int32 rather than int16
  bool share_input;
  void *stream;
};

// Floats of workspace a call needs.
int64_t shared_linear_workspace(int tokens, int k, int r);

// Launches on the stream and returns null, or the CUDA runtime's words for why it could not.
const char *shared_linear(const SharedLinearCudaArgs &args);

}  // namespace pycompress::cuda
