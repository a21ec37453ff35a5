// Pass 1 of vq_assign on AMX tiles: a tile product is 16 rows x 16 codes x 32 dims in bf16. Result tiles go through
// memory in the first-level cache; the minima of one set are taken while the next set is being multiplied. No include
// guard: see vq_assign.cpp.

#include "cpu/tiles_amx.h"

// Minima over a result tile, lane by lane, for 16 rows.
template <bool kFirst, bool kBias>
VAEOPS_INLINE void fold(const float* products, const float* bias, F (&m)[16]) {
  const F b = kBias ? load(bias) : set1(0);
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) {
    const F product = load(products + 16 * r), score = kBias ? product + b : product;
    m[r] = kFirst ? score : least(score, m[r]);
  }
}

enum class Fold { none, first, next };

// One step of the pipeline: multiplies a row tile x [steps][16][32] by four tiles of codes [steps][4][16][16][2],
// stores the four results of the step before in `out` [4][16][16], and takes the minima of those before them, `ready`.
// A tile's products are kept apart: the next one into the same result has to wait for it.
template <int kSteps, bool kLoadRows, Fold kFold, bool kBias>
VAEOPS_INLINE void advance(const bf16* x, const bf16* e, int64_t steps, float* out, const float* ready,
                           const float* bias, F (&m)[16]) {
  if (kLoadRows) VAEOPS_TILE_LOAD(4, x, 0);
  if (kLoadRows && kSteps == 2) VAEOPS_TILE_LOAD(5, x, 1024);
  VAEOPS_TILE_STORE(0, out, 0);
  VAEOPS_TILE_ZERO(0);
  VAEOPS_TILE_LOAD(6, e, 0);
  VAEOPS_TILE_PRODUCT(0, 4, 6);
  if (kFold == Fold::first) fold<true, kBias>(ready, bias, m);
  if (kFold == Fold::next) fold<false, kBias>(ready, bias, m);
  VAEOPS_TILE_STORE(1, out, 1024);
  VAEOPS_TILE_ZERO(1);
  VAEOPS_TILE_LOAD(7, e, 1024);
  VAEOPS_TILE_PRODUCT(1, 4, 7);
  if (kFold != Fold::none) fold<false, kBias>(ready + 256, bias + 16, m);
  VAEOPS_TILE_STORE(2, out, 2048);
  VAEOPS_TILE_ZERO(2);
  VAEOPS_TILE_LOAD(6, e, 2048);
  VAEOPS_TILE_PRODUCT(2, 4, 6);
  if (kFold != Fold::none) fold<false, kBias>(ready + 512, bias + 32, m);
  VAEOPS_TILE_STORE(3, out, 3072);
  VAEOPS_TILE_ZERO(3);
  VAEOPS_TILE_LOAD(7, e, 3072);
  VAEOPS_TILE_PRODUCT(3, 4, 7);
  if (kFold != Fold::none) fold<false, kBias>(ready + 768, bias + 48, m);
  for (int64_t s = 1; s < (kSteps > 0 ? kSteps : steps); s += 2) {
    e += 2048;
    if (kSteps != 2) VAEOPS_TILE_LOAD(5, x + 512 * s, 0);
    VAEOPS_TILE_LOAD(6, e, 0);
    VAEOPS_TILE_PRODUCT(0, 5, 6);
    VAEOPS_TILE_LOAD(7, e, 1024);
    VAEOPS_TILE_PRODUCT(1, 5, 7);
    VAEOPS_TILE_LOAD(6, e, 2048);
    VAEOPS_TILE_PRODUCT(2, 5, 6);
    VAEOPS_TILE_LOAD(7, e, 3072);
    VAEOPS_TILE_PRODUCT(3, 5, 7);
    if (kSteps == 2 || s + 1 == steps) break;
    e += 2048;
    VAEOPS_TILE_LOAD(4, x + 512 * (s + 1), 0);
    VAEOPS_TILE_LOAD(6, e, 0);
    VAEOPS_TILE_PRODUCT(0, 4, 6);
    VAEOPS_TILE_LOAD(7, e, 1024);
    VAEOPS_TILE_PRODUCT(1, 4, 7);
    VAEOPS_TILE_LOAD(6, e, 2048);
    VAEOPS_TILE_PRODUCT(2, 4, 6);
    VAEOPS_TILE_LOAD(7, e, 3072);
    VAEOPS_TILE_PRODUCT(3, 4, 7);
  }
}

VAEOPS_INLINE void put_tile(float* to, const F (&m)[16]) {
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) store(to + 16 * r, m[r]);
}

template <int kSteps, bool kBias>
static void pass_one_of(const VqPlan& p, const VqRows& rows, int64_t block, int64_t slot) {
  const int64_t steps = p.slots / 32, tiles = (rows.count + 15) / 16, quarter = 2048 * steps;
  const bf16* const x = static_cast<const bf16*>(rows.operands);
  const bf16* const e = static_cast<const bf16*>(p.tiles) + block * 4 * quarter;
  const float* const bias = p.bias + block * kCodeBlock;
  float* const minima = rows.lower + slot * kRowBlock * kBlockGroups;
  float *const even = rows.products, *const odd = even + 1024;
  constexpr bool kAgain = kSteps == 0;  // the row tile does not stay in registers
  F m[16];
  asm volatile("" ::: "memory");  // the operands are in memory before tiles are loaded
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const bf16* const own = x + tile * steps * 512;
    if (tile == 0) {
      advance<kSteps, true, Fold::none, kBias>(own, e, steps, even, odd, bias, m);
      advance<kSteps, kAgain, Fold::none, kBias>(own, e + quarter, steps, odd, even, bias, m);
    } else {
      advance<kSteps, true, Fold::next, kBias>(own, e, steps, even, odd, bias + 128, m);
      advance<kSteps, kAgain, Fold::next, kBias>(own, e + quarter, steps, odd, even, bias + 192, m);
      put_tile(minima + (tile - 1) * 256, m);
    }
    advance<kSteps, kAgain, Fold::first, kBias>(own, e + 2 * quarter, steps, even, odd, bias, m);
    advance<kSteps, kAgain, Fold::next, kBias>(own, e + 3 * quarter, steps, odd, even, bias + 64, m);
  }
  VAEOPS_TILE_STORE(0, even, 0);
  VAEOPS_TILE_STORE(1, even, 1024);
  VAEOPS_TILE_STORE(2, even, 2048);
  VAEOPS_TILE_STORE(3, even, 3072);
  for (int i = 0; i < 4; ++i) fold<false, kBias>(odd + 256 * i, bias + 128 + 16 * i, m);
  for (int i = 0; i < 4; ++i) fold<false, kBias>(even + 256 * i, bias + 192 + 16 * i, m);
  put_tile(minima + (tiles - 1) * 256, m);
}

static void pass_one(const VqPlan& p, const VqRows& rows, int64_t block, int64_t slot) {
  const int64_t steps = p.slots / 32;
  if (p.bias_slots) {
    if (steps == 1) return pass_one_of<1, false>(p, rows, block, slot);
    if (steps == 2) return pass_one_of<2, false>(p, rows, block, slot);
    return pass_one_of<0, false>(p, rows, block, slot);
  }
  if (steps == 1) return pass_one_of<1, true>(p, rows, block, slot);
  if (steps == 2) return pass_one_of<2, true>(p, rows, block, slot);
  return pass_one_of<0, true>(p, rows, block, slot);
}

static void use_tiles(bool begin) { begin ? begin_tiles() : end_tiles(); }
