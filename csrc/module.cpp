// The Python module: the tuple of a kernel's arguments in, nothing out. pycompress/ops checks dtypes, devices and
// layouts; values of index tensors are checked here, where that costs next to nothing.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <tuple>
#include <type_traits>

#include "arguments.h"
#include "cpu/dispatch.h"
#ifdef PYCOMPRESS_CUDA
#include "cuda/sparse24.h"
#endif

using namespace pycompress;

namespace {

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

void check_arguments(const GramArgs &) {}

void check_arguments(const SeedArgs &) {}

void check_arguments(const LloydArgs &s) { check_indices("seeds", s.seeds, s.batch * s.k, s.n); }

void check_arguments(const CentreArgs &s) { check_indices("labels", s.labels, s.batch * s.n, s.k); }

void check_arguments(const RoundPanelArgs &) {}

void check_arguments(const PrunePanelArgs &) {}

void check_arguments(const SharedLinearArgs &s) { s.wide_indices ? check_layer<int32_t>(s) : check_layer<int16_t>(s); }

void check_arguments(const SubnetLinearArgs &s) {
  check_indices("rows", s.rows, s.outputs, s.height);
  check_indices("columns", s.columns, s.inputs, s.width);
}

// Tiles that leave the values or hold more of them than they have places.
void check_arguments(const SparseLinearArgs &s) {
  if (!s.offsets) return;
  const int64_t tiles = (s.outputs + SPARSE_TILE - 1) / SPARSE_TILE, places = SPARSE_TILE * s.inputs;
  bool good = s.offsets[0] == 0 && s.offsets[tiles] == s.value_count;
  for (int64_t i = 0; i < tiles; ++i)
    good = good && s.offsets[i] <= s.offsets[i + 1] && s.offsets[i + 1] - s.offsets[i] <= places;
  if (good) return;
  throw std::out_of_range("offsets must rise from 0 to the number of values, " + std::to_string(s.value_count) +
                          ", by at most " + std::to_string(places) + " for " + std::to_string(SPARSE_TILE) + " rows");
}

// The Python function of an op: the tuple of its arguments, then what the op takes beside them.
template <class Args, class... More>
auto checked(void (*Kernels::*op)(const Args &, More...)) {
  return [op](py::handle given, std::conditional_t<true, py::handle, More>... more) {
    const Args arguments = from_tuple<Args>(given);
    const std::tuple<More...> others{static_cast<More>(Field{more.ptr()})...};
    const py::gil_scoped_release unlocked;
    check_arguments(arguments);
    std::apply([&](More... each) { (kernels().*op)(arguments, each...); }, others);
  };
}

#ifdef PYCOMPRESS_CUDA
template <class Args>
auto launched(const char *name, const char *(*launch)(const Args &)) {
  return [name, launch](py::handle given) {
    const Args arguments = from_tuple<Args>(given);
    const py::gil_scoped_release unlocked;
    const char *error = launch(arguments);
    if (error) throw std::runtime_error(std::string(name) + " on CUDA failed to launch: " + error);
  };
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

#define PYCOMPRESS_DEF(level, op, arguments) m.def(#op, checked(&Kernels::op));
  PYCOMPRESS_OPS(PYCOMPRESS_DEF, )
#undef PYCOMPRESS_DEF
#ifdef PYCOMPRESS_CUDA
  m.def("sparse24_linear_cuda", launched("sparse24_linear", cuda::sparse24_linear));
  m.def("sparse24_linear_cuda_workspace", cuda::sparse24_linear_workspace);
#endif
}
