// What one call of a Gaussian kernel works on: n consecutive elements, every operand contiguous.
#pragma once
#include <cstdint>

#include "cpu/types.h"
#include "vaeops.h"

namespace vaeops::cpu {

template <class C>
struct TileOptions {
  Param param;
  bool clamped;
  C clamp_lo, clamp_hi;
  C temperature;
};

// The noise of a tile is `eps`, or, where `drawn`, Philox blocks counter, counter + 1, ... under `key`.
template <class C>
struct TileNoise {
  const C* eps = nullptr;  // [n]
  bool drawn = false;
  uint64_t key = 0, counter = 0;
  bool any() const { return drawn || eps != nullptr; }
};

constexpr int kLanes = 64;  // running sums of a row: element i is added to lane i % 64

// Where a tile's element values go: nowhere, to `elements`, into `lanes`, or, for a tile of whole rows, to their sums.
// Rows that are summed here consist of whole groups of 64; a row's sum is the same bits by `lanes` and by `row_sums`.
template <class C>
struct Sink {
  C* elements = nullptr;  // [n]
  C* lanes = nullptr;     // [64]
  C* row_sums = nullptr;  // [n / row]
  int64_t row = 0;
  bool any() const { return elements != nullptr || lanes != nullptr || row_sums != nullptr; }
};

template <class C>
inline double sum_lanes(const C* lanes) {
  double sums[8] = {};  // eight chains of additions, for speed; the order is fixed
  for (int i = 0; i < kLanes; i += 8) {
    for (int k = 0; k < 8; ++k) sums[k] += lanes[i + k];
  }
  return ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
}

template <class T, class C = compute_t<T>>
struct ForwardTile {
  const T *mu, *rho;              // [n]
  const C *prior_mu, *prior_rho;  // [n] or null: N(0, I)
  TileNoise<C> noise;
  T* z;  // [n] or null
  Sink<C> kl;
  int64_t n;
};

template <class T, class C = compute_t<T>>
struct BackwardTile {
  const T* gz;  // [n] or null
  const C*
      gkl;  // the KL's gradient: of each element [n], or of each row [n / row] where row > 0; null: `weight` for all
  int64_t row;  // a multiple of 64
  C weight;
  bool has_gkl;  // else the KL adds no term: zero times its infinite growth would be NaN
  const T *mu, *rho;
  const C *prior_mu, *prior_rho;
  TileNoise<C> noise;
  T *gmu, *grho;              // [n]
  C *gprior_mu, *gprior_rho;  // [n] or null
  int64_t n;
};

template <class T, class C = compute_t<T>>
struct LogProbTile {
  const T *x, *mu, *rho;  // [n]
  const C* grad;          // [n] or null; then every element's gradient is `weight` (backward)
  C weight;
  Sink<C> out;         // (forward)
  T *gx, *gmu, *grho;  // [n] (backward)
  int64_t n;
};

}  // namespace vaeops::cpu
