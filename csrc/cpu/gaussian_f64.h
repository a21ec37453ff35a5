// The Gaussian step in fp64, element by element: for gradcheck and reference runs, not for speed. Noise stays fp32.
#pragma once
#include <cmath>

#include "cpu/gaussian_tiles.h"

namespace vaeops::cpu {

// expm1(x) - x, as its series near 0
inline double expm1_gap(double x) {
  if (!(std::fabs(x) < 0.5)) return std::expm1(x) - x;
  double series = 0;
  for (int k = 17; k > 1; --k) {
    double factorial = 1;
    for (int i = 2; i <= k; ++i) factorial *= i;
    series = (series + 1 / factorial) * x;
  }
  return series * x;
}

inline double log_variance(double rho, Param param) {
  return param == Param::logvar ? rho : 2 * (param == Param::logstd ? rho : std::log(rho));
}
inline double deviation(double rho, Param param) {
  return param == Param::std ? rho : std::exp(param == Param::logvar ? rho / 2 : rho);
}
// d log sigma^2 / d rho
inline double chain(double rho, Param param) {
  return param == Param::logvar ? 1 : param == Param::logstd ? 2 : 2 / rho;
}
inline double clamp(double rho, const TileOptions<double>& o) {
  if (!o.clamped) return rho;
  return rho < o.clamp_lo ? o.clamp_lo : rho > o.clamp_hi ? o.clamp_hi : rho;
}

// One element's value to where the tile wants it; `lanes` are the running sums of the present row.
inline void deliver(const Sink<double>& sink, int64_t i, double value, double (&lanes)[kLanes]) {
  if (sink.elements != nullptr) sink.elements[i] = value;
  if (sink.lanes != nullptr) sink.lanes[i % kLanes] += value;
  if (sink.row_sums == nullptr) return;
  lanes[i % kLanes] += value;
  if ((i + 1) % sink.row == 0) {
    sink.row_sums[i / sink.row] = sum_lanes(lanes);
    for (double& lane : lanes) lane = 0;
  }
}

inline void forward(const ForwardTile<double>& t, const TileOptions<double>& o) {
  double lanes[kLanes] = {};
  for (int64_t i = 0; i < t.n; ++i) {
    const double mu = t.mu[i], rho = clamp(t.rho[i], o), lv = log_variance(rho, o.param);
    if (t.noise.eps != nullptr) t.z[i] = mu + o.temperature * deviation(rho, o.param) * t.noise.eps[i];
    double kl;
    if (t.prior_mu != nullptr) {
      const double d = (mu - t.prior_mu[i]) / deviation(t.prior_rho[i], o.param);
      kl = 0.5 * (d * d + expm1_gap(lv - log_variance(t.prior_rho[i], o.param)));
    } else {
      kl = 0.5 * (mu * mu + expm1_gap(lv));
    }
    deliver(t.kl, i, kl, lanes);
  }
}

inline void backward(const BackwardTile<double>& t, const TileOptions<double>& o) {
  for (int64_t i = 0; i < t.n; ++i) {
    const double mu = t.mu[i], raw = t.rho[i], rho = clamp(raw, o), lv = log_variance(rho, o.param);
    const double w = t.gkl == nullptr ? t.weight : t.gkl[t.row > 0 ? i / t.row : i], slope = chain(rho, o.param);
    double g_mu = 0, g_rho = 0, g_prior_mu = 0, g_prior_rho = 0;
    if (t.has_gkl && t.prior_mu != nullptr) {
      const double s = deviation(t.prior_rho[i], o.param), d = (mu - t.prior_mu[i]) / s;
      const double growth = std::expm1(lv - log_variance(t.prior_rho[i], o.param));
      g_mu = w * d / s;
      g_rho = 0.5 * w * slope * growth;
      g_prior_mu = -g_mu;
      g_prior_rho = -0.5 * w * chain(t.prior_rho[i], o.param) * (growth + d * d);
    } else if (t.has_gkl) {
      g_mu = w * mu;
      g_rho = 0.5 * w * slope * std::expm1(lv);
    }
    if (t.gprior_mu != nullptr) {
      t.gprior_mu[i] = g_prior_mu;
      t.gprior_rho[i] = g_prior_rho;
    }
    if (t.gz != nullptr) {
      const double shift = t.gz[i] * o.temperature * t.noise.eps[i];
      g_mu += t.gz[i];
      g_rho += o.param == Param::std ? shift : 0.5 * slope * shift * deviation(rho, o.param);
    }
    t.gmu[i] = g_mu;
    t.grho[i] = o.clamped && (raw < o.clamp_lo || raw > o.clamp_hi) ? 0.0 : g_rho;
  }
}

inline void log_prob(const LogProbTile<double>& t, Param param) {
  double lanes[kLanes] = {};
  for (int64_t i = 0; i < t.n; ++i) {
    const double d = (t.x[i] - t.mu[i]) / deviation(t.rho[i], param);
    const double value = -0.5 * (d * d + log_variance(t.rho[i], param) + 1.8378770664093454836);  // log 2 pi
    deliver(t.out, i, value, lanes);
  }
}

inline void log_prob_backward(const LogProbTile<double>& t, Param param) {
  for (int64_t i = 0; i < t.n; ++i) {
    const double s = deviation(t.rho[i], param), d = (t.x[i] - t.mu[i]) / s;
    const double w = t.grad != nullptr ? t.grad[i] : t.weight;
    t.gx[i] = -w * d / s;
    t.gmu[i] = w * d / s;
    t.grho[i] = 0.5 * w * chain(t.rho[i], param) * (d * d - 1);
  }
}

}  // namespace vaeops::cpu
