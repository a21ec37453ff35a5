// From torch tensors to the launchers' structs: what every binding shares. A binding checks, allocates and launches.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "vaeops.h"

namespace vaeops::bind {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int kMaxRank = 16;  // of a tensor, before dims are merged

inline Dtype dtype_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::f16;
    case ScalarType::Double:
      return Dtype::f64;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, bfloat16, float16 or float64");
  }
}

inline ScalarType compute_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// An uninitialised tensor on `like`'s device. Straight to the C entry point: torch::stable::new_empty looks its
// operator up by name on every call, which costs more than the allocation.
inline Tensor empty(const Tensor& like, const int64_t* sizes, const int64_t* strides, int64_t rank, int32_t dtype) {
  int32_t device_type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle out = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(rank, sizes, strides, dtype, device_type, like.get_device_index(), &out));
  return Tensor(out);
}

inline int32_t dtype_code(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return aoti_torch_dtype_float32();
    case ScalarType::BFloat16:
      return aoti_torch_dtype_bfloat16();
    case ScalarType::Half:
      return aoti_torch_dtype_float16();
    case ScalarType::Double:
      return aoti_torch_dtype_float64();
    case ScalarType::Int:
      return aoti_torch_dtype_int32();
    case ScalarType::Byte:
      return aoti_torch_dtype_uint8();
    default:
      return aoti_torch_dtype_int64();
  }
}

inline void row_major(const int64_t* sizes, int64_t rank, int64_t (&strides)[kMaxRank]) {
  STD_TORCH_CHECK(rank <= kMaxRank, "at most ", kMaxRank, " dims are supported, got ", rank);
  for (int64_t d = rank - 1, step = 1; d >= 0; --d) {
    strides[d] = step;
    step *= sizes[d] > 1 ? sizes[d] : 1;
  }
}

// Row-major.
inline Tensor empty(const Tensor& like, const int64_t* sizes, int64_t rank, ScalarType dtype) {
  int64_t strides[kMaxRank];
  row_major(sizes, rank, strides);
  return empty(like, sizes, strides, rank, dtype_code(dtype));
}

// empty_like: the same memory format.
inline Tensor uninitialized_like(const Tensor& x) {
  if (!x.is_contiguous()) return torch::stable::empty_like(x);
  int32_t dtype = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  return empty(x, x.sizes().data(), x.strides().data(), x.dim(), dtype);
}

