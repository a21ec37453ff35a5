// One call of the Gaussian step with random contents, and its fp64 reference, written from the formulas alone.
#pragma once
#include <string>

#include "check.h"
#include "tensors.h"

namespace vaeops::test {

struct Case {
  Sizes shape;
  int batch_ndim = 1;
  Dtype dtype = Dtype::f32;
  Reduction reduction = Reduction::batchmean;
  Param param = Param::logvar;
  bool sampled = true, clamped = false;
  double temperature = 1;
  int64_t streams = 1;
  bool eps_given = false;
  Dtype eps_dtype = Dtype::f32, prior_dtype = Dtype::f32;
  std::vector<bool> prior_kept = {};  // empty: N(0, I)
  Layout layout = Layout::contiguous;
  bool expanded = false;  // mu is broadcast over dim 0

  std::string name() const {
    std::string s = "[";
    for (int64_t d : shape) s += std::to_string(d) + " ";
    s += "] dtype " + std::to_string(int(dtype)) + " reduction " + std::to_string(int(reduction)) + " param " +
         std::to_string(int(param)) + " layout " + std::to_string(int(layout)) + " streams " + std::to_string(streams);
    if (!prior_kept.empty()) {
      s += " prior ";
      for (bool kept : prior_kept) s += kept ? '1' : '0';
    }
    return s + (sampled ? "" : " kl only") + (eps_given ? " eps" : "") + (clamped ? " clamped" : "");
  }
};

struct Problem {
  Case c;
  int64_t n, rows;
  Tensor mu, rho, prior_mu, prior_rho, eps, gz, gkl;
  std::vector<int64_t> seed;

  explicit Problem(const Case& c_, unsigned random_seed = 1) : c(c_) {
    n = product(c.shape);
    rows = product(c.shape, 0, c.batch_ndim);
    std::mt19937 random(random_seed);
    std::vector<bool> mu_kept;
    if (c.expanded) {
      mu_kept.assign(c.shape.size(), true);
      mu_kept[0] = false;
    }
    mu = make(c.shape, c.dtype, c.layout, mu_kept);
    rho = make(c.shape, c.dtype, c.layout);
    fill(mu, random, -2, 2);
    fill_rho(rho, random);
    if (!c.prior_kept.empty()) {
      prior_mu = make(c.shape, c.prior_dtype, Layout::contiguous, c.prior_kept);
      prior_rho = make(c.shape, c.prior_dtype, Layout::contiguous, c.prior_kept);
      fill(prior_mu, random, -1, 1);
      fill_rho(prior_rho, random);
    }
    for (int64_t s = 0; s < 2 * c.streams; ++s) seed.push_back(static_cast<int64_t>(random()) * 0x10001 - (1ll << 40));
    if (c.sampled) {
      gz = make(c.shape, c.dtype, c.layout);
      fill(gz, random, -1, 1);
      if (c.eps_given) {
        eps = make(c.shape, c.eps_dtype);
        fill(eps, random, -3, 3);
      }
    }
    if (c.reduction != Reduction::off) {
      std::vector<bool> kept(c.shape.size());
      for (size_t d = 0; d < kept.size(); ++d) {
        kept[d] = c.reduction == Reduction::none || (c.reduction == Reduction::dim && int(d) >= c.batch_ndim) ||
                  (c.reduction == Reduction::sample && int(d) < c.batch_ndim);
      }
      gkl = make(c.shape, compute(c.dtype), Layout::contiguous, kept);
      fill(gkl, random, -1, 2);
    }
  }
  template <class Random>
  void fill_rho(Tensor& t, Random& random) {
    if (c.param == Param::std) return fill(t, random, 0.3, 2.5);
    if (c.param == Param::logstd) return fill(t, random, -1.5, 1);
    fill(t, random, -3, 2);
  }
  double lo() const { return c.param == Param::std ? 0.5 : -1; }
  double hi() const { return c.param == Param::std ? 1.5 : 0.75; }
  int64_t reduced_n() const {
    return c.reduction == Reduction::off      ? 0
           : c.reduction == Reduction::none   ? n
           : c.reduction == Reduction::dim    ? n / rows
           : c.reduction == Reduction::sample ? rows
                                              : 1;
  }
  // Where element i goes in the reduced KL.
  int64_t reduced_at(int64_t i) const {
    const int64_t length = n / rows;
    return c.reduction == Reduction::none     ? i
           : c.reduction == Reduction::dim    ? i % length
           : c.reduction == Reduction::sample ? i / length
                                              : 0;
  }
  void set(Gaussian& call) const {
    call.param = c.param;
    call.clamped = c.clamped;
    call.clamp_lo = c.clamped ? lo() : -INFINITY;
    call.clamp_hi = c.clamped ? hi() : INFINITY;
    call.temperature = c.temperature;
    call.reduction = c.reduction;
    if (c.sampled && !c.eps_given) call.noise = {seed.data(), c.streams};
  }
};

inline double log_variance(double rho, Param param) {
  return param == Param::logvar ? rho : param == Param::logstd ? 2 * rho : 2 * std::log(rho);
}

// What the reference says, in fp64. `eps` [n] is the noise of the call.
struct Expected {
  std::vector<double> z, kl, gmu, grho, gprior_mu, gprior_rho;

