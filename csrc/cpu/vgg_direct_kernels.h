// Direct convolutions, a pair of rows of a map at a time: between maps, from an image, and back to an image. No include
// guard: see foreach_isa.h.

// sums [R pixels][32] (pixels `channels` apart) = sum over taps of x[tap offset + R pixels][in] times b [taps][in][32].
// step: floats from one pixel to the next; row: from one row to the next.
template <int R>
static void multiply_taps(const float* x, int64_t step, int64_t row, const float* b, int64_t in, float* sums) {
  F acc[R][kColumnVectors];
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < kColumnVectors; ++j) acc[r][j] = set1(0);
  }
  for (int tap = 0; tap < 9; ++tap) {
    const float* const a = x + tap / 3 * row + tap % 3 * step;
#pragma GCC unroll 2
    for (int64_t c = 0; c < in; ++c) {
      F weight[kColumnVectors];
#pragma GCC unroll 8
      for (int j = 0; j < kColumnVectors; ++j) weight[j] = load(b + j * kWidth);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const F value = set1(a[r * step + c]);
#pragma GCC unroll 8
        for (int j = 0; j < kColumnVectors; ++j) acc[r][j] = multiply_add(value, weight[j], acc[r][j]);
      }
      b += kPanel;
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < kColumnVectors; ++j) store(sums + r * kPanel + j * kWidth, acc[r][j]);
  }
}

// The same for an image's three planes; plane: floats from one to the next.
template <int R>
static void multiply_image(const float* x, int64_t plane, int64_t row, const float* b, float* sums) {
  F acc[R][kColumnVectors];
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < kColumnVectors; ++j) acc[r][j] = set1(0);
  }
  for (int channel = 0; channel < 3; ++channel) {
    for (int dy = 0; dy < 3; ++dy) {
      const float* const a = x + channel * plane + dy * row;
#pragma GCC unroll 3
      for (int dx = 0; dx < 3; ++dx) {
        F weight[kColumnVectors];
#pragma GCC unroll 8
        for (int j = 0; j < kColumnVectors; ++j) weight[j] = load(b + j * kWidth);
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
          const F value = set1(a[dx + r]);
#pragma GCC unroll 8
          for (int j = 0; j < kColumnVectors; ++j) acc[r][j] = multiply_add(value, weight[j], acc[r][j]);
        }
        b += kPanel;
      }
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < kColumnVectors; ++j) store(sums + r * kPanel + j * kWidth, acc[r][j]);
  }
}

// Rows y and y + 1 (y even) of one image. rows [4][p.width][in] and sums [2][p.width][32] are scratch.
template <class Call>
static void direct_rows(const DirectPlan& p, const Call& call, const float* x, int64_t image, int64_t y, float* rows,
                        float* sums) {
  const int64_t line = p.width * p.in, pair = y + 1 < p.h ? 2 : 1;
  for (int64_t r = 0; r < pair + 2; ++r) {
    float* const to = rows + r * line;
    const int64_t from = y + r - 1;
    const bool inside = from >= 0 && from < p.h;
    const int64_t begin = inside ? p.in : 0, end = inside ? (p.w + 1) * p.in : 0;
    for (int64_t i = 0; i < begin; i += kWidth) store(to + i, set1(0));
    if (inside) copy(x + (image * p.h + from) * p.w * p.in, to + p.in, p.w * p.in);
    for (int64_t i = end; i < line; i += kWidth) store(to + i, set1(0));
  }
  for (int64_t first = 0; first < p.out; first += kPanel) {
    const float* const b = p.weights + first * 9 * p.in;
    for (int64_t r = 0; r < pair; ++r) {
      for (int64_t column = 0; column < p.w; column += kRows) {
        const float* const a = rows + r * line + column * p.in;
        for (int64_t j = 0; j < kPanel; j += kColumnVectors * kWidth) {
          float* const to = sums + (r * p.width + column) * kPanel + j;
          if (p.w - column > kRows / 3) {
            multiply_taps<kRows>(a, p.in, line, b + j, p.in, to);
          } else {
            multiply_taps<kRows / 3>(a, p.in, line, b + j, p.in, to);
          }
        }
      }
    }
    finish_rows<float>(call, p.bias, image, y, first, p.out - first < kPanel ? p.out - first : kPanel, sums, p.width,
                       kPanel);
  }
}

// to[i] = (from[i * step] - mean) * rstd
template <class T>
static void normalise_row(const T* from, int64_t step, int64_t n, float mean, float rstd, float* to) {
  int64_t i = 0;
  if constexpr (sizeof(T) > 1) {
    if (step == 1) {
      const F m = set1(mean), r = set1(rstd);
      for (; i + kWidth <= n; i += kWidth) store(to + i, (load(from + i) - m) * r);
    }
  }
  for (; i < n; ++i) {
    if constexpr (sizeof(T) > 1) {
      to[i] = (widen(from[i * step]) - mean) * rstd;
    } else {
      to[i] = (static_cast<float>(from[i * step]) - mean) * rstd;
    }
  }
}

