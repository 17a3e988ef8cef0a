// What every instruction-set level implements. Plain types only: this header is compiled at every level.
#pragma once

#include <cstdint>

namespace pycompress {

struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};
enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2 };
enum class Storage : int { floats = 0, int8 = 1, int4 = 2 };  // pycompress/formats/codes.py

struct GramArgs {
  const float *left;   // [batch, n, d]
  const float *right;  // [batch, n, d]
  float *out;          // [batch, n, n]
  int64_t batch, n, d;
  int threads;
};

struct SeedArgs {
  const float *gram;      // [batch, n, n]
  const float *uniforms;  // [batch, k, trials]
  const float *weights;   // [batch, n] or null
  int64_t *seeds;         // [batch, k]
  int64_t batch, gram_stride, n, k, trials;
  int threads;
};

struct LloydArgs {
  const float *data;  // Gram matrices [batch, n, n], or points [batch, n, d] with their mean taken away
  const int64_t *seeds;
  const float *weights;  // [batch, n] or null
  int64_t *labels;       // [batch, n]
  float *inertia;        // [batch]
  int64_t batch, data_stride, n, d, k, iterations;
  bool points;
  int threads;
};

struct CentreArgs {
  float *y;               // [batch, n, columns], centred in place
  const int64_t *labels;  // [batch, n]
  int64_t batch, n, columns, k;
  int threads;
};

constexpr int64_t PANEL_COLUMNS = 256;  // the most that a panel has

struct RoundPanelArgs {
  const float *values;      // [columns, rows]
  const float *factor;      // [columns, columns], rows factor_stride apart, its upper triangle
  float *scales;            // [columns, rows], given; or with `choose` [ceil(columns / group), rows], written
  const float *reductions;  // [tries]
  int8_t *codes;            // [columns, rows]
  float *lost;              // [columns, rows]: errors over the factor's diagonal
  int64_t columns, rows, factor_stride, group, tries;
  int low, high;      // of the codes
  float most, least;  // what scales are held within, and what a zero becomes
  Dtype dtype;        // of the scales
  bool choose;
  int threads;
};

struct PrunePanelArgs {
  const float *values;  // [columns, rows]
  const float *factor;  // [columns, columns], rows factor_stride apart, its upper triangle
  const bool *gone;     // [columns, rows]; or null: of every `size` columns `keep` are kept
  float *kept;          // [columns, rows]
  float *lost;          // [columns, rows]: errors over the factor's diagonal
  int64_t columns, rows, factor_stride, keep, size;
  int threads;
};

struct SharedLinearArgs {
  const void *x;         // [tokens, inputs], rows x_stride apart
  const void *weight;    // output: [k + r, inputs]; input: [outputs, k + r]
  const void *factor;    // output: [outputs - pivots, r]; input: [r, inputs - pivots]
  const void *labels;    // null when k = 0
  const void *channels;  // a permutation with the r pivots first, whose part of the factor is the identity, or null
  const void *bias;      // [outputs] or null
  const void *weight_scales, *factor_scales;  // null for floats
  void *y;                                    // [tokens, outputs]
  int64_t tokens, inputs, outputs, k, r, x_stride;
  Dtype dtype;  // of x, bias, scales and y, and of weight and factor stored as floats
  Storage storage;
  bool wide_indices;  // labels and channels are int32 rather than int16
  bool share_input;
  int threads;

  int64_t pivots() const { return channels ? r : 0; }
};

struct SubnetLinearArgs {
  const void *x;           // [tokens, inputs], rows x_stride apart
  const void *weight;      // [height, width], contiguous rows (columns when transposed) weight_stride apart
  const void *bias;        // [height] or null
  const int64_t *rows;     // [outputs], below height, or null for all
  const int64_t *columns;  // [inputs], below width, or null for all
  void *y;                 // [tokens, outputs]
  int64_t tokens, inputs, outputs, height, width, x_stride, weight_stride;
  Dtype dtype;
  bool transposed;
  int threads;
};

constexpr int64_t SPARSE_TILE = 16;  // rows that are stored together

struct SparseLinearArgs {  // pycompress/formats/zeros.py
  const void *x;           // [tokens, inputs], rows x_stride apart
  const void *values;      // sparse24: [outputs, inputs / 2]; bitmap: all that are kept
  const uint8_t *kept;     // sparse24: positions [outputs, inputs / 8]; bitmap: bits [outputs, 8 * ceil(inputs / 64)]
  const int32_t *offsets;  // bitmap: where the values of each tile start, [tiles + 1]; sparse24: null
  const void *bias;        // [outputs] or null
  void *y;                 // [tokens, outputs]
  int64_t tokens, inputs, outputs, x_stride;
  int64_t value_count;
  Dtype dtype;
  int threads;
};

// Every op of a level, by the sources that hold them: the one list, from which levels are declared and chosen and the
// Python module is made. X(level, op, arguments).
#define PYCOMPRESS_STATISTICS(X, level)           \
  X(level, gram, (const GramArgs &))              \
  X(level, kmeans_plus_plus, (const SeedArgs &))  \
  X(level, lloyd, (const LloydArgs &))            \
  X(level, centre, (const CentreArgs &))          \
  X(level, round_panel, (const RoundPanelArgs &)) \
  X(level, prune_panel, (const PrunePanelArgs &))
// Of `shared_linear_gather`, what of a float32 layer is no product. Output sharing: y from `reduced` [tokens, k + r]
// and the product of its low-rank part with the factor. Input sharing: what `reduced` lacks besides the factor's
// product.
#define PYCOMPRESS_LAYERS(X, level)                                                                \
  X(level, shared_linear, (const SharedLinearArgs &))                                              \
  X(level, shared_linear_gather, (const SharedLinearArgs &, float *reduced, const float *product)) \
  X(level, subnet_linear, (const SubnetLinearArgs &))
#define PYCOMPRESS_SPARSE_LAYERS(X, level)              \
  X(level, sparse24_linear, (const SparseLinearArgs &)) \
  X(level, bitmap_linear, (const SparseLinearArgs &))
#define PYCOMPRESS_OPS(X, level) \
  PYCOMPRESS_STATISTICS(X, level) PYCOMPRESS_LAYERS(X, level) PYCOMPRESS_SPARSE_LAYERS(X, level)

struct Kernels {
#define PYCOMPRESS_POINTER(level, op, arguments) void(*op) arguments;
  PYCOMPRESS_OPS(PYCOMPRESS_POINTER, )
#undef PYCOMPRESS_POINTER
};

#define PYCOMPRESS_FUNCTION(level, op, arguments) void op arguments;
#define PYCOMPRESS_DECLARE(level)            \
  namespace level {                          \
  PYCOMPRESS_OPS(PYCOMPRESS_FUNCTION, level) \
  }
PYCOMPRESS_DECLARE(portable)
PYCOMPRESS_DECLARE(avx2)
PYCOMPRESS_DECLARE(avx512)
PYCOMPRESS_DECLARE(avx512vbmi2)
PYCOMPRESS_DECLARE(avx512bf16)
#undef PYCOMPRESS_DECLARE
#undef PYCOMPRESS_FUNCTION

// Buffers that a calling thread keeps between calls, so that a decode step allocates nothing.
enum class Slot : int { rows, columns, stage, wide, similarity, centroids, small, permuted, scales, count };
float *scratch(Slot slot, int64_t floats);
int64_t *scratch_ints(int64_t count);

}  // namespace pycompress
