// Torch glue of the Gaussian family. Schemas, meaning and argument checks of the public functions:
// vaeops/ops/gaussian/.
#include <algorithm>

#if defined(VAEOPS_CUDA)
#include "bind/cuda.h"
#else
#include "bind/cpu.h"
#endif

namespace vaeops::bind {
namespace {

struct Options {
  int64_t packed_dim, param;
  double clamp_lo, clamp_hi;
  int64_t reduction, batch_ndim;
  double temperature;
};

// mu and rho: two tensors, or the halves of one.
struct Moments {
  Tensor mu, rho;
  Moments(const Tensor& q, const OptionalTensor& rho_or_packed, int64_t dim)
      : mu(rho_or_packed ? q : half(q, dim, 0)), rho(rho_or_packed ? *rho_or_packed : half(q, dim, 1)) {
    STD_TORCH_CHECK(mu.scalar_type() == rho.scalar_type(), "mu and rho must have one dtype");
    STD_TORCH_CHECK(same_sizes(mu, rho), "mu and rho must have one shape");
    Device::check(mu, "mu");
    Device::check(rho, "rho");
  }
  static Tensor half(const Tensor& q, int64_t dim, int64_t which) {
    STD_TORCH_CHECK(dim >= 0 && dim < q.dim() && q.size(dim) % 2 == 0, "moments: packed_dim must have an even size");
    STD_TORCH_CHECK(q.dim() <= kMaxRank, "at most ", kMaxRank, " dims are supported, got ", q.dim());
    int64_t sizes[kMaxRank];
    std::copy_n(q.sizes().data(), q.dim(), sizes);
    sizes[dim] /= 2;
    // A view; torch::stable::narrow would look its operator up by name. The offset counts from q's own.
    AtenTensorHandle out = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(q.get(), q.dim(), sizes, q.strides().data(),
                                                                 which * sizes[dim] * q.stride(dim), &out));
    return Tensor(out);
  }
};

void fill(Gaussian& call, Layout& layout, const Moments& q, const OptionalTensor& prior_mu,
          const OptionalTensor& prior_rho, const OptionalTensor& seed, const OptionalTensor& eps, const Options& o) {
  STD_TORCH_CHECK(prior_mu.has_value() == prior_rho.has_value(), "prior_mu and prior_rho come together");
  STD_TORCH_CHECK(!(seed && eps), "give one of seed and eps");
  layout.add(call.mu, q.mu, "mu");
  layout.add(call.rho, q.rho, "rho");
  if (prior_mu) {
    STD_TORCH_CHECK(same_sizes(*prior_mu, *prior_rho), "prior_mu and prior_rho must have one shape");
    Device::check(*prior_mu, "prior_mu");
    Device::check(*prior_rho, "prior_rho");
    layout.add(call.prior_mu, *prior_mu, "prior_mu");
    layout.add(call.prior_rho, *prior_rho, "prior_rho");
  }
  if (eps) {
    Device::check(*eps, "eps");
    STD_TORCH_CHECK(same_sizes(*eps, q.mu), "eps must have mu's shape");
    layout.add(call.eps, *eps, "eps");
  }
  if (seed) {
    Device::check(*seed, "seed");
    call.noise = noise_of(*seed, layout.n());
  }
  call.param = option<Param>(o.param, 0, 2, "param");
  call.reduction = option<Reduction>(o.reduction, -1, 5, "reduction");
  call.clamped = o.clamp_lo > -__builtin_inf() || o.clamp_hi < __builtin_inf();
  call.clamp_lo = o.clamp_lo;
  call.clamp_hi = o.clamp_hi;
  call.temperature = o.temperature;
}

std::tuple<Tensor, Tensor> gaussian_fwd(const Tensor& q, const OptionalTensor& rho, const OptionalTensor& prior_mu,
                                        const OptionalTensor& prior_rho, const OptionalTensor& seed,
                                        const OptionalTensor& eps, int64_t packed_dim, int64_t param, double clamp_lo,
                                        double clamp_hi, int64_t reduction, int64_t batch_ndim, double temperature) {
  const Moments moments(q, rho, packed_dim);
  const Device device(moments.mu);
  Layout layout(moments.mu, batch_ndim);
  GaussianForward call{};
  const OptionalTensor contiguous_seed = seed ? OptionalTensor(as_contiguous(*seed)) : std::nullopt;
  fill(call, layout, moments, prior_mu, prior_rho, contiguous_seed, eps,
       {packed_dim, param, clamp_lo, clamp_hi, reduction, batch_ndim, temperature});
  const bool sampled = seed || eps;
  Tensor z, kl;  // undefined, which is None in Python, where not asked for
  if (sampled) {
    z = Device::fresh_like(moments.mu);
    layout.add(call.z, z, "z");
  }
  if (call.reduction != Reduction::off) {
    kl = reduced_like(moments.mu, call.reduction, batch_ndim);
    if (layout.n() == 0) torch::stable::zero_(kl);
    call.kl = kl.mutable_data_ptr();
  }
  call.shape = layout.finish();
  device.run(call);
  return {z, kl};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gaussian_bwd(const OptionalTensor& gz, const OptionalTensor& gkl,
                                                        const Tensor& q, const OptionalTensor& rho,
                                                        const OptionalTensor& prior_mu, const OptionalTensor& prior_rho,
                                                        const OptionalTensor& seed, const OptionalTensor& eps,
                                                        int64_t packed_dim, int64_t param, double clamp_lo,
                                                        double clamp_hi, int64_t reduction, int64_t batch_ndim,
                                                        double temperature) {
  const Moments moments(q, rho, packed_dim);
  const Device device(moments.mu);
  Layout layout(moments.mu, batch_ndim);
  GaussianBackward call{};
  const OptionalTensor contiguous_seed = seed ? OptionalTensor(as_contiguous(*seed)) : std::nullopt;
  fill(call, layout, moments, prior_mu, prior_rho, contiguous_seed, eps,
       {packed_dim, param, clamp_lo, clamp_hi, reduction, batch_ndim, temperature});
  if (gz && (seed || eps)) {
    Device::check(*gz, "gz");
    STD_TORCH_CHECK(gz->scalar_type() == moments.mu.scalar_type() && same_sizes(*gz, moments.mu),
                    "gz must have z's dtype and shape");
    layout.add(call.gz, *gz, "gz");
  }
  if (gkl && call.reduction != Reduction::off) {
    Device::check(*gkl, "gkl");
    add_reduced(layout, call.gkl, *gkl, call.reduction, moments.mu, batch_ndim);
  }
  Tensor gq = Device::fresh_like(q);
  Tensor grho;
  if (rho) grho = Device::fresh_like(*rho);
  const OptionalTensor grho_or_packed = rho ? OptionalTensor(grho) : std::nullopt;
  const Moments grads(gq, grho_or_packed, packed_dim);
  layout.add(call.gmu, grads.mu, "gmu");
  layout.add(call.grho, grads.rho, "grho");
  Tensor gprior_mu, gprior_rho;
  if (prior_mu) {
    gprior_mu = empty(q, prior_mu->sizes().data(), prior_mu->dim(), compute_type(q));
    gprior_rho = empty(q, prior_rho->sizes().data(), prior_rho->dim(), compute_type(q));
    if (layout.n() == 0) {
      torch::stable::zero_(gprior_mu);
      torch::stable::zero_(gprior_rho);
    }
    call.gprior_mu = gprior_mu.mutable_data_ptr();
    call.gprior_rho = gprior_rho.mutable_data_ptr();
    call.prior_n = prior_mu->numel();
    layout.add_fresh(call.prior_stride, *prior_mu);
  }
  call.shape = layout.finish();
  device.run(call);
  if (prior_mu) {
    if (prior_mu->scalar_type() != compute_type(q)) gprior_mu = torch::stable::to(gprior_mu, prior_mu->scalar_type());
    if (prior_rho->scalar_type() != compute_type(q))
      gprior_rho = torch::stable::to(gprior_rho, prior_rho->scalar_type());
  }
  return {gq, grho, gprior_mu, gprior_rho};
}

void fill(LogProb& call, Layout& layout, const Tensor& x, const Tensor& mu, const Tensor& rho, int64_t param,
          int64_t reduction) {
  for (const Tensor* t : {&x, &mu, &rho}) {
    Device::check(*t, "x, mu and rho");
    STD_TORCH_CHECK(t->scalar_type() == x.scalar_type() && same_sizes(*t, x),
                    "x, mu and rho must share dtype and shape");
  }
  layout.add(call.x, x, "x");
  layout.add(call.mu, mu, "mu");
  layout.add(call.rho, rho, "rho");
  call.param = option<Param>(param, 0, 2, "param");
  call.reduction = option<Reduction>(reduction, 0, 5, "reduction");
}

Tensor log_prob_fwd(const Tensor& x, const Tensor& mu, const Tensor& rho, int64_t param, int64_t reduction,
                    int64_t batch_ndim) {
  const Device device(x);
  Layout layout(x, batch_ndim);
  LogProbForward call{};
  fill(call, layout, x, mu, rho, param, reduction);
  Tensor out = reduced_like(x, call.reduction, batch_ndim);
  if (layout.n() == 0) torch::stable::zero_(out);
  call.out = out.mutable_data_ptr();
  call.shape = layout.finish();
  device.run(call);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> log_prob_bwd(const Tensor& grad, const Tensor& x, const Tensor& mu,
                                                const Tensor& rho, int64_t param, int64_t reduction,
                                                int64_t batch_ndim) {
  const Device device(x);
  Layout layout(x, batch_ndim);
  LogProbBackward call{};
  fill(call, layout, x, mu, rho, param, reduction);
  Device::check(grad, "grad");
  add_reduced(layout, call.grad, grad, call.reduction, x, batch_ndim);
  Tensor gx = Device::fresh_like(x), gmu = Device::fresh_like(mu), grho = Device::fresh_like(rho);
  layout.add(call.gx, gx, "gx");
  layout.add(call.gmu, gmu, "gmu");
  layout.add(call.grho, grho, "grho");
  call.shape = layout.finish();
  device.run(call);
  return {gx, gmu, grho};
}

}  // namespace
}  // namespace vaeops::bind

STABLE_TORCH_LIBRARY_IMPL(vaeops, VAEOPS_DEVICE, m) {
  using namespace vaeops::bind;
  m.impl("gaussian_fwd", TORCH_BOX(&gaussian_fwd));
  m.impl("gaussian_fwd" VAEOPS_OVERLOAD, TORCH_BOX(&gaussian_fwd));
  m.impl("gaussian_bwd", TORCH_BOX(&gaussian_bwd));
  m.impl("gaussian_bwd" VAEOPS_OVERLOAD, TORCH_BOX(&gaussian_bwd));
  m.impl("gaussian_log_prob_fwd", TORCH_BOX(&log_prob_fwd));
  m.impl("gaussian_log_prob_fwd" VAEOPS_OVERLOAD, TORCH_BOX(&log_prob_fwd));
  m.impl("gaussian_log_prob_bwd", TORCH_BOX(&log_prob_bwd));
  m.impl("gaussian_log_prob_bwd" VAEOPS_OVERLOAD, TORCH_BOX(&log_prob_bwd));
}
