// Codes by their indices, the loss, and the backward of both, on a CPU. Specification: vaeops/ref/vq.py.
#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/vq_rows.h"

#define VAEOPS_KERNELS "cpu/vq_kernels.h"
#include "cpu/foreach_isa.h"
#undef VAEOPS_KERNELS

namespace vaeops::cpu {
namespace {

// The codebook's rows in the compute type C: in place, or converted to a buffer a tile at a time.
template <class C>
class Codes {
 public:
  Codes(const void* codebook, Dtype dtype, int64_t dims, const Indices& indices, int64_t most_rows)
      : codebook_(codebook), dtype_(dtype), dims_(dims), indices_(indices) {
    if (dtype != (sizeof(C) == 8 ? Dtype::f64 : Dtype::f32)) converted_ = buffer_of<C>(most_rows * dims);
  }
  // Those of rows [first, first + n); null where the index is -1.
  const C* const* of(int64_t first, int64_t n) {
    for (int64_t r = 0; r < n; ++r) {
      const int64_t index = index_of(indices_, first + r);
      code_[r] = nullptr;
      if (index < 0) continue;
      if (converted_ == nullptr) {
        code_[r] = static_cast<const C*>(codebook_) + index * dims_;
        // Codes lie anywhere: all of a tile's are asked for before the first is used.
        const char* const bytes = reinterpret_cast<const char*>(code_[r]);
        const int64_t size = std::min<int64_t>(dims_ * static_cast<int64_t>(sizeof(C)), 1024);
        for (int64_t at = 0; at < size; at += 64) __builtin_prefetch(bytes + at);
      } else {
        C* const row = converted_.get() + r * dims_;
        with_dtype(dtype_, [&](auto type) {
          const auto* code = static_cast<const decltype(type)*>(codebook_) + index * dims_;
          for (int64_t d = 0; d < dims_; ++d) row[d] = static_cast<C>(widen(code[d]));
        });
        code_[r] = row;
      }
    }
    return code_;
  }

