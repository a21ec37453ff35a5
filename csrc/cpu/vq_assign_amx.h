// Pass 1 of vq_assign on AMX tiles: a tile product is 16 rows x 16 codes x 32 dims in bf16. Result tiles go through
// memory in the first-level cache; the minima of one set are taken while the next set is being multiplied. No include
// guard: see vq_assign.cpp.

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

VAEOPS_INLINE void begin_tiles() {
  const TileConfig config;
  asm volatile("ldtilecfg %0" ::"m"(config));
}
VAEOPS_INLINE void end_tiles() { asm volatile("tilerelease"); }

#define VAEOPS_TILE_LOAD(tile, from) asm volatile("tileloadd (%0,%1,1), %%tmm" #tile::"r"(from), "r"(int64_t{64}))
#define VAEOPS_TILE_STORE(tile, to) \
  asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(to), "r"(int64_t{64}) : "memory")
#define VAEOPS_TILE_ZERO(tile) asm volatile("tilezero %%tmm" #tile::)
#define VAEOPS_TILE_PRODUCT(sum, x, e) asm volatile("tdpbf16ps %%tmm" #e ", %%tmm" #x ", %%tmm" #sum::)

// out [4][16 rows][16 codes] = x [steps][16][32] times four tiles of codes [steps][4][16][16][2].
VAEOPS_INLINE void multiply(const bf16* x, const bf16* e, int64_t steps, float* out) {
  VAEOPS_TILE_ZERO(0);
  VAEOPS_TILE_ZERO(1);
  VAEOPS_TILE_ZERO(2);
  VAEOPS_TILE_ZERO(3);
  for (int64_t s = 0; s < steps; ++s, x += 512, e += 2048) {
    VAEOPS_TILE_LOAD(4, x);
    VAEOPS_TILE_LOAD(5, e);
    VAEOPS_TILE_PRODUCT(0, 4, 5);
    VAEOPS_TILE_LOAD(6, e + 512);
    VAEOPS_TILE_PRODUCT(1, 4, 6);
    VAEOPS_TILE_LOAD(7, e + 1024);
    VAEOPS_TILE_PRODUCT(2, 4, 7);
    VAEOPS_TILE_LOAD(5, e + 1536);
    VAEOPS_TILE_PRODUCT(3, 4, 5);
  }
  VAEOPS_TILE_STORE(0, out);
  VAEOPS_TILE_STORE(1, out + 256);
  VAEOPS_TILE_STORE(2, out + 512);
  VAEOPS_TILE_STORE(3, out + 768);
}

// Minima over four result tiles, lane by lane, for 16 rows.
template <bool kFirst, bool kBias>
VAEOPS_INLINE void fold(const float* products, const float* bias, F (&m)[16]) {
  F b[4];
  for (int i = 0; i < 4; ++i) b[i] = kBias ? load(bias + 16 * i) : set1(0);
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) {
    F s[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const F product = load(products + (i * 16 + r) * 16);
      s[i] = kBias ? product + b[i] : product;
    }
    const F four = least(least(s[0], s[1]), least(s[2], s[3]));
    m[r] = kFirst ? four : least(four, m[r]);
  }
}

template <bool kBias>
static void pass_one_of(const VqPlan& p, const VqRows& rows, int64_t block, int64_t slot) {
  const int64_t steps = p.slots / 32, tiles = (rows.count + 15) / 16, quarter = 2048 * steps;
  const bf16* const x = static_cast<const bf16*>(rows.operands);
  const bf16* const e = static_cast<const bf16*>(p.tiles) + block * 4 * quarter;
  const float* const bias = p.bias + block * kCodeBlock;
  float *const even = rows.products, *const odd = even + 1024;
  F m[16];
  const auto finish = [&](int64_t tile) __attribute__((always_inline)) {
    const int64_t row = tile * 16, count = rows.count - row;
    for (int r = 0; r < 16 && r < count; ++r) put_bounds(p, rows, row + r, block, slot, 0, m[r]);
  };
  asm volatile("" ::: "memory");  // the operands are in memory before tiles are loaded
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const bf16* const own = x + tile * steps * 512;
    multiply(own, e, steps, even);
    if (tile > 0) {
      fold<false, kBias>(odd, bias + 192, m);
      finish(tile - 1);
    }
    multiply(own, e + quarter, steps, odd);
    fold<true, kBias>(even, bias, m);
    multiply(own, e + 2 * quarter, steps, even);
    fold<false, kBias>(odd, bias + 64, m);
    multiply(own, e + 3 * quarter, steps, odd);
    fold<false, kBias>(even, bias + 128, m);
  }
  fold<false, kBias>(odd, bias + 192, m);
  finish(tiles - 1);
}

static void pass_one(const VqPlan& p, const VqRows& rows, int64_t block, int64_t slot) {
  if (p.bias_slots) return pass_one_of<false>(p, rows, block, slot);
  return pass_one_of<true>(p, rows, block, slot);
}

static void use_tiles(bool begin) { begin ? begin_tiles() : end_tiles(); }
