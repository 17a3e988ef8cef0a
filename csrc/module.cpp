// The Python module: addresses and sizes in, nothing out. pycompress/ops checks dtypes, devices and layouts; values of
// index tensors are checked here, where that costs next to nothing.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cpu/dispatch.h"
#ifdef PYCOMPRESS_CUDA
#include "cuda/shared_linear.h"
#include "cuda/sparse24.h"
#endif

namespace py = pybind11;
using namespace pycompress;

namespace {

template <class T>
T *at(std::uintptr_t address) {
  return reinterpret_cast<T *>(address);
}

// Raises IndexError unless all indices are in [0, limit). The loop has no branch, so that it is vectorised.
template <class I>
void check_indices(const char *name, const I *indices, int64_t count, int64_t limit) {
  if (!indices || !count) return;
  using U = std::make_unsigned_t<I>;
  const U last = static_cast<U>(std::min<int64_t>(limit - 1, std::numeric_limits<I>::max()));
  U outside = 0;
  for (int64_t i = 0; i < count; ++i) {
    const U index = static_cast<U>(indices[i]);
    outside = static_cast<U>(outside | index | static_cast<U>(last - index));
  }
  if (static_cast<I>(outside) >= 0) return;
  const auto [low, high] = std::minmax_element(indices, indices + count);
  throw std::out_of_range(std::string(name) + " must be at least 0 and below " + std::to_string(limit) + ", got " +
                          std::to_string(*low < 0 ? *low : *high));
}

template <class I>
void check_permutation(const char *name, const I *indices, int64_t count) {
  if (!indices || !count) return;
  check_indices(name, indices, count, count);
  auto *seen = reinterpret_cast<uint8_t *>(scratch_ints((count + 7) / 8));
  std::memset(seen, 0, count);
  for (int64_t i = 0; i < count; ++i) seen[indices[i]] = 1;
  uint8_t all = 1;
  for (int64_t i = 0; i < count; ++i) all &= seen[i];
  if (all) return;
  throw std::invalid_argument(std::string(name) + " must be each of 0 to " + std::to_string(count - 1) + " once");
}

template <class I>
void check_layer(const SharedLinearArgs &s) {
  const int64_t count = s.share_input ? s.inputs : s.outputs;
  check_indices("labels", static_cast<const I *>(s.labels), count, s.k);
  check_permutation("channels", static_cast<const I *>(s.channels), count);
}

void check_layer(const SharedLinearArgs &s) { s.wide_indices ? check_layer<int32_t>(s) : check_layer<int16_t>(s); }

void gram(std::uintptr_t left, std::uintptr_t right, std::uintptr_t out, int64_t batch, int64_t n, int64_t d,
          int threads) {
  kernels().gram({at<float>(left), at<float>(right), at<float>(out), batch, n, d, threads});
}

void kmeans_plus_plus(std::uintptr_t gram, std::uintptr_t uniforms, std::uintptr_t weights, std::uintptr_t seeds,
                      int64_t batch, int64_t gram_stride, int64_t n, int64_t k, int64_t trials, int threads) {
  kernels().kmeans_plus_plus({at<float>(gram), at<float>(uniforms), at<float>(weights), at<int64_t>(seeds), batch,
                              gram_stride, n, k, trials, threads});
}

void lloyd(std::uintptr_t data, std::uintptr_t seeds, std::uintptr_t weights, std::uintptr_t labels,
           std::uintptr_t inertia, int64_t batch, int64_t data_stride, int64_t n, int64_t d, int64_t k,
           int64_t iterations, bool points, int threads) {
  check_indices("seeds", at<int64_t>(seeds), batch * k, n);
  kernels().lloyd({at<float>(data), at<int64_t>(seeds), at<float>(weights), at<int64_t>(labels), at<float>(inertia),
                   batch, data_stride, n, d, k, iterations, points, threads});
}

void centre(std::uintptr_t y, std::uintptr_t labels, int64_t batch, int64_t n, int64_t columns, int64_t k,
            int threads) {
  check_indices("labels", at<int64_t>(labels), batch * n, k);
  kernels().centre({at<float>(y), at<int64_t>(labels), batch, n, columns, k, threads});
}

void shared_linear(std::uintptr_t x, std::uintptr_t weight, std::uintptr_t factor, std::uintptr_t labels,
                   std::uintptr_t channels, std::uintptr_t bias, std::uintptr_t weight_scales,
                   std::uintptr_t factor_scales, std::uintptr_t y, int64_t tokens, int64_t inputs, int64_t outputs,
                   int64_t k, int64_t r, int64_t x_stride, int dtype, int storage, bool wide_indices, bool share_input,
                   int threads) {
  // clang-format off: a line an argument would be longer than the function
  const SharedLinearArgs layer{at<void>(x), at<void>(weight), at<void>(factor), at<void>(labels), at<void>(channels),
                               at<void>(bias), at<void>(weight_scales), at<void>(factor_scales), at<void>(y), tokens,
                               inputs, outputs, k, r, x_stride, static_cast<Dtype>(dtype),
                               static_cast<Storage>(storage), wide_indices, share_input, threads};
  // clang-format on
  check_layer(layer);
  kernels().shared_linear(layer);
}

void shared_linear_gather(std::uintptr_t x, std::uintptr_t labels, std::uintptr_t channels, std::uintptr_t bias,
                          std::uintptr_t reduced, std::uintptr_t product, std::uintptr_t y, int64_t tokens,
                          int64_t inputs, int64_t outputs, int64_t k, int64_t r, int64_t x_stride, bool wide_indices,
                          bool share_input, int threads) {
  SharedLinearArgs layer{};
  layer.x = at<void>(x), layer.labels = at<void>(labels), layer.channels = at<void>(channels);
  layer.bias = at<void>(bias), layer.y = at<void>(y), layer.tokens = tokens, layer.inputs = inputs;
  layer.outputs = outputs, layer.k = k, layer.r = r, layer.x_stride = x_stride, layer.wide_indices = wide_indices;
  layer.share_input = share_input, layer.threads = threads;
  check_layer(layer);
  kernels().shared_linear_gather(layer, at<float>(reduced), at<float>(product));
}

void subnet_linear(std::uintptr_t x, std::uintptr_t weight, std::uintptr_t bias, std::uintptr_t rows,
                   std::uintptr_t columns, std::uintptr_t y, int64_t tokens, int64_t inputs, int64_t outputs,
                   int64_t height, int64_t width, int64_t x_stride, int64_t weight_stride, int dtype, bool transposed,
                   int threads) {
  check_indices("rows", at<int64_t>(rows), outputs, height);
  check_indices("columns", at<int64_t>(columns), inputs, width);
  kernels().subnet_linear({at<void>(x), at<void>(weight), at<void>(bias), at<int64_t>(rows), at<int64_t>(columns),
                           at<void>(y), tokens, inputs, outputs, height, width, x_stride, weight_stride,
                           static_cast<Dtype>(dtype), transposed, threads});
}

SparseLinearArgs sparse_layer(std::uintptr_t x, std::uintptr_t values, std::uintptr_t kept, std::uintptr_t offsets,
                              std::uintptr_t bias, std::uintptr_t y, int64_t tokens, int64_t inputs, int64_t outputs,
                              int64_t x_stride, int dtype, int threads) {
  return {
      at<void>(x), at<void>(values), at<uint8_t>(kept), at<int32_t>(offsets),      at<void>(bias), at<void>(y), tokens,
      inputs,      outputs,          x_stride,          static_cast<Dtype>(dtype), threads};
}

void sparse24_linear(std::uintptr_t x, std::uintptr_t values, std::uintptr_t positions, std::uintptr_t bias,
                     std::uintptr_t y, int64_t tokens, int64_t inputs, int64_t outputs, int64_t x_stride, int dtype,
                     int threads) {
  kernels().sparse24_linear(
      sparse_layer(x, values, positions, 0, bias, y, tokens, inputs, outputs, x_stride, dtype, threads));
}

// Tiles that leave the values or hold more of them than they have places.
void check_offsets(const int32_t *offsets, int64_t rows, int64_t columns, int64_t count) {
  const int64_t tiles = (rows + SPARSE_TILE - 1) / SPARSE_TILE, places = SPARSE_TILE * columns;
  bool good = offsets[0] == 0 && offsets[tiles] == count;
  for (int64_t i = 0; i < tiles; ++i)
    good = good && offsets[i] <= offsets[i + 1] && offsets[i + 1] - offsets[i] <= places;
  if (good) return;
  throw std::out_of_range("offsets must rise from 0 to the number of values, " + std::to_string(count) +
                          ", by at most " + std::to_string(places) + " for " + std::to_string(SPARSE_TILE) + " rows");
}

void bitmap_linear(std::uintptr_t x, std::uintptr_t values, std::uintptr_t bitmap, std::uintptr_t offsets,
                   std::uintptr_t bias, std::uintptr_t y, int64_t tokens, int64_t inputs, int64_t outputs,
                   int64_t x_stride, int64_t count, int dtype, int threads) {
  check_offsets(at<int32_t>(offsets), outputs, inputs, count);
  kernels().bitmap_linear(
      sparse_layer(x, values, bitmap, offsets, bias, y, tokens, inputs, outputs, x_stride, dtype, threads));
}

#ifdef PYCOMPRESS_CUDA
void shared_linear_cuda(std::uintptr_t x, std::uintptr_t weight, std::uintptr_t factor, std::uintptr_t labels,
                        std::uintptr_t channels, std::uintptr_t bias, std::uintptr_t weight_scales,
                        std::uintptr_t factor_scales, std::uintptr_t parts, std::uintptr_t y, int tokens, int inputs,
                        int outputs, int k, int r, int dtype, int storage, bool wide_indices, bool share_input,
                        std::uintptr_t stream) {
  const char *error = cuda::shared_linear({at<void>(x),
                                           at<void>(weight),
                                           at<void>(factor),
                                           at<void>(labels),
                                           at<void>(channels),
                                           at<void>(bias),
                                           at<void>(weight_scales),
                                           at<void>(factor_scales),
                                           at<void>(parts),
                                           at<void>(y),
                                           tokens,
                                           inputs,
                                           outputs,
                                           k,
                                           r,
                                           dtype,
                                           storage,
                                           wide_indices,
                                           share_input,
                                           at<void>(stream)});
  if (error) throw std::runtime_error(std::string("shared_linear on CUDA failed to launch: ") + error);
}

void sparse24_linear_cuda(std::uintptr_t x, std::uintptr_t values, std::uintptr_t positions, std::uintptr_t bias,
                          std::uintptr_t parts, std::uintptr_t y, int tokens, int inputs, int outputs, int dtype,
                          std::uintptr_t stream) {
  const char *error =
      cuda::sparse24_linear({at<void>(x), at<void>(values), at<void>(positions), at<void>(bias), at<void>(parts),
                             at<void>(y), tokens, inputs, outputs, dtype, at<void>(stream)});
  if (error) throw std::runtime_error(std::string("sparse24_linear on CUDA failed to launch: ") + error);
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  level_in_use();  // an impossible PYCOMPRESS_ISA fails here, at import

  m.def("compiler", [] { return PYCOMPRESS_COMPILER; });
  m.def("isas_built", levels_built);
  m.def("isas", levels_available);
  m.def("isa", level_in_use);
  m.def("set_isa", use_level);
  m.def("cuda_architectures", [] { return PYCOMPRESS_CUDA_ARCHITECTURES; });
  m.def("cuda_why", [] { return PYCOMPRESS_CUDA_WHY; });

  const auto unlocked = py::call_guard<py::gil_scoped_release>();
#define PYCOMPRESS_DEF(level, op, arguments) m.def(#op, op, unlocked);
  PYCOMPRESS_OPS(PYCOMPRESS_DEF, )
#undef PYCOMPRESS_DEF
#ifdef PYCOMPRESS_CUDA
  m.def("shared_linear_cuda", shared_linear_cuda, unlocked);
  m.def("shared_linear_cuda_parts", cuda::parts_needed);
  m.def("sparse24_linear_cuda", sparse24_linear_cuda, unlocked);
  m.def("sparse24_linear_cuda_parts", cuda::sparse24_parts_needed);
#endif
}
