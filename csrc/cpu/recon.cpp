// Reconstruction losses on a CPU: operands to tiles, tiles to the instruction set's kernels, sums in a fixed order.
#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "cpu/recon_f64.h"
#include "cpu/recon_tiles.h"
#include "cpu/reduce.h"
#include "cpu/strided.h"

#define VAEOPS_KERNELS "cpu/recon_kernels.h"
#include "cpu/foreach_isa.h"
#undef VAEOPS_KERNELS

namespace vaeops::cpu {
namespace {

template <class T, class S>
void run_forward(const ReconTile<T, S>& t, const ReconOptions<float>& o) {
  VAEOPS_DISPATCH(forward<T, S>)(t, o);
}
template <class T, class S>
void run_backward(const ReconTile<T, S>& t, const ReconOptions<float>& o) {
  VAEOPS_DISPATCH(backward<T, S>)(t, o);
}
template <class T, class S>
RowSums run_forward(const MultinomialTile<T, S>& t) {
  return VAEOPS_DISPATCH(row_sums<T, S>)(t);
}
template <class T, class S>
void run_backward(const MultinomialTile<T, S>& t) {
  VAEOPS_DISPATCH(multinomial_backward<T, S>)(t);
}
void run_forward(const ReconTile<double, double>& t, const ReconOptions<double>& o) { forward(t, o); }
void run_backward(const ReconTile<double, double>& t, const ReconOptions<double>& o) { backward(t, o); }
RowSums run_forward(const MultinomialTile<double, double>& t) { return row_sums(t); }
void run_backward(const MultinomialTile<double, double>& t) { multinomial_backward(t); }

// Calls f(T{}, S{}): the types of pred and of the target as the kernels read it.
template <class T, class F>
void with_target(const Operand& target, Dtype own, const F& f) {
  if constexpr (std::is_same_v<T, double>) {
    f(T{}, T{});
  } else if (target.bytes) {
    f(T{}, uint8_t{});
  } else if (target.dtype == own) {
    f(T{}, T{});
  } else {
    f(T{}, float{});
  }
}
template <class F>
void with_types(const Operand& pred, const Operand& target, const F& f) {
  switch (pred.dtype) {
    case Dtype::f32:
      return with_target<float>(target, pred.dtype, f);
    case Dtype::bf16:
      return with_target<bf16>(target, pred.dtype, f);
    case Dtype::f16:
      return with_target<f16>(target, pred.dtype, f);
    case Dtype::f64:
      return with_target<double>(target, pred.dtype, f);
  }
}

template <class S>
const S* read_target(const Operand& x, const Shape& shape, int64_t begin, int64_t n, S* buffer) {
  if constexpr (std::is_same_v<S, float> || std::is_same_v<S, double>) {
    return read_as<S>(x, shape, begin, n, buffer);
  } else {
    return read<S>(x, shape, begin, n, buffer);
  }
}

// Whether the kernels read or write the operand where it lies, so that no buffer limits a tile. Kernels read bytes and
// T; other types are converted.
template <class T>
bool in_place(const Operand& x, Dtype own) {
  return sizeof(T) < 8 && x.linear && (x.bytes || x.dtype == own);
}

template <class C>
ReconOptions<C> recon_options(const Recon& call) {
  return {call.kind,
          static_cast<C>(call.scale),
          static_cast<C>(1 / call.scale),
          static_cast<C>(recon_constant(call.kind, call.scale)),
          static_cast<C>(call.levels),
          static_cast<C>(1.0 / 510)};
}

template <class T, class S>
void forward_typed(const ReconForward& call, ParallelFor parallel) {
  using C = compute_t<T>;
  const Shape& shape = call.shape;
  const auto options = recon_options<C>(call);
  const Dtype own = call.pred.dtype;
  const bool direct = call.weight.data == nullptr && in_place<T>(call.pred, own) && in_place<T>(call.target, own);
  reduce_tiles(shape, call.reduction, static_cast<C*>(call.out), direct ? kChunk : kTile, parallel,
               [&](int64_t begin, int64_t n, const Sink<C>& sink) {
                 alignas(64) T pred[kTile];
                 alignas(64) S target[kTile];
                 alignas(64) C weight[kTile];
                 ReconTile<T, S> t{};
                 t.pred = read(call.pred, shape, begin, n, pred);
                 t.target = read_target(call.target, shape, begin, n, target);
                 t.weight = read_as<C>(call.weight, shape, begin, n, weight);
                 t.out = sink;
                 t.n = n;
                 run_forward(t, options);
               });
}

// Reads pred and target again, for l1 too: its signs, kept as a byte an element, would have to be written and read.
template <class T, class S>
void backward_typed(const ReconBackward& call, ParallelFor parallel) {
  using C = compute_t<T>;
  const Shape& shape = call.shape;
  const auto options = recon_options<C>(call);
  const Dtype own = call.pred.dtype;
  const C factor = static_cast<C>(reduction_scale(call.reduction, shape));
  const bool one_grad = call.reduction >= Reduction::batchmean;
  // A sample of some length has a gradient of its own for all its elements: tiles then end where it does.
  const bool row_grads = call.reduction == Reduction::sample && shape.width >= kShortRow;
  const bool direct = (one_grad || row_grads) && call.weight.data == nullptr && in_place<T>(call.pred, own) &&
                      in_place<T>(call.target, own) && in_place<T>(call.gpred, own);
  for_each_tile(shape.n, row_grads ? shape.width : shape.n, direct ? kChunk : kTile, parallel,
                [&](int64_t begin, int64_t n) {
                  alignas(64) T pred[kTile], gpred[kTile];
                  alignas(64) S target[kTile];
                  alignas(64) C weight[kTile], grad[kTile];
                  ReconTile<T, S> t{};
                  if (one_grad || row_grads) {
                    t.one_grad = *read_as<C>(call.grad, shape, begin, 1, grad) * factor;
                  } else {
                    t.grad = read_as<C>(call.grad, shape, begin, n, grad);
                    if (factor != C(1)) {
                      for (int64_t i = 0; i < n; ++i) grad[i] = t.grad[i] * factor;
                      t.grad = grad;
                    }
                  }
                  t.pred = read(call.pred, shape, begin, n, pred);
                  t.target = read_target(call.target, shape, begin, n, target);
                  t.weight = read_as<C>(call.weight, shape, begin, n, weight);
                  t.gpred = cpu::target(call.gpred, shape, begin, n, gpred);
                  t.n = n;
                  run_backward(t, options);
                  put(call.gpred, shape, begin, n, t.gpred, gpred);
                });
}

// Elements of a row that one tile takes: few enough for the second look at them to find them in the first-level cache.
constexpr int64_t kItems = kTile;

// Fills all of a tile but what backward writes.
template <class T, class S>
struct ItemBuffers {
  alignas(64) T logits[kItems];
  alignas(64) S target[kItems];
  alignas(64) compute_t<T> weight[kItems];

