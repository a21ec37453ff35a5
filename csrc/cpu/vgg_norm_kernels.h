// Batch norm on rows of a map, for one instruction set: V vectors of channels at a time, whose constants and sums stay
// in registers, over all pixels. No include guard: see foreach_isa.h.

template <int V>
struct NormConstants {
  F mean[V], scale[V], bias[V];
};

template <int V>
VAEOPS_INLINE NormConstants<V> norm_constants(const NormRows& r, int64_t c) {
  NormConstants<V> k;
#pragma GCC unroll 4
  for (int j = 0; j < V; ++j) {
    k.mean[j] = load(r.mean + c + j * kWidth);
    k.scale[j] = load(r.rstd + c + j * kWidth) * load(r.weight + c + j * kWidth);
    k.bias[j] = load(r.bias + c + j * kWidth);
  }
  return k;
}

VAEOPS_INLINE F greater(F a, F b) { return select(above(b, a), b, a); }

template <class T, int V>
VAEOPS_INLINE void sum_channels(const NormRows& r, int64_t c, float* sums) {
  const T* const y = static_cast<const T*>(r.y) + c;
  const int64_t pixels = r.rows * r.width, step = r.channels;
  const F share = set1(1.0f / static_cast<float>(pixels));
  F mean[V], rest[V], square[V];
#pragma GCC unroll 4
  for (int j = 0; j < V; ++j) mean[j] = rest[j] = square[j] = set1(0);
  for (int64_t p = 0; p < pixels; ++p) {
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) mean[j] = mean[j] + load(y + p * step + j * kWidth);
  }
#pragma GCC unroll 4
  for (int j = 0; j < V; ++j) mean[j] = mean[j] * share;
  for (int64_t p = 0; p < pixels; ++p) {
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) {
      const F apart = load(y + p * step + j * kWidth) - mean[j];
      rest[j] = rest[j] + apart;
      square[j] = square[j] + apart * apart;
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < V; ++j) {
    store(sums + c + j * kWidth, mean[j] + rest[j] * share);  // less what the first sum lost
    store(sums + step + c + j * kWidth, square[j]);
  }
}

// sums [2, C]: the mean of y, and the sum of squared distances from it.
template <class T>
static void sum_rows(const NormRows& r, float* sums) {
  int64_t c = 0;
  for (; c + 4 * kWidth <= r.channels; c += 4 * kWidth) sum_channels<T, 4>(r, c, sums);
  for (; c < r.channels; c += kWidth) sum_channels<T, 1>(r, c, sums);
}

// Element i of the rows; returns v after the ReLU.
template <class T>
VAEOPS_INLINE F norm_one(const NormForward& r, F mean, F scale, F bias, int64_t i) {
  F v = (load(static_cast<const T*>(r.y) + i) - mean) * scale + bias;
  if (r.before != nullptr) store(r.before + i, v);
  v = at_least(v, 0);
  if (r.after != nullptr) store(r.after + i, v);
  if (r.x != nullptr && !r.pools) store(static_cast<T*>(r.x) + i, v);
  return v;
}

template <class T, int V>
VAEOPS_INLINE void norm_channels(const NormForward& r, int64_t c) {
  const int64_t step = r.channels, row = r.width * step, windows = r.pools && r.rows == 2 ? r.width / 2 : 0;
  const NormConstants<V> k = norm_constants<V>(r, c);
  for (int64_t p = 0; p < windows; ++p) {
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) {
      const int64_t at = p * step + c + j * kWidth, i = at + p * step;
      const auto one = [&](int64_t element) { return norm_one<T>(r, k.mean[j], k.scale[j], k.bias[j], element); };
      const F most = greater(greater(one(i), one(i + step)), greater(one(i + row), one(i + row + step)));
      if (r.pooled != nullptr) store(r.pooled + at, most);
      if (r.x != nullptr) store(static_cast<T*>(r.x) + at, most);
    }
  }
  for (int64_t y = 0; y < r.rows; ++y) {
    for (int64_t x = 2 * windows; x < r.width; ++x) {
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) {
        norm_one<T>(r, k.mean[j], k.scale[j], k.bias[j], y * row + x * step + c + j * kWidth);
      }
    }
  }
}

