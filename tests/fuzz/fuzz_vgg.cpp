// The trunk's program in C++: any bytes are a trunk, images and a loss. No instruction set, order of tasks or company
// in a batch changes a bit, and what finite images give is finite.
#include <cstdlib>

#include "vgg_case.h"

namespace vaeops::test {
namespace {

struct Bytes {
  const uint8_t* data;
  size_t size;
  int next(int choices) {
    if (size == 0) return 0;
    --size;
    return *data++ % choices;
  }
};

struct Sizes3 {
  int64_t h, w, c;
};

std::vector<Sizes3> maps_of(const Trunk& trunk, int64_t height, int64_t width) {
  std::vector<Sizes3> maps;
  int64_t channels = 3;
  for (size_t i = 0; i < trunk.layers.size(); ++i) {
    if (trunk.layers[i] == 0) {
      height /= 2;
      width /= 2;
    } else {
      channels = trunk.layers[i];
    }
    for (int32_t tap : trunk.taps) {
      if (tap / 2 == static_cast<int32_t>(i)) maps.push_back({height, width, channels});
    }
  }
  return maps;
}

Trunk random_trunk(Bytes& bytes, int64_t& smallest) {
  std::vector<int64_t> layers{16 * (1 + bytes.next(3))};
  const int more = bytes.next(5);
  smallest = 1;
  for (int i = 0; i < more; ++i) {
    layers.push_back(16 * bytes.next(4));
    if (layers.back() == 0) smallest *= 2;
  }
  std::vector<int32_t> taps;
  for (size_t i = 0; i < layers.size(); ++i) {
    const int32_t layer = static_cast<int32_t>(i);
    const int which = bytes.next(4);
    const bool last = i + 1 == layers.size();
    if (layers[i] != 0 && (which & 1) != 0) taps.push_back(2 * layer);
    if ((which & 2) != 0 || (last && (taps.empty() || taps.back() != 2 * layer))) taps.push_back(2 * layer + 1);
  }
  return {layers, taps, static_cast<uint64_t>(bytes.next(256))};
}

struct Results {
  std::vector<float> losses, gx;
  std::vector<uint8_t> saved;
  std::vector<std::vector<float>> maps;
  std::vector<float> features_gx;
  bool operator==(const Results&) const = default;
};

void run(const VggTrunk& trunk, const std::vector<Sizes3>& sizes, const Images& x, const Images& y,
         PerceptualForward call, bool cached, int64_t first, int64_t n, ParallelFor parallel, Results& out) {
  const auto images = [&](const Images& from) {
    VggImage image = from.image;
    const int64_t element = image.uint8 ? 1 : bytes_of(image.dtype);
    image.data = static_cast<const char*>(image.data) + first * image.stride[0] * element;
    return image;
  };
  const size_t pixels = static_cast<size_t>(n * 3 * x.height * x.width);
  VggFeatures features{};
  VggFeaturesBackward back{};
  features.trunk = back.trunk = call.trunk = trunk;
  features.batch = back.batch = call.batch = n;
  features.height = back.height = call.height = x.height;
  features.width = back.width = call.width = x.width;
  out.maps.clear();
  // bf16 maps take half of the memory.
  for (const Sizes3& s : sizes) out.maps.emplace_back(static_cast<size_t>(n * s.h * s.w * s.c), 0.0f);
  for (size_t t = 0; t < sizes.size(); ++t) features.map[t] = out.maps[t].data();
  if (cached) {
    features.image = images(y);
    cpu::vgg_features(features, parallel);
    call.target_map_dtype = trunk.algorithm == VggAlgorithm::bf16 ? Dtype::bf16 : Dtype::f32;
    std::copy(features.map, features.map + sizes.size(), call.target_map);
  } else {
    call.target = images(y);
  }
  call.image = images(x);
  out.losses.assign(static_cast<size_t>(call.heads * n), NAN);
  out.gx.assign(pixels, NAN);
  call.losses = out.losses.data();
  call.gx = out.gx.data();
  cpu::perceptual_forward(call, parallel);

  features.image = images(x);
  out.saved.assign(static_cast<size_t>(cpu::vgg_saved_bytes(trunk, n, x.height, x.width)), 0xAA);
  features.saved = out.saved.data();
  cpu::vgg_features(features, parallel);
  out.features_gx.assign(pixels, NAN);
  for (size_t t = 0; t < sizes.size(); ++t) back.grad[t] = t % 3 == 1 ? nullptr : out.maps[t].data();
  back.saved = out.saved.data();
  std::copy(x.image.rstd, x.image.rstd + 3, back.rstd);
  back.gx = out.features_gx.data();
  cpu::vgg_features_backward(back, parallel);
}

void check(Bytes bytes) {
  int64_t smallest = 1;
  Trunk weights = random_trunk(bytes, smallest);
  const int64_t n = 1 + bytes.next(3), h = smallest + bytes.next(12), w = smallest + bytes.next(12);
  const auto algorithm = static_cast<VggAlgorithm>(bytes.next(3));
  const auto images = [&](bool gradient) {
    const auto dtype = static_cast<Dtype>(bytes.next(3));
    return Images(n, h, w, static_cast<uint64_t>(bytes.next(256)), dtype, !gradient && bytes.next(2) != 0);
  };
  const Images x = images(true), y = images(false);
  const std::vector<Sizes3> sizes = maps_of(weights, h, w);
  const std::vector<float> lin(64, 0.5f);
  PerceptualForward call{};
  call.heads = 1 + bytes.next(4);
  for (int i = 0; i < call.heads; ++i) {
    VggHead& head = call.head[i];
    head.tap = bytes.next(static_cast<int>(sizes.size()));
    head.kind = static_cast<Distance>(bytes.next(5));
    head.weight = 0.25f * static_cast<float>(bytes.next(8) - 2);
    head.lin = head.kind == Distance::lpips ? lin.data() : nullptr;
  }
  call.mean = bytes.next(2) != 0;
  const bool cached = bytes.next(2) != 0;
  for (int isa = 0; isa <= static_cast<int>(cpu::best_isa()); ++isa) {
    cpu::set_isa(static_cast<cpu::Isa>(isa));
    const VggTrunk trunk = weights.pack(algorithm);
    Results all, other, one;
    run(trunk, sizes, x, y, call, cached, 0, n, serially, all);
    run(trunk, sizes, x, y, call, cached, 0, n, backwards, other);
    CHECK(all == other, "the order of tasks, instruction set %d", isa);
    run(trunk, sizes, x, y, call, cached, n - 1, 1, serially, one);
    CHECK(std::equal(one.gx.begin(), one.gx.end(), all.gx.end() - static_cast<std::ptrdiff_t>(one.gx.size())),
          "an image alone, instruction set %d", isa);
    for (const auto* values : {&all.losses, &all.gx, &all.features_gx}) {
      for (float v : *values) CHECK(std::isfinite(v), "instruction set %d", isa);
    }
  }
  cpu::set_isa(cpu::best_isa());
}

}  // namespace
}  // namespace vaeops::test

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  vaeops::test::check({data, size});
  if (vaeops::test::failures > 0) std::abort();
  return 0;
}
