// What every CUDA kernel here stands on: launches, storage types, sums over teams of threads, the last-block ticket.
//
// The tests also compile these sources as plain C++ against tests/cpp/cuda_host, which runs a kernel on the CPU with a
// fiber per thread. So launches go through VAEOPS_LAUNCH, and nothing here uses what only nvcc has beyond the built-in
// variables and intrinsics that the shim lists.
#pragma once
#include "../vaeops.h"

#ifdef VAEOPS_CUDA_HOST
#include "cuda_host.h"
#define VAEOPS_LAUNCH(kernel, grid, block, stream, ...) cuda_host::launch(kernel, grid, block, 0, stream, __VA_ARGS__)
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>
#define VAEOPS_LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
#endif

namespace vaeops::cuda {

constexpr int kThreads = 256;  // of every block
constexpr int kWarp = 32;

// Blocks per multiprocessor that a kernel's registers allow: 4 at 64 registers a thread, 3 at 80, 2 at 128.
constexpr int kMostBlocksPerSm = 4;

struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <class T>
using Compute = typename ComputeType<T>::type;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(Bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ __forceinline__ float widen(Half x) { return __half2float(__ushort_as_half(x.bits)); }

template <class T>
__device__ __forceinline__ T narrow(Compute<T> x) {
  return x;
}
template <>
__device__ __forceinline__ Bf16 narrow<Bf16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
__device__ __forceinline__ Half narrow<Half>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}

template <class T>
struct Type {
  using type = T;
};

// Calls launch(Type<T>{}) for the storage type of `dtype`.
template <class Launch>
int dispatch(Dtype dtype, Launch launch) {
  switch (dtype) {
    case Dtype::f32:
      return launch(Type<float>{});
    case Dtype::bf16:
      return launch(Type<Bf16>{});
    case Dtype::f16:
      return launch(Type<Half>{});
    case Dtype::f64:
      return launch(Type<double>{});
  }
  return static_cast<int>(cudaErrorInvalidValue);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks that the current device holds at once: kernels loop over their work in a grid no larger than this.
inline int64_t resident_blocks(int per_sm) {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  const int64_t blocks = static_cast<int64_t>(count > 0 ? count : 1) * per_sm;
  return blocks < kTickets ? blocks : kTickets;
}

inline unsigned grid_for(int64_t items, int per_sm) {
  const int64_t most = resident_blocks(per_sm);
  return static_cast<unsigned>(items < 1 ? 1 : items < most ? items : most);
}

// Quotient and remainder; 64-bit division costs several times the 32-bit one and is rarely needed.
__device__ __forceinline__ int64_t divide(int64_t a, int64_t b, int64_t& rest) {
  if (((a | b) >> 32) == 0) {
    const uint32_t q = static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
    rest = static_cast<uint32_t>(a) - q * static_cast<uint32_t>(b);
    return q;
  }
  const int64_t q = a / b;
  rest = a - q * b;
  return q;
}

// Sum over a team of `width` neighbouring lanes of a warp (a power of two), in every lane. All 32 lanes must call.
__device__ __forceinline__ double team_sum(double x, int width) {
  for (int step = width / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, step);
  return x;
}

// Sum over the block, in thread 0. Same order every time, so the same bits.
__device__ __forceinline__ double block_sum(double x) {
  __shared__ double warps[kThreads / kWarp];
  x = team_sum(x, kWarp);
  __syncthreads();  // an earlier call's sums have been read
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = x;
  __syncthreads();
  double total = 0;
  if (threadIdx.x == 0) {
    for (int w = 0; w < kThreads / kWarp; ++w) total += warps[w];
  }
  return total;
}

// True, in the whole block, for the last of `expected` blocks to arrive; what all of them wrote before is then visible.
// The ticket wraps to zero by itself, ready for the next launch.
__device__ __forceinline__ bool last_to_arrive(uint32_t* ticket, uint32_t expected) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicInc(ticket, expected - 1) == expected - 1;
  __syncthreads();
  __threadfence();
  return last;
}

}  // namespace vaeops::cuda
