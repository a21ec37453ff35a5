// Sums of rows by index, on a CPU: a stable counting sort of the rows, then each code's rows in their order. The bits
// depend on no number of threads. Specification: vaeops/ref/vq.py.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/vq_rows.h"

#define VAEOPS_KERNELS "cpu/vq_segment_kernels.h"
#include "cpu/foreach_isa.h"
#undef VAEOPS_KERNELS

namespace vaeops::cpu {
namespace {

// The rows in use, ordered by code.
template <class R>
struct Order {
  std::unique_ptr<R[]> rows;   // [start[K]]
  std::unique_ptr<R[]> start;  // [K + 1]
  int64_t longest = 0;         // rows of the code that has most
};

template <class R, class Index>
Order<R> order_of(int64_t n, int64_t codes, const Index& index, ParallelFor parallel) {
  // A histogram for each part of the rows, in O(N + K) memory.
  const int64_t most = std::max<int64_t>(1, (2 * n + (1 << 20)) / codes);
  const int64_t parts = std::clamp<int64_t>(n / 4096, 1, std::min<int64_t>(most, 16));
  const auto part = [&](int64_t p) { return n * p / parts; };
  std::vector<R> next(static_cast<size_t>(parts * codes));
  parallel_for(parallel, parts, [&](int64_t p) {
    R* const counts = next.data() + p * codes;
    for (int64_t row = part(p); row < part(p + 1); ++row) {
      if (const int64_t k = index(row); k >= 0) ++counts[k];
    }
  });
  Order<R> order;
  order.start = buffer_of<R>(codes + 1);
  R total = 0;
  for (int64_t k = 0; k < codes; ++k) {
    order.start[k] = total;
    for (int64_t p = 0; p < parts; ++p) {
      const R count = next[p * codes + k];
      next[p * codes + k] = total;
      total += count;
    }
    order.longest = std::max(order.longest, static_cast<int64_t>(total - order.start[k]));
  }
  order.start[codes] = total;
  order.rows = buffer_of<R>(static_cast<int64_t>(total));
  parallel_for(parallel, parts, [&](int64_t p) {
    R* const at = next.data() + p * codes;
    for (int64_t row = part(p); row < part(p + 1); ++row) {
      if (const int64_t k = index(row); k >= 0) order.rows[at[k]++] = static_cast<R>(row);
    }
  });
  return order;
}

// The first code of task t of `tasks`, which share rows and codes evenly.
template <class R>
int64_t first_code(const Order<R>& order, int64_t codes, int64_t t, int64_t tasks) {
  const int64_t work = static_cast<int64_t>(order.start[codes]) + codes, wanted = work * t / tasks;
  int64_t low = 0, high = codes;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    static_cast<int64_t>(order.start[middle]) + middle < wanted ? low = middle + 1 : high = middle;
  }
  return low;
}

template <class T, class R>
void sum_all(const VqSegmentSum& call, const Order<R>& order, const SegmentTile<T, R>& whole, ParallelFor parallel) {
  const int64_t rows = static_cast<int64_t>(order.start[call.codes]);
  const int64_t tasks =
      std::clamp<int64_t>((rows + call.codes) * whole.n / kChunk, 1, std::min<int64_t>(call.codes, 512));
  // Where one code has a good part of all rows, its dims are shared out too.
  const int64_t group = 4 * order.longest > rows && whole.n > 16 && rows * whole.n > kSerial ? 16 : whole.n;
  parallel_for(parallel, tasks * ceil_div(whole.n, group), [&](int64_t task) {
    const int64_t first = first_code(order, call.codes, task % tasks, tasks);
    const int64_t last = first_code(order, call.codes, task % tasks + 1, tasks);
    const int64_t skipped = task / tasks * group;
    SegmentTile<T, R> t = whole;
    t.begin += skipped;
    t.out_begin += skipped;
    t.n = std::min(group, whole.n - skipped);
    if (t.out_begin > 0) t.counts = nullptr;
    if (call.absmax != nullptr) return VAEOPS_DISPATCH(sum_codes_fixed<T, R>)(t, first, last);
    const auto sums = buffer_of<double>(t.n);
    VAEOPS_DISPATCH(sum_codes<T, R>)(t, first, last, sums.get());
  });
}

// `width` dims from `begin` on, which are whole rows of `values`.
template <class T, class R>
SegmentTile<T, R> tile_of(const VqSegmentSum& call, const Order<R>& order, RowSpan<const T> values, int64_t begin,
                          int64_t width, bool skip_nonfinite) {
  SegmentTile<T, R> t{};
  t.values = values;
  t.width = t.n = width;
  t.rows = order.rows.get();
  t.start = order.start.get();
  t.weights = call.weights;
  t.weights_f64 = call.weights_f64;
  t.skip_nonfinite = skip_nonfinite;
  t.counts = call.counts;
  t.sums = call.sums;
  t.codes = call.codes;
  t.dims = call.dims;
  t.out_begin = begin;
  t.out_f64 = call.out_f64;
  if (call.absmax != nullptr) {
    int exponent = 0;
    std::frexp(call.absmax_f64 ? *static_cast<const double*>(call.absmax) : *static_cast<const float*>(call.absmax),
               &exponent);
    const int up = 36 - exponent;  // 2^up itself may overflow
    t.scale[0] = std::ldexp(1.0, up / 2);
    t.scale[1] = std::ldexp(1.0, up - up / 2);
  }
  return t;
}

template <class T, class R>
void segment_sum_typed(const VqSegmentSum& call, ParallelFor parallel) {
  using C = compute_t<T>;
  const Shape& shape = call.shape;
  const int64_t n = shape.n, dims = call.dims;
  const ParallelFor loop = std::max(n, call.codes) * dims <= kSerial ? serial : parallel;

  const auto index = [&](int64_t row) { return index_of(call.indices, row); };

  if (call.values.step == 1 && shape.ndim == 1) {
    const Order<R> order = order_of<R>(n, call.codes, index, loop);
    const RowSpan<const T> values = span_of<const T>(call.values, shape, 0);
    return sum_all(call, order, tile_of(call, order, values, 0, dims, call.skip_nonfinite), loop);
  }

  // Rows that do not lie contiguously are copied, some dims at a time: no more memory than for the order.
  const int64_t most = std::max<int64_t>(int64_t{8} << 20, 32 * n) / (n * static_cast<int64_t>(sizeof(C)));
  const int64_t width = most >= dims ? dims : std::max<int64_t>(1, most / 4 * 4);
  const auto copied = buffer_of<C>(n * width);
  const auto copy_dims = [&](int64_t begin, int64_t count, C* to, int64_t first, int64_t rows) {
    for_each_piece(shape, first, first + rows, kTileRows, [&](int64_t at, int64_t some) {
      const RowSpan<const T> from = span_of<const T>(call.values, shape, at);
      VAEOPS_DISPATCH(load_rows<T, C>)
      (from.data + begin * call.values.step, from.stride, call.values.step, some, count, to + (at - first) * count);
    });
  };
  std::vector<uint8_t> skipped(static_cast<size_t>(call.skip_nonfinite && width < dims ? n : 0));
  if (!skipped.empty()) {  // no copy below holds whole rows
    const int64_t task_rows = rows_in_buffer(dims);
    parallel_for(loop, ceil_div(n, task_rows), [&](int64_t task) {
      const int64_t first = task * task_rows, rows = std::min(task_rows, n - first);
      const auto whole = buffer_of<C>(rows * dims);
      copy_dims(0, dims, whole.get(), first, rows);
      for (int64_t r = 0; r < rows; ++r) {
        skipped[first + r] = VAEOPS_DISPATCH(row_not_finite<C>)(whole.get() + r * dims, dims);
      }
    });
  }
  const auto used = [&](int64_t row) { return skipped.empty() || !skipped[row] ? index(row) : -1; };
  const Order<R> order = order_of<R>(n, call.codes, used, loop);
  for (int64_t begin = 0; begin < dims; begin += width) {
    const int64_t count = std::min(width, dims - begin), task_rows = ceil_div(kChunk, count);
    parallel_for(loop, ceil_div(n, task_rows), [&](int64_t task) {
      const int64_t first = task * task_rows;
      copy_dims(begin, count, copied.get() + first * count, first, std::min(task_rows, n - first));
    });
    const RowSpan<const C> values{copied.get(), count};
    sum_all(call, order, tile_of(call, order, values, begin, count, call.skip_nonfinite && skipped.empty()), loop);
  }
}

}  // namespace

void vq_segment_sum(const VqSegmentSum& call, ParallelFor parallel) {
  if (call.shape.n == 0) {
    const bool wide = call.absmax != nullptr || call.out_f64;
    const size_t bytes = static_cast<size_t>(call.codes) * (wide ? 8 : 4);
    std::memset(call.counts, 0, bytes);
    std::memset(call.sums, 0, bytes * static_cast<size_t>(call.dims));
    return;
  }
  with_dtype(call.values.operand.dtype, [&](auto type) {
    using T = decltype(type);
    const bool narrow = call.shape.n <= std::numeric_limits<uint32_t>::max();
    narrow ? segment_sum_typed<T, uint32_t>(call, parallel) : segment_sum_typed<T, int64_t>(call, parallel);
  });
}

}  // namespace vaeops::cpu
