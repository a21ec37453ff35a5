// A small trunk with weights, and what it computes in fp64, step by step. Maps are [n, h, w, C].
#pragma once
#include <algorithm>
#include <string>

#include "check.h"
#include "loops.h"
#include "tensors.h"

namespace vaeops::test {

using Random = std::mt19937_64;
using Values = std::vector<double>;

// |a - b| / |b| over all elements.
inline double error(const Values& a, const Values& b) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < b.size(); ++i) {
    difference += (a[i] - b[i]) * (a[i] - b[i]);
    norm += b[i] * b[i];
  }
  return a.size() != b.size() ? INFINITY : norm == 0 ? std::sqrt(difference) : std::sqrt(difference / norm);
}

inline Values values_of(const Tensor& t) {
  Values values(static_cast<size_t>(t.elements));
  for (int64_t i = 0; i < t.elements; ++i) values[i] = t.at(i);
  return values;
}

struct Map {
  int64_t h, w, channels;
  Values at;  // [n, h, w, C]
};

// 3x3, padding 1; `transposed`: its input gradient. weight [K, C, 3, 3].
inline Map convolve(const Map& x, int64_t n, const Tensor& weight, const Tensor* bias, int64_t in, int64_t out,
                    bool transposed = false) {
  const int64_t from = transposed ? out : in, to = transposed ? in : out;
  Map y{x.h, x.w, to, Values(static_cast<size_t>(n * x.h * x.w * to))};
  Values weights(static_cast<size_t>(9 * in * out));  // [9, from, to]
  for (int64_t i = 0; i < 9 * in * out; ++i) {
    const int64_t k = i / (9 * in), c = i / 9 % in, tap = i % 9;
    weights[transposed ? ((8 - tap) * out + k) * in + c : (tap * in + c) * out + k] = weight.at(i);
  }
  for (int64_t p = 0; p < n * x.h * x.w; ++p) {
    const int64_t row = p / x.w % x.h, column = p % x.w;
    double* const sums = y.at.data() + p * to;
    for (int64_t k = 0; bias != nullptr && k < to; ++k) sums[k] = bias->at(k);
    for (int64_t tap = 0; tap < 9; ++tap) {
      const int64_t dy = tap / 3 - 1, dx = tap % 3 - 1;
      if (row + dy < 0 || row + dy >= x.h || column + dx < 0 || column + dx >= x.w) continue;
      const double* const values = x.at.data() + (p + dy * x.w + dx) * from;
      for (int64_t c = 0; c < from; ++c) {
        const double* const row = weights.data() + (tap * from + c) * to;
        for (int64_t k = 0; k < to; ++k) sums[k] += values[c] * row[k];
      }
    }
  }
  return y;
}

struct Trunk {
  std::vector<int64_t> layers;
  std::vector<int32_t> taps;
  std::vector<Tensor> weights;  // w0, b0, w1, ...
  std::vector<float> memory;
  float* packed = nullptr;

  Trunk(std::vector<int64_t> l, std::vector<int32_t> t, uint64_t seed = 1) : layers(std::move(l)), taps(std::move(t)) {
    Random random(seed);
    int64_t in = 3;
    for (int64_t out : layers) {
      if (out == 0) continue;
      const double spread = std::sqrt(6.0 / static_cast<double>(9 * in));
      weights.push_back(make({out, in, 3, 3}, Dtype::f32));
      fill(weights.back(), random, -spread, spread);
      weights.push_back(make({out}, Dtype::f32));
      fill(weights.back(), random, -0.2, 0.2);
      in = out;
    }
  }

