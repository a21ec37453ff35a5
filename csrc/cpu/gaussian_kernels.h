// The Gaussian step on contiguous tiles, for one instruction set. No include guard: see foreach_isa.h.
//
// The usual call (log-variance, prior N(0, I), temperature 1) is compiled apart (kPlain), for noise drawn here and for
// noise given, so that everything it needs stays in registers; the general one tests flags that do not change within a
// tile. The tile functions are not inlined: side by side in one function they would share its registers.
enum class Noisy { drawn, given, either };  // either: t.noise tells, and there may be none

using Options = TileOptions<float>;

#include "cpu/exp_log.h"
//
#include "cpu/lane_sums.h"

VAEOPS_INLINE F expm1_twice(const Exp& e) { return fma(e.u, e.u, e.u + e.u); }    // expm1(2h)
VAEOPS_INLINE F gap_twice(const Exp& e) { return fma(e.u, e.u, e.gap + e.gap); }  // expm1(2h) - 2h

VAEOPS_INLINE F log_variance(F rho, Param param) {
  if (param == Param::logvar) return rho;
  if (param == Param::logstd) return rho + rho;
  const F half = log(rho);
  return half + half;
}

// 1 / s of a prior. exp's argument stops at 88, so that t = (mu - m) / s stays 0 where mu = m.
VAEOPS_INLINE F inverse_sigma(F rho, Param param) {
  if (param == Param::std) return set1(1.0f) / rho;
  const F h = param == Param::logvar ? rho * set1(0.5f) : rho;
  return exp_parts(at_most(set1(0.0f) - h, 88.0f)).sigma;
}

template <Noisy kNoisy>
VAEOPS_INLINE void next_noise(const TileNoise<float>& from, int64_t i, Normals& normals, F (&noise)[kVectors]) {
  if (kNoisy == Noisy::drawn || (kNoisy == Noisy::either && from.drawn)) {
    normals.next(noise);
  } else if (kNoisy == Noisy::given || from.eps != nullptr) {
    for (int v = 0; v < kVectors; ++v) noise[v] = load(from.eps + i + v * kWidth);
  }
}

VAEOPS_INLINE F clamp(F rho, const Options& o) { return at_least(at_most(rho, o.clamp_hi), o.clamp_lo); }

template <bool kPlain, class T>
VAEOPS_INLINE void forward_block(const ForwardTile<T>& t, int64_t i, const Options& o, const F* noise,
                                 F (&lanes)[kVectors], float* elements) {
  const bool plain = kPlain;
  const Param param = plain ? Param::logvar : o.param;
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const int64_t at = i + v * kWidth;
    const F mu = load(t.mu + at);
    F rho = load(t.rho + at);
    if (o.clamped) rho = clamp(rho, o);
    const F lv = log_variance(rho, param);
    const Exp e = exp_parts(lv * set1(0.5f));
    if (plain || t.noise.any()) {
      const F sigma = !plain && param == Param::std ? rho : e.sigma;
      store(t.z + at, fma(plain ? sigma : sigma * set1(o.temperature), noise[v], mu));
    }
    if (!plain && elements == nullptr && !t.kl.any()) continue;
    F twice;  // 2 KL
    if (!plain && t.prior_mu != nullptr) {
      const F prior_rho = load(t.prior_rho + at);
      const F d = (mu - load(t.prior_mu + at)) * inverse_sigma(prior_rho, param);
      twice = fma(d, d, gap_twice(exp_parts((lv - log_variance(prior_rho, param)) * set1(0.5f))));
    } else {
      twice = fma(mu, mu, gap_twice(e));
    }
    if (!plain && elements != nullptr) {
      store(elements + v * kWidth, twice * set1(0.5f));
    } else {
      lanes[v] = fma(twice, set1(0.5f), lanes[v]);  // halving is exact: the same bits as the branch above
    }
  }
}

