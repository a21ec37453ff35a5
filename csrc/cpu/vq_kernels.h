// Gathering codes, and its backward, on tiles of rows, for one instruction set. No include guard: see foreach_isa.h.
#include "cpu/vq_layout.h"

// Sums of a row run in 16 lanes (fp64: 8), element d in lane d % 16, and are folded by halves: the same bits from every
// instruction set and for any layout.
constexpr int kParts = 16 / kWidth;

VAEOPS_INLINE float sum_parts(const F (&parts)[kParts]) {
#if VAEOPS_ISA == 0
  float sum[16];
  for (int i = 0; i < 16; ++i) sum[i] = parts[i];
  for (int step = 8; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) sum[i] += sum[i + step];
  }
  return sum[0];
#else
#if VAEOPS_ISA == 2
  const __m256 eight = half(parts[0], 0) + half(parts[0], 1);
#else
  const __m256 eight = parts[0] + parts[1];
#endif
  const __m128 four = _mm256_castps256_ps128(eight) + _mm256_extractf128_ps(eight, 1);
  const __m128 two = four + _mm_movehl_ps(four, four);
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#endif
}

// Calls body(d, lane part, count) for each vector of a row; count < kWidth for the last one of a ragged row.
template <class Body>
VAEOPS_INLINE void for_each_vector(int64_t dims, const Body& body) {
  int64_t d = 0;
  for (; d + 16 <= dims; d += 16) {
#pragma GCC unroll 16
    for (int part = 0; part < kParts; ++part) body(d + part * kWidth, part, int64_t{kWidth});
  }
  for (int part = 0; d < dims; ++part, d += kWidth) body(d, part, dims - d < kWidth ? dims - d : int64_t{kWidth});
}
template <class T>
VAEOPS_INLINE F load_some(const T* p, int64_t count) {
  return count == kWidth ? load(p) : load_first(p, count);
}
template <class T>
VAEOPS_INLINE void store_some(T* p, F x, int64_t count) {
  count == kWidth ? store(p, x) : store_first(p, x, count);
}

template <class T, class C>
VAEOPS_INLINE void fill_row(T* row, C value, int64_t dims) {
  for (int64_t d = 0; d < dims; ++d) narrow(value, row + d);
}

// quantized = e; returns the sum over D of (x - e)^2.
template <class T>
VAEOPS_INLINE float gather_row(const T* x, const float* e, T* quantized, int64_t dims) {
  F squares[kParts];
  for (F& s : squares) s = set1(0.0f);
  for_each_vector(dims, [&](int64_t d, int part, int64_t count) __attribute__((always_inline)) {
    const F code = load_some(e + d, count), difference = load_some(x + d, count) - code;
    squares[part] = fma(difference, difference, squares[part]);
    store_some(quantized + d, code, count);
  });
  return sum_parts(squares);
}
template <class T>
VAEOPS_INLINE double gather_row(const T* x, const double* e, T* quantized, int64_t dims) {
  double squares[8] = {};
  int64_t d = 0;
  for (; d + 8 <= dims; d += 8) {
    for (int i = 0; i < 8; ++i) {
      const double difference = wide(x[d + i]) - e[d + i];
      squares[i] += difference * difference;
    }
  }
  for (int i = 0; d + i < dims; ++i) {
    const double difference = wide(x[d + i]) - e[d + i];
    squares[i] += difference * difference;
  }
  for (d = 0; d < dims; ++d) narrow(e[d], quantized + d);
  return ((squares[0] + squares[4]) + (squares[1] + squares[5])) +
         ((squares[2] + squares[6]) + (squares[3] + squares[7]));
}

template <class T, class C>
static void gather(const GatherTile<T, C>& t) {
  for (int64_t r = 0; r < t.n; ++r) {
    T* const quantized = t.quantized.row(r);
    if (t.code[r] == nullptr) {
      fill_row(quantized, t.fill, t.dims);
      t.loss[r] = 0;
      continue;
    }
    const T* const x = t.x.row(r);
    t.loss[r] = gather_row(x, t.code[r], quantized, t.dims);
    // A sum that is not finite is rare: only then the row is looked through.
    if (!(t.loss[r] < static_cast<C>(__builtin_inf())) && any_not_finite(x, t.dims)) {
      t.loss[r] = static_cast<C>(__builtin_nan(""));
      fill_row(quantized, t.loss[r], t.dims);
    }
  }
}

// The rotation's coefficients: E(g) = scale (g + along_t t + along_u u), with t = u + v not normalised. Or straight
// through.
template <class C>
struct Rotation {
  bool straight;
  C scale, along_t, along_u, inverse_x, inverse_e;  // 1 / |x|, 1 / |e|
};

VAEOPS_INLINE float root(float x) { return __builtin_sqrtf(x); }
VAEOPS_INLINE double root(double x) { return __builtin_sqrt(x); }

template <class C>
VAEOPS_INLINE Rotation<C> rotation_of(C norm_x, C norm_e, C t_t, C t_g, C v_g) {
  const C norm_t = root(t_t), tiny = static_cast<C>(1e-6);
  return {norm_x < tiny || norm_e < tiny || norm_t < tiny,
          norm_e / norm_x,
          -2 * t_g / t_t,
          2 * v_g,
          1 / norm_x,
          1 / norm_e};
}

