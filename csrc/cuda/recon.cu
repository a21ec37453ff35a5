// Reconstruction losses and their gradients, in one pass each way. Formulas: vaeops/ref/recon.py.
//
// The kind and the operands' types are the same for all threads and are asked once in eight elements, so that one
// kernel serves all of them: memory is what its threads wait for.
#include "chunk.cuh"
#include "reduction.cuh"

namespace vaeops::cuda {
namespace {

template <class C>
__device__ __forceinline__ C not_below(C x, C bound) {  // NaN stays
  return x < bound ? bound : x;
}

template <class C>
__device__ __forceinline__ C softplus_of_negative(C size) {  // log(1 + exp(-size))
  return log1p(exp(-size));
}

template <class C>
__device__ __forceinline__ C softplus(C x) {
  return not_below(x, C(0)) + softplus_of_negative(fabs(x));
}

template <class C>
__device__ __forceinline__ C sigmoid(C x) {
  const C e = exp(-fabs(x));
  return (x < 0 ? e : C(1)) / (1 + e);
}

template <class C>
__device__ __forceinline__ C sign_of(C d, C magnitude) {
  return d > 0 ? magnitude : d < 0 ? -magnitude : C(0);
}

// What a negative log-likelihood adds to each element.
double constant_of(ReconKind kind, double scale) {
  switch (kind) {
    case ReconKind::gaussian_nll:
      return log(scale) + 0.91893853320467274178;  // log(2 pi) / 2
    case ReconKind::laplace_nll:
      return log(2 * scale);
    case ReconKind::discretized_logistic:
      return -log(-expm1(-1 / (255 * scale)));
    default:
      return 0;
  }
}

// A call with its options' numbers in the compute type.
template <class Host, class C>
struct Prepared : Host {
  C factor;           // 1 / (what the reduction divides by)
  C spread, inverse;  // s, 1 / s
  C constant;
  C half_level;                   // of 8 bits
  C level_count, inverse_levels;  // a target of bytes is t / level_count
  explicit Prepared(const Host& host)
      : Host(host),
        factor(static_cast<C>(reduction_scale(host.reduction, host.shape))),
        spread(static_cast<C>(host.scale)),
        inverse(static_cast<C>(1 / host.scale)),
        constant(static_cast<C>(constant_of(host.kind, host.scale))),
        half_level(static_cast<C>(1.0 / 510)),
        level_count(static_cast<C>(host.levels)),
        inverse_levels(1 / static_cast<C>(host.levels)) {}