  MultinomialTile<T, S> tile(const Multinomial& call, int64_t begin, int64_t n) {
    MultinomialTile<T, S> t{};
    t.logits = read(call.logits, call.shape, begin, n, logits);
    t.target = read_target(call.target, call.shape, begin, n, target);
    t.weight = read_as<compute_t<T>>(call.weight, call.shape, begin, n, weight);
    t.masked = call.weight.bytes;
    t.n = n;
    return t;
  }
};

template <class T, class S>
void multinomial_forward_typed(const MultinomialForward& call, ParallelFor parallel) {
  using C = compute_t<T>;
  const Shape& shape = call.shape;
  const int64_t pieces = std::max<int64_t>(1, ceil_div(shape.width, kChunk));
  std::vector<RowSums> partial(static_cast<size_t>(shape.rows * pieces));
  const ParallelFor loop = shape.n <= kSerial ? serial : parallel;
  parallel_for(loop, shape.rows * pieces, [&](int64_t task) {
    const int64_t row = task / pieces * shape.width, from = task % pieces * kChunk;
    const int64_t end = std::min(shape.width, from + kChunk);
    ItemBuffers<T, S> buffers;
    for (int64_t at = from; at < end; at += kItems) {
      partial[task].merge(run_forward(buffers.tile(call, row + at, std::min(kItems, end - at))));
    }
  });
  for (int64_t row = 0; row < shape.rows; ++row) {
    RowSums sums;
    for (int64_t piece = 0; piece < pieces; ++piece) sums.merge(partial[row * pieces + piece]);
    const double lse = sums.shift + std::log(sums.sum);
    static_cast<C*>(call.nll)[row] = static_cast<C>((sums.total == 0 ? 0 : sums.total * lse) - sums.drawn);
    call.lse[row] = lse;
    static_cast<C*>(call.total)[row] = static_cast<C>(sums.total);
  }
}

template <class T, class S>
void multinomial_backward_typed(const MultinomialBackward& call, ParallelFor parallel) {
  using C = compute_t<T>;
  const Shape& shape = call.shape;
  for_each_tile(shape.n, shape.width, kItems, parallel, [&](int64_t begin, int64_t n) {
    ItemBuffers<T, S> buffers;
    alignas(64) T glogits[kItems];
    MultinomialTile<T, S> t = buffers.tile(call, begin, n);
    const int64_t row = begin / shape.width;
    t.grad = static_cast<const C*>(call.grad)[row];
    t.lse = call.lse[row];
    t.total = static_cast<const C*>(call.total)[row];
    if (std::isinf(t.lse) && t.lse < 0) t.lse = 0;  // every logit is -inf: exp(x - lse) shall be 0
    t.glogits = target(call.glogits, shape, begin, n, glogits);
    run_backward(t);
    put(call.glogits, shape, begin, n, t.glogits, glogits);
  });
}

}  // namespace

void recon_forward(const ReconForward& call, ParallelFor parallel) {
  with_types(call.pred, call.target, [&](auto t, auto s) { forward_typed<decltype(t), decltype(s)>(call, parallel); });
}

void recon_backward(const ReconBackward& call, ParallelFor parallel) {
  with_types(call.pred, call.target, [&](auto t, auto s) { backward_typed<decltype(t), decltype(s)>(call, parallel); });
}

void multinomial_forward(const MultinomialForward& call, ParallelFor parallel) {
  with_types(call.logits, call.target,
             [&](auto t, auto s) { multinomial_forward_typed<decltype(t), decltype(s)>(call, parallel); });
}

void multinomial_backward(const MultinomialBackward& call, ParallelFor parallel) {
  with_types(call.logits, call.target,
             [&](auto t, auto s) { multinomial_backward_typed<decltype(t), decltype(s)>(call, parallel); });
}

}  // namespace vaeops::cpu
