// Linear layer with shared channels. Stage one multiplies x by the matrix that reads it (stacked for output sharing,
// the low-rank factor for input sharing) into `reduced` [tokens, k + r] floats; stage two gives y from `reduced`.
// Compiled once a level: see CMakeLists.txt.
#include PYCOMPRESS_VECTORS

#include <omp.h>

#include "stored.h"

namespace pycompress::PYCOMPRESS_LEVEL {

constexpr int64_t FEW_TOKENS = 24;     // above this the packing of gemm pays
constexpr int64_t PIECE = 16;          // rows of stage one that a thread takes at least
constexpr int64_t TILE = 64;           // rows whose stage-two products are finished together
constexpr int64_t MIN_WORK = 1 << 16;  // weights below which waking a thread costs more than it saves

// x and y are of type T; weight and factor are stored as S.
template <class T, class S>
struct Layer {
  const SharedLinearArgs &s;
  const int32_t *labels, *channels;
  const T *x = static_cast<const T *>(s.x), *bias = static_cast<const T *>(s.bias);
  T *y = static_cast<T *>(s.y);
  int64_t width = s.k + s.r;  // of a row of `reduced`
  S weight{s.weight, s.weight_scales, s.share_input ? s.outputs : width, s.share_input ? width : s.inputs};
  S factor{s.factor, s.factor_scales, s.share_input ? s.r : s.outputs - s.pivots(),
           s.share_input ? s.inputs - s.pivots() : s.r};
  // Stage one reads `first` against `input`, stage two `second` against row elements from second_at on; stage one's
  // products go to row elements from first_at on.
  const S &first = s.share_input ? factor : weight, &second = s.share_input ? weight : factor;
  int64_t first_size = s.inputs - (s.share_input ? s.pivots() : 0), first_at = s.share_input ? s.k : 0;
  int64_t second_size = s.share_input ? width : s.r, second_at = s.share_input ? 0 : s.k;
  const T *input = x;  // of stage one, rows input_stride apart
  int64_t input_stride = s.x_stride;

  // Puts the inputs into the order of `channels`, pivots first.
  void permute_input() {
    if (!s.share_input || !channels) return;
    T *permuted = reinterpret_cast<T *>(scratch(Slot::permuted, s.tokens * s.inputs));
#pragma omp parallel for schedule(static) num_threads(s.tokens > FEW_TOKENS ? s.threads : 1)
    for (int64_t t = 0; t < s.tokens; ++t) {
      for (int64_t j = 0; j < s.inputs; ++j) permuted[t * s.inputs + j] = x[t * s.x_stride + channels[j]];
    }
    input = permuted + s.r, input_stride = s.inputs;
  }

  // Where stage one reads nothing, its products are zero: a factor of pivots only.
  bool no_products() const { return !first_size; }
  void clear_products(float *reduced) const {
    for (int64_t t = 0; t < s.tokens; ++t) {
      for (int64_t i = 0; i < first.rows; ++i) reduced[t * width + first_at + i] = 0.0f;
    }
  }

  bool sums_by_label() const { return s.share_input && s.k; }
  void sum_by_label(int64_t token, float *reduced) const {
    const T *row = x + token * s.x_stride;
    for (int64_t c = 0; c < s.k; ++c) reduced[c] = 0.0f;
    for (int64_t j = 0; j < s.inputs; ++j) reduced[labels[j]] += widen(row[j]);
  }

  // The pivots' own inputs and outputs, once stage one's products are in `reduced`.
  void finish_pivots(int64_t token, float *reduced) const {
    if (!s.share_input) return put(token, 0, s.pivots(), reduced + s.k, reduced);
    for (int64_t j = 0; j < s.pivots(); ++j) reduced[s.k + j] += widen(x[token * s.x_stride + channels[j]]);
  }

  // y of one token from rows `from` on of `second`: product, its centroid's product and bias.
  void finish(int64_t token, int64_t from, int64_t count, const float *product, const float *reduced) const {
    put(token, from + (s.share_input ? 0 : s.pivots()), count, product, reduced);
  }