template <Noisy kNoisy, class T>
static __attribute__((noinline)) void forward_tile(const ForwardTile<T>& t, const Options& o) {
  constexpr bool kPlain = kNoisy != Noisy::either;
  Normals normals;
  if (kNoisy != Noisy::given && t.noise.drawn) normals.start(t.noise.key, t.noise.counter);
  const Sink<float>& kl = t.kl;
  F noise[kVectors], lanes[kVectors];
  for (int v = 0; v < kVectors; ++v) lanes[v] = set1(0.0f);
  LaneSums sums;
  sums.start(kl.lanes);
  int64_t i = 0;
  for (int64_t end = kl.row_sums != nullptr ? kl.row : t.n; end <= t.n; end += kl.row) {
    while (end - i >= kBlock) {
      for (int64_t stop = end - i < kTile ? end : i + kTile; stop - i >= kBlock; i += kBlock) {
        next_noise<kNoisy>(t.noise, i, normals, noise);
        forward_block<kPlain>(t, i, o, noise, lanes, kl.elements == nullptr ? nullptr : kl.elements + i);
      }
      sums.add(lanes);
    }
    if (kl.row_sums == nullptr) break;
    kl.row_sums[end / kl.row - 1] = sums.take();
  }
  if (kl.lanes != nullptr) copy(sums.totals, kl.lanes, kLanes);
  if (i == t.n) return;
  // The rest, padded to a block with what is harmless in every parametrisation.
  const int64_t rest = t.n - i;
  T mu[kBlock] = {}, rho[kBlock] = {}, z[kBlock];
  float prior_mu[kBlock] = {}, prior_rho[kBlock] = {}, eps[kBlock] = {}, elements[kBlock];
  ForwardTile<T> padded = t;
  copy(t.mu + i, mu, rest);
  copy(t.rho + i, rho, rest);
  padded.mu = mu;
  padded.rho = rho;
  padded.z = z;
  if (t.prior_mu != nullptr) {
    copy(t.prior_mu + i, prior_mu, rest);
    copy(t.prior_rho + i, prior_rho, rest);
    padded.prior_mu = prior_mu;
    padded.prior_rho = prior_rho;
  }
  if (t.noise.eps != nullptr) {
    copy(t.noise.eps + i, eps, rest);
    padded.noise.eps = eps;
  }
  next_noise<kNoisy>(padded.noise, 0, normals, noise);
  forward_block<false>(padded, 0, o, noise, lanes, kl.any() ? elements : nullptr);
  if (t.noise.any()) copy(z, t.z + i, rest);
  if (kl.elements != nullptr) copy(elements, kl.elements + i, rest);
  if (kl.lanes != nullptr) {
    for (int64_t k = 0; k < rest; ++k) kl.lanes[k] += elements[k];
  }
}

template <class T>
static void forward(const ForwardTile<T>& t, const Options& o) {
  const bool plain = o.param == Param::logvar && o.temperature == 1.0f && t.prior_mu == nullptr && t.noise.any() &&
                     (t.kl.lanes != nullptr || t.kl.row_sums != nullptr);
  !plain          ? forward_tile<Noisy::either>(t, o)
  : t.noise.drawn ? forward_tile<Noisy::drawn>(t, o)
                  : forward_tile<Noisy::given>(t, o);
}

template <bool kPlain, class T>
VAEOPS_INLINE void backward_block(const BackwardTile<T>& t, int64_t i, const Options& o, const F* noise,
                                  const float* gkl, F weight) {
  const bool plain = kPlain;
  const Param param = plain ? Param::logvar : o.param;
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const int64_t at = i + v * kWidth;
    const F mu = load(t.mu + at), raw = load(t.rho + at);
    const F rho = o.clamped ? clamp(raw, o) : raw;
    const F lv = log_variance(rho, param);
    const Exp e = exp_parts(lv * set1(0.5f));
    const F w = gkl != nullptr ? load(gkl + at) : weight;
    // g_rho gathers twice the gradient of log sigma^2, which is that of log sigma.
    F g_mu = set1(0.0f), g_rho = set1(0.0f);
    if (!plain && !t.has_gkl) {
      if (t.gprior_mu != nullptr) {
        store(t.gprior_mu + at, g_mu);
        store(t.gprior_rho + at, g_rho);
      }
    } else if (!plain && t.prior_mu != nullptr) {
      const F prior_rho = load(t.prior_rho + at);
      const F inverse = inverse_sigma(prior_rho, param);
      const F d = (mu - load(t.prior_mu + at)) * inverse;
      const F growth = expm1_twice(exp_parts((lv - log_variance(prior_rho, param)) * set1(0.5f)));
      g_mu = w * (d * inverse);
      g_rho = w * growth;
      if (t.gprior_mu != nullptr) {
        store(t.gprior_mu + at, set1(0.0f) - g_mu);
        const F g_log_s = set1(0.0f) - w * fma(d, d, growth);
        store(t.gprior_rho + at, param == Param::logvar   ? g_log_s * set1(0.5f)
                                 : param == Param::logstd ? g_log_s
                                                          : g_log_s * inverse);
      }
    } else {
      g_mu = w * mu;
      g_rho = w * expm1_twice(e);
    }
    if (!plain && param == Param::std && t.has_gkl) g_rho = g_rho / rho;
    if (plain || t.gz != nullptr) {
      const F gz = load(t.gz + at);
      const F scaled = plain ? gz : gz * set1(o.temperature);
      g_mu = plain ? fma(w, mu, gz) : g_mu + gz;
      g_rho = fma(!plain && param == Param::std ? scaled : scaled * e.sigma, noise[v], g_rho);
    }
    if (param == Param::logvar) g_rho = g_rho * set1(0.5f);
    if (o.clamped) {
      const F kept = select(less(raw, set1(o.clamp_lo)), set1(0.0f), g_rho);
      g_rho = select(less(set1(o.clamp_hi), raw), set1(0.0f), kept);
    }
    store(t.gmu + at, g_mu);
    store(t.grho + at, g_rho);
  }
}

