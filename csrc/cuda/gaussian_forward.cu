// z = mu + temperature * sigma * eps and the KL divergence, in one pass. Formulas: vaeops/ref/gaussian.py.
#include "gaussian.cuh"

namespace vaeops::cuda {
namespace {

template <class C>
struct Element {
  C z, kl;
};

template <bool kPrior, class C>
__device__ __forceinline__ Element<C> element(const Prepared<GaussianForward, C>& call, C mu, C rho, C eps, C prior_mu,
                                              C prior_rho) {
  rho = call.clamp(rho);
  const C lv = log_variance(rho, call.param);
  const Exp<C> q = exp_parts(lv);
  const C sigma = call.param == Param::std ? rho : q.sigma;
  Element<C> out;
  out.z = fused(call.temp * sigma, eps, mu);
  if (kPrior) {
    const C prior_lv = log_variance(prior_rho, call.param);
    const C t = (mu - prior_mu) * reciprocal_sigma(prior_rho, prior_lv, call.param);
    out.kl = C(0.5) * fused(t, t, exp_parts(lv - prior_lv).gap);
  } else {
    out.kl = C(0.5) * fused(mu, mu, q.gap);
  }
  return out;
}

// A Step of fold.cuh. kLinear: whole chunks in linear memory; otherwise any strides, and kPrior is decided at run time.
template <class Storage, bool kLinear, bool kPrior>
struct Forward {
  using T = Storage;
  using C = Compute<T>;
  using Call = Prepared<GaussianForward, C>;
  static constexpr int kOutputs = 1, kBlocks = sizeof(C) == 8 ? 2 : 4, kFoldBlocks = sizeof(C) == 8 || kPrior ? 2 : 3;

  template <class Sink>
  static __device__ __forceinline__ void run(const Call& call, int64_t i, int count, Sink sink) {
    if constexpr (kLinear) {
      linear(call, i, sink);
    } else {
      strided(call, i, count, sink);
    }
  }

  template <class Sink>
  static __device__ __forceinline__ void linear(const Call& call, int64_t i, Sink sink) {
    C mu[kChunk], rho[kChunk], kl[kChunk];
    load_chunk<T>(call.mu.data, i, mu);
    load_chunk<T>(call.rho.data, i, rho);
    int64_t position = 0, prior_at[2] = {};
    const int64_t* seed = call.noise.seed != nullptr ? stream_of(call.noise, call.shape.n, i, position) : nullptr;
    if (kPrior) locate(call.shape, i, prior_at, call.prior_mu, call.prior_rho);
#pragma unroll
    for (int quad = 0; quad < kChunk; quad += 4) {
      C eps[4] = {};
      if (call.z.data != nullptr) noise_quad(call, i + quad, seed, position + quad, eps);
#pragma unroll
      for (int e = quad; e < quad + 4; ++e) {
        C prior_mu = 0, prior_rho = 0;
        if (kPrior) {
          prior_mu = load_any<C>(call.prior_mu, prior_at[0] + e * inner_stride(call.shape, call.prior_mu));
          prior_rho = load_any<C>(call.prior_rho, prior_at[1] + e * inner_stride(call.shape, call.prior_rho));
        }
        const Element<C> out = element<kPrior>(call, mu[e], rho[e], eps[e - quad], prior_mu, prior_rho);
        mu[e] = out.z;
        kl[e] = out.kl;
        sink(0, e, kl[e]);
      }
    }
    if (call.z.data != nullptr) store_chunk<T>(call.z.data, i, mu);
    if (call.reduction == Reduction::none) store_chunk<C>(call.kl, i, kl);
  }

  template <class Sink>
  static __device__ __forceinline__ void strided(const Call& call, int64_t i, int count, Sink sink) {
    const bool prior = call.prior_mu.data != nullptr, sampled = call.z.data != nullptr;
    Walk<6> walk;
    NoiseWalk noise;
#pragma unroll 1
    for (int e = 0; e < count; ++e) {
      walk.to(call.shape, i + e, call.mu, call.rho, call.prior_mu, call.prior_rho, call.eps, call.z);
      const C mu = load<T>(call.mu, walk.at[0]), rho = load<T>(call.rho, walk.at[1]);
      C eps = 0;
      if (sampled) {
        eps = call.eps.data != nullptr ? load_any<C>(call.eps, walk.at[4])
                                       : static_cast<C>(noise.at(call.noise, call.shape.n, i + e));
      }
      const Element<C> out = prior ? element<true>(call, mu, rho, eps, load_any<C>(call.prior_mu, walk.at[2]),
                                                   load_any<C>(call.prior_rho, walk.at[3]))
                                   : element<false>(call, mu, rho, eps, C(0), C(0));
      if (sampled) store<T>(call.z, walk.at[5], out.z);
      if (call.reduction == Reduction::none) static_cast<C*>(call.kl)[i + e] = out.kl;
      sink(0, e, out.kl);
    }
  }
};

bool linear(const GaussianForward& call) {
  return whole_rows(call.shape, call.reduction) && vectorizable(call.mu) && vectorizable(call.rho) &&
         vectorizable(call.z) && (call.eps.data == nullptr || call.eps.linear) &&
         constant_stride(call.shape, call.prior_mu) && constant_stride(call.shape, call.prior_rho) &&
         whole_blocks(call.noise, call.shape.n) && (call.reduction != Reduction::none || aligned(call.kl));
}

}  // namespace

int64_t gaussian_forward_scratch(const GaussianForward& call) { return forward_scratch(call.shape, call.reduction); }

int gaussian_forward(const GaussianForward& call, Scratch scratch, CUstream_st* stream) {
  return dispatch(call.mu.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const Prepared<GaussianForward, Compute<T>> prepared(call);
    // fp64 is for checks: it has the strided kernels only.
    if constexpr (sizeof(T) < 8) {
      if (linear(call)) {
        return prepared.prior_mu.data != nullptr
                   ? launch_forward<Forward<T, true, true>>(prepared, call.kl, scratch, stream)
                   : launch_forward<Forward<T, true, false>>(prepared, call.kl, scratch, stream);
      }
    }
    return launch_forward<Forward<T, false, true>>(prepared, call.kl, scratch, stream);
  });
}

}  // namespace vaeops::cuda
