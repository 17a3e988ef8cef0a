// A panel of columns, each rounded or set to zero in its turn while those behind it compensate for what it loses.
// Compiled once a level: see CMakeLists.txt.
//
// LANES rows are worked on together, their panel in the first-level cache; every loop over lanes is a few registers.
#include PYCOMPRESS_VECTORS

#include <cmath>

#include "numeric.h"

namespace pycompress::PYCOMPRESS_LEVEL {
namespace {

constexpr int64_t LANES = 32;
// Added to a float below 2^22 and taken away again it leaves the nearest integer, ties to even.
constexpr float ROUNDER = 12582912.0f;

struct Lanes {
  float at[LANES];
};

inline float nearest(float value, float low, float high) {
  const float held = value < low ? low : value > high ? high : value;
  return (held + ROUNDER) - ROUNDER;
}

inline void load_panel(Lanes *panel, const float *values, int64_t columns, int64_t rows, int64_t first) {
  const int64_t count = least(LANES, rows - first);
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t l = 0; l < LANES; ++l) panel[j].at[l] = l < count ? values[j * rows + first + l] : 0.0f;
  }
}

inline void store_row(float *to, const Lanes &lanes, int64_t count) {
  for (int64_t l = 0; l < count; ++l) to[l] = lanes.at[l];
}

// What the columns behind j compensate for.
inline void compensate(Lanes *panel, const float *factor_row, const Lanes &lost, int64_t j, int64_t columns) {
  constexpr int64_t REGISTERS = LANES / Vec::width;
  Vec::reg back[REGISTERS];
  for (int64_t r = 0; r < REGISTERS; ++r) {
    Lanes negative;
    for (int64_t l = 0; l < Vec::width; ++l) negative.at[l] = -lost.at[r * Vec::width + l];
    back[r] = Vec::load(negative.at);
  }
  for (int64_t t = j + 1; t < columns; ++t) {
    const Vec::reg weight = Vec::set1(factor_row[t]);
    for (int64_t r = 0; r < REGISTERS; ++r) {
      float *at = panel[t].at + r * Vec::width;
      Vec::store(at, Vec::fmadd(weight, back[r], Vec::load(at)));
    }
  }
}

inline float held_by(Dtype dtype, float value) {
  return dtype == Dtype::bf16 ? widen(narrow<Bf16>(value)) : dtype == Dtype::f16 ? widen(narrow<Half>(value)) : value;
}

// The scale of each lane, for `count` columns, that loses least by plain rounding, as the scales' dtype can hold it.
Lanes chosen_scale(const RoundPanelArgs &s, const Lanes *panel, int64_t count) {
  const float low = static_cast<float>(s.low), high = static_cast<float>(s.high);
  Lanes extreme{}, unit, best, least_error;
  for (int64_t j = 0; j < count; ++j) {
    for (int64_t l = 0; l < LANES; ++l) {
      const float value = panel[j].at[l];
      extreme.at[l] = std::fabs(value) > std::fabs(extreme.at[l]) ? value : extreme.at[l];
    }
  }
  for (int64_t l = 0; l < LANES; ++l) {
    unit.at[l] = extreme.at[l] == 0.0f ? 1.0f : std::fabs(extreme.at[l]);
    best.at[l] = unit.at[l], least_error.at[l] = INFINITY;
  }
  const int ends = s.low == -s.high ? 1 : 2;  // with one code more below zero the largest value may take it
  for (int end = 0; end < ends; ++end) {
    for (int64_t i = 0; i < s.tries; ++i) {
      Lanes scale, step, error{};
      for (int64_t l = 0; l < LANES; ++l) {
        const float whole = end == 0 ? unit.at[l] / high : extreme.at[l] / low, wanted = s.reductions[i] * whole;
        const float limited = wanted < -s.most ? -s.most : wanted > s.most ? s.most : wanted;
        const float held = held_by(s.dtype, limited);
        scale.at[l] = held == 0.0f ? s.least : held;
        step.at[l] = scale.at[l] / unit.at[l];
      }
      for (int64_t j = 0; j < count; ++j) {
        for (int64_t l = 0; l < LANES; ++l) {
          const float relative = panel[j].at[l] / unit.at[l];
          const float rest = relative - nearest(relative / step.at[l], low, high) * step.at[l];
          error.at[l] += rest * rest;
        }
      }
      for (int64_t l = 0; l < LANES; ++l) {
        const bool better = error.at[l] < least_error.at[l];
        best.at[l] = better ? scale.at[l] : best.at[l];
        least_error.at[l] = better ? error.at[l] : least_error.at[l];
      }
    }
  }
  return best;
}