 private:
  const void* codebook_;
  Dtype dtype_;
  int64_t dims_;
  const Indices& indices_;
  std::unique_ptr<C[]> converted_;
  const C* code_[kTileRows];
};

// A sum that keeps what its additions lose (Knuth's two-sum), so that losses in fp64 are as good as their rows.
struct Total {
  double sum = 0, lost = 0;
  int64_t rows = 0;
  void add(double x) {
    const double next = sum + x, added = next - sum;
    lost += (sum - (next - added)) + (x - added);
    sum = next;
  }
  void add(const Total& other) {
    add(other.sum);
    lost += other.lost;
    rows += other.rows;
  }
  double value() const { return std::isfinite(sum) ? sum + lost : sum; }
};

template <class Body>
void for_each_task(const Shape& shape, int64_t dims, ParallelFor parallel, const Body& body) {
  const int64_t rows = rows_of_task(dims);
  parallel_for(shape.n * dims <= kSerial ? serial : parallel, ceil_div(shape.n, rows),
               [&](int64_t task) { body(task, task * rows, std::min(shape.n, (task + 1) * rows)); });
}

// Without x: rows of the codebook as they are.
template <class T>
void lookup(const VqGather& call, ParallelFor parallel) {
  T fill;
  scalar::narrow(call.fill, &fill);
  for_each_task(call.shape, call.dims, parallel, [&](int64_t, int64_t begin, int64_t end) {
    for_each_piece(call.shape, begin, end, end - begin, [&](int64_t first, int64_t n) {
      const RowSpan<T> out = span_of<T>(call.quantized, call.shape, first);
      for (int64_t r = 0; r < n; ++r) {
        const int64_t index = index_of(call.indices, first + r);
        if (index < 0) {
          std::fill(out.row(r), out.row(r) + call.dims, fill);
        } else {
          copy(static_cast<const T*>(call.codebook) + index * call.dims, out.row(r), call.dims);
        }
      }
    });
  });
}

template <class T, class C>
void gather_typed(const VqGather& call, ParallelFor parallel) {
  const Shape& shape = call.shape;
  const int64_t dims = call.dims;
  const bool direct = in_place(call.x) && in_place(call.quantized);
  const int64_t tile_rows = direct ? rows_in_place(dims) : rows_in_buffer(dims);
  const int64_t tasks = ceil_div(shape.n, rows_of_task(dims));
  const bool reduced = call.reduction == RowReduction::mean || call.reduction == RowReduction::sum;
  std::vector<Total> totals(static_cast<size_t>(reduced ? tasks : 0));
  for_each_task(shape, dims, parallel, [&](int64_t task, int64_t begin, int64_t end) {
    Codes<C> codes(call.codebook, call.codebook_dtype, dims, call.indices, tile_rows);
    const auto x = buffer_of<C>(direct ? 0 : tile_rows * dims), quantized = buffer_of<C>(direct ? 0 : tile_rows * dims);
    C loss[kTileRows];
    Total total;
    for_each_piece(shape, begin, end, tile_rows, [&](int64_t first, int64_t n) {
      const C* const* code = codes.of(first, n);
      const RowSpan<const T> from = span_of<const T>(call.x, shape, first);
      const RowSpan<T> to = span_of<T>(call.quantized, shape, first);
      const C fill = static_cast<C>(call.fill);
      if (direct) {
        VAEOPS_DISPATCH(gather<T, C>)(GatherTile<T, C>{n, dims, code, fill, from, to, loss});
      } else {
        VAEOPS_DISPATCH(load_rows<T, C>)(from.data, from.stride, call.x.step, n, dims, x.get());
        VAEOPS_DISPATCH(gather<C, C>)
        (GatherTile<C, C>{n, dims, code, fill, {x.get(), dims}, {quantized.get(), dims}, loss});
        VAEOPS_DISPATCH(store_rows<C, T>)(quantized.get(), n, dims, to.data, to.stride, call.quantized.step);
      }
      for (int64_t r = 0; r < n; ++r) {
        if (call.reduction == RowReduction::none)
          static_cast<C*>(call.loss)[first + r] = loss[r] / static_cast<C>(dims);
        total.add(loss[r]);
        total.rows += code[r] != nullptr;
      }
    });
    if (reduced) totals[task] = total;
  });
  if (!reduced) return;
  Total total;
  for (const Total& t : totals) total.add(t);
  double value = total.value();
  if (call.reduction == RowReduction::mean) {
    value /= static_cast<double>(dims) * static_cast<double>(std::max<int64_t>(total.rows, 1));
  }
  *static_cast<C*>(call.loss) = static_cast<C>(value);
}

template <class T, class C>
void gather_backward_typed(const VqGatherBackward& call, ParallelFor parallel) {
  const Shape& shape = call.shape;
  const int64_t dims = call.dims;
  const bool direct = in_place(call.x) && in_place(call.gq) && in_place(call.gx);
  const int64_t tile_rows = direct ? rows_in_place(dims) : rows_in_buffer(dims);
  const C* const w = static_cast<const C*>(call.w);
  for_each_task(shape, dims, parallel, [&](int64_t, int64_t begin, int64_t end) {
    Codes<C> codes(call.codebook, call.codebook_dtype, dims, call.indices, tile_rows);
    const int64_t size = direct ? 0 : tile_rows * dims;
    const auto x = buffer_of<C>(size), gx = buffer_of<C>(size), gq = buffer_of<C>(size);
    C one_w[kTileRows];
    if (w != nullptr && !call.w_per_row) std::fill(one_w, one_w + kTileRows, *w);
    for_each_piece(shape, begin, end, tile_rows, [&](int64_t first, int64_t n) {
      const C* const* code = codes.of(first, n);
      const C* const weights = w == nullptr ? nullptr : call.w_per_row ? w + first : one_w;
      const RowSpan<const T> from = span_of<const T>(call.x, shape, first),
                             gradient = span_of<const T>(call.gq, shape, first);
      const RowSpan<T> to = span_of<T>(call.gx, shape, first);
      if (direct) {
        VAEOPS_DISPATCH(gather_backward<T, C>)
        (GatherBackwardTile<T, C>{n, dims, code, from, gradient, to, weights, call.estimator});
        return;
      }
      GatherBackwardTile<C, C> t{n, dims, code, {x.get(), dims}, {}, {gx.get(), dims}, weights, call.estimator};
      VAEOPS_DISPATCH(load_rows<T, C>)(from.data, from.stride, call.x.step, n, dims, x.get());
      if (gradient) {
        VAEOPS_DISPATCH(load_rows<T, C>)(gradient.data, gradient.stride, call.gq.step, n, dims, gq.get());
        t.gq = {gq.get(), dims};
      }
      VAEOPS_DISPATCH(gather_backward<C, C>)(t);
      VAEOPS_DISPATCH(store_rows<C, T>)(gx.get(), n, dims, to.data, to.stride, call.gx.step);
    });
  });
}

}  // namespace

void vq_gather(const VqGather& call, ParallelFor parallel) {
  with_dtype(call.quantized.operand.dtype, [&](auto type) {
    using T = decltype(type);
    if (call.x.operand.data == nullptr && call.reduction == RowReduction::off) return lookup<T>(call, parallel);
    if (sizeof(T) == 8 || call.codebook_dtype == Dtype::f64) return gather_typed<T, double>(call, parallel);
    if constexpr (sizeof(T) < 8) gather_typed<T, float>(call, parallel);
  });
}

void vq_gather_backward(const VqGatherBackward& call, ParallelFor parallel) {
  with_dtype(call.x.operand.dtype, [&](auto type) {
    using T = decltype(type);
    if (sizeof(T) == 8 || call.codebook_dtype == Dtype::f64) return gather_backward_typed<T, double>(call, parallel);
    if constexpr (sizeof(T) < 8) gather_backward_typed<T, float>(call, parallel);
  });
}

}  // namespace vaeops::cpu