  VggTrunk trunk(VggAlgorithm algorithm) const {
    VggTrunk call{};
    call.layers = static_cast<int32_t>(layers.size());
    std::copy(layers.begin(), layers.end(), call.channels);
    call.taps = static_cast<int32_t>(taps.size());
    std::copy(taps.begin(), taps.end(), call.tap);
    call.algorithm = algorithm;
    call.packed = packed;
    return call;
  }
  // Packs for the instruction set in use.
  VggTrunk pack(VggAlgorithm algorithm) {
    VggTrunk call = trunk(algorithm);
    const int64_t floats = cpu::vgg_packed_floats(call);
    memory.assign(static_cast<size_t>(floats + 16), NAN);
    packed = memory.data();
    while (reinterpret_cast<uintptr_t>(packed) % 64 != 0) ++packed;
    std::vector<const float*> parts;
    for (const Tensor& w : weights) parts.push_back(reinterpret_cast<const float*>(w.data()));
    cpu::vgg_pack(call, parts.data(), packed, serially);
    call.packed = packed;
    CHECK(cpu::vgg_packed_mismatch(call, floats) == nullptr, "%s", cpu::vgg_packed_mismatch(call, floats));
    return call;
  }

  // Each layer's output (after the ReLU), and each convolution's before it.
  void forward(const Map& image, int64_t n, std::vector<Map>& after, std::vector<Map>& before) const {
    const Map* x = &image;
    after.clear();
    before.clear();
    after.reserve(layers.size());
    int64_t in = 3;
    size_t number = 0;
    for (int64_t out : layers) {
      if (out == 0) {
        Map y{x->h / 2, x->w / 2, x->channels, {}};
        for (int64_t p = 0; p < n * y.h * y.w; ++p) {
          const int64_t top = (p / (y.h * y.w) * x->h + p / y.w % y.h * 2) * x->w + p % y.w * 2;
          for (int64_t c = 0; c < y.channels; ++c) {
            double best = -INFINITY;
            for (int64_t i = 0; i < 4; ++i) best = std::max(best, x->at[(top + i / 2 * x->w + i % 2) * y.channels + c]);
            y.at.push_back(best);
          }
        }
        before.push_back({});
        after.push_back(std::move(y));
      } else {
        before.push_back(convolve(*x, n, weights[number], &weights[number + 1], in, out));
        after.push_back(before.back());
        for (double& v : after.back().at) v = std::max(v, 0.0);
        number += 2;
        in = out;
      }
      x = &after.back();
    }
  }
  std::vector<Map> maps(const Map& image, int64_t n) const {
    std::vector<Map> after, before, tapped;
    forward(image, n, after, before);
    for (int32_t t : taps) tapped.push_back(t % 2 == 1 ? after[t / 2] : before[t / 2]);
    return tapped;
  }

  // Sizes of the maps at the taps, without values.
  std::vector<Map> shapes(int64_t height, int64_t width) const {
    std::vector<Map> tapped;
    int64_t channels = 3;
    for (size_t i = 0; i < layers.size(); ++i) {
      height /= layers[i] == 0 ? 2 : 1;
      width /= layers[i] == 0 ? 2 : 1;
      channels = layers[i] == 0 ? channels : layers[i];
      for (int32_t t : taps) {
        if (t / 2 == static_cast<int32_t>(i)) tapped.push_back({height, width, channels, {}});
      }
    }
    return tapped;
  }

