// K-means++ and Lloyd's iterations. Every sum has one order whatever the number of threads.
// Compiled once a level: see CMakeLists.txt.
#include PYCOMPRESS_VECTORS

#include <cmath>

#include "gemm.h"
#include "seeding.h"

namespace pycompress::PYCOMPRESS_LEVEL {

// One matrix's state. similarity[c, i] is the inner product of point i with the mean of cluster c.
struct Clustering {
  const LloydArgs &s;
  const float *data = nullptr, *weights = nullptr;
  int64_t *labels = nullptr, *previous = nullptr, *order = nullptr;
  int64_t *start = nullptr, *count = nullptr, *changed = nullptr;
  float *similarity = nullptr, *centroids = nullptr, *norms = nullptr, *distance = nullptr;
  float *squares = nullptr, *total = nullptr;

  explicit Clustering(const LloydArgs &args) : s(args) {
    previous = scratch_ints(2 * s.n + 3 * (s.k + 1)), order = previous + s.n;
    start = order + s.n, count = start + s.k + 1, changed = count + s.k + 1;
    norms = scratch(Slot::small, 2 * s.n + 2 * s.k), distance = norms + s.n;
    squares = distance + s.n, total = squares + s.k;
    similarity = scratch(Slot::similarity, s.k * s.n);
    centroids = s.points ? scratch(Slot::centroids, s.k * s.d) : nullptr;
  }
  float weight(int64_t i) const { return weights ? weights[i] : 1.0f; }
};

inline float dot(const float *a, const float *b, int64_t count) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += a[i] * b[i];
  return sum;
}

// Stable counting sort of the points by label.
inline void sort_by_label(Clustering &c) {
  const int64_t n = c.s.n, k = c.s.k;
  for (int64_t l = 0; l <= k; ++l) c.start[l] = 0;
  for (int64_t i = 0; i < n; ++i) ++c.start[c.labels[i] + 1];
  for (int64_t l = 0; l < k; ++l) c.start[l + 1] += c.start[l];
  for (int64_t l = 0; l < k; ++l) c.count[l] = c.start[l];
  for (int64_t i = 0; i < n; ++i) c.order[c.count[c.labels[i]]++] = i;
}

// Weighted mean of the rows `width` apart of `rows` that belong to cluster l, columns [begin, end).
inline void mean_rows(const Clustering &c, int64_t l, const float *rows, int64_t width, Range range, float *out) {
  for (int64_t j = range.begin; j < range.end; ++j) out[j] = 0.0f;
  const int64_t *member = c.order + c.start[l], *end = c.order + c.start[l + 1];
  for (; member + 4 <= end; member += 4) {
    const float *a = rows + member[0] * width, *b = rows + member[1] * width;
    const float *e = rows + member[2] * width, *f = rows + member[3] * width;
    const float wa = c.weight(member[0]), wb = c.weight(member[1]), we = c.weight(member[2]), wf = c.weight(member[3]);
#pragma omp simd
    for (int64_t j = range.begin; j < range.end; ++j) out[j] += (wa * a[j] + wb * b[j]) + (we * e[j] + wf * f[j]);
  }
  for (; member < end; ++member) {
    const float *a = rows + *member * width, wa = c.weight(*member);
#pragma omp simd
    for (int64_t j = range.begin; j < range.end; ++j) out[j] += wa * a[j];
  }
  const float inverse = c.total[l] > 0.0f ? 1.0f / c.total[l] : 0.0f;
#pragma omp simd
  for (int64_t j = range.begin; j < range.end; ++j) out[j] *= inverse;
}

// Similarities of the `count` clusters listed in `changed`, from their members.
inline void update_gram(Clustering &c, int64_t count) {
  const LloydArgs &s = c.s;
#pragma omp parallel for schedule(static) num_threads(s.threads)
  for (int part = 0; part < s.threads; ++part) {
    const Range range = share_of(s.n, 16, part, s.threads);
    for (int64_t l = 0; l < count; ++l) {
      mean_rows(c, c.changed[l], c.data, s.n, range, c.similarity + c.changed[l] * s.n);
    }
  }
  for (int64_t l = 0; l < count; ++l) {
    const int64_t cluster = c.changed[l];
    double sum = 0.0;
    for (int64_t m = c.start[cluster]; m < c.start[cluster + 1]; ++m) {
      sum += static_cast<double>(c.weight(c.order[m])) * c.similarity[cluster * s.n + c.order[m]];
    }
    c.squares[cluster] = c.total[cluster] > 0.0f ? static_cast<float>(sum / c.total[cluster]) : 0.0f;
  }
}

inline void multiply_centroids(Clustering &c, int64_t count) {
  const LloydArgs &s = c.s;
  gemm(Matrix<float>{c.centroids, count, s.d, c.changed}, Matrix<float>{c.data, s.n, s.d}, s.d, false, s.threads,
       [&](const float *values, const Piece &piece) {
         accumulate(values, piece, [&](int64_t i) { return c.similarity + c.changed[i] * s.n; });
       });
  for (int64_t l = 0; l < count; ++l) {
    const float *centroid = c.centroids + c.changed[l] * s.d;
    c.squares[c.changed[l]] = dot(centroid, centroid, s.d);
  }
}

inline void update_points(Clustering &c, int64_t count) {
  const LloydArgs &s = c.s;
#pragma omp parallel for schedule(dynamic) num_threads(s.threads)
  for (int64_t l = 0; l < count; ++l) {
    mean_rows(c, c.changed[l], c.data, s.d, Range{0, s.d}, c.centroids + c.changed[l] * s.d);
  }
  multiply_centroids(c, count);
}

