// Reconstruction losses on contiguous tiles, for one instruction set. No include guard: see foreach_isa.h.

#include "cpu/exp_log.h"
//
#include "cpu/lane_sums.h"

using Options = ReconOptions<float>;

template <class S>
VAEOPS_INLINE F load_target(const S* from, const Options&) {
  return load(from);
}
// t / levels, correctly rounded.
VAEOPS_INLINE F load_target(const uint8_t* from, const Options& o) {
  const F t = load(from), inverse = set1(1.0f / o.levels), q = t * inverse;
  return fma(fnma(q, set1(o.levels), t), inverse, q);
}

// Ends a > b of the level's interval in units of the scale.
VAEOPS_INLINE void interval(F p, F t, const Options& o, F& a, F& b) {
  const F middle = (t - p) * set1(o.inverse), half = set1(o.half_level * o.inverse);
  a = middle + half;
  b = middle - half;
}
VAEOPS_INLINE Mask lowest(F t, const Options& o) { return less(t, set1(o.half_level)); }
VAEOPS_INLINE Mask highest(F t, const Options& o) { return less(set1(1.0f - o.half_level), t); }

VAEOPS_INLINE F sign_of(F d, F magnitude) {
  const F zero = set1(0.0f);
  return select(less(zero, d), magnitude, select(less(d, zero), zero - magnitude, zero));
}

template <ReconKind kKind>
VAEOPS_INLINE F element(F p, F t, const Options& o) {
  const F zero = set1(0.0f), one = set1(1.0f), d = p - t;
  if constexpr (kKind == ReconKind::bce) {
    const F on = at_least(log(p), -100.0f), off = at_least(log_one_minus(p), -100.0f);
    return (t - one) * off - t * on;
  } else if constexpr (kKind == ReconKind::bce_logits) {
    // max(p, 0) - p t = |p| times the share of the target on p's wrong side; nothing there costs nothing, even inf.
    const F size = absolute(p), wrong = select(less(zero, p), one - t, t);
    return select(equal(wrong, zero), zero, size * wrong) + softplus_of_negative(size);
  } else if constexpr (kKind == ReconKind::mse) {
    return d * d;
  } else if constexpr (kKind == ReconKind::half_mse) {
    return set1(0.5f) * (d * d);
  } else if constexpr (kKind == ReconKind::l1) {
    return absolute(d);
  } else if constexpr (kKind == ReconKind::huber) {
    const F size = absolute(d), near = at_most(size, o.scale);
    return near * fnma(near, set1(0.5f), size);
  } else if constexpr (kKind == ReconKind::gaussian_nll) {
    const F z = d * set1(o.inverse);
    return fma(set1(0.5f) * z, z, set1(o.constant));
  } else if constexpr (kKind == ReconKind::laplace_nll) {
    return fma(absolute(d), set1(o.inverse), set1(o.constant));
  } else {
    F a, b;
    interval(p, t, o, a, b);
    const Mask low = lowest(t, o), high = highest(t, o);
    const F above = select(high, zero, softplus(zero - a)), below = select(low, zero, softplus(b));
    return above + below + select(low, zero, select(high, zero, set1(o.constant)));
  }
}

// d element / d p
template <ReconKind kKind>
VAEOPS_INLINE F slope(F p, F t, const Options& o) {
  const F zero = set1(0.0f), one = set1(1.0f), d = p - t;
  if constexpr (kKind == ReconKind::bce) {
    return d / at_least(p * (one - p), 1e-12f);
  } else if constexpr (kKind == ReconKind::bce_logits) {
    return sigmoid(p) - t;
  } else if constexpr (kKind == ReconKind::mse) {
    return d + d;
  } else if constexpr (kKind == ReconKind::half_mse) {
    return d;
  } else if constexpr (kKind == ReconKind::l1) {
    return sign_of(d, one);
  } else if constexpr (kKind == ReconKind::huber) {
    return at_least(at_most(d, o.scale), -o.scale);
  } else if constexpr (kKind == ReconKind::gaussian_nll) {
    return (d * set1(o.inverse)) * set1(o.inverse);
  } else if constexpr (kKind == ReconKind::laplace_nll) {
    return sign_of(d, set1(o.inverse));
  } else {
    F a, b;
    interval(p, t, o, a, b);
    const F up = select(highest(t, o), zero, sigmoid(zero - a)), down = select(lowest(t, o), zero, sigmoid(b));
    return (up - down) * set1(o.inverse);
  }
}