  // t / level_count of bytes, correctly rounded.
  __device__ __forceinline__ C level(C t) const {
    if (!this->target.bytes) return t;
    const C q = t * inverse_levels;
    return fma(fma(q, -level_count, t), inverse_levels, q);
  }
};

// The loss of an element of prediction p and target t.
template <ReconKind kKind, class Call, class C>
__device__ __forceinline__ C element(const Call& call, C p, C t) {
  const C d = p - t, size = fabs(d);
  if constexpr (kKind == ReconKind::bce) {
    return (t - 1) * not_below(log1p(-p), C(-100)) - t * not_below(log(p), C(-100));
  } else if constexpr (kKind == ReconKind::bce_logits) {
    // max(p, 0) - p t = |p| times the share of the target on p's wrong side; nothing there costs nothing, even inf.
    const C wrong = p > 0 ? 1 - t : t;
    return (wrong == 0 ? C(0) : fabs(p) * wrong) + softplus_of_negative(fabs(p));
  } else if constexpr (kKind == ReconKind::mse) {
    return d * d;
  } else if constexpr (kKind == ReconKind::half_mse) {
    return C(0.5) * (d * d);
  } else if constexpr (kKind == ReconKind::l1) {
    return size;
  } else if constexpr (kKind == ReconKind::huber) {
    const C near = size > call.spread ? call.spread : size;
    return near * fma(near, C(-0.5), size);
  } else if constexpr (kKind == ReconKind::gaussian_nll) {
    const C z = d * call.inverse;
    return fma(C(0.5) * z, z, call.constant);
  } else if constexpr (kKind == ReconKind::laplace_nll) {
    return fma(size, call.inverse, call.constant);
  } else {
    const C middle = -d * call.inverse, half = call.half_level * call.inverse;
    const bool lowest = t < call.half_level, highest = t > 1 - call.half_level;
    const C above = highest ? C(0) : softplus(-(middle + half)), below = lowest ? C(0) : softplus(middle - half);
    return above + below + (lowest || highest ? C(0) : call.constant);
  }
}

// d element / d p
template <ReconKind kKind, class Call, class C>
__device__ __forceinline__ C slope(const Call& call, C p, C t) {
  const C d = p - t;
  if constexpr (kKind == ReconKind::bce) {
    return d / not_below(p * (1 - p), C(1e-12));
  } else if constexpr (kKind == ReconKind::bce_logits) {
    return sigmoid(p) - t;
  } else if constexpr (kKind == ReconKind::mse) {
    return d + d;
  } else if constexpr (kKind == ReconKind::half_mse) {
    return d;
  } else if constexpr (kKind == ReconKind::l1) {
    return sign_of(d, C(1));
  } else if constexpr (kKind == ReconKind::huber) {
    return d > call.spread ? call.spread : d < -call.spread ? -call.spread : d;
  } else if constexpr (kKind == ReconKind::gaussian_nll) {
    return d * call.inverse * call.inverse;
  } else if constexpr (kKind == ReconKind::laplace_nll) {
    return sign_of(d, call.inverse);
  } else {
    const C middle = -d * call.inverse, half = call.half_level * call.inverse;
    const C up = t > 1 - call.half_level ? C(0) : sigmoid(-(middle + half));
    const C down = t < call.half_level ? C(0) : sigmoid(middle - half);
    return (up - down) * call.inverse;
  }
}

template <ReconKind kKind, bool kSlope, class Call, class C, int kN>
__device__ __forceinline__ void evaluate(const Call& call, C (&p)[kN], const C (&t)[kN]) {
#pragma unroll
  for (int e = 0; e < kN; ++e) {
    const C level = call.level(t[e]);
    p[e] = kSlope ? slope<kKind>(call, p[e], level) : element<kKind>(call, p[e], level);
  }
}

// p becomes the elements' losses, or slopes.
template <bool kSlope, class Call, class C, int kN>
__device__ __forceinline__ void evaluate(const Call& call, C (&p)[kN], const C (&t)[kN]) {
  switch (call.kind) {
    case ReconKind::bce:
      return evaluate<ReconKind::bce, kSlope>(call, p, t);
    case ReconKind::bce_logits:
      return evaluate<ReconKind::bce_logits, kSlope>(call, p, t);
    case ReconKind::mse:
      return evaluate<ReconKind::mse, kSlope>(call, p, t);
    case ReconKind::half_mse:
      return evaluate<ReconKind::half_mse, kSlope>(call, p, t);
    case ReconKind::l1:
      return evaluate<ReconKind::l1, kSlope>(call, p, t);
    case ReconKind::huber:
      return evaluate<ReconKind::huber, kSlope>(call, p, t);
    case ReconKind::gaussian_nll:
      return evaluate<ReconKind::gaussian_nll, kSlope>(call, p, t);
    case ReconKind::laplace_nll:
      return evaluate<ReconKind::laplace_nll, kSlope>(call, p, t);
    case ReconKind::discretized_logistic:
      return evaluate<ReconKind::discretized_logistic, kSlope>(call, p, t);
  }
}

// An element of weight 0 yields 0, whatever it holds.
template <class C>
__device__ __forceinline__ C weighted(C x, C w) {
  return w == 0 ? C(0) : x * w;
}

// The values of a chunk, or their slopes, weighted.
template <bool kSlope, class Call, int kOperands>
__device__ __forceinline__ void chunk_values(const Call& call, const int64_t (&at)[kOperands], float (&p)[kChunk]) {
  const Raw pred = fetch(call.shape, call.pred, at[0]), target = fetch(call.shape, call.target, at[1]);
  const Raw weight = fetch(call.shape, call.weight, at[2]);
  float t[kChunk];
  values(call.shape, call.pred, at[0], pred, p);
  values(call.shape, call.target, at[1], target, t);
  evaluate<kSlope>(call, p, t);
  if (call.weight.data == nullptr) return;
  values(call.shape, call.weight, at[2], weight, t);
#pragma unroll
  for (int e = 0; e < kChunk; ++e) p[e] = weighted(p[e], t[e]);
}

// The same of one element.
template <bool kSlope, class C, class Call, class Offsets>
__device__ __forceinline__ C value(const Call& call, const Offsets& at) {
  C p[1] = {load_value<C>(call.pred, at[0])};
  const C t[1] = {load_value<C>(call.target, at[1])};
  evaluate<kSlope>(call, p, t);
  return call.weight.data == nullptr ? p[0] : weighted(p[0], load_value<C>(call.weight, at[2]));
}

// Steps of fold.cuh. kChunked: every operand in vectors; otherwise any strides.
template <class Storage, bool kChunked>
struct Loss {
  using T = Storage;
  using C = Storage;
  using Call = Prepared<ReconForward, C>;
  static constexpr int kOutputs = 1, kBlocks = sizeof(C) == 8 ? 2 : 4;

