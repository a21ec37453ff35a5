// AMX tiles: eight of 16 rows of 64 bytes; a product is 16x32 by 32x16 in bf16, added to 16x16 in fp32. No include
// guard: included inside a namespace with the target's attributes, once a source file.

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

// The offset (in bytes) is part of the instruction: an address apiece would need more registers than there are.
#define VAEOPS_TILE_LOAD(tile, from, offset) \
  asm volatile("tileloadd %c2(%0,%1,1), %%tmm" #tile::"r"(from), "r"(int64_t{64}), "i"(offset))
// Rows `stride` bytes apart.
#define VAEOPS_TILE_LOAD_ROWS(tile, from, stride) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #tile::"r"(from), "r"(stride))
#define VAEOPS_TILE_STORE_ROWS(tile, to, stride) \
  asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(to), "r"(stride) : "memory")
#define VAEOPS_TILE_STORE(tile, to, offset) \
  asm volatile("tilestored %%tmm" #tile ", %c2(%0,%1,1)" ::"r"(to), "r"(int64_t{64}), "i"(offset) : "memory")
#define VAEOPS_TILE_ZERO(tile) asm volatile("tilezero %%tmm" #tile::)
#define VAEOPS_TILE_PRODUCT(sum, x, e) asm volatile("tdpbf16ps %%tmm" #e ", %%tmm" #x ", %%tmm" #sum::)
