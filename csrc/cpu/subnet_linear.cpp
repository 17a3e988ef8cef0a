// Dense linear layer over some rows and columns of a stored matrix, whose rows or columns are contiguous.
//
// Few tokens, rows contiguous: dot products of the rows. Few tokens, columns contiguous: a sum of columns, so that only
// those that were asked for are read. Many tokens: gemm, which finds rows and columns while it packs.
// Compiled once a level: see CMakeLists.txt.
#include PYCOMPRESS_VECTORS

#include <omp.h>

#include "dot.h"
#include "gemm.h"

namespace pycompress::PYCOMPRESS_LEVEL {
namespace subnet {

constexpr int64_t FEW_TOKENS = 16;     // above this packing pays
constexpr int64_t TILE = 16;           // rows that stay in the second-level cache while all tokens use them
constexpr int64_t MIN_WORK = 1 << 16;  // weights below which waking a thread costs more than it saves
constexpr int64_t SUM_BLOCK = 256;     // columns that are summed before the total takes them, to lose fewer digits
constexpr int AT_ONCE = 8;             // columns that one pass over the sums adds

template <class T>
struct Layer {
  const SubnetLinearArgs &s;
  const T *x = static_cast<const T *>(s.x), *weight = static_cast<const T *>(s.weight);
  const T *bias = static_cast<const T *>(s.bias);
  T *y = static_cast<T *>(s.y);

  int64_t row(int64_t i) const { return s.rows ? s.rows[i] : i; }
  int64_t column(int64_t j) const { return s.columns ? s.columns[j] : j; }

  // Outputs from `from` on of one token: product, bias, rounding.
  void finish(int64_t token, int64_t from, int64_t count, const float *product) const {
    T *to = y + token * s.outputs + from;
    if (!bias) {
      for (int64_t i = 0; i < count; ++i) to[i] = narrow<T>(product[i]);
      return;
    }
    for (int64_t i = 0; i < count; ++i) to[i] = narrow<T>(product[i] + widen(bias[row(from + i)]));
  }

  int threads() const { return static_cast<int>(least(s.threads, s.outputs * s.inputs / MIN_WORK + 1)); }
};

// TILE of the rows that were asked for, and the next ones that dot_rows prefetches; past the end the last one stands.
template <class P, class T>
struct ChosenRows {
  using X = typename P::X;
  static constexpr int64_t UNIT = PAIR;
  static constexpr int TOGETHER = 8;
  const T *rows[TILE + TOGETHER];