template <ReconKind kKind, bool kSlope>
VAEOPS_INLINE void evaluate(const F (&p)[kVectors], const F (&t)[kVectors], const Options& o, F (&out)[kVectors]) {
  for (int v = 0; v < kVectors; ++v) out[v] = kSlope ? slope<kKind>(p[v], t[v], o) : element<kKind>(p[v], t[v], o);
}

// As an integer: the address may lie past the end, where a pointer may not.
VAEOPS_INLINE void prefetch(const void* from, size_t bytes) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(from) + bytes + 2048));
}

// The 64 elements, or slopes, from i on. An element of weight 0 yields 0, whatever it holds.
template <bool kSlope, class T, class S>
VAEOPS_INLINE void block(const ReconTile<T, S>& tile, int64_t i, const Options& o, F (&out)[kVectors]) {
  // The hardware's own prefetch stops where a 4 KiB page ends.
  for (size_t line = 0; line < kBlock * sizeof(T); line += 64) prefetch(tile.pred + i, line);
  for (size_t line = 0; line < kBlock * sizeof(S); line += 64) prefetch(tile.target + i, line);
  F p[kVectors], t[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    p[v] = load(tile.pred + i + v * kWidth);
    t[v] = load_target(tile.target + i + v * kWidth, o);
  }
  switch (o.kind) {
    case ReconKind::bce:
      evaluate<ReconKind::bce, kSlope>(p, t, o, out);
      break;
    case ReconKind::bce_logits:
      evaluate<ReconKind::bce_logits, kSlope>(p, t, o, out);
      break;
    case ReconKind::mse:
      evaluate<ReconKind::mse, kSlope>(p, t, o, out);
      break;
    case ReconKind::half_mse:
      evaluate<ReconKind::half_mse, kSlope>(p, t, o, out);
      break;
    case ReconKind::l1:
      evaluate<ReconKind::l1, kSlope>(p, t, o, out);
      break;
    case ReconKind::huber:
      evaluate<ReconKind::huber, kSlope>(p, t, o, out);
      break;
    case ReconKind::gaussian_nll:
      evaluate<ReconKind::gaussian_nll, kSlope>(p, t, o, out);
      break;
    case ReconKind::laplace_nll:
      evaluate<ReconKind::laplace_nll, kSlope>(p, t, o, out);
      break;
    case ReconKind::discretized_logistic:
      evaluate<ReconKind::discretized_logistic, kSlope>(p, t, o, out);
      break;
  }
  if (tile.weight == nullptr) return;
  for (int v = 0; v < kVectors; ++v) {
    const F w = load(tile.weight + i + v * kWidth);
    out[v] = select(equal(w, set1(0.0f)), set1(0.0f), out[v] * w);
  }
}

// The last elements of a tile, from i on, padded to a block.
template <class T, class S>
struct Padded {
  T pred[kBlock] = {}, gpred[kBlock];
  S target[kBlock] = {};
  float weight[kBlock] = {}, grad[kBlock] = {};
  ReconTile<T, S> tile;
  Padded(const ReconTile<T, S>& t, int64_t i) : tile(t) {
    const int64_t rest = t.n - i;
    copy(t.pred + i, pred, rest);
    copy(t.target + i, target, rest);
    if (t.weight != nullptr) copy(t.weight + i, weight, rest);
    if (t.grad != nullptr) copy(t.grad + i, grad, rest);
    tile.pred = pred;
    tile.target = target;
    tile.weight = t.weight == nullptr ? nullptr : weight;
    tile.grad = t.grad == nullptr ? nullptr : grad;
    tile.gpred = gpred;
  }
};

