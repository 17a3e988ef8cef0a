// Greedy k-means++ on a Gram matrix: O(n) a candidate.
#pragma once

#include <cmath>

#include "numeric.h"

namespace pycompress::PYCOMPRESS_LEVEL {

struct Seeding {
  const SeedArgs &s;
  const float *gram, *weights;
  float *norms, *mass, *closest;
  double *cumulative, *potential;
  int64_t *candidates;
};

// The first index whose cumulative mass passes the draw; the lowest index not taken when there is no mass.
inline void draw(Seeding &c, const float *uniforms, const int64_t *seeds, int64_t step) {
  const int64_t n = c.s.n;
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i)
    c.cumulative[i] = sum += static_cast<double>(step ? c.mass[i] * c.closest[i] : c.mass[i]);
  for (int64_t trial = 0; trial < c.s.trials; ++trial) {
    int64_t low = 0, high = n - 1;
    if (sum > 0.0) {
      const double wanted = static_cast<double>(uniforms[trial]) * sum;
      while (low < high) {
        const int64_t middle = (low + high) / 2;
        c.cumulative[middle] > wanted ? high = middle : low = middle + 1;
      }
    } else {
      for (int64_t i = 0; i < step; ++i) {
        if (seeds[i] == low) ++low, i = -1;
      }
    }
    c.candidates[trial] = low;
  }
}

inline float nearer(const Seeding &c, const float *row, float own, int64_t i) {
  const float distance = c.norms[i] + own - 2.0f * row[i], positive = distance > 0.0f ? distance : 0.0f;
  return positive < c.closest[i] ? positive : c.closest[i];
}

// The weighted sum of the distances to the nearest seed if the candidate were one: short sums in float, theirs in
// double.
inline double potential(const Seeding &c, int64_t candidate) {
  const float *row = c.gram + candidate * c.s.n, own = c.norms[candidate];
  constexpr int64_t block = 256;
  double sum = 0.0;
  for (int64_t from = 0; from < c.s.n; from += block) {
    float part = 0.0f;
#pragma omp simd reduction(+ : part)
    for (int64_t i = from; i < least(c.s.n, from + block); ++i) part += c.mass[i] * nearer(c, row, own, i);
    sum += static_cast<double>(part);
  }
  return sum;
}

inline void seed_one(Seeding &c, const float *uniforms, int64_t *seeds) {
  const SeedArgs &s = c.s;
  for (int64_t i = 0; i < s.n; ++i) {
    c.norms[i] = c.gram[i * s.n + i], c.mass[i] = c.weights ? c.weights[i] : 1.0f, c.closest[i] = INFINITY;
  }
  const int threads = s.n * s.trials > (1 << 15) ? s.threads : 1;
  for (int64_t step = 0; step < s.k; ++step) {
    draw(c, uniforms + step * s.trials, seeds, step);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t trial = 0; trial < s.trials; ++trial) c.potential[trial] = potential(c, c.candidates[trial]);
    int64_t best = 0;
    for (int64_t trial = 1; trial < s.trials; ++trial) {
      if (c.potential[trial] < c.potential[best]) best = trial;
    }
    const int64_t seed = seeds[step] = c.candidates[best];
    const float *row = c.gram + seed * s.n, own = c.norms[seed];
#pragma omp simd
    for (int64_t i = 0; i < s.n; ++i) c.closest[i] = nearer(c, row, own, i);
  }
}

void kmeans_plus_plus(const SeedArgs &s) {
  float *floats = scratch(Slot::wide, 3 * s.n);
  auto *doubles = reinterpret_cast<double *>(scratch(Slot::small, 2 * (s.n + s.trials)));
  Seeding c{
      s, nullptr, nullptr, floats, floats + s.n, floats + 2 * s.n, doubles, doubles + s.n, scratch_ints(s.trials)};
  for (int64_t batch = 0; batch < s.batch; ++batch) {
    c.gram = s.gram + batch * s.gram_stride;
    c.weights = s.weights ? s.weights + batch * s.n : nullptr;
    seed_one(c, s.uniforms + batch * s.k * s.trials, s.seeds + batch * s.k);
  }
}

}  // namespace pycompress::PYCOMPRESS_LEVEL