// In fp64; E is the codebook's compute type.
template <class T, class E>
static void backward_row_wide(const T* x, const T* gq, const E* e, T* gx, double w, bool weighted, Estimator estimator,
                              int64_t dims) {
  Rotation<double> turn{true, 0, 0, 0, 0, 0};
  if (gq != nullptr && estimator == Estimator::rotation) {
    double x_x = 0, e_e = 0, t_t = 0, t_g = 0, v_g = 0;
    for (int64_t d = 0; d < dims; ++d) {
      x_x += wide(x[d]) * wide(x[d]);
      e_e += wide(e[d]) * wide(e[d]);
    }
    const double norm_x = root(x_x), norm_e = root(e_e);
    for (int64_t d = 0; d < dims; ++d) {
      const double v = wide(e[d]) / norm_e, t = wide(x[d]) / norm_x + v, g = wide(gq[d]);
      t_t += t * t;
      t_g += t * g;
      v_g += v * g;
    }
    turn = rotation_of(norm_x, norm_e, t_t, t_g, v_g);
  }
  const bool passes = gq != nullptr && estimator != Estimator::none;
  for (int64_t d = 0; d < dims; ++d) {
    double out = passes ? wide(gq[d]) : 0;
    const double u = wide(x[d]) * turn.inverse_x;
    if (!turn.straight) out = turn.scale * (out + turn.along_t * (u + wide(e[d]) * turn.inverse_e) + turn.along_u * u);
    if (weighted) out += 2 * w * (wide(x[d]) - wide(e[d]));
    narrow(out, gx + d);
  }
}

VAEOPS_INLINE F add_loss(F out, F twice_w, bool weighted, F x, F e) {
  return weighted ? fma(twice_w, x - e, out) : out;
}

template <class T>
VAEOPS_INLINE void backward_row(const T* x, const T* gq, const float* e, T* gx, float w, bool weighted, int64_t dims) {
  const F twice_w = set1(2 * w);
  for_each_vector(dims, [&](int64_t d, int, int64_t count) __attribute__((always_inline)) {
    const F out = gq != nullptr ? load_some(gq + d, count) : set1(0.0f);
    store_some(gx + d, add_loss(out, twice_w, weighted, load_some(x + d, count), load_some(e + d, count)), count);
  });
}

template <class T>
VAEOPS_INLINE void rotate_row(const T* x, const T* gq, const float* e, T* gx, float w, bool weighted, int64_t dims) {
  F x_x[kParts], e_e[kParts], t_t[kParts], t_g[kParts], v_g[kParts];
  for (int i = 0; i < kParts; ++i) x_x[i] = e_e[i] = t_t[i] = t_g[i] = v_g[i] = set1(0.0f);
  for_each_vector(dims, [&](int64_t d, int part, int64_t count) __attribute__((always_inline)) {
    const F a = load_some(x + d, count), b = load_some(e + d, count);
    x_x[part] = fma(a, a, x_x[part]);
    e_e[part] = fma(b, b, e_e[part]);
  });
  const float norm_x = root(sum_parts(x_x)), norm_e = root(sum_parts(e_e));
  if (!(norm_x < __builtin_inff()) || !(norm_e < __builtin_inff())) {  // the squares overflow fp32
    return backward_row_wide(x, gq, e, gx, w, weighted, Estimator::rotation, dims);
  }
  const F inverse_x = set1(1 / norm_x), inverse_e = set1(1 / norm_e);
  for_each_vector(dims, [&](int64_t d, int part, int64_t count) __attribute__((always_inline)) {
    const F v = load_some(e + d, count) * inverse_e, t = fma(load_some(x + d, count), inverse_x, v);
    const F g = load_some(gq + d, count);
    t_t[part] = fma(t, t, t_t[part]);
    t_g[part] = fma(t, g, t_g[part]);
    v_g[part] = fma(v, g, v_g[part]);
  });
  const Rotation<float> turn = rotation_of(norm_x, norm_e, sum_parts(t_t), sum_parts(t_g), sum_parts(v_g));
  if (turn.straight) return backward_row(x, gq, e, gx, w, weighted, dims);
  const F scale = set1(turn.scale), along_t = set1(turn.along_t), along_u = set1(turn.along_u);
  const F twice_w = set1(2 * w);
  for_each_vector(dims, [&](int64_t d, int, int64_t count) __attribute__((always_inline)) {
    const F a = load_some(x + d, count), b = load_some(e + d, count), u = a * inverse_x;
    const F turned = fma(along_u, u, fma(along_t, fma(b, inverse_e, u), load_some(gq + d, count)));
    store_some(gx + d, add_loss(scale * turned, twice_w, weighted, a, b), count);
  });
}

template <class T, class C>
static void gather_backward(const GatherBackwardTile<T, C>& t) {
  for (int64_t r = 0; r < t.n; ++r) {
    T* const gx = t.gx.row(r);
    if (t.code[r] == nullptr) {
      fill_row(gx, C(0), t.dims);
      continue;
    }
    const T* const gq = t.gq ? t.gq.row(r) : nullptr;
    const C w = t.w != nullptr ? t.w[r] : C(0);
    if constexpr (sizeof(C) == 8) {
      backward_row_wide(t.x.row(r), gq, t.code[r], gx, w, t.w != nullptr, t.estimator, t.dims);
    } else if (gq != nullptr && t.estimator == Estimator::rotation) {
      rotate_row(t.x.row(r), gq, t.code[r], gx, w, t.w != nullptr, t.dims);
    } else {
      const T* const passed = t.estimator == Estimator::none ? nullptr : gq;
      backward_row(t.x.row(r), passed, t.code[r], gx, w, t.w != nullptr, t.dims);
    }
  }
}
