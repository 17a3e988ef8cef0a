// Linear layer whose weight is stored without its zeros: products of its rows with the tokens, or, for many tokens and
// a bitmap, each value times its column of all tokens, so that zeros cost nothing.
// Compiled once a level: see CMakeLists.txt.
#include PYCOMPRESS_VECTORS

#include <omp.h>

#include <array>
#include <type_traits>
#include <utility>

#include "sparse.h"

namespace pycompress::PYCOMPRESS_LEVEL {
namespace sparse {

constexpr int64_t MIN_WORK = 1 << 16;  // weights below which waking a thread costs more than it saves
constexpr int64_t CHUNK = 8 * TILE;    // rows that all tokens use while they are in the second-level cache

constexpr int MOST = Vec::width == 16 ? 8 : 4;  // registers of tokens that a value is multiplied with
constexpr int64_t ROWS = 512;                   // rows whose sums for them stay in the second-level cache
constexpr int64_t TOKENS = MOST * Vec::width;   // that are multiplied together

template <class T, class Weight>
struct Layer {
  const SparseLinearArgs &s;
  const T *x = static_cast<const T *>(s.x), *bias = static_cast<const T *>(s.bias);
  T *y = static_cast<T *>(s.y);
  const Weight weight{s};

  void finish(int64_t token, int64_t from, int64_t count, const float *product) const {
    T *to = y + token * s.outputs + from;
    for (int64_t i = 0; i < count; ++i) to[i] = narrow<T>(bias ? product[i] + widen(bias[from + i]) : product[i]);
  }
};

template <class T, class Weight>
void few_tokens(const Layer<T, Weight> &layer, Range tokens) {
  const SparseLinearArgs &s = layer.s;
  const int64_t stride = padded(s.inputs), count = tokens.end - tokens.begin, chunk = count > 1 ? CHUNK / 2 : CHUNK;
  float *x = scratch(Slot::wide, count * stride);
  for (int64_t t = 0; t < count; ++t) {
    Weight::Order::prepare(layer.x + (tokens.begin + t) * s.x_stride, s.inputs, x + t * stride);
  }
  const int threads = static_cast<int>(least(s.threads, s.outputs * s.inputs / MIN_WORK + 1));
#pragma omp parallel num_threads(threads)
  {
    const Range range = share_of(s.outputs, TILE, omp_get_thread_num(), omp_get_num_threads());
    for (int64_t from = range.begin; from < range.end; from += chunk) {
      float products[TOKENS * CHUNK];
      const int64_t rows = least(chunk, range.end - from);
      dot_tiles(layer.weight, {from, from + rows}, {x, count, s.inputs, stride}, products, CHUNK);
      for (int64_t t = 0; t < count; ++t) layer.finish(tokens.begin + t, from, rows, products + t * CHUNK);
    }
  }
}

// Sums of R registers of tokens, to which values are added times their columns of x [., R registers].
template <int R>
struct Sums {
  Vec::reg parts[2][R];  // two sums, for additions to follow each other without waiting

  explicit Sums(const float *sums) {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) parts[0][i] = Vec::load(sums + i * Vec::width), parts[1][i] = Vec::zero();
  }
  void add(int part, Vec::reg value, const float *column) {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      parts[part][i] = Vec::fmadd(value, Vec::load(column + i * Vec::width), parts[part][i]);
    }
  }
  void store(float *sums) const {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) Vec::store(sums + i * Vec::width, Vec::add(parts[0][i], parts[1][i]));
  }
};

// sums [rows, R registers] += the rows of a tile for the WORD columns from p on, times x [WORD, R registers].
template <int R, class T>
void add_word(const Bitmap<T> &w, const Tile &tile, int64_t p, const T *&next, const float *x, float *sums) {
  constexpr int64_t W = R * Vec::width;
  const uint8_t *words = w.words(tile) + p / 8 * tile.rows;
  const bool near_end = w.near_end(tile);
  __builtin_prefetch(words + TILE * WORD / 8);
  for (int64_t i = 0; i < tile.rows; ++i, sums += W) {
    uint64_t kept = word_at(words + i * WORD / 8);
    const int64_t count = __builtin_popcountll(kept);
    alignas(64) float values[WORD];
    widen_all(next, near_end ? count : round_up(count, Vec::width), values);
    Sums<R> sum(sums);
    for (int64_t v = 0; v < count; v += Vec::width) {
      Vec::Each each(Vec::load(values + v));
      for (int64_t pair = v; pair < least(count, v + Vec::width); pair += 2) {
        sum.add(0, each.next(), x + __builtin_ctzll(kept) * W);
        kept &= kept - 1;
        if (!kept) break;
        sum.add(1, each.next(), x + __builtin_ctzll(kept) * W);
        kept &= kept - 1;
      }
    }
    sum.store(sums);
    next += count;
  }
}

