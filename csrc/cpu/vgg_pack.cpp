// A trunk's weights in the order its kernels read: a header, then for each convolution its forward and its backward
// part. A trunk cut earlier has the same beginning.
#include <cstring>

#include "cpu/strided.h"
#include "cpu/vgg_layers.h"

namespace vaeops::cpu {
namespace {

constexpr int32_t kMagic = 0x56474731;

// Calls visit(convolution's number, C, K, backward, offset) for each part; returns the floats of all.
template <class Visit>
int64_t for_each_part(const VggTrunk& trunk, const Visit& visit) {
  const VggAlgorithm algorithm = conv_algorithm(trunk.algorithm);
  int64_t at = kPackedHeader, in = 3;
  int32_t number = 0;
  for (int32_t i = 0; i < trunk.layers; ++i) {
    const int64_t out = trunk.channels[i];
    if (out == 0) continue;
    for (const bool backward : {false, true}) {
      visit(number, in, out, backward, at);
      at += conv_packed_floats(algorithm, in, out, backward);
    }
    in = out;
    ++number;
  }
  return at;
}

}  // namespace

int64_t vgg_packed_floats(const VggTrunk& trunk) {
  return for_each_part(trunk, [](int32_t, int64_t, int64_t, bool, int64_t) {});
}

void vgg_pack(const VggTrunk& trunk, const float* const* weights, float* packed, ParallelFor parallel) {
  PackedHeader header{};
  header.magic = kMagic;
  header.algorithm = static_cast<int32_t>(conv_algorithm(trunk.algorithm));
  header.layers = trunk.layers;
  for (int32_t i = 0; i < trunk.layers; ++i) header.channels[i] = static_cast<int32_t>(trunk.channels[i]);
  std::memset(packed, 0, kPackedHeader * sizeof(float));
  std::memcpy(packed, &header, sizeof header);

  struct Part {
    int32_t number;
    int64_t in, out, at;
    bool backward;
  } parts[2 * kVggLayers];
  int64_t n = 0;
  for_each_part(trunk, [&](int32_t number, int64_t in, int64_t out, bool backward, int64_t at) {
    parts[n++] = {number, in, out, at, backward};
  });
  parallel_for(parallel, n, [&](int64_t i) {
    const Part& part = parts[i];
    conv_pack(conv_algorithm(trunk.algorithm), weights[2 * part.number], weights[2 * part.number + 1], part.in,
              part.out, part.backward, packed + part.at);
  });
}

const char* vgg_packed_mismatch(const VggTrunk& trunk, int64_t floats) {
  PackedHeader header;
  if (floats < kPackedHeader) return "was not made by vgg_pack";
  std::memcpy(&header, trunk.packed, sizeof header);
  if (header.magic != kMagic) return "was not made by vgg_pack";
  if (header.algorithm != static_cast<int32_t>(conv_algorithm(trunk.algorithm))) {
    return "was packed for another algorithm, or for bf16 on another instruction set";
  }
  bool same = header.layers >= trunk.layers;
  for (int32_t i = 0; same && i < trunk.layers; ++i) same = header.channels[i] == trunk.channels[i];
  if (!same) return "was packed for other layers";
  return floats >= vgg_packed_floats(trunk) ? nullptr : "is cut short";
}

TrunkPlan::TrunkPlan(const VggTrunk& trunk, int64_t batch, int64_t height, int64_t width)
    : layers(trunk.layers), algorithm(conv_algorithm(trunk.algorithm)), saved_bytes(0), most_map(0), conv_scratch(0) {
  int64_t in = 3;
  for (int32_t i = 0; i < layers; ++i) {
    TrunkLayer& l = layer[i];
    l.pool = trunk.channels[i] == 0;
    l.in = in;
    l.out = l.pool ? in : trunk.channels[i];
    l.height = height;
    l.width = width;
    l.out_height = height = l.pool ? height / 2 : height;
    l.out_width = width = l.pool ? width / 2 : width;
    l.saved_begin = saved_bytes;
    l.saved = l.map() / (l.pool ? 4 : 8);
    saved_bytes += batch * l.saved;
    most_map = std::max(most_map, l.map());
    if (!l.pool) conv_scratch = std::max(conv_scratch, conv_scratch_bytes(algorithm, l.in, l.out, l.width));
    in = l.out;
  }
  int32_t convolutions[kVggLayers], n = 0;
  for (int32_t i = 0; i < layers; ++i) {
    if (!layer[i].pool) convolutions[n++] = i;
  }
  for_each_part(trunk, [&](int32_t number, int64_t, int64_t, bool backward, int64_t at) {
    TrunkLayer& l = layer[convolutions[number]];
    (backward ? l.backward : l.forward) = trunk.packed + at;
  });
  for (int32_t t = 0; t < trunk.taps; ++t) {
    tap_layer[t] = trunk.tap[t] / 2;
    (trunk.tap[t] % 2 == 0 ? layer[tap_layer[t]].before : layer[tap_layer[t]].after) = t;
  }
}

int64_t vgg_saved_bytes(const VggTrunk& trunk, int64_t batch, int64_t height, int64_t width) {
  return TrunkPlan(trunk, batch, height, width).saved_bytes;
}

}  // namespace vaeops::cpu
