// vq_assign of every instruction set against its definition, on inputs that are hard for a search in reduced precision.
#include <algorithm>
#include <functional>
#include <numeric>
#include <string>
#include <thread>

#include "check.h"
#include "tensors.h"

namespace vaeops::test {
namespace {

using Random = std::mt19937_64;

void serially(int64_t n, void (*body)(void*, int64_t, int64_t), void* context) { body(context, 0, n); }

void on_threads(int64_t n, void (*body)(void*, int64_t, int64_t), void* context) {
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < 3; ++i) threads.emplace_back(body, context, n * i / 3, n * (i + 1) / 3);
  for (std::thread& thread : threads) thread.join();
}

struct Problem {
  std::string name;
  int64_t rows, codes, dims;
  Tensor x, codebook;  // [rows, dims], [codes, dims]

  Problem(std::string what, int64_t n, int64_t k, int64_t d, Dtype x_dtype, Dtype codebook_dtype,
          Layout layout = Layout::contiguous)
      : name(what + " " + std::to_string(n) + "x" + std::to_string(k) + "x" + std::to_string(d)),
        rows(n),
        codes(k),
        dims(d),
        x(make({n, d}, x_dtype, layout)),
        codebook(make({k, d}, codebook_dtype)) {}
  void set_x(int64_t n, int64_t d, double value) { x.set(n * x.stride[0] + d * x.stride[1], value); }
  double x_at(int64_t n, int64_t d) const { return x.at(n * x.stride[0] + d * x.stride[1]); }
  double e_at(int64_t k, int64_t d) const { return codebook.at(k * dims + d); }
};

// All scores by the definition; inf where a code is never chosen.
std::vector<double> scores_of(const Problem& p, Metric metric) {
  std::vector<double> scores(static_cast<size_t>(p.rows * p.codes), INFINITY);
  for (int64_t k = 0; k < p.codes; ++k) {
    double h = 0;
    bool good = true;
    for (int64_t d = 0; d < p.dims; ++d) {
      h = std::fma(p.e_at(k, d), p.e_at(k, d), h);
      good = good && std::isfinite(p.e_at(k, d));
    }
    if (!good || (metric == Metric::cosine && h == 0)) continue;
    for (int64_t n = 0; n < p.rows; ++n) {
      double t = 0;
      bool finite = true;
      for (int64_t d = 0; d < p.dims; ++d) {
        t = std::fma(p.x_at(n, d), p.e_at(k, d), t);
        finite = finite && std::isfinite(p.x_at(n, d));
      }
      const double s = metric == Metric::l2 ? 0.5 * h - t : metric == Metric::dot ? -t : -t / std::sqrt(h);
      if (finite && s < INFINITY) scores[n * p.codes + k] = s;
    }
  }
  return scores;
}

VqAssign call_of(const Problem& p, Metric metric, std::vector<int64_t>& indices) {
  VqAssign call{};
  call.shape.ndim = 1;
  call.shape.size[0] = call.shape.n = call.shape.rows = p.rows;
  call.shape.width = 1;
  call.x.operand.data = p.x.data();
  call.x.operand.dtype = p.x.dtype;
  call.x.operand.stride[0] = p.x.stride[0];
  call.x.step = p.x.stride[1];
  call.codebook = p.codebook.data();
  call.codebook_dtype = p.codebook.dtype;
  call.dims = p.dims;
  call.codes = p.codes;
  call.metric = metric;
  call.exact = true;
  call.indices.data = indices.data();
  return call;
}

void for_each_isa(const std::function<void(int)>& run) {
  for (cpu::Isa isa : {cpu::Isa::scalar, cpu::Isa::avx2, cpu::Isa::avx512, cpu::Isa::amx}) {
    if (cpu::set_isa(isa)) run(static_cast<int>(isa));
  }
  cpu::set_isa(cpu::best_isa());
}

void check(const Problem& p) {
  for (Metric metric : {Metric::l2, Metric::cosine, Metric::dot}) {
    const std::vector<double> scores = scores_of(p, metric);
    std::vector<int64_t> expected(p.rows);
    for (int64_t n = 0; n < p.rows; ++n) {
      const auto row = scores.begin() + n * p.codes;
      expected[n] = std::min_element(row, row + p.codes) - row;
    }
    for_each_isa([&](int isa) {
      for (const ParallelFor parallel : {serially, on_threads}) {
        std::vector<int64_t> indices(p.rows, -7);
        cpu::vq_assign(call_of(p, metric, indices), parallel);
        int64_t wrong = 0;
        for (int64_t n = 0; n < p.rows; ++n) wrong += indices[n] != expected[n];
        CHECK(wrong == 0, "%s, metric %d, ISA %d: %lld rows", p.name.c_str(), static_cast<int>(metric), isa,
              static_cast<long long>(wrong));
      }
    });
  }
}

void check_topk(const Problem& p, int64_t k) {
  const std::vector<double> scores = scores_of(p, Metric::l2);
  for_each_isa([&](int isa) {
    std::vector<int64_t> indices(p.rows * k, -7), order(p.codes);
    std::vector<double> found(p.rows * k, NAN);
    VqAssign call = call_of(p, Metric::l2, indices);
    call.k = k;
    call.scores = found.data();
    call.scores_f64 = true;
    cpu::vq_assign(call, serially);
    int64_t wrong = 0;
    for (int64_t n = 0; n < p.rows; ++n) {
      const double* const row = scores.data() + n * p.codes;
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return row[a] < row[b]; });
      for (int64_t j = 0; j < k; ++j) wrong += indices[n * k + j] != order[j] || found[n * k + j] != row[order[j]];
    }
    CHECK(wrong == 0, "%s, k %lld, ISA %d: %lld", p.name.c_str(), static_cast<long long>(k), isa,
          static_cast<long long>(wrong));
  });
}

