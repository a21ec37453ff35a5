// Gradients of the Gaussian step; the noise is made again from the seed. Formulas: vaeops/ref/gaussian.py
// (gaussian_bwd).
#include "gaussian.cuh"

namespace vaeops::cuda {
namespace {

template <class C>
struct Gradients {
  C mu, rho, prior_mu, prior_rho;
};

// gz: the gradient of z, times `shift` = temperature * eps the gradient of sigma. weight: the gradient of the element's
// KL.
template <Path kPath, class C>
__device__ __forceinline__ Gradients<C> element(const Prepared<GaussianBackward, C>& call, C mu, C raw, C gz, C shift,
                                                C weight, C prior_mu, C prior_rho) {
  constexpr bool kPlain = kPath == Path::plain;
  const Param param = kPlain ? Param::logvar : call.param;
  const C rho = kPlain ? raw : call.clamp(raw), lv = log_variance(rho, param), chain = half_chain(rho, param);
  const Exp<C> q = exp_parts(lv);
  Gradients<C> g = {gz, 0, 0, 0};
  // Absent gradients add no term: zero times an infinite sigma would be NaN.
  if (kPlain || call.gz.data != nullptr) g.rho = param == Param::std ? shift * gz : shift * gz * q.sigma * chain;
  if (kPlain || call.gkl.data != nullptr) {
    if (!kPlain && call.prior_mu.data != nullptr) {
      const C prior_lv = log_variance(prior_rho, param);
      const C inverse = reciprocal_sigma(prior_rho, prior_lv, param);
      const C t = (mu - prior_mu) * inverse, growth = exp_parts(lv - prior_lv).expm1;
      const C pull = weight * (t * inverse);
      g.mu += pull;
      g.rho = fused(weight * chain, growth, g.rho);
      g.prior_mu = -pull;
      g.prior_rho = -weight * half_chain(prior_rho, param) * fused(t, t, growth);
    } else {
      g.mu = fused(weight, mu, gz);
      g.rho = fused(weight * chain, q.expm1, g.rho);
    }
  }
  if (!kPlain && !call.inside(raw)) g.rho = 0;
  return g;
}

// A Step of fold.cuh whose outputs are the prior's gradients. Path::plain has both gz and a scalar gkl.
template <class Storage, Path kPath>
struct Backward {
  using T = Storage;
  using C = Compute<T>;
  using Call = Prepared<GaussianBackward, C>;
  static constexpr int kOutputs = 2, kBlocks = sizeof(C) == 8 ? 2 : 3;

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
    constexpr bool kPlain = kPath == Path::plain;
    const bool prior = !kPlain && call.prior_mu.data != nullptr, sampled = kPlain || call.gz.data != nullptr;
    C mu[kChunk], rho[kChunk], gz[kChunk] = {};
    load_chunk<T>(call.mu.data, i, mu);
    load_chunk<T>(call.rho.data, i, rho);
    if (sampled) load_chunk<T>(call.gz.data, i, gz);
    int64_t position = 0, at[3] = {};
    const int64_t* seed = call.noise.seed != nullptr ? stream_of(call.noise, call.shape.n, i, position) : nullptr;
    if (!kPlain) locate(call.shape, i, at, call.gkl, call.prior_mu, call.prior_rho);
#pragma unroll
    for (int quad = 0; quad < kChunk; quad += 4) {
      C eps[4] = {};
      if (sampled) noise_quad<kPath>(call, i + quad, seed, position + quad, eps);
#pragma unroll
      for (int e = quad; e < quad + 4; ++e) {
        C weight = 0, prior_mu = 0, prior_rho = 0;
        if (kPlain || call.gkl.data != nullptr) {
          const int64_t step = kPlain ? 0 : inner_stride(call.shape, call.gkl);
          weight = load<C>(call.gkl, at[0] + e * step) * call.scale;
        }
        if (prior) {
          prior_mu = load_any<C>(call.prior_mu, at[1] + e * inner_stride(call.shape, call.prior_mu));
          prior_rho = load_any<C>(call.prior_rho, at[2] + e * inner_stride(call.shape, call.prior_rho));
        }
        const Gradients<C> g =
            element<kPath>(call, mu[e], rho[e], gz[e], call.temp * eps[e - quad], weight, prior_mu, prior_rho);
        mu[e] = g.mu;
        rho[e] = g.rho;
        sink(0, e, g.prior_mu);
        sink(1, e, g.prior_rho);
      }
    }
    store_chunk<T>(call.gmu.data, i, mu);
    store_chunk<T>(call.grho.data, i, rho);
  }

