// Eight neighbouring elements of operands whose types are known at run time alone, bytes among them, as 16-byte
// vectors: one kernel serves all combinations of types. A chunk's loads are issued before the first of its values is
// looked at.
#pragma once
#include "operand.cuh"

namespace vaeops::cuda {

template <class C>
__device__ __forceinline__ C load_value(const Operand& from, int64_t at) {
  if (from.bytes) return static_cast<C>(static_cast<const uint8_t*>(from.data)[at]);
  return load_any<C>(from, at);
}

template <class C>
__device__ __forceinline__ void store_value(const Operand& to, int64_t at, C x) {
  if constexpr (sizeof(C) == 8) {
    store<double>(to, at, x);
  } else if (to.dtype == Dtype::f32) {
    store<float>(to, at, x);
  } else if (to.dtype == Dtype::bf16) {
    store<Bf16>(to, at, x);
  } else {
    store<Half>(to, at, x);
  }
}

// Eight elements of any type of up to 4 bytes, as they lie in memory.
struct Raw {
  Vector<uint32_t> words[2];
};

__device__ __forceinline__ Raw load_raw(const Operand& from, int64_t at) {
  struct alignas(8) Bytes {
    uint32_t x[2];
  };
  Raw raw = {};
  if (from.bytes) {
    const Bytes bytes = *reinterpret_cast<const Bytes*>(static_cast<const uint8_t*>(from.data) + at);
    raw.words[0].x[0] = bytes.x[0];
    raw.words[0].x[1] = bytes.x[1];
  } else if (from.dtype == Dtype::f32) {
    const auto* vectors = reinterpret_cast<const Vector<uint32_t>*>(static_cast<const uint32_t*>(from.data) + at);
    raw.words[0] = vectors[0];
    raw.words[1] = vectors[1];
  } else {
    raw.words[0] = *reinterpret_cast<const Vector<uint32_t>*>(static_cast<const uint16_t*>(from.data) + at);
  }
  return raw;
}

__device__ __forceinline__ void widen(const Raw& raw, const Operand& from, float (&x)[kChunk]) {
  const auto half = [&](int e) { return static_cast<uint16_t>(raw.words[0].x[e / 2] >> (16 * (e % 2))); };
  if (from.bytes) {
#pragma unroll
    for (int e = 0; e < kChunk; ++e) x[e] = static_cast<float>(raw.words[0].x[e / 4] >> (8 * (e % 4)) & 0xFFu);
  } else if (from.dtype == Dtype::f32) {
#pragma unroll
    for (int e = 0; e < kChunk; ++e) x[e] = __uint_as_float(raw.words[e / 4].x[e % 4]);
  } else if (from.dtype == Dtype::bf16) {
#pragma unroll
    for (int e = 0; e < kChunk; ++e) x[e] = widen(Bf16{half(e)});
  } else {
#pragma unroll
    for (int e = 0; e < kChunk; ++e) x[e] = widen(Half{half(e)});
  }
}

__device__ __forceinline__ void store_chunk(const Operand& to, int64_t at, const float (&x)[kChunk]) {
  if (to.dtype == Dtype::f32) {
    store_chunk<float>(to.data, at, x);
  } else if (to.dtype == Dtype::bf16) {
    store_chunk<Bf16>(to.data, at, x);
  } else {
    store_chunk<Half>(to.data, at, x);
  }
}

// Whether eight elements from `at` on, which follow one another, can be taken as vectors.
__host__ __device__ __forceinline__ bool vectors_at(const Operand& operand, int64_t at) {
  const int64_t item = operand.bytes ? 1 : operand.dtype == Dtype::f32 ? 4 : operand.dtype == Dtype::f64 ? 8 : 2;
  return item < 8 && (reinterpret_cast<uintptr_t>(operand.data) + static_cast<uintptr_t>(at * item)) %
                             static_cast<uintptr_t>(item == 1 ? 8 : 16) ==
                         0;
}

// Where every chunk of the logical order lies within a run of the innermost dim: whether the operand is absent, one
// element in each chunk, or fit for vectors in each.
inline bool chunked(const Shape& shape, const Operand& operand) {
  const int last = shape.ndim - 1;
  if (operand.data == nullptr || operand.stride[last] == 0) return true;
  if (operand.stride[last] != 1 || !vectors_at(operand, 0)) return false;
  for (int d = 0; d < last; ++d) {
    if (operand.stride[d] % kChunk != 0) return false;
  }
  return true;
}

inline bool whole_chunks(const Shape& shape) { return shape.size[shape.ndim - 1] % kChunk == 0; }

// A chunk's load; nothing where one element stands for all eight.
__device__ __forceinline__ Raw fetch(const Shape& shape, const Operand& from, int64_t at) {
  return inner_stride(shape, from) == 0 ? Raw{} : load_raw(from, at);
}

__device__ __forceinline__ void values(const Shape& shape, const Operand& from, int64_t at, const Raw& raw,
                                       float (&x)[kChunk]) {
  if (inner_stride(shape, from) != 0) return widen(raw, from, x);
  const float one = load_value<float>(from, at);
#pragma unroll
  for (int e = 0; e < kChunk; ++e) x[e] = one;
}

}  // namespace vaeops::cuda
