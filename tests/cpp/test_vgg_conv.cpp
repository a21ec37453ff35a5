// The trunk's convolutions of every instruction set against fp64, with everything that may follow them.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "cpu/types.h"
#include "cpu/vgg_conv.h"

namespace vaeops::test {
namespace {

using Random = std::mt19937_64;
using Doubles = std::vector<double>;

void serially(int64_t n, void (*body)(void*, int64_t, int64_t), void* context) { body(context, 0, n); }

void on_threads(int64_t n, void (*body)(void*, int64_t, int64_t), void* context) {
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < 3; ++i) threads.emplace_back(body, context, n * i / 3, n * (i + 1) / 3);
  for (std::thread& thread : threads) thread.join();
}

void for_each_isa(const std::function<void(int)>& run) {
  for (cpu::Isa isa : {cpu::Isa::scalar, cpu::Isa::avx2, cpu::Isa::avx512, cpu::Isa::amx}) {
    if (cpu::set_isa(isa)) run(static_cast<int>(isa));
  }
  cpu::set_isa(cpu::best_isa());
}

// Exactly as long as its elements, so that a sanitizer sees any access past them; filled with 0xFF, which is NaN.
template <class T>
struct Array {
  int64_t size = 0;
  std::unique_ptr<T[]> data;
  explicit Array(int64_t n) : size(n), data(new T[static_cast<size_t>(n)]) { std::memset(data.get(), 0xFF, bytes()); }
  size_t bytes() const { return static_cast<size_t>(size) * sizeof(T); }
  bool operator==(const Array& other) const { return std::memcmp(data.get(), other.data.get(), bytes()) == 0; }
};

struct Aligned {
  std::unique_ptr<char, void (*)(void*)> data;
  explicit Aligned(int64_t bytes)
      : data(static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>((bytes + 63) / 64 * 64))), std::free) {
    std::memset(data.get(), 0xFF, static_cast<size_t>(bytes));
  }
  float* floats() const { return reinterpret_cast<float*>(data.get()); }
};

// A map's element: fp32, or bf16 where the algorithm is bf16.
struct Map {
  bool half;
  Array<char> raw;
  Map(bool is_half, int64_t n) : half(is_half), raw(n * (is_half ? 2 : 4)) {}
  void* data() const { return raw.data.get(); }
  int64_t size() const { return raw.size / (half ? 2 : 4); }
  double at(int64_t i) const {
    return half ? cpu::widen(static_cast<const cpu::bf16*>(data())[i]) : static_cast<const float*>(data())[i];
  }
  void set(int64_t i, double x) {
    const float value = static_cast<float>(x);
    if (half) static_cast<cpu::bf16*>(data())[i] = cpu::to_bf16(value);
    if (!half) static_cast<float*>(data())[i] = value;
  }
};

struct Sizes {
  int64_t n, h, w, in, out;
  std::string name(VggAlgorithm algorithm, int isa) const {
    std::string s = "algorithm " + std::to_string(static_cast<int>(algorithm)) + ", ISA " + std::to_string(isa);
    for (int64_t v : {n, h, w, in, out}) s += " " + std::to_string(v);
    return s;
  }
};

// Sum over taps and inputs; `size` is the sum of the products' absolute values, what errors are measured by.
void convolve(const std::function<double(int64_t, int64_t, int64_t, int64_t)>& x,
              const std::function<double(int64_t, int64_t, int64_t)>& weight, const Sizes& s, int64_t in, int64_t out,
              Doubles& y, Doubles& size) {
  y.assign(static_cast<size_t>(s.n * s.h * s.w * out), 0);
  size.assign(y.size(), 0);
  Doubles w(static_cast<size_t>(9 * in * out));
  for (int64_t tap = 0; tap < 9; ++tap) {
    for (int64_t i = 0; i < in; ++i) {
      for (int64_t o = 0; o < out; ++o) w[(tap * in + i) * out + o] = weight(o, i, tap);
    }
  }
  for (int64_t b = 0; b < s.n; ++b) {
    for (int64_t r = 0; r < s.h; ++r) {
      for (int64_t c = 0; c < s.w; ++c) {
        double* const to = &y[((b * s.h + r) * s.w + c) * out];
        double* const magnitude = &size[((b * s.h + r) * s.w + c) * out];
        for (int64_t tap = 0; tap < 9; ++tap) {
          const int64_t rr = r + tap / 3 - 1, cc = c + tap % 3 - 1;
          if (rr < 0 || rr >= s.h || cc < 0 || cc >= s.w) continue;
          for (int64_t i = 0; i < in; ++i) {
            const double value = x(b, rr, cc, i);
            for (int64_t o = 0; o < out; ++o) {
              const double product = value * w[(tap * in + i) * out + o];
              to[o] += product;
              magnitude[o] += std::fabs(product);
            }
          }
        }
      }
    }
  }
}

