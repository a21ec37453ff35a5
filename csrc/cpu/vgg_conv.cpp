// A trunk's convolutions on a CPU: plans, scratch, tasks.
#include "cpu/vgg_conv.h"

#include <algorithm>
#include <type_traits>

#include "cpu/strided.h"
#include "cpu/vgg_plan.h"

#define VAEOPS_KERNELS "cpu/vgg_conv_kernels.h"
#include "cpu/foreach_isa.h"
#undef VAEOPS_KERNELS

#if defined(__x86_64__)
VAEOPS_TARGET_BEGIN("amx-tile,amx-bf16,avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c")
namespace vaeops::cpu::amx {
using namespace avx512;
#include "cpu/vgg_amx.h"
}  // namespace vaeops::cpu::amx
VAEOPS_TARGET_END
#endif

namespace vaeops::cpu {
namespace {

constexpr int64_t kBlockPixels = 256;        // on AMX tiles
constexpr int64_t kBlockFloats = 300 << 10;  // of V and M together: they stay in the second-level cache

// The work, 0 .. n, cut into at most `slots` tasks; run(begin, end, the task's scratch).
template <class Run>
void tasks(const ConvScratch& scratch, int64_t slot_bytes, int64_t n, ParallelFor inner, const Run& run) {
  const int64_t count = std::min(n, scratch.slots);
  parallel_for(count == 1 ? serial : inner, count, [&](int64_t task) {
    char* const own = static_cast<char*>(scratch.data) + task * slot_bytes;
    run(n * task / count, n * (task + 1) / count, reinterpret_cast<float*>(own));
  });
}

int64_t group_of(int64_t out) { return std::min<int64_t>(round_up(out, kPanel), 64); }
int64_t block_of(int64_t in, int64_t out) {
  const int64_t most = kBlockFloats / (kPoints * (in + group_of(out)));
  return std::clamp<int64_t>(most / kStripMultiple, 2, 8) * kStripMultiple;
}

WinogradPlan winograd_plan(int64_t in, int64_t out, int64_t block) {
  WinogradPlan p{};
  p.in = in;
  p.out = out;
  p.block = block;
  p.group = group_of(out);
  p.v_step = p.block * in + 16;
  p.m_step = p.block * p.group + 16;
  return p;
}

DirectPlan direct_plan(int64_t in, int64_t out, int64_t w) {
  DirectPlan p{};
  p.in = in;
  p.out = out;
  p.w = w;
  p.width = round_up(w, kStripMultiple) + 16;
  return p;
}

TilePlan tile_plan(int64_t in, int64_t out, int64_t w) {
  TilePlan p{};
  p.in = in;
  p.out = out;
  p.w = w;
  p.channels = round_up(in, 32);
  p.rows = round_up(ceil_div(kBlockPixels, w), 2);
  p.step = w % 16 == 0 ? w : w + 2;
  return p;
}

int64_t slot_floats(VggAlgorithm algorithm, int64_t in, int64_t out, int64_t w) {
  if (in != 3 && algorithm == VggAlgorithm::winograd) {
    const WinogradPlan p = winograd_plan(in, out, block_of(in, out));
    return p.v_floats() + p.m_floats();
  }
  if (in != 3 && algorithm == VggAlgorithm::bf16) {
    const TilePlan p = tile_plan(in, out, w);
    return p.pixel_floats() + p.sums_floats();
  }
  const DirectPlan p = direct_plan(in, out, w);
  return p.width * (in == 3 ? 12 : 4 * in) + 2 * p.width * kPanel;
}

template <class Call>
void convolve(VggAlgorithm algorithm, const Call& call, const void* x, int64_t in, int64_t out, const float* bias,
              const ConvScratch& scratch, ParallelFor inner) {
  const int64_t slot = conv_scratch_bytes(algorithm, call.in, call.out, call.w);
  const float* const map = static_cast<const float*>(x);
  if (algorithm == VggAlgorithm::winograd) {
    const int64_t rows = ceil_div(call.h, 4), columns = ceil_div(call.w, 4), tiles = call.n * rows * columns;
    const int64_t share = round_up(ceil_div(tiles, scratch.slots), kStripMultiple);
    WinogradPlan p = winograd_plan(in, out, std::min(block_of(in, out), share));
    p.n = call.n;
    p.h = call.h;
    p.w = call.w;
    p.rows = rows;
    p.columns = columns;
    p.tiles = tiles;
    p.weights = call.packed;
    p.bias = bias;
    tasks(scratch, slot, ceil_div(tiles, p.block), inner, [&](int64_t begin, int64_t end, float* own) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block * p.block;
        VAEOPS_DISPATCH(winograd_block<Call>)(p, call, map, first, std::min(p.block, tiles - first), own,
                                              own + p.v_floats());
      }
    });
    return;
  }
#if defined(__x86_64__)
  if (algorithm == VggAlgorithm::bf16) {
    TilePlan p = tile_plan(in, out, call.w);
    const int64_t share = round_up(ceil_div(call.n * call.h, scratch.slots), 2);
    p.rows = std::min(p.rows, share);
    p.h = call.h;
    p.weights = reinterpret_cast<const bf16*>(call.packed);
    p.bias = bias;
    const int64_t blocks = ceil_div(call.h, p.rows);
    tasks(scratch, slot, call.n * blocks, inner, [&](int64_t begin, int64_t end, float* own) {
      amx::use_tiles(true);
      for (int64_t i = begin; i < end; ++i) {
        amx::tile_rows(p, call, static_cast<const bf16*>(x), i / blocks, i % blocks * p.rows,
                       reinterpret_cast<bf16*>(own), own + p.pixel_floats());
      }
      amx::use_tiles(false);
    });
    return;
  }
#endif
  DirectPlan p = direct_plan(in, out, call.w);
  p.n = call.n;
  p.h = call.h;
  p.weights = call.packed;
  p.bias = bias;
  const int64_t pairs = ceil_div(call.h, 2);
  tasks(scratch, slot, call.n * pairs, inner, [&](int64_t begin, int64_t end, float* own) {
    for (int64_t i = begin; i < end; ++i) {
      VAEOPS_DISPATCH(direct_rows<Call>)(p, call, map, i / pairs, i % pairs * 2, own, own + 4 * p.width * p.in);
    }
  });
}

