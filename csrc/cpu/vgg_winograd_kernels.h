// Winograd F(4x4, 3x3): a block of 4x4 tiles through its input transform, 36 matrix products and the output transform.
// No include guard: see foreach_isa.h. The plan is in vgg_plan.h.

// Tiles of a product at a time; 2 vectors (scalar: 8 floats) of output channels.
constexpr int kRows = VAEOPS_ISA == 2 ? 12 : VAEOPS_ISA == 1 ? 6 : 3;
constexpr int kColumnVectors = VAEOPS_ISA == 0 ? 8 : 2;

// An fma where the machine has one.
VAEOPS_INLINE F multiply_add(F a, F b, F c) { return VAEOPS_ISA == 0 ? a * b + c : fma(a, b, c); }

// o = B^T d and o = A^T m of vectors that lie kFrom and kTo apart.
template <int kFrom, int kTo>
VAEOPS_INLINE void to_points(const F* d, F* o) {
  constexpr float a = kPointA, b = kPointB;
  const F a1 = set1(a), b1 = set1(b), a2 = set1(-a * a), b2 = set1(-b * b), both = set1(a * a * b * b);
  const F sum = set1(-a * a - b * b);
  const F d1 = d[kFrom], d2 = d[2 * kFrom], d3 = d[3 * kFrom], d4 = d[4 * kFrom];
  const F even_a = multiply_add(b2, d2, d4), odd_a = multiply_add(b2, d1, d3);
  const F even_b = multiply_add(a2, d2, d4), odd_b = multiply_add(a2, d1, d3);
  o[0] = multiply_add(both, d[0], multiply_add(sum, d2, d4));
  o[kTo] = multiply_add(a1, odd_a, even_a);
  o[2 * kTo] = even_a - a1 * odd_a;
  o[3 * kTo] = multiply_add(b1, odd_b, even_b);
  o[4 * kTo] = even_b - b1 * odd_b;
  o[5 * kTo] = multiply_add(both, d1, multiply_add(sum, d3, d[5 * kFrom]));
}
template <int kFrom, int kTo>
VAEOPS_INLINE void from_points(const F* m, F* o) {
  constexpr float a = kPointA, b = kPointB;
  const F even_a = m[kFrom] + m[2 * kFrom], odd_a = m[kFrom] - m[2 * kFrom];
  const F even_b = m[3 * kFrom] + m[4 * kFrom], odd_b = m[3 * kFrom] - m[4 * kFrom];
  o[0] = m[0] + even_a + even_b;
  o[kTo] = multiply_add(set1(b), odd_b, set1(a) * odd_a);
  o[2 * kTo] = multiply_add(set1(b * b), even_b, set1(a * a) * even_a);
  o[3 * kTo] = multiply_add(set1(b * b * b), odd_b, multiply_add(set1(a * a * a), odd_a, m[5 * kFrom]));
}

// V [36][block / kRows][in / 16][kRows][16] of tile t of the block. x: the map; (y, column) of the tile's first pixel.
template <bool kInside>
VAEOPS_INLINE void tile_to_points(const WinogradPlan& p, const float* x, int64_t y, int64_t column, float* v) {
  const float* const corner = x + ((y - 1) * p.w + column - 1) * p.in;
  for (int64_t c = 0; c < p.in; c += kWidth) {
    F points[kPoints];
#pragma GCC unroll 6
    for (int i = 0; i < 6; ++i) {
      F d[6];
      const bool row = kInside || (y + i >= 1 && y + i <= p.h);
#pragma GCC unroll 6
      for (int j = 0; j < 6; ++j) {
        const bool here = kInside || (row && column + j >= 1 && column + j <= p.w);
        d[j] = here ? load(corner + (i * p.w + j) * p.in + c) : set1(0);
      }
      to_points<1, 1>(d, points + 6 * i);
    }
    float* const to = v + c / 16 * (16 * kRows) + c % 16;
#pragma GCC unroll 6
    for (int j = 0; j < 6; ++j) {
      F o[6];
      to_points<6, 1>(points + j, o);
#pragma GCC unroll 6
      for (int i = 0; i < 6; ++i) store(to + (6 * i + j) * p.v_step, o[i]);
    }
  }
}

// m [R][32] = a [in / 16][kRows][16] times b [in][32]; fetches `lines` lines from `next` on for each 16 channels.
template <int R>
static void multiply(const float* a, const float* b, int64_t in, float* m, int64_t m_row, const float* next,
                     int64_t lines) {
  F sums[R][kColumnVectors];
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < kColumnVectors; ++j) sums[r][j] = set1(0);
  }
  for (int64_t c = 0; c < in; c += 16) {
    for (int64_t l = 0; l < lines; ++l, next += 16) __builtin_prefetch(next, 0, 2);
#pragma GCC unroll 4
    for (int i = 0; i < 16; ++i) {
      F weight[kColumnVectors];
#pragma GCC unroll 8
      for (int j = 0; j < kColumnVectors; ++j) weight[j] = load(b + i * kPanel + j * kWidth);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const F value = set1(a[r * 16 + i]);
#pragma GCC unroll 8
        for (int j = 0; j < kColumnVectors; ++j) sums[r][j] = multiply_add(value, weight[j], sums[r][j]);
      }
    }
    a += 16 * kRows;
    b += 16 * kPanel;
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < kColumnVectors; ++j) store(m + r * m_row + j * kWidth, sums[r][j]);
  }
}

