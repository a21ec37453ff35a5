// A trunk with batch norm on the statistics of the batch, on every instruction set: maps, statistics and the image's
// gradient against fp64, and that threads change no bit.
#include "vgg_case.h"

namespace vaeops::test {
namespace {

using Floats = std::vector<float>;

constexpr double kEps = 1e-5;

struct Program {
  std::string name;
  std::vector<int64_t> layers;
  std::vector<int32_t> taps;
};

// Taps before and after a ReLU, at a pool, several on a layer; one layer.
const Program kPrograms[] = {
    {"two blocks", {16, 16, 0, 32, 32}, {3, 9}},
    {"every kind of tap", {16, 32, 0, 16, 0, 32}, {0, 1, 2, 3, 5, 6, 7, 9, 10, 11}},
    {"ends before a ReLU", {16, 48, 0, 16}, {1, 6}},
    {"ends with a pool", {16, 0, 32, 0}, {0, 3, 7}},
    {"one layer", {16}, {1}},
    {"one layer before its ReLU", {32}, {0}},
};

struct Batch {
  Trunk weights;
  std::vector<Floats> norms;  // weight and bias of each convolution's batch norm
  VggTrunk trunk{};

  Batch(const Program& program, VggAlgorithm algorithm) : weights(program.layers, program.taps) {
    Random random(7);
    std::uniform_real_distribution<float> weight(0.2f, 1.5f), bias(-0.5f, 0.5f);
    for (int64_t channels : weights.layers) {
      if (channels == 0) continue;
      for (auto* draw : {&weight, &bias}) {
        norms.emplace_back(static_cast<size_t>(channels));
        for (float& v : norms.back()) v = (*draw)(random);
      }
    }
    trunk = weights.pack(algorithm);
  }

  bool half() const { return trunk.algorithm == VggAlgorithm::bf16 && cpu::isa() == cpu::Isa::amx; }
};

struct Result {
  std::vector<Floats> maps, kept, stats;  // kept, stats: of each convolution

  bool operator==(const Result& other) const { return maps == other.maps && stats == other.stats; }
};

void set(VggBatchNorm& call, Batch& batch, const Images& x, Result& result, bool keep) {
  call.trunk = batch.trunk;
  call.batch = x.n;
  call.height = x.height;
  call.width = x.width;
  for (size_t i = 0, n = 0; i < batch.weights.layers.size(); ++i) {
    if (batch.weights.layers[i] == 0) continue;
    call.weight[i] = batch.norms[2 * n].data();
    call.bias[i] = batch.norms[2 * n + 1].data();
    call.stats[i] = result.stats[n].data();
    call.kept[i] = keep ? result.kept[n].data() : nullptr;
    ++n;
  }
}

Result features(Batch& batch, const Images& x, bool keep, ParallelFor parallel) {
  Result result;
  VggBatchNormFeatures call{};
  int64_t h = x.height, w = x.width;
  for (int64_t channels : batch.weights.layers) {
    h /= channels == 0 ? 2 : 1;
    w /= channels == 0 ? 2 : 1;
    if (channels == 0) continue;
    result.kept.emplace_back(static_cast<size_t>(x.n * h * w * channels), NAN);
    result.stats.emplace_back(static_cast<size_t>(2 * channels), NAN);
  }
  for (const Map& m : batch.weights.shapes(x.height, x.width)) {
    result.maps.emplace_back(static_cast<size_t>(x.n * m.h * m.w * m.channels), NAN);
  }
  for (size_t t = 0; t < result.maps.size(); ++t) call.map[t] = result.maps[t].data();
  set(call, batch, x, result, keep);
  call.image = x.image;
  call.eps = kEps;
  cpu::vgg_batchnorm_features(call, parallel);
  return result;
}

Floats backward(Batch& batch, const Images& x, Result& result, const std::vector<Floats>& grads, ParallelFor parallel) {
  Floats gx(static_cast<size_t>(x.n * 3 * x.height * x.width), NAN);
  VggBatchNormBackward call{};
  set(call, batch, x, result, true);
  for (size_t t = 0; t < grads.size(); ++t) call.grad[t] = grads[t].empty() ? nullptr : grads[t].data();
  std::copy(x.image.rstd, x.image.rstd + 3, call.rstd);
  call.gx = gx.data();
  call.gx_dtype = Dtype::f32;
  cpu::vgg_batchnorm_backward(call, parallel);
  return gx;
}

// In fp64, of a convolution's output y.
struct Norm {
  Values mean, rstd, weight, bias;

