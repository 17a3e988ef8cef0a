// Few-token 2:4 linear on CUDA; includes no CUDA header, so that module.cpp needs none.
//
// Rows are stored 16 at a time. In a tile of r rows, 16 or at the end outputs % 16, the two values of row i and group g
// of four columns are 2 (g r + i) and the one after it; the byte of positions of row i and groups 2b and 2b + 1 is
// b r + i, with that of the even group in its low half.
#pragma once

#include <cstdint>

namespace pycompress::cuda {

struct Sparse24LinearCudaArgs {
  const void *x;          // [tokens, inputs]
  const void *values;     // [outputs, inputs / 2]
  const void *positions;  // [outputs, inputs / 8]
  const void *bias;       // [outputs] or null
  void *workspace;        // sparse24_linear_workspace() floats, overwritten
  void *y;                // [tokens, outputs]
  int tokens, inputs, outputs;
  int dtype;  // 0 float32, 1 bfloat16, 2 float16
  void *stream;
};

// Floats of workspace a call needs.
int64_t sparse24_linear_workspace(int tokens, int outputs);

// Launches on the stream and returns null, or the CUDA runtime's words for why it could not.
const char *sparse24_linear(const Sparse24LinearCudaArgs &args);

}  // namespace pycompress::cuda