  // The gradient of the normalised image from those at the taps (empty: none), with the given masks and codes.
  Map backward(int64_t n, int64_t height, int64_t width, const std::vector<Values>& grads, const uint8_t* saved) const {
    std::vector<Map> shape;  // of each layer's output
    std::vector<const uint8_t*> bits;
    int64_t h = height, w = width, channels = 3, at = 0;
    for (int64_t out : layers) {
      if (out == 0) {
        h /= 2;
        w /= 2;
      } else {
        channels = out;
      }
      shape.push_back({h, w, channels, {}});
      bits.push_back(saved + at);
      at += n * h * w * channels / (out == 0 ? 4 : 8);
    }
    const auto word = [&](size_t layer, int64_t i) {
      uint16_t value;
      std::memcpy(&value, bits[layer] + 2 * i, 2);
      return value;
    };
    const auto add = [&](Values& to, int32_t tap) {
      for (size_t t = 0; t < taps.size(); ++t) {
        for (size_t i = 0; taps[t] == tap && i < grads[t].size(); ++i) to[i] += grads[t][i];
      }
    };
    size_t number = weights.size();
    Map g = shape.back();
    g.at.assign(static_cast<size_t>(n * g.h * g.w * g.channels), 0);
    for (size_t layer = layers.size(); layer-- > 0;) {
      const int32_t code = static_cast<int32_t>(2 * layer);
      add(g.at, code + 1);
      const Map below = layer > 0 ? shape[layer - 1] : Map{height, width, 3, {}};
      if (layers[layer] == 0) {
        Map x{below.h, below.w, g.channels, Values(static_cast<size_t>(n * below.h * below.w * g.channels))};
        for (int64_t i = 0; i < static_cast<int64_t>(g.at.size()); ++i) {
          const int64_t p = i / g.channels, c = i % g.channels, image = p / (g.h * g.w);
          const int64_t row = word(layer, i / 16 * 2) >> (c % 16) & 1,
                        column = word(layer, i / 16 * 2 + 1) >> (c % 16) & 1;
          const int64_t y = p / g.w % g.h * 2 + row, xx = p % g.w * 2 + column;
          x.at[((image * x.h + y) * x.w + xx) * x.channels + c] += g.at[i];
        }
        g = std::move(x);
        continue;
      }
      for (size_t i = 0; i < g.at.size(); ++i) {
        if ((word(layer, static_cast<int64_t>(i / 16)) >> (i % 16) & 1) == 0) g.at[i] = 0;
      }
      add(g.at, code);
      number -= 2;
      g = convolve(g, n, weights[number], nullptr, below.channels, layers[layer], true);
    }
    return g;
  }
};

// Images as a call reads them, and as the trunk sees them.
struct Images {
  int64_t n, height, width;
  Tensor data;  // [n, 3, height, width]
  VggImage image{};
  Map normalized;

  Images(int64_t batch, int64_t h, int64_t w, uint64_t seed, Dtype dtype = Dtype::f32, bool uint8 = false)
      : n(batch), height(h), width(w) {
    Random random(seed);
    const Sizes shape{batch, 3, h, w};
    image.dtype = dtype;
    image.uint8 = uint8;
    for (int c = 0; c < 3; ++c) {
      image.mean[c] = (uint8 ? 120.0f : 0.1f) + 0.05f * static_cast<float>(c);
      image.rstd[c] = (uint8 ? 1 / 60.0f : 2.0f) + 0.01f * static_cast<float>(c);
    }
    normalized = {h, w, 3, Values(static_cast<size_t>(batch * h * w * 3))};
    if (uint8) {  // channels last
      bytes_.resize(static_cast<size_t>(batch * 3 * h * w));
      for (uint8_t& v : bytes_) v = static_cast<uint8_t>(random() % 256);
      image.data = bytes_.data();
      const int64_t stride[4] = {3 * h * w, 1, 3 * w, 3};
      std::copy(stride, stride + 4, image.stride);
    } else {
      data = make(shape, dtype, dtype == Dtype::f32 ? Layout::contiguous : Layout::transposed);
      fill(data, random, -1, 1);
      image.data = data.data();
      std::copy(data.stride.begin(), data.stride.end(), image.stride);
    }
    for (int64_t i = 0; i < batch * h * w * 3; ++i) {
      const int64_t c = i % 3, p = i / 3, x = p % w, y = p / w % h, b = p / (h * w);
      const int64_t at = b * image.stride[0] + c * image.stride[1] + y * image.stride[2] + x * image.stride[3];
      const double v = uint8 ? bytes_[at] : data.at(at);
      normalized.at[i] = (v - image.mean[c]) * static_cast<double>(image.rstd[c]);
    }
  }
  Images(const Images&) = delete;

 private:
  std::vector<uint8_t> bytes_;
};

}  // namespace vaeops::test
