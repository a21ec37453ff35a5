// Distances of a tile of pixels and their gradients, for one instruction set. No include guard: see foreach_isa.h.
#include "cpu/vq_layout.h"

// fp64 is computed an element at a time by the same code.
VAEOPS_INLINE double load(const double* p) { return *p; }
VAEOPS_INLINE void store(double* p, double x) { *p = x; }
VAEOPS_INLINE double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
VAEOPS_INLINE double sqrt(double x) { return __builtin_sqrt(x); }
VAEOPS_INLINE bool less(double a, double b) { return a < b; }
VAEOPS_INLINE bool above(double a, double b) { return b < a || a != a; }
VAEOPS_INLINE double select(bool m, double yes, double no) { return m ? yes : no; }
VAEOPS_INLINE double at_most(double x, double bound) { return bound < x ? bound : x; }
VAEOPS_INLINE double at_least(double x, double bound) { return x < bound ? bound : x; }
VAEOPS_INLINE double total(double x) { return x; }

template <class S>
struct Lanes {
  using V = F;
  static constexpr int64_t width = kWidth;
};
template <>
struct Lanes<double> {
  using V = double;
  static constexpr int64_t width = 1;
};

template <class S>
VAEOPS_INLINE typename Lanes<S>::V splat(S x) {
  if constexpr (sizeof(S) == 8) {
    return x;
  } else {
    return set1(x);
  }
}
// The first `count` elements, at most a vector of them.
template <class T>
VAEOPS_INLINE auto get(const T* p, int64_t count) {
  if constexpr (sizeof(T) == 8) {
    return *p;
  } else {
    return count >= kWidth ? load(p) : load_first(p, count);
  }
}
template <class T, class V>
VAEOPS_INLINE void put(T* p, V x, int64_t count) {
  if constexpr (sizeof(T) == 8) {
    *p = x;
  } else {
    count >= kWidth ? store(p, x) : store_first(p, x, count);
  }
}

VAEOPS_INLINE float total(F x) {
#if VAEOPS_ISA == 0
  return x;
#else
#if VAEOPS_ISA == 2
  const __m256 eight = half(x, 0) + half(x, 1);
#else
  const __m256 eight = x;
#endif
  const __m128 four = _mm256_castps256_ps128(eight) + _mm256_extractf128_ps(eight, 1);
  const __m128 two = four + _mm_movehl_ps(four, four);
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#endif
}

// Writes the gradient of `n` elements of a: through the ReLU that gave them, and on top of what is there.
template <class S, class Tile, class V>
VAEOPS_INLINE void put_gradient(const Tile& tile, int64_t p, int64_t c, V value, V g, int64_t n) {
  const V zero = splat(S(0));
  if (tile.relu) g = select(above(value, zero), g, zero);
  auto* const at = tile.ga + p * tile.ga_step + c;
  if (tile.add) g = g + get(at, n);
  put(at, g, n);
}

// Kinds that are sums over the elements: term(d, value) adds d's share to `value` and returns the slope.
template <class T, class U, class S, class Term>
VAEOPS_INLINE double distance_of_elements(const DistanceTile<T, U, S>& tile, const Term& term) {
  using V = typename Lanes<S>::V;
  constexpr int64_t width = Lanes<S>::width, fold = 64 * width;
  double all = 0;
  for (int64_t p = 0; p < tile.pixels; ++p) {
    const T* const a = tile.a + p * tile.a_step;
    const U* const b = tile.b + p * tile.b_step;
    const V scale = splat(static_cast<S>(tile.scale[p * tile.scale_step] * tile.factor));
    double pixel = 0;
    for (int64_t begin = 0; begin < tile.channels; begin += fold) {  // what is summed in one fp32 lane stays short
      const int64_t end = begin + fold < tile.channels ? begin + fold : tile.channels;
      V sum = splat(S(0));
      for (int64_t c = begin; c < end; c += width) {
        const int64_t n = end - c;
        const V x = get(a + c, n), slope = term(x - get(b + c, n), sum);
        if (tile.ga != nullptr) put_gradient<S>(tile, p, c, x, scale * slope, n);
        if (tile.gb != nullptr) put(tile.gb + p * tile.gb_step + c, splat(S(0)) - scale * slope, n);
      }
      pixel += total(sum);
    }
    if (tile.each != nullptr) tile.each[p] = static_cast<S>(pixel);
    all += pixel;
  }
  return all;
}

