// The Gaussian step on a CPU: operands to tiles, tiles to the instruction set's kernels, sums in a fixed order.
#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <vector>

#include "cpu/gaussian_f64.h"
#include "cpu/gaussian_tiles.h"
#include "cpu/reduce.h"
#include "cpu/strided.h"

#define VAEOPS_KERNELS "cpu/gaussian_kernels.h"
#include "cpu/foreach_isa.h"
#undef VAEOPS_KERNELS

namespace vaeops::cpu {
namespace {

template <class T>
void run(const ForwardTile<T>& t, const TileOptions<float>& o) {
  VAEOPS_DISPATCH(forward<T>)(t, o);
}
template <class T>
void run(const BackwardTile<T>& t, const TileOptions<float>& o) {
  VAEOPS_DISPATCH(backward<T>)(t, o);
}
void run(const ForwardTile<double>& t, const TileOptions<double>& o) { forward(t, o); }
void run(const BackwardTile<double>& t, const TileOptions<double>& o) { backward(t, o); }

template <class C>
TileOptions<C> tile_options(const Gaussian& call) {
  return {call.param, call.clamped, static_cast<C>(call.clamp_lo), static_cast<C>(call.clamp_hi),
          static_cast<C>(call.temperature)};
}

constexpr int64_t kSwappedTile = 8192;  // elements of a tile whose noise is transposed
constexpr int64_t kMostSwapped = 256;   // with more channels, or fewer positions, the stretches of noise are too short
constexpr int64_t kLeastPositions = 64;

// Operands whose last two dims [C, P] lie in memory the other way round, as in channels_last, are walked as [P, C], in
// the order of memory. Then only the noise, which counts elements in logical order, is out of order.
bool swap_dims(Gaussian& call, std::initializer_list<Operand*> operands) {
  Shape& shape = call.shape;
  const int p = shape.ndim - 1, c = p - 1;
  if (c < 0 || shape.size[c] > kMostSwapped || shape.size[p] < kLeastPositions) return false;
  if (shape.width % (shape.size[c] * shape.size[p]) != 0) return false;  // a row would not stay one
  for (const Operand* x : {&call.mu, &call.rho}) {
    if (x->stride[c] != 1 || x->stride[p] < shape.size[c]) return false;
  }
  std::swap(shape.size[c], shape.size[p]);
  for (Operand* x : operands) {
    std::swap(x->stride[c], x->stride[p]);
    x->linear = true;
    for (int64_t d = p, step = 1; d >= 0; step *= shape.size[d--]) x->linear = x->linear && x->stride[d] == step;
  }
  return true;
}

// Elements that a kernel takes at a time: a whole task where every operand is used in place, so no buffer limits it.
template <class T>
int64_t tile_step(const Gaussian& call, bool swapped, std::initializer_list<const Operand*> operands) {
  const bool drawn_here = swapped && call.noise.seed != nullptr;
  bool in_place = sizeof(T) < 8 && call.prior_mu.data == nullptr && call.eps.data == nullptr &&
                  (call.noise.seed == nullptr || swapped || (call.noise.streams == 1 && call.shape.width % 4 == 0));
  const int last = call.shape.ndim - 1;
  // No tile may cross the end of a run (say a sample's mu among packed moments): it would not fit the buffer.
  const bool even = call.shape.size[last] % kChunk == 0 && rows_fit_tasks(call.shape);
  for (const Operand* x : operands) {
    in_place = in_place && (x->data == nullptr || x->linear || (even && x->stride[last] == 1));
  }
  return !in_place ? kTile : drawn_here ? kSwappedTile : kChunk;
}

// Normals [begin, begin + n) of the call in logical order.
void draw(const Gaussian& call, int64_t begin, int64_t n, float* out) {
  const int64_t length = call.shape.n / call.noise.streams;
  for (int64_t i = 0; i < n;) {
    const int64_t stream = (begin + i) / length, first = (begin + i) % length, count = std::min(n - i, length - first);
    const int64_t* seed = call.noise.seed + 2 * stream;
    VAEOPS_DISPATCH(fill_normals)
    (out + i, count, static_cast<uint64_t>(seed[0]), static_cast<uint64_t>(seed[1]), first);
    i += count;
  }
}

// The normals of elements [begin, begin + n) of swapped dims: drawn along P, which counts them, then transposed.
void draw_swapped(const Gaussian& call, int64_t begin, int64_t n, float* out) {
  constexpr int64_t kRows = 4, kPad = 16;  // rows a whole number of pages apart would share cache sets
  alignas(64) float rows[kSwappedTile + kRows * (kPad + 2)], positions[kSwappedTile + 2 * kMostSwapped];
  const int last = call.shape.ndim - 1;
  const int64_t channels = call.shape.size[last], block = channels * call.shape.size[last - 1];
  for (int64_t at = begin, end = begin + n; at < end;) {
    const int64_t origin = at / block * block, stop = std::min(end, origin + block);
    const int64_t first = (at - origin) / channels, count = ceil_div(stop - origin, channels) - first;
    // Whole positions are made; only where a tile begins or ends within one are they cut.
    const int64_t cut = at - origin - first * channels;
    float* const to = cut == 0 && (stop - origin) % channels == 0 ? out + (at - begin) : positions;
    for (int64_t c = 0; c < channels; c += kRows) {
      const int64_t some = std::min(kRows, channels - c);
      for (int64_t k = 0; k < some; ++k) {
        draw(call, origin + (c + k) * call.shape.size[last - 1] + first, count, rows + k * (count + kPad));
      }
      VAEOPS_DISPATCH(interleave)(rows, count + kPad, some, count, to + c, channels);
    }
    if (to == positions) copy(positions + cut, out + (at - begin), stop - at);
    at = stop;
  }
}

// The noise of elements [begin, begin + n): left to the kernel where it starts on a Philox block of the only stream and
// is computed in fp32, else made here, in `buffer`.
template <class C>
TileNoise<C> tile_noise(const Gaussian& call, bool swapped, int64_t begin, int64_t n, C* buffer) {
  TileNoise<C> noise;
  noise.eps = read_as<C>(call.eps, call.shape, begin, n, buffer);
  if (call.noise.seed == nullptr) return noise;
  if (sizeof(C) == 4 && !swapped && call.noise.streams == 1 && begin % 4 == 0) {
    noise.drawn = true;
    noise.key = static_cast<uint64_t>(call.noise.seed[0]);
    noise.counter = static_cast<uint64_t>(call.noise.seed[1]) + static_cast<uint64_t>(begin / 4);
    return noise;
  }
  if constexpr (sizeof(C) == 4) {
    swapped ? draw_swapped(call, begin, n, buffer) : draw(call, begin, n, buffer);
  } else {
    alignas(64) float normals[kTile];
    swapped ? draw_swapped(call, begin, n, normals) : draw(call, begin, n, normals);
    std::copy(normals, normals + n, buffer);
  }
  noise.eps = buffer;
  return noise;
}

template <class T>
void forward_typed(GaussianForward call, ParallelFor parallel) {
  using C = compute_t<T>;
  // An output of one number an element, or a dim, is in logical order.
  const bool logical = call.reduction == Reduction::none || call.reduction == Reduction::dim;
  const bool swapped =
      !logical && swap_dims(call, {&call.mu, &call.rho, &call.prior_mu, &call.prior_rho, &call.eps, &call.z});
  const Shape& shape = call.shape;
  const auto options = tile_options<C>(call);
  const int64_t step = tile_step<T>(call, swapped, {&call.mu, &call.rho, &call.z});
  reduce_tiles(shape, call.reduction, static_cast<C*>(call.kl), step, parallel,
               [&](int64_t begin, int64_t n, const Sink<C>& sink) {
                 alignas(64) T mu[kTile], rho[kTile], z[kTile];
                 alignas(64) C prior_mu[kTile], prior_rho[kTile], eps[kSwappedTile];
                 ForwardTile<T> t;
                 t.mu = read(call.mu, shape, begin, n, mu);
                 t.rho = read(call.rho, shape, begin, n, rho);
                 t.prior_mu = read_as<C>(call.prior_mu, shape, begin, n, prior_mu);
                 t.prior_rho = read_as<C>(call.prior_rho, shape, begin, n, prior_rho);
                 t.noise = tile_noise<C>(call, swapped, begin, n, eps);
                 t.z = target(call.z, shape, begin, n, z);
                 t.kl = sink;
                 t.n = n;
                 run(t, options);
                 put(call.z, shape, begin, n, t.z, z);
               });
}

// The prior's gradients: each element's contribution is added to the prior element that it read.
template <class C>
class PriorGradient {
 public:
  PriorGradient(const GaussianBackward& call) : call_(call), wanted_(call.gprior_mu != nullptr) {
    if (!wanted_) return;
    const int64_t chunks = ceil_div(call.shape.n, kChunk);
    // Many small accumulators serve many tasks; a few large ones keep memory in bounds.
    const int64_t most = std::max<int64_t>(1, (int64_t{1} << 22) / std::max<int64_t>(1, call.prior_n));
    groups_ = std::min({int64_t{kTaskGroups}, std::max<int64_t>(1, chunks), most});
    mu_.resize(static_cast<size_t>(groups_ * call.prior_n));
    rho_.resize(mu_.size());
  }
  bool wanted() const { return wanted_; }
  int64_t groups() const { return groups_; }
  void add(int64_t group, int64_t begin, int64_t n, const C* gmu, const C* grho) {
    cpu::add(mu_.data() + group * call_.prior_n, call_.shape, call_.prior_stride, begin, n, gmu);
    cpu::add(rho_.data() + group * call_.prior_n, call_.shape, call_.prior_stride, begin, n, grho);
  }
  void finish() const {
    write(mu_, static_cast<C*>(call_.gprior_mu));
    write(rho_, static_cast<C*>(call_.gprior_rho));
  }