// Means again for the clusters whose members changed; all others keep theirs, bit for bit.
inline void update(Clustering &c) {
  const LloydArgs &s = c.s;
  sort_by_label(c);
  int64_t count = 0;
  for (int64_t l = 0; l < s.k; ++l) c.count[l] = 0;
  for (int64_t i = 0; i < s.n; ++i) {
    if (c.labels[i] == c.previous[i]) continue;
    c.count[c.labels[i]] = 1;
    if (c.previous[i] >= 0) c.count[c.previous[i]] = 1;
  }
  for (int64_t l = 0; l < s.k; ++l) {
    if (!c.count[l] && c.previous[0] >= 0) continue;
    c.changed[count++] = l;
    double total = 0.0;
    for (int64_t m = c.start[l]; m < c.start[l + 1]; ++m) total += c.weight(c.order[m]);
    c.total[l] = static_cast<float>(total);
  }
  s.points ? update_points(c, count) : update_gram(c, count);
}

// The seeds stand for their clusters' means.
inline void start_from_seeds(Clustering &c, const int64_t *seeds) {
  const LloydArgs &s = c.s;
  for (int64_t l = 0; l < s.k; ++l) c.total[l] = 1.0f, c.changed[l] = l;
  if (s.points) {
    for (int64_t l = 0; l < s.k; ++l) std::memcpy(c.centroids + l * s.d, c.data + seeds[l] * s.d, s.d * sizeof(float));
    multiply_centroids(c, s.k);
    return;
  }
  for (int64_t l = 0; l < s.k; ++l) {
    std::memcpy(c.similarity + l * s.n, c.data + seeds[l] * s.n, s.n * sizeof(float));
    c.squares[l] = c.data[seeds[l] * s.n + seeds[l]];
  }
}

// Labels of the nearest means, ties to the lowest; `distance` gets the squared distances.
inline void assign(Clustering &c) {
  const LloydArgs &s = c.s;
  constexpr int64_t block = 256;
#pragma omp parallel for schedule(static) num_threads(s.threads)
  for (int64_t from = 0; from < s.n; from += block) {
    const int64_t size = least(block, s.n - from);
    float best[block];
    int32_t label[block];
    for (int64_t i = 0; i < block; ++i) best[i] = INFINITY, label[i] = 0;
    for (int64_t l = 0; l < s.k; ++l) {
      if (!(c.total[l] > 0.0f)) continue;
      const float *row = c.similarity + l * s.n + from, square = c.squares[l];
      const int32_t candidate = static_cast<int32_t>(l);
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) {
        const float score = square - 2.0f * row[i];
        label[i] = score < best[i] ? candidate : label[i];
        best[i] = score < best[i] ? score : best[i];
      }
    }
    for (int64_t i = 0; i < size; ++i) {
      c.labels[from + i] = label[i];
      c.distance[from + i] = c.norms[from + i] + best[i];
    }
  }
}

// Moves the farthest points into the empty clusters; no cluster gives its last point.
inline void reseed_empty(Clustering &c) {
  const LloydArgs &s = c.s;
  for (int64_t l = 0; l < s.k; ++l) c.count[l] = 0;
  for (int64_t i = 0; i < s.n; ++i) c.count[c.labels[i]] += c.weight(i) > 0.0f;
  for (int64_t l = 0; l < s.k; ++l) {
    if (c.count[l]) continue;
    int64_t farthest = -1;
    for (int64_t i = 0; i < s.n; ++i) {
      if (c.count[c.labels[i]] < 2 || !(c.weight(i) > 0.0f) || !(c.distance[i] > 0.0f)) continue;
      if (farthest < 0 || c.distance[i] > c.distance[farthest]) farthest = i;
    }
    if (farthest < 0) return;
    --c.count[c.labels[farthest]];
    c.labels[farthest] = l, c.count[l] = 1, c.distance[farthest] = -1.0f;
  }
}

inline float inertia(const Clustering &c) {
  double sum = 0.0;
  for (int64_t i = 0; i < c.s.n; ++i) {
    if (!(c.weight(i) > 0.0f)) continue;
    const float score = c.squares[c.labels[i]] - 2.0f * c.similarity[c.labels[i] * c.s.n + i], own = c.norms[i] + score;
    sum += static_cast<double>(c.weight(i)) * (own > 0.0f ? own : 0.0f);
  }
  return static_cast<float>(sum);
}

inline bool same(const Clustering &c) { return !std::memcmp(c.labels, c.previous, c.s.n * sizeof(int64_t)); }

void lloyd(const LloydArgs &s) {
  Clustering c(s);
  for (int64_t batch = 0; batch < s.batch; ++batch) {
    c.data = s.data + batch * s.data_stride;
    c.weights = s.weights ? s.weights + batch * s.n : nullptr;
    c.labels = s.labels + batch * s.n;
    for (int64_t i = 0; i < s.n; ++i)
      c.norms[i] = s.points ? dot(c.data + i * s.d, c.data + i * s.d, s.d) : c.data[i * s.n + i];
    start_from_seeds(c, s.seeds + batch * s.k);
    assign(c);
    reseed_empty(c);
    for (int64_t i = 0; i < s.n; ++i) c.previous[i] = -1;
    for (int64_t step = 0; step < s.iterations; ++step) {
      update(c);
      std::memcpy(c.previous, c.labels, s.n * sizeof(int64_t));
      assign(c);
      reseed_empty(c);
      if (same(c)) break;
    }
    if (!same(c)) update(c);
    s.inertia[batch] = inertia(c);
  }
}

}  // namespace pycompress::PYCOMPRESS_LEVEL