inline Tensor as_contiguous(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

inline bool same_sizes(const Tensor& a, const Tensor& b) {
  const auto x = a.sizes(), y = b.sizes();
  if (x.size() != y.size()) return false;
  for (size_t d = 0; d < x.size(); ++d) {
    if (x[d] != y[d]) return false;
  }
  return true;
}

// Builds a call's Shape: collects each operand's strides over the logical dims, then merges neighbouring dims wherever
// every operand allows it.
class Layout {
 public:
  Layout(const Tensor& like, int64_t batch_ndim) : Layout(like, like.dim(), batch_ndim) {}

  // The logical dims are the first `rank` of `like`.
  Layout(const Tensor& like, int64_t rank, int64_t batch_ndim)
      : rank_(static_cast<int>(rank)), device_(like.get_device_index()) {
    STD_TORCH_CHECK(rank_ <= kMaxRank, "at most ", kMaxRank, " dims are supported, got ", rank_);
    STD_TORCH_CHECK(batch_ndim >= 0 && batch_ndim <= rank_, "batch_ndim must be in [0, ", rank_, "], got ", batch_ndim);
    const auto sizes = like.sizes();
    for (int d = 0; d < rank_; ++d) {
      size_[d] = sizes[d];
      n_ *= size_[d];
      (d < batch_ndim ? rows_ : width_) *= size_[d];
    }
  }

  int64_t n() const { return n_; }

  // `x` broadcast to the logical shape; its first dim stands at logical dim `first` (default: aligned at the end).
  void add(Operand& operand, const Tensor& x, const char* name, int first = -1) {
    operand.dtype = dtype_of(x, name);
    place(operand, x, name, first);
  }

  // The same for a tensor that may be uint8 or bool instead of floating.
  void add_bytes_too(Operand& operand, const Tensor& x, const char* name) {
    operand.bytes = x.scalar_type() == ScalarType::Byte || x.scalar_type() == ScalarType::Bool;
    if (!operand.bytes) operand.dtype = dtype_of(x, name);
    place(operand, x, name, -1);
  }

  // `x` [*R, D], where the logical dims are R.
  void add(Rows& rows, const Tensor& x, const char* name) {
    const auto sizes = x.sizes();
    const auto strides = x.strides();
    STD_TORCH_CHECK(x.dim() == rank_ + 1, name, " must have ", rank_ + 1, " dims, got ", x.dim());
    STD_TORCH_CHECK(x.get_device_index() == device_, name, " is on another device");
    rows.operand.data = x.data_ptr();
    rows.operand.dtype = dtype_of(x, name);
    rows.step = sizes[rank_] == 1 ? 1 : strides[rank_];
    int64_t (&out)[kMaxRank] = entry(rows.operand.stride, &rows.operand);
    for (int d = 0; d < rank_; ++d) {
      STD_TORCH_CHECK(sizes[d] == size_[d], name, " must have ", size_[d], " rows along dim ", d, ", got ", sizes[d]);
      out[d] = strides[d];
    }
  }

  // Row-major strides of a fresh tensor of x's sizes, broadcast.
  void add_fresh(int64_t (&stride)[kMaxDims], const Tensor& x) {
    const auto sizes = x.sizes();
    int64_t (&out)[kMaxRank] = entry(stride, nullptr);
    for (int d = 0; d < rank_; ++d) out[d] = 0;
    int64_t step = 1;
    for (int d = static_cast<int>(sizes.size()) - 1, at = rank_ - 1; d >= 0; --d, --at) {
      out[at] = sizes[d] == 1 ? 0 : step;
      step *= sizes[d];
    }
  }

  Shape finish() {
    Shape shape{};
    shape.n = n_;
    shape.rows = rows_;
    shape.width = width_;
    int last = -1;  // last logical dim taken into the shape
    int64_t merged[kMaxEntries][kMaxDims];
    for (int d = 0; d < rank_ && n_ > 0; ++d) {
      if (size_[d] == 1) continue;
      bool joins = last >= 0;
      for (int e = 0; e < entries_ && joins; ++e) {
        joins = merged[e][shape.ndim - 1] == stride_[e][d] * size_[d];
      }
      if (joins) {
        shape.size[shape.ndim - 1] *= size_[d];
      } else {
        STD_TORCH_CHECK(shape.ndim < kMaxDims, "the operands' layouts differ in more than ", kMaxDims, " dims");
        shape.size[shape.ndim++] = size_[d];
      }
      for (int e = 0; e < entries_; ++e) merged[e][shape.ndim - 1] = stride_[e][d];
      last = d;
    }
    if (shape.ndim == 0) {  // one element, or none
      shape.ndim = 1;
      shape.size[0] = n_;
      for (int e = 0; e < entries_; ++e) merged[e][0] = 0;
    }
    int64_t row_major[kMaxDims];
    int64_t step = 1;
    for (int d = shape.ndim - 1; d >= 0; step *= shape.size[d--]) row_major[d] = step;
    for (int e = 0; e < entries_; ++e) {
      bool linear = true;
      for (int d = 0; d < shape.ndim; ++d) {
        target_[e][d] = merged[e][d];
        linear = linear && (merged[e][d] == row_major[d] || shape.size[d] == 1);
      }
      if (operand_[e] != nullptr) operand_[e]->linear = linear;
    }
    return shape;
  }

 private:
  static constexpr int kMaxEntries = 16;

  void place(Operand& operand, const Tensor& x, const char* name, int first) {
    const auto sizes = x.sizes();
    const auto strides = x.strides();
    const int rank = static_cast<int>(sizes.size());
    if (first < 0) first = rank_ - rank;
    STD_TORCH_CHECK(x.get_device_index() == device_, name, " is on another device");
    STD_TORCH_CHECK(first >= 0 && first + rank <= rank_, name, " has too many dims: ", rank, " for ", rank_);
    operand.data = x.data_ptr();
    int64_t (&out)[kMaxRank] = entry(operand.stride, &operand);
    for (int d = 0; d < rank_; ++d) out[d] = 0;
    for (int d = 0; d < rank; ++d) {
      STD_TORCH_CHECK(sizes[d] == 1 || sizes[d] == size_[first + d], name, " does not broadcast: size ", sizes[d],
                      " against ", size_[first + d], " at dim ", first + d);
      out[first + d] = sizes[d] == 1 ? 0 : strides[d];
    }
  }

  int64_t (&entry(int64_t (&target)[kMaxDims], Operand* operand)) [kMaxRank] {
    target_[entries_] = target;
    operand_[entries_] = operand;
    return stride_[entries_++];
  }

  int rank_,
      device_, entries_ = 0;
  int64_t size_[kMaxRank], n_ = 1, rows_ = 1, width_ = 1;
  int64_t stride_[kMaxEntries][kMaxRank];
  int64_t* target_[kMaxEntries];
  Operand* operand_[kMaxEntries];
};

// Where a gradient of the reduced value stands in the logical shape.
inline void add_reduced(Layout& layout, Operand& operand, const Tensor& grad, Reduction reduction, const Tensor& like,
                        int64_t batch_ndim) {
  const int64_t rank = like.dim();
  const int64_t expected = reduction == Reduction::none     ? rank
                           : reduction == Reduction::dim    ? rank - batch_ndim
                           : reduction == Reduction::sample ? batch_ndim
                                                            : 0;
  STD_TORCH_CHECK(grad.dim() == expected, "the reduced gradient must have ", expected, " dims, got ", grad.dim());
  STD_TORCH_CHECK(grad.scalar_type() == compute_type(like), "the reduced gradient must have the compute dtype");
  layout.add(operand, grad, "gkl", reduction == Reduction::sample ? 0 : -1);
}

inline Tensor reduced_like(const Tensor& like, Reduction reduction, int64_t batch_ndim) {
  const auto sizes = like.sizes();
  int64_t out[kMaxRank], rank = 0;
  const auto take = [&](int64_t begin, int64_t end) {
    for (int64_t d = begin; d < end; ++d) out[rank++] = sizes[d];
  };
  const int64_t all = like.dim();
  if (reduction == Reduction::none) take(0, all);
  if (reduction == Reduction::dim) take(batch_ndim, all);
  if (reduction == Reduction::sample) take(0, batch_ndim);
  return empty(like, out, rank, compute_type(like));
}

inline Noise noise_of(const Tensor& seed, int64_t n) {
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long, "seed must be int64");
  STD_TORCH_CHECK(seed.dim() >= 1 && seed.size(seed.dim() - 1) == 2 && seed.is_contiguous(),
                  "seed must be a contiguous [..., 2]");
  const int64_t streams = seed.numel() / 2;
  STD_TORCH_CHECK(streams > 0 ? n % streams == 0 : n == 0, "seed: ", streams, " streams do not divide ", n,
                  " elements");
  return {seed.const_data_ptr<int64_t>(), streams};
}

template <class E>
E option(int64_t value, int64_t first, int64_t last, const char* name) {
  STD_TORCH_CHECK(value >= first && value <= last, name, " out of range: ", value);
  return static_cast<E>(value);
}

}  // namespace vaeops::bind
