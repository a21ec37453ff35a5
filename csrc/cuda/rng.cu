// The noise stream on its own: normals, and child seeds.
#include "noise.cuh"

namespace vaeops::cuda {
namespace {

__global__ void __launch_bounds__(kThreads, 8)
    normal_kernel(float* out /* [S, n / S] */, int64_t n, const Noise noise, int64_t quads) {
  const int64_t length = n / noise.streams;
  const int64_t total = quads * noise.streams;
  for (int64_t b = blockIdx.x * int64_t{kThreads} + threadIdx.x; b < total; b += gridDim.x * int64_t{kThreads}) {
    int64_t quad = b, stream = 0;
    if (noise.streams > 1) stream = divide(b, quads, quad);
    float x[4];
    draw(noise.seed + 2 * stream, quad, x);
    float* to = out + stream * length + 4 * quad;
    const int64_t left = length - 4 * quad;
    if (left >= 4 && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
      *reinterpret_cast<float4*>(to) = make_float4(x[0], x[1], x[2], x[3]);
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (e < left) to[e] = x[e];
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    fold_in_kernel(const int64_t* seed /* [M or 1, 2] */, int64_t seed_stride, const int64_t* index /* [M or 1] */,
                   int64_t index_stride, int64_t* child /* [M, 2] */, int64_t m) {
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < m; i += gridDim.x * int64_t{kThreads}) {
    const int64_t* parent = seed + i * seed_stride;
    const uint64_t offset = static_cast<uint64_t>(parent[1]), place = static_cast<uint64_t>(index[i * index_stride]);
    // The top bit is what the noise stream never sets: derived seeds never meet drawn noise.
    const Words w =
        philox(static_cast<uint64_t>(parent[0]), static_cast<uint32_t>(offset), static_cast<uint32_t>(offset >> 32),
               static_cast<uint32_t>(place), static_cast<uint32_t>(place >> 32) | 0x80000000u);
    child[2 * i] = static_cast<int64_t>(w.x[0] | static_cast<uint64_t>(w.x[1]) << 32);
    child[2 * i + 1] = static_cast<int64_t>(w.x[2] | static_cast<uint64_t>(w.x[3]) << 32);
  }
}

}  // namespace

int normal(float* out, int64_t n, Noise noise, CUstream_st* stream) {
  if (n == 0) return 0;
  const int64_t quads = ceil_div(n / noise.streams, 4);
  const unsigned grid = grid_for(ceil_div(quads * noise.streams, kThreads), 8);
  VAEOPS_LAUNCH(normal_kernel, grid, kThreads, stream, out, n, noise, quads);
  return static_cast<int>(cudaGetLastError());
}

int fold_in(const int64_t* seed, int64_t seed_stride, const int64_t* index, int64_t index_stride, int64_t* child,
            int64_t m, CUstream_st* stream) {
  if (m == 0) return 0;
  VAEOPS_LAUNCH(fold_in_kernel, grid_for(ceil_div(m, kThreads), 8), kThreads, stream, seed, seed_stride, index,
                index_stride, child, m);
  return static_cast<int>(cudaGetLastError());
}

const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace vaeops::cuda
