// The kernels' launchers by names that ctypes can look up.
#include "sparse24.h"

using namespace pycompress;

extern "C" {

const char *Sparse24LinearCudaArgs(const cuda::Sparse24LinearCudaArgs *args) { return cuda::sparse24_linear(*args); }

int64_t Sparse24LinearCudaArgs_workspace(int tokens, int outputs) {
  return cuda::sparse24_linear_workspace(tokens, outputs);
}
}
