// What one call of a reconstruction kernel works on: n consecutive elements, every operand contiguous.
#pragma once
#include <cmath>

#include "cpu/gaussian_tiles.h"
#include "cpu/types.h"
#include "vaeops.h"

namespace vaeops::cpu {

// What every element of a call shares.
template <class C>
struct ReconOptions {
  ReconKind kind;
  C scale, inverse;  // s, 1 / s
  C constant;        // what a negative log-likelihood adds to each element
  C levels;          // a target of bytes is t / levels
  C half_level;      // of 8 bits
};

inline double recon_constant(ReconKind kind, double scale) {
  switch (kind) {
    case ReconKind::gaussian_nll:
      return std::log(scale) + 0.91893853320467274178;  // log(2 pi) / 2
    case ReconKind::laplace_nll:
      return std::log(2 * scale);
    case ReconKind::discretized_logistic:  // of an inner level: sigmoid(a) - sigmoid(b) over sigmoid(a) sigmoid(-b)
      return -std::log(-std::expm1(-1 / (255 * scale)));
    default:
      return 0;
  }
}

// S: what the target is read as: T, float or uint8_t.
template <class T, class S, class C = compute_t<T>>
struct ReconTile {
  const T* pred;    // [n]
  const S* target;  // [n]
  const C* weight;  // [n] or null
  Sink<C> out;      // (forward)
  const C* grad;    // [n] or null; then every element's gradient is `one_grad` (backward)
  C one_grad;
  T* gpred;  // [n] (backward)
  int64_t n;
};

// Part of a row of logits. The counts are target * weight, or, where `masked`, the target where weight is not 0.
template <class T, class S, class C = compute_t<T>>
struct MultinomialTile {
  const T* logits;  // [n]
  const S* target;  // [n]
  const C* weight;  // [n] or null
  bool masked;
  double grad, lse, total;  // (backward)
  T* glogits;               // [n] (backward)
  int64_t n;
};

// Of a part of a row: sum exp(x) = exp(shift) sum, sum t, sum t x.
struct RowSums {
  double shift = 0, sum = 0, total = 0, drawn = 0;

  void merge(const RowSums& o) {
    total += o.total;
    drawn += o.drawn;
    if (o.sum == 0) return;  // nothing but logits of -inf, whose shift says nothing
    if (sum == 0) {
      shift = o.shift;
      sum = o.sum;
      return;
    }
    const double top = shift < o.shift ? o.shift : shift;
    sum = sum * std::exp(shift - top) + o.sum * std::exp(o.shift - top);
    shift = top;
  }
};

}  // namespace vaeops::cpu
