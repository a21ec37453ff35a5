// Torch glue of vector quantization. Schemas, meaning and argument checks of the public functions: vaeops/ops/vq/.
#if defined(VAEOPS_CUDA)
#include "bind/cuda.h"
#else
#include "bind/cpu.h"
#endif

namespace vaeops::bind {
namespace {

// Rows [*R, D] beside a codebook [K, D].
void check(const Tensor& x, const Tensor& codebook, const char* name) {
  Device::check(x, name);
  Device::check(codebook, "codebook");
  STD_TORCH_CHECK(codebook.dim() == 2 && codebook.numel() > 0, "codebook must be [K, D] with K, D >= 1");
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == codebook.size(1), name,
                  " must be [*R, D] with D = ", codebook.size(1));
}

template <class Call>
void set_codebook(Call& call, const Tensor& codebook /* contiguous */) {
  call.codebook = codebook.data_ptr();
  call.codebook_dtype = dtype_of(codebook, "codebook");
  call.codes = codebook.size(0);
  call.dims = codebook.size(1);
}

ScalarType compute_type(const Tensor& x, const Tensor& codebook) {
  return bind::compute_type(x) == ScalarType::Double ? ScalarType::Double : bind::compute_type(codebook);
}

bool has_row_dims(const Tensor& t, const Tensor& x) {
  if (t.dim() != x.dim() - 1) return false;
  for (int64_t d = 0; d < t.dim(); ++d) {
    if (t.size(d) != x.size(d)) return false;
  }
  return true;
}

Indices indices_of(const Tensor& indices /* contiguous */) {
  return {indices.data_ptr(), indices.scalar_type() == ScalarType::Int};
}

// Indices [*R], contiguous and in [-1, K).
Tensor checked(const Tensor& indices, int64_t codes) {
  Device::check(indices, "indices");
  STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Long || indices.scalar_type() == ScalarType::Int,
                  "indices must be int64 or int32");
  const Tensor contiguous = as_contiguous(indices);
  Device::check_range(indices_of(contiguous), contiguous.numel(), codes);
  return contiguous;
}

Tensor contiguous_as(const Tensor& x, ScalarType dtype) {
  return as_contiguous(x.scalar_type() == dtype ? x : torch::stable::to(x, dtype));
}

// [*R, *tail] beside rows x [*R, D]
Tensor empty_rows(const Tensor& x, std::optional<int64_t> tail, ScalarType dtype) {
  STD_TORCH_CHECK(x.dim() <= kMaxRank, "at most ", kMaxRank, " dims are supported, got ", x.dim());
  int64_t sizes[kMaxRank], rank = x.dim() - 1;
  for (int64_t d = 0; d < rank; ++d) sizes[d] = x.size(d);
  if (tail) sizes[rank++] = *tail;
  return empty(x, sizes, rank, dtype);
}

// The k nearest codes with their scores; k = 0: the nearest.
std::tuple<Tensor, Tensor> nearest(const Tensor& x, const Tensor& codebook_, const OptionalTensor& mask_, int64_t k,
                                   int64_t metric, bool exact, bool int32) {
  check(x, codebook_, "x");
  const Device device(x);
  const Tensor codebook = as_contiguous(codebook_);
  VqAssign call{};
  set_codebook(call, codebook);
  STD_TORCH_CHECK(k <= call.codes, "k must be at most K = ", call.codes, ", got ", k);
  call.metric = option<Metric>(metric, 0, 2, "metric");
  call.exact = exact;
  call.k = k;
  OptionalTensor mask;
  if (mask_) {
    Device::check(*mask_, "mask");
    STD_TORCH_CHECK(mask_->scalar_type() == ScalarType::Bool && has_row_dims(*mask_, x), "mask must be bool [*R]");
    mask = as_contiguous(*mask_);
    call.mask = static_cast<const uint8_t*>(mask->data_ptr());
  }
  const std::optional<int64_t> tail = k > 0 ? std::optional(k) : std::nullopt;
  const Tensor indices = empty_rows(x, tail, int32 ? ScalarType::Int : ScalarType::Long);
  call.indices = indices_of(indices);
  Tensor scores;
  if (k > 0) {
    const ScalarType dtype = compute_type(x, codebook);
    scores = empty_rows(x, tail, dtype);
    call.scores = scores.mutable_data_ptr();
    call.scores_f64 = dtype == ScalarType::Double;
  }
  Layout layout(x, x.dim() - 1, x.dim() - 1);
  layout.add(call.x, x, "x");
  call.shape = layout.finish();
  device.run(call);
  return {scores, indices};
}