  ChosenRows(const Layer<T> &layer, int64_t from) {
    for (int64_t i = 0; i < TILE + TOGETHER; ++i) {
      rows[i] = layer.weight + layer.row(least(from + i, layer.s.outputs - 1)) * layer.s.weight_stride;
    }
  }
  const void *at(int64_t row, int64_t p) const { return rows[row] + p; }
  auto load(int64_t row, int64_t p) const { return P::load(rows[row] + p); }
  auto load(int64_t row, int64_t p, int64_t count) const { return P::load(rows[row] + p, count); }
  template <class Loaded>
  static Vec::reg step(Vec::reg sum, const Loaded &loaded, const X *x) {
    return P::step(sum, loaded, x);
  }
};

// Inputs at the columns they belong to, zero elsewhere.
template <class T>
const float *spread(const Layer<T> &layer) {
  const SubnetLinearArgs &s = layer.s;
  float *whole = scratch(Slot::permuted, s.tokens * s.width);
  std::memset(whole, 0, s.tokens * s.width * sizeof(float));
  for (int64_t t = 0; t < s.tokens; ++t) {
    for (int64_t j = 0; j < s.inputs; ++j) whole[t * s.width + s.columns[j]] += widen(layer.x[t * s.x_stride + j]);
  }
  return whole;
}

// Rows are contiguous and read whole, `from` being the inputs of all their columns.
template <class P, class S, class T>
void dot(const Layer<T> &layer, const S *from, int64_t from_stride) {
  const SubnetLinearArgs &s = layer.s;
  const int64_t size = s.width, stride = padded(size);
  auto *x = reinterpret_cast<typename P::X *>(scratch(Slot::wide, s.tokens * stride));
  for (int64_t t = 0; t < s.tokens; ++t) P::prepare(from + t * from_stride, size, x + t * stride);
#pragma omp parallel num_threads(layer.threads())
  {
    const Range range = share_of(s.outputs, TILE, omp_get_thread_num(), omp_get_num_threads());
    for (int64_t from = range.begin; from < range.end; from += TILE) {
      float products[FEW_TOKENS * TILE];
      const Range rows{0, least(TILE, range.end - from)};
      dot_all(ChosenRows<P, T>(layer, from), rows, Vectors<typename P::X>{x, s.tokens, size, stride}, products, TILE);
      for (int64_t t = 0; t < s.tokens; ++t) {
        layer.finish(t, from, rows.end, products + t * TILE);
      }
    }
  }
}

// sums[token * stride + n] += the sum over R columns of x times weight; the first pass writes. The R columns behind
// them are asked for meanwhile.
template <int R, class T>
void add_columns(const T *const *columns, const float *x, int64_t x_stride, int64_t tokens, Range range, bool first,
                 float *sums, int64_t stride) {
  int64_t n = range.begin;
  for (; n + Vec::width <= range.end; n += Vec::width) {
    Vec::reg values[R];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) values[i] = Vec::load(columns[i] + n), __builtin_prefetch(columns[R + i] + n, 0, 2);
    for (int64_t t = 0; t < tokens; ++t) {
      Vec::reg sum = first ? Vec::zero() : Vec::load(sums + t * stride + n);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) sum = Vec::fmadd(Vec::set1(x[t * x_stride + i]), values[i], sum);
      Vec::store(sums + t * stride + n, sum);
    }
  }
  for (; n < range.end; ++n) {
    for (int64_t t = 0; t < tokens; ++t) {
      float sum = first ? 0.0f : sums[t * stride + n];
      for (int i = 0; i < R; ++i) sum += x[t * x_stride + i] * widen(columns[i][n]);
      sums[t * stride + n] = sum;
    }
  }
}

// Columns are contiguous: those that were asked for are added up, over all rows, which threads share.
template <class T>
void sum_columns(const Layer<T> &layer) {
  const SubnetLinearArgs &s = layer.s;
  const int64_t height = s.height;
  float *x = scratch(Slot::wide, s.tokens * s.inputs);
  float *sums = scratch(Slot::small, s.tokens * height), *totals = scratch(Slot::stage, s.tokens * height);
  for (int64_t t = 0; t < s.tokens; ++t) {
    for (int64_t j = 0; j < s.inputs; ++j) x[t * s.inputs + j] = widen(layer.x[t * s.x_stride + j]);
  }
#pragma omp parallel num_threads(layer.threads())
  {
    const Range range = share_of(height, PAIR, omp_get_thread_num(), omp_get_num_threads());
    for (int64_t from = 0; from < s.inputs; from += SUM_BLOCK) {
      const int64_t to = least(from + SUM_BLOCK, s.inputs);
      for (int64_t p = from; p < to;) {
        const T *columns[2 * AT_ONCE];
        for (int64_t i = 0; i < 2 * AT_ONCE; ++i) {
          columns[i] = layer.weight + layer.column(least(p + i, s.inputs - 1)) * s.weight_stride;
        }
        if (p + AT_ONCE <= to) {
          add_columns<AT_ONCE>(columns, x + p, s.inputs, s.tokens, range, p == from, sums, height);
          p += AT_ONCE;
        } else {
          add_columns<1>(columns, x + p, s.inputs, s.tokens, range, p == from, sums, height);
          p += 1;
        }
      }
      for (int64_t t = 0; t < s.tokens; ++t) {
        for (int64_t n = range.begin; n < range.end; ++n) {
          totals[t * height + n] = sums[t * height + n] + (from ? totals[t * height + n] : 0.0f);
        }
      }
    }
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t from = 0; from < s.outputs; from += TILE) {
      const int64_t count = least(TILE, s.outputs - from);
      for (int64_t t = 0; t < s.tokens; ++t) {
        float products[TILE];
        for (int64_t i = 0; i < count; ++i) products[i] = totals[t * height + layer.row(from + i)];
        layer.finish(t, from, count, products);
      }
    }
  }
}

