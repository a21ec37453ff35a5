// The reconstruction losses in C++: every instruction set's values are the formulas', and its bits the same as every
// other one's, in any layout and any order of tasks.
#include "recon_case.h"

namespace vaeops::test {
namespace {

constexpr Dtype kDtypes[] = {Dtype::f32, Dtype::bf16, Dtype::f16, Dtype::f64};
constexpr Reduction kReductions[] = {Reduction::none,      Reduction::dim,  Reduction::sample,
                                     Reduction::batchmean, Reduction::mean, Reduction::sum};

// Values once, on the instruction set that serves here; the bits of all the others are compared with its.
void check(const ReconCase& c) {
  ReconProblem p(c);
  p.hide();
  const ReconResults best = run(p, serially);
  check_values(p, best, c.name());
  const std::vector<double> bits = best.values(p);
  for_each_isa([&](const std::string& isa) {
    const std::string where = c.name() + ", " + isa;
    CHECK(same(run(p, backwards).values(p), bits), "the order of tasks, or the instruction set: %s", where.c_str());
    if (c.layout != Layout::contiguous) return;
    for (Layout layout : {Layout::transposed, Layout::misaligned}) {
      ReconCase other = c;
      other.layout = layout;
      ReconProblem q(other);
      q.hide();
      CHECK(same(run(q, serially).values(q), bits), "layout %d: %s", static_cast<int>(layout), where.c_str());
    }
  });
}

std::vector<Reduction> reductions(int kind) {
  if (kind == kMultinomial) return {Reduction::sample};
  return {std::begin(kReductions), std::end(kReductions)};
}

void test_kinds() {
  for (int kind = 0; kind < kKinds; ++kind) {
    for (Dtype dtype : kDtypes) {
      for (Reduction reduction : reductions(kind)) {
        const Given target{.dtype = dtype};
        check({.shape = {3, 5, 67}, .dtype = dtype, .kind = kind, .reduction = reduction, .target = target});
        check({.shape = {70, 3}, .dtype = dtype, .kind = kind, .reduction = reduction, .target = target});
      }
    }
  }
}

// Every type of target under every type of weight, some broadcast.
void test_operands() {
  std::vector<Given> targets = {{.bytes = true}}, weights = {{.present = false}, {.bytes = true}};
  for (Dtype dtype : kDtypes) {
    targets.push_back({.dtype = dtype});
    weights.push_back({.dtype = dtype});
  }
  weights.push_back({.bytes = true, .kept = {false, true, true}});
  weights.push_back({.kept = {true, false, false}});
  for (int kind : {static_cast<int>(ReconKind::bce_logits), static_cast<int>(ReconKind::l1), kMultinomial}) {
    for (Dtype dtype : kDtypes) {
      for (const Given& target : targets) {
        for (const Given& weight : weights) {
          check({.shape = {4, 3, 43}, .dtype = dtype, .kind = kind, .target = target, .weight = weight});
        }
      }
      check({.shape = {4, 3, 43}, .dtype = dtype, .kind = kind, .target = {.bytes = true}, .levels = 1});
      check({.shape = {4, 3, 43}, .dtype = dtype, .kind = kind, .target = {.kept = {false, true, true}}});
    }
  }
}

// Rows that share tiles, that are tiles, that are several; more elements than one thread is given.
void test_sizes() {
  const Sizes shapes[] = {{1, 1}, {1, 63}, {97, 7}, {40, 1024}, {3, 12288}, {2, 17000}, {0, 5}, {4, 0}};
  for (const Sizes& shape : shapes) {
    for (int kind : {static_cast<int>(ReconKind::mse), kMultinomial}) {
      for (Reduction reduction : reductions(kind)) {
        check({.shape = shape, .kind = kind, .reduction = reduction});
        check({.shape = shape, .dtype = Dtype::bf16, .kind = kind, .reduction = reduction, .target = {.bytes = true}});
      }
    }
  }
}

void test_threads() {
  for (int kind = 0; kind < kKinds; ++kind) {
    for (Reduction reduction : reductions(kind)) {
      const ReconProblem p({.shape = {5, 9001}, .kind = kind, .reduction = reduction});
      CHECK(same(run(p, on_threads).values(p), run(p, serially).values(p)), "threads: %s", p.c.name().c_str());
    }
  }
}

// A level of an 8-bit image is the quotient, correctly rounded, and a difference of 0 has gradient 0.
void test_levels() {
  for (Dtype dtype : {Dtype::f32, Dtype::f64}) {
    ReconProblem p({.shape = {1, 256},
                    .dtype = dtype,
                    .kind = static_cast<int>(ReconKind::l1),
                    .reduction = Reduction::none,
                    .target = {.bytes = true}});
    for (int64_t i = 0; i < 256; ++i) p.target.set(i, static_cast<double>(i));
    for_each_isa([&](const std::string& isa) {
      for (int64_t i = 0; i < 256; ++i) p.pred.set(i, 0);
      const ReconResults distance = run(p, serially);
      for (int64_t i = 0; i < 256; ++i) {
        const double level = static_cast<double>(i) / 255;
        const double rounded = dtype == Dtype::f64 ? level : static_cast<float>(level);
        CHECK(distance.loss.at(i) == rounded, "level %d, %s", static_cast<int>(i), isa.c_str());
        p.pred.set(i, rounded);
      }
      const ReconResults none = run(p, serially);
      for (int64_t i = 0; i < 256; ++i) {
        CHECK(none.loss.at(i) == 0 && none.gradient.at(i) == 0, "no distance, %s", isa.c_str());
      }
    });
  }
}

// Logits whose common size leaves few digits in fp32 to what tells them apart.
void test_large_logits() {
  for (Dtype dtype : {Dtype::f32, Dtype::f64}) {
    ReconProblem p({.shape = {3, 1500}, .dtype = dtype, .kind = kMultinomial});
    for (int64_t i = 0; i < p.n; ++i) p.pred.set(i, p.pred.at(i) + 1e4);
    for_each_isa([&](const std::string& isa) { check_values(p, run(p, serially), p.c.name() + ", " + isa); });
  }
}

}  // namespace
}  // namespace vaeops::test

int main() {
  using namespace vaeops::test;
  test_kinds();
  test_operands();
  test_sizes();
  test_threads();
  test_levels();
  test_large_logits();
  return report();
}
