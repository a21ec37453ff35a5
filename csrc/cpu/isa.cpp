// Which instruction set the CPU kernels use.
#include <atomic>

#include "vaeops.h"
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace vaeops::cpu {
namespace {
std::atomic<int32_t> chosen{-1};  // -1: not asked yet

// AMX tiles with bf16 products. The system must be asked for the tile registers, once for the whole process.
bool has_amx() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kBf16) == 0 || (d & kTile) == 0) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
}  // namespace

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl")) {
    static const bool amx = has_amx();
    return amx ? Isa::amx : Isa::avx512;
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
