// The kernels' launchers by names that ctypes can look up.
#include "shared_linear.h"
#include "sparse24.h"

extern "C" {

const char *shared_linear(const pycompress::cuda::SharedLinearArgs *args) {
  return pycompress::cuda::shared_linear(*args);
}

int64_t shared_linear_parts(int tokens, int k, int r) { return pycompress::cuda::parts_needed(tokens, k, r); }

const char *sparse24_linear(const pycompress::cuda::Sparse24LinearArgs *args) {
  return pycompress::cuda::sparse24_linear(*args);
}

int64_t sparse24_linear_parts(int tokens, int outputs) {
  return pycompress::cuda::sparse24_parts_needed(tokens, outputs);
}
}
