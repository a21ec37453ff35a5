// Which instruction set the CPU kernels use.
#include <atomic>

#include "vaeops.h"

namespace vaeops::cpu {
namespace {
std::atomic<int32_t> chosen{-1};  // -1: not asked yet
}

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl")) {
    return Isa::avx512;
  }
  // F16C comes with every CPU that has AVX2 and FMA.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::scalar;
}

Isa isa() {
  int32_t now = chosen.load(std::memory_order_relaxed);
  if (now < 0) {
    now = static_cast<int32_t>(best_isa());
    chosen.store(now, std::memory_order_relaxed);
  }
  return static_cast<Isa>(now);
}

bool set_isa(Isa wanted) {
  if (wanted < Isa::scalar || wanted > best_isa()) return false;
  chosen.store(static_cast<int32_t>(wanted), std::memory_order_relaxed);
  return true;
}

}  // namespace vaeops::cpu

// For the `_host` module, which finds these in the loaded library.
extern "C" {
__attribute__((visibility("default"))) int32_t vaeops_isa() { return static_cast<int32_t>(vaeops::cpu::isa()); }
__attribute__((visibility("default"))) int32_t vaeops_best_isa() {
  return static_cast<int32_t>(vaeops::cpu::best_isa());
}
__attribute__((visibility("default"))) int32_t vaeops_set_isa(int32_t wanted) {
  return vaeops::cpu::set_isa(static_cast<vaeops::cpu::Isa>(wanted)) ? 1 : 0;
}
}