// The weights in use, as `multiply` takes them.
template <class T>
struct Chosen {
  const Layer<T> &layer;
  int64_t rows = layer.s.outputs;
};

template <class T>
void prefetch(const Chosen<T> &chosen, Range outputs, Range inputs) {
  constexpr int64_t LINE = 64 / sizeof(T);
  const Layer<T> &layer = chosen.layer;
  const SubnetLinearArgs &s = layer.s;
  if (s.transposed) {
    for (int64_t p = inputs.begin; p < inputs.end; ++p) {
      const T *column = layer.weight + layer.column(p) * s.weight_stride;
      for (int64_t i = outputs.begin; i < outputs.end; i += LINE) __builtin_prefetch(column + layer.row(i), 0, 2);
    }
    return;
  }
  for (int64_t i = outputs.begin; i < outputs.end; ++i) {
    const T *row = layer.weight + layer.row(i) * s.weight_stride;
    for (int64_t p = inputs.begin; p < inputs.end; p += LINE) __builtin_prefetch(row + layer.column(p), 0, 2);
  }
}

template <class T>
void pack_columns(const Chosen<T> &chosen, int64_t first, int64_t from, int64_t depth, float *out) {
  const Layer<T> &layer = chosen.layer;
  const SubnetLinearArgs &s = layer.s;
  const int64_t rows = least(NR, s.outputs - first);
  if (!s.transposed && !s.columns) {
    pack_columns(Matrix<T>{layer.weight, s.outputs, s.weight_stride, s.rows}, first, from, depth, out);
    return;
  }
  if (!s.transposed) {
    T gathered[NR * SLICE];
    for (int64_t i = 0; i < rows; ++i) {
      const T *row = layer.weight + layer.row(first + i) * s.weight_stride;
      for (int64_t p = 0; p < depth; ++p) gathered[i * SLICE + p] = row[s.columns[from + p]];
    }
    pack_columns(Matrix<T>{gathered, rows, SLICE}, 0, 0, depth, out);
    return;
  }
  for (int64_t p = 0; p < depth; ++p, out += NR) {
    const T *column = layer.weight + layer.column(from + p) * s.weight_stride;
    int64_t j = 0;
    for (; !s.rows && j + Vec::width <= rows; j += Vec::width) Vec::store(out + j, Vec::load(column + first + j));
    for (; j < rows; ++j) out[j] = widen(column[layer.row(first + j)]);
    for (; j < NR; ++j) out[j] = 0.0f;
  }
}

template <class T>
void run(const SubnetLinearArgs &s) {
  const Layer<T> layer{s};
  if (s.tokens > FEW_TOKENS) {
    multiply(Matrix<T>{layer.x, s.tokens, s.x_stride}, Chosen<T>{layer}, s.inputs, s.threads,
             [&](int64_t token, int64_t from, int64_t count, const float *products) {
               layer.finish(token, from, count, products);
             });
  } else if (s.transposed) {
    sum_columns(layer);
  } else if (s.columns) {
    dot<Widened<T>>(layer, spread(layer), s.width);
  } else {
    dot<Direct<T>>(layer, layer.x, s.x_stride);
  }
}

}  // namespace subnet

void subnet_linear(const SubnetLinearArgs &s) {
  if (s.dtype == Dtype::f32) subnet::run<float>(s);
  if (s.dtype == Dtype::bf16) subnet::run<Bf16>(s);
  if (s.dtype == Dtype::f16) subnet::run<Half>(s);
}

}  // namespace pycompress::PYCOMPRESS_LEVEL
