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

template <class T, class C = compute_t<T>>
struct ForwardTile {
  const T *mu, *rho;              // [n]
  const C *prior_mu, *prior_rho;  // [n] or null: N(0, I)
  TileNoise<C> noise;
  T* z;         // [n] or null
  C* elements;  // [n] or null: the KL of each element
  C* lanes;     // [64] or null: element i is added to lanes[i % 64]
  int64_t n;
};

template <class T, class C = compute_t<T>>
struct BackwardTile {
  const T* gz;   // [n] or null
  const C* gkl;  // [n] or null; then every element's KL gradient is `weight`
  C weight;
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
  C *elements, *lanes;  // as in ForwardTile (forward)
  T *gx, *gmu, *grho;   // [n] (backward)
  int64_t n;
};

}  // namespace vaeops::cpu
