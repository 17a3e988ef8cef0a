#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#ifdef PYCOMPRESS_X86
#include <cpuid.h>
#endif

namespace pycompress {
namespace {

struct Level {
  const char *name;
  bool (*runs)();
  Kernels kernels;
};

bool always() { return true; }

#ifdef PYCOMPRESS_HAS_AVX2
bool has_f16c() {
  unsigned a, b, c = 0, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }
#endif
#ifdef PYCOMPRESS_HAS_AVX512
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif
#ifdef PYCOMPRESS_HAS_AVX512VBMI2
bool has_avx512vbmi2() { return has_avx512() && __builtin_cpu_supports("avx512vbmi2"); }
#endif
#ifdef PYCOMPRESS_HAS_AVX512BF16
bool has_avx512bf16() { return has_avx512vbmi2() && __builtin_cpu_supports("avx512bf16"); }
#endif

#define PYCOMPRESS_OF(level, op, arguments) level::op,
// The levels whose kernels of statistics, of dense and shared layers, and of layers without zeros are taken.
#define PYCOMPRESS_KERNELS(statistics, layers, sparse)                                       \
  {PYCOMPRESS_STATISTICS(PYCOMPRESS_OF, statistics) PYCOMPRESS_LAYERS(PYCOMPRESS_OF, layers) \
       PYCOMPRESS_SPARSE_LAYERS(PYCOMPRESS_OF, sparse)}

const Level LEVELS[] = {
    {"portable", always, PYCOMPRESS_KERNELS(portable, portable, portable)},
#ifdef PYCOMPRESS_HAS_AVX2
    {"avx2", has_avx2, PYCOMPRESS_KERNELS(avx2, avx2, avx2)},
#endif
#ifdef PYCOMPRESS_HAS_AVX512
    {"avx512", has_avx512, PYCOMPRESS_KERNELS(avx512, avx512, avx512)},
#endif
#ifdef PYCOMPRESS_HAS_AVX512VBMI2
    {"avx512vbmi2", has_avx512vbmi2, PYCOMPRESS_KERNELS(avx512, avx512, avx512vbmi2)},
#endif
#ifdef PYCOMPRESS_HAS_AVX512BF16
    {"avx512bf16", has_avx512bf16, PYCOMPRESS_KERNELS(avx512, avx512bf16, avx512vbmi2)},
#endif
};

std::string joined(const std::vector<std::string> &names) {
  std::string text;
  for (const std::string &name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

const Level &find(const std::string &name) {
  for (const Level &level : LEVELS) {
    if (level.name == name && level.runs()) return level;
  }
  throw std::invalid_argument("PYCOMPRESS_ISA must be one of " + joined(levels_available()) +
                              " on this processor, got " + name + ": set it to one of these or unset it");
}

const Level &best() {
  const Level *chosen = &LEVELS[0];
  for (const Level &level : LEVELS) {
    if (level.runs()) chosen = &level;
  }
  return *chosen;
}

const Level &initial() {
  const char *wanted = std::getenv("PYCOMPRESS_ISA");
  return wanted && *wanted ? find(wanted) : best();
}

std::atomic<const Level *> &current() {
  static std::atomic<const Level *> level{&initial()};
  return level;
}

}  // namespace

std::vector<std::string> levels_built() {
  std::vector<std::string> names;
  for (const Level &level : LEVELS) names.push_back(level.name);
  return names;
}

std::vector<std::string> levels_available() {
  std::vector<std::string> names;
  for (const Level &level : LEVELS) {
    if (level.runs()) names.push_back(level.name);
  }
  return names;
}

std::string level_in_use() { return current().load()->name; }

void use_level(const std::string &name) { current().store(&find(name)); }

const Kernels &kernels() { return current().load()->kernels; }

}  // namespace pycompress
