// A trunk's layers forwards and backwards. Convolutions come with the steps around them (vgg_conv.h); what is left are
// pools without a convolution before them, and the gradients of pools.
#include "cpu/vgg_program.h"

#include <algorithm>
#include <atomic>

#include "cpu/vgg_pool.h"

#define VAEOPS_KERNELS "cpu/vgg_pool_kernels.h"
#include "cpu/foreach_isa.h"
#undef VAEOPS_KERNELS

namespace vaeops::cpu {
namespace {

// Masks and codes of images from `first` on.
uint16_t* saved_of(const TrunkLayer& layer, uint8_t* saved, int64_t first) {
  if (saved == nullptr) return nullptr;
  return reinterpret_cast<uint16_t*>(saved + layer.saved_begin + first * layer.saved);
}

template <class Row>
void run_pool_row(const TrunkPlan& plan, const Row& row) {
  if constexpr (std::is_same_v<Row, PoolRow>) {
    plan.dtype() == Dtype::bf16 ? VAEOPS_DISPATCH(pool_row<bf16>)(row) : VAEOPS_DISPATCH(pool_row<float>)(row);
  } else {
    plan.dtype() == Dtype::bf16 ? VAEOPS_DISPATCH(spread_row<bf16>)(row) : VAEOPS_DISPATCH(spread_row<float>)(row);
  }
}

void pool(const TrunkPlan& plan, const TrunkLayer& l, int64_t n, const void* x, void* y, uint16_t* code,
          ParallelFor inner) {
  const int64_t pixel = l.in * plan.element();
  parallel_for(inner, n * l.out_height, [&](int64_t r) {
    const int64_t image = r / l.out_height, top = 2 * (r % l.out_height);
    run_pool_row(plan,
                 PoolRow{l.width, l.in, advance(x, (image * l.height + top) * l.width * pixel),
                         static_cast<char*>(y) + r * l.out_width * pixel, advance(code, r * l.out_width * l.in / 4)});
  });
}

// The gradient before the ReLU that gave layer l's map, from that of the pool that follows. g null: none does.
void spread(const TrunkPlan& plan, const TrunkLayer& l, int64_t n, const void* g, const uint16_t* code,
            const void* after, const uint16_t* mask, const void* before, void* gx, ParallelFor inner) {
  const int64_t h = l.out_height, w = l.out_width, row = w * l.out * plan.element(), words = w * l.out / 8;
  const int64_t pooled_h = h / 2, pooled_w = w / 2;
  parallel_for(inner, n * h, [&](int64_t r) {
    const int64_t image = r / h, y = r % h, pooled = image * pooled_h + y / 2;
    const bool covered = g != nullptr && y / 2 < pooled_h;
    SpreadRow s{};
    s.width = w;
    s.channels = l.out;
    s.pooled = covered ? pooled_w : 0;
    s.parity = y % 2;
    if (covered) {
      s.g = advance(g, pooled * pooled_w * l.out * plan.element());
      s.code = advance(code, pooled * pooled_w * l.out / 4);
    }
    s.after = advance(after, r * row);
    s.mask = advance(mask, r * words);
    s.before = advance(before, r * row);
    s.gx = static_cast<char*>(gx) + r * row;
    run_pool_row(plan, s);
  });
}

}  // namespace

int64_t threads_of(ParallelFor parallel) {
  std::atomic<int64_t> ranges{0};
  parallel(1024, [](void* context, int64_t, int64_t) { ++*static_cast<std::atomic<int64_t>*>(context); }, &ranges);
  return ranges.load();
}

Chunks chunks_of(int64_t image_bytes, int64_t chunk_bytes, int64_t batch, ParallelFor parallel) {
  const int64_t threads = threads_of(parallel);
  const int64_t most = std::max<int64_t>(1, chunk_bytes / image_bytes);
  Chunks chunks{};
  chunks.count = ceil_div(batch, most);
  chunks.outer = batch >= threads;
  if (chunks.outer) chunks.count = std::min(batch, ceil_div(chunks.count, threads) * threads);
  chunks.images = ceil_div(batch, chunks.count);
  chunks.count = ceil_div(batch, chunks.images);
  chunks.slots = chunks.outer ? 1 : threads;
  return chunks;
}

void forward(const TrunkPlan& plan, const VggImage& image, int64_t first, int64_t n, void* const* tap, uint8_t* saved,
             int64_t kept, const Work& work, ParallelFor inner) {
  const void* x = nullptr;
  for (int32_t i = 0; i < plan.layers; ++i) {
    const TrunkLayer& l = plan.layer[i];
    if (l.pool) {
      void* const y = l.after >= 0 ? tap[l.after] : work.other(x);
      pool(plan, l, n, x, y, saved_of(l, saved, kept), inner);
      x = y;
      continue;
    }
    const bool last = i == plan.layers - 1;
    ConvForward call = l.forward_call(n);
    call.x = x;
    if (last && l.after < 0) {
      call.y = tap[l.before];
    } else {
      call.relu = true;
      call.before = l.before >= 0 ? tap[l.before] : nullptr;
      call.mask = saved_of(l, saved, kept);
      call.y = l.after >= 0 ? tap[l.after] : nullptr;
      if (!last && plan.layer[i + 1].pool) {
        const TrunkLayer& above = plan.layer[++i];
        call.pooled = above.after >= 0 ? tap[above.after] : work.other(x);
        call.code = saved_of(above, saved, kept);
      } else if (call.y == nullptr) {
        call.y = work.other(x);
      }
    }
    x == nullptr ? conv_first(plan.algorithm, image, first, call, work.conv, inner)
                 : conv_forward(plan.algorithm, call, work.conv, inner);
    x = call.pooled != nullptr ? call.pooled : call.y;
  }
}

void backward(const TrunkPlan& plan, int64_t n, const void* const* grad, bool masked, const uint8_t* saved,
              int64_t kept, const float* rstd, void* gx, Dtype gx_dtype, const Work& work, ParallelFor inner) {
  const auto after = [&](const TrunkLayer& l) { return l.after >= 0 ? grad[l.after] : nullptr; };
  const auto before = [&](const TrunkLayer& l) { return l.before >= 0 ? grad[l.before] : nullptr; };
  const auto bits = [&](const TrunkLayer& l) { return saved_of(l, const_cast<uint8_t*>(saved), kept); };
  const auto mask = [&](const TrunkLayer& l) { return l.pool ? nullptr : bits(l); };
  int32_t i = plan.layers - 1;
  while (i >= 0 && after(plan.layer[i]) == nullptr && before(plan.layer[i]) == nullptr) --i;
  if (i < 0) {
    const int64_t elements = n * 3 * plan.layer[0].height * plan.layer[0].width;
    std::fill_n(static_cast<char*>(gx), elements * bytes_of(gx_dtype), char{0});
    return;
  }
  const TrunkLayer& top = plan.layer[i];
  const void* g = after(top);
  if (g == nullptr) {
    g = before(top);
  } else if (!top.pool && !(masked && before(top) == nullptr)) {
    void* const joined = work.maps[0];
    spread(plan, top, n, nullptr, nullptr, g, bits(top), before(top), joined, inner);
    g = joined;
  }
  for (; i >= 0; --i) {
    const TrunkLayer& l = plan.layer[i];
    void* const to = work.other(g);
    if (l.pool) {
      const TrunkLayer& below = plan.layer[i - 1];
      spread(plan, below, n, g, bits(l), after(below), mask(below), before(below), to, inner);
      g = to;
      continue;
    }
    ConvBackward call = l.backward_call(n);
    call.g = g;
    if (i == 0) return conv_first_backward(plan.algorithm, call, rstd, gx, gx_dtype, work.conv, inner);
    const TrunkLayer& below = plan.layer[i - 1];
    call.tap_after = after(below);
    call.mask = mask(below);
    call.tap_before = before(below);
    call.gx = to;
    conv_backward(plan.algorithm, call, work.conv, inner);
    g = to;
  }
}

}  // namespace vaeops::cpu