 private:
  void put(int64_t token, int64_t from, int64_t count, const float *product, const float *reduced) const {
    T *to = y + token * s.outputs;
    const int32_t *order = s.share_input ? nullptr : channels, *gather = s.share_input || !s.k ? nullptr : labels;
    for (int64_t j = 0; j < count; ++j) {
      const int64_t row = order ? order[from + j] : from + j;
      float value = product[j];
      if (gather) value += reduced[gather[row]];
      if (bias) value += widen(bias[row]);
      to[row] = narrow<T>(value);
    }
  }
};

template <class T, class S>
void few_tokens(const Layer<T, S> &layer) {
  using First = typename S::Exact;
  using Second = typename S::Wide;
  const SharedLinearArgs &s = layer.s;
  const int64_t x_size = padded(layer.first_size), operand_size = padded(layer.second_size);
  auto *x = reinterpret_cast<typename First::X *>(scratch(Slot::wide, s.tokens * x_size));
  float *reduced = scratch(Slot::stage, s.tokens * layer.width);
  float *operand = scratch(Slot::small, s.tokens * operand_size);
  for (int64_t t = 0; t < s.tokens; ++t) {
    First::prepare(layer.input + t * layer.input_stride, layer.first_size, x + t * x_size);
  }
  const int64_t work = layer.first.rows * layer.first_size + layer.second.rows * layer.second_size;
  const int threads = static_cast<int>(least(s.threads, work / MIN_WORK + 1));
  if (layer.no_products()) layer.clear_products(reduced);
  const int64_t pieces = layer.no_products() ? 0 : (layer.first.rows + PIECE - 1) / PIECE,
                sums = layer.sums_by_label() ? s.tokens : 0;

#pragma omp parallel num_threads(threads)
  {
    const int part = omp_get_thread_num(), parts = omp_get_num_threads();
    const Vectors<typename First::X> tokens{x, s.tokens, layer.first_size, x_size};
    // Guided: a thread's rows are neighbours, and the sums of a token, which are one piece so that their order is that
    // of any number of threads, come last.
#pragma omp for schedule(guided)
    for (int64_t piece = 0; piece < pieces + sums; ++piece) {
      if (piece >= pieces) {
        layer.sum_by_label(piece - pieces, reduced + (piece - pieces) * layer.width);
        continue;
      }
      const Range rows{piece * PIECE, least(layer.first.rows, (piece + 1) * PIECE)};
      layer.first.template dot<First>(rows, tokens, reduced + layer.first_at + rows.begin, layer.width);
    }
#pragma omp single
    for (int64_t t = 0; t < s.tokens; ++t) {
      float *row = reduced + t * layer.width;
      layer.finish_pivots(t, row);
      Second::prepare(row + layer.second_at, layer.second_size, operand + t * operand_size);
    }
    const Range columns = share_of(layer.second.rows, TILE, part, parts);
    const Vectors<float> operands{operand, s.tokens, layer.second_size, operand_size};
    for (int64_t from = columns.begin; from < columns.end; from += TILE) {
      float products[FEW_TOKENS * TILE];
      const int64_t to = least(from + TILE, columns.end);
      layer.second.template dot<Second>(Range{from, to}, operands, products, TILE);
      for (int64_t t = 0; t < s.tokens; ++t) {
        layer.finish(t, from, to - from, products + t * TILE, reduced + t * layer.width);
      }
    }
  }
}

template <class T, class S>
void many_tokens(const Layer<T, S> &layer) {
  const SharedLinearArgs &s = layer.s;
  const int64_t width = layer.width;
  float *reduced = scratch(Slot::stage, s.tokens * width);
  if (layer.no_products()) {
    layer.clear_products(reduced);
  } else {
    multiply(Matrix<T>{layer.input, s.tokens, layer.input_stride}, layer.first, layer.first_size, s.threads,
             [&](int64_t token, int64_t from, int64_t count, const float *products) {
               std::memcpy(reduced + token * width + layer.first_at + from, products, count * sizeof(float));
             });
  }
#pragma omp parallel for schedule(static) num_threads(s.threads)
  for (int64_t t = 0; t < s.tokens; ++t) {
    if (layer.sums_by_label()) layer.sum_by_label(t, reduced + t * width);
    layer.finish_pivots(t, reduced + t * width);
  }
  if (!layer.second.rows) return;
  multiply(Matrix<float>{reduced + layer.second_at, s.tokens, width}, layer.second, layer.second_size, s.threads,
           [&](int64_t token, int64_t from, int64_t count, const float *products) {
             layer.finish(token, from, count, products, reduced + token * width);
           });
}

// Labels and channels as int32, whatever they are stored as.
inline const int32_t *indices(const void *stored, bool wide, int64_t count, int32_t *room) {
  if (!stored || wide) return static_cast<const int32_t *>(stored);
  for (int64_t i = 0; i < count; ++i) room[i] = static_cast<const int16_t *>(stored)[i];
  return room;
}

template <class T, class S>
Layer<T, S> layer_of(const SharedLinearArgs &s) {
  const int64_t count = s.share_input ? s.inputs : s.outputs;
  auto *room = reinterpret_cast<int32_t *>(scratch_ints(count));  // two int32 of room for each int64
  return {s, indices(s.labels, s.wide_indices, count, room), indices(s.channels, s.wide_indices, count, room + count)};
}

template <class T, class S>
void run(const SharedLinearArgs &s) {
  Layer<T, S> layer = layer_of<T, S>(s);
  layer.permute_input();
  if (s.tokens <= FEW_TOKENS) {
    few_tokens(layer);
  } else {
    many_tokens(layer);
  }
}

template <class T>
void run(const SharedLinearArgs &s) {
  if (s.storage == Storage::floats) run<T, Floats<T>>(s);
  if (s.storage == Storage::int8) run<T, Int8<T>>(s);
  if (s.storage == Storage::int4) run<T, Int4<T>>(s);
}

void shared_linear_gather(const SharedLinearArgs &s, float *reduced, const float *product) {
  const auto layer = layer_of<float, Floats<float>>(s);
#pragma omp parallel for schedule(static) num_threads(s.threads)
  for (int64_t t = 0; t < s.tokens; ++t) {
    float *row = reduced + t * layer.width;
    if (layer.sums_by_label()) layer.sum_by_label(t, row);
    layer.finish_pivots(t, row);
    if (!s.share_input) layer.finish(t, 0, layer.second.rows, product + t * layer.second.rows, row);
  }
}

void shared_linear(const SharedLinearArgs &s) {
  if (s.dtype == Dtype::f32) run<float>(s);
  if (s.dtype == Dtype::bf16) run<Bf16>(s);
  if (s.dtype == Dtype::f16) run<Half>(s);
}

}  // namespace pycompress::PYCOMPRESS_LEVEL