template <class T>
void put_row(const float* gradient, float rstd, int64_t w, T* to) {
  for (int64_t x = 0; x < w; ++x) {
    if constexpr (sizeof(T) == 4) {
      to[x] = gradient[x] * rstd;
    } else if constexpr (std::is_same_v<T, bf16>) {
      to[x] = to_bf16(gradient[x] * rstd);
    } else {
      to[x] = to_f16(gradient[x] * rstd);
    }
  }
}

}  // namespace

VggAlgorithm conv_algorithm(VggAlgorithm wanted) {
  return wanted == VggAlgorithm::bf16 && isa() != Isa::amx ? VggAlgorithm::winograd : wanted;
}

int64_t conv_scratch_bytes(VggAlgorithm algorithm, int64_t in, int64_t out, int64_t w) {
  const int64_t forward = slot_floats(algorithm, in, out, w);
  const int64_t backward = in == 3 ? 3 * w : slot_floats(algorithm, out, in, w);
  return round_up(4 * std::max(forward, backward), 64);
}

void conv_forward(VggAlgorithm algorithm, const ConvForward& call, ConvScratch scratch, ParallelFor inner) {
  const float* const bias = call.packed + conv_packed_floats(algorithm, call.in, call.out, false) - call.out;
  convolve(algorithm, call, call.x, call.in, call.out, bias, scratch, inner);
}

void conv_backward(VggAlgorithm algorithm, const ConvBackward& call, ConvScratch scratch, ParallelFor inner) {
  convolve(algorithm, call, call.g, call.out, call.in, nullptr, scratch, inner);
}

void conv_first(VggAlgorithm algorithm, const VggImage& image, int64_t first_image, const ConvForward& call,
                ConvScratch scratch, ParallelFor inner) {
  DirectPlan p = direct_plan(3, call.out, call.w);
  p.n = call.n;
  p.h = call.h;
  p.weights = call.packed;
  p.bias = call.packed + conv_packed_floats(algorithm, 3, call.out, false) - call.out;
  const int64_t pairs = ceil_div(call.h, 2), slot = conv_scratch_bytes(algorithm, 3, call.out, call.w);
  tasks(scratch, slot, call.n * pairs, inner, [&](int64_t begin, int64_t end, float* own) {
    float* const sums = own + 12 * p.width;
    for (int64_t i = begin; i < end; ++i) {
      if (algorithm == VggAlgorithm::bf16) {
        VAEOPS_DISPATCH(first_rows<bf16>)(p, call, image, first_image, i / pairs, i % pairs * 2, own, sums);
      } else {
        VAEOPS_DISPATCH(first_rows<float>)(p, call, image, first_image, i / pairs, i % pairs * 2, own, sums);
      }
    }
  });
}

void conv_first_backward(VggAlgorithm algorithm, const ConvBackward& call, const float* rstd, void* gx, Dtype gx_dtype,
                         ConvScratch scratch, ParallelFor inner) {
  DirectPlan p = direct_plan(call.out, 3, call.w);
  p.n = call.n;
  p.h = call.h;
  p.weights = call.packed;
  const int64_t slot = conv_scratch_bytes(algorithm, 3, call.out, call.w), map = call.h * call.w * call.out;
  tasks(scratch, slot, call.n * call.h, inner, [&](int64_t begin, int64_t end, float* own) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / call.h, y = i % call.h;
      if (algorithm == VggAlgorithm::bf16) {
        VAEOPS_DISPATCH(image_gradient_row<bf16>)(p, static_cast<const bf16*>(call.g) + image * map, y, own);
      } else {
        VAEOPS_DISPATCH(image_gradient_row<float>)(p, static_cast<const float*>(call.g) + image * map, y, own);
      }
      for (int channel = 0; channel < 3; ++channel) {
        const int64_t at = ((image * 3 + channel) * call.h + y) * call.w;
        const float* const row = own + channel * call.w;
        if (gx_dtype == Dtype::f32) {
          put_row(row, rstd[channel], call.w, static_cast<float*>(gx) + at);
        } else if (gx_dtype == Dtype::bf16) {
          put_row(row, rstd[channel], call.w, static_cast<bf16*>(gx) + at);
        } else {
          put_row(row, rstd[channel], call.w, static_cast<f16*>(gx) + at);
        }
      }
    }
  });
}

}  // namespace vaeops::cpu
