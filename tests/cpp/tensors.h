// Host tensors of any dtype and layout for the kernel tests, and the merged Shape that a call gets of them.
#pragma once
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "vaeops.h"

namespace vaeops::test {

using Sizes = std::vector<int64_t>;

inline int64_t product(const Sizes& sizes, size_t from = 0, size_t to = SIZE_MAX) {
  int64_t n = 1;
  for (size_t d = from; d < sizes.size() && d < to; ++d) n *= sizes[d];
  return n;
}

inline int64_t bytes_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }
inline Dtype compute(Dtype dtype) { return dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32; }

// Unit roundoff, and the spacing of subnormal numbers.
inline double roundoff(Dtype dtype) {
  return dtype == Dtype::f64 ? 0x1p-53 : dtype == Dtype::f32 ? 0x1p-24 : dtype == Dtype::f16 ? 0x1p-11 : 0x1p-8;
}
inline double smallest(Dtype dtype) { return dtype == Dtype::f16 ? 0x1p-24 : 0x1p-126; }

inline double read(const char* at, Dtype dtype) {
  if (dtype == Dtype::f64) {
    double x;
    std::memcpy(&x, at, 8);
    return x;
  }
  uint32_t bits = 0;
  if (dtype == Dtype::f32) {
    std::memcpy(&bits, at, 4);
  } else {
    uint16_t half;
    std::memcpy(&half, at, 2);
    if (dtype == Dtype::f16) {
      const int exponent = half >> 10 & 31, mantissa = half & 0x3FF;
      const double size = exponent == 31  ? (mantissa != 0 ? NAN : INFINITY)
                          : exponent == 0 ? std::ldexp(mantissa, -24)
                                          : std::ldexp(mantissa + 1024, exponent - 25);
      return (half & 0x8000) != 0 ? -size : size;
    }
    bits = static_cast<uint32_t>(half) << 16;
  }
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Cuts to a dtype's precision, towards zero: inputs need representable values, not rounded ones.
inline void write(char* at, Dtype dtype, double x) {
  if (dtype == Dtype::f64) {
    std::memcpy(at, &x, 8);
    return;
  }
  const float single = static_cast<float>(x);
  uint32_t bits;
  std::memcpy(&bits, &single, 4);
  if (dtype == Dtype::f32) {
    std::memcpy(at, &bits, 4);
    return;
  }
  uint16_t half = static_cast<uint16_t>(bits >> 16);
  if (dtype == Dtype::f16) {
    const int exponent = static_cast<int>(bits >> 23 & 255) - 112;
    half = static_cast<uint16_t>((bits >> 16 & 0x8000) | (exponent <= 0 ? 0 : exponent << 10 | (bits >> 13 & 0x3FF)));
  }
  std::memcpy(at, &half, 2);
}

enum class Layout { contiguous, transposed, misaligned };

// A tensor seen through the logical shape of a call: stride 0 where it is broadcast. Its memory is exactly as long as
// its elements, so that a sanitizer sees any access past them.
struct Tensor {
  Dtype dtype = Dtype::f32;
  bool bytes = false;  // uint8 or bool instead of `dtype`
  Sizes stride;        // per logical dim; empty: absent
  int64_t elements = 0, offset = 0;
  std::shared_ptr<char[]> memory;

  int64_t item() const { return bytes ? 1 : bytes_of(dtype); }
  char* data() const { return memory ? memory.get() + offset * item() : nullptr; }
  bool present() const { return memory != nullptr; }
  double at(int64_t i) const { return bytes ? static_cast<uint8_t>(data()[i]) : read(data() + i * item(), dtype); }
  void set(int64_t i, double x) {
    if (bytes) {
      data()[i] = static_cast<char>(static_cast<uint8_t>(x));
    } else {
      write(data() + i * item(), dtype, x);
    }
  }
  std::vector<char> contents() const { return {data(), data() + elements * item()}; }
};

// `kept` says in which logical dims the tensor varies (empty: in all). Filled with 0xFF, which is NaN.
inline Tensor make(const Sizes& shape, Dtype dtype, Layout layout = Layout::contiguous, std::vector<bool> kept = {},
                   bool bytes = false) {
  Tensor t;
  t.dtype = dtype;
  t.bytes = bytes;
  t.offset = layout == Layout::misaligned ? 1 : 0;
  t.elements = 1;
  t.stride.assign(shape.size(), 0);
  std::vector<int> order;
  for (int d = static_cast<int>(shape.size()) - 1; d >= 0; --d) order.push_back(d);
  if (layout == Layout::transposed && order.size() > 1) std::swap(order[0], order[1]);
  for (int d : order) {
    if (!kept.empty() && !kept[d]) continue;
    t.stride[d] = t.elements;
    t.elements *= shape[d];
  }
  const size_t size = static_cast<size_t>((t.elements + t.offset) * t.item());
  t.memory = std::shared_ptr<char[]>(new char[size > 0 ? size : 1]);
  std::memset(t.memory.get(), 0xFF, size);
  return t;
}

template <class Random>
void fill(Tensor& t, Random& random, double low, double high) {
  std::uniform_real_distribution<double> draw(low, high);
  for (int64_t i = 0; i < t.elements; ++i) t.set(i, draw(random));
}

// Offset of logical element i.
inline int64_t offset_of(const Sizes& shape, const Sizes& stride, int64_t i) {
  int64_t offset = 0;
  for (int d = static_cast<int>(shape.size()) - 1; d >= 0; --d) {
    offset += i % shape[d] * stride[d];
    i /= shape[d];
  }
  return offset;
}

inline double element(const Sizes& shape, const Tensor& t, int64_t i) { return t.at(offset_of(shape, t.stride, i)); }

// Merges neighbouring dims that all operands step through evenly, as the torch binding does.
struct Merge {
  Sizes sizes;
  std::vector<Sizes> strides;  // one per operand

  Merge(const Sizes& shape, const std::vector<Sizes>& operands) : strides(operands.size()) {
    for (size_t d = 0; d < shape.size(); ++d) {
      if (shape[d] == 1) continue;
      bool even = !sizes.empty();
      for (size_t k = 0; k < operands.size() && even; ++k) {
        even = operands[k].empty() || strides[k].back() == operands[k][d] * shape[d];
      }
      if (even) sizes.back() *= shape[d];
      if (!even) sizes.push_back(shape[d]);
      for (size_t k = 0; k < operands.size(); ++k) {
        if (operands[k].empty()) continue;
        if (even) strides[k].back() = operands[k][d];
        if (!even) strides[k].push_back(operands[k][d]);
      }
    }
    if (!sizes.empty()) return;
    sizes.push_back(1);  // a call has one dim at least
    for (size_t k = 0; k < operands.size(); ++k) {
      if (!operands[k].empty()) strides[k].push_back(0);
    }
  }
  Shape shape(int64_t n, int64_t rows) const {
    Shape s{};
    s.ndim = static_cast<int32_t>(sizes.size());
    for (size_t d = 0; d < sizes.size(); ++d) s.size[d] = sizes[d];
    s.n = n;
    s.rows = rows;
    s.width = rows > 0 ? n / rows : 0;
    return s;
  }
  Operand operand(const Tensor& t, size_t k) const {
    Operand o;
    o.data = t.data();
    o.dtype = t.dtype;
    o.bytes = t.bytes;
    o.linear = t.present();
    int64_t step = 1;
    for (size_t d = strides[k].size(); d-- > 0;) {
      o.stride[d] = strides[k][d];
      o.linear = o.linear && (strides[k][d] == step || sizes[d] == 1);
      step *= sizes[d];
    }
    return o;
  }
};

}  // namespace vaeops::test