template <class T, class S>
static void forward(const ReconTile<T, S>& t, const Options& o) {
  const Sink<float>& out = t.out;
  F loss[kVectors], lanes[kVectors];
  for (int v = 0; v < kVectors; ++v) lanes[v] = set1(0.0f);
  LaneSums sums;
  sums.start(out.lanes);
  int64_t i = 0;
  for (int64_t end = out.row_sums != nullptr ? out.row : t.n; end <= t.n; end += out.row) {
    while (end - i >= kBlock) {
      for (int64_t stop = end - i < kTile ? end : i + kTile; stop - i >= kBlock; i += kBlock) {
        block<false>(t, i, o, loss);
        for (int v = 0; v < kVectors; ++v) {
          if (out.elements != nullptr) {
            store(out.elements + i + v * kWidth, loss[v]);
          } else {
            lanes[v] = lanes[v] + loss[v];
          }
        }
      }
      sums.add(lanes);
    }
    if (out.row_sums == nullptr) break;
    out.row_sums[end / out.row - 1] = sums.take();
  }
  if (out.lanes != nullptr) copy(sums.totals, out.lanes, kLanes);
  if (i == t.n) return;
  const Padded<T, S> padded(t, i);
  alignas(64) float elements[kBlock];
  block<false>(padded.tile, 0, o, loss);
  for (int v = 0; v < kVectors; ++v) store(elements + v * kWidth, loss[v]);
  if (out.elements != nullptr) copy(elements, out.elements + i, t.n - i);
  if (out.lanes != nullptr) {
    for (int64_t k = 0; k < t.n - i; ++k) out.lanes[k] += elements[k];
  }
}

template <class T, class S>
VAEOPS_INLINE void backward_block(const ReconTile<T, S>& t, int64_t i, const Options& o) {
  F g[kVectors];
  block<true>(t, i, o, g);
  for (int v = 0; v < kVectors; ++v) {
    const int64_t at = i + v * kWidth;
    store(t.gpred + at, g[v] * (t.grad != nullptr ? load(t.grad + at) : set1(t.one_grad)));
  }
}

template <class T, class S>
static void backward(const ReconTile<T, S>& t, const Options& o) {
  int64_t i = 0;
  for (; t.n - i >= kBlock; i += kBlock) backward_block(t, i, o);
  if (i == t.n) return;
  Padded<T, S> padded(t, i);
  backward_block(padded.tile, 0, o);
  copy(padded.gpred, t.gpred + i, t.n - i);
}

// Logits x and counts of kWidth items. An item that is masked out has x = -inf and count 0.
template <class T, class S>
VAEOPS_INLINE void load_items(const MultinomialTile<T, S>& tile, int64_t i, F& x, F& count) {
  x = load(tile.logits + i);
  count = load(tile.target + i);
  if (tile.weight == nullptr) return;
  const F w = load(tile.weight + i);
  if (tile.masked) {
    const Mask out = equal(w, set1(0.0f));
    x = select(out, set1(-__builtin_inff()), x);
    count = select(out, set1(0.0f), count);
  } else {
    count = count * w;
  }
}

template <class T, class S>
struct PaddedItems {
  T logits[kBlock], glogits[kBlock];
  S target[kBlock] = {};
  float weight[kBlock] = {};
  MultinomialTile<T, S> tile;
  PaddedItems(const MultinomialTile<T, S>& t, int64_t i) : tile(t) {
    const int64_t rest = t.n - i;
    const F minus_infinity = set1(-__builtin_inff());
    for (int v = 0; v < kVectors; ++v) store(logits + v * kWidth, minus_infinity);
    copy(t.logits + i, logits, rest);
    copy(t.target + i, target, rest);
    if (t.weight != nullptr) copy(t.weight + i, weight, rest);
    tile.logits = logits;
    tile.target = target;
    tile.weight = t.weight == nullptr ? nullptr : weight;
    tile.glogits = glogits;
    tile.n = kBlock;
  }
};

