// Convolutions between bf16 maps on AMX tiles: nine shifted matrix products with fp32 sums. A block is some rows of an
// image; its pixels, with a margin of zeros around them, lie one after the other, so that a tap is a constant offset.
// No include guard: see vgg_conv.cpp.
#include "cpu/tiles_amx.h"

// sums [32 or 16 positions][32] from pixels x0.. (x1..), `channels` apart, and b [9][channels / 32][2][16][16][2].
template <bool kTwo>
VAEOPS_INLINE void multiply_taps(const bf16* x0, const bf16* x1, int64_t channels, int64_t row, const bf16* b,
                                 float* sums0, float* sums1) {
  const int64_t step = 2 * channels, sums_step = 4 * kPanel;
  VAEOPS_TILE_ZERO(0);
  VAEOPS_TILE_ZERO(1);
  if (kTwo) VAEOPS_TILE_ZERO(2);
  if (kTwo) VAEOPS_TILE_ZERO(3);
  for (int tap = 0; tap < 9; ++tap) {
    const int64_t offset = tap / 3 * row + tap % 3 * channels;
    for (int64_t c = 0; c < channels; c += 32) {
      VAEOPS_TILE_LOAD_ROWS(4, x0 + offset + c, step);
      VAEOPS_TILE_LOAD(6, b, 0);
      VAEOPS_TILE_PRODUCT(0, 4, 6);
      VAEOPS_TILE_LOAD(7, b, 1024);
      VAEOPS_TILE_PRODUCT(1, 4, 7);
      if (kTwo) {
        VAEOPS_TILE_LOAD_ROWS(5, x1 + offset + c, step);
        VAEOPS_TILE_PRODUCT(2, 5, 6);
        VAEOPS_TILE_PRODUCT(3, 5, 7);
      }
      b += 1024;
    }
  }
  VAEOPS_TILE_STORE_ROWS(0, sums0, sums_step);
  VAEOPS_TILE_STORE_ROWS(1, sums0 + 16, sums_step);
  if (kTwo) VAEOPS_TILE_STORE_ROWS(2, sums1, sums_step);
  if (kTwo) VAEOPS_TILE_STORE_ROWS(3, sums1 + 16, sums_step);
}

// Rows y .. y + rows - 1 (y even) of one image. pixels [rows + 2][w + 2][channels] and 16 pixels more, sums
// [positions][32] are scratch.
template <class Call>
static void tile_rows(const TilePlan& p, const Call& call, const bf16* x, int64_t image, int64_t y, bf16* pixels,
                      float* sums) {
  const int64_t line = (p.w + 2) * p.channels, rows = p.h - y < p.rows ? p.h - y : p.rows;
  for (int64_t r = 0; r < rows + 2; ++r) {
    bf16* const to = pixels + r * line;
    const int64_t from = y + r - 1;
    if (from < 0 || from >= p.h) {
      __builtin_memset(to, 0, static_cast<size_t>(line) * sizeof(bf16));
      continue;
    }
    __builtin_memset(to, 0, static_cast<size_t>(p.channels) * sizeof(bf16));
    __builtin_memset(to + line - p.channels, 0, static_cast<size_t>(p.channels) * sizeof(bf16));
    const bf16* const map = x + (image * p.h + from) * p.w * p.in;
    if (p.channels == p.in) {
      copy(map, to + p.channels, p.w * p.in);
      continue;
    }
    for (int64_t i = 0; i < p.w; ++i) {
      copy(map + i * p.in, to + (i + 1) * p.channels, p.in);
      __builtin_memset(to + (i + 1) * p.channels + p.in, 0, static_cast<size_t>(p.channels - p.in) * sizeof(bf16));
    }
  }
  __builtin_memset(pixels + (rows + 2) * line, 0, static_cast<size_t>(16 * p.channels) * sizeof(bf16));

  // Where 16 divides the width, tiles need not cover the margin.
  const int64_t step = p.step, row_tiles = p.w / 16;
  const int64_t tiles = step == p.w ? rows * row_tiles : (rows * step + 15) / 16;
  const auto start = [&](int64_t tile) {
    return pixels +
           (step == p.w ? tile / row_tiles * line + tile % row_tiles * 16 * p.channels : tile * 16 * p.channels);
  };
  asm volatile("" ::: "memory");  // the pixels are in memory before tiles are loaded
  for (int64_t first = 0; first < p.out; first += kPanel) {
    const bf16* const b = p.weights + first * 9 * p.channels;
    int64_t tile = 0;
    for (; tile + 1 < tiles; tile += 2) {
      float* const to = sums + tile * 16 * kPanel;
      multiply_taps<true>(start(tile), start(tile + 1), p.channels, line, b, to, to + 16 * kPanel);
    }
    if (tile < tiles) {
      float* const to = sums + tile * 16 * kPanel;
      multiply_taps<false>(start(tile), nullptr, p.channels, line, b, to, nullptr);
    }
    const int64_t width = p.out - first < kPanel ? p.out - first : kPanel;
    for (int64_t r = 0; r < rows; r += 2) {
      finish_rows<bf16>(call, p.bias, image, y + r, first, width, sums + r * step * kPanel, step, kPanel);
    }
  }
}

static void use_tiles(bool begin) { begin ? begin_tiles() : end_tiles(); }