  template <class Sink>
  static __device__ __forceinline__ void strided(const Call& call, int64_t i, int count, Sink sink) {
    const bool prior = call.prior_mu.data != nullptr, sampled = call.gz.data != nullptr;
    Walk<9> walk;
    NoiseWalk noise;
#pragma unroll 1
    for (int e = 0; e < count; ++e) {
      walk.to(call.shape, i + e, call.mu, call.rho, call.prior_mu, call.prior_rho, call.eps, call.gz, call.gkl,
              call.gmu, call.grho);
      const C mu = load<T>(call.mu, walk.at[0]), rho = load<T>(call.rho, walk.at[1]);
      C gz = 0, shift = 0, weight = 0;
      if (sampled) {
        gz = load<T>(call.gz, walk.at[5]);
        shift = call.temp * (call.eps.data != nullptr ? load_any<C>(call.eps, walk.at[4])
                                                      : static_cast<C>(noise.at(call.noise, call.shape.n, i + e)));
      }
      if (call.gkl.data != nullptr) weight = load<C>(call.gkl, walk.at[6]) * call.scale;
      const C prior_mu = prior ? load_any<C>(call.prior_mu, walk.at[2]) : C(0);
      const C prior_rho = prior ? load_any<C>(call.prior_rho, walk.at[3]) : C(0);
      const Gradients<C> g = element<kPath>(call, mu, rho, gz, shift, weight, prior_mu, prior_rho);
      store<T>(call.gmu, walk.at[7], g.mu);
      store<T>(call.grho, walk.at[8], g.rho);
      sink(0, e, g.prior_mu);
      sink(1, e, g.prior_rho);
    }
  }
};

// Dims in which the prior varies are kept, the others summed over.
Fold prior_fold(const GaussianBackward& call) {
  Fold fold;
  for (int d = 0; d < call.shape.ndim; ++d) fold.add_inner(call.shape.size[d], call.prior_stride[d] != 0);
  fold.finish();
  return fold;
}

bool wants_prior(const GaussianBackward& call) {
  return call.prior_mu.data != nullptr && (call.gprior_mu != nullptr || call.gprior_rho != nullptr);
}

// The prior's gradient takes a walk of its own; without a gradient of the KL, or without elements, it is zero.
bool folds(const GaussianBackward& call) { return wants_prior(call) && call.gkl.data != nullptr && call.shape.n > 0; }

bool linear(const GaussianBackward& call) {
  return call.shape.n % kChunk == 0 && (!folds(call) || prior_fold(call).inner() % kChunk == 0) &&
         vectorizable(call.mu) && vectorizable(call.rho) && vectorizable(call.gz) && vectorizable(call.gmu) &&
         vectorizable(call.grho) && (call.eps.data == nullptr || call.eps.linear) &&
         constant_stride(call.shape, call.gkl) && constant_stride(call.shape, call.prior_mu) &&
         constant_stride(call.shape, call.prior_rho) && whole_blocks(call.noise, call.shape.n);
}

bool plain(const GaussianBackward& call) {
  return call.prior_mu.data == nullptr && call.param == Param::logvar && !call.clamped && call.gz.data != nullptr &&
         call.eps.data == nullptr && call.gkl.data != nullptr && is_scalar(call.reduction);
}

int zero(void* data, int64_t elements, Dtype dtype, CUstream_st* stream) {
  if (data == nullptr || elements == 0) return 0;
  const size_t bytes = static_cast<size_t>(elements) * (dtype == Dtype::f64 ? sizeof(double) : sizeof(float));
  return static_cast<int>(cudaMemsetAsync(data, 0, bytes, stream));
}

template <class Step>
int launch_backward(const typename Step::Call& call, const Scratch& scratch, CUstream_st* stream) {
  if (!folds(call)) return launch_flat<Step>(call, Sums{}, stream);
  Sums sums;
  sums.out[0] = call.gprior_mu;
  sums.out[1] = call.gprior_rho;
  sums.partials = static_cast<double*>(scratch.partials);
  sums.tickets = scratch.tickets;
  return launch_fold<Step>(call, prior_fold(call), sums, stream);
}

}  // namespace

int64_t gaussian_backward_scratch(const GaussianBackward& call) {
  if (!folds(call)) return 0;
  return partials_of(prior_fold(call), 2);
}

int gaussian_backward(const GaussianBackward& call, Scratch scratch, CUstream_st* stream) {
  if (wants_prior(call) && !folds(call)) {
    for (void* gradient : {call.gprior_mu, call.gprior_rho}) {
      if (const int error = zero(gradient, call.prior_n, call.mu.dtype, stream)) return error;
    }
  }
  if (call.shape.n == 0) return 0;
  return dispatch(call.mu.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const Prepared<GaussianBackward, Compute<T>> prepared(call);
    // fp64 is for checks: it has the strided kernels only.
    if constexpr (sizeof(T) < 8) {
      if (linear(call)) {
        return plain(call) ? launch_flat<Backward<T, Path::plain>>(prepared, Sums{}, stream)
                           : launch_backward<Backward<T, Path::linear>>(prepared, scratch, stream);
      }
    }
    return launch_backward<Backward<T, Path::strided>>(prepared, scratch, stream);
  });
}

}  // namespace vaeops::cuda