  Norm(const Map& y, const Floats& w, const Floats& b)
      : mean(w.size()), rstd(w.size()), weight(w.begin(), w.end()), bias(b.begin(), b.end()) {
    const size_t channels = w.size(), pixels = y.at.size() / channels;
    for (size_t i = 0; i < y.at.size(); ++i) mean[i % channels] += y.at[i] / static_cast<double>(pixels);
    for (size_t i = 0; i < y.at.size(); ++i) {
      rstd[i % channels] += std::pow(y.at[i] - mean[i % channels], 2) / static_cast<double>(pixels);
    }
    for (double& v : rstd) v = 1 / std::sqrt(v + kEps);
  }
  double unit(const Map& y, size_t i) const { return (y.at[i] - mean[i % mean.size()]) * rstd[i % mean.size()]; }
  Map operator()(const Map& y) const {
    Map v = y;
    for (size_t i = 0; i < v.at.size(); ++i) v.at[i] = unit(y, i) * weight[i % mean.size()] + bias[i % mean.size()];
    return v;
  }
  Values back(const Map& y, const Values& g) const {
    const size_t channels = mean.size();
    const double pixels = static_cast<double>(g.size() / channels);
    Values sum(channels), product(channels), gx(g.size());
    for (size_t i = 0; i < g.size(); ++i) {
      sum[i % channels] += g[i] / pixels;
      product[i % channels] += g[i] * unit(y, i) / pixels;
    }
    for (size_t i = 0; i < g.size(); ++i) {
      const size_t c = i % channels;
      gx[i] = rstd[c] * weight[c] * (g[i] - sum[c] - unit(y, i) * product[c]);
    }
    return gx;
  }
};

// The largest of a window, and where it lies; i counts in the pooled map [n, h, w, C].
size_t window(const Map& x, int64_t h, int64_t w, size_t i) {
  const int64_t c = static_cast<int64_t>(i) % x.channels, p = static_cast<int64_t>(i) / x.channels;
  size_t best = 0;
  for (int64_t k = 0; k < 4; ++k) {
    const int64_t y = p / w % h * 2 + k / 2, column = p % w * 2 + k % 2;
    const size_t at = static_cast<size_t>(((p / (h * w) * x.h + y) * x.w + column) * x.channels + c);
    if (k == 0 || x.at[at] > x.at[best]) best = at;
  }
  return best;
}

// Maps at the taps, in fp64 throughout.
std::vector<Map> reference(const Batch& batch, const Images& x) {
  std::vector<Map> tapped;
  Map in = x.normalized;
  const auto tap = [&](size_t code, const Map& m) {
    for (int32_t t : batch.weights.taps) {
      if (t == static_cast<int32_t>(code)) tapped.push_back(m);
    }
  };
  for (size_t layer = 0, n = 0; layer < batch.weights.layers.size(); ++layer) {
    const int64_t channels = batch.weights.layers[layer];
    if (channels == 0) {
      Map y{in.h / 2, in.w / 2, in.channels, {}};
      y.at.resize(static_cast<size_t>(x.n * y.h * y.w * y.channels));
      for (size_t i = 0; i < y.at.size(); ++i) y.at[i] = in.at[window(in, y.h, y.w, i)];
      in = y;
    } else {
      const std::vector<Tensor>& w = batch.weights.weights;
      const Map y = convolve(in, x.n, w[2 * n], &w[2 * n + 1], in.channels, channels);
      in = Norm(y, batch.norms[2 * n], batch.norms[2 * n + 1])(y);
      tap(2 * layer, in);
      for (double& v : in.at) v = std::max(v, 0.0);
      ++n;
    }
    tap(2 * layer + 1, in);
  }
  return tapped;
}

// The image's gradient in fp64, with the convolutions' outputs as they were kept.
Values reference_backward(const Batch& batch, const Images& x, const std::vector<Map>& kept,
                          const std::vector<Floats>& grads) {
  Map g;
  const auto add = [&](size_t code) {
    for (size_t t = 0; t < grads.size(); ++t) {
      if (batch.weights.taps[t] != static_cast<int32_t>(code)) continue;
      for (size_t i = 0; i < grads[t].size(); ++i) g.at[i] += grads[t][i];
    }
  };
  size_t n = kept.size();
  Map pooled;
  for (size_t layer = batch.weights.layers.size(); layer-- > 0;) {
    if (batch.weights.layers[layer] == 0) {
      const Map& below = kept[n - 1];
      if (g.at.empty()) g = {below.h / 2, below.w / 2, below.channels, {}};
      g.at.resize(static_cast<size_t>(x.n * g.h * g.w * g.channels));
      add(2 * layer + 1);
      pooled = g;
      continue;
    }
    const Map& y = kept[--n];
    const Norm norm(y, batch.norms[2 * n], batch.norms[2 * n + 1]);
    const Map v = norm(y);
    if (g.at.empty() || !pooled.at.empty()) g = {y.h, y.w, y.channels, Values(y.at.size())};
    for (size_t i = 0; i < pooled.at.size(); ++i) g.at[window(v, pooled.h, pooled.w, i)] += pooled.at[i];
    pooled.at.clear();
    add(2 * layer + 1);
    for (size_t i = 0; i < g.at.size(); ++i) g.at[i] = v.at[i] > 0 ? g.at[i] : 0;
    add(2 * layer);
    g.at = norm.back(y, g.at);
    g = convolve(g, x.n, batch.weights.weights[2 * n], nullptr, n == 0 ? 3 : kept[n - 1].channels, y.channels, true);
  }
  Values out(g.at.size());
  const int64_t pixels = x.height * x.width;
  for (int64_t i = 0; i < static_cast<int64_t>(out.size()); ++i) {
    const int64_t b = i / (3 * pixels), c = i / pixels % 3;
    out[i] = g.at[(b * pixels + i % pixels) * 3 + c] * static_cast<double>(x.image.rstd[c]);
  }
  return out;
}

std::vector<Map> kept_maps(const Batch& batch, const Images& x, const Result& result) {
  std::vector<Map> maps;
  int64_t h = x.height, w = x.width;
  for (int64_t channels : batch.weights.layers) {
    h /= channels == 0 ? 2 : 1;
    w /= channels == 0 ? 2 : 1;
    if (channels == 0) continue;
    const Floats& kept = result.kept[maps.size()];
    Map y{h, w, channels, Values(kept.begin(), kept.end())};
    const auto* const halves = reinterpret_cast<const char*>(kept.data());
    for (size_t i = 0; batch.half() && i < kept.size(); ++i) y.at[i] = read(halves + 2 * i, Dtype::bf16);
    maps.push_back(std::move(y));
  }
  return maps;
}

std::vector<Floats> random_gradients(const Result& like) {
  Random random(5);
  std::normal_distribution<float> normal;
  std::vector<Floats> grads = like.maps;
  for (Floats& g : grads) {
    for (float& v : g) v = normal(random);
  }
  return grads;
}

Values wide(const Floats& x) { return Values(x.begin(), x.end()); }

void check(const Program& program, int64_t n, int64_t h, int64_t w, VggAlgorithm algorithm, const std::string& isa) {
  Batch batch(program, algorithm);
  const Images x(n, h, w, 3);
  const std::string name = program.name + " " + std::to_string(h) + "x" + std::to_string(w) + ", algorithm " +
                           std::to_string(static_cast<int>(algorithm)) + ", " + isa;
  Result got = features(batch, x, true, serially);
  CHECK(features(batch, x, false, serially) == got, "%s: without keeping", name.c_str());
  const std::vector<Map> expected = reference(batch, x), kept = kept_maps(batch, x, got);
  for (size_t t = 0; t < expected.size(); ++t) {
    const double wrong = error(wide(got.maps[t]), expected[t].at);
    CHECK(wrong <= (batch.half() ? 5e-2 : 2e-5), "%s: tap %d is off by %g", name.c_str(), static_cast<int>(t), wrong);
  }
  for (size_t i = 0; i < kept.size(); ++i) {
    const Norm norm(kept[i], batch.norms[2 * i], batch.norms[2 * i + 1]);
    Values both = norm.mean;
    both.insert(both.end(), norm.rstd.begin(), norm.rstd.end());
    const double wrong = error(wide(got.stats[i]), both);
    CHECK(wrong <= 2e-7, "%s: statistics %d are off by %g", name.c_str(), static_cast<int>(i), wrong);
  }
  std::vector<Floats> grads = random_gradients(got);
  for (const bool all : {true, false}) {
    if (!all) grads.back().clear();  // no gradient reaches the last tap
    if (!all && grads.size() == 1) break;
    const double wrong =
        error(wide(backward(batch, x, got, grads, serially)), reference_backward(batch, x, kept, grads));
    CHECK(wrong <= (batch.half() ? 3e-2 : 1e-5), "%s: gradient is off by %g", name.c_str(), wrong);
  }
  for (const ParallelFor parallel : {backwards, on_threads}) {
    CHECK(features(batch, x, true, parallel) == got, "%s: threads change a map", name.c_str());
    CHECK(backward(batch, x, got, grads, parallel) == backward(batch, x, got, grads, serially),
          "%s: threads change the gradient", name.c_str());
  }
}

void test_programs() {
  for_each_isa([](const std::string& isa) {
    for (const Program& program : kPrograms) {
      for (VggAlgorithm algorithm : {VggAlgorithm::winograd, VggAlgorithm::direct, VggAlgorithm::bf16}) {
        check(program, 3, 13, 10, algorithm, isa);
      }
      check(program, 1, 4, 7, VggAlgorithm::winograd, isa);
      check(program, 5, 8, 6, VggAlgorithm::winograd, isa);
    }
    check(kPrograms[4], 2, 1, 1, VggAlgorithm::winograd, isa);
  });
}

// Outputs far from 0, where sums of squares would lose the variance.
void test_a_large_mean() {
  for_each_isa([](const std::string& isa) {
    Batch batch(kPrograms[5], VggAlgorithm::winograd);
    for (int64_t i = 0; i < batch.weights.weights[1].elements; ++i) batch.weights.weights[1].set(i, 1000);
    batch.trunk = batch.weights.pack(VggAlgorithm::winograd);
    const Images x(2, 33, 40, 3);
    const Result got = features(batch, x, true, serially);
    const Norm norm(kept_maps(batch, x, got)[0], batch.norms[0], batch.norms[1]);
    for (size_t c = 0; c < norm.mean.size(); ++c) {
      CHECK(std::fabs(got.stats[0][c] / norm.mean[c] - 1) <= 1.2e-7, "mean %g, not %g, %s",
            static_cast<double>(got.stats[0][c]), norm.mean[c], isa.c_str());
      CHECK(std::fabs(got.stats[0][32 + c] / norm.rstd[c] - 1) <= 1e-5, "rstd %g, not %g, %s",
            static_cast<double>(got.stats[0][32 + c]), norm.rstd[c], isa.c_str());
    }
  });
}

// No tap has a gradient: the image's is 0. An empty batch: nothing is done.
void test_nothing() {
  Batch batch(kPrograms[0], VggAlgorithm::winograd);
  const Images x(2, 6, 6, 3), empty(0, 6, 6, 3);
  Result got = features(batch, x, true, serially);
  const std::vector<Floats> none(2);
  CHECK(backward(batch, x, got, none, serially) == Floats(2 * 3 * 36), "no gradient");
  Result nothing = features(batch, empty, true, serially);
  CHECK(backward(batch, empty, nothing, none, serially).empty(), "an empty batch");
}

}  // namespace
}  // namespace vaeops::test

int main() {
  vaeops::test::test_programs();
  vaeops::test::test_a_large_mean();
  vaeops::test::test_nothing();
  return vaeops::test::report();
}