template <Noisy kNoisy, class T>
static __attribute__((noinline)) void backward_tile(const BackwardTile<T>& t, const Options& o) {
  constexpr bool kPlain = kNoisy != Noisy::either;
  Normals normals;
  if (kNoisy != Noisy::given && t.noise.drawn) normals.start(t.noise.key, t.noise.counter);
  F noise[kVectors];
  int64_t i = 0;
  const bool rows = t.row > 0;
  const float* const gkl = rows ? nullptr : t.gkl;
  for (int64_t end = rows ? t.row : t.n; end <= t.n; end += t.row) {
    const F weight = set1(rows ? t.gkl[end / t.row - 1] : t.weight);
    for (; end - i >= kBlock; i += kBlock) {
      next_noise<kNoisy>(t.noise, i, normals, noise);
      backward_block<kPlain>(t, i, o, noise, gkl, weight);
    }
    if (!rows) break;
  }
  if (i == t.n) return;
  const int64_t rest = t.n - i;
  T gz[kBlock] = {}, mu[kBlock] = {}, rho[kBlock] = {}, gmu[kBlock], grho[kBlock];
  float gkl_rest[kBlock] = {}, prior_mu[kBlock] = {}, prior_rho[kBlock] = {}, eps[kBlock] = {};
  float gprior_mu[kBlock], gprior_rho[kBlock];
  BackwardTile<T> padded = t;
  copy(t.mu + i, mu, rest);
  copy(t.rho + i, rho, rest);
  padded.mu = mu;
  padded.rho = rho;
  padded.gmu = gmu;
  padded.grho = grho;
  if (t.gz != nullptr) {
    copy(t.gz + i, gz, rest);
    padded.gz = gz;
  }
  if (gkl != nullptr) copy(gkl + i, gkl_rest, rest);
  if (t.prior_mu != nullptr) {
    copy(t.prior_mu + i, prior_mu, rest);
    copy(t.prior_rho + i, prior_rho, rest);
    padded.prior_mu = prior_mu;
    padded.prior_rho = prior_rho;
  }
  if (t.noise.eps != nullptr) {
    copy(t.noise.eps + i, eps, rest);
    padded.noise.eps = eps;
  }
  if (t.gprior_mu != nullptr) {
    padded.gprior_mu = gprior_mu;
    padded.gprior_rho = gprior_rho;
  }
  next_noise<kNoisy>(padded.noise, 0, normals, noise);
  backward_block<kPlain>(padded, 0, o, noise, gkl != nullptr ? gkl_rest : nullptr, set1(t.weight));
  copy(gmu, t.gmu + i, rest);
  copy(grho, t.grho + i, rest);
  if (t.gprior_mu != nullptr) {
    copy(gprior_mu, t.gprior_mu + i, rest);
    copy(gprior_rho, t.gprior_rho + i, rest);
  }
}

template <class T>
static void backward(const BackwardTile<T>& t, const Options& o) {
  const bool plain = o.param == Param::logvar && o.temperature == 1.0f && t.prior_mu == nullptr && t.noise.any() &&
                     t.gz != nullptr && t.has_gkl;
  !plain          ? backward_tile<Noisy::either>(t, o)
  : t.noise.drawn ? backward_tile<Noisy::drawn>(t, o)
                  : backward_tile<Noisy::given>(t, o);
}