 private:
  void write(const std::vector<double>& sums, C* out) const {
    for (int64_t i = 0; i < call_.prior_n; ++i) {
      double s = 0;
      for (int64_t group = 0; group < groups_; ++group) s += sums[group * call_.prior_n + i];
      out[i] = static_cast<C>(s);
    }
  }
  const GaussianBackward& call_;
  bool wanted_;
  int64_t groups_ = 0;
  std::vector<double> mu_, rho_;
};

template <class T>
void backward_typed(GaussianBackward call, ParallelFor parallel) {
  using C = compute_t<T>;
  const bool swapped = swap_dims(call, {&call.mu, &call.rho, &call.prior_mu, &call.prior_rho, &call.eps, &call.gz,
                                        &call.gkl, &call.gmu, &call.grho});
  if (swapped) std::swap(call.prior_stride[call.shape.ndim - 2], call.prior_stride[call.shape.ndim - 1]);
  const Shape& shape = call.shape;
  const auto options = tile_options<C>(call);
  const C factor = static_cast<C>(reduction_scale(call.reduction, shape));
  const bool one_weight = call.gkl.data == nullptr || call.reduction >= Reduction::batchmean;
  const C weight = call.gkl.data == nullptr ? C(0) : one_weight ? *static_cast<C*>(call.gkl.data) * factor : C(0);
  PriorGradient<C> prior(call);
  // Rows of whole groups of 64 have one weight each: a tile is then whole rows, or part of one.
  const bool row_weights = call.reduction == Reduction::sample && !one_weight && !prior.wanted() &&
                           rows_fit_tasks(shape) && shape.width % kLanes == 0;
  const auto weight_of_row = [&](int64_t row) {
    C one[1];
    if (shape.ndim == 2 && shape.size[1] == shape.width)
      return static_cast<C*>(call.gkl.data)[row * call.gkl.stride[0]];
    return *read_as<C>(call.gkl, shape, row * shape.width, 1, one);
  };

  const auto tile = [&](int64_t group, int64_t begin, int64_t n) {
    alignas(64) T gz[kTile], mu[kTile], rho[kTile], gmu[kTile], grho[kTile];
    alignas(64) C gkl[kTile], prior_mu[kTile], prior_rho[kTile], eps[kSwappedTile], gprior_mu[kTile], gprior_rho[kTile];
    BackwardTile<T> t;
    t.gz = read(call.gz, shape, begin, n, gz);
    t.gkl = nullptr;
    t.weight = weight;
    t.has_gkl = call.gkl.data != nullptr;
    t.row = 0;
    if (row_weights && begin / shape.width == (begin + n - 1) / shape.width) {
      t.weight = weight_of_row(begin / shape.width);
    } else if (row_weights && begin % shape.width == 0 && n % shape.width == 0) {
      for (int64_t k = 0; k < n / shape.width; ++k) gkl[k] = weight_of_row(begin / shape.width + k);
      t.gkl = gkl;
      t.row = shape.width;
    } else if (!one_weight) {
      t.gkl = read_as<C>(call.gkl, shape, begin, n, gkl);
      if (factor != C(1)) {
        for (int64_t i = 0; i < n; ++i) gkl[i] = t.gkl[i] * factor;
        t.gkl = gkl;
      }
    }
    t.mu = read(call.mu, shape, begin, n, mu);
    t.rho = read(call.rho, shape, begin, n, rho);
    t.prior_mu = read_as<C>(call.prior_mu, shape, begin, n, prior_mu);
    t.prior_rho = read_as<C>(call.prior_rho, shape, begin, n, prior_rho);
    if (t.gz != nullptr) t.noise = tile_noise<C>(call, swapped, begin, n, eps);
    t.gmu = target(call.gmu, shape, begin, n, gmu);
    t.grho = target(call.grho, shape, begin, n, grho);
    t.gprior_mu = prior.wanted() ? gprior_mu : nullptr;
    t.gprior_rho = prior.wanted() ? gprior_rho : nullptr;
    t.n = n;
    run(t, options);
    put(call.gmu, shape, begin, n, t.gmu, gmu);
    put(call.grho, shape, begin, n, t.grho, grho);
    if (prior.wanted()) prior.add(group, begin, n, gprior_mu, gprior_rho);
  };

  if (!prior.wanted()) {
    const int64_t step = one_weight || row_weights
                             ? tile_step<T>(call, swapped, {&call.mu, &call.rho, &call.gz, &call.gmu, &call.grho})
                             : kTile;
    // As many whole rows as a tile holds, or tiles that end where a row does.
    const int64_t row = !row_weights ? shape.n : shape.width < step ? step / shape.width * shape.width : shape.width;
    for_each_tile(shape.n, row, step, parallel, [&](int64_t begin, int64_t n) { tile(0, begin, n); });
    return;
  }
  const int64_t chunks = ceil_div(shape.n, kChunk), groups = prior.groups();
  parallel_for(shape.n <= kSerial ? serial : parallel, groups, [&](int64_t group) {
    const int64_t end = std::min(shape.n, (group + 1) * chunks / groups * kChunk);
    for (int64_t at = group * chunks / groups * kChunk; at < end; at += kTile) {
      tile(group, at, std::min(kTile, end - at));
    }
  });
  prior.finish();
}

}  // namespace

void gaussian_forward(const GaussianForward& call, ParallelFor parallel) {
  switch (call.mu.dtype) {
    case Dtype::f32:
      return forward_typed<float>(call, parallel);
    case Dtype::bf16:
      return forward_typed<bf16>(call, parallel);
    case Dtype::f16:
      return forward_typed<f16>(call, parallel);
    case Dtype::f64:
      return forward_typed<double>(call, parallel);
  }
}

void gaussian_backward(const GaussianBackward& call, ParallelFor parallel) {
  switch (call.mu.dtype) {
    case Dtype::f32:
      return backward_typed<float>(call, parallel);
    case Dtype::bf16:
      return backward_typed<bf16>(call, parallel);
    case Dtype::f16:
      return backward_typed<f16>(call, parallel);
    case Dtype::f64:
      return backward_typed<double>(call, parallel);
  }
}

namespace {

template <class T>
void run(const LogProbTile<T>& t, Param param) {
  VAEOPS_DISPATCH(log_prob<T>)(t, param);
}
void run(const LogProbTile<double>& t, Param param) { log_prob(t, param); }
template <class T>
void run_backward(const LogProbTile<T>& t, Param param) {
  VAEOPS_DISPATCH(log_prob_backward<T>)(t, param);
}
void run_backward(const LogProbTile<double>& t, Param param) { log_prob_backward(t, param); }

template <class T>
void log_prob_typed(const LogProbForward& call, ParallelFor parallel) {
  using C = compute_t<T>;
  const Shape& shape = call.shape;
  reduce_tiles(shape, call.reduction, static_cast<C*>(call.out), kTile, parallel,
               [&](int64_t begin, int64_t n, const Sink<C>& sink) {
                 alignas(64) T x[kTile], mu[kTile], rho[kTile];
                 LogProbTile<T> t{};
                 t.x = read(call.x, shape, begin, n, x);
                 t.mu = read(call.mu, shape, begin, n, mu);
                 t.rho = read(call.rho, shape, begin, n, rho);
                 t.out = sink;
                 t.n = n;
                 run(t, call.param);
               });
}

template <class T>
void log_prob_backward_typed(const LogProbBackward& call, ParallelFor parallel) {
  using C = compute_t<T>;
  const Shape& shape = call.shape;
  const C factor = static_cast<C>(reduction_scale(call.reduction, shape));
  for_each_tile(shape.n, shape.n, kTile, parallel, [&](int64_t begin, int64_t n) {
    alignas(64) T x[kTile], mu[kTile], rho[kTile], gx[kTile], gmu[kTile], grho[kTile];
    alignas(64) C grad[kTile];
    LogProbTile<T> t{};
    const C* weights = read_as<C>(call.grad, shape, begin, n, grad);
    for (int64_t i = 0; i < n; ++i) grad[i] = weights[i] * factor;
    t.grad = grad;
    t.x = read(call.x, shape, begin, n, x);
    t.mu = read(call.mu, shape, begin, n, mu);
    t.rho = read(call.rho, shape, begin, n, rho);
    t.gx = target(call.gx, shape, begin, n, gx);
    t.gmu = target(call.gmu, shape, begin, n, gmu);
    t.grho = target(call.grho, shape, begin, n, grho);
    t.n = n;
    run_backward(t, call.param);
    put(call.gx, shape, begin, n, t.gx, gx);
    put(call.gmu, shape, begin, n, t.gmu, gmu);
    put(call.grho, shape, begin, n, t.grho, grho);
  });
}

}  // namespace

void log_prob_forward(const LogProbForward& call, ParallelFor parallel) {
  switch (call.x.dtype) {
    case Dtype::f32:
      return log_prob_typed<float>(call, parallel);
    case Dtype::bf16:
      return log_prob_typed<bf16>(call, parallel);
    case Dtype::f16:
      return log_prob_typed<f16>(call, parallel);
    case Dtype::f64:
      return log_prob_typed<double>(call, parallel);
  }
}

void log_prob_backward(const LogProbBackward& call, ParallelFor parallel) {
  switch (call.x.dtype) {
    case Dtype::f32:
      return log_prob_backward_typed<float>(call, parallel);
    case Dtype::bf16:
      return log_prob_backward_typed<bf16>(call, parallel);
    case Dtype::f16:
      return log_prob_backward_typed<f16>(call, parallel);
    case Dtype::f64:
      return log_prob_backward_typed<double>(call, parallel);
  }
}

}  // namespace vaeops::cpu
