// Distances between maps, and their gradients in the same pass. What perceptual.cpp and the op on given maps share.
#pragma once
#include "cpu/types.h"
#include "vaeops.h"

namespace vaeops::cpu {

// [n, c, h, w] of any strides.
struct MapView {
  void* data = nullptr;  // null: absent
  Dtype dtype = Dtype::f32;
  int64_t stride[4] = {};
};

// S: what is computed in, fp64 for fp64 maps, else fp32.
struct DistanceRun {
  Distance kind;
  int64_t images, channels, height, width;
  MapView a, b;             // one dtype, or fp32 and bf16
  MapView ga, gb;           // gradients of weight * distance, the dtypes of a and b; absent: not wanted
  const void* lin;          // S [channels]; lpips alone
  bool mean;                // else the sum
  bool add = false;         // to ga instead of overwriting it
  bool relu = false;        // a is what a ReLU gave: ga is the gradient before it
  bool spatial = false;     // a distance for each pixel
  void* out = nullptr;      // S [images], or [images, height, width] where spatial; null: not wanted
  const void* g = nullptr;  // S, as `out`: what the gradients are multiplied by; null: 1
  double weight = 1;        // and this
};

void distance(const DistanceRun& run, ParallelFor parallel);

// Pixels of two maps, rows of `channels`. Element (p, c) of a lies at a[p * a_step + c].
template <class T, class U, class S>
struct DistanceTile {
  int64_t pixels, channels;
  const T* a;
  const U* b;
  int64_t a_step, b_step;
  T* ga;  // null: not wanted
  U* gb;
  int64_t ga_step, gb_step;
  const S* lin;
  const S* scale;  // the gradient's factor of pixel p is scale[p * scale_step] * factor
  int64_t scale_step;
  S factor;
  bool add, relu;
  S* each;  // [pixels] distances; null: their sum alone
};

}  // namespace vaeops::cpu
