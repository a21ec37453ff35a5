// The noise stream on a CPU. The stream itself: vaeops/ref/rng.py; its kernels: cpu/noise.h.
#include <algorithm>

#include "cpu/strided.h"

#include "cpu/foreach_isa.h"

namespace vaeops::cpu {

void normal(float* out, int64_t n, Noise noise, ParallelFor parallel) {
  if (n == 0) return;
  const int64_t length = n / noise.streams, chunks = ceil_div(length, kChunk);
  parallel_for(n <= kSerial ? serial : parallel, noise.streams * chunks, [&](int64_t task) {
    const int64_t stream = task / chunks, first = task % chunks * kChunk;
    const int64_t* seed = noise.seed + 2 * stream;
    VAEOPS_DISPATCH(fill_normals)
    (out + stream * length + first, std::min(kChunk, length - first), static_cast<uint64_t>(seed[0]),
     static_cast<uint64_t>(seed[1]), first);
  });
}

void fold_in(const int64_t* seed, int64_t seed_stride, const int64_t* index, int64_t index_stride, int64_t* child,
             int64_t m) {
  for (int64_t i = 0; i < m; ++i) {
    const uint64_t key = static_cast<uint64_t>(seed[i * seed_stride]);
    const uint64_t offset = static_cast<uint64_t>(seed[i * seed_stride + 1]);
    const uint64_t which = static_cast<uint64_t>(index[i * index_stride]);
    // The top bit of the last word is never set in the noise stream's own counters.
    uint32_t word[4] = {static_cast<uint32_t>(offset), static_cast<uint32_t>(offset >> 32),
                        static_cast<uint32_t>(which), static_cast<uint32_t>(which >> 32) | 0x80000000u};
    philox_words(word, static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32));
    child[2 * i] = static_cast<int64_t>(word[0] | static_cast<uint64_t>(word[1]) << 32);
    child[2 * i + 1] = static_cast<int64_t>(word[2] | static_cast<uint64_t>(word[3]) << 32);
  }
}

}  // namespace vaeops::cpu
