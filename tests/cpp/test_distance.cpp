// Distances of given maps on every instruction set: fp64 against their definitions and central differences, the other
// dtypes, layouts and threads against fp64.
#include "vgg_case.h"

namespace vaeops::test {
namespace {

struct Shape4 {
  int64_t n, c, h, w;
  int64_t elements() const { return n * c * h * w; }
  Sizes sizes() const { return {n, c, h, w}; }
};

enum class Order { nchw, nhwc, sparse };

// Logical element (i in row-major [n, c, h, w]) of a map of any strides.
struct TestMap {
  Tensor t;
  Shape4 shape;

  TestMap(const Shape4& s, Dtype dtype, Order order) : shape(s) {
    const Sizes memory = order == Order::nchw   ? Sizes{s.n, s.c, s.h, s.w}
                         : order == Order::nhwc ? Sizes{s.n, s.h, s.w, s.c}
                                                : Sizes{s.w, s.n, 2 * s.h, 3 * s.c};
    t = make(memory, dtype);
    const Sizes& m = t.stride;
    t.stride = order == Order::nchw   ? m
               : order == Order::nhwc ? Sizes{m[0], m[3], m[1], m[2]}
                                      : Sizes{m[1], 3 * m[3], 2 * m[2], m[0]};
  }
  int64_t offset(int64_t i) const { return offset_of(shape.sizes(), t.stride, i); }
  double at(int64_t i) const { return t.at(offset(i)); }
  void set(int64_t i, double x) { t.set(offset(i), x); }
  Values values() const {
    Values all;
    for (int64_t i = 0; i < shape.elements(); ++i) all.push_back(at(i));
    return all;
  }
};

struct Options {
  Distance kind;
  bool mean, spatial;
};

template <class Call>
Call call_of(const TestMap& a, const TestMap& b, const Options& options, const Tensor& lin) {
  Call call{};
  call.a = a.t.data();
  call.b = b.t.data();
  call.dtype = a.t.dtype;
  std::copy(a.t.stride.begin(), a.t.stride.end(), call.a_stride);
  std::copy(b.t.stride.begin(), b.t.stride.end(), call.b_stride);
  call.batch = a.shape.n;
  call.channels = a.shape.c;
  call.height = a.shape.h;
  call.width = a.shape.w;
  call.kind = options.kind;
  call.lin = options.kind == Distance::lpips ? lin.data() : nullptr;
  call.mean = options.mean;
  call.spatial = options.spatial;
  return call;
}

int64_t outputs(const Shape4& s, const Options& options) { return options.spatial ? s.n * s.h * s.w : s.n; }

Values forward(const TestMap& a, const TestMap& b, const Options& options, const Tensor& lin, ParallelFor parallel) {
  auto call = call_of<FeatureDistanceForward>(a, b, options, lin);
  const Tensor out = make({outputs(a.shape, options)}, compute(a.t.dtype));
  call.out = out.data();
  cpu::feature_distance_forward(call, parallel);
  return values_of(out);
}

std::pair<Values, Values> backward(const TestMap& a, const TestMap& b, const Options& options, const Tensor& lin,
                                   const Values& grad, ParallelFor parallel, Order order) {
  auto call = call_of<FeatureDistanceBackward>(a, b, options, lin);
  Tensor g = make({outputs(a.shape, options)}, compute(a.t.dtype));
  for (size_t i = 0; i < grad.size(); ++i) g.set(static_cast<int64_t>(i), grad[i]);
  TestMap ga(a.shape, a.t.dtype, order), gb(a.shape, a.t.dtype, order);
  call.grad = g.data();
  call.ga = ga.t.data();
  call.gb = gb.t.data();
  std::copy(ga.t.stride.begin(), ga.t.stride.end(), call.ga_stride);
  std::copy(gb.t.stride.begin(), gb.t.stride.end(), call.gb_stride);
  cpu::feature_distance_backward(call, parallel);
  return {ga.values(), gb.values()};
}

// By the definition, element by element.
Values definition(const TestMap& a, const TestMap& b, const Options& options, const Tensor& lin) {
  const Shape4& s = a.shape;
  const int64_t pixels = s.h * s.w;
  Values out(static_cast<size_t>(outputs(s, options)));
  const auto at = [&](const TestMap& m, int64_t n, int64_t c, int64_t p) { return m.at((n * s.c + c) * pixels + p); };
  for (int64_t n = 0; n < s.n; ++n) {
    if (options.kind == Distance::gram) {
      for (int64_t i = 0; i < s.c * s.c; ++i) {
        double d = 0;
        for (int64_t p = 0; p < pixels; ++p) {
          d += at(a, n, i / s.c, p) * at(a, n, i % s.c, p) - at(b, n, i / s.c, p) * at(b, n, i % s.c, p);
        }
        d /= static_cast<double>(s.c * pixels);
        out[n] += d * d / (options.mean ? static_cast<double>(s.c * s.c) : 1);
      }
      continue;
    }
    for (int64_t p = 0; p < pixels; ++p) {
      double norm_a = 0, norm_b = 0, sum = 0;
      for (int64_t c = 0; c < s.c; ++c) {
        norm_a += at(a, n, c, p) * at(a, n, c, p);
        norm_b += at(b, n, c, p) * at(b, n, c, p);
      }
      for (int64_t c = 0; c < s.c; ++c) {
        const double d = at(a, n, c, p) - at(b, n, c, p), size = std::fabs(d);
        const double u = at(a, n, c, p) / (std::sqrt(norm_a) + 1e-10) - at(b, n, c, p) / (std::sqrt(norm_b) + 1e-10);
        sum += options.kind == Distance::mse         ? d * d
               : options.kind == Distance::l1        ? size
               : options.kind == Distance::smooth_l1 ? (size < 1 ? d * d / 2 : size - 0.5)
                                                     : lin.at(c) * u * u;
      }
      const double count = options.kind == Distance::lpips ? 1 : static_cast<double>(s.c);
      if (options.mean) sum /= count * (options.spatial ? 1 : static_cast<double>(pixels));
      out[options.spatial ? n * pixels + p : n] += sum;
    }
  }
  return out;
}

void fill_maps(TestMap& a, TestMap& b, uint64_t seed) {
  Random random(seed);
  Tensor draw = make({a.shape.elements()}, a.t.dtype);
  for (TestMap* m : {&a, &b}) {
    fill(draw, random, -2, 2);
    for (int64_t i = 0; i < a.shape.elements(); ++i) m->set(i, draw.at(i));
  }
}

std::vector<Options> all_options() {
  std::vector<Options> all;
  for (const Distance kind : {Distance::mse, Distance::l1, Distance::smooth_l1, Distance::lpips, Distance::gram}) {
    for (const bool mean : {true, false}) {
      all.push_back({kind, mean, false});
      if (kind != Distance::gram) all.push_back({kind, mean, true});
    }
  }
  return all;
}

Tensor lin_of(int64_t channels, Dtype dtype) {
  Random random(2);
  Tensor lin = make({channels}, Dtype::f32), cast = make({channels}, compute(dtype));
  fill(lin, random, 0, 1);
  for (int64_t c = 0; c < channels; ++c) cast.set(c, lin.at(c));
  return cast;
}

std::string name_of(const Options& o, const std::string& isa) {
  return "kind " + std::to_string(static_cast<int>(o.kind)) + (o.mean ? " mean" : " sum") +
         (o.spatial ? " spatial, " : ", ") + isa;
}

void test_definitions() {
  const Shape4 shape{2, 5, 3, 2};
  TestMap a(shape, Dtype::f64, Order::nchw), b(shape, Dtype::f64, Order::nhwc);
  fill_maps(a, b, 1);
  const Tensor lin = lin_of(shape.c, Dtype::f64);
  for_each_isa([&](const std::string& isa) {
    for (const Options& o : all_options()) {
      const std::string name = name_of(o, isa);
      const Values expected = definition(a, b, o, lin);
      CHECK(error(forward(a, b, o, lin, serially), expected) <= 1e-14, "%s", name.c_str());
      Values grad;
      for (size_t i = 0; i < expected.size(); ++i) grad.push_back(0.5 + static_cast<double>(i % 3));
      const auto [ga, gb] = backward(a, b, o, lin, grad, serially, Order::nchw);
      Values numeric;
      for (TestMap* m : {&a, &b}) {
        numeric.clear();
        for (int64_t i = 0; i < shape.elements(); ++i) {
          const double was = m->at(i), step = 1e-6;
          double slope = 0;
          for (const double sign : {1.0, -1.0}) {
            m->set(i, was + sign * step);
            const Values moved = definition(a, b, o, lin);
            for (size_t k = 0; k < moved.size(); ++k) slope += sign * grad[k] * moved[k] / (2 * step);
          }
          m->set(i, was);
          numeric.push_back(slope);
        }
        const double wrong = error(m == &a ? ga : gb, numeric);
        CHECK(wrong <= 1e-7, "gradient of %s: off by %g", name.c_str(), wrong);
      }
    }
  });
}

void test_types_and_layouts() {
  // The last one is large enough for several tasks.
  const Shape4 shapes[] = {{2, 96, 5, 7}, {1, 33, 9, 7}, {3, 16, 1, 1}, {1, 3, 20, 15}, {2, 40, 33, 31}};
  for_each_isa([&](const std::string& isa) {
    for (const Shape4& shape : shapes) {
      for (const Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f16}) {
        if (shape.h == 33 && (dtype != Dtype::f32 || cpu::isa() != cpu::best_isa())) continue;
        TestMap a(shape, dtype, Order::nhwc), b(shape, dtype, Order::nhwc);
        fill_maps(a, b, 3);
        TestMap wide_a(shape, Dtype::f64, Order::nchw), wide_b(shape, Dtype::f64, Order::nchw);
        for (int64_t i = 0; i < shape.elements(); ++i) {
          wide_a.set(i, a.at(i));
          wide_b.set(i, b.at(i));
        }
        const Tensor lin = lin_of(shape.c, dtype), wide_lin = lin_of(shape.c, Dtype::f64);
        for (const Options& o : all_options()) {
          const std::string name = name_of(o, isa);
          const Values expected = forward(wide_a, wide_b, o, wide_lin, serially);
          Values grad(expected.size());
          for (size_t i = 0; i < grad.size(); ++i) {
            grad[i] = (0.5 + static_cast<double>(i % 3)) * (dtype == Dtype::f16 && o.mean && !o.spatial ? 1024 : 1);
          }
          const auto wanted = backward(wide_a, wide_b, o, wide_lin, grad, serially, Order::nchw);
          for (const Order order : {Order::nchw, Order::nhwc, Order::sparse}) {
            TestMap x(shape, dtype, order), y(shape, dtype, order == Order::sparse ? Order::nchw : order);
            for (int64_t i = 0; i < shape.elements(); ++i) {
              x.set(i, a.at(i));
              y.set(i, b.at(i));
            }
            const Values got = forward(x, y, o, lin, serially);
            // Gram matrices are nearly equal, so that their difference has lost some digits.
            CHECK(error(got, expected) <= (o.kind == Distance::gram ? 1e-5 : 1e-6), "%s, order %d: off by %g",
                  name.c_str(), static_cast<int>(order), error(got, expected));
            CHECK(forward(x, y, o, lin, on_threads) == got, "%s: threads", name.c_str());
            const double bound = dtype == Dtype::f32 ? 2e-6 : dtype == Dtype::f16 ? 1e-2 : 4e-3;
            const auto grads = backward(x, y, o, lin, grad, serially, order);
            CHECK(error(grads.first, wanted.first) <= bound && error(grads.second, wanted.second) <= bound,
                  "gradient of %s, order %d, dtype %d: off by %g and %g", name.c_str(), static_cast<int>(order),
                  static_cast<int>(dtype), error(grads.first, wanted.first), error(grads.second, wanted.second));
            CHECK(backward(x, y, o, lin, grad, backwards, order) == grads, "gradient of %s: threads", name.c_str());
          }
        }
      }
    }
  });
}

// l1 and lpips at their corners: equal maps, pixels that are 0, values that are not finite stay where they are.
void test_special() {
  const Shape4 shape{3, 20, 2, 3};
  const int64_t image = shape.c * shape.h * shape.w;
  const Tensor lin = lin_of(shape.c, Dtype::f32);
  for_each_isa([&](const std::string& isa) {
    for (const Options& o : all_options()) {
      const std::string name = name_of(o, isa);
      TestMap a(shape, Dtype::f32, Order::nchw), b(shape, Dtype::f32, Order::nchw);
      fill_maps(a, b, 4);
      for (int64_t i = 0; i < image; ++i) {
        b.set(i, a.at(i));    // image 0: equal
        a.set(image + i, 0);  // image 1: every pixel 0
        if (i == 3) a.set(2 * image + i, NAN);
      }
      const Values out = forward(a, b, o, lin, serially);
      const Values grad(out.size(), 1);
      const auto [ga, gb] = backward(a, b, o, lin, grad, serially, Order::nchw);
      const int64_t each = static_cast<int64_t>(out.size()) / shape.n;
      bool zero = true, finite = true, spread = false;
      for (int64_t i = 0; i < each; ++i) {
        zero = zero && out[i] == 0;
        finite = finite && std::isfinite(out[each + i]);
        spread = spread || std::isnan(out[2 * each + i]);
      }
      for (int64_t i = 0; i < image; ++i) {
        zero = zero && ga[i] == 0 && gb[i] == 0;
        finite = finite && std::isfinite(ga[image + i]) && std::isfinite(gb[image + i]);
        if (o.kind == Distance::lpips) finite = finite && ga[image + i] == 0;
      }
      CHECK(zero, "equal maps, %s", name.c_str());
      CHECK(finite, "zero maps, %s", name.c_str());
      CHECK(spread, "a NaN is lost, %s", name.c_str());
    }
  });
}

}  // namespace
}  // namespace vaeops::test

int main() {
  vaeops::test::test_definitions();
  vaeops::test::test_types_and_layouts();
  vaeops::test::test_special();
  return vaeops::test::report();
}
