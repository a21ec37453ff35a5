// Runs a ReconProblem through the CUDA launchers on the CPU, and checks what comes out.
#pragma once
#include "cuda_host.h"
#include "recon_case.h"
#include "scratch.h"

namespace vaeops::test {

struct OnCudaHost {
  std::string name;

  void operator()(const ReconForward& call) const {
    launch(cuda::recon_forward_scratch(call), [&](cuda::Scratch s) { return cuda::recon_forward(call, s, nullptr); });
  }
  void operator()(const MultinomialForward& call) const {
    launch(cuda::multinomial_forward_scratch(call),
           [&](cuda::Scratch s) { return cuda::multinomial_forward(call, s, nullptr); });
  }
  void operator()(const ReconBackward& call) const {
    CHECK(cuda::recon_backward(call, nullptr) == 0, "launch: %s", name.c_str());
  }
  void operator()(const MultinomialBackward& call) const {
    CHECK(cuda::multinomial_backward(call, nullptr) == 0, "launch: %s", name.c_str());
  }

 private:
  template <class Launch>
  void launch(int64_t bytes, const Launch& run) const {
    ScratchMemory memory;
    CHECK(run(memory.scratch(bytes)) == 0, "launch: %s", name.c_str());
    memory.check(name);
  }
};

inline ReconResults run_cuda(const ReconProblem& p) { return run_by(OnCudaHost{p.c.name()}, p); }

// The same bits in `orders` drawn orders of threads and blocks.
inline void check_orders(const ReconProblem& p, const std::vector<double>& bits, uint64_t orders) {
  for (uint64_t seed = 1; seed <= orders; ++seed) {
    cuda_host::options.seed = seed;
    CHECK(same(run_cuda(p).values(p), bits), "thread order %d changes the result: %s", static_cast<int>(seed),
          p.c.name().c_str());
  }
  cuda_host::options.seed = 0;
}

// Values, and the bits of the C++ kernels where both make each value by the same roundings: no exponential, no
// logarithm, no sum.
inline void check_cuda(const ReconProblem& p, uint64_t orders, double slack = 1) {
  const ReconResults ours = run_cuda(p);
  check_values(p, ours, p.c.name(), slack);
  check_orders(p, ours.values(p), orders);
  const ReconKind kind = static_cast<ReconKind>(p.c.kind);
  if (kind < ReconKind::mse || kind > ReconKind::laplace_nll || p.c.dtype == Dtype::f64) return;
  const ReconResults cpu = run(p, serially);
  for (int64_t i = 0; i < p.n; ++i) {
    const int64_t at = p.at(ours.gradient, i);
    CHECK(ours.gradient.at(at) == cpu.gradient.at(at), "gradient[%d], %g in C++: %s", static_cast<int>(i),
          cpu.gradient.at(at), p.c.name().c_str());
    if (p.c.reduction != Reduction::none) continue;
    CHECK(ours.loss.at(i) == cpu.loss.at(i), "loss[%d], %g in C++: %s", static_cast<int>(i), cpu.loss.at(i),
          p.c.name().c_str());
  }
}

inline void check_cuda(const ReconCase& c, uint64_t orders) {
  ReconProblem p(c);
  p.hide();
  check_cuda(p, orders);
}

}  // namespace vaeops::test
