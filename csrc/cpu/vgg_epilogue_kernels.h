// What follows a convolution, for kWidth channels of a pixel. T is the maps' element. No include guard: see
// foreach_isa.h.

// Bits of channels c .. c + kWidth - 1 in the word of 16 that they belong to.
#if VAEOPS_ISA == 2
VAEOPS_INLINE void put_bits(uint16_t* word, int64_t, Mask m) { *word = m; }
VAEOPS_INLINE Mask get_bits(const uint16_t* word, int64_t) { return *word; }
#elif VAEOPS_ISA == 1
VAEOPS_INLINE void put_bits(uint16_t* word, int64_t c, Mask m) {
  reinterpret_cast<uint8_t*>(word)[c % 16 / 8] = static_cast<uint8_t>(_mm256_movemask_ps(m));
}
VAEOPS_INLINE Mask get_bits(const uint16_t* word, int64_t c) {
  const I one = _mm256_set_epi32(128, 64, 32, 16, 8, 4, 2, 1);
  return floats(_mm256_cmpeq_epi32(iand(iset1(reinterpret_cast<const uint8_t*>(word)[c % 16 / 8]), one), one));
}
#else
VAEOPS_INLINE void put_bits(uint16_t* word, int64_t c, Mask m) {
  const uint32_t bit = 1u << (c % 16);
  *word = static_cast<uint16_t>((*word & ~bit) | (m ? bit : 0));
}
VAEOPS_INLINE Mask get_bits(const uint16_t* word, int64_t c) { return (*word >> (c % 16) & 1) != 0; }
#endif

// v: the convolution's output with its bias. Returns what the layer's output is.
template <class T>
VAEOPS_INLINE F finish(const ConvForward& f, int64_t pixel, int64_t c, F v) {
  const int64_t i = pixel * f.out + c;
  if (f.before != nullptr) store(static_cast<T*>(f.before) + i, v);
  if (f.relu) {
    if (f.mask != nullptr) put_bits(f.mask + i / 16, c, above(v, set1(0)));
    v = at_least(v, 0);
  }
  if (f.y != nullptr) store(static_cast<T*>(f.y) + i, v);
  return v;
}

// The window's values, row by row; `pixel` counts in the pooled map.
template <class T>
VAEOPS_INLINE void finish_pool(const ConvForward& f, int64_t pixel, int64_t c, F v00, F v01, F v10, F v11) {
  const int64_t i = pixel * f.out + c;
  const Mask right0 = above(v01, v00), right1 = above(v11, v10);
  const F top = select(right0, v01, v00), bottom = select(right1, v11, v10);
  const Mask low = above(bottom, top);
  store(static_cast<T*>(f.pooled) + i, select(low, bottom, top));
  if (f.code == nullptr) return;
  put_bits(f.code + i / 16 * 2, c, low);
#if VAEOPS_ISA == 2
  put_bits(f.code + i / 16 * 2 + 1, c, static_cast<Mask>((low & right1) | (~low & right0)));
#elif VAEOPS_ISA == 1
  put_bits(f.code + i / 16 * 2 + 1, c, select(low, right1, right0));
#else
  put_bits(f.code + i / 16 * 2 + 1, c, low ? right1 : right0);
#endif
}

template <class T>
VAEOPS_INLINE F finish(const ConvBackward& b, int64_t pixel, int64_t c, F v) {
  const int64_t i = pixel * b.in + c;
  if (b.tap_after != nullptr) v = v + load(static_cast<const T*>(b.tap_after) + i);
  if (b.mask != nullptr) v = select(get_bits(b.mask + i / 16, c), v, set1(0));
  if (b.tap_before != nullptr) v = v + load(static_cast<const T*>(b.tap_before) + i);
  store(static_cast<T*>(b.gx) + i, v);
  return v;
}

VAEOPS_INLINE bool pools(const ConvForward& f) { return f.pooled != nullptr; }
VAEOPS_INLINE bool pools(const ConvBackward&) { return false; }
template <class T>
VAEOPS_INLINE void finish_pool(const ConvBackward&, int64_t, int64_t, F, F, F, F) {}

VAEOPS_INLINE F bias_of(const float* bias, int64_t c) { return bias != nullptr ? load(bias + c) : set1(0); }

// A window of rows x columns pixels, its first one at (y, x); sums as in finish_rows.
template <class T, class Call>
VAEOPS_INLINE void finish_window(const Call& call, const float* bias, int64_t image, int64_t y, int64_t x, int rows,
                                 int columns, int64_t first, int64_t width, const float* sums, int64_t step,
                                 int64_t channels) {
  const int64_t pixel = (image * call.h + y) * call.w + x;
  for (int64_t c = 0; c < width; c += kWidth) {
    const F b = bias_of(bias, first + c);
    F v[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const int r = i / 2, column = i % 2;
      if (r >= rows || column >= columns) continue;
      v[i] = finish<T>(call, pixel + r * call.w + column, first + c,
                       load(sums + (r * step + x + column) * channels + c) + b);
    }
    if (rows == 2 && columns == 2 && pools(call)) {
      finish_pool<T>(call, (image * (call.h / 2) + y / 2) * (call.w / 2) + x / 2, first + c, v[0], v[1], v[2], v[3]);
    }
  }
}

// One or two rows y, y + 1 (y even) of `width` channels from `first` on. sums [2][step pixels][channels].
template <class T, class Call>
static void finish_rows(const Call& call, const float* bias, int64_t image, int64_t y, int64_t first, int64_t width,
                        const float* sums, int64_t step, int64_t channels) {
  const int rows = y + 1 < call.h ? 2 : 1;
  int64_t x = 0;
  for (; rows == 2 && x + 1 < call.w; x += 2) {
    finish_window<T>(call, bias, image, y, x, 2, 2, first, width, sums, step, channels);
  }
  for (; x < call.w; ++x) finish_window<T>(call, bias, image, y, x, rows, 1, first, width, sums, step, channels);
}