// Error of a sum of that size. Winograd's transforms mix 36 sums, some larger than the result.
double tolerance(VggAlgorithm algorithm, double size) {
  return (algorithm == VggAlgorithm::direct ? 0x1p-21 : 0x1p-19) * (size + 0.05);
}

struct Layer {
  Sizes s;
  std::vector<float> weight, bias;

  Layer(const Sizes& sizes, Random& random) : s(sizes), weight(9 * s.in * s.out), bias(s.out) {
    std::normal_distribution<float> draw(0, std::sqrt(2.0f / static_cast<float>(9 * s.in)));
    for (float& w : weight) w = draw(random);
    for (float& b : bias) b = draw(random);
  }
  // As the kernels multiply it.
  double at(VggAlgorithm algorithm, int64_t k, int64_t c, int64_t tap) const {
    const float w = weight[(k * s.in + c) * 9 + tap];
    return algorithm == VggAlgorithm::bf16 && s.in != 3 ? cpu::widen(cpu::to_bf16(w)) : w;
  }
  Aligned packed(VggAlgorithm algorithm, bool backward) const {
    Aligned p(4 * cpu::conv_packed_floats(algorithm, s.in, s.out, backward));
    cpu::conv_pack(algorithm, weight.data(), backward ? nullptr : bias.data(), s.in, s.out, backward, p.floats());
    return p;
  }
};

struct Scratch {
  Aligned memory;
  int64_t slots;
  Scratch(VggAlgorithm algorithm, const Sizes& s, int64_t count)
      : memory(count * cpu::conv_scratch_bytes(algorithm, s.in, s.out, s.w)), slots(count) {}
  operator cpu::ConvScratch() const { return {memory.data.get(), slots}; }
};

struct Outputs {
  Map before, y, pooled;
  Array<uint16_t> mask, code;
  Outputs(const Sizes& s, bool half)
      : before(half, s.n * s.h * s.w * s.out),
        y(half, s.n * s.h * s.w * s.out),
        pooled(half, s.n * (s.h / 2) * (s.w / 2) * s.out),
        mask(s.n * s.h * s.w * s.out / 16),
        code(s.n * (s.h / 2) * (s.w / 2) * s.out / 8) {}
  cpu::ConvForward call(const Sizes& s, const void* x, const float* packed) {
    return {x,
            packed,
            s.n,
            s.h,
            s.w,
            s.in,
            s.out,
            true,
            before.data(),
            y.data(),
            mask.data.get(),
            pooled.data(),
            code.data.get()};
  }
  bool operator==(const Outputs& o) const {
    return before.raw == o.before.raw && y.raw == o.y.raw && pooled.raw == o.pooled.raw && mask == o.mask &&
           code == o.code;
  }
};

bool bit(const uint16_t* words, int64_t i) { return (words[i / 16] >> (i % 16) & 1) != 0; }

