// Layouts that the packing of a trunk's weights and its kernels agree on. In a convolution of either direction, `in`
// counts the channels of the map that it reads and `out` those of the map that it writes.
#pragma once
#include <cstdint>

#include "cpu/types.h"
#include "cpu/vgg_conv.h"

namespace vaeops::cpu {

constexpr int64_t kPanel = 32;          // output channels side by side in packed weights
constexpr int64_t kPoints = 36;         // of a Winograd tile: 6x6 give 4x4 pixels
constexpr int64_t kStripMultiple = 12;  // every instruction set's strip of rows divides it

// Winograd's interpolation points are 0, +-a, +-b and infinity. These and their powers are exact in fp32, and they
// halve the rounding error of the usual 1 and 2.
constexpr double kPointA = 0.6875, kPointB = 1.5;

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Weights: winograd [out / 32][36][in][32], direct [out / 32][9][in][32], both padded by zeros to whole panels, then,
// forward, the bias [out]. A first layer: forward [out / 32][27][32] (channel, row, column) and bias, backward
// [9][3][K].
struct WinogradPlan {
  int64_t in, out, n, h, w;
  int64_t rows, columns, tiles;  // of the maps
  int64_t block;                 // tiles at a time
  int64_t group;                 // output channels at a time
  int64_t v_step, m_step;        // floats from one point's matrix to the next one's: not a multiple of a page
  const float *weights, *bias;   // bias null: 0

  int64_t v_floats() const { return kPoints * v_step; }
  int64_t m_floats() const { return kPoints * m_step; }
};

// Rows of a map, or of an image, at a time.
struct DirectPlan {
  int64_t in, out, n, h, w;
  int64_t width;  // pixels of a row in scratch, a margin on both sides included
  const float *weights, *bias;
};

// Rows of a map at a time on AMX tiles. Weights: [out / 32][9][channels / 32][2][16][16][2] bf16 (the channel of a pair
// last), padded by zeros, then, forward, the bias [out].
struct TilePlan {
  int64_t in, out, h, w;
  int64_t channels;  // in, rounded up to 32
  int64_t rows;      // of a block, even
  int64_t step;      // positions from one row of sums to the next
  const bf16* weights;
  const float* bias;

  int64_t pixel_floats() const { return ((rows + 2) * (w + 2) + 16) * channels / 2; }
  int64_t sums_floats() const { return round_up(rows * step, 16) * kPanel; }
};

}  // namespace vaeops::cpu
