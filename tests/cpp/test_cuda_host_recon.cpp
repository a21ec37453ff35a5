// The CUDA kernels of the reconstruction losses, run on the CPU (cuda_host/): values are the formulas', elements
// without a transcendental the C++ kernels' bits, and all of them the same in any order of threads.
#include "run_recon.h"

namespace vaeops::test {
namespace {

constexpr Dtype kDtypes[] = {Dtype::f32, Dtype::bf16, Dtype::f16, Dtype::f64};
constexpr Reduction kReductions[] = {Reduction::none,      Reduction::dim,  Reduction::sample,
                                     Reduction::batchmean, Reduction::mean, Reduction::sum};

void test_kinds() {
  for (int kind = 0; kind < kKinds; ++kind) {
    for (Dtype dtype : kDtypes) {
      for (Reduction reduction : kReductions) {
        if (kind == kMultinomial && reduction != Reduction::sample) continue;
        const Given target{.dtype = dtype};
        check_cuda({.shape = {6, 24}, .dtype = dtype, .kind = kind, .reduction = reduction, .target = target}, 0);
        check_cuda({.shape = {5, 7}, .dtype = dtype, .kind = kind, .reduction = reduction, .target = target}, 0);
      }
    }
  }
}

// Every type of target under every type of weight, some broadcast, in each layout.
void test_operands() {
  std::vector<Given> targets = {{.bytes = true}}, weights = {{.present = false}, {.bytes = true}};
  for (Dtype dtype : kDtypes) {
    targets.push_back({.dtype = dtype});
    weights.push_back({.dtype = dtype});
  }
  weights.push_back({.bytes = true, .kept = {false, true}});
  weights.push_back({.kept = {true, false}});
  for (int kind : {static_cast<int>(ReconKind::mse), kMultinomial}) {
    for (Dtype dtype : kDtypes) {
      for (const Given& target : targets) {
        for (const Given& weight : weights) {
          const ReconCase c = {.shape = {4, 40}, .dtype = dtype, .kind = kind, .target = target, .weight = weight};
          check_cuda(c, 0);
        }
      }
      const Given weight = {.kept = {false, true}};
      check_cuda({.shape = {3, 24}, .dtype = dtype, .kind = kind, .target = {.bytes = true}, .levels = 1}, 0);
      check_cuda({.shape = {3, 24}, .dtype = dtype, .kind = kind, .target = {.kept = {false, true}}}, 0);
      for (Layout layout : {Layout::transposed, Layout::misaligned}) {
        check_cuda({.shape = {5, 16}, .dtype = dtype, .kind = kind, .weight = weight, .layout = layout}, 0);
        check_cuda({.shape = {6, 13}, .dtype = dtype, .kind = kind, .target = {.bytes = true}, .layout = layout}, 0);
      }
    }
  }
  for (Layout layout : {Layout::contiguous, Layout::transposed, Layout::misaligned}) {
    const Given weight = {.bytes = true, .kept = {true, false, true}};
    for (Reduction reduction : kReductions) {
      check_cuda({.shape = {4, 3, 16}, .batch_ndim = 2, .reduction = reduction, .weight = weight, .layout = layout}, 0);
    }
  }
}

// Rows for teams of every size, and in several tiles; sums that blocks share.
void test_sizes() {
  constexpr Reduction summed[] = {Reduction::dim, Reduction::sample, Reduction::batchmean};
  const Sizes shapes[] = {{1, 1}, {97, 63}, {40, 64}, {700, 3}, {7, 300}, {3, 2056}, {2, 9000}, {2, 20001}};
  for (const Sizes& shape : shapes) {
    for (Reduction reduction : summed) check_cuda({.shape = shape, .reduction = reduction}, 1);
    check_cuda({.shape = shape, .kind = kMultinomial}, 1);
    check_cuda({.shape = shape, .dtype = Dtype::bf16, .kind = kMultinomial, .target = {.bytes = true}}, 1);
  }
  cuda_host::options.multiprocessors = 40;
  for (Reduction reduction : summed) check_cuda({.shape = {300, 40}, .reduction = reduction}, 1);
  check_cuda({.shape = {2, 20001}, .kind = kMultinomial}, 1);
  cuda_host::options.multiprocessors = 3;
}

void test_empty() {
  for (const Sizes& shape : {Sizes{0, 5}, Sizes{4, 0}, Sizes{0, 0}}) {
    for (Reduction reduction : kReductions) {
      if (reduction != Reduction::dim) check_cuda({.shape = shape, .reduction = reduction}, 1);  // the caller's
    }
    check_cuda({.shape = shape, .kind = kMultinomial}, 1);
  }
}

// Operands whose rows are longer than what is looked at, as in a slice of a larger tensor.
void test_strided_rows() {
  for (int64_t pitch : {32, 29}) {
    for (Dtype dtype : {Dtype::f32, Dtype::bf16}) {
      for (int kind : {static_cast<int>(ReconKind::mse), static_cast<int>(ReconKind::l1), kMultinomial}) {
        ReconProblem plain({.shape = {5, 24}, .dtype = dtype, .kind = kind, .reduction = Reduction::sample});
        ReconProblem sliced = plain;
        for (Tensor* t : {&sliced.pred, &sliced.target}) {
          const Tensor whole = *t;
          *t = make({5, pitch}, whole.dtype);
          for (int64_t i = 0; i < 120; ++i) t->set(i / 24 * pitch + i % 24, whole.at(i));
        }
        CHECK(same(run_cuda(sliced).values(plain), run_cuda(plain).values(plain)), "rows of %d: %s",
              static_cast<int>(pitch), plain.c.name().c_str());
      }
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
    for (int64_t i = 0; i < 256; ++i) p.target.set(i, static_cast<double>(i)), p.pred.set(i, 0);
    const ReconResults distance = run_cuda(p);
    for (int64_t i = 0; i < 256; ++i) {
      const double level = static_cast<double>(i) / 255;
      const double rounded = dtype == Dtype::f64 ? level : static_cast<float>(level);
      CHECK(distance.loss.at(i) == rounded, "level %d: %.17g", static_cast<int>(i), distance.loss.at(i));
      p.pred.set(i, rounded);
    }
    const ReconResults none = run_cuda(p);
    for (int64_t i = 0; i < 256; ++i) CHECK(none.loss.at(i) == 0 && none.gradient.at(i) == 0, "no distance");
  }
}

// Logits whose common size leaves few digits in fp32 to what tells them apart, in a row of one tile and of three.
void test_large_logits() {
  for (Dtype dtype : {Dtype::f32, Dtype::f64}) {
    for (int64_t width : {40, 1500, 17000}) {
      ReconProblem p({.shape = {3, width}, .dtype = dtype, .kind = kMultinomial});
      for (int64_t i = 0; i < p.n; ++i) p.pred.set(i, p.pred.at(i) + 1e4);
      check_cuda(p, 1);
    }
  }
}

// A row's bits hang on nothing but the row.
void test_rows_alone() {
  for (int kind : {static_cast<int>(ReconKind::bce_logits), kMultinomial}) {
    for (int64_t width : {5, 64, 600, 2048, 20000}) {
      const ReconProblem many({.shape = {6, width}, .kind = kind, .reduction = Reduction::sample});
      const ReconResults all = run_cuda(many);
      for (int64_t row : {0, 3, 5}) {
        ReconProblem one({.shape = {1, width}, .kind = kind, .reduction = Reduction::sample});
        for (int64_t i = 0; i < width; ++i) {
          one.pred.set(i, many.pred.at(row * width + i));
          one.target.set(i, many.target.at(row * width + i));
        }
        const ReconResults alone = run_cuda(one);
        CHECK(alone.loss.at(0) == all.loss.at(row), "row %d of length %d", int(row), int(width));
        if (kind == kMultinomial) CHECK(alone.lse.at(0) == all.lse.at(row), "lse of row %d", int(row));
      }
    }
  }
}

// NaN and infinity stay in their element and row.
void test_special_values() {
  for (int64_t width : {16, 19, 9000}) {
    ReconProblem p({.shape = {6, width}, .kind = kMultinomial});
    p.pred.set(width + 3, NAN);
    for (int64_t i = 0; i < width; ++i) p.pred.set(2 * width + i, -INFINITY), p.target.set(2 * width + i, 0);
    p.pred.set(3 * width + 1, -INFINITY);
    p.target.set(3 * width + 1, 0);
    p.pred.set(4 * width + width - 1, INFINITY);
    p.target.set(4 * width + width - 1, 0);
    const ReconResults r = run_cuda(p);
    for (int64_t row = 0; row < 6; ++row) {
      const double lse = r.lse.at(row), nll = r.loss.at(row);
      CHECK(row == 1   ? std::isnan(lse)
            : row == 2 ? lse == -INFINITY && nll == 0
            : row == 4 ? lse == INFINITY && nll == INFINITY
                       : std::isfinite(lse) && std::isfinite(nll),
            "row %d of %d: %g, %g", int(row), int(width), lse, nll);
      for (int64_t i = 0; i < width; ++i) {
        const double g = r.gradient.at(row * width + i);
        const bool lost = row == 1 || (row == 4 && i == width - 1);
        CHECK(std::isnan(g) == lost, "gradient %d of row %d of %d: %g", int(i), int(row), int(width), g);
      }
    }
  }
  for (int64_t width : {16, 9}) {
    ReconProblem p(
        {.shape = {3, width}, .kind = static_cast<int>(ReconKind::bce_logits), .reduction = Reduction::none});
    p.pred.set(0, NAN);
    p.pred.set(1, INFINITY), p.target.set(1, 1);
    p.pred.set(2, -INFINITY), p.target.set(2, 0);
    p.pred.set(3, INFINITY), p.target.set(3, 0.5);
    const ReconResults r = run_cuda(p);
    CHECK(std::isnan(r.loss.at(0)) && std::isnan(r.gradient.at(0)), "NaN: %g", r.loss.at(0));
    CHECK(r.loss.at(1) == 0 && r.loss.at(2) == 0 && r.gradient.at(1) == 0 && r.gradient.at(2) == 0, "a right infinity");
    CHECK(r.loss.at(3) == INFINITY, "a wrong one: %g", r.loss.at(3));
    for (int64_t i = 4; i < p.n; ++i) CHECK(std::isfinite(r.loss.at(i)), "loss %d", int(i));
  }
}

// A multinomial of dims that are neither R nor D is refused.
void test_refused() {
  MultinomialForward forward{};
  forward.shape = {3, {2, 3, 4}, 24, 2, 12};
  MultinomialBackward backward{};
  backward.shape = forward.shape;
  CHECK(cuda::multinomial_forward(forward, {}, nullptr) != 0, "forward");
  CHECK(cuda::multinomial_backward(backward, nullptr) != 0, "backward");
}

}  // namespace
}  // namespace vaeops::test

int main() {
  using namespace vaeops::test;
  test_kinds();
  test_operands();
  test_sizes();
  test_empty();
  test_strided_rows();
  test_levels();
  test_large_logits();
  test_rows_alone();
  test_special_values();
  test_refused();
  return report();
}
