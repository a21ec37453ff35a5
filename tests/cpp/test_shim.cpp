// The stand-in for a GPU (cuda_host/) tells wrong kernels from right ones.
//     test_shim                  its barriers, shuffles, votes and shared memory; a planted missing barrier is found
//     test_shim out_of_bounds    a planted write past an array: AddressSanitizer must end the program
//     test_shim deadlock         threads at different barriers: the shim must end the program
#include <cstring>
#include <vector>

#include "check.h"
#include "cuda_host.h"

namespace {

constexpr int kThreads = 64;

// Sums of neighbours, right only if everyone has written before anyone reads.
template <bool kBarrier>
void neighbours(const int* in, int* out) {
  __shared__ int values[kThreads];
  values[threadIdx.x] = in[threadIdx.x];
  if (kBarrier) __syncthreads();
  out[threadIdx.x] = values[threadIdx.x] + (threadIdx.x > 0 ? values[threadIdx.x - 1] : 0);
}

void past_the_end(int* out) { out[threadIdx.x + 1] = 0; }

void split_barrier(int* out) {
  if (threadIdx.x < 32) __syncthreads();
  if (threadIdx.x >= 32) __shfl_xor_sync(0xFFFFFFFFu, 0, 32 - static_cast<int>(threadIdx.x) % 2);
  if (threadIdx.x == 32) return;
  __syncwarp();
  out[threadIdx.x] = 1;
}

void warp_operations(int* out) {
  const int t = static_cast<int>(threadIdx.x), lane = t % 32;
  int* shared = static_cast<int*>(cuda_host::dynamic_shared());
  shared[t] = __shfl_xor_sync(0xFFFFFFFFu, t, 5) + 1000 * __shfl_sync(0xFFFFFFFFu, t, 3);
  const unsigned odd = __ballot_sync(0xFFFFFFFFu, t % 2);
  __syncthreads();
  out[t] = shared[kThreads - 1 - t];
  if (odd != 0xAAAAAAAAu || __any_sync(0xFFFFFFFFu, lane == 7) != 1 || __all_sync(0xFFFFFFFFu, lane < 31) != 0)
    out[t] = -1;
  if (lane < 8 && __shfl_xor_sync(0xFFu, lane, 1) != (lane ^ 1)) out[t] = -2;  // a part of the warp
}

void count_blocks(unsigned* counter, unsigned* last) {
  if (threadIdx.x == 0 && atomicInc(counter, gridDim.x - 1) == gridDim.x - 1) *last = blockIdx.x;
}

bool finds_wrong(void (*kernel)(const int*, int*), uint64_t seed) {
  std::vector<int> in(kThreads), out(kThreads);
  bool wrong = false;
  for (int round = 1; round < 4; ++round) {  // new values each time: what the last block left must not look right
    for (int t = 0; t < kThreads; ++t) in[t] = round * 1000 + t;
    cuda_host::options.seed = seed;
    cuda_host::launch(kernel, 1, kThreads, 0, nullptr, in.data(), out.data());
    for (int t = 0; t < kThreads; ++t) wrong |= out[t] != in[t] + (t > 0 ? in[t - 1] : 0);
  }
  return wrong;
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<int> out(kThreads);
  if (argc > 1 && std::strcmp(argv[1], "out_of_bounds") == 0) {
    cuda_host::launch(past_the_end, 1, kThreads, 0, nullptr, out.data());
    return 0;
  }
  if (argc > 1 && std::strcmp(argv[1], "deadlock") == 0) {
    cuda_host::launch(split_barrier, 1, kThreads, 0, nullptr, out.data());
    return 0;
  }
  for (uint64_t seed = 1; seed < 6; ++seed) {
    CHECK(finds_wrong(neighbours<false>, seed), "order %d hides the missing barrier", static_cast<int>(seed));
    CHECK(!finds_wrong(neighbours<true>, seed), "order %d: the right kernel fails", static_cast<int>(seed));
  }
  CHECK(!finds_wrong(neighbours<false>, 0), "ascending order hides the missing barrier: drawn orders are needed");

  for (uint64_t seed : {0, 1, 2}) {
    cuda_host::options.seed = seed;
    cuda_host::launch(warp_operations, 1, kThreads, kThreads * sizeof(int), nullptr, out.data());
    for (int t = 0; t < kThreads; ++t) {
      const int other = kThreads - 1 - t;
      CHECK(out[t] == (other ^ 5) + 1000 * (other / 32 * 32 + 3), "thread %d: %d", t, out[t]);
    }
    unsigned counter = 0, last = 99;
    cuda_host::launch(count_blocks, 7, kThreads, 0, nullptr, &counter, &last);
    CHECK(counter == 0 && last < 7, "counter %u, last block %u", counter, last);
    CHECK(seed != 0 || last == 6, "ascending order ends with block %u", last);
  }
  cuda_host::launch(past_the_end, 1, 2048, 0, nullptr, out.data());
  CHECK(cudaGetLastError() == cudaErrorInvalidConfiguration && cudaGetLastError() == cudaSuccess,
        "2048 threads a block");
  return vaeops::test::report();
}