void check_outputs(const std::string& name, VggAlgorithm algorithm, const Sizes& s, const Outputs& o, const Doubles& y,
                   const Doubles& size) {
  const double half = o.y.half ? 0x1p-8 : 0;
  int64_t wrong = 0, wrong_mask = 0, wrong_relu = 0, wrong_pool = 0;
  double worst = 0;
  for (size_t i = 0; i < y.size(); ++i) {
    const int64_t at = static_cast<int64_t>(i);
    const double error = std::fabs(o.before.at(at) - y[i]),
                 most = tolerance(algorithm, size[i]) + half * std::fabs(y[i]);
    worst = std::max(worst, error / size[i]);
    wrong += !(error <= most);
    wrong_mask += bit(o.mask.data.get(), at) != (o.before.at(at) > 0);
    wrong_relu += !(o.y.at(at) == std::max(o.before.at(at), 0.0));
  }
  const int64_t h = s.h / 2, w = s.w / 2;
  for (int64_t i = 0; i < s.n * h * w * s.out; ++i) {
    const int64_t k = i % s.out, pixel = i / s.out, b = pixel / (h * w), r = pixel / w % h, c = pixel % w;
    double best = -1;
    int where = 0;
    for (int j = 0; j < 4; ++j) {
      const double v = o.y.at(((b * s.h + 2 * r + j / 2) * s.w + 2 * c + j % 2) * s.out + k);
      if (v > best) {
        best = v;
        where = j;
      }
    }
    const uint16_t* const word = o.code.data.get() + (pixel * s.out + k) / 16 * 2;
    const int code = 2 * (word[0] >> (k % 16) & 1) + (word[1] >> (k % 16) & 1);
    wrong_pool += o.pooled.at(i) != best;
    // In bf16 the maximum is taken before it is rounded.
    const double coded = o.y.at(((b * s.h + 2 * r + code / 2) * s.w + 2 * c + code % 2) * s.out + k);
    wrong_pool += o.y.half ? coded != best : code != where;
  }
  CHECK(wrong == 0, "%s: %lld, worst %g", name.c_str(), static_cast<long long>(wrong), worst);
  CHECK(wrong_mask + wrong_relu + wrong_pool == 0, "%s: mask %lld relu %lld pool %lld", name.c_str(),
        static_cast<long long>(wrong_mask), static_cast<long long>(wrong_relu), static_cast<long long>(wrong_pool));
}

template <class Draw>
void fill(Map& map, Draw draw) {
  for (int64_t i = 0; i < map.size(); ++i) map.set(i, draw());
}

void check_forward(const Sizes& s, VggAlgorithm wanted) {
  Random random(1);
  const Layer layer(s, random);
  Doubles y, size;
  std::shared_ptr<Map> x;
  for_each_isa([&](int isa) {
    const VggAlgorithm algorithm = cpu::conv_algorithm(wanted);
    const bool half = algorithm == VggAlgorithm::bf16;
    if (wanted == VggAlgorithm::bf16 && !half) return;
    if (x == nullptr) {
      std::normal_distribution<double> draw;
      x = std::make_shared<Map>(half, s.n * s.h * s.w * s.in);
      fill(*x, [&] { return std::max(draw(random), -0.5); });
      convolve([&](int64_t b, int64_t r, int64_t c, int64_t i) { return x->at(((b * s.h + r) * s.w + c) * s.in + i); },
               [&](int64_t o, int64_t i, int64_t tap) { return layer.at(algorithm, o, i, tap); }, s, s.in, s.out, y,
               size);
      for (size_t i = 0; i < y.size(); ++i) y[i] += layer.bias[i % s.out];
    }
    const std::string name = s.name(algorithm, isa);
    const Aligned packed = layer.packed(algorithm, false);
    Outputs all(s, half);
    const cpu::ConvForward call = all.call(s, x->data(), packed.floats());
    cpu::conv_forward(algorithm, call, Scratch(algorithm, s, 1), serially);
    check_outputs(name, algorithm, s, all, y, size);

    Outputs threads(s, half);  // the same bits
    cpu::conv_forward(algorithm, threads.call(s, x->data(), packed.floats()), Scratch(algorithm, s, 5), on_threads);
    CHECK(threads == all, "%s: threads", name.c_str());
    Outputs single(s, half);
    const int64_t element = half ? 2 : 4, pixels = s.h * s.w, pooled = (s.h / 2) * (s.w / 2);
    for (int64_t b = 0; b < s.n; ++b) {
      cpu::ConvForward one =
          single.call(s, static_cast<const char*>(x->data()) + b * pixels * s.in * element, packed.floats());
      one.n = 1;
      one.before = static_cast<char*>(one.before) + b * pixels * s.out * element;
      one.y = static_cast<char*>(one.y) + b * pixels * s.out * element;
      one.mask += b * pixels * s.out / 16;
      one.pooled = static_cast<char*>(one.pooled) + b * pooled * s.out * element;
      one.code += b * pooled * s.out / 8;
      cpu::conv_forward(algorithm, one, Scratch(algorithm, s, 2), serially);
    }
    CHECK(single == all, "%s: image by image", name.c_str());

    Outputs plain(s, half);  // nothing but the convolution
    cpu::ConvForward only = plain.call(s, x->data(), packed.floats());
    only.relu = false;
    only.before = only.pooled = nullptr;
    only.mask = only.code = nullptr;
    cpu::conv_forward(algorithm, only, Scratch(algorithm, s, 1), serially);
    CHECK(plain.y.raw == all.before.raw, "%s: convolution alone", name.c_str());
    Outputs few(s, half);  // the pooled map alone
    cpu::ConvForward pool = few.call(s, x->data(), packed.floats());
    pool.before = pool.y = nullptr;
    pool.mask = pool.code = nullptr;
    cpu::conv_forward(algorithm, pool, Scratch(algorithm, s, 1), serially);
    CHECK(few.pooled.raw == all.pooled.raw, "%s: pool alone", name.c_str());
  });
}

