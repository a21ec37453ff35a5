// A trunk whose batch norms take the statistics of the batch: features, and their backward from the convolutions'
// outputs. A layer waits for the whole batch of the one before it. Within a layer the threads share out the images, a
// few at a time: what a convolution reads is normalised just before and what it writes is summed just after, in the
// cache. Only its output, and going back one gradient, go through memory.
//
// Sums are of two rows at a time, then in fp64 over the batch in their order: no value depends on threads or chunks.
#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/vgg_norm.h"
#include "cpu/vgg_program.h"

#define VAEOPS_KERNELS "cpu/vgg_norm_kernels.h"
#include "cpu/foreach_isa.h"
#undef VAEOPS_KERNELS

namespace vaeops::cpu {
namespace {

constexpr int64_t kBlockBytes = int64_t{1} << 20;  // of a chunk's map

// A convolution, its norm, and the pool that follows.
struct Step {
  const TrunkLayer *conv, *pool;  // pool null: none
  const float *weight, *bias;
  float *mean, *rstd;
  void* y;  // [B, h, w, K]: the convolution's output

  int64_t pairs() const { return ceil_div(conv->height, 2); }  // of rows of an image
  int64_t row_pairs(int64_t images) const { return images * pairs(); }
};

struct Steps {
  TrunkPlan plan;
  int32_t count = 0;
  Step step[kVggLayers];

  explicit Steps(const VggBatchNorm& call) : plan(call.trunk, call.batch, call.height, call.width) {
    for (int32_t i = 0; i < plan.layers; ++i) {
      const TrunkLayer& l = plan.layer[i];
      if (l.pool) {
        step[count - 1].pool = &l;
      } else {
        step[count++] = {&l, nullptr, call.weight[i], call.bias[i], call.stats[i], call.stats[i] + l.out, call.kept[i]};
      }
    }
  }

