// What a convolution of a trunk offers to the program in vgg_program.cpp. Maps are NHWC, channels a multiple of 16;
// their elements are fp32, and bf16 where the algorithm is bf16. n images of h x w.
#pragma once
#include "vaeops.h"

namespace vaeops::cpu {

// A mask has one bit an element: bit c % 16 of mask[((image * h + y) * w + x) * K / 16 + c / 16], 1 where the ReLU let
// the value pass (NaN does). A pool's code is two such words for each pooled pixel: the row and the column of the
// maximum in its 2x2 window, the first one of equals, the last NaN.
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

// gx = dgrad(g). Then what the layer below adds: tap_after, its mask, tap_before.
struct ConvBackward {
  const void* g;        // [n, h, w, K], masked
  const float* packed;  // this layer's backward part
  int64_t n, h, w, in, out;
  const void* tap_after;   // [n, h, w, C] gradient that reaches the input's own tap, added before `mask` selects
  const uint16_t* mask;    // [n, h, w, C / 16] of the ReLU that made the input; null: none did
  const void* tap_before;  // [n, h, w, C] gradient at the input before that ReLU, added after the mask
  void* gx;                // [n, h, w, C]
};

// What serves `wanted` with the instruction set in use: bf16 needs tiles (AMX), else Winograd serves it, on fp32 maps.
// Every function below takes what this returned; `packed` is bound to it.
VggAlgorithm conv_algorithm(VggAlgorithm wanted);

// One layer's weights and bias (OIHW) in the order its kernels read, one direction at a time. The backward part holds
// no bias. in = 3: a first layer, for conv_first. `packed` is 64-byte aligned; sizes are multiples of 16 floats.
int64_t conv_packed_floats(VggAlgorithm algorithm, int64_t in, int64_t out, bool backward);
void conv_pack(VggAlgorithm algorithm, const float* weight /* [K, C, 3, 3] */, const float* bias /* [K]; null: 0 */,
               int64_t in, int64_t out, bool backward, float* packed);

// Working memory, 64-byte aligned: `slots` pieces of conv_scratch_bytes each (both directions, maps of width w; in = 3
// for a first layer). The work is cut into at most `slots` tasks, which `inner` runs in any order and at any time; the
// result is the same for every number of slots, and of every pixel for every n.
struct ConvScratch {
  void* data;
  int64_t slots;
};
int64_t conv_scratch_bytes(VggAlgorithm algorithm, int64_t in, int64_t out, int64_t w);

void conv_forward(VggAlgorithm algorithm, const ConvForward& call, ConvScratch scratch, ParallelFor inner);
void conv_backward(VggAlgorithm algorithm, const ConvBackward& call, ConvScratch scratch, ParallelFor inner);

// The first layer: reads images [first_image, first_image + n) of `image`, of h x w; call.x is not read, call.in is 3.
void conv_first(VggAlgorithm algorithm, const VggImage& image, int64_t first_image, const ConvForward& call,
                ConvScratch scratch, ParallelFor inner);
// gx [n, 3, h, w] contiguous, of gx_dtype: rstd[c] times the gradient of the normalised image. Reads g, packed and the
// sizes of the call (in = 3), nothing else.
void conv_first_backward(VggAlgorithm algorithm, const ConvBackward& call, const float* rstd /* [3] */, void* gx,
                         Dtype gx_dtype, ConvScratch scratch, ParallelFor inner);

}  // namespace vaeops::cpu