void round_rows(const RoundPanelArgs &s, int64_t first) {
  Lanes panel[PANEL_COLUMNS];
  const int64_t count = least(LANES, s.rows - first);
  const float low = static_cast<float>(s.low), high = static_cast<float>(s.high);
  load_panel(panel, s.values, s.columns, s.rows, first);
  Lanes scale{};
  for (int64_t j = 0; j < s.columns; ++j) {
    if (!s.choose) {
      for (int64_t l = 0; l < LANES; ++l) scale.at[l] = l < count ? s.scales[j * s.rows + first + l] : 1.0f;
    } else if (j % s.group == 0) {
      scale = chosen_scale(s, panel + j, least(s.group, s.columns - j));
      store_row(s.scales + j / s.group * s.rows + first, scale, count);
    }
    const float *factor_row = s.factor + j * s.factor_stride, own = factor_row[j];
    Lanes code, lost;
    for (int64_t l = 0; l < LANES; ++l) {
      const float value = panel[j].at[l];
      code.at[l] = nearest(value / scale.at[l], low, high);
      lost.at[l] = (value - code.at[l] * scale.at[l]) / own;
    }
    compensate(panel, factor_row, lost, j, s.columns);
    for (int64_t l = 0; l < count; ++l) s.codes[j * s.rows + first + l] = static_cast<int8_t>(code.at[l]);
    store_row(s.lost + j * s.rows + first, lost, count);
  }
}

// Of `size` columns from j on, those whose squares cost least become zero, but for `keep`; of equal ones the first.
inline void choose_gone(const PrunePanelArgs &s, const Lanes *panel, int64_t j, Lanes *gone) {
  const int64_t size = least(s.size, s.columns - j);
  Lanes costs[PANEL_COLUMNS];
  for (int64_t a = 0; a < size; ++a) {
    const float own = s.factor[(j + a) * s.factor_stride + j + a], price = own * own;
    for (int64_t l = 0; l < LANES; ++l) costs[a].at[l] = panel[j + a].at[l] * panel[j + a].at[l] / price;
  }
  const float zeros = static_cast<float>(s.size - s.keep);
  for (int64_t a = 0; a < size; ++a) {
    Lanes before{};
    for (int64_t b = 0; b < size; ++b) {
      for (int64_t l = 0; l < LANES; ++l) {
        const bool cheaper = b < a ? costs[b].at[l] <= costs[a].at[l] : costs[b].at[l] < costs[a].at[l];
        before.at[l] += cheaper ? 1.0f : 0.0f;
      }
    }
    for (int64_t l = 0; l < LANES; ++l) gone[j + a].at[l] = before.at[l] < zeros ? 1.0f : 0.0f;
  }
}

void prune_rows(const PrunePanelArgs &s, int64_t first) {
  Lanes panel[PANEL_COLUMNS], gone[PANEL_COLUMNS];
  const int64_t count = least(LANES, s.rows - first);
  load_panel(panel, s.values, s.columns, s.rows, first);
  for (int64_t j = 0; j < s.columns; ++j) {
    if (s.gone) {
      for (int64_t l = 0; l < LANES; ++l) gone[j].at[l] = l < count && s.gone[j * s.rows + first + l] ? 1.0f : 0.0f;
    } else if (j % s.size == 0) {
      choose_gone(s, panel, j, gone);
    }
    const float *factor_row = s.factor + j * s.factor_stride, own = factor_row[j];
    Lanes lost;
    for (int64_t l = 0; l < LANES; ++l) {
      lost.at[l] = panel[j].at[l] * gone[j].at[l] / own;
      panel[j].at[l] = gone[j].at[l] != 0.0f ? 0.0f : panel[j].at[l];
    }
    compensate(panel, factor_row, lost, j, s.columns);
    store_row(s.kept + j * s.rows + first, panel[j], count);
    store_row(s.lost + j * s.rows + first, lost, count);
  }
}

}  // namespace

void round_panel(const RoundPanelArgs &s) {
#pragma omp parallel for schedule(static) num_threads(s.threads)
  for (int64_t first = 0; first < s.rows; first += LANES) round_rows(s, first);
}

void prune_panel(const PrunePanelArgs &s) {
#pragma omp parallel for schedule(static) num_threads(s.threads)
  for (int64_t first = 0; first < s.rows; first += LANES) prune_rows(s, first);
}

}  // namespace pycompress::PYCOMPRESS_LEVEL