// Distributions by name: (x, e) of one element, from normal draws a and b.
Problem draw(const std::string& what, int64_t n, int64_t k, int64_t d, Dtype x_dtype, Dtype codebook_dtype,
             uint64_t seed = 1) {
  Problem p(what, n, k, d, x_dtype, codebook_dtype);
  Random random(seed);
  std::normal_distribution<double> normal;
  std::uniform_int_distribution<int64_t> any_code(0, k - 1);
  const double scale = what == "large" ? 1e15 : what == "small" ? 1e-15 : what == "subnormal" ? 1e-41 : 1;
  const double offset = what == "offset" ? 100 : what == "cluster" ? 1 : 0;
  const double spread = what == "cluster" ? 1e-6 : what == "taming" ? 1.0 / static_cast<double>(k) : 1;
  for (int64_t i = 0; i < k * d; ++i) {
    double v = normal(random);
    if (what == "heavy") v /= std::fabs(normal(random)) + 1e-6;
    if (what == "integers") v = std::rint(v);
    // Just above half a unit of bf16: the most that rounding loses, always to the same side.
    if (what == "worst") v = (v < 0 ? -1 : 1) * (1 + 0x1p-8 + 0x1p-20) * (1 + 0x1p-7 * static_cast<double>(i % 5));
    p.codebook.set(i, (v * spread + offset) * scale);
  }
  if (what == "duplicates") {
    for (int64_t i = 0; i < k * d; ++i) p.codebook.set(i, p.e_at(i / d % std::max<int64_t>(1, k / 3), i % d));
  }
  for (int64_t row = 0; row < n; ++row) {
    const int64_t a = any_code(random), b = any_code(random);
    for (int64_t j = 0; j < d; ++j) {
      double v = normal(random);
      if (what == "heavy") v /= std::fabs(normal(random)) + 1e-6;
      if (what == "integers") v = std::rint(v);
      if (what == "worst") v = (v < 0 ? -1 : 1) * (1 + 0x1p-8 + 0x1p-20);
      v = (v * (what == "cluster" ? 1e-3 : 1) + offset) * scale;
      if (what == "codes") v = p.e_at(a, j);
      if (what == "midpoints") v = 0.5 * (p.e_at(a, j) + p.e_at(b, j));
      if (what == "far") v *= 1e20;
      p.set_x(row, j, v);
    }
  }
  return p;
}

void test_distributions() {
  const struct {
    int64_t n, k, d;
  } sizes[] = {{97, 300, 64}, {250, 1100, 8}, {33, 260, 29}, {20, 5000, 4}, {17, 520, 100}, {9, 70, 257}, {40, 256, 1}};
  for (const auto& s : sizes) {
    for (const char* what : {"normal", "taming", "offset", "cluster", "large", "small", "subnormal", "heavy",
                             "integers", "duplicates", "codes", "midpoints", "far", "worst"}) {
      check(draw(what, s.n, s.k, s.d, Dtype::f32, Dtype::f32));
    }
    for (const char* what : {"normal", "offset", "cluster", "midpoints"}) {
      check(draw(what, s.n, s.k, s.d, Dtype::f64, Dtype::f64));
    }
  }
  for (Dtype x : {Dtype::f32, Dtype::bf16, Dtype::f16, Dtype::f64}) {
    for (Dtype codebook : {Dtype::f32, Dtype::bf16, Dtype::f16, Dtype::f64}) {
      check(draw("normal", 50, 300, 40, x, codebook));
      check(draw("offset", 50, 300, 40, x, codebook));
    }
  }
}

