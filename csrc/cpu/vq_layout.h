// Rows of any strides to and from contiguous buffers, for one instruction set. No include guard: see foreach_isa.h.

VAEOPS_INLINE double wide(double x) { return x; }
VAEOPS_INLINE double wide(float x) { return x; }
VAEOPS_INLINE double wide(bf16 x) { return widen(x); }
VAEOPS_INLINE double wide(f16 x) { return widen(x); }
VAEOPS_INLINE void narrow(double x, double* p) { *p = x; }
VAEOPS_INLINE void narrow(double x, float* p) { *p = static_cast<float>(x); }
VAEOPS_INLINE void narrow(double x, bf16* p) { *p = to_bf16(static_cast<float>(x)); }
VAEOPS_INLINE void narrow(double x, f16* p) { *p = to_f16(static_cast<float>(x)); }

// The first `count` < kWidth elements, the others 0.
#if VAEOPS_ISA == 2
VAEOPS_INLINE Mask first(int64_t count) { return static_cast<Mask>((1u << count) - 1); }
VAEOPS_INLINE F load_first(const float* p, int64_t count) { return _mm512_maskz_loadu_ps(first(count), p); }
VAEOPS_INLINE F load_first(const bf16* p, int64_t count) {
  return floats(shl<16>(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(count), p))));
}
VAEOPS_INLINE F load_first(const f16* p, int64_t count) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(count), p));
}
VAEOPS_INLINE void store_first(float* p, F x, int64_t count) { _mm512_mask_storeu_ps(p, first(count), x); }
template <class T>
VAEOPS_INLINE void store_first(T* p, F x, int64_t count) {
  alignas(32) T all[kWidth];
  store(all, x);
  _mm256_mask_storeu_epi16(p, first(count), _mm256_load_si256(reinterpret_cast<const __m256i*>(all)));
}
#else
template <class T>
VAEOPS_INLINE F load_first(const T* p, int64_t count) {
  T all[kWidth] = {};
  for (int64_t i = 0; i < count; ++i) all[i] = p[i];
  return load(all);
}
template <class T>
VAEOPS_INLINE void store_first(T* p, F x, int64_t count) {
  T all[kWidth];
  store(all, x);
  for (int64_t i = 0; i < count; ++i) p[i] = all[i];
}
#endif

// n contiguous elements of type T as type C, and back.
template <class T, class C>
VAEOPS_INLINE void convert(const T* from, C* to, int64_t n) {
  if constexpr (sizeof(C) == 8 || sizeof(T) == 8) {
    for (int64_t i = 0; i < n; ++i) narrow(wide(from[i]), to + i);
  } else {
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) store(to + i, load(from + i));
    if (i < n) store_first(to + i, load_first(from + i, n - i), n - i);
  }
}

#if VAEOPS_ISA > 0
constexpr int kHalves = kWidth / 8;

#if VAEOPS_ISA == 2
VAEOPS_INLINE __m256 half(F x, int which) {
  return which == 0 ? _mm512_castps512_ps256(x) : _mm512_extractf32x8_ps(x, 1);
}
VAEOPS_INLINE F join(const __m256 (&halves)[kHalves]) {
  return _mm512_insertf32x8(_mm512_castps256_ps512(halves[0]), halves[1], 1);
}
#else
VAEOPS_INLINE __m256 half(F x, int) { return x; }
VAEOPS_INLINE F join(const __m256 (&halves)[kHalves]) { return halves[0]; }
#endif

