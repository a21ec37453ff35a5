// quantized = codebook[indices] with its loss, and the gradient of both. Formulas: vaeops/ref/vq.py (vq_gather,
// vq_gather_bwd).
//
// A row belongs to one lane, or to a team of 8 or 32 neighbouring lanes. Its sums are fp64, over elements in fp32 (fp64
// for fp64 inputs).
#include "vq.cuh"

namespace vaeops::cuda {
namespace {

constexpr int kGatherBlocks = 4;    // per multiprocessor
constexpr int kBackwardBlocks = 3;  // per multiprocessor

// T: of x and quantized. C: fp64 when T or the codebook is.
template <class T, class C>
__global__ void __launch_bounds__(kThreads, kGatherBlocks)
    gather_kernel(const __grid_constant__ VqGather call, int team, const Scratch scratch) {
  const int lane = threadIdx.x % team, teams = kThreads / team;
  const bool compared = call.x.operand.data != nullptr;
  double total = 0, valid = 0;
  for (int64_t first = blockIdx.x * int64_t{teams}; first < call.shape.n; first += gridDim.x * int64_t{teams}) {
    const int64_t n = first + threadIdx.x / team;
    const bool in = n < call.shape.n;
    int64_t at[2] = {}, k = -1;
    double sum = 0;
    bool bad = false;
    if (in) {
      locate(call.shape, n, at, call.x.operand, call.quantized.operand);
      k = index_at(call.indices, n, call.codes);
      for (int64_t d = lane; d < call.dims; d += team) {
        C e = static_cast<C>(call.fill);
        if (k >= 0) e = any_at<C>(call.codebook, call.codebook_dtype, k * call.dims + d);
        store<T>(call.quantized.operand, at[1] + d * call.quantized.step, static_cast<Compute<T>>(e));
        if (!compared || k < 0) continue;
        const C x = load<T>(call.x.operand, at[0] + d * call.x.step), difference = x - e;
        bad = bad || !is_finite(x);
        sum += static_cast<double>(difference * difference);
      }
    }
    if (!compared) continue;
    bad = team_any(bad, team);
    if (bad) {
      for (int64_t d = lane; d < call.dims; d += team) {
        store<T>(call.quantized.operand, at[1] + d * call.quantized.step, static_cast<Compute<T>>(NAN));
      }
    }
    sum = team_sum(sum, team);
    if (bad) sum = NAN;
    if (call.reduction == RowReduction::off || !in || lane != 0) continue;
    if (call.reduction == RowReduction::none) {
      static_cast<C*>(call.loss)[n] = static_cast<C>(sum / static_cast<double>(call.dims));
    }
    total += sum;
    valid += k >= 0 ? 1 : 0;
  }
  if (call.reduction != RowReduction::mean && call.reduction != RowReduction::sum) return;
  total = block_sum(total);
  valid = block_sum(valid);
  if (gridDim.x > 1) {
    double* partials = static_cast<double*>(scratch.partials);
    if (threadIdx.x == 0) {
      partials[2 * blockIdx.x] = total;
      partials[2 * blockIdx.x + 1] = valid;
    }
    if (!last_to_arrive(scratch.tickets, gridDim.x)) return;
    total = valid = 0;
    for (unsigned b = threadIdx.x; b < gridDim.x; b += kThreads) {
      total += __ldcg(partials + 2 * b);
      valid += __ldcg(partials + 2 * b + 1);
    }
    total = block_sum(total);
    valid = block_sum(valid);
  }
  if (threadIdx.x != 0) return;
  if (call.reduction == RowReduction::mean) total /= static_cast<double>(call.dims) * (valid > 0 ? valid : 1);
  *static_cast<C*>(call.loss) = static_cast<C>(total);
}

// The rotation's gradient: scale (g - along (u + v) + 2 (v.g) u).
template <class C>
struct Rotation {
  C inverse_x, inverse_e, scale, along, across;  // 1 / |x|, 1 / |e|, |e| / |x|, 2 (t.g) / |u + v|, 2 (v.g)
  bool straight;                                 // falls back to g
};

constexpr double kTiny = 1e-6;

template <class T, class C>
__device__ __forceinline__ Rotation<C> rotation_of(const VqGatherBackward& call, const int64_t (&at)[3], int64_t k,
                                                   int lane, int team) {
  const int64_t end = k >= 0 ? call.dims : 0;
  double xx = 0, ee = 0;
  for (int64_t d = lane; d < end; d += team) {
    const C x = load<T>(call.x.operand, at[0] + d * call.x.step);
    const C e = any_at<C>(call.codebook, call.codebook_dtype, k * call.dims + d);
    xx += static_cast<double>(x) * x;
    ee += static_cast<double>(e) * e;
  }
  const double length_x = sqrt(team_sum(xx, team)), length_e = sqrt(team_sum(ee, team));
  const C inverse_x = static_cast<C>(1 / length_x), inverse_e = static_cast<C>(1 / length_e);
  double ww = 0, wg = 0, vg = 0;  // w = u + v
  for (int64_t d = lane; d < end; d += team) {
    const C x = load<T>(call.x.operand, at[0] + d * call.x.step);
    const C e = any_at<C>(call.codebook, call.codebook_dtype, k * call.dims + d);
    const C g = load<T>(call.gq.operand, at[1] + d * call.gq.step);
    const C v = e * inverse_e, w = x * inverse_x + v;
    ww += static_cast<double>(w) * w;
    wg += static_cast<double>(w) * g;
    vg += static_cast<double>(v) * g;
  }
  ww = team_sum(ww, team);
  wg = team_sum(wg, team);
  vg = team_sum(vg, team);
  return {inverse_x,
          inverse_e,
          static_cast<C>(length_e / length_x),
          static_cast<C>(2 * wg / ww),
          static_cast<C>(2 * vg),
          length_x < kTiny || length_e < kTiny || sqrt(ww) < kTiny};
}

template <class T, class C>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks)
    gather_backward_kernel(const __grid_constant__ VqGatherBackward call, int team) {
  const int lane = threadIdx.x % team, teams = kThreads / team;
  const bool through = call.gq.operand.data != nullptr && call.estimator != Estimator::none;
  const bool rotates = through && call.estimator == Estimator::rotation;
  for (int64_t first = blockIdx.x * int64_t{teams}; first < call.shape.n; first += gridDim.x * int64_t{teams}) {
    const int64_t n = first + threadIdx.x / team;
    const bool in = n < call.shape.n;
    int64_t at[3] = {}, k = -1;
    if (in) {
      locate(call.shape, n, at, call.x.operand, call.gq.operand, call.gx.operand);
      k = index_at(call.indices, n, call.codes);
    }
    Rotation<C> rotation = {};
    if (rotates) rotation = rotation_of<T, C>(call, at, k, lane, team);
    if (!in) continue;
    C w = 0;
    if (call.w != nullptr) w = 2 * static_cast<const C*>(call.w)[call.w_per_row ? n : 0];
    for (int64_t d = lane; d < call.dims; d += team) {
      C out = 0;
      if (k >= 0) {
        const C x = load<T>(call.x.operand, at[0] + d * call.x.step);
        const C e = any_at<C>(call.codebook, call.codebook_dtype, k * call.dims + d);
        if (through) out = load<T>(call.gq.operand, at[1] + d * call.gq.step);
        if (rotates && !rotation.straight) {
          const C u = x * rotation.inverse_x, v = e * rotation.inverse_e;
          out = rotation.scale * (out - rotation.along * (u + v) + rotation.across * u);
        }
        // No term at all without a gradient: zero times infinity would be NaN.
        if (call.w != nullptr) out += w * (x - e);
      }
      store<T>(call.gx.operand, at[2] + d * call.gx.step, static_cast<Compute<T>>(out));
    }
  }
}

// Calls launch(Type<T>{}, Type<C>{}).
template <class Launch>
int dispatch_pair(Dtype dtype, Dtype codebook, Launch launch) {
  return dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return codebook == Dtype::f64 ? launch(type, Type<double>{}) : launch(type, Type<Compute<T>>{});
  });
}

