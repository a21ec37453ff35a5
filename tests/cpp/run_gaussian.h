// Runs a Problem through the CUDA launchers on the CPU, or through the C++ kernels, and checks what comes out.
#pragma once
#include "cuda_host.h"
#include "gaussian_case.h"
#include "scratch.h"

namespace vaeops::test {

struct Results {
  Tensor z, kl, gmu, grho, gprior_mu, gprior_rho;
  Sizes prior_stride;

  std::vector<char> bits() const {
    std::vector<char> all;
    for (const Tensor* t : {&z, &kl, &gmu, &grho, &gprior_mu, &gprior_rho}) {
      if (!t->present()) continue;
      const std::vector<char> part = t->contents();
      all.insert(all.end(), part.begin(), part.end());
    }
    return all;
  }
};

// The call, with outputs made in `r`.
inline GaussianForward forward_call(const Problem& p, Results& r) {
  const Case& c = p.c;
  if (c.sampled) r.z = make(c.shape, c.dtype, c.layout);
  r.kl = make({p.reduced_n()}, compute(c.dtype));
  const Merge merge(c.shape,
                    {p.mu.stride, p.rho.stride, p.prior_mu.stride, p.prior_rho.stride, p.eps.stride, r.z.stride});
  GaussianForward call{};
  p.set(call);
  call.shape = merge.shape(p.n, p.rows);
  call.mu = merge.operand(p.mu, 0);
  call.rho = merge.operand(p.rho, 1);
  call.prior_mu = merge.operand(p.prior_mu, 2);
  call.prior_rho = merge.operand(p.prior_rho, 3);
  call.eps = merge.operand(p.eps, 4);
  call.z = merge.operand(r.z, 5);
  call.kl = r.kl.data();
  return call;
}

inline void run_forward(const Problem& p, Results& r) {
  const GaussianForward call = forward_call(p, r);
  ScratchMemory memory;
  const int error = cuda::gaussian_forward(call, memory.scratch(cuda::gaussian_forward_scratch(call)), nullptr);
  CHECK(error == 0, "error %d: %s", error, p.c.name().c_str());
  memory.check(p.c.name());
}

inline GaussianBackward backward_call(const Problem& p, Results& r) {
  const Case& c = p.c;
  r.gmu = make(c.shape, c.dtype, c.layout);
  r.grho = make(c.shape, c.dtype, c.layout);
  if (p.prior_mu.present()) {
    r.gprior_mu = make(c.shape, compute(c.dtype), Layout::contiguous, c.prior_kept);
    r.gprior_rho = make(c.shape, compute(c.dtype), Layout::contiguous, c.prior_kept);
    r.prior_stride = r.gprior_mu.stride;
  }
  const Merge merge(c.shape, {p.mu.stride, p.rho.stride, p.prior_mu.stride, p.prior_rho.stride, p.eps.stride,
                              p.gz.stride, p.gkl.stride, r.gmu.stride, r.grho.stride, r.prior_stride});
  GaussianBackward call{};
  p.set(call);
  call.shape = merge.shape(p.n, p.rows);
  call.mu = merge.operand(p.mu, 0);
  call.rho = merge.operand(p.rho, 1);
  call.prior_mu = merge.operand(p.prior_mu, 2);
  call.prior_rho = merge.operand(p.prior_rho, 3);
  call.eps = merge.operand(p.eps, 4);
  call.gz = merge.operand(p.gz, 5);
  call.gkl = merge.operand(p.gkl, 6);
  call.gmu = merge.operand(r.gmu, 7);
  call.grho = merge.operand(r.grho, 8);
  if (p.prior_mu.present()) {
    call.gprior_mu = r.gprior_mu.data();
    call.gprior_rho = r.gprior_rho.data();
    call.prior_n = r.gprior_mu.elements;
    for (size_t d = 0; d < merge.sizes.size(); ++d) call.prior_stride[d] = merge.strides[9][d];
  }
  return call;
}

inline void run_backward(const Problem& p, Results& r) {
  const GaussianBackward call = backward_call(p, r);
  ScratchMemory memory;
  const int error = cuda::gaussian_backward(call, memory.scratch(cuda::gaussian_backward_scratch(call)), nullptr);
  CHECK(error == 0, "error %d: %s", error, p.c.name().c_str());
  memory.check(p.c.name());
}

inline std::vector<double> noise_of(const Problem& p) {
  std::vector<double> eps(static_cast<size_t>(p.n), 0.0);
  if (!p.c.sampled) return eps;
  if (p.c.eps_given) {
    for (int64_t i = 0; i < p.n; ++i) eps[i] = element(p.c.shape, p.eps, i);
    return eps;
  }
  std::vector<float> drawn(static_cast<size_t>(p.n));
  cuda::normal(drawn.data(), p.n, {p.seed.data(), p.c.streams}, nullptr);
  return {drawn.begin(), drawn.end()};
}

inline void check_values(const Problem& p, const Results& r) {
  const Case& c = p.c;
  const Expected want(p, noise_of(p), r.prior_stride, r.gprior_mu.elements);
  if (c.sampled) compare("z", p, r.z, want.z, r.z.stride, c.shape, 6, 3);
  compare("kl", p, r.kl, want.kl, r.kl.stride, {p.reduced_n()}, 16, c.prior_kept.empty() ? 0.05 : 2);
  compare("gmu", p, r.gmu, want.gmu, r.gmu.stride, c.shape, 16, 4);
  compare("grho", p, r.grho, want.grho, r.grho.stride, c.shape, 16, 8);
  if (p.prior_mu.present()) {
    const double terms = std::sqrt(static_cast<double>(p.n) / static_cast<double>(r.gprior_mu.elements));
    const Sizes flat = {r.gprior_mu.elements}, one = {1};
    compare("gprior_mu", p, r.gprior_mu, want.gprior_mu, one, flat, 16, 20 * terms);
    compare("gprior_rho", p, r.gprior_rho, want.gprior_rho, one, flat, 16, 60 * terms);
  }
}

// Values against fp64, and the same bits in two drawn orders of threads and blocks.
inline void check_case(const Case& c) {
  const Problem p(c);
  cuda_host::options.seed = 0;
  Results r;
  run_forward(p, r);
  run_backward(p, r);
  check_values(p, r);
  const std::vector<char> bits = r.bits();
  for (uint64_t seed : {1, 2}) {
    cuda_host::options.seed = seed;
    Results again;
    run_forward(p, again);
    run_backward(p, again);
    CHECK(again.bits() == bits, "thread order %llu changes the result: %s", static_cast<unsigned long long>(seed),
          c.name().c_str());
  }
  cuda_host::options.seed = 0;
}

#ifdef VAEOPS_WITH_CPU
inline void serially(int64_t n, void (*body)(void*, int64_t, int64_t), void* context) {
  if (n > 0) body(context, 0, n);
}

// The C++ kernels of every instruction set that the machine has: right values, and z the same bits as from CUDA's
// source.
inline void check_cpu(const Case& c) {
  const Problem p(c);
  Results host;
  run_forward(p, host);
  for (cpu::Isa isa : {cpu::Isa::scalar, cpu::Isa::avx2, cpu::Isa::avx512}) {
    if (!cpu::set_isa(isa)) continue;
    Results r;
    cpu::gaussian_forward(forward_call(p, r), serially);
    cpu::gaussian_backward(backward_call(p, r), serially);
    check_values(p, r);
    // fp64 takes its exponential from the C library.
    CHECK(!c.sampled || c.dtype == Dtype::f64 || r.z.contents() == host.z.contents(), "z differs on ISA %d: %s",
          static_cast<int>(isa), c.name().c_str());
  }
  cpu::set_isa(cpu::best_isa());
}
#endif

}  // namespace vaeops::test