  Expected(const Problem& p, const std::vector<double>& eps, const Sizes& prior_stride, int64_t prior_n)
      : z(p.n), kl(p.reduced_n()), gmu(p.n), grho(p.n), gprior_mu(prior_n), gprior_rho(prior_n) {
    const Case& c = p.c;
    const double scale = c.reduction == Reduction::dim || c.reduction == Reduction::batchmean ? 1.0 / p.rows
                         : c.reduction == Reduction::mean                                     ? 1.0 / p.n
                                                                                              : 1.0;
    std::vector<long double> sums[3] = {std::vector<long double>(kl.size()), std::vector<long double>(gprior_mu.size()),
                                        std::vector<long double>(gprior_rho.size())};
    for (int64_t i = 0; i < p.n; ++i) {
      const double mu = element(c.shape, p.mu, i), raw = element(c.shape, p.rho, i);
      const double rho = c.clamped ? std::fmin(std::fmax(raw, p.lo()), p.hi()) : raw;
      const double lv = log_variance(rho, c.param), sigma = std::exp(lv / 2);
      const double chain = c.param == Param::logvar ? 0.5 : c.param == Param::logstd ? 1 : 1 / rho;
      z[i] = mu + c.temperature * sigma * eps[i];
      if (p.gz.present()) {
        const double gz = element(c.shape, p.gz, i);
        gmu[i] = gz;
        grho[i] = gz * c.temperature * sigma * eps[i] * chain;
      }
      if (c.reduction != Reduction::off) {
        double m = 0, prior_lv = 0, prior_chain = 0;
        if (p.prior_mu.present()) {
          const double prior_rho = element(c.shape, p.prior_rho, i);
          m = element(c.shape, p.prior_mu, i);
          prior_lv = log_variance(prior_rho, c.param);
          prior_chain = c.param == Param::logvar ? 0.5 : c.param == Param::logstd ? 1 : 1 / prior_rho;
        }
        const double s = std::exp(prior_lv / 2), t = (mu - m) / s, growth = std::expm1(lv - prior_lv);
        sums[0][p.reduced_at(i)] += scale * 0.5 * (t * t + growth - (lv - prior_lv));
        const double w = scale * element(c.shape, p.gkl, i);
        gmu[i] += w * t / s;
        grho[i] += w * chain * growth;
        if (p.prior_mu.present()) {
          const int64_t at = offset_of(c.shape, prior_stride, i);
          sums[1][at] -= w * t / s;
          sums[2][at] -= w * prior_chain * (growth + t * t);
        }
      }
      if (c.clamped && (raw < p.lo() || raw > p.hi())) grho[i] = 0;
    }
    kl.assign(sums[0].begin(), sums[0].end());
    gprior_mu.assign(sums[1].begin(), sums[1].end());
    gprior_rho.assign(sums[2].begin(), sums[2].end());
  }
};

// |ours - reference| within `ulps` roundoffs of the compute type at the size of the numbers that went in, and one
// rounding to the result's own type.
inline void compare(const char* what, const Problem& p, const Tensor& ours, const std::vector<double>& reference,
                    const Sizes& stride, const Sizes& shape, double ulps, double size) {
  const double inner = ulps * roundoff(compute(ours.dtype));
  for (size_t i = 0; i < reference.size(); ++i) {
    const double got = ours.at(offset_of(shape, stride, static_cast<int64_t>(i))), want = reference[i];
    const double allowed =
        inner * (size + std::fabs(want)) + roundoff(ours.dtype) * std::fabs(want) + smallest(ours.dtype);
    CHECK(std::fabs(got - want) <= allowed, "%s[%zu]: %.9g, should be %.9g (allowed %.2g): %s", what, i, got, want,
          allowed, p.c.name().c_str());
  }
}

}  // namespace vaeops::test