unsigned gather_grid(const VqGather& call, int team) {
  return grid_for(ceil_div(call.shape.n, kThreads / team), kGatherBlocks);
}

int gather_team(const VqGather& call) { return team_width(call.shape, call.quantized, call.dims); }

bool to_scalar(const VqGather& call) {
  return call.reduction == RowReduction::mean || call.reduction == RowReduction::sum;
}

}  // namespace

int64_t vq_gather_scratch(const VqGather& call) {
  const unsigned grid = gather_grid(call, gather_team(call));
  return to_scalar(call) && grid > 1 ? 2 * grid * static_cast<int64_t>(sizeof(double)) : 0;
}

int vq_gather(const VqGather& call, Scratch scratch, CUstream_st* stream) {
  if (call.shape.n == 0 && !to_scalar(call)) return 0;
  const int team = gather_team(call);
  return dispatch_pair(call.quantized.operand.dtype, call.codebook_dtype, [&](auto type, auto compute) {
    using T = typename decltype(type)::type;
    using C = typename decltype(compute)::type;
    VAEOPS_LAUNCH((gather_kernel<T, C>), gather_grid(call, team), kThreads, stream, call, team, scratch);
    return static_cast<int>(cudaGetLastError());
  });
}

int64_t vq_gather_backward_scratch(const VqGatherBackward&) { return 0; }

int vq_gather_backward(const VqGatherBackward& call, Scratch, CUstream_st* stream) {
  if (call.shape.n == 0) return 0;
  const int team = team_width(call.shape, call.gx, call.dims);
  return dispatch_pair(call.x.operand.dtype, call.codebook_dtype, [&](auto type, auto compute) {
    using T = typename decltype(type)::type;
    using C = typename decltype(compute)::type;
    const unsigned grid = grid_for(ceil_div(call.shape.n, kThreads / team), kBackwardBlocks);
    VAEOPS_LAUNCH((gather_backward_kernel<T, C>), grid, kThreads, stream, call, team);
    return static_cast<int>(cudaGetLastError());
  });
}

}  // namespace vaeops::cuda