VAEOPS_INLINE double sum_vectors(const F (&x)[kVectors]) {
  alignas(64) float lanes[kLanes];
  for (int v = 0; v < kVectors; ++v) store(lanes + v * kWidth, x[v]);
  return sum_lanes(lanes);
}

// Whole blocks of a tile: first their largest logit, then, from the first-level cache, the sums.
template <class T, class S>
static RowSums block_sums(const MultinomialTile<T, S>& t, int64_t n) {
  F top[kVectors], sum[kVectors], total[kVectors], drawn[kVectors];
  const F zero = set1(0.0f);
  for (int v = 0; v < kVectors; ++v) top[v] = set1(-__builtin_inff()), sum[v] = total[v] = drawn[v] = zero;
  for (int64_t i = 0; i < n; i += kBlock) {
    for (int v = 0; v < kVectors; ++v) {
      F x, count;
      load_items(t, i + v * kWidth, x, count);
      top[v] = select(less(top[v], x), x, top[v]);
    }
  }
  alignas(64) float lanes[kLanes];
  for (int v = 0; v < kVectors; ++v) store(lanes + v * kWidth, top[v]);
  float largest = lanes[0];
  for (float lane : lanes) largest = lane > largest ? lane : largest;
  if (!(largest - largest == 0)) largest = 0;  // infinite
  for (int64_t i = 0; i < n; i += kBlock) {
    for (int v = 0; v < kVectors; ++v) {
      F x, count;
      load_items(t, i + v * kWidth, x, count);
      x = x - set1(largest);
      sum[v] = sum[v] + exp_parts(x).sigma;
      total[v] = total[v] + count;
      drawn[v] = drawn[v] + select(equal(count, zero), zero, count * x);
    }
  }
  const double counts = sum_vectors(total);
  return {largest, sum_vectors(sum), counts, sum_vectors(drawn) + counts * largest};
}

template <class T, class S>
static RowSums row_sums(const MultinomialTile<T, S>& t) {
  const int64_t whole = t.n / kBlock * kBlock;
  RowSums sums;
  if (whole > 0) sums = block_sums(t, whole);
  if (whole < t.n) sums.merge(block_sums(PaddedItems<T, S>(t, whole).tile, kBlock));
  return sums;
}

template <class T, class S>
VAEOPS_INLINE void multinomial_backward_blocks(const MultinomialTile<T, S>& t, int64_t n) {
  const float high = static_cast<float>(t.lse), low = static_cast<float>(high - high == 0 ? t.lse - high : 0);
  const F total = set1(static_cast<float>(t.total)), grad = set1(static_cast<float>(t.grad));
  const bool drawn = t.total != 0;
  for (int64_t i = 0; i < n; i += kWidth) {
    F x, count;
    load_items(t, i, x, count);
    const F expected = drawn ? total * exp_parts(x - set1(high) - set1(low)).sigma : set1(0.0f);
    F g = grad * (expected - count);
    if (t.masked) g = select(equal(load(t.weight + i), set1(0.0f)), set1(0.0f), g);
    store(t.glogits + i, g);
  }
}

template <class T, class S>
static void multinomial_backward(const MultinomialTile<T, S>& t) {
  const int64_t whole = t.n / kBlock * kBlock;
  multinomial_backward_blocks(t, whole);
  if (whole == t.n) return;
  PaddedItems<T, S> padded(t, whole);
  multinomial_backward_blocks(padded.tile, kBlock);
  copy(padded.glogits, t.glogits + whole, t.n - whole);
}
