// Operands of any strides, read and written a tile at a time: a tile that lies contiguously in memory is used in place,
// any other is gathered into, or scattered from, a buffer in the first-level cache. So no call copies a whole tensor.
#pragma once
#include <algorithm>
#include <cstdint>

#include "cpu/types.h"
#include "vaeops.h"

namespace vaeops::cpu {

constexpr int64_t kTile = 1024;     // elements of a tile; a multiple of the kernels' block of 64
constexpr int64_t kChunk = 16384;   // elements of a task: fixed, so that no sum depends on the number of threads
constexpr int64_t kSerial = 32768;  // a call of fewer elements runs on the calling thread
constexpr int kTaskGroups = 16;     // tasks that keep private accumulators: fixed for the same reason

// Calls run(offset, stride, position, count) for each stretch of evenly spaced elements that the logical range
// [begin, begin + n) consists of. `position` counts from begin.
template <class Run>
inline void for_each_run(const Shape& shape, const int64_t* stride, int64_t begin, int64_t n, Run&& run) {
  const int last = shape.ndim - 1;
  int64_t index[kMaxDims] = {}, offset = 0, rest = begin;
  for (int d = last; d >= 0; --d) {
    index[d] = rest % shape.size[d];
    rest /= shape.size[d];
    offset += index[d] * stride[d];
  }
  for (int64_t position = 0; position < n;) {
    int64_t count = shape.size[last] - index[last];
    if (count > n - position) count = n - position;
    run(offset, stride[last], position, count);
    position += count;
    offset += count * stride[last];
    index[last] += count;
    for (int d = last; d > 0 && index[d] == shape.size[d]; --d) {
      offset += stride[d - 1] - index[d] * stride[d];
      index[d] = 0;
      ++index[d - 1];
    }
  }
}

// True when elements [begin, begin + n) lie one after the other; then `offset` is the first one's.
inline bool contiguous_at(const Operand& x, const Shape& shape, int64_t begin, int64_t n, int64_t& offset) {
  if (x.linear) {
    offset = begin;
    return true;
  }
  if (x.stride[shape.ndim - 1] != 1 || shape.size[shape.ndim - 1] < n) return false;
  int runs = 0;
  for_each_run(shape, x.stride, begin, n, [&](int64_t at, int64_t, int64_t, int64_t) {
    if (runs++ == 0) offset = at;
  });
  return runs == 1;
}

// The tile in the operand's own type T: in place, or copied to `buffer` [kTile].
template <class T>
inline const T* read(const Operand& x, const Shape& shape, int64_t begin, int64_t n, T* buffer) {
  if (x.data == nullptr) return nullptr;
  const T* data = static_cast<const T*>(x.data);
  int64_t offset = 0;
  if (contiguous_at(x, shape, begin, n, offset)) return data + offset;
  for_each_run(shape, x.stride, begin, n, [&](int64_t at, int64_t step, int64_t position, int64_t count) {
    if (step == 1) {
      copy(data + at, buffer + position, count);
    } else if (step == 0) {
      std::fill(buffer + position, buffer + position + count, data[at]);
    } else {
      for (int64_t i = 0; i < count; ++i) buffer[position + i] = data[at + i * step];
    }
  });
  return buffer;
}

// The tile of an operand of any floating type, or of bytes, in the compute type C.
template <class C>
inline const C* read_as(const Operand& x, const Shape& shape, int64_t begin, int64_t n, C* buffer) {
  if (x.data == nullptr) return nullptr;
  const bool same = !x.bytes && x.dtype == (sizeof(C) == 8 ? Dtype::f64 : Dtype::f32);
  if (same) return read<C>(x, shape, begin, n, buffer);
  const auto convert = [&](auto* data) {
    for_each_run(shape, x.stride, begin, n, [&](int64_t at, int64_t step, int64_t position, int64_t count) {
      for (int64_t i = 0; i < count; ++i) buffer[position + i] = static_cast<C>(widen(data[at + i * step]));
    });
  };
  if (x.bytes) {
    convert(static_cast<const uint8_t*>(x.data));
    return buffer;
  }
  switch (x.dtype) {
    case Dtype::f32:
      convert(static_cast<const float*>(x.data));
      break;
    case Dtype::bf16:
      convert(static_cast<const bf16*>(x.data));
      break;
    case Dtype::f16:
      convert(static_cast<const f16*>(x.data));
      break;
    case Dtype::f64:
      convert(static_cast<const double*>(x.data));
      break;
  }
  return buffer;
}

// Where to write a tile of an output: in place, or `buffer`, which `put` then scatters.
template <class T>
inline T* target(const Operand& x, const Shape& shape, int64_t begin, int64_t n, T* buffer) {
  int64_t offset = 0;
  if (x.data == nullptr) return nullptr;
  return contiguous_at(x, shape, begin, n, offset) ? static_cast<T*>(x.data) + offset : buffer;
}

template <class T>
inline void put(const Operand& x, const Shape& shape, int64_t begin, int64_t n, const T* written, const T* buffer) {
  if (written != buffer) return;
  T* data = static_cast<T*>(x.data);
  for_each_run(shape, x.stride, begin, n, [&](int64_t at, int64_t step, int64_t position, int64_t count) {
    for (int64_t i = 0; i < count; ++i) data[at + i * step] = buffer[position + i];
  });
}

// sums[element's offset by `stride`] += values[i]: reduces a tile over the dims whose stride is 0.
template <class C>
inline void add(double* sums, const Shape& shape, const int64_t* stride, int64_t begin, int64_t n, const C* values) {
  for_each_run(shape, stride, begin, n, [&](int64_t at, int64_t step, int64_t position, int64_t count) {
    if (step == 0) {
      double sum = 0;
      for (int64_t i = 0; i < count; ++i) sum += values[position + i];
      sums[at] += sum;
    } else {
      for (int64_t i = 0; i < count; ++i) sums[at + i * step] += values[position + i];
    }
  });
}

template <class Body>
inline void parallel_for(ParallelFor parallel, int64_t n, const Body& body) {
  const auto call = [](void* context, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) (*static_cast<const Body*>(context))(i);
  };
  parallel(n, call, const_cast<Body*>(&body));
}

inline void serial(int64_t n, void (*body)(void*, int64_t, int64_t), void* context) { body(context, 0, n); }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t bytes_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

}  // namespace vaeops::cpu
