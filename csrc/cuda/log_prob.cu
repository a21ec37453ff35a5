// log N(x; mu, sigma^2) = -(((x - mu) / sigma)^2 + log sigma^2 + log 2 pi) / 2, and its gradients.
#include "gaussian.cuh"

namespace vaeops::cuda {
namespace {

constexpr double kLog2Pi = 1.8378770664093454836;

// Steps of fold.cuh. kLinear: whole chunks in linear memory; otherwise any strides.
template <class Storage, bool kLinear>
struct Forward {
  using T = Storage;
  using C = Compute<T>;
  using Call = LogProbForward;
  static constexpr int kOutputs = 1, kBlocks = sizeof(C) == 8 ? 2 : 4;

  static __device__ __forceinline__ C element(const Call& call, C x, C mu, C rho) {
    const C lv = log_variance(rho, call.param);
    const C t = (x - mu) * reciprocal_sigma(rho, lv, call.param);
    return C(-0.5) * (fused(t, t, lv) + static_cast<C>(kLog2Pi));
  }

  template <class Sink>
  static __device__ __forceinline__ void run(const Call& call, int64_t i, int count, Sink sink) {
    if constexpr (kLinear) {
      C x[kChunk], mu[kChunk], rho[kChunk];
      load_chunk<T>(call.x.data, i, x);
      load_chunk<T>(call.mu.data, i, mu);
      load_chunk<T>(call.rho.data, i, rho);
#pragma unroll
      for (int e = 0; e < kChunk; ++e) {
        x[e] = element(call, x[e], mu[e], rho[e]);
        sink(0, e, x[e]);
      }
      if (call.reduction == Reduction::none) store_chunk<C>(call.out, i, x);
    } else {
      Walk<3> walk;
#pragma unroll 1
      for (int e = 0; e < count; ++e) {
        walk.to(call.shape, i + e, call.x, call.mu, call.rho);
        const C value =
            element(call, load<T>(call.x, walk.at[0]), load<T>(call.mu, walk.at[1]), load<T>(call.rho, walk.at[2]));
        if (call.reduction == Reduction::none) static_cast<C*>(call.out)[i + e] = value;
        sink(0, e, value);
      }
    }
  }
};

template <class Storage, bool kLinear>
struct Backward {
  using T = Storage;
  using C = Compute<T>;
  using Call = Scaled<LogProbBackward, C>;
  static constexpr int kOutputs = 0, kBlocks = sizeof(C) == 8 ? 2 : 4;

  // x becomes the gradient of x, mu that of mu, rho that of rho.
  static __device__ __forceinline__ void element(const Call& call, C weight, C& x, C& mu, C& rho) {
    const C inverse = reciprocal_sigma(rho, log_variance(rho, call.param), call.param);
    const C t = (x - mu) * inverse;
    mu = weight * (t * inverse);
    x = -mu;
    rho = weight * half_chain(rho, call.param) * fused(t, t, C(-1));
  }

  template <class Sink>
  static __device__ __forceinline__ void run(const Call& call, int64_t i, int count, Sink) {
    if constexpr (kLinear) {
      C x[kChunk], mu[kChunk], rho[kChunk];
      load_chunk<T>(call.x.data, i, x);
      load_chunk<T>(call.mu.data, i, mu);
      load_chunk<T>(call.rho.data, i, rho);
      int64_t at[1];
      locate(call.shape, i, at, call.grad);
      const int64_t step = inner_stride(call.shape, call.grad);
#pragma unroll
      for (int e = 0; e < kChunk; ++e)
        element(call, load<C>(call.grad, at[0] + e * step) * call.scale, x[e], mu[e], rho[e]);
      store_chunk<T>(call.gx.data, i, x);
      store_chunk<T>(call.gmu.data, i, mu);
      store_chunk<T>(call.grho.data, i, rho);
    } else {
      Walk<7> walk;
#pragma unroll 1
      for (int e = 0; e < count; ++e) {
        walk.to(call.shape, i + e, call.x, call.mu, call.rho, call.grad, call.gx, call.gmu, call.grho);
        C x = load<T>(call.x, walk.at[0]), mu = load<T>(call.mu, walk.at[1]), rho = load<T>(call.rho, walk.at[2]);
        element(call, load<C>(call.grad, walk.at[3]) * call.scale, x, mu, rho);
        store<T>(call.gx, walk.at[4], x);
        store<T>(call.gmu, walk.at[5], mu);
        store<T>(call.grho, walk.at[6], rho);
      }
    }
  }
};

bool linear(const LogProb& call) { return vectorizable(call.x) && vectorizable(call.mu) && vectorizable(call.rho); }

}  // namespace

int64_t log_prob_forward_scratch(const LogProbForward& call) { return forward_scratch(call.shape, call.reduction); }

int log_prob_forward(const LogProbForward& call, Scratch scratch, CUstream_st* stream) {
  return dispatch(call.x.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (sizeof(T) < 8) {
      if (linear(call) && whole_rows(call.shape, call.reduction) &&
          (call.reduction != Reduction::none || aligned(call.out))) {
        return launch_forward<Forward<T, true>>(call, call.out, scratch, stream);
      }
    }
    return launch_forward<Forward<T, false>>(call, call.out, scratch, stream);
  });
}

int log_prob_backward(const LogProbBackward& call, CUstream_st* stream) {
  if (call.shape.n == 0) return 0;
  return dispatch(call.x.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const Scaled<LogProbBackward, Compute<T>> scaled(call);
    if constexpr (sizeof(T) < 8) {
      if (linear(call) && call.shape.n % kChunk == 0 && vectorizable(call.gx) && vectorizable(call.gmu) &&
          vectorizable(call.grho) && constant_stride(call.shape, call.grad)) {
        return launch_flat<Backward<T, true>>(scaled, Sums{}, stream);
      }
    }
    return launch_flat<Backward<T, false>>(scaled, Sums{}, stream);
  });
}

}  // namespace vaeops::cuda
