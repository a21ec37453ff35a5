// Distances between maps on a CPU: of the trunk's taps (perceptual.cpp) and of given maps. Specification:
// vaeops/ref/perceptual.py. Sums run over pieces of a fixed size, which are added in order and in fp64.
#include "cpu/vgg_heads.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "cpu/strided.h"
#include "cpu/vq_rows.h"

#define VAEOPS_KERNELS "cpu/vgg_heads_kernels.h"
#include "cpu/foreach_isa.h"
#undef VAEOPS_KERNELS

namespace vaeops::cpu {
namespace {

template <class T>
T* at(const MapView& map, int64_t image, int64_t y, int64_t x) {
  return map.data == nullptr
             ? nullptr
             : static_cast<T*>(map.data) + image * map.stride[0] + y * map.stride[2] + x * map.stride[3];
}

bool channels_last(const MapView& map, int64_t channels) {
  return map.data == nullptr || map.stride[1] == 1 || channels == 1;
}

// Elements [c, h, w] of an image lie one after the other, in the same order in both maps.
bool same_dense(const DistanceRun& run, const MapView& x, const MapView& y) {
  if (y.data == nullptr) return true;
  const int64_t size[3] = {run.channels, run.height, run.width}, orders[2][3] = {{1, 2, 0}, {0, 1, 2}};
  for (const auto& order : orders) {
    int64_t step = 1;
    bool fits = true;
    for (int i = 2; i >= 0; --i) {
      const int d = order[i];
      fits = fits && (size[d] == 1 || (x.stride[d + 1] == step && y.stride[d + 1] == step));
      step *= size[d];
    }
    if (fits) return true;
  }
  return false;
}

// Pixels [first, first + n) of an image, of a map whose rows of pixels may lie apart: run(y, x, position, count).
template <class Run>
void for_each_stretch(int64_t width, int64_t first, int64_t n, const Run& run) {
  for (int64_t position = 0; position < n;) {
    const int64_t y = (first + position) / width, x = (first + position) % width;
    const int64_t count = std::min(n - position, width - x);
    run(y, x, position, count);
    position += count;
  }
}

// The pixels as rows of S.
template <class S>
void read_pixels(const MapView& map, int64_t channels, int64_t width, int64_t image, int64_t first, int64_t n, S* to) {
  with_dtype(map.dtype, [&](auto type) {
    using T = decltype(type);
    for_each_stretch(width, first, n, [&](int64_t y, int64_t x, int64_t position, int64_t count) {
      VAEOPS_DISPATCH(load_rows<T, S>)
      (at<T>(map, image, y, x), map.stride[3], map.stride[1], count, channels, to + position * channels);
    });
  });
}
template <class S>
void write_pixels(const MapView& map, int64_t channels, int64_t width, int64_t image, int64_t first, int64_t n,
                  const S* from) {
  if (map.data == nullptr) return;
  with_dtype(map.dtype, [&](auto type) {
    using T = decltype(type);
    for_each_stretch(width, first, n, [&](int64_t y, int64_t x, int64_t position, int64_t count) {
      VAEOPS_DISPATCH(store_rows<S, T>)
      (from + position * channels, count, channels, at<T>(map, image, y, x), map.stride[3], map.stride[1]);
    });
  });
}

// A run whose maps are one image after the other of evenly spaced pixels, or of one long row. Else `merged` is false.
struct Plan {
  DistanceRun run;
  bool flat = false;      // every element by itself: one pixel of channels * height * width channels
  bool in_place = false;  // channels are next to each other in all maps
  int64_t pixels, piece;  // of an image; pixels of a task (flat: elements)
};

Plan plan_of(const DistanceRun& run) {
  Plan plan;
  plan.run = run;
  const bool elements = run.kind != Distance::lpips && run.kind != Distance::gram && !run.spatial;
  plan.flat =
      elements && same_dense(run, run.a, run.b) && same_dense(run, run.a, run.ga) && same_dense(run, run.a, run.gb);
  plan.in_place = channels_last(run.a, run.channels) && channels_last(run.b, run.channels) &&
                  channels_last(run.ga, run.channels) && channels_last(run.gb, run.channels);
  plan.pixels = run.height * run.width;
  plan.piece = std::max<int64_t>(1, kChunk / std::max<int64_t>(1, run.channels));
  // Rows of pixels that follow each other are one row.
  const MapView* const maps[] = {&run.a, &run.b, &run.ga, &run.gb};
  bool even = true;
  for (const MapView* map : maps) {
    even = even && (map->data == nullptr || run.height == 1 || map->stride[2] == run.width * map->stride[3]);
  }
  if (even) {
    plan.run.width = plan.pixels;
    plan.run.height = 1;
  }
  if (plan.flat) {
    plan.pixels = run.channels * plan.pixels;
    plan.piece = kChunk;
  }
  return plan;
}

template <class S>
struct Factors {
  const S* scale;
  int64_t step;
};
// The gradient's factor of each pixel of image i; `one` where there is none.
template <class S>
Factors<S> factors_of(const DistanceRun& run, int64_t image, int64_t first, const S* one) {
  if (run.g == nullptr) return {one, 0};
  const S* const g = static_cast<const S*>(run.g);
  return run.spatial ? Factors<S>{g + image * run.height * run.width + first, 1} : Factors<S>{g + image, 0};
}

// What the reduction divides by.
double norm_of(const DistanceRun& run, int64_t pixels) {
  if (!run.mean) return 1;
  const double channels = static_cast<double>(run.channels), all = static_cast<double>(pixels);
  if (run.kind == Distance::gram) return 1 / (channels * channels);
  if (run.kind == Distance::lpips) return run.spatial ? 1 : 1 / all;
  return run.spatial ? 1 / channels : 1 / (channels * all);
}

// One task: pixels [first, first + n) of an image; returns the sum of their distances.
template <class T, class U, class S>
double piece_of(const Plan& plan, int64_t image, int64_t first, int64_t n, double norm) {
  const DistanceRun& run = plan.run;
  const S one = 1;
  DistanceTile<T, U, S> tile{};
  tile.lin = static_cast<const S*>(run.lin);
  tile.factor = static_cast<S>(run.weight * norm);
  tile.add = run.add;
  tile.relu = run.relu;
  if (plan.flat) {
    const Factors<S> factors = factors_of(run, image, 0, &one);
    tile.pixels = 1;
    tile.channels = n;
    tile.a = at<T>(run.a, image, 0, 0) + first;
    tile.b = at<U>(run.b, image, 0, 0) + first;
    tile.ga = run.ga.data == nullptr ? nullptr : at<T>(run.ga, image, 0, 0) + first;
    tile.gb = run.gb.data == nullptr ? nullptr : at<U>(run.gb, image, 0, 0) + first;
    tile.scale = factors.scale;
    return VAEOPS_DISPATCH(distance_tile<T, U, S>)(run.kind, tile);
  }
  double sum = 0;
  tile.channels = run.channels;
  const auto compute = [&](int64_t position, int64_t count) {
    const Factors<S> factors = factors_of(run, image, first + position, &one);
    tile.pixels = count;
    tile.scale = factors.scale;
    tile.scale_step = factors.step;
    S* const each =
        run.spatial && run.out != nullptr ? static_cast<S*>(run.out) + image * plan.pixels + first + position : nullptr;
    tile.each = each;
    sum += VAEOPS_DISPATCH(distance_tile<T, U, S>)(run.kind, tile);
    for (int64_t i = 0; each != nullptr && i < count; ++i) each[i] = static_cast<S>(each[i] * norm);
  };
  if (plan.in_place) {
    tile.a_step = run.a.stride[3];
    tile.b_step = run.b.stride[3];
    tile.ga_step = run.ga.stride[3];
    tile.gb_step = run.gb.stride[3];
    for_each_stretch(run.width, first, n, [&](int64_t y, int64_t x, int64_t position, int64_t count) {
      tile.a = at<T>(run.a, image, y, x);
      tile.b = at<U>(run.b, image, y, x);
      tile.ga = at<T>(run.ga, image, y, x);
      tile.gb = at<U>(run.gb, image, y, x);
      compute(position, count);
    });
    return sum;
  }
  if constexpr (std::is_same_v<T, S> && std::is_same_v<U, S>) {
    const int64_t most = std::min(n, rows_in_buffer(run.channels)), size = most * run.channels;
    const auto a = buffer_of<S>(size), b = buffer_of<S>(size);
    const auto ga = buffer_of<S>(run.ga.data != nullptr ? size : 0),
               gb = buffer_of<S>(run.gb.data != nullptr ? size : 0);
    tile.a = a.get();
    tile.b = b.get();
    tile.ga = run.ga.data != nullptr ? ga.get() : nullptr;
    tile.gb = run.gb.data != nullptr ? gb.get() : nullptr;
    tile.a_step = tile.b_step = tile.ga_step = tile.gb_step = run.channels;
    for (int64_t position = 0; position < n; position += most) {
      const int64_t count = std::min(most, n - position);
      read_pixels(run.a, run.channels, run.width, image, first + position, count, a.get());
      read_pixels(run.b, run.channels, run.width, image, first + position, count, b.get());
      compute(position, count);
      write_pixels(run.ga, run.channels, run.width, image, first + position, count, ga.get());
      write_pixels(run.gb, run.channels, run.width, image, first + position, count, gb.get());
    }
  }
  return sum;
}

template <class T, class U, class S>
void distance_typed(const Plan& plan, ParallelFor parallel) {
  const DistanceRun& run = plan.run;
  const double norm = norm_of(run, run.height * run.width);
  const int64_t pieces = ceil_div(plan.pixels, plan.piece);
  std::vector<double> partial(static_cast<size_t>(run.images * pieces));
  const bool small = run.images * run.channels * run.height * run.width <= kSerial;
  parallel_for(small ? serial : parallel, run.images * pieces, [&](int64_t task) {
    const int64_t image = task / pieces, first = task % pieces * plan.piece;
    partial[task] = piece_of<T, U, S>(plan, image, first, std::min(plan.piece, plan.pixels - first), norm);
  });
  if (run.out == nullptr || run.spatial) return;
  for (int64_t image = 0; image < run.images; ++image) {
    double sum = 0;
    for (int64_t i = 0; i < pieces; ++i) sum += partial[image * pieces + i];
    static_cast<S*>(run.out)[image] = static_cast<S>(sum * norm);
  }
}

constexpr int64_t kGramPixels = 64;  // summed in fp32 before they are added to the matrix in fp64
constexpr int64_t kGramRows = 32;    // of the matrix, a task

// The two Gram matrices' difference, then its product with the maps.
template <class S>
void gram_typed(const Plan& plan, ParallelFor parallel) {
  const DistanceRun& run = plan.run;
  const int64_t channels = run.channels, panels = ceil_div(channels, kGramRows);
  const double scale = 1 / (static_cast<double>(channels) * static_cast<double>(plan.pixels));
  const double norm = norm_of(run, plan.pixels);
  const bool wants_gradient = run.ga.data != nullptr || run.gb.data != nullptr;
  const auto difference = buffer_of<S>(channels * channels);
  std::vector<double> partial(static_cast<size_t>(panels));
  for (int64_t image = 0; image < run.images; ++image) {
    parallel_for(parallel, panels, [&](int64_t panel) {
      const int64_t first = panel * kGramRows, rows = std::min(kGramRows, channels - first);
      const auto pixels = buffer_of<S>(kGramPixels * channels);
      std::vector<double> gram[2];
      for (int side = 0; side < 2; ++side) {
        gram[side].assign(static_cast<size_t>(rows * channels), 0.0);
        for (int64_t p = 0; p < plan.pixels; p += kGramPixels) {
          const int64_t n = std::min(kGramPixels, plan.pixels - p);
          read_pixels(side == 0 ? run.a : run.b, channels, run.width, image, p, n, pixels.get());
          VAEOPS_DISPATCH(gram_rows<S>)(pixels.get(), n, channels, first, rows, gram[side].data());
        }
      }
      double sum = 0;
      for (int64_t i = 0; i < rows * channels; ++i) {
        const double d = (gram[0][i] - gram[1][i]) * scale;
        sum += d * d;
        difference[first * channels + i] = static_cast<S>(d);
      }
      partial[panel] = sum;
    });
    if (run.out != nullptr) {
      double sum = 0;
      for (double p : partial) sum += p;
      static_cast<S*>(run.out)[image] = static_cast<S>(sum * norm);
    }
    if (!wants_gradient) continue;
    const S one = 1;
    const double factor = 4 * scale * norm * run.weight * static_cast<double>(*factors_of(run, image, 0, &one).scale);
    parallel_for(parallel, ceil_div(plan.pixels, kGramPixels), [&](int64_t task) {
      const int64_t first = task * kGramPixels, n = std::min(kGramPixels, plan.pixels - first);
      const auto pixels = buffer_of<S>(n * channels), gradient = buffer_of<S>(n * channels);
      DistanceTile<S, S, S> tile{};
      tile.pixels = n;
      tile.channels = tile.ga_step = channels;
      tile.ga = gradient.get();
      for (int side = 0; side < 2; ++side) {
        const MapView& out = side == 0 ? run.ga : run.gb;
        if (out.data == nullptr) continue;
        tile.add = side == 0 && run.add;
        tile.relu = side == 0 && run.relu;
        if (tile.add) read_pixels(out, channels, run.width, image, first, n, gradient.get());
        read_pixels(side == 0 ? run.a : run.b, channels, run.width, image, first, n, pixels.get());
        VAEOPS_DISPATCH(gram_gradient<S, S>)
        (pixels.get(), difference.get(), static_cast<S>(side == 0 ? factor : -factor), tile);
        write_pixels(out, channels, run.width, image, first, n, gradient.get());
      }
    });
  }
}

template <class Call>
DistanceRun run_of(const Call& call) {
  DistanceRun run{};
  run.kind = call.kind;
  run.images = call.batch;
  run.channels = call.channels;
  run.height = call.height;
  run.width = call.width;
  run.lin = call.lin;
  run.mean = call.mean;
  run.spatial = call.spatial;
  const auto view = [&](MapView& map, const void* data, const int64_t* stride) {
    map.data = const_cast<void*>(data);
    map.dtype = call.dtype;
    std::copy(stride, stride + 4, map.stride);
  };
  view(run.a, call.a, call.a_stride);
  view(run.b, call.b, call.b_stride);
  if constexpr (std::is_same_v<Call, FeatureDistanceBackward>) {
    view(run.ga, call.ga, call.ga_stride);
    view(run.gb, call.gb, call.gb_stride);
    run.g = call.grad;
  } else {
    run.out = call.out;
  }
  return run;
}

}  // namespace

void distance(const DistanceRun& run, ParallelFor parallel) {
  const Plan plan = plan_of(run);
  const Dtype a = run.a.dtype, b = run.b.dtype;
  if (run.images == 0) return;
  if (run.kind == Distance::gram)
    return a == Dtype::f64 ? gram_typed<double>(plan, parallel) : gram_typed<float>(plan, parallel);
  if (a == Dtype::f64) return distance_typed<double, double, double>(plan, parallel);
  if (!plan.flat && !plan.in_place) return distance_typed<float, float, float>(plan, parallel);
  if (a == Dtype::f16) return distance_typed<f16, f16, float>(plan, parallel);
  if (a == Dtype::bf16) {
    return b == Dtype::bf16 ? distance_typed<bf16, bf16, float>(plan, parallel)
                            : distance_typed<bf16, float, float>(plan, parallel);
  }
  return b == Dtype::bf16 ? distance_typed<float, bf16, float>(plan, parallel)
                          : distance_typed<float, float, float>(plan, parallel);
}

void feature_distance_forward(const FeatureDistanceForward& call, ParallelFor parallel) {
  distance(run_of(call), parallel);
}

void feature_distance_backward(const FeatureDistanceBackward& call, ParallelFor parallel) {
  distance(run_of(call), parallel);
}

}  // namespace vaeops::cpu
