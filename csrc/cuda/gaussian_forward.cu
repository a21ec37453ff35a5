// z = mu + temperature * sigma * eps and the KL divergence, in one pass. Formulas: vaeops/ref/gaussian.py.
#include "gaussian.cuh"

namespace vaeops::cuda {
namespace {

template <class C>
struct Element {
  C z, kl;
};

template <Path kPath, class C>
__device__ __forceinline__ Element<C> element(const Prepared<GaussianForward, C>& call, C mu, C rho, C eps, C prior_mu,
                                              C prior_rho) {
  const Param param = kPath == Path::plain ? Param::logvar : call.param;
  if (kPath != Path::plain) rho = call.clamp(rho);
  const C lv = log_variance(rho, param);
  const Exp<C> q = exp_parts(lv);
  const C sigma = param == Param::std ? rho : q.sigma;
  Element<C> out;
  out.z = fused(call.temp * sigma, eps, mu);
  if (kPath != Path::plain && call.prior_mu.data != nullptr) {
    const C prior_lv = log_variance(prior_rho, param);
    const C t = (mu - prior_mu) * reciprocal_sigma(prior_rho, prior_lv, param);
    out.kl = C(0.5) * fused(t, t, exp_parts(lv - prior_lv).gap);
  } else {
    out.kl = C(0.5) * fused(mu, mu, q.gap);
  }
  return out;
}

// A Step of fold.cuh.
template <class Storage, Path kPath>
struct Forward {
  using T = Storage;
  using C = Compute<T>;
  using Call = Prepared<GaussianForward, C>;
  static constexpr int kOutputs = 1, kBlocks = sizeof(C) == 8 ? 2 : kPath == Path::plain ? 4 : 3;

  template <class Sink>
  static __device__ __forceinline__ void run(const Call& call, int64_t i, int count, Sink sink) {
    if constexpr (kPath != Path::strided) {
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
    const bool prior = kPath != Path::plain && call.prior_mu.data != nullptr;
    const bool sampled = kPath == Path::plain || call.z.data != nullptr;
    if (prior) locate(call.shape, i, prior_at, call.prior_mu, call.prior_rho);
#pragma unroll
    for (int quad = 0; quad < kChunk; quad += 4) {
      C eps[4] = {};
      if (sampled) noise_quad<kPath>(call, i + quad, seed, position + quad, eps);
#pragma unroll
      for (int e = quad; e < quad + 4; ++e) {
        C prior_mu = 0, prior_rho = 0;
        if (prior) {
          prior_mu = load_any<C>(call.prior_mu, prior_at[0] + e * inner_stride(call.shape, call.prior_mu));
          prior_rho = load_any<C>(call.prior_rho, prior_at[1] + e * inner_stride(call.shape, call.prior_rho));
        }
        const Element<C> out = element<kPath>(call, mu[e], rho[e], eps[e - quad], prior_mu, prior_rho);
        mu[e] = out.z;
        kl[e] = out.kl;
        sink(0, e, kl[e]);
      }
    }
    if (sampled) store_chunk<T>(call.z.data, i, mu);
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
      const C prior_mu = prior ? load_any<C>(call.prior_mu, walk.at[2]) : C(0);
      const C prior_rho = prior ? load_any<C>(call.prior_rho, walk.at[3]) : C(0);
      const Element<C> out = element<kPath>(call, mu, rho, eps, prior_mu, prior_rho);
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
        const bool plain = call.prior_mu.data == nullptr && call.param == Param::logvar && !call.clamped &&
                           call.z.data != nullptr && call.eps.data == nullptr;
        return plain ? launch_forward<Forward<T, Path::plain>>(prepared, call.kl, scratch, stream)
                     : launch_forward<Forward<T, Path::linear>>(prepared, call.kl, scratch, stream);
      }
    }
    return launch_forward<Forward<T, Path::strided>>(prepared, call.kl, scratch, stream);
  });
}

}  // namespace vaeops::cuda
