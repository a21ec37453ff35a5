// What the kernels of vector quantization share: rows through strides, indices, codes in full precision, teams of
// lanes.
#pragma once
#include "operand.cuh"

namespace vaeops::cuda {

__device__ __forceinline__ int64_t row_offset(const Shape& shape, const Operand& rows, int64_t n) {
  int64_t at[1];
  locate(shape, n, at, rows);
  return at[0];
}

template <class C>
__device__ __forceinline__ bool is_finite(C x) {
  return x - x == 0;
}

// -1 for what is no code of the book, so that no index reads outside of it.
__device__ __forceinline__ int64_t index_at(const Indices& indices, int64_t n, int64_t codes) {
  const int64_t k =
      indices.int32 ? static_cast<const int32_t*>(indices.data)[n] : static_cast<const int64_t*>(indices.data)[n];
  return k >= 0 && k < codes ? k : -1;
}

__device__ __forceinline__ void put_index(const Indices& indices, int64_t at, int64_t k) {
  if (indices.int32) {
    static_cast<int32_t*>(indices.data)[at] = static_cast<int32_t>(k);
  } else {
    static_cast<int64_t*>(indices.data)[at] = k;
  }
}

template <class C>
__device__ __forceinline__ C any_at(const void* data, Dtype dtype, int64_t i) {
  Operand from;
  from.data = const_cast<void*>(data);
  from.dtype = dtype;
  return load_any<C>(from, i);
}

// True in every lane of a team of `width` neighbouring lanes where it is true in one. All 32 lanes must call.
__device__ __forceinline__ bool team_any(bool x, int width) {
  const unsigned all = __ballot_sync(0xFFFFFFFFu, x), first = threadIdx.x % kWarp / width * width;
  return (all >> first & (0xFFFFFFFFu >> (kWarp - width))) != 0;
}

// Lanes that share a row: neighbours in memory go to neighbouring lanes, be they a row's dims or, where the rows are
// the contiguous direction, the rows.
inline int team_width(const Shape& shape, const Rows& rows, int64_t dims) {
  const bool rows_adjacent = shape.ndim > 0 && rows.operand.stride[shape.ndim - 1] == 1;
  if (dims < 8 || (rows.step != 1 && rows_adjacent)) return 1;
  return dims < kWarp ? 8 : kWarp;
}

// Where parts of a launcher's scratch memory lie, 16-byte aligned. Without memory it measures.
class Arena {
 public:
  explicit Arena(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <class T>
  T* take(int64_t count) {
    T* part = memory_ != nullptr ? reinterpret_cast<T*>(memory_ + bytes_) : nullptr;
    bytes_ += ceil_div(count * static_cast<int64_t>(sizeof(T)), 16) * 16;
    return part;
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* memory_;
  int64_t bytes_ = 0;
};

}  // namespace vaeops::cuda
