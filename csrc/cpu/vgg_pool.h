// Steps of the trunk between its convolutions, on maps [n, h, w, C] with the masks and codes of vgg_conv.h.
#pragma once
#include <cstdint>

namespace vaeops::cpu {

struct PoolRow {
  int64_t width, channels;  // of the row that is pooled
  const void* x;            // [2, width, C]
  void* y;                  // [width / 2, C]
  uint16_t* code;           // [width / 2, C / 16, 2]; null: not kept
};

// A row of gradients before a ReLU: (what a pool's gradient gives + after) where the mask is 1, + before.
struct SpreadRow {
  int64_t width, channels;
  int64_t pooled,
      parity;            // pixels of the pooled row (0: no pool, or a row that it dropped); whether this is an odd row
  const void* g;         // [pooled, C]
  const uint16_t* code;  // [pooled, C / 16, 2]
  const void* after;     // [width, C]; null: nothing
  const uint16_t* mask;  // [width, C / 16]; null: all 1
  const void* before;    // [width, C]; null: nothing
  void* gx;              // [width, C]
};

}  // namespace vaeops::cpu