static void image_row(const VggImage& image, int64_t b, int channel, int64_t y, int64_t w, float* to) {
  const int64_t at = b * image.stride[0] + channel * image.stride[1] + y * image.stride[2], step = image.stride[3];
  const float mean = image.mean[channel], rstd = image.rstd[channel];
  if (image.uint8) {
    normalise_row(static_cast<const uint8_t*>(image.data) + at, step, w, mean, rstd, to);
  } else if (image.dtype == Dtype::f32) {
    normalise_row(static_cast<const float*>(image.data) + at, step, w, mean, rstd, to);
  } else if (image.dtype == Dtype::bf16) {
    normalise_row(static_cast<const bf16*>(image.data) + at, step, w, mean, rstd, to);
  } else {
    normalise_row(static_cast<const f16*>(image.data) + at, step, w, mean, rstd, to);
  }
}

// Rows y and y + 1 (y even) of the first layer's map. rows [3][4][p.width] and sums [2][p.width][32] are scratch.
template <class T>
static void first_rows(const DirectPlan& p, const ConvForward& call, const VggImage& image, int64_t first_image,
                       int64_t b, int64_t y, float* rows, float* sums) {
  const int64_t pair = y + 1 < p.h ? 2 : 1;
  for (int channel = 0; channel < 3; ++channel) {
    for (int64_t r = 0; r < pair + 2; ++r) {
      float* const to = rows + (channel * 4 + r) * p.width;
      const int64_t from = y + r - 1;
      const bool inside = from >= 0 && from < p.h;
      to[0] = 0;
      if (inside) image_row(image, first_image + b, channel, from, p.w, to + 1);
      for (int64_t i = inside ? p.w + 1 : 1; i < p.width; ++i) to[i] = 0;
    }
  }
  for (int64_t first = 0; first < p.out; first += kPanel) {
    const float* const weights = p.weights + first * 27;
    for (int64_t r = 0; r < pair; ++r) {
      for (int64_t column = 0; column < p.w; column += kRows) {
        for (int64_t j = 0; j < kPanel; j += kColumnVectors * kWidth) {
          multiply_image<kRows>(rows + r * p.width + column, 4 * p.width, p.width, weights + j,
                                sums + (r * p.width + column) * kPanel + j);
        }
      }
    }
    finish_rows<T>(call, p.bias, b, y, first, p.out - first < kPanel ? p.out - first : kPanel, sums, p.width, kPanel);
  }
}

#if VAEOPS_ISA == 2
VAEOPS_INLINE float sum_of(F x) { return _mm512_reduce_add_ps(x); }
#elif VAEOPS_ISA == 1
VAEOPS_INLINE float sum_of(F x) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
#else
VAEOPS_INLINE float sum_of(F x) { return x; }
#endif

constexpr int kPixels = VAEOPS_ISA == 2 ? 8 : VAEOPS_ISA == 1 ? 4 : 2;  // of an image's gradient at a time

// gradient[channel * w] of kPixels pixels from (y, x) on, in one image's g; where kEdge, some of them may be outside.
template <class T, bool kEdge>
VAEOPS_INLINE void image_gradient(const DirectPlan& p, const T* g, int64_t y, int64_t x, float* gradient) {
  F acc[3][kPixels];
  for (int channel = 0; channel < 3; ++channel) {
    for (int i = 0; i < kPixels; ++i) acc[channel][i] = set1(0);
  }
  const int64_t k = p.in;  // channels of g
  for (int dy = 0; dy < 3; ++dy) {
    if (y + dy < 1 || y + dy > p.h) continue;
    for (int dx = 0; dx < 3; ++dx) {
      const T* const from = g + ((y + dy - 1) * p.w + x + dx - 1) * k;
      const float* const weight = p.weights + (3 * dy + dx) * 3 * k;
      for (int64_t c = 0; c < k; c += kWidth) {
        const F w0 = load(weight + c), w1 = load(weight + k + c), w2 = load(weight + 2 * k + c);
#pragma GCC unroll 8
        for (int i = 0; i < kPixels; ++i) {
          const bool here = !kEdge || (x + dx + i >= 1 && x + dx + i <= p.w);
          const F value = here ? load(from + i * k + c) : set1(0);
          acc[0][i] = multiply_add(value, w0, acc[0][i]);
          acc[1][i] = multiply_add(value, w1, acc[1][i]);
          acc[2][i] = multiply_add(value, w2, acc[2][i]);
        }
      }
    }
  }
  for (int channel = 0; channel < 3; ++channel) {
#pragma GCC unroll 8
    for (int i = 0; i < kPixels; ++i) {
      if (!kEdge || x + i < p.w) gradient[channel * p.w + i] = sum_of(acc[channel][i]);
    }
  }
}

// Row y of one image's gradient [3][w], before rstd.
template <class T>
static void image_gradient_row(const DirectPlan& p, const T* g, int64_t y, float* gradient) {
  for (int64_t x = 0; x < p.w; x += kPixels) {
    if (x > 0 && x + kPixels < p.w) {
      image_gradient<T, false>(p, g, y, x, gradient + x);
    } else {
      image_gradient<T, true>(p, g, y, x, gradient + x);
    }
  }
}