template <class T>
static void norm_rows(const NormForward& r) {
  int64_t c = 0;
  for (; c + 4 * kWidth <= r.channels; c += 4 * kWidth) norm_channels<T, 4>(r, c);
  for (; c < r.channels; c += kWidth) norm_channels<T, 1>(r, c);
}

struct NormSums {
  F g, product;
};

// Element i of the rows, of channels from c on: y - mean and v of it, g at v after its ReLU.
template <class T, bool kSums>
VAEOPS_INLINE void norm_one_backward(const NormBackward& r, int64_t c, int64_t i, F scale, F centred, F v, F g,
                                     NormSums& sums) {
  if (r.after != nullptr) g = g + load(r.after + i);
  g = select(above(v, set1(0)), g, set1(0));
  if (r.before != nullptr) g = g + load(r.before + i);
  if (kSums) {
    sums.g = sums.g + g;
    sums.product = sums.product + g * centred;
  } else {
    store(static_cast<T*>(r.gx) + i, scale * (g - load(r.shift + c) - load(r.slope + c) * centred));
  }
}

template <class T, int V, bool kSums>
VAEOPS_INLINE void norm_channels_backward(const NormBackward& r, int64_t first) {
  const T* const y = static_cast<const T*>(r.y);
  const T* const g = static_cast<const T*>(r.x);
  const int64_t step = r.channels, row = r.width * step, windows = r.pools && r.rows == 2 ? r.width / 2 : 0;
  const NormConstants<V> k = norm_constants<V>(r, first);
  const F zero = set1(0);
  NormSums sums[V];
#pragma GCC unroll 4
  for (int j = 0; j < V; ++j) sums[j] = {zero, zero};
  for (int64_t p = 0; p < windows; ++p) {
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) {
      const int64_t c = first + j * kWidth, at = p * step + c, i = at + p * step;
      const int64_t place[4] = {i, i + step, i + row, i + row + step};
      F centred[4], v[4];
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) {
        centred[n] = load(y + place[n]) - k.mean[j];
        v[n] = centred[n] * k.scale[j] + k.bias[j];
      }
      F given = g != nullptr ? load(g + at) : zero;
      if (r.pooled != nullptr) given = given + load(r.pooled + at);
      // To the first of equals, or to the last NaN, as the forward pass takes it.
      const Mask right = above(v[1], v[0]), right_below = above(v[3], v[2]);
      const Mask low = above(greater(v[2], v[3]), greater(v[0], v[1]));
      const F upper = select(low, zero, given), lower = select(low, given, zero);
      const F to[4] = {select(right, zero, upper), select(right, upper, zero), select(right_below, zero, lower),
                       select(right_below, lower, zero)};
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) {
        norm_one_backward<T, kSums>(r, c, place[n], k.scale[j], centred[n], v[n], to[n], sums[j]);
      }
    }
  }
  for (int64_t line = 0; line < r.rows; ++line) {
    for (int64_t x = 2 * windows; x < r.width; ++x) {
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) {
        const int64_t c = first + j * kWidth, i = line * row + x * step + c;
        const F centred = load(y + i) - k.mean[j], given = g != nullptr && !r.pools ? load(g + i) : zero;
        norm_one_backward<T, kSums>(r, c, i, k.scale[j], centred, centred * k.scale[j] + k.bias[j], given, sums[j]);
      }
    }
  }
#pragma GCC unroll 4
  for (int j = 0; kSums && j < V; ++j) {
    store(r.sums + first + j * kWidth, sums[j].g);
    store(r.sums + step + first + j * kWidth, sums[j].product);
  }
}

template <class T, bool kSums>
static void norm_rows_backward(const NormBackward& r) {
  int64_t c = 0;
  for (; c + 4 * kWidth <= r.channels; c += 4 * kWidth) norm_channels_backward<T, 4, kSums>(r, c);
  for (; c < r.channels; c += kWidth) norm_channels_backward<T, 1, kSums>(r, c);
}
