// Includes the noise kernels, and VAEOPS_KERNELS where it is defined, once per instruction set, in namespaces scalar,
// avx2 and avx512 of vaeops::cpu. The including file has already included every standard header it needs: inside the
// target attributes none may be, or the linker could hand an AVX-512 copy of an inline function to a machine without
// it. Same reason for static functions throughout.
#include "cpu/types.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__clang__)
#define VAEOPS_PRAGMA(x) _Pragma(#x)
#define VAEOPS_TARGET_BEGIN(isa) VAEOPS_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define VAEOPS_TARGET_END VAEOPS_PRAGMA(clang attribute pop)
#else
#define VAEOPS_PRAGMA(x) _Pragma(#x)
#define VAEOPS_TARGET_BEGIN(isa) VAEOPS_PRAGMA(GCC push_options) VAEOPS_PRAGMA(GCC target(isa))
#define VAEOPS_TARGET_END VAEOPS_PRAGMA(GCC pop_options)
#endif

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC's own intrinsics start from undefined vectors
#endif

namespace vaeops::cpu::scalar {
#define VAEOPS_ISA 0
#include "cpu/simd.h"
//
#include "cpu/noise.h"
#ifdef VAEOPS_KERNELS
#include VAEOPS_KERNELS
#endif
#undef VAEOPS_ISA
}  // namespace vaeops::cpu::scalar

#if defined(__x86_64__)
VAEOPS_TARGET_BEGIN("avx2,fma,f16c")
namespace vaeops::cpu::avx2 {
#define VAEOPS_ISA 1
#include "cpu/simd.h"
//
#include "cpu/noise.h"
#ifdef VAEOPS_KERNELS
#include VAEOPS_KERNELS
#endif
#undef VAEOPS_ISA
}  // namespace vaeops::cpu::avx2
VAEOPS_TARGET_END

VAEOPS_TARGET_BEGIN("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c")
namespace vaeops::cpu::avx512 {
#define VAEOPS_ISA 2
#include "cpu/simd.h"
//
#include "cpu/noise.h"
#ifdef VAEOPS_KERNELS
#include VAEOPS_KERNELS
#endif
#undef VAEOPS_ISA
}  // namespace vaeops::cpu::avx512
VAEOPS_TARGET_END
#pragma GCC diagnostic pop
// The kernel of the instruction set in use.
#define VAEOPS_DISPATCH(...) \
  (isa() >= Isa::avx512 ? avx512::__VA_ARGS__ : isa() == Isa::avx2 ? avx2::__VA_ARGS__ : scalar::__VA_ARGS__)
#else
#pragma GCC diagnostic pop
#define VAEOPS_DISPATCH(...) (scalar::__VA_ARGS__)
#endif
