// Batch norm of a convolution's output on the statistics of the batch, with the ReLU and the pool that follow, on one
// or two rows of pixels. T: the maps' element.
#pragma once
#include <cstdint>

namespace vaeops::cpu {

// v = (y - mean) rstd weight + bias.
struct NormRows {
  int64_t rows, width, channels;
  bool pools;                                // 2x2 windows of v after its ReLU; rows and columns left over are dropped
  const void* y;                             // T [rows, width, C]
  const float *mean, *rstd, *weight, *bias;  // [C]
};

struct NormForward : NormRows {
  float *before, *after;  // [rows, width, C] v, and after its ReLU; null: not wanted
  float* pooled;          // [width / 2, C]; null: not wanted
  void* x;                // T: what the next convolution reads, pooled where that is; null: none does
};

// g is the gradient at v: what x and the taps give, through the pool and the ReLU.
struct NormBackward : NormRows {
  const void* x;                // T: gradient at x; null: none
  const float *before, *after;  // at the taps; null: none
  const float* pooled;
  float* sums;                 // [2, C]: sum of g, of g (y - mean); null: gx is wanted instead
  const float *shift, *slope;  // [C]
  void* gx;                    // T [rows, width, C]: rstd weight (g - shift - slope (y - mean))
};

}  // namespace vaeops::cpu
