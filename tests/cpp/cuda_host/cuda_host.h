// Runs CUDA kernels on a CPU, in tests only: a .cu file compiles as plain C++ with -DVAEOPS_CUDA_HOST and this folder
// on the include path.
//
// Every thread of a block is a fiber. A fiber runs until it meets a barrier, a shuffle or a vote; when all fibers that
// the barrier waits for have come, they go on. Blocks run one after another. With a seed, threads run in an order that
// is drawn anew at every turn, some warps lag far behind the others, and blocks run in a drawn order: a result that
// hangs on the order shows a missing barrier. Memory is the host's, so AddressSanitizer sees every access out of
// bounds.
//
// Not modelled: weak memory order (__threadfence does nothing), threads that run between two barriers at the same time,
// streams (a launch has finished when it returns), and the contents of static shared memory at a block's start.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <functional>
#include <tuple>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace cuda_host {

struct Options {
  uint64_t seed = 0;  // of the order of threads and blocks; 0: ascending
  int multiprocessors = 3;
};
extern Options options;
extern dim3 thread_index, block_index, block_size, grid_size;

void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread);
void sync_block();
// Leaves the caller's value where the other lanes of `mask` find it, waits for them, and returns the warp's values.
const uint64_t* exchange(unsigned mask, uint64_t value);
unsigned lane();
void* dynamic_shared();

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, void* /* stream */,
            const Args&... args) {
  const std::tuple<std::remove_cv_t<Params>...> copied(args...);
  static_assert((sizeof(Params) + ... + 0) <= 4096, "kernel parameters must fit in 4 KiB");
  run(grid, block, shared_bytes, [&] { std::apply(kernel, copied); });
}

template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

template <class T>
T shuffle(unsigned mask, T value, unsigned source) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = exchange(mask, bits)[source];
  memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace cuda_host

#define threadIdx cuda_host::thread_index
#define blockIdx cuda_host::block_index
#define blockDim cuda_host::block_size
#define gridDim cuda_host::grid_size

inline void __syncthreads() { cuda_host::sync_block(); }
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) { cuda_host::exchange(mask, 0); }
inline void __threadfence() {}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return cuda_host::shuffle(mask, value, cuda_host::lane() ^ static_cast<unsigned>(bits));
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  return cuda_host::shuffle(mask, value, static_cast<unsigned>(source) % 32);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const uint64_t* values = cuda_host::exchange(mask, predicate != 0);
  unsigned ballot = 0;
  for (unsigned l = 0; l < 32; ++l) ballot |= (mask >> l & 1u) != 0 && values[l] != 0 ? 1u << l : 0u;
  return ballot;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

// Fibers switch at barriers alone, so plain code is atomic.
template <class T>
T atomicAdd(T* at, T value) {
  const T old = *at;
  *at = old + value;
  return old;
}
inline unsigned atomicInc(unsigned* at, unsigned last) {
  const unsigned old = *at;
  *at = old >= last ? 0 : old + 1;
  return old;
}

template <class T>
T __ldcg(const T* from) {
  return *from;
}

// Done when it returns.
inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) { memcpy(to, from, bytes); }
inline void __pipeline_commit() {}
inline void __pipeline_wait_prior(size_t) {}

// Built with -ffp-contract=off, so that each of these rounds once.
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double a) { return sqrt(a); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32); }
inline float __uint_as_float(uint32_t bits) { return cuda_host::bit_cast<float>(bits); }
inline uint32_t __float_as_uint(float x) { return cuda_host::bit_cast<uint32_t>(x); }

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline uint16_t __half_as_ushort(__half x) { return x.bits; }
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
__nv_bfloat16 __float2bfloat16_rn(float x);
float __half2float(__half x);
__half __float2half_rn(float x);

struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, void* stream);
