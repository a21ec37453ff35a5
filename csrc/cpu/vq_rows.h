// Rows of a vector-quantization call: where they lie, and what one call of a kernel works on.
#pragma once
#include <algorithm>
#include <cstdint>
#include <memory>

#include "cpu/strided.h"
#include "cpu/types.h"
#include "vaeops.h"

namespace vaeops::cpu {

// n rows of D elements; element (r, d) lies at data[r * stride + d].
template <class T>
struct RowSpan {
  T* data = nullptr;  // null: absent
  int64_t stride = 0;
  VAEOPS_INLINE_METHOD T* row(int64_t r) const { return data + r * stride; }
  explicit operator bool() const { return data != nullptr; }
};

// C: what is computed in, fp32 or fp64.
template <class T, class C>
struct GatherTile {
  int64_t n, dims;
  const C* const* code;  // [n] rows of the codebook; null where the index is -1
  C fill;
  RowSpan<const T> x;
  RowSpan<T> quantized;
  C* loss;  // [n], summed over D
};

template <class T, class C>
struct GatherBackwardTile {
  int64_t n, dims;
  const C* const* code;  // [n], null where the index is -1
  RowSpan<const T> x, gq;
  RowSpan<T> gx;
  const C* w;  // [n]; null: no gradient reaches the loss
  Estimator estimator;
};

// Sums of rows by code, of `n` dims from `out_begin` on. R holds a row's number.
template <class T, class R>
struct SegmentTile {
  RowSpan<const T> values;
  int64_t width, begin, n;        // a row has `width` elements; those from `begin` on are summed
  const R* rows;                  // code k has rows[start[k]] .. rows[start[k + 1] - 1]
  const R* start;                 // [K + 1]
  const void* weights = nullptr;  // [N], fp64 or fp32; null: 1
  bool weights_f64, skip_nonfinite;
  double scale[2];      // fixed point: a value is multiplied by both, then rounded
  void *counts, *sums;  // [K] or null: not wanted, [K, D]
  int64_t codes, dims, out_begin;
  bool out_f64;
};

constexpr int kTileRows = 128;  // most rows of a tile

// Rows of a tile that is read and written in place, or through buffers: what lies in a tile stays in the first-level
// cache. 16 rows of a channel-first tensor are a cache line of each channel.
inline int64_t rows_in_place(int64_t dims) { return std::clamp<int64_t>(4096 / dims, 4, 64); }
inline int64_t rows_in_buffer(int64_t dims) { return std::clamp<int64_t>(8192 / dims, 16, kTileRows); }
// Rows of a task: fixed by D, so that no sum depends on the number of threads.
inline int64_t rows_of_task(int64_t dims) { return std::max<int64_t>(kChunk / dims, 16); }

inline bool in_place(const Rows& x) { return x.operand.data == nullptr || x.step == 1; }

inline int64_t offset_of_row(const Shape& shape, const int64_t* stride, int64_t row) {
  int64_t offset = 0;
  for (int d = shape.ndim - 1; d > 0; --d) {
    offset += row % shape.size[d] * stride[d];
    row /= shape.size[d];
  }
  return offset + row * stride[0];
}

// Calls run(first, count) for pieces of [begin, end) of at most `most` rows that are evenly spaced in every operand.
template <class Run>
inline void for_each_piece(const Shape& shape, int64_t begin, int64_t end, int64_t most, Run&& run) {
  const int64_t last = shape.size[shape.ndim - 1];
  for (int64_t at = begin; at < end;) {
    const int64_t count = std::min({most, end - at, last - at % last});
    run(at, count);
    at += count;
  }
}

// Rows [first, first + n), in place.
template <class T>
inline RowSpan<T> span_of(const Rows& rows, const Shape& shape, int64_t first) {
  const Operand& x = rows.operand;
  if (x.data == nullptr) return {};
  return {static_cast<T*>(x.data) + offset_of_row(shape, x.stride, first), x.stride[shape.ndim - 1]};
}

inline int64_t index_of(const Indices& indices, int64_t row) {
  return indices.int32 ? static_cast<const int32_t*>(indices.data)[row]
                       : static_cast<const int64_t*>(indices.data)[row];
}

// Memory that is not initialised.
template <class T>
std::unique_ptr<T[]> buffer_of(int64_t n) {
  return std::unique_ptr<T[]>(new T[static_cast<size_t>(n)]);
}

template <class Body>
inline void with_dtype(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::f32:
      return body(float{});
    case Dtype::bf16:
      return body(bf16{});
    case Dtype::f16:
      return body(f16{});
    case Dtype::f64:
      return body(double{});
  }
}

}  // namespace vaeops::cpu