VAEOPS_INLINE void transpose(__m256 (&a)[8]) {
  __m256 b[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
  __m256 c[8];
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    c[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
    c[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xEE);
    c[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    c[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xEE);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    a[i] = _mm256_permute2f128_ps(c[i], c[i + 4], 0x20);
    a[i + 4] = _mm256_permute2f128_ps(c[i], c[i + 4], 0x31);
  }
}
#endif

// to[r * dims + d] = from[r * row_stride + d * step]
template <class T, class C>
static void load_rows(const T* from, int64_t row_stride, int64_t step, int64_t n, int64_t dims, C* to) {
  if (step == 1) {
    for (int64_t r = 0; r < n; ++r) convert(from + r * row_stride, to + r * dims, dims);
    return;
  }
  int64_t d = 0;
#if VAEOPS_ISA > 0
  if constexpr (sizeof(C) == 4 && sizeof(T) <= 4) {
    const int64_t whole = row_stride == 1 ? n / kWidth * kWidth : 0;
    for (; whole > 0 && d + 8 <= dims; d += 8) {
      for (int64_t r = 0; r < whole; r += kWidth) {
        F columns[8];
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) columns[i] = load(from + (d + i) * step + r);
#pragma GCC unroll 2
        for (int h = 0; h < kHalves; ++h) {
          __m256 block[8];
#pragma GCC unroll 8
          for (int i = 0; i < 8; ++i) block[i] = half(columns[i], h);
          transpose(block);
#pragma GCC unroll 8
          for (int i = 0; i < 8; ++i) _mm256_storeu_ps(to + (r + 8 * h + i) * dims + d, block[i]);
        }
      }
      for (int64_t r = whole; r < n; ++r) {
        for (int64_t i = d; i < d + 8; ++i) to[r * dims + i] = widen(from[r + i * step]);
      }
    }
  }
#endif
  for (; d < dims; ++d) {
    for (int64_t r = 0; r < n; ++r) narrow(wide(from[r * row_stride + d * step]), to + r * dims + d);
  }
}

// to[r * row_stride + d * step] = from[r * dims + d]
template <class C, class T>
static void store_rows(const C* from, int64_t n, int64_t dims, T* to, int64_t row_stride, int64_t step) {
  if (step == 1) {
    for (int64_t r = 0; r < n; ++r) convert(from + r * dims, to + r * row_stride, dims);
    return;
  }
  int64_t d = 0;
#if VAEOPS_ISA > 0
  if constexpr (sizeof(C) == 4 && sizeof(T) <= 4) {
    const int64_t whole = row_stride == 1 ? n / kWidth * kWidth : 0;
    for (; whole > 0 && d + 8 <= dims; d += 8) {
      for (int64_t r = 0; r < whole; r += kWidth) {
        __m256 blocks[kHalves][8];
#pragma GCC unroll 2
        for (int h = 0; h < kHalves; ++h) {
#pragma GCC unroll 8
          for (int i = 0; i < 8; ++i) blocks[h][i] = _mm256_loadu_ps(from + (r + 8 * h + i) * dims + d);
          transpose(blocks[h]);
        }
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
          __m256 column[kHalves];
          for (int h = 0; h < kHalves; ++h) column[h] = blocks[h][i];
          store(to + (d + i) * step + r, join(column));
        }
      }
      for (int64_t i = d; i < d + 8; ++i) {
        for (int64_t r = whole; r < n; ++r) narrow(wide(from[r * dims + i]), to + r + i * step);
      }
    }
  }
#endif
  for (; d < dims; ++d) {
    for (int64_t r = 0; r < n; ++r) narrow(wide(from[r * dims + d]), to + r * row_stride + d * step);
  }
}

// Whether a row holds a NaN or an infinity: its largest magnitude, taken as an integer, says so, and compilers
// vectorise that.
VAEOPS_INLINE uint32_t magnitude(float x) { return float_bits(x) & 0x7FFFFFFFu; }
VAEOPS_INLINE uint16_t magnitude(bf16 x) { return x.bits & 0x7FFFu; }
VAEOPS_INLINE uint16_t magnitude(f16 x) { return x.bits & 0x7FFFu; }
VAEOPS_INLINE uint64_t magnitude(double x) {
  uint64_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits & 0x7FFFFFFFFFFFFFFFu;
}
VAEOPS_INLINE uint32_t infinity_of(float) { return 0x7F800000u; }
VAEOPS_INLINE uint16_t infinity_of(bf16) { return 0x7F80u; }
VAEOPS_INLINE uint16_t infinity_of(f16) { return 0x7C00u; }
VAEOPS_INLINE uint64_t infinity_of(double) { return 0x7FF0000000000000u; }
template <class T>
VAEOPS_INLINE bool any_not_finite(const T* x, int64_t n) {
  decltype(magnitude(*x)) largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const auto each = magnitude(x[i]);
    largest = largest < each ? each : largest;
  }
  return largest >= infinity_of(*x);
}
