// Torch glue of the reconstruction losses. Schemas, meaning and argument checks of the public functions:
// vaeops/ops/recon.py.
#if defined(VAEOPS_CUDA)
#include "bind/cuda.h"
#else
#include "bind/cpu.h"
#endif

namespace vaeops::bind {
namespace {

struct Options {
  int64_t kind;
  double scale;
  int64_t reduction, batch_ndim;
};

void fill(Recon& call, Layout& layout, const Tensor& pred, const Tensor& target, const OptionalTensor& weight,
          const Options& o) {
  Device::check(pred, "pred");
  Device::check(target, "target");
  STD_TORCH_CHECK(same_sizes(pred, target), "target must have pred's shape");
  STD_TORCH_CHECK(o.scale > 0 && o.scale < __builtin_inf(), "scale must be finite and > 0, got ", o.scale);
  layout.add(call.pred, pred, "pred");
  layout.add_bytes_too(call.target, target, "target");
  if (target.scalar_type() == ScalarType::Byte) call.levels = 255;
  if (weight) {
    Device::check(*weight, "weight");
    STD_TORCH_CHECK(weight->scalar_type() != ScalarType::Byte, "weight must be floating or bool");
    layout.add_bytes_too(call.weight, *weight, "weight");
  }
  call.kind = option<ReconKind>(o.kind, 0, 8, "kind");
  call.scale = o.scale;
  call.reduction = option<Reduction>(o.reduction, 0, 5, "reduction");
}

Tensor recon_fwd(const Tensor& pred, const Tensor& target, const OptionalTensor& weight, int64_t kind, double scale,
                 int64_t reduction, int64_t batch_ndim) {
  const Device device(pred);
  Layout layout(pred, batch_ndim);
  ReconForward call{};
  fill(call, layout, pred, target, weight, {kind, scale, reduction, batch_ndim});
  Tensor out = reduced_like(pred, call.reduction, batch_ndim);
  if (layout.n() == 0) torch::stable::zero_(out);
  call.out = out.mutable_data_ptr();
  call.shape = layout.finish();
  device.run(call);
  return out;
}

Tensor recon_bwd(const Tensor& grad, const Tensor& pred, const Tensor& target, const OptionalTensor& weight,
                 int64_t kind, double scale, int64_t reduction, int64_t batch_ndim) {
  const Device device(pred);
  Layout layout(pred, batch_ndim);
  ReconBackward call{};
  fill(call, layout, pred, target, weight, {kind, scale, reduction, batch_ndim});
  Device::check(grad, "grad");
  add_reduced(layout, call.grad, grad, call.reduction, pred, batch_ndim);
  Tensor gpred = Device::fresh_like(pred);
  layout.add(call.gpred, gpred, "gpred");
  call.shape = layout.finish();
  device.run(call);
  return gpred;
}

void fill(Multinomial& call, Layout& layout, const Tensor& logits, const Tensor& target, const OptionalTensor& weight) {
  Device::check(logits, "logits");
  Device::check(target, "target");
  STD_TORCH_CHECK(same_sizes(logits, target), "target must have the logits' shape");
  layout.add(call.logits, logits, "logits");
  layout.add_bytes_too(call.target, target, "target");
  if (!weight) return;
  Device::check(*weight, "weight");
  STD_TORCH_CHECK(weight->scalar_type() != ScalarType::Byte, "weight must be floating or bool");
  layout.add_bytes_too(call.weight, *weight, "weight");
}

void check_rows(const Tensor& logits) {
  STD_TORCH_CHECK(logits.dim() == 2, "logits must be [R, D], got ", logits.dim(), " dims");
}

std::tuple<Tensor, Tensor, Tensor> multinomial_fwd(const Tensor& logits, const Tensor& target,
                                                   const OptionalTensor& weight) {
  check_rows(logits);
  const Device device(logits);
  Layout layout(logits, 1);
  MultinomialForward call{};
  fill(call, layout, logits, target, weight);
  Tensor nll = reduced_like(logits, Reduction::sample, 1), total = uninitialized_like(nll);
  Tensor lse = empty(logits, nll.sizes().data(), 1, ScalarType::Double);
  call.nll = nll.mutable_data_ptr();
  call.lse = lse.mutable_data_ptr<double>();
  call.total = total.mutable_data_ptr();
  call.shape = layout.finish();
  device.run(call);
  return {nll, lse, total};
}

Tensor multinomial_bwd(const Tensor& grad, const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                       const Tensor& lse, const Tensor& total) {
  check_rows(logits);
  const Device device(logits);
  Layout layout(logits, 1);
  MultinomialBackward call{};
  fill(call, layout, logits, target, weight);
  for (const Tensor* x : {&grad, &lse, &total}) {
    Device::check(*x, "grad, lse and total");
    const ScalarType dtype = x == &lse ? ScalarType::Double : compute_type(logits);
    STD_TORCH_CHECK(x->dim() == 1 && x->size(0) == logits.size(0) && x->scalar_type() == dtype,
                    "grad and total must be [R] of the compute dtype, lse [R] in float64");
  }
  const Tensor row_grad = as_contiguous(grad), row_lse = as_contiguous(lse), row_total = as_contiguous(total);
  call.grad = row_grad.data_ptr();
  call.lse = row_lse.const_data_ptr<double>();
  call.total = row_total.data_ptr();
  Tensor glogits = Device::fresh_like(logits);
  layout.add(call.glogits, glogits, "glogits");
  call.shape = layout.finish();
  device.run(call);
  return glogits;
}

}  // namespace
}  // namespace vaeops::bind

STABLE_TORCH_LIBRARY_IMPL(vaeops, VAEOPS_DEVICE, m) {
  using namespace vaeops::bind;
#if !defined(VAEOPS_CUDA)  // there vaeops/ops/_library.py chooses
  m.impl("recon_fwd", TORCH_BOX(&recon_fwd));
  m.impl("recon_bwd", TORCH_BOX(&recon_bwd));
  m.impl("multinomial_fwd", TORCH_BOX(&multinomial_fwd));
  m.impl("multinomial_bwd", TORCH_BOX(&multinomial_bwd));
#endif
  m.impl("recon_fwd" VAEOPS_OVERLOAD, TORCH_BOX(&recon_fwd));
  m.impl("recon_bwd" VAEOPS_OVERLOAD, TORCH_BOX(&recon_bwd));
  m.impl("multinomial_fwd" VAEOPS_OVERLOAD, TORCH_BOX(&multinomial_fwd));
  m.impl("multinomial_bwd" VAEOPS_OVERLOAD, TORCH_BOX(&multinomial_bwd));
}