Tensor vq_assign(const Tensor& x, const Tensor& codebook, const OptionalTensor& mask, int64_t metric, bool exact,
                 bool int32) {
  return std::get<1>(nearest(x, codebook, mask, 0, metric, exact, int32));
}

std::tuple<Tensor, Tensor> vq_topk(const Tensor& x, const Tensor& codebook, const OptionalTensor& mask, int64_t k,
                                   int64_t metric, bool exact, bool int32) {
  STD_TORCH_CHECK(k >= 1, "k must be at least 1, got ", k);
  return nearest(x, codebook, mask, k, metric, exact, int32);
}

std::tuple<Tensor, Tensor> vq_gather(const Tensor& indices_, const Tensor& codebook_, const OptionalTensor& x,
                                     double fill, int64_t reduction) {
  if (x) {
    check(*x, codebook_, "x");
    STD_TORCH_CHECK(has_row_dims(indices_, *x), "indices must be [*R], x [*R, D]");
  } else {
    Device::check(codebook_, "codebook");
    STD_TORCH_CHECK(codebook_.dim() == 2 && codebook_.numel() > 0, "codebook must be [K, D] with K, D >= 1");
  }
  const Device device(codebook_);
  const Tensor codebook = as_contiguous(codebook_), indices = checked(indices_, codebook.size(0));
  VqGather call{};
  set_codebook(call, codebook);
  call.indices = indices_of(indices);
  call.fill = fill;
  Tensor quantized, loss;  // undefined, which is None in Python, where not asked for
  if (x) {
    quantized = Device::fresh_like(*x);
    call.reduction = option<RowReduction>(reduction, -1, 2, "reduction");
  } else {
    STD_TORCH_CHECK(indices.dim() < kMaxRank, "at most ", kMaxRank, " dims are supported, got ", indices.dim() + 1);
    int64_t sizes[kMaxRank];
    for (int64_t d = 0; d < indices.dim(); ++d) sizes[d] = indices.size(d);
    sizes[indices.dim()] = call.dims;
    quantized = Device::fresh(codebook, sizes, indices.dim() + 1, codebook.scalar_type());
  }
  if (call.reduction != RowReduction::off) {
    const ScalarType dtype = compute_type(*x, codebook);
    loss = call.reduction == RowReduction::none ? empty_rows(*x, std::nullopt, dtype) : empty(*x, nullptr, 0, dtype);
    call.loss = loss.mutable_data_ptr();
  }
  Layout layout(indices, indices.dim());
  if (x) layout.add(call.x, *x, "x");
  layout.add(call.quantized, quantized, "quantized");
  call.shape = layout.finish();
  device.run(call);
  return {quantized, loss};
}

Tensor vq_gather_bwd(const OptionalTensor& gq, const OptionalTensor& w_, const Tensor& x, const Tensor& codebook_,
                     const Tensor& indices_, int64_t estimator) {
  check(x, codebook_, "x");
  STD_TORCH_CHECK(has_row_dims(indices_, x), "indices must be [*R], x [*R, D]");
  const Device device(x);
  const Tensor codebook = as_contiguous(codebook_), indices = checked(indices_, codebook.size(0));
  VqGatherBackward call{};
  set_codebook(call, codebook);
  call.indices = indices_of(indices);
  call.estimator = option<Estimator>(estimator, 0, 2, "estimator");
  Layout layout(indices, indices.dim());
  layout.add(call.x, x, "x");
  if (gq && call.estimator != Estimator::none) {
    Device::check(*gq, "gq");
    STD_TORCH_CHECK(gq->scalar_type() == x.scalar_type() && same_sizes(*gq, x), "gq must have x's dtype and shape");
    layout.add(call.gq, *gq, "gq");
  }
  OptionalTensor w;
  if (w_) {
    Device::check(*w_, "w");
    STD_TORCH_CHECK(w_->dim() == 0 || has_row_dims(*w_, x), "w must be [] or [*R]");
    w = contiguous_as(*w_, compute_type(x, codebook));
    call.w = w->data_ptr();
    call.w_per_row = w->dim() > 0;
  }
  const Tensor gx = Device::fresh_like(x);
  layout.add(call.gx, gx, "gx");
  call.shape = layout.finish();
  device.run(call);
  return gx;
}

