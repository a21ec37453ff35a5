// What the parts of vq_assign share. The search has two passes. Pass 1 scores every code in reduced precision, on
// operands that are centred by (about) the codebook's mean and scaled by a power of two, and keeps the minimum m of
// each group of 16 consecutive codes. With a bound B on the error of any of the group's scores, m - B is below all of
// the group's true scores, and the least m + B is above the row's true minimum: groups with m - B beyond it are out.
// Pass 2 scores the codes of the others by the definition.
//
// The bound. Let x' and e' be row and code, centred and scaled in real arithmetic, and xq, eq what pass 1 multiplies:
//   |x'.e' - xq.eq| <= |x' - xq| |e'| + |xq| |e' - eq|, where both residuals are measured, not estimated;
//   the sum of `slots` products in fp32, in any order, and the half norm: c (|xq| |e'| + |e'|^2 / 2), where
//   c = (slots + 16) 2^-23 is twice what one rounding per operation gives;
//   the definition's own fp64 rounding, on operands that are not centred: (D + 8) 2^-53 (|e|^2 + |x| |e|).
// So B = a E + b R + S, and a `slack` of the row: a, b belong to the row, E = max |e'|, R = max |e' - eq| and
// S = c E^2 / 2 to the group. Centring changes all scores of a row by the same amount.
#pragma once
#include <cstdint>

#include "cpu/types.h"
#include "vaeops.h"

namespace vaeops::cpu {

constexpr int kGroup = 16;                // consecutive codes of a group
constexpr int kBlockGroups = 16;          // groups of a block: pass 1 keeps one vector lane per group
constexpr int kCodeBlock = 256;           // codes of a block
constexpr int kPanelBlocks = 16;          // blocks that pass 1 takes between two looks at the bounds
constexpr int kRowBlock = 240;            // rows of a task, a multiple of every kernel's row tile
constexpr float kNever = 0x1p100f;        // half norm of a code that must not be chosen
constexpr float kLargestNorm = 0x1p40f;   // beyond it (scaled), pass 1 might overflow and says nothing
constexpr float kSmallest = 0x1p-100f;    // more than what subnormal numbers can lose
constexpr float kRoundUp = 1 + 0x1p-20f;  // covers the few roundings of the bound itself

// A call, and its codebook as both passes read it.
struct VqPlan {
  const VqAssign* call;
  int64_t dims, codes, blocks;     // D, K, ceil(K / 256)
  int64_t slots;                   // length of a pass-1 operand
  int64_t upper_vectors;           // upper bounds kept per row, in vectors of 16
  int64_t most_groups;             // that a row's list of candidates holds
  bool amx;                        // bf16 tiles, else fp32
  bool split;                      // bf16 operands in two parts: hi hi + hi lo + lo hi
  bool bias_slots;                 // the half norm is part of the operand, in three bf16
  double scale;                    // of x and, but for cosine, of the codes; a power of two
  bool wide;                       // x or the codebook is fp64
  double* mean;                    // [D] of some codes, scaled; exact in fp32 unless `wide`
  float* row_mean;                 // [D] the same for x; 0 where the score has no norm of the code. Not for `wide`
  void* tiles;                     // pass-1 operands, negated: bf16 [blocks][4][slots / 32][4][16][16][2] for AMX
                                   // (4 tiles of 16 pairs of 16 codes), fp32 [blocks][16][D][16] otherwise
  float* bias;                     // [blocks][16][16] half norms; code 16 j + t of a block is at [t][j]
  float *norm, *residual, *slack;  // [blocks * 16] E, R, S
  float* raw_norm;                 // [blocks * 16] largest scaled norm, not centred
  float* columns;                  // [blocks * 16][D][16] codes; null where the codebook is fp64
  double* half;                    // [blocks * 256] l2: half norm; cosine: norm; dot: 0. Inf or NaN: never chosen
  double accumulation;             // c
  double largest;                  // max of raw_norm
};

// Power of two that brings `size` to [1/2, 1), or near it: products of two must not leave the range.
double power_below(double size, bool wide);

// The k-th smallest of n values.
float kth_least(const float* values, int64_t n, int64_t k);

// Rows of one task, at most kRowBlock, as pass 1 reads and leaves them.
struct VqRows {
  int64_t count;                // rows
  int64_t position[kRowBlock];  // n of each
  float a[kRowBlock], b[kRowBlock];
  double scale[kRowBlock];  // what each was multiplied by
  float slack[kRowBlock];   // twice the definition's own error; Inf: pass 1 says nothing about this row
  void* operands;           // bf16 [rows / 16][slots / 32][16][32] for AMX, else fp32 [rows][D]
  float* lower;             // [kPanelBlocks][kRowBlock][16] m - B
  float* upper;             // [rows][upper_vectors * 16] least m + B, by lane
  float* products;          // [2][4][16][16] two sets of AMX result tiles
};

// Groups that can hold a row's nearest codes.
struct VqCandidates {
  int32_t* count;  // [rows]; -1: all groups
  float* bound;    // [rows] those with a lower bound beyond it are out
  int32_t* group;  // [rows][most_groups]
  float* lower;    // [rows][most_groups]
};

}  // namespace vaeops::cpu
