// Reading and writing the operands of a call: 8 neighbouring elements as 16-byte vectors where memory is linear,
// element by element through strides elsewhere.
#pragma once
#include "common.cuh"

namespace vaeops::cuda {

constexpr int kChunk = 8;  // elements that a thread takes at a time: two Philox blocks

template <class T>
struct alignas(16) Vector {
  T x[16 / sizeof(T)];
};

template <class T>
__device__ __forceinline__ void load_chunk(const void* data, int64_t i, Compute<T> (&x)[kChunk]) {
  constexpr int kLanes = 16 / sizeof(T);
  const Vector<T>* from = reinterpret_cast<const Vector<T>*>(static_cast<const T*>(data) + i);
#pragma unroll
  for (int v = 0; v < kChunk / kLanes; ++v) {
    const Vector<T> lanes = from[v];
#pragma unroll
    for (int e = 0; e < kLanes; ++e) x[v * kLanes + e] = widen(lanes.x[e]);
  }
}

template <class T>
__device__ __forceinline__ void store_chunk(void* data, int64_t i, const Compute<T> (&x)[kChunk]) {
  constexpr int kLanes = 16 / sizeof(T);
  Vector<T>* to = reinterpret_cast<Vector<T>*>(static_cast<T*>(data) + i);
#pragma unroll
  for (int v = 0; v < kChunk / kLanes; ++v) {
    Vector<T> lanes;
#pragma unroll
    for (int e = 0; e < kLanes; ++e) lanes.x[e] = narrow<T>(x[v * kLanes + e]);
    to[v] = lanes;
  }
}

template <class T>
__device__ __forceinline__ Compute<T> load(const Operand& from, int64_t offset) {
  return widen(static_cast<const T*>(from.data)[offset]);
}

template <class T>
__device__ __forceinline__ void store(const Operand& to, int64_t offset, Compute<T> x) {
  static_cast<T*>(to.data)[offset] = narrow<T>(x);
}

// An operand whose dtype is not the kernel's.
template <class C>
__device__ __forceinline__ C load_any(const Operand& from, int64_t offset) {
  switch (from.dtype) {
    case Dtype::f32:
      return static_cast<C>(static_cast<const float*>(from.data)[offset]);
    case Dtype::bf16:
      return widen(static_cast<const Bf16*>(from.data)[offset]);
    case Dtype::f16:
      return widen(static_cast<const Half*>(from.data)[offset]);
    default:
      return static_cast<C>(static_cast<const double*>(from.data)[offset]);
  }
}

// Offsets of logical element i in several operands by one chain of divisions. Returns how many elements, from i on, lie
// in the innermost dim's current run.
template <class... Operands>
__device__ __forceinline__ int64_t locate(const Shape& shape, int64_t i, int64_t (&at)[sizeof...(Operands)],
                                          const Operands&... operands) {
  for (int64_t& offset : at) offset = 0;
  int64_t left = 1;
  for (int d = shape.ndim - 1; d >= 0; --d) {
    int64_t index = i;
    if (d > 0) i = divide(i, shape.size[d], index);
    if (d == shape.ndim - 1) left = shape.size[d] - index;
    int k = 0;
    ((at[k++] += index * operands.stride[d]), ...);
  }
  return left;
}

__device__ __forceinline__ int64_t inner_stride(const Shape& shape, const Operand& operand) {
  return shape.ndim > 0 ? operand.stride[shape.ndim - 1] : 0;
}

// Offsets of consecutive logical elements: divisions where the innermost dim wraps, additions elsewhere.
template <int kOperands>
struct Walk {
  int64_t at[kOperands];
  int64_t left = 0;

  template <class... Operands>
  __device__ __forceinline__ void to(const Shape& shape, int64_t i, const Operands&... operands) {
    static_assert(sizeof...(Operands) == kOperands);
    if (left == 0) {
      left = locate(shape, i, at, operands...);
    } else {
      int k = 0;
      ((at[k++] += inner_stride(shape, operands)), ...);
    }
    --left;
  }
};

inline bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// Absent, or fit for 16-byte vectors.
inline bool vectorizable(const Operand& operand) {
  return operand.data == nullptr || (operand.linear && aligned(operand.data));
}

// Absent, or read at a constant stride within each chunk of 8: chunks never cross the innermost dim's end.
inline bool constant_stride(const Shape& shape, const Operand& operand) {
  if (operand.data == nullptr) return true;
  if (shape.ndim > 0 && shape.size[shape.ndim - 1] % kChunk == 0) return true;
  for (int d = 0; d < shape.ndim; ++d) {
    if (operand.stride[d] != 0) return false;
  }
  return true;
}

// Chunks hold whole Philox blocks of one stream.
inline bool whole_blocks(const Noise& noise, int64_t n) {
  return noise.seed == nullptr || noise.streams <= 1 || n / noise.streams % kChunk == 0;
}

}  // namespace vaeops::cuda
