// What the kernels of the Gaussian family share: the parameters of q, and the operands' common checks.
#pragma once
#include "noise.cuh"
#include "reduction.cuh"

namespace vaeops::cuda {

// How a kernel finds its elements, and what it need not ask.
enum class Path {
  plain,    // linear memory, whole chunks; N(0, I), log-variance, no clamp, noise from a seed
  linear,   // linear memory, whole chunks
  strided,  // anything
};

// A call as its kernel takes it: `scale` is 1 / (what the reduction divides by).
template <class Host, class C>
struct Scaled : Host {
  C scale;
  explicit Scaled(const Host& host) : Host(host), scale(static_cast<C>(reduction_scale(host.reduction, host.shape))) {}
};

// The same with the options' numbers in the compute type.
template <class Host, class C>
struct Prepared : Scaled<Host, C> {
  C lo, hi, temp;
  explicit Prepared(const Host& host)
      : Scaled<Host, C>(host),
        lo(static_cast<C>(host.clamp_lo)),
        hi(static_cast<C>(host.clamp_hi)),
        temp(static_cast<C>(host.temperature)) {}

  // Written so that NaN stays.
  __device__ __forceinline__ C clamp(C rho) const { return !this->clamped ? rho : rho < lo ? lo : rho > hi ? hi : rho; }
  __device__ __forceinline__ bool inside(C rho) const { return !this->clamped || !(rho < lo || rho > hi); }
};

template <class C>
__device__ __forceinline__ C log_variance(C rho, Param param) {
  return param == Param::logvar ? rho : 2 * (param == Param::std ? log(rho) : rho);
}

// 1 / sigma of a distribution whose log-variance is lv.
template <class C>
__device__ __forceinline__ C reciprocal_sigma(C rho, C lv, Param param) {
  return param == Param::std ? 1 / rho : inverse_sigma(lv);
}

// d log sigma / d rho.
template <class C>
__device__ __forceinline__ C half_chain(C rho, Param param) {
  return param == Param::logvar ? C(0.5) : param == Param::logstd ? C(1) : 1 / rho;
}

// The noise of four elements at logical index i, in linear memory or at the head of a Philox block.
template <Path kPath, class C>
__device__ __forceinline__ void noise_quad(const Gaussian& call, int64_t i, const int64_t* seed, int64_t position,
                                           C (&eps)[4]) {
  if (kPath == Path::plain || call.eps.data == nullptr) {
    float normal[4];
    draw(seed, position / 4, normal);
#pragma unroll
    for (int e = 0; e < 4; ++e) eps[e] = static_cast<C>(normal[e]);
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e) eps[e] = load_any<C>(call.eps, i + e);
  }
}

}  // namespace vaeops::cuda