// M [block][group] of one point and one panel of weights b.
static void multiply_point(const WinogradPlan& p, const float* v, const float* b, int64_t count, float* m,
                           const float* next) {
  const int64_t strips = (count + kRows - 1) / kRows, lines = next != nullptr ? (32 + strips - 1) / strips : 0;
  for (int64_t t = 0; t < count; t += kRows) {
    const float* const a = v + t * p.in;
    for (int64_t j = 0; j < kPanel; j += kColumnVectors * kWidth) {
      float* const to = m + t * p.group + j;
      const int64_t fetch = j == 0 ? lines : 0;
      if (count - t > kRows * 2 / 3) {
        multiply<kRows>(a, b + j, p.in, to, p.group, next, fetch);
      } else if (count - t > kRows / 3) {
        multiply<kRows * 2 / 3>(a, b + j, p.in, to, p.group, next, fetch);
      } else {
        multiply<kRows / 3>(a, b + j, p.in, to, p.group, next, fetch);
      }
    }
    if (next != nullptr) next += lines * p.in;
  }
}

// One tile of `width` output channels from `first` on; m: the tile in M.
template <class Call>
VAEOPS_INLINE void tile_from_points(const WinogradPlan& p, const Call& call, const float* m, int64_t first,
                                    int64_t width, int64_t image, int64_t y, int64_t column) {
  const int64_t rows = p.h - y < 4 ? p.h - y : 4, columns = p.w - column < 4 ? p.w - column : 4;
  const int64_t pixel = (image * p.h + y) * p.w + column;
  const int64_t pooled = (image * (p.h / 2) + y / 2) * (p.w / 2) + column / 2;
  for (int64_t c = 0; c < width; c += kWidth) {
    F half[24], o[16];
#pragma GCC unroll 6
    for (int j = 0; j < 6; ++j) {
      F points[6];
#pragma GCC unroll 6
      for (int i = 0; i < 6; ++i) points[i] = load(m + (6 * i + j) * p.m_step + c);
      from_points<1, 6>(points, half + j);
    }
    const F b = bias_of(p.bias, first + c);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      from_points<1, 1>(half + 6 * i, o + 4 * i);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) o[4 * i + j] = o[4 * i + j] + b;
    }
    if (rows == 4 && columns == 4) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) o[4 * i + j] = finish<float>(call, pixel + i * p.w + j, first + c, o[4 * i + j]);
      }
    } else {
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < columns; ++j) {
          o[4 * i + j] = finish<float>(call, pixel + i * p.w + j, first + c, o[4 * i + j]);
        }
      }
    }
    if (!pools(call)) continue;
    for (int64_t i = 0; i + 1 < rows; i += 2) {
      for (int64_t j = 0; j + 1 < columns; j += 2) {
        const F* const window = o + 4 * i + j;
        finish_pool<float>(call, pooled + i / 2 * (p.w / 2) + j / 2, first + c, window[0], window[1], window[4],
                           window[5]);
      }
    }
  }
}

// Tiles [begin, begin + count) of the maps, count at most p.block.
template <class Call>
static void winograd_block(const WinogradPlan& p, const Call& call, const float* x, int64_t begin, int64_t count,
                           float* v, float* m) {
  const int64_t image_tiles = p.rows * p.columns;
  for (int64_t t = 0; t < round_up(count, kRows / 3); ++t) {
    float* const to = v + t / kRows * kRows * p.in + t % kRows * 16;
    if (t >= count) {  // what the last product reads besides
      for (int64_t k = 0; k < kPoints; ++k) {
        for (int64_t c = 0; c < p.in; c += kWidth) store(to + k * p.v_step + c / 16 * (16 * kRows) + c % 16, set1(0));
      }
      continue;
    }
    const int64_t image = (begin + t) / image_tiles, tile = (begin + t) % image_tiles;
    const int64_t y = tile / p.columns * 4, column = tile % p.columns * 4;
    const float* const map = x + image * p.h * p.w * p.in;
    if (y > 0 && column > 0 && y + 5 <= p.h && column + 5 <= p.w) {
      tile_to_points<true>(p, map, y, column, to);
    } else {
      tile_to_points<false>(p, map, y, column, to);
    }
  }
  for (int64_t first = 0; first < p.out; first += p.group) {
    const int64_t width = p.out - first < p.group ? p.out - first : p.group;
    for (int64_t k = 0; k < kPoints; ++k) {
      for (int64_t c = 0; c < width; c += kPanel) {
        const float* const b = p.weights + ((first + c) / kPanel * kPoints + k) * p.in * kPanel;
        const bool same_point = c + kPanel < width;
        const float* const next =
            same_point ? b + kPoints * p.in * kPanel : p.weights + (first / kPanel * kPoints + k + 1) * p.in * kPanel;
        multiply_point(p, v + k * p.v_step, b, count, m + k * p.m_step + c,
                       same_point || k + 1 < kPoints ? next : nullptr);
      }
    }
    for (int64_t t = 0; t < count; ++t) {
      const int64_t image = (begin + t) / image_tiles, tile = (begin + t) % image_tiles;
      tile_from_points(p, call, m + t * p.group, first, width, image, tile / p.columns * 4, tile % p.columns * 4);
    }
  }
}
