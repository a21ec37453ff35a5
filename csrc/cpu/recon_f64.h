// Reconstruction losses in fp64, element by element: for gradcheck and reference runs, not for speed.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/gaussian_f64.h"
#include "cpu/recon_tiles.h"

namespace vaeops::cpu {

inline double softplus(double x) { return (x > 0 ? x : x == x ? 0 : x) + std::log1p(std::exp(-std::fabs(x))); }
inline double sigmoid(double x) {
  const double e = std::exp(-std::fabs(x));
  return (x < 0 ? e : 1) / (1 + e);
}
inline double sign(double x) { return (x > 0) - (x < 0); }
inline double not_below(double x, double bound) { return x < bound ? bound : x; }  // NaN stays

// Ends a > b of the level's interval in units of the scale.
struct Interval {
  double a, b;
  bool lowest, highest;
  Interval(double p, double t, const ReconOptions<double>& o)
      : a((t + o.half_level - p) / o.scale),
        b((t - o.half_level - p) / o.scale),
        lowest(t < o.half_level),
        highest(t > 1 - o.half_level) {}
};

inline double element(double p, double t, const ReconOptions<double>& o) {
  const double d = p - t, size = std::fabs(d), s = o.scale;
  switch (o.kind) {
    case ReconKind::bce:
      return (t - 1) * not_below(std::log1p(-p), -100) - t * not_below(std::log(p), -100);
    case ReconKind::bce_logits: {
      const double wrong = p > 0 ? 1 - t : t;
      return (wrong == 0 ? 0 : std::fabs(p) * wrong) + std::log1p(std::exp(-std::fabs(p)));
    }
    case ReconKind::mse:
      return d * d;
    case ReconKind::half_mse:
      return d * d / 2;
    case ReconKind::l1:
      return size;
    case ReconKind::huber:
      return size <= s ? d * d / 2 : s * (size - s / 2);
    case ReconKind::gaussian_nll:
      return (d / s) * (d / s) / 2 + o.constant;
    case ReconKind::laplace_nll:
      return size / s + o.constant;
    case ReconKind::discretized_logistic: {
      const Interval level(p, t, o);
      if (level.lowest) return softplus(-level.a);
      if (level.highest) return softplus(level.b);
      return softplus(-level.a) + softplus(level.b) + o.constant;
    }
  }
  return 0;
}

// d element / d p
inline double slope(double p, double t, const ReconOptions<double>& o) {
  const double d = p - t, s = o.scale;
  switch (o.kind) {
    case ReconKind::bce:
      return d / not_below(p * (1 - p), 1e-12);
    case ReconKind::bce_logits:
      return sigmoid(p) - t;
    case ReconKind::mse:
      return 2 * d;
    case ReconKind::half_mse:
      return d;
    case ReconKind::l1:
      return sign(d);
    case ReconKind::huber:
      return d < -s ? -s : d > s ? s : d;
    case ReconKind::gaussian_nll:
      return d / s / s;
    case ReconKind::laplace_nll:
      return sign(d) / s;
    case ReconKind::discretized_logistic: {
      const Interval level(p, t, o);
      return ((level.highest ? 0 : sigmoid(-level.a)) - (level.lowest ? 0 : sigmoid(level.b))) / s;
    }
  }
  return 0;
}

inline void forward(const ReconTile<double, double>& t, const ReconOptions<double>& o) {
  double lanes[kLanes] = {};
  for (int64_t i = 0; i < t.n; ++i) {
    const double w = t.weight == nullptr ? 1 : t.weight[i];
    deliver(t.out, i, w == 0 ? 0 : w * element(t.pred[i], t.target[i] / o.levels, o), lanes);
  }
}

inline void backward(const ReconTile<double, double>& t, const ReconOptions<double>& o) {
  for (int64_t i = 0; i < t.n; ++i) {
    const double w = t.weight == nullptr ? 1 : t.weight[i], g = t.grad == nullptr ? t.one_grad : t.grad[i];
    t.gpred[i] = w == 0 ? g * 0 : g * (w * slope(t.pred[i], t.target[i] / o.levels, o));
  }
}

struct Item {
  double x, count;
  bool out = false;  // masked
  Item(const MultinomialTile<double, double>& t, int64_t i) : x(t.logits[i]), count(t.target[i]) {
    if (t.weight == nullptr) return;
    out = t.masked && t.weight[i] == 0;
    if (out) {
      x = -std::numeric_limits<double>::infinity();
      count = 0;
    } else if (!t.masked) {
      count *= t.weight[i];
    }
  }
};

inline RowSums row_sums(const MultinomialTile<double, double>& t) {
  RowSums sums;
  double top = -std::numeric_limits<double>::infinity();
  for (int64_t i = 0; i < t.n; ++i) {
    const Item item(t, i);
    top = std::max(top, item.x);
    sums.total += item.count;
    if (item.count != 0) sums.drawn += item.count * item.x;
  }
  sums.shift = std::isfinite(top) ? top : 0;
  for (int64_t i = 0; i < t.n; ++i) sums.sum += std::exp(Item(t, i).x - sums.shift);
  return sums;
}

inline void multinomial_backward(const MultinomialTile<double, double>& t) {
  for (int64_t i = 0; i < t.n; ++i) {
    const Item item(t, i);
    const double expected = t.total == 0 ? 0 : t.total * std::exp(item.x - t.lse);
    t.glogits[i] = item.out ? 0 : t.grad * (expected - item.count);
  }
}

}  // namespace vaeops::cpu