void check_backward(const Sizes& s, VggAlgorithm wanted) {
  Random random(2);
  const Layer layer(s, random);
  std::normal_distribution<double> draw;
  const int64_t inputs = s.n * s.h * s.w * s.in;
  Array<uint16_t> mask(inputs / 16);
  for (int64_t i = 0; i < mask.size; ++i) mask.data[i] = static_cast<uint16_t>(random());
  Doubles y, size;
  std::shared_ptr<Map> g, after, before;
  for_each_isa([&](int isa) {
    const VggAlgorithm algorithm = cpu::conv_algorithm(wanted);
    const bool half = algorithm == VggAlgorithm::bf16;
    if (wanted == VggAlgorithm::bf16 && !half) return;
    if (g == nullptr) {
      g = std::make_shared<Map>(half, s.n * s.h * s.w * s.out);
      after = std::make_shared<Map>(half, inputs);
      before = std::make_shared<Map>(half, inputs);
      for (const auto& map : {g, after, before}) fill(*map, [&] { return draw(random); });
      convolve([&](int64_t b, int64_t r, int64_t c, int64_t k) { return g->at(((b * s.h + r) * s.w + c) * s.out + k); },
               [&](int64_t c, int64_t k, int64_t tap) { return layer.at(algorithm, k, c, 8 - tap); }, s, s.out, s.in, y,
               size);
    }
    const Aligned packed = layer.packed(algorithm, true);
    for (int parts = 0; parts < 8; ++parts) {
      const std::string name = s.name(algorithm, isa) + ", backward " + std::to_string(parts);
      Map gx(half, inputs), again(half, inputs);
      cpu::ConvBackward call{g->data(), packed.floats(), s.n,     s.h,     s.w,      s.in,
                             s.out,     nullptr,         nullptr, nullptr, gx.data()};
      if ((parts & 1) != 0) call.tap_after = after->data();
      if ((parts & 2) != 0) call.mask = mask.data.get();
      if ((parts & 4) != 0) call.tap_before = before->data();
      cpu::conv_backward(algorithm, call, Scratch(algorithm, s, 1), serially);
      int64_t wrong = 0;
      for (int64_t i = 0; i < inputs; ++i) {
        double v = y[i];
        if ((parts & 1) != 0) v += after->at(i);
        if ((parts & 2) != 0 && !bit(mask.data.get(), i)) v = 0;
        if ((parts & 4) != 0) v += before->at(i);
        const double rounding =
            (half ? 0x1p-8 : 0x1p-23) * (std::fabs(v) + std::fabs(after->at(i)) + std::fabs(before->at(i)));
        wrong += !(std::fabs(gx.at(i) - v) <= tolerance(algorithm, size[i]) + rounding);
      }
      CHECK(wrong == 0, "%s: %lld", name.c_str(), static_cast<long long>(wrong));
      call.gx = again.data();
      cpu::conv_backward(algorithm, call, Scratch(algorithm, s, 5), on_threads);
      CHECK(again.raw == gx.raw, "%s: threads", name.c_str());
    }
  });
}