std::tuple<Tensor, Tensor> vq_segment_sum(const Tensor& values, const Tensor& indices_, const OptionalTensor& weights_,
                                          const OptionalTensor& absmax_, int64_t codes, bool skip_nonfinite,
                                          bool fp64) {
  Device::check(values, "values");
  STD_TORCH_CHECK(values.dim() >= 1 && values.size(values.dim() - 1) >= 1, "values must be [*R, D] with D >= 1");
  STD_TORCH_CHECK(has_row_dims(indices_, values), "indices must be [*R], values [*R, D]");
  STD_TORCH_CHECK(codes >= 1, "K must be at least 1, got ", codes);
  STD_TORCH_CHECK(!(weights_ && absmax_), "fixed point takes no weights");
  const Device device(values);
  const Tensor indices = checked(indices_, codes);
  VqSegmentSum call{};
  call.indices = indices_of(indices);
  call.codes = codes;
  call.dims = values.size(values.dim() - 1);
  call.skip_nonfinite = skip_nonfinite;
  call.out_f64 = fp64;
  OptionalTensor weights, absmax;
  if (weights_) {
    Device::check(*weights_, "weights");
    STD_TORCH_CHECK(has_row_dims(*weights_, values), "weights must be [*R]");
    weights = contiguous_as(*weights_, bind::compute_type(*weights_));
    call.weights = weights->data_ptr();
    call.weights_f64 = weights->scalar_type() == ScalarType::Double;
  }
  if (absmax_) {
    Device::check(*absmax_, "absmax");
    STD_TORCH_CHECK(absmax_->numel() == 1, "absmax must be one number");
    absmax = contiguous_as(*absmax_, bind::compute_type(*absmax_));
    call.absmax = absmax->data_ptr();
    call.absmax_f64 = absmax->scalar_type() == ScalarType::Double;
  }
  const ScalarType dtype = absmax_ ? ScalarType::Long : fp64 ? ScalarType::Double : ScalarType::Float;
  const int64_t sizes[2] = {codes, call.dims};
  const Tensor counts = empty(values, sizes, 1, dtype), sums = Device::fresh(values, sizes, 2, dtype);
  call.counts = counts.mutable_data_ptr();
  call.sums = sums.mutable_data_ptr();
  Layout layout(indices, indices.dim());
  layout.add(call.values, values, "values");
  call.shape = layout.finish();
  device.run(call);
  return {counts, sums};
}

}  // namespace
}  // namespace vaeops::bind

STABLE_TORCH_LIBRARY_IMPL(vaeops, VAEOPS_DEVICE, m) {
  using namespace vaeops::bind;
#if !defined(VAEOPS_CUDA)  // there vaeops/ops/_library.py chooses
  m.impl("vq_assign", TORCH_BOX(&vq_assign));
  m.impl("vq_topk", TORCH_BOX(&vq_topk));
#endif
  m.impl("vq_assign" VAEOPS_OVERLOAD, TORCH_BOX(&vq_assign));
  m.impl("vq_topk" VAEOPS_OVERLOAD, TORCH_BOX(&vq_topk));
  m.impl("vq_gather", TORCH_BOX(&vq_gather));
  m.impl("vq_gather" VAEOPS_OVERLOAD, TORCH_BOX(&vq_gather));
  m.impl("vq_gather_bwd", TORCH_BOX(&vq_gather_bwd));
  m.impl("vq_gather_bwd" VAEOPS_OVERLOAD, TORCH_BOX(&vq_gather_bwd));
  m.impl("vq_segment_sum", TORCH_BOX(&vq_segment_sum));
  m.impl("vq_segment_sum" VAEOPS_OVERLOAD, TORCH_BOX(&vq_segment_sum));
}
