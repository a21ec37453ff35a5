// The trunk's program on every instruction set: features, their backward from masks and the perceptual loss against
// fp64, and what must not change a bit: chunks, threads, the other images of a batch.
#include "vgg_case.h"

namespace vaeops::test {
namespace {

using Floats = std::vector<float>;

Values wide(const Floats& x) { return Values(x.begin(), x.end()); }

struct Program {
  std::string name;
  std::vector<int64_t> layers;
  std::vector<int32_t> taps;
};

// Taps before and after a ReLU, at a pool, several on a layer; pools after each other; one layer.
const Program kPrograms[] = {
    {"two blocks", {16, 16, 0, 32, 32}, {3, 9}},
    {"every kind of tap", {16, 32, 0, 16, 0, 32}, {0, 1, 2, 3, 5, 6, 7, 9, 10, 11}},
    {"ends before a ReLU", {16, 16, 0, 16}, {1, 6}},
    {"ends with a pool", {16, 0, 32, 0}, {0, 3, 7}},
    {"two pools", {32, 0, 0, 16}, {3, 7}},
    {"one layer", {16}, {1}},
    {"one layer before its ReLU", {32}, {0}},
};

struct Features {
  std::vector<Floats> maps;
  std::vector<uint8_t> saved;
};

Features features(const VggTrunk& trunk, const Trunk& weights, const Images& x, int64_t first, int64_t n, bool keep,
                  ParallelFor parallel) {
  Features out;
  VggFeatures call{};
  call.trunk = trunk;
  call.image = x.image;
  if (first > 0) {
    const int64_t bytes = x.image.uint8 ? 1 : bytes_of(x.image.dtype);
    call.image.data = static_cast<const char*>(x.image.data) + first * x.image.stride[0] * bytes;
  }
  call.batch = n;
  call.height = x.height;
  call.width = x.width;
  for (const Map& m : weights.shapes(x.height, x.width))
    out.maps.emplace_back(static_cast<size_t>(n * m.h * m.w * m.channels), NAN);
  std::vector<std::vector<uint16_t>> halves;
  const bool half = trunk.algorithm == VggAlgorithm::bf16;
  for (size_t t = 0; t < out.maps.size(); ++t) {
    halves.emplace_back(half ? out.maps[t].size() : 0, 0xFFFF);
    call.map[t] = half ? static_cast<void*>(halves[t].data()) : out.maps[t].data();
  }
  if (keep) {
    out.saved.assign(static_cast<size_t>(cpu::vgg_saved_bytes(trunk, n, x.height, x.width)), 0xAA);
    call.saved = out.saved.data();
  }
  cpu::vgg_features(call, parallel);
  for (size_t t = 0; half && t < out.maps.size(); ++t) {
    for (size_t i = 0; i < out.maps[t].size(); ++i) {
      out.maps[t][i] = static_cast<float>(read(reinterpret_cast<const char*>(&halves[t][i]), Dtype::bf16));
    }
  }
  return out;
}

Floats features_backward(const VggTrunk& trunk, const Images& x, const std::vector<Floats>& grads,
                         const std::vector<uint8_t>& saved, ParallelFor parallel) {
  Floats gx(static_cast<size_t>(x.n * 3 * x.height * x.width), NAN);
  VggFeaturesBackward call{};
  call.trunk = trunk;
  call.batch = x.n;
  call.height = x.height;
  call.width = x.width;
  std::vector<std::vector<uint16_t>> halves;
  for (size_t t = 0; t < grads.size(); ++t) {
    call.grad[t] = grads[t].empty() ? nullptr : grads[t].data();
    if (trunk.algorithm != VggAlgorithm::bf16 || grads[t].empty()) continue;
    halves.emplace_back(grads[t].size());
    for (size_t i = 0; i < grads[t].size(); ++i) {
      write(reinterpret_cast<char*>(&halves.back()[i]), Dtype::bf16, grads[t][i]);
    }
    call.grad[t] = halves.back().data();
  }
  call.saved = saved.data();
  std::copy(x.image.rstd, x.image.rstd + 3, call.rstd);
  call.gx = gx.data();
  call.gx_dtype = Dtype::f32;
  cpu::vgg_features_backward(call, parallel);
  return gx;
}

// [n, h, w, 3] of the normalised image to [n, 3, h, w] of the image.
Values image_gradient(const Map& g, const Images& x) {
  Values out(g.at.size());
  const int64_t pixels = x.height * x.width;
  for (int64_t i = 0; i < static_cast<int64_t>(out.size()); ++i) {
    const int64_t b = i / (3 * pixels), c = i / pixels % 3;
    out[i] = g.at[(b * pixels + i % pixels) * 3 + c] * static_cast<double>(x.image.rstd[c]);
  }
  return out;
}

double tolerance(VggAlgorithm algorithm) { return algorithm == VggAlgorithm::bf16 ? 3e-2 : 1e-5; }

std::vector<Floats> random_gradients(const Features& like, uint64_t seed) {
  Random random(seed);
  std::normal_distribution<float> normal;
  std::vector<Floats> grads = like.maps;
  for (Floats& g : grads) {
    for (float& v : g) v = normal(random);
  }
  return grads;
}

void check_features(const Program& program, int64_t n, int64_t h, int64_t w, VggAlgorithm algorithm,
                    const std::string& isa, Dtype dtype = Dtype::f32, bool uint8 = false) {
  Trunk weights(program.layers, program.taps);
  const VggTrunk trunk = weights.pack(algorithm);
  const Images x(n, h, w, 3, dtype, uint8);
  const std::string name = program.name + " " + std::to_string(h) + "x" + std::to_string(w) + ", algorithm " +
                           std::to_string(static_cast<int>(algorithm)) + ", " + isa;
  const std::vector<Map> expected = weights.maps(x.normalized, n);
  const Features got = features(trunk, weights, x, 0, n, true, serially);
  const Features bare = features(trunk, weights, x, 0, n, false, backwards);
  for (size_t t = 0; t < expected.size(); ++t) {
    const double wrong = error(wide(got.maps[t]), expected[t].at);
    CHECK(wrong <= tolerance(algorithm), "%s: tap %d is off by %g", name.c_str(), static_cast<int>(t), wrong);
    CHECK(bare.maps[t] == got.maps[t], "%s: tap %d without masks", name.c_str(), static_cast<int>(t));
  }
  std::vector<Floats> grads = random_gradients(got, 5);
  for (const bool all : {true, false}) {
    if (!all) grads.back().clear();  // no gradient reaches the last tap
    std::vector<Values> wanted;
    for (const Floats& g : grads) wanted.push_back(wide(g));
    const Values reference = image_gradient(weights.backward(n, h, w, wanted, got.saved.data()), x);
    const double wrong = error(wide(features_backward(trunk, x, grads, got.saved, serially)), reference);
    CHECK(wrong <= tolerance(algorithm), "%s: gradient is off by %g", name.c_str(), wrong);
  }
}

void test_features() {
  for_each_isa([](const std::string& isa) {
    for (const Program& program : kPrograms) {
      for (VggAlgorithm algorithm : {VggAlgorithm::winograd, VggAlgorithm::direct, VggAlgorithm::bf16}) {
        check_features(program, 2, 13, 10, algorithm, isa);
      }
      check_features(program, 1, 4, 7, VggAlgorithm::winograd, isa);
      check_features(program, 1, 8, 16, VggAlgorithm::direct, isa, Dtype::bf16);
      check_features(program, 1, 9, 12, VggAlgorithm::winograd, isa, Dtype::f16);
      check_features(program, 2, 12, 5, VggAlgorithm::winograd, isa, Dtype::f32, true);
    }
    check_features(kPrograms[5], 2, 1, 1, VggAlgorithm::winograd, isa);
    check_features(kPrograms[5], 1, 1, 9, VggAlgorithm::direct, isa);
  });
}

// Every mask is the sign of its value in fp64, but for values that rounding may turn over.
void test_masks() {
  Trunk weights({16, 16, 0, 32, 32}, {9});
  const Images x(1, 12, 12, 4);
  std::vector<Map> after, before;
  weights.forward(x.normalized, 1, after, before);
  for_each_isa([&](const std::string& isa) {
    const Features got = features(weights.pack(VggAlgorithm::winograd), weights, x, 0, 1, true, serially);
    int64_t at = 0, wrong = 0;
    for (size_t i = 0; i < before.size(); ++i) {
      const Values& values = before[i].at;
      for (size_t j = 0; j < values.size(); ++j) {
        const bool bit = (got.saved[at + static_cast<int64_t>(j / 8)] >> (j % 8) & 1) != 0;
        wrong += bit != (values[j] > 0) && std::fabs(values[j]) > 1e-5;
      }
      at += static_cast<int64_t>(after[i].at.size()) / (values.empty() ? 4 : 8);
    }
    CHECK(wrong == 0, "%lld masks, %s", static_cast<long long>(wrong), isa.c_str());
  });
}

struct Loss {
  Floats losses, gx;
};

struct Setting {
  std::vector<VggHead> heads;
  bool mean = true, cached = false, gradient = true;
  int64_t first = 0, n = -1;  // images of the batch
};

Loss perceptual(const VggTrunk& trunk, const Trunk& weights, const Images& x, const Images& y, const Setting& setting,
                ParallelFor parallel) {
  const int64_t n = setting.n < 0 ? x.n : setting.n;
  Loss loss;
  loss.losses.assign(setting.heads.size() * static_cast<size_t>(n), NAN);
  loss.gx.assign(static_cast<size_t>(setting.gradient ? n * 3 * x.height * x.width : 0), NAN);
  PerceptualForward call{};
  call.trunk = trunk;
  call.image = x.image;
  call.image.data = static_cast<const char*>(x.image.data) + setting.first * x.image.stride[0] * 4;
  Features maps;
  if (setting.cached) {
    maps = features(trunk, weights, y, setting.first, n, false, parallel);
    for (size_t t = 0; t < maps.maps.size(); ++t) call.target_map[t] = maps.maps[t].data();
  } else {
    call.target = y.image;
    call.target.data = static_cast<const char*>(y.image.data) + setting.first * y.image.stride[0] * 4;
  }
  call.batch = n;
  call.height = x.height;
  call.width = x.width;
  call.heads = static_cast<int32_t>(setting.heads.size());
  std::copy(setting.heads.begin(), setting.heads.end(), call.head);
  call.mean = setting.mean;
  call.losses = loss.losses.data();
  call.gx = setting.gradient ? loss.gx.data() : nullptr;
  cpu::perceptual_forward(call, parallel);
  return loss;
}

// In fp64 from given maps: losses, and the gradients at the taps.
Values reference_losses(const std::vector<Map>& a, const std::vector<Map>& b, int64_t n, const Setting& setting,
                        std::vector<Values>& grads) {
  Values losses;
  grads.assign(a.size(), {});
  for (const VggHead& head : setting.heads) {
    const Map& m = a[head.tap];
    FeatureDistance base{};
    base.a = a[head.tap].at.data();
    base.b = b[head.tap].at.data();
    base.dtype = Dtype::f64;
    const int64_t stride[4] = {m.h * m.w * m.channels, 1, m.w * m.channels, m.channels};
    std::copy(stride, stride + 4, base.a_stride);
    std::copy(stride, stride + 4, base.b_stride);
    base.batch = n;
    base.channels = m.channels;
    base.height = m.h;
    base.width = m.w;
    base.kind = head.kind;
    base.mean = setting.mean;
    Values lin;
    if (head.lin != nullptr) lin.assign(head.lin, head.lin + m.channels);
    base.lin = lin.data();
    Values out(static_cast<size_t>(n)), ga(m.at.size()), weight(static_cast<size_t>(n), head.weight);
    FeatureDistanceForward forward{};
    static_cast<FeatureDistance&>(forward) = base;
    forward.out = out.data();
    cpu::feature_distance_forward(forward, serially);
    losses.insert(losses.end(), out.begin(), out.end());
    FeatureDistanceBackward backward{};
    static_cast<FeatureDistance&>(backward) = base;
    backward.grad = weight.data();
    backward.ga = ga.data();
    std::copy(stride, stride + 4, backward.ga_stride);
    cpu::feature_distance_backward(backward, serially);
    Values& sum = grads[head.tap];
    sum.resize(ga.size());
    for (size_t i = 0; i < ga.size(); ++i) sum[i] += ga[i];
  }
  return losses;
}

constexpr Distance kKinds[] = {Distance::mse, Distance::l1, Distance::smooth_l1, Distance::lpips, Distance::gram};

// Each kind alone, then all of them on taps that they share.
std::vector<Setting> settings_of(const Program& program, const Floats& lin) {
  const int32_t last = static_cast<int32_t>(program.taps.size()) - 1;
  std::vector<Setting> settings;
  const auto head = [&](int32_t tap, Distance kind, float weight) {
    return VggHead{tap, kind, weight, kind == Distance::lpips ? lin.data() : nullptr};
  };
  Setting all;
  for (const Distance kind : kKinds) {
    const float weight = 0.5f + static_cast<float>(kind);
    settings.push_back({{head(last, kind, weight)}});
    all.heads.push_back(head(last, kind, weight));
    all.heads.push_back(head(0, kind, -0.3f * weight));
    if (last > 1) all.heads.push_back(head(last / 2, kind, weight));
  }
  settings.push_back(all);
  settings.back().mean = false;
  all.cached = true;
  settings.push_back(all);
  return settings;
}

void test_perceptual() {
  Random random(9);
  Floats lin(64);
  for (float& v : lin) v = std::uniform_real_distribution<float>(0, 1)(random);
  for_each_isa([&](const std::string& isa) {
    for (const Program& program : kPrograms) {
      Trunk weights(program.layers, program.taps);
      const VggTrunk trunk = weights.pack(VggAlgorithm::winograd);
      const Images x(2, 9, 14, 3), y(2, 9, 14, 4);
      const std::vector<Map> maps = weights.maps(x.normalized, 2), targets = weights.maps(y.normalized, 2);
      const Features kept = features(trunk, weights, x, 0, 2, true, serially);
      for (const Setting& setting : settings_of(program, lin)) {
        std::vector<Values> grads;
        const Values losses = reference_losses(maps, targets, 2, setting, grads);
        const Loss got = perceptual(trunk, weights, x, y, setting, serially);
        const std::string name = program.name + ", kind " + std::to_string(static_cast<int>(setting.heads[0].kind)) +
                                 " and " + std::to_string(setting.heads.size() - 1) + " more, " + isa;
        for (size_t i = 0; i < losses.size(); ++i) {
          CHECK(std::fabs(got.losses[i] - losses[i]) <= 4e-6 * std::fabs(losses[i]), "%s: loss %d is %.9g, not %.9g",
                name.c_str(), static_cast<int>(i), static_cast<double>(got.losses[i]), losses[i]);
        }
        const Values reference = image_gradient(weights.backward(2, 9, 14, grads, kept.saved.data()), x);
        const double wrong = error(wide(got.gx), reference);
        CHECK(wrong <= 1e-5, "%s: gradient is off by %g", name.c_str(), wrong);
        Setting bare = setting;
        bare.gradient = false;
        CHECK(perceptual(trunk, weights, x, y, bare, serially).losses == got.losses, "%s: without gradient",
              name.c_str());
      }
    }
  });
}

// A batch in chunks on any threads gives each image what it gets alone, bit for bit.
void test_invariance() {
  const Program& program = kPrograms[1];
  Random random(9);
  Floats lin(64);
  for (float& v : lin) v = std::uniform_real_distribution<float>(0, 1)(random);
  const int64_t n = 7, h = 37, w = 30;
  const Images x(n, h, w, 5), y(n, h, w, 6);
  for_each_isa([&](const std::string& isa) {
    for (const VggAlgorithm algorithm : {VggAlgorithm::winograd, VggAlgorithm::direct, VggAlgorithm::bf16}) {
      Trunk weights(program.layers, program.taps);
      const VggTrunk trunk = weights.pack(algorithm);
      Setting setting = settings_of(program, lin).back();
      setting.cached = false;
      const Loss all = perceptual(trunk, weights, x, y, setting, serially);
      const Features maps = features(trunk, weights, x, 0, n, true, serially);
      const std::vector<Floats> grads = random_gradients(maps, 8);
      const Floats gx = features_backward(trunk, x, grads, maps.saved, serially);
      for (const ParallelFor parallel : {backwards, on_threads}) {
        const Loss other = perceptual(trunk, weights, x, y, setting, parallel);
        CHECK(other.losses == all.losses && other.gx == all.gx, "threads change a loss, %s", isa.c_str());
        const Features threaded = features(trunk, weights, x, 0, n, true, parallel);
        CHECK(threaded.maps == maps.maps && threaded.saved == maps.saved, "threads change a map, %s", isa.c_str());
        CHECK(features_backward(trunk, x, grads, maps.saved, parallel) == gx, "threads change gx, %s", isa.c_str());
        for (int64_t i = 0; i < n; i += 3) {
          setting.first = i;
          setting.n = 1;
          const Loss one = perceptual(trunk, weights, x, y, setting, parallel);
          bool same = std::equal(one.gx.begin(), one.gx.end(), all.gx.begin() + i * 3 * h * w);
          for (size_t k = 0; k < setting.heads.size(); ++k) same = same && one.losses[k] == all.losses[k * n + i];
          CHECK(same, "image %d differs alone, %s", static_cast<int>(i), isa.c_str());
        }
        setting.first = 0;
        setting.n = -1;
      }
    }
  });
}

// What a call keeps for the next one is its scratch, and that is a chunk's: a larger batch needs no more.
void test_memory() {
  Trunk weights({16, 16, 0, 32}, {3, 7});
  const VggTrunk trunk = weights.pack(VggAlgorithm::winograd);
  const Images x(20, 128, 128, 5), y(20, 128, 128, 6);  // 8 images a chunk
  Setting setting;
  setting.heads = {{0, Distance::mse, 1, nullptr}, {1, Distance::l1, 1, nullptr}};
  const auto kept = [&](int64_t n) {
    cpu::release_pages();
    setting.n = n;
    perceptual(trunk, weights, x, y, setting, serially);
    return static_cast<double>(cpu::release_pages());
  };
  const double chunk = kept(8);
  for (const int64_t n : {16, 20}) {
    const double bytes = kept(n);
    CHECK(bytes <= chunk, "%g bytes of scratch for %d images, %g for 8", bytes, static_cast<int>(n), chunk);
  }
}

// Equal images: loss 0, gradient 0. Maps that are 0 everywhere: finite.
void test_special() {
  Trunk weights({16, 16}, {3});
  for (Tensor& w : weights.weights) {
    for (int64_t i = 0; i < w.elements; ++i) w.set(i, -std::fabs(w.at(i)));
  }
  Trunk live({16, 16}, {3});
  Floats lin(16, 1.0f);
  Images x(1, 6, 6, 3), y(1, 6, 6, 4);
  for (int c = 0; c < 3; ++c) x.image.mean[c] = y.image.mean[c] = -2;  // positive pixels, negative weights: all maps 0
  for_each_isa([&](const std::string& isa) {
    for (const Distance kind : kKinds) {
      Setting setting;
      setting.heads = {{0, kind, 1, kind == Distance::lpips ? lin.data() : nullptr}};
      const Loss dead = perceptual(weights.pack(VggAlgorithm::winograd), weights, x, y, setting, serially);
      const Loss equal = perceptual(live.pack(VggAlgorithm::winograd), live, x, x, setting, serially);
      for (const Loss& loss : {dead, equal}) {
        bool zero = loss.losses[0] == 0;
        for (float v : loss.gx) zero = zero && v == 0;
        CHECK(zero, "kind %d, %s", static_cast<int>(kind), isa.c_str());
      }
    }
  });
}

void test_packed() {
  Trunk weights({16, 16, 0, 32}, {7});
  VggTrunk trunk = weights.pack(VggAlgorithm::direct);
  const int64_t floats = cpu::vgg_packed_floats(trunk);
  trunk.layers = 2;
  CHECK(cpu::vgg_packed_mismatch(trunk, floats) == nullptr, "a trunk cut earlier");
  trunk.layers = 4;
  CHECK(cpu::vgg_packed_mismatch(trunk, floats - 16) != nullptr, "cut short");
  CHECK(cpu::vgg_packed_mismatch(trunk, 0) != nullptr, "empty");
  trunk.channels[3] = 64;
  CHECK(cpu::vgg_packed_mismatch(trunk, floats) != nullptr, "other layers");
  trunk.channels[3] = 32;
  trunk.algorithm = VggAlgorithm::winograd;
  CHECK(cpu::vgg_packed_mismatch(trunk, floats) != nullptr, "another algorithm");
}

}  // namespace
}  // namespace vaeops::test

int main() {
  vaeops::test::test_features();
  vaeops::test::test_masks();
  vaeops::test::test_perceptual();
  vaeops::test::test_invariance();
  vaeops::test::test_memory();
  vaeops::test::test_special();
  vaeops::test::test_packed();
  return vaeops::test::report();
}