// log N(x; mu, sigma^2) = -(t^2 + log sigma^2 + log 2 pi) / 2, t = (x - mu) / sigma
template <class T>
VAEOPS_INLINE void log_prob_block(const LogProbTile<T>& t, int64_t i, Param param, float* elements) {
  for (int v = 0; v < kVectors; ++v) {
    const int64_t at = i + v * kWidth;
    const F rho = load(t.rho + at);
    const F d = (load(t.x + at) - load(t.mu + at)) * inverse_sigma(rho, param);
    store(elements + v * kWidth, set1(-0.5f) * (fma(d, d, log_variance(rho, param)) + set1(1.8378770664093453f)));
  }
}

template <class T>
static void log_prob(const LogProbTile<T>& t, Param param) {
  alignas(64) float elements[kBlock];
  F lanes[kVectors];
  for (int v = 0; v < kVectors; ++v) lanes[v] = set1(0.0f);
  LaneSums sums;
  sums.start(t.out.lanes);
  const int64_t row = t.out.row_sums != nullptr ? t.out.row : t.n;
  int64_t i = 0;
  for (int64_t start = 0; i < t.n; i += kBlock) {
    const int64_t count = t.n - i < kBlock ? t.n - i : kBlock;
    if (count == kBlock) {
      log_prob_block(t, i, param, elements);
    } else {
      T x[kBlock] = {}, mu[kBlock] = {}, rho[kBlock] = {};
      LogProbTile<T> padded = t;
      copy(t.x + i, x, count);
      copy(t.mu + i, mu, count);
      copy(t.rho + i, rho, count);
      padded.x = x;
      padded.mu = mu;
      padded.rho = rho;
      log_prob_block(padded, 0, param, elements);
      for (int64_t k = count; k < kBlock; ++k) elements[k] = 0;
    }
    if (t.out.elements != nullptr) copy(elements, t.out.elements + i, count);
    for (int v = 0; v < kVectors; ++v) lanes[v] = lanes[v] + load(elements + v * kWidth);
    const bool row_ends = i + kBlock - start >= row;
    if (row_ends || (i + kBlock - start) % kTile == 0) sums.add(lanes);
    if (t.out.row_sums != nullptr && row_ends) {
      t.out.row_sums[i / row] = sums.take();
      start = i + kBlock;
    }
  }
  if (t.out.lanes != nullptr) copy(sums.totals, t.out.lanes, kLanes);
}

// With w the element's gradient: d x = -w t / sigma, d mu = w t / sigma, d log sigma = w (t^2 - 1).
template <class T>
VAEOPS_INLINE void log_prob_backward_block(const LogProbTile<T>& t, int64_t i, Param param) {
  for (int v = 0; v < kVectors; ++v) {
    const int64_t at = i + v * kWidth;
    const F rho = load(t.rho + at), inverse = inverse_sigma(rho, param);
    const F d = (load(t.x + at) - load(t.mu + at)) * inverse;
    const F w = t.grad != nullptr ? load(t.grad + at) : set1(t.weight);
    const F g = w * (d * inverse), g_log_sigma = w * fma(d, d, set1(-1.0f));
    store(t.gx + at, set1(0.0f) - g);
    store(t.gmu + at, g);
    store(t.grho + at, param == Param::logvar   ? g_log_sigma * set1(0.5f)
                       : param == Param::logstd ? g_log_sigma
                                                : g_log_sigma * inverse);
  }
}

template <class T>
static void log_prob_backward(const LogProbTile<T>& t, Param param) {
  int64_t i = 0;
  for (; t.n - i >= kBlock; i += kBlock) log_prob_backward_block(t, i, param);
  if (i == t.n) return;
  const int64_t rest = t.n - i;
  T x[kBlock] = {}, mu[kBlock] = {}, rho[kBlock] = {}, gx[kBlock], gmu[kBlock], grho[kBlock];
  float grad[kBlock] = {};
  LogProbTile<T> padded = t;
  copy(t.x + i, x, rest);
  copy(t.mu + i, mu, rest);
  copy(t.rho + i, rho, rest);
  padded.x = x;
  padded.mu = mu;
  padded.rho = rho;
  padded.gx = gx;
  padded.gmu = gmu;
  padded.grho = grho;
  if (t.grad != nullptr) {
    copy(t.grad + i, grad, rest);
    padded.grad = grad;
  }
  log_prob_backward_block(padded, 0, param);
  copy(gx, t.gx + i, rest);
  copy(gmu, t.gmu + i, rest);
  copy(grho, t.grho + i, rest);
}