  Chunks chunks(const Step& s, int64_t batch, ParallelFor parallel) const {
    const int64_t map = s.conv->height * s.conv->width * std::max(s.conv->in, s.conv->out) * plan.element();
    return chunks_of(map, kBlockBytes, batch, parallel);
  }
  int64_t scratch_bytes(const Step& s) const {
    return conv_scratch_bytes(plan.algorithm, s.conv->in, s.conv->out, s.conv->width);
  }
};

// Where rows 2 * (r % pairs) and the next one of image r / pairs lie, in elements: of maps, and of pooled maps.
struct Place {
  int64_t rows, full, half;
  Place(const Step& s, int64_t r) {
    const TrunkLayer& l = *s.conv;
    const int64_t image = r / s.pairs(), y = r % s.pairs() * 2;
    rows = std::min<int64_t>(2, l.height - y);
    full = (image * l.height + y) * l.width * l.out;
    half = (image * (l.height / 2) + y / 2) * (l.width / 2) * l.out;
  }
};

void set_rows(const Steps& net, const Step& s, const Place& at, NormRows& rows) {
  rows.rows = at.rows;
  rows.width = s.conv->width;
  rows.channels = s.conv->out;
  rows.pools = s.pool != nullptr;
  rows.y = advance(s.y, at.full * net.plan.element());
  rows.mean = s.mean;
  rows.rstd = s.rstd;
  rows.weight = s.weight;
  rows.bias = s.bias;
}

template <class T>
T* tap_of(T* const* taps, int32_t position, int64_t offset) {
  return position >= 0 && taps[position] != nullptr ? taps[position] + offset : nullptr;
}

// The statistics' pieces of images [first, first + n).
void sum_images(const Steps& net, const Step& s, int64_t first, int64_t n, float* pieces, ParallelFor inner) {
  parallel_for(inner, s.row_pairs(n), [&](int64_t i) {
    const int64_t r = s.row_pairs(first) + i;
    NormRows rows{};
    set_rows(net, s, Place(s, r), rows);
    float* const sums = pieces + r * 2 * s.conv->out;
    net.plan.element() == 2 ? VAEOPS_DISPATCH(sum_rows<bf16>)(rows, sums)
                            : VAEOPS_DISPATCH(sum_rows<float>)(rows, sums);
  });
}

// x: what the next convolution reads of images [first, first + n), in the kernels' elements; null: the taps alone.
void norm_images(const Steps& net, const Step& s, float* const* map, int64_t first, int64_t n, void* x,
                 ParallelFor inner) {
  parallel_for(inner, s.row_pairs(n), [&](int64_t i) {
    const Place at(s, s.row_pairs(first) + i), here(s, i);
    NormForward rows{};
    set_rows(net, s, at, rows);
    rows.before = tap_of(map, s.conv->before, at.full);
    rows.after = tap_of(map, s.conv->after, at.full);
    if (s.pool != nullptr) rows.pooled = tap_of(map, s.pool->after, at.half);
    rows.x = advance(x, (s.pool != nullptr ? here.half : here.full) * net.plan.element());
    net.plan.element() == 2 ? VAEOPS_DISPATCH(norm_rows<bf16>)(rows) : VAEOPS_DISPATCH(norm_rows<float>)(rows);
  });
}

// The mean and 1 / sqrt(variance + eps) of `batch` images from their pieces.
void join_statistics(const Step& s, int64_t batch, double eps, const float* pieces) {
  const int64_t channels = s.conv->out, width = s.conv->width;
  const auto n = static_cast<double>(batch * s.conv->height * width);
  std::vector<double> mean(static_cast<size_t>(channels)), square(static_cast<size_t>(channels));
  const auto pixels = [&](int64_t r) { return static_cast<double>(Place(s, r).rows * width); };
  for (int64_t r = 0; r < s.row_pairs(batch); ++r) {
    const double share = pixels(r) / n;
    for (int64_t c = 0; c < channels; ++c) mean[c] += share * pieces[r * 2 * channels + c];
  }
  for (int64_t r = 0; r < s.row_pairs(batch); ++r) {
    const float* const own = pieces + r * 2 * channels;
    const double count = pixels(r);
    for (int64_t c = 0; c < channels; ++c) {
      const double apart = own[c] - mean[c];
      square[c] += own[channels + c] + count * apart * apart;
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    s.mean[c] = static_cast<float>(mean[c]);
    s.rstd[c] = static_cast<float>(1 / std::sqrt(square[c] / n + eps));
  }
}

// Gradients at v of images [first, first + n), given those at x (the batch's; null: none) and at the taps: their sums
// to `pieces`, or, where that is null, the gradient at the convolution's output to gx [n, h, w, K].
struct Gradient {
  const void* x;
  const float* const* grad;
  const float *shift, *slope;
};
void norm_images_backward(const Steps& net, const Step& s, const Gradient& g, int64_t first, int64_t n, float* pieces,
                          void* gx, ParallelFor inner) {
  const int64_t element = net.plan.element();
  parallel_for(inner, s.row_pairs(n), [&](int64_t i) {
    const int64_t r = s.row_pairs(first) + i;
    const Place at(s, r), here(s, i);
    NormBackward rows{};
    set_rows(net, s, at, rows);
    rows.x = advance(g.x, (s.pool != nullptr ? at.half : at.full) * element);
    rows.before = tap_of(g.grad, s.conv->before, at.full);
    rows.after = tap_of(g.grad, s.conv->after, at.full);
    if (s.pool != nullptr) rows.pooled = tap_of(g.grad, s.pool->after, at.half);
    if (pieces != nullptr) {
      rows.sums = pieces + r * 2 * s.conv->out;
      element == 2 ? VAEOPS_DISPATCH(norm_rows_backward<bf16, true>)(rows)
                   : VAEOPS_DISPATCH(norm_rows_backward<float, true>)(rows);
    } else {
      rows.shift = g.shift;
      rows.slope = g.slope;
      rows.gx = advance(gx, here.full * element);
      element == 2 ? VAEOPS_DISPATCH(norm_rows_backward<bf16, false>)(rows)
                   : VAEOPS_DISPATCH(norm_rows_backward<float, false>)(rows);
    }
  });
}

// What the batch's statistics take from each gradient: shift + slope (y - mean).
void join_gradients(const Step& s, int64_t batch, const float* pieces, std::vector<float>& shift,
                    std::vector<float>& slope) {
  const int64_t channels = s.conv->out;
  std::vector<double> sums(static_cast<size_t>(2 * channels));
  for (int64_t r = 0; r < s.row_pairs(batch); ++r) {
    for (int64_t c = 0; c < 2 * channels; ++c) sums[c] += pieces[r * 2 * channels + c];
  }
  const auto n = static_cast<double>(batch * s.conv->height * s.conv->width);
  shift.resize(static_cast<size_t>(channels));
  slope.resize(static_cast<size_t>(channels));
  for (int64_t c = 0; c < channels; ++c) {
    const double rstd = s.rstd[c];
    shift[c] = static_cast<float>(sums[c] / n);
    slope[c] = static_cast<float>(rstd * rstd * sums[channels + c] / n);
  }
}

std::vector<float> pieces_of(const Steps& net, int64_t batch) {
  int64_t most = 0;
  for (int32_t i = 0; i < net.count; ++i) {
    most = std::max(most, 2 * net.step[i].row_pairs(batch) * net.step[i].conv->out);
  }
  return std::vector<float>(static_cast<size_t>(most));
}

}  // namespace

void vgg_batchnorm_features(const VggBatchNormFeatures& call, ParallelFor parallel) {
  if (call.batch == 0) return;
  Steps net(call);
  const int64_t element = net.plan.element(), most = aligned(call.batch * net.plan.most_map * element);
  const bool keeps = net.step[0].y != nullptr;
  Scratch maps(keeps ? 0 : 2 * most);
  char* const map[2] = {keeps ? nullptr : maps.take(most), keeps ? nullptr : maps.take(most)};
  std::vector<float> pieces = pieces_of(net, call.batch);
  for (int32_t i = 0; i < net.count; ++i) {
    Step& s = net.step[i];
    const TrunkLayer& l = *s.conv;
    if (!keeps) s.y = map[i % 2];
    const Chunks chunks = net.chunks(s, call.batch, parallel);
    const int64_t pixels = l.height * l.width, conv_bytes = aligned(chunks.slots * net.scratch_bytes(s));
    const int64_t bytes = conv_bytes + (i > 0 ? aligned(chunks.images * pixels * l.in * element) : 0);
    for_each_chunk(chunks, call.batch, bytes, parallel,
                   [&](int64_t first, int64_t n, Scratch& scratch, ParallelFor inner) {
                     const ConvScratch work{scratch.take(conv_bytes), chunks.slots};
                     ConvForward conv = l.forward_call(n);
                     conv.y = advance(static_cast<char*>(s.y), first * pixels * l.out * element);
                     if (i == 0) {
                       conv_first(net.plan.algorithm, call.image, first, conv, work, inner);
                     } else {
                       char* const x = scratch.take(n * pixels * l.in * element);
                       norm_images(net, net.step[i - 1], call.map, first, n, x, inner);
                       conv.x = x;
                       conv_forward(net.plan.algorithm, conv, work, inner);
                     }
                     sum_images(net, s, first, n, pieces.data(), inner);
                   });
    join_statistics(s, call.batch, call.eps, pieces.data());
  }
  norm_images(net, net.step[net.count - 1], call.map, 0, call.batch, nullptr, parallel);
}

void vgg_batchnorm_backward(const VggBatchNormBackward& call, ParallelFor parallel) {
  if (call.batch == 0) return;
  const Steps net(call);
  const TrunkPlan& plan = net.plan;
  const auto reached = [&](int32_t tap) { return tap >= 0 && call.grad[tap] != nullptr; };
  int32_t top = net.count - 1;
  for (; top >= 0; --top) {
    const Step& s = net.step[top];
    if (reached(s.conv->before) || reached(s.conv->after) || (s.pool != nullptr && reached(s.pool->after))) break;
  }
  const int64_t image = 3 * call.height * call.width * bytes_of(call.gx_dtype);
  char* const gx = static_cast<char*>(call.gx);
  if (top < 0) {
    std::fill_n(gx, call.batch * image, char{0});
    return;
  }
  const int64_t element = plan.element();
  int64_t most = 0;
  for (int32_t i = 1; i <= top; ++i) {
    const TrunkLayer& l = *net.step[i].conv;
    most = std::max(most, aligned(call.batch * l.height * l.width * l.in * element));
  }
  Scratch maps(2 * most);
  char* const map[2] = {maps.take(most), maps.take(most)};
  std::vector<float> pieces = pieces_of(net, call.batch), shift, slope;
  Gradient g{nullptr, call.grad, nullptr, nullptr};
  norm_images_backward(net, net.step[top], g, 0, call.batch, pieces.data(), nullptr, parallel);
  for (int32_t i = top; i >= 0; --i) {
    const Step& s = net.step[i];
    const TrunkLayer& l = *s.conv;
    join_gradients(s, call.batch, pieces.data(), shift, slope);
    g.shift = shift.data();
    g.slope = slope.data();
    const Gradient below{map[i % 2], call.grad, nullptr, nullptr};
    const Chunks chunks = net.chunks(s, call.batch, parallel);
    const int64_t pixels = l.height * l.width, conv_bytes = aligned(chunks.slots * net.scratch_bytes(s));
    const int64_t bytes = conv_bytes + aligned(chunks.images * pixels * l.out * element);
    for_each_chunk(
        chunks, call.batch, bytes, parallel, [&](int64_t first, int64_t n, Scratch& scratch, ParallelFor inner) {
          const ConvScratch work{scratch.take(conv_bytes), chunks.slots};
          char* const at_output = scratch.take(n * pixels * l.out * element);
          norm_images_backward(net, s, g, first, n, nullptr, at_output, inner);
          ConvBackward conv = l.backward_call(n);
          conv.g = at_output;
          if (i == 0) {
            conv_first_backward(plan.algorithm, conv, call.rstd, gx + first * image, call.gx_dtype, work, inner);
            return;
          }
          conv.gx = map[i % 2] + first * pixels * l.in * element;
          conv_backward(plan.algorithm, conv, work, inner);
          norm_images_backward(net, net.step[i - 1], below, first, n, pieces.data(), nullptr, inner);
        });
    g = below;
  }
}

}  // namespace vaeops::cpu
