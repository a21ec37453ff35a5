// A trunk at one image size: where each layer's weights, maps, masks and codes lie.
#pragma once
#include <cstdint>

#include "cpu/vgg_conv.h"
#include "vaeops.h"

namespace vaeops::cpu {

// What vgg_pack writes in front of the weights, in place of kPackedHeader floats.
struct PackedHeader {
  int32_t magic, algorithm, layers;
  int32_t channels[kVggLayers];
};
constexpr int64_t kPackedHeader = 32;
static_assert(sizeof(PackedHeader) <= kPackedHeader * sizeof(float));

struct TrunkLayer {
  bool pool;
  int64_t in, out;                     // C, K; equal for a pool
  int64_t height, width;               // of what comes in
  int64_t out_height, out_width;       // of what goes out
  const float *forward, *backward;     // packed weights
  int32_t before = -1, after = -1;     // positions in `taps`; -1: not a tap
  int64_t saved_begin = 0, saved = 0;  // bytes of an image's mask or code, and where those of a batch begin

  int64_t map() const { return out * out_height * out_width; }  // elements of an image

  // Calls of a convolution on n images: weights and sizes are filled in, the maps are left.
  ConvForward forward_call(int64_t n) const {
    ConvForward call{};
    call.packed = forward;
    call.n = n;
    call.h = height;
    call.w = width;
    call.in = in;
    call.out = out;
    return call;
  }
  ConvBackward backward_call(int64_t n) const {
    ConvBackward call{};
    call.packed = backward;
    call.n = n;
    call.h = height;
    call.w = width;
    call.in = in;
    call.out = out;
    return call;
  }
};

struct TrunkPlan {
  int32_t layers;
  VggAlgorithm algorithm;  // what conv_algorithm made of the trunk's
  TrunkLayer layer[kVggLayers];
  int32_t tap_layer[kVggTaps];
  int64_t saved_bytes;   // of the batch
  int64_t most_map;      // elements of an image's largest map
  int64_t conv_scratch;  // bytes a slot

  TrunkPlan(const VggTrunk& trunk, int64_t batch, int64_t height, int64_t width);

  int64_t element() const { return algorithm == VggAlgorithm::bf16 ? 2 : 4; }  // bytes, of maps and gradients
  Dtype dtype() const { return algorithm == VggAlgorithm::bf16 ? Dtype::bf16 : Dtype::f32; }
  // An image's map at a tap, in elements.
  int64_t tap_map(int32_t tap) const { return layer[tap_layer[tap]].map(); }
};

}  // namespace vaeops::cpu
