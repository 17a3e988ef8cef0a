// Takes the mean of its cluster away from each row, in place, with sums in row order.
// Compiled once a level: see CMakeLists.txt.
#include PYCOMPRESS_VECTORS

#include "numeric.h"

namespace pycompress::PYCOMPRESS_LEVEL {

void centre(const CentreArgs &s) {
  float *means = scratch(Slot::centroids, s.k * s.columns), *counts = scratch(Slot::small, s.k);
  for (int64_t batch = 0; batch < s.batch; ++batch) {
    float *y = s.y + batch * s.n * s.columns;
    const int64_t *labels = s.labels + batch * s.n;
    for (int64_t c = 0; c < s.k; ++c) counts[c] = 0.0f;
    for (int64_t i = 0; i < s.n; ++i) counts[labels[i]] += 1.0f;
#pragma omp parallel for schedule(static) num_threads(s.threads)
    for (int part = 0; part < s.threads; ++part) {
      const Range range = share_of(s.columns, 16, part, s.threads);
      for (int64_t c = 0; c < s.k; ++c) {
        for (int64_t j = range.begin; j < range.end; ++j) means[c * s.columns + j] = 0.0f;
      }
      for (int64_t i = 0; i < s.n; ++i) {
        float *mean = means + labels[i] * s.columns;
        for (int64_t j = range.begin; j < range.end; ++j) mean[j] += y[i * s.columns + j];
      }
      for (int64_t i = 0; i < s.n; ++i) {
        const float *mean = means + labels[i] * s.columns, inverse = 1.0f / counts[labels[i]];
        for (int64_t j = range.begin; j < range.end; ++j) y[i * s.columns + j] -= mean[j] * inverse;
      }
    }
  }
}

}  // namespace pycompress::PYCOMPRESS_LEVEL