// An image of any strides and type.
struct Image {
  VggImage image{};
  Array<char> raw;
  int64_t bytes;
  Image(const Sizes& s, Dtype dtype, bool uint8, bool channels_last, int64_t images, Random& random)
      : raw(images * 3 * s.h * s.w *
            (uint8                 ? 1
             : dtype == Dtype::f32 ? 4
                                   : 2)),
        bytes(uint8                 ? 1
              : dtype == Dtype::f32 ? 4
                                    : 2) {
    image.data = raw.data.get();
    image.dtype = dtype;
    image.uint8 = uint8;
    const int64_t plane = s.h * s.w;
    const int64_t planar[4] = {3 * plane, plane, s.w, 1}, packed[4] = {3 * plane, 1, 3 * s.w, 3};
    std::copy_n(channels_last ? packed : planar, 4, image.stride);
    for (int c = 0; c < 3; ++c) {
      image.mean[c] = 0.1f * static_cast<float>(c + 1);
      image.rstd[c] = 1.5f + static_cast<float>(c);
    }
    std::uniform_real_distribution<float> draw(-1, 1);
    for (int64_t i = 0; i < images * 3 * plane; ++i) {
      char* const at = raw.data.get() + i * bytes;
      const float value = draw(random);
      if (uint8) {
        *reinterpret_cast<uint8_t*>(at) = static_cast<uint8_t>(random());
      } else if (dtype == Dtype::f32) {
        *reinterpret_cast<float*>(at) = value;
      } else if (dtype == Dtype::bf16) {
        *reinterpret_cast<cpu::bf16*>(at) = cpu::to_bf16(value);
      } else {
        *reinterpret_cast<cpu::f16*>(at) = cpu::to_f16(value);
      }
    }
  }
  double at(int64_t b, int64_t y, int64_t x, int64_t c) const {
    const int64_t i = b * image.stride[0] + c * image.stride[1] + y * image.stride[2] + x * image.stride[3];
    const char* const p = raw.data.get() + i * bytes;
    const double value = image.uint8                  ? *reinterpret_cast<const uint8_t*>(p)
                         : image.dtype == Dtype::f32  ? *reinterpret_cast<const float*>(p)
                         : image.dtype == Dtype::bf16 ? cpu::widen(*reinterpret_cast<const cpu::bf16*>(p))
                                                      : cpu::widen(*reinterpret_cast<const cpu::f16*>(p));
    return (value - image.mean[c]) * image.rstd[c];
  }
};

