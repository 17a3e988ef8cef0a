#include <cstdlib>
#include <new>

#include "kernels.h"

namespace pycompress {
namespace {

constexpr std::size_t ALIGNMENT = 64;

struct Buffer {
  void *data = nullptr;
  std::size_t bytes = 0;

  void *at_least(std::size_t wanted) {
    if (wanted <= bytes) return data;
    std::free(data);
    bytes = 0;
    data = std::aligned_alloc(ALIGNMENT, (wanted + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
    if (!data) throw std::bad_alloc();
    bytes = wanted;
    return data;
  }
  ~Buffer() { std::free(data); }
};

thread_local Buffer buffers[static_cast<int>(Slot::count)];
thread_local Buffer ints;

}  // namespace

float *scratch(Slot slot, int64_t floats) {
  return static_cast<float *>(
      buffers[static_cast<int>(slot)].at_least(static_cast<std::size_t>(floats) * sizeof(float)));
}

int64_t *scratch_ints(int64_t count) {
  return static_cast<int64_t *>(ints.at_least(static_cast<std::size_t>(count) * sizeof(int64_t)));
}

}  // namespace pycompress