// One side of the gradient of lpips: e / (norm + eps) - x (e . x) / ((norm + eps)^2 norm), and 0 where the norm is 0.
// inverse = 1 / (norm + eps).
template <class S>
struct Unit {
  S norm, inverse;
  VAEOPS_INLINE_METHOD S along(S product) const {  // `product` = e . x
    return norm > 0 ? product * inverse * inverse / norm : S(0);
  }
};
template <class T, class S>
VAEOPS_INLINE Unit<S> unit_of(const T* x, int64_t channels, S) {
  constexpr int64_t width = Lanes<S>::width;
  auto squares = splat(S(0));
  for (int64_t c = 0; c < channels; c += width) {
    const auto v = get(x + c, channels - c);
    squares = fma(v, v, squares);
  }
  const S norm = static_cast<S>(__builtin_sqrt(static_cast<double>(total(squares))));
  return {norm, S(1) / (norm + S(1e-10))};
}

template <class T, class U, class S>
VAEOPS_INLINE double lpips_tile(const DistanceTile<T, U, S>& tile) {
  using V = typename Lanes<S>::V;
  constexpr int64_t width = Lanes<S>::width;
  double all = 0;
  for (int64_t p = 0; p < tile.pixels; ++p) {
    const T* const a = tile.a + p * tile.a_step;
    const U* const b = tile.b + p * tile.b_step;
    const Unit<S> ua = unit_of(a, tile.channels, S(0)), ub = unit_of(b, tile.channels, S(0));
    const V ia = splat(ua.inverse), ib = splat(ub.inverse);
    const auto difference = [&](int64_t c, int64_t n)
                                __attribute__((always_inline)) { return get(a + c, n) * ia - get(b + c, n) * ib; };
    V sum = splat(S(0)), with_a = sum, with_b = sum;
    for (int64_t c = 0; c < tile.channels; c += width) {
      const int64_t n = tile.channels - c;
      const V d = difference(c, n), e = get(tile.lin + c, n) * d;
      sum = fma(e, d, sum);
      with_a = fma(e, get(a + c, n), with_a);
      with_b = fma(e, get(b + c, n), with_b);
    }
    const S value = static_cast<S>(total(sum));
    all += value;
    if (tile.each != nullptr) tile.each[p] = value;
    if (tile.ga == nullptr && tile.gb == nullptr) continue;
    const S scale = 2 * tile.scale[p * tile.scale_step] * tile.factor;
    const V sa = splat(static_cast<S>(ua.norm > 0 ? scale * ua.inverse : 0)),
            ca = splat(scale * ua.along(total(with_a)));
    const V sb = splat(static_cast<S>(ub.norm > 0 ? scale * ub.inverse : 0)),
            cb = splat(scale * ub.along(total(with_b)));
    for (int64_t c = 0; c < tile.channels; c += width) {
      const int64_t n = tile.channels - c;
      const V e = get(tile.lin + c, n) * difference(c, n);
      if (tile.ga != nullptr) {
        const V x = get(a + c, n);
        put_gradient<S>(tile, p, c, x, sa * e - ca * x, n);
      }
      if (tile.gb != nullptr) put(tile.gb + p * tile.gb_step + c, cb * get(b + c, n) - sb * e, n);
    }
  }
  return all;
}

// Returns the sum over the tile.
template <class T, class U, class S>
static double distance_tile(Distance kind, const DistanceTile<T, U, S>& tile) {
  using V = typename Lanes<S>::V;
  const V zero = splat(S(0)), one = splat(S(1)), two = splat(S(2)), half_of = splat(S(0.5));
  switch (kind) {
    case Distance::mse:
      return distance_of_elements(tile, [&](V d, V& sum) __attribute__((always_inline)) {
        sum = fma(d, d, sum);
        return two * d;
      });
    case Distance::l1:
      return distance_of_elements(tile, [&](V d, V& sum) __attribute__((always_inline)) {
        const V sign = select(less(zero, d), one, select(less(d, zero), zero - one, zero * d));
        sum = fma(sign, d, sum);
        return sign;
      });
    case Distance::smooth_l1:
      return distance_of_elements(tile, [&](V d, V& sum) __attribute__((always_inline)) {
        const V slope = at_least(at_most(d, S(1)), S(-1));
        sum = fma(slope, d - half_of * slope, sum);  // d^2 / 2 within 1, |d| - 1/2 beyond
        return slope;
      });
    default:
      return lpips_tile(tile);
  }
}