  template <class Sink>
  static __device__ __forceinline__ void run(const Call& call, int64_t i, int count, Sink sink) {
    const bool kept = call.reduction == Reduction::none;
    if constexpr (kChunked) {
      int64_t at[3];
      float loss[kChunk];
      locate(call.shape, i, at, call.pred, call.target, call.weight);
      chunk_values<false>(call, at, loss);
#pragma unroll
      for (int e = 0; e < kChunk; ++e) sink(0, e, loss[e]);
      if (kept) store_chunk<float>(call.out, i, loss);
    } else {
      Walk<3> walk;
#pragma unroll 1
      for (int e = 0; e < count; ++e) {
        walk.to(call.shape, i + e, call.pred, call.target, call.weight);
        const C loss = value<false, C>(call, walk.at);
        if (kept) static_cast<C*>(call.out)[i + e] = loss;
        sink(0, e, loss);
      }
    }
  }
};

template <class Storage, bool kChunked>
struct Slope {
  using T = Storage;
  using C = Storage;
  using Call = Prepared<ReconBackward, C>;
  static constexpr int kOutputs = 0, kBlocks = sizeof(C) == 8 ? 2 : 4;

  template <class Sink>
  static __device__ __forceinline__ void run(const Call& call, int64_t i, int count, Sink) {
    if constexpr (kChunked) {
      int64_t at[5];
      float d[kChunk], g[kChunk];
      locate(call.shape, i, at, call.pred, call.target, call.weight, call.grad, call.gpred);
      const Raw grad = fetch(call.shape, call.grad, at[3]);
      chunk_values<true>(call, at, d);
      values(call.shape, call.grad, at[3], grad, g);
#pragma unroll
      for (int e = 0; e < kChunk; ++e) d[e] *= g[e] * call.factor;
      store_chunk(call.gpred, at[4], d);
    } else {
      Walk<5> walk;
#pragma unroll 1
      for (int e = 0; e < count; ++e) {
        walk.to(call.shape, i + e, call.pred, call.target, call.weight, call.grad, call.gpred);
        const C g = load_value<C>(call.grad, walk.at[3]) * call.factor;
        store_value<C>(call.gpred, walk.at[4], g * value<true, C>(call, walk.at));
      }
    }
  }
};

bool in_chunks(const Recon& call) {
  return call.pred.dtype != Dtype::f64 && whole_chunks(call.shape) && chunked(call.shape, call.pred) &&
         chunked(call.shape, call.target) && chunked(call.shape, call.weight);
}

}  // namespace

int64_t recon_forward_scratch(const ReconForward& call) { return forward_scratch(call.shape, call.reduction); }

int recon_forward(const ReconForward& call, Scratch scratch, CUstream_st* stream) {
  if (call.pred.dtype == Dtype::f64) {
    return launch_forward<Loss<double, false>>(Prepared<ReconForward, double>(call), call.out, scratch, stream);
  }
  const Prepared<ReconForward, float> prepared(call);
  return in_chunks(call) && whole_rows(call.shape, call.reduction) &&
                 (call.reduction != Reduction::none || aligned(call.out))
             ? launch_forward<Loss<float, true>>(prepared, call.out, scratch, stream)
             : launch_forward<Loss<float, false>>(prepared, call.out, scratch, stream);
}

int recon_backward(const ReconBackward& call, CUstream_st* stream) {
  if (call.shape.n == 0) return 0;
  if (call.pred.dtype == Dtype::f64) {
    return launch_flat<Slope<double, false>>(Prepared<ReconBackward, double>(call), Sums{}, stream);
  }
  const Prepared<ReconBackward, float> prepared(call);
  return in_chunks(call) && chunked(call.shape, call.grad) && chunked(call.shape, call.gpred)
             ? launch_flat<Slope<float, true>>(prepared, Sums{}, stream)
             : launch_flat<Slope<float, false>>(prepared, Sums{}, stream);
}

}  // namespace vaeops::cuda