void check_first(const Sizes& s, VggAlgorithm wanted, Dtype dtype, bool uint8, bool channels_last) {
  Random random(3);
  const Layer layer(s, random);
  constexpr int64_t kSkipped = 1;
  const Image image(s, dtype, uint8, channels_last, s.n + kSkipped, random);
  Doubles y, size;
  convolve([&](int64_t b, int64_t r, int64_t c, int64_t i) { return image.at(b + kSkipped, r, c, i); },
           [&](int64_t o, int64_t i, int64_t tap) { return layer.at(wanted, o, i, tap); }, s, 3, s.out, y, size);
  for (size_t i = 0; i < y.size(); ++i) y[i] += layer.bias[i % s.out];
  for_each_isa([&](int isa) {
    const VggAlgorithm algorithm = cpu::conv_algorithm(wanted);
    const bool half = algorithm == VggAlgorithm::bf16;
    const std::string name = s.name(algorithm, isa) + " first, dtype " + std::to_string(static_cast<int>(dtype));
    const Aligned packed = layer.packed(algorithm, false), back = layer.packed(algorithm, true);
    Outputs all(s, half), threads(s, half);
    cpu::conv_first(algorithm, image.image, kSkipped, all.call(s, nullptr, packed.floats()), Scratch(algorithm, s, 1),
                    serially);
    check_outputs(name, VggAlgorithm::direct, s, all, y, size);
    cpu::conv_first(algorithm, image.image, kSkipped, threads.call(s, nullptr, packed.floats()),
                    Scratch(algorithm, s, 5), on_threads);
    CHECK(threads == all, "%s: threads", name.c_str());
    if (uint8) return;

    Map g(half, s.n * s.h * s.w * s.out);
    std::normal_distribution<double> draw;
    fill(g, [&] { return draw(random); });
    Doubles gx, magnitude;
    convolve([&](int64_t b, int64_t r, int64_t c, int64_t k) { return g.at(((b * s.h + r) * s.w + c) * s.out + k); },
             [&](int64_t c, int64_t k, int64_t tap) { return layer.at(wanted, k, c, 8 - tap); }, s, s.out, 3, gx,
             magnitude);
    const int64_t element = dtype == Dtype::f32 ? 4 : 2;
    Array<char> found(static_cast<int64_t>(gx.size()) * element), again(found.size);
    cpu::ConvBackward call{g.data(), back.floats(), s.n, s.h, s.w, 3, s.out, nullptr, nullptr, nullptr, nullptr};
    cpu::conv_first_backward(algorithm, call, image.image.rstd, found.data.get(), dtype, Scratch(algorithm, s, 1),
                             serially);
    cpu::conv_first_backward(algorithm, call, image.image.rstd, again.data.get(), dtype, Scratch(algorithm, s, 5),
                             on_threads);
    CHECK(found == again, "%s: threads of the gradient", name.c_str());
    int64_t wrong = 0;
    for (int64_t i = 0; i < static_cast<int64_t>(gx.size()); ++i) {
      const int64_t c = i / (s.h * s.w) % 3, b = i / (3 * s.h * s.w), pixel = i % (s.h * s.w);
      const size_t from = static_cast<size_t>((b * s.h * s.w + pixel) * 3 + c);
      const char* const at = found.data.get() + i * element;
      const double value = dtype == Dtype::f32    ? *reinterpret_cast<const float*>(at)
                           : dtype == Dtype::bf16 ? cpu::widen(*reinterpret_cast<const cpu::bf16*>(at))
                                                  : cpu::widen(*reinterpret_cast<const cpu::f16*>(at));
      const double expected = gx[from] * image.image.rstd[c];
      const double rounding = dtype == Dtype::f32 ? 0x1p-23 : dtype == Dtype::bf16 ? 0x1p-8 : 0x1p-10;
      wrong += !(std::fabs(value - expected) <=
                 rounding * std::fabs(expected) + 0x1p-21 * (magnitude[from] + 0.05) * image.image.rstd[c]);
    }
    CHECK(wrong == 0, "%s: gradient: %lld", name.c_str(), static_cast<long long>(wrong));
  });
}

void run() {
  constexpr int64_t kShapes[][2] = {{1, 1}, {1, 5}, {7, 9}, {4, 4}, {33, 18}, {12, 12}};
  for (const VggAlgorithm algorithm : {VggAlgorithm::winograd, VggAlgorithm::direct, VggAlgorithm::bf16}) {
    for (const auto& shape : kShapes) {
      const int64_t n = shape[0] > 8 ? 1 : 2;
      for (const auto& channels : {std::pair<int64_t, int64_t>{16, 32}, {32, 16}, {48, 80}, {64, 128}, {128, 64}}) {
        if (shape[0] > 8 && channels.first + channels.second > 64) continue;
        const Sizes s{n, shape[0], shape[1], channels.first, channels.second};
        check_forward(s, algorithm);
        check_backward(s, algorithm);
      }
      for (const int64_t out : {16, 64}) {
        const Sizes s{n, shape[0], shape[1], 3, out};
        check_first(s, algorithm, Dtype::f32, false, out == 16);
        check_first(s, algorithm, Dtype::bf16, false, out == 64);
        check_first(s, algorithm, Dtype::f16, false, false);
        check_first(s, algorithm, Dtype::f32, true, out == 64);
      }
    }
  }
  // More tiles than one block holds, so that blocks begin and end within images.
  for (const VggAlgorithm algorithm : {VggAlgorithm::winograd, VggAlgorithm::bf16}) {
    check_forward({5, 18, 21, 16, 16}, algorithm);
    check_backward({5, 18, 21, 16, 16}, algorithm);
  }
}

}  // namespace
}  // namespace vaeops::test

int main() {
  vaeops::test::run();
  return vaeops::test::report();
}