// sums[r][columns] = sum over k < depth of a[r * a_row + k * a_depth] * b[k * b_depth + column], R rows, N vectors.
template <int R, int N, class S>
VAEOPS_INLINE void products(const S* a, int64_t a_row, int64_t a_depth, const S* b, int64_t b_depth, int64_t depth,
                            int64_t columns, typename Lanes<S>::V (&sums)[R][N]) {
  constexpr int64_t width = Lanes<S>::width;
  for (auto& row : sums) {
    for (auto& sum : row) sum = splat(S(0));
  }
  for (int64_t k = 0; k < depth; ++k) {
    typename Lanes<S>::V right[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) right[j] = get(b + k * b_depth + j * width, N > 1 ? width : columns);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const auto left = splat(a[r * a_row + k * a_depth]);
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) sums[r][j] = fma(left, right[j], sums[r][j]);
    }
  }
}

// Calls take(row, column, vector, count) for each vector of a product of `rows` x `columns`.
template <class S, class Take>
VAEOPS_INLINE void multiply(const S* a, int64_t a_row, int64_t a_depth, const S* b, int64_t b_depth, int64_t depth,
                            int64_t rows, int64_t columns, const Take& take) {
  constexpr int64_t width = Lanes<S>::width;
  constexpr int R = 4, N = VAEOPS_ISA == 2 ? 4 : 2;
  typename Lanes<S>::V block[R][N], row[1][N], column[R][1], one[1][1];
  int64_t r = 0;
  for (; r < rows;) {
    const bool whole = r + R <= rows;
    const S* const left = a + r * a_row;
    int64_t c = 0;
    for (; c + N * width <= columns; c += N * width) {
      if (whole) {
        products<R, N>(left, a_row, a_depth, b + c, b_depth, depth, columns, block);
        for (int i = 0; i < R; ++i) {
          for (int j = 0; j < N; ++j) take(r + i, c + j * width, block[i][j], width);
        }
      } else {
        products<1, N>(left, a_row, a_depth, b + c, b_depth, depth, columns, row);
        for (int j = 0; j < N; ++j) take(r, c + j * width, row[0][j], width);
      }
    }
    for (; c < columns; c += width) {
      if (whole) {
        products<R, 1>(left, a_row, a_depth, b + c, b_depth, depth, columns - c, column);
        for (int i = 0; i < R; ++i) take(r + i, c, column[i][0], columns - c);
      } else {
        products<1, 1>(left, a_row, a_depth, b + c, b_depth, depth, columns - c, one);
        take(r, c, one[0][0], columns - c);
      }
    }
    r += whole ? R : 1;
  }
}

// gram[i - first][j] += sum over the pixels of x[p][i] x[p][j], for rows i in [first, first + rows).
template <class S>
static void gram_rows(const S* x /* [pixels, channels] */, int64_t pixels, int64_t channels, int64_t first,
                      int64_t rows, double* gram) {
  multiply<S>(x + first, 1, channels, x, channels, pixels, rows, channels,
              [&](int64_t r, int64_t c, typename Lanes<S>::V sum, int64_t count) __attribute__((always_inline)) {
                S lanes[Lanes<S>::width];
                put(lanes, sum, Lanes<S>::width);
                double* const to = gram + r * channels + c;
                for (int64_t i = 0; i < Lanes<S>::width && i < count; ++i) to[i] += lanes[i];
              });
}

// gx[p][c] = factor * sum over k of x[p][k] matrix[k][c], as put_gradient writes it.
template <class T, class S>
static void gram_gradient(const S* x /* [pixels, channels] */, const S* matrix /* [channels, channels] */, S factor,
                          const DistanceTile<T, T, S>& tile) {
  const int64_t channels = tile.channels;
  const auto scale = splat(factor);
  multiply<S>(x, channels, 1, matrix, channels, channels, tile.pixels, channels,
              [&](int64_t p, int64_t c, typename Lanes<S>::V sum, int64_t count) __attribute__((always_inline)) {
                put_gradient<S>(tile, p, c, get(x + p * channels + c, count), scale * sum, count);
              });
}
