// What a convolution of a trunk offers to the program in vgg.cpp. Maps are NHWC fp32 (bf16 for VggAlgorithm::bf16 on
// AMX), channels a multiple of 16. n images of h x w.
#pragma once
#include "vaeops.h"

namespace vaeops::cpu {

// A mask has one bit an element: bit c % 16 of mask[((image * h + y) * w + x) * K / 16 + c / 16], 1 where the ReLU let
// the value pass. A pool's code is two such words for each pooled pixel: the row and the column of the maximum in its
// 2x2 window, the first one of equals.
struct ConvForward {
  const void* x;        // [n, h, w, C]
  const float* packed;  // this layer's forward part
  int64_t n, h, w, in, out;
  bool relu;
  void* before;    // [n, h, w, K] before the ReLU; null: not wanted
  void* y;         // [n, h, w, K]; null where only the pooled map is wanted
  uint16_t* mask;  // [n, h, w, K / 16]; null: not kept
  void* pooled;    // [n, h / 2, w / 2, K]; null: no pool follows
  uint16_t* code;  // [n, h / 2, w / 2, K / 16, 2]; null: not kept
};

// gx = dgrad(g), or where a pool's gradient comes in: dgrad of g spread by the pool's code. Then what the layer below
// adds: tap_after, its mask, tap_before.
struct ConvBackward {
  const void* g;        // [n, h, w, K], masked
  const float* packed;  // this layer's backward part
  int64_t n, h, w, in, out;
  const void* tap_after;   // [n, h, w, C] gradient that reaches the input's own tap, added before `mask` selects
  const uint16_t* mask;    // [n, h, w, C / 16] of the ReLU that made the input; null: none did
  const void* tap_before;  // [n, h, w, C] gradient at the input before that ReLU, added after the mask
  void* gx;                // [n, h, w, C]
};

}  // namespace vaeops::cpu