// 0, 1 and odd counts of everything; more than one task of rows, more than one panel of codes.
void test_sizes() {
  for (int64_t n : {1, 15, 241, 500}) {
    for (int64_t k : {1, 2, 17, 255, 257}) {
      for (int64_t d : {1, 9, 10, 33}) check(draw("normal", n, k, d, Dtype::f32, Dtype::f32, n + k + d));
    }
  }
  check(draw("normal", 5, 12000, 3, Dtype::f32, Dtype::f32));
  check(draw("normal", 4000, 257, 3, Dtype::f32, Dtype::f32));
  const Problem none("no rows", 0, 5, 3, Dtype::f32, Dtype::f32);
  std::vector<int64_t> indices;
  cpu::vq_assign(call_of(none, Metric::l2, indices), serially);
}

void test_topk() {
  for (const char* what : {"normal", "duplicates", "integers", "offset"}) {
    const Problem p = draw(what, 250, 700, 24, Dtype::f32, Dtype::f32);
    for (int64_t k : {1, 2, 5, 16, 17, 60, 700}) check_topk(p, k);
  }
}

void test_special_values() {
  Problem p = draw("special", 60, 600, 20, Dtype::f32, Dtype::f32);
  for (int64_t k = 0; k < 600; ++k) {
    if (k % 3 == 0) p.codebook.set(k * 20 + k % 20, NAN);
    if (k % 5 == 1) p.codebook.set(k * 20 + k % 20, k % 2 == 0 ? INFINITY : -INFINITY);
    if (k % 7 == 2) std::memset(p.codebook.data() + k * 80, 0, 80);
    if (k % 11 == 3) p.codebook.set(k * 20, 1e20);
  }
  for (int64_t n = 0; n < 60; n += 4) p.set_x(n, n % 20, n % 8 == 0 ? NAN : INFINITY);
  check(p);
  check_topk(p, 5);
  for (int64_t i = 0; i < 600 * 20; ++i) p.codebook.set(i, NAN);
  check(p);
  check_topk(p, 3);
}

void test_mask_and_layout() {
  const Problem p = draw("mask", 500, 300, 24, Dtype::f32, Dtype::f32);
  Problem turned("transposed", 500, 300, 24, Dtype::f32, Dtype::f32, Layout::transposed);
  turned.codebook = p.codebook;
  std::vector<uint8_t> mask(500);
  for (int64_t n = 0; n < 500; ++n) {
    mask[n] = n % 3 == 0;
    for (int64_t d = 0; d < 24; ++d) turned.set_x(n, d, p.x_at(n, d));
  }
  check(turned);
  std::vector<int64_t> all(500), masked(500);
  cpu::vq_assign(call_of(p, Metric::l2, all), serially);
  for_each_isa([&](int isa) {
    std::vector<int32_t> narrow(500);
    VqAssign call = call_of(p, Metric::l2, masked);
    call.mask = mask.data();
    cpu::vq_assign(call, serially);
    call.indices = {narrow.data(), true};
    cpu::vq_assign(call, serially);
    for (int64_t n = 0; n < 500; ++n) {
      CHECK(masked[n] == (mask[n] != 0 ? all[n] : -1), "row %d, ISA %d", static_cast<int>(n), isa);
      CHECK(narrow[n] == masked[n], "row %d, ISA %d", static_cast<int>(n), isa);
    }
  });
}

// Without the bounds nearly every row is right, and special values keep their rules.
void test_fast() {
  const Problem p = draw("fast", 1000, 700, 24, Dtype::f32, Dtype::f32);
  std::vector<int64_t> exact(1000), fast(1000);
  cpu::vq_assign(call_of(p, Metric::l2, exact), serially);
  for_each_isa([&](int isa) {
    VqAssign call = call_of(p, Metric::l2, fast);
    call.exact = false;
    cpu::vq_assign(call, serially);
    int64_t different = 0;
    for (int64_t n = 0; n < 1000; ++n) different += fast[n] != exact[n];
    CHECK(different <= 50, "%lld rows differ on ISA %d", static_cast<long long>(different), isa);
  });
}

}  // namespace
}  // namespace vaeops::test

int main() {
  vaeops::test::test_distributions();
  vaeops::test::test_sizes();
  vaeops::test::test_topk();
  vaeops::test::test_special_values();
  vaeops::test::test_mask_and_layout();
  vaeops::test::test_fast();
  return vaeops::test::report();
}
