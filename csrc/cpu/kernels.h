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
enum class Storage : int { floats = 0, int8 = 1, int4 = 2 };  // pycompress/storage.py

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

struct SparseLinearArgs {  // pycompress/sparse.py
  const void *x;           // [tokens, inputs], rows x_stride apart
  const void *values;      // sparse24: [outputs, inputs / 2]; bitmap: all that are kept
  const uint8_t *kept;     // sparse24: positions [outputs, inputs / 8]; bitmap: bits [outputs, 8 * ceil(inputs / 64)]
  const int32_t *offsets;  // bitmap: where the values of each tile start, [tiles + 1]; sparse24: null
  const void *bias;        // [outputs] or null
  void *y;                 // [tokens, outputs]
  int64_t tokens, inputs, outputs, x_stride;
  Dtype dtype;
  int threads;
};

struct Kernels {
  void (*gram)(const GramArgs &);
  void (*kmeans_plus_plus)(const SeedArgs &);
  void (*lloyd)(const LloydArgs &);
  void (*centre)(const CentreArgs &);
  void (*shared_linear)(const SharedLinearArgs &);
  // What of a float32 layer is no product. Output sharing: y from `reduced` [tokens, k + r] and the product of its
  // low-rank part with the factor. Input sharing: what `reduced` lacks besides the factor's product.
  void (*shared_linear_gather)(const SharedLinearArgs &, float *reduced, const float *product);
  void (*subnet_linear)(const SubnetLinearArgs &);
  void (*sparse24_linear)(const SparseLinearArgs &);
  void (*bitmap_linear)(const SparseLinearArgs &);
};

#define PYCOMPRESS_DECLARE(level)                                              \
  namespace level {                                                            \
  void gram(const GramArgs &);                                                 \
  void kmeans_plus_plus(const SeedArgs &);                                     \
  void lloyd(const LloydArgs &);                                               \
  void centre(const CentreArgs &);                                             \
  void shared_linear(const SharedLinearArgs &);                                \
  void shared_linear_gather(const SharedLinearArgs &, float *, const float *); \
  void subnet_linear(const SubnetLinearArgs &);                                \
  void sparse24_linear(const SparseLinearArgs &);                              \
  void bitmap_linear(const SparseLinearArgs &);                                \
  }
PYCOMPRESS_DECLARE(portable)
PYCOMPRESS_DECLARE(avx2)
PYCOMPRESS_DECLARE(avx512)
PYCOMPRESS_DECLARE(avx512vbmi2)
PYCOMPRESS_DECLARE(avx512bf16)
#undef PYCOMPRESS_DECLARE

// Buffers that a calling thread keeps between calls, so that a decode step allocates nothing.
enum class Slot : int { rows, columns, stage, wide, similarity, centroids, small, permuted, scales, count };
float *scratch(Slot slot, int64_t floats);
int64_t *scratch_ints(int64_t count);

}  // namespace pycompress