// sums [rows, R registers] += the rows, of which the first starts a tile, times x [inputs, R registers].
template <int R, class T>
void add_rows(const Bitmap<T> &w, Range rows, const float *x, float *sums) {
  constexpr int64_t W = R * Vec::width;
  const T *next[ROWS / TILE];
  for (int64_t i = rows.begin; i < rows.end; i += TILE) next[(i - rows.begin) / TILE] = w.start(w.tile(i));
  for (int64_t p = 0; p < w.size; p += WORD) {
    for (int64_t i = rows.begin; i < rows.end; i += TILE) {
      add_word<R>(w, w.tile(i), p, next[(i - rows.begin) / TILE], x + p * W, sums + (i - rows.begin) * W);
    }
  }
}

// add_rows by the number of registers less one.
template <class T, std::size_t... I>
constexpr auto adders(std::index_sequence<I...>) {
  return std::array{&add_rows<static_cast<int>(I) + 1, T>...};
}

// Outputs of sums [rows, width], a column a token.
template <class T, class Weight>
void finish_rows(const Layer<T, Weight> &layer, Range rows, Range tokens, const float *sums, int64_t width) {
  constexpr int64_t W = Vec::width;
  for (int64_t i = rows.begin; i < rows.end; i += W) {
    for (int64_t t = tokens.begin; t < tokens.end; t += W) {
      Vec::reg block[W];
      for (int64_t j = 0; j < W; ++j) {
        const int64_t row = least(i + j, rows.end - 1) - rows.begin;
        block[j] = Vec::load(sums + row * width + t - tokens.begin);
      }
      Vec::transpose(block);
      for (int64_t j = 0; j < least(W, tokens.end - t); ++j) {
        float products[W];
        Vec::store(products, block[j]);
        layer.finish(t + j, i, least(W, rows.end - i), products);
      }
    }
  }
}

template <class T>
void many_tokens(const Layer<T, Bitmap<T>> &layer, Range tokens) {
  const SparseLinearArgs &s = layer.s;
  const Matrix<T> inputs{layer.x, s.tokens, s.x_stride};
  const int64_t width = round_up(tokens.end - tokens.begin, Vec::width);
  const auto add = adders<T>(std::make_index_sequence<MOST>())[width / Vec::width - 1];
  float *x = scratch(Slot::wide, s.inputs * width);
#pragma omp parallel num_threads(s.threads)
  {
    const Range columns = share_of(s.inputs, WORD, omp_get_thread_num(), omp_get_num_threads());
    pack_columns(inputs, tokens.begin, columns.begin, columns.end - columns.begin, x + columns.begin * width, width);
#pragma omp barrier
    const Range all = share_of(s.outputs, TILE, omp_get_thread_num(), omp_get_num_threads());
    float *sums = scratch(Slot::small, ROWS * width);
    for (int64_t from = all.begin; from < all.end; from += ROWS) {
      const Range rows{from, least(from + ROWS, all.end)};
      std::memset(sums, 0, (rows.end - rows.begin) * width * sizeof(float));
      add(layer.weight, rows, x, sums);
      finish_rows(layer, rows, tokens, sums, width);
    }
  }
}

template <class T, class Weight>
void run(const SparseLinearArgs &s) {
  const Layer<T, Weight> layer{s};
  for (int64_t first = 0; first < s.tokens; first += TOKENS) {
    const Range tokens{first, least(first + TOKENS, s.tokens)};
    if constexpr (std::is_same_v<Weight, Bitmap<T>>) {
      if (tokens.end - first > Weight::FEW) {
        many_tokens(layer, tokens);
        continue;
      }
    }
    few_tokens(layer, tokens);
  }
}

template <template <class> class Weight>
void run(const SparseLinearArgs &s) {
  if (s.dtype == Dtype::f32) run<float, Weight<float>>(s);
  if (s.dtype == Dtype::bf16) run<Bf16, Weight<Bf16>>(s);
  if (s.dtype == Dtype::f16) run<Half, Weight<Half>>(s);
}

}  // namespace sparse

void sparse24_linear(const SparseLinearArgs &s) { sparse::run<Sparse24>(s); }
void bitmap_linear(const SparseLinearArgs &s) { sparse::run<Bitmap>(s); }

}  // namespace pycompress::PYCOMPRESS_LEVEL
