// Batch norm on rows of a map, for one instruction set. A channel's pixels are the inner loop: its constants and sums
// stay in registers, the rows in the cache. No include guard: see foreach_isa.h.

struct NormConstants {
  F mean, scale, bias;
};

VAEOPS_INLINE NormConstants norm_constants(const NormRows& r, int64_t c) {
  return {load(r.mean + c), load(r.rstd + c) * load(r.weight + c), load(r.bias + c)};
}

VAEOPS_INLINE F greater(F a, F b) { return select(less(a, b), b, a); }

// sums [2, C]: the mean of y, and the sum of squared distances from it.
template <class T>
static void sum_rows(const NormRows& r, float* sums) {
  const T* const y = static_cast<const T*>(r.y);
  const int64_t pixels = r.rows * r.width, channels = r.channels;
  const F share = set1(1.0f / static_cast<float>(pixels));
  for (int64_t c = 0; c < channels; c += kWidth) {
    F sum = set1(0), rest = set1(0), square = set1(0);
    for (int64_t p = 0; p < pixels; ++p) sum = sum + load(y + p * channels + c);
    const F mean = sum * share;
    for (int64_t p = 0; p < pixels; ++p) {
      const F apart = load(y + p * channels + c) - mean;
      rest = rest + apart;
      square = square + apart * apart;
    }
    store(sums + c, mean + rest * share);  // less what `sum` lost
    store(sums + channels + c, square);
  }
}

// Element i of the rows; returns v after the ReLU.
template <class T>
VAEOPS_INLINE F norm_one(const NormForward& r, const NormConstants& k, int64_t i) {
  F v = (load(static_cast<const T*>(r.y) + i) - k.mean) * k.scale + k.bias;
  if (r.before != nullptr) store(r.before + i, v);
  v = at_least(v, 0);
  if (r.after != nullptr) store(r.after + i, v);
  if (r.x != nullptr && !r.pools) store(static_cast<T*>(r.x) + i, v);
  return v;
}

template <class T>
static void norm_rows(const NormForward& r) {
  const int64_t step = r.channels, row = r.width * step, windows = r.pools && r.rows == 2 ? r.width / 2 : 0;
  for (int64_t c = 0; c < r.channels; c += kWidth) {
    const NormConstants k = norm_constants(r, c);
    for (int64_t p = 0; p < windows; ++p) {
      const int64_t i = 2 * p * step + c;
      const F top = greater(norm_one<T>(r, k, i), norm_one<T>(r, k, i + step));
      const F bottom = greater(norm_one<T>(r, k, i + row), norm_one<T>(r, k, i + row + step));
      const F most = greater(top, bottom);
      if (r.pooled != nullptr) store(r.pooled + p * step + c, most);
      if (r.x != nullptr) store(static_cast<T*>(r.x) + p * step + c, most);
    }
    for (int64_t y = 0; y < r.rows; ++y) {
      for (int64_t x = 2 * windows; x < r.width; ++x) norm_one<T>(r, k, y * row + x * step + c);
    }
  }
}

struct NormSums {
  F g, product;
};

// Element i of the rows: y - mean and v of it, g at v after its ReLU.
template <class T, bool kSums>
VAEOPS_INLINE void norm_one_backward(const NormBackward& r, const NormConstants& k, int64_t c, int64_t i, F centred,
                                     F v, F g, NormSums& sums) {
  if (r.after != nullptr) g = g + load(r.after + i);
  g = select(less(set1(0), v), g, set1(0));
  if (r.before != nullptr) g = g + load(r.before + i);
  if (kSums) {
    sums.g = sums.g + g;
    sums.product = sums.product + g * centred;
  } else {
    store(static_cast<T*>(r.gx) + i, k.scale * (g - load(r.shift + c) - load(r.slope + c) * centred));
  }
}

template <class T, bool kSums>
static void norm_rows_backward(const NormBackward& r) {
  const T* const y = static_cast<const T*>(r.y);
  const T* const g = static_cast<const T*>(r.x);
  const int64_t step = r.channels, row = r.width * step, windows = r.pools && r.rows == 2 ? r.width / 2 : 0;
  const F zero = set1(0);
  for (int64_t c = 0; c < r.channels; c += kWidth) {
    const NormConstants k = norm_constants(r, c);
    NormSums sums{zero, zero};
    for (int64_t p = 0; p < windows; ++p) {
      const int64_t at = p * step + c, i = 2 * p * step + c;
      const int64_t place[4] = {i, i + step, i + row, i + row + step};
      F centred[4], v[4];
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) {
        centred[n] = load(y + place[n]) - k.mean;
        v[n] = centred[n] * k.scale + k.bias;
      }
      F given = g != nullptr ? load(g + at) : zero;
      if (r.pooled != nullptr) given = given + load(r.pooled + at);
      // To the first of equals, as the forward pass takes it.
      const Mask right = less(v[0], v[1]), right_below = less(v[2], v[3]);
      const Mask low = less(greater(v[0], v[1]), greater(v[2], v[3]));
      const F above = select(low, zero, given), below = select(low, given, zero);
      const F to[4] = {select(right, zero, above), select(right, above, zero), select(right_below, zero, below),
                       select(right_below, below, zero)};
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) norm_one_backward<T, kSums>(r, k, c, place[n], centred[n], v[n], to[n], sums);
    }
    for (int64_t line = 0; line < r.rows; ++line) {
      for (int64_t x = 2 * windows; x < r.width; ++x) {
        const int64_t i = line * row + x * step + c;
        const F centred = load(y + i) - k.mean, given = g != nullptr && !r.pools ? load(g + i) : zero;
        norm_one_backward<T, kSums>(r, k, c, i, centred, centred * k.scale + k.bias, given, sums);
      }
    }
    if (kSums) {
      store(r.sums + c, sums.g);
      store(r.sums + r.channels + c, sums.product);
    }
  }
}
