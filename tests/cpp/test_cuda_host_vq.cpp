// The CUDA kernels of vector quantization, run on the CPU (cuda_host/): indices are the definition's, values fp64's,
// in any order of threads.
#include "vq_case.h"

namespace vaeops::test {
namespace {

constexpr Dtype kDtypes[] = {Dtype::f32, Dtype::bf16, Dtype::f16, Dtype::f64};
constexpr Metric kMetrics[] = {Metric::l2, Metric::cosine, Metric::dot};
constexpr Layout kLayouts[] = {Layout::contiguous, Layout::transposed, Layout::misaligned};

// Few codes: the exact scan alone.
void test_scan() {
  for (Metric metric : kMetrics) {
    for (const Sizes& rows : {Sizes{}, Sizes{1}, Sizes{3, 5}, Sizes{150}}) {
      check_assign({.rows = rows, .dims = 5, .codes = 70, .metric = metric});
    }
    check_assign({.rows = {20}, .dims = 1, .codes = 1, .metric = metric});
    check_assign({.rows = {20}, .dims = 17, .codes = 66, .metric = metric, .masked = true, .special = true});
  }
  for (Dtype dtype : kDtypes) {
    for (Dtype codebook : kDtypes) {
      check_assign({.rows = {2, 6}, .dims = 9, .codes = 33, .dtype = dtype, .codebook_dtype = codebook, .int32 = true});
    }
  }
}

// Many codes: the fast pass, and what it leaves.
void test_fast() {
  int64_t rows = 0, listed = 0;
  for (Metric metric : kMetrics) {
    for (int64_t dims : {1, 3, 8, 33}) {
      const VqCase c = {.rows = {140}, .dims = dims, .codes = 391, .metric = metric};
      const int64_t left = check_assign(c);
      if (dims == 1) continue;  // codes of one dim lie close together, and those of one cosine are all alike
      rows += 140;
      listed += left;
    }
    check_assign({.rows = {150}, .dims = 11, .codes = 200, .metric = metric, .masked = true, .special = true});
    check_assign({.rows = {20}, .dims = 9, .codes = 140, .metric = metric, .exact = true, .int32 = true});
  }
  std::printf("the fast pass left %d of %d rows to the scan\n", int(listed), int(rows));
  CHECK(listed * 50 < rows, "the bound settles too few rows: %d of %d left", int(listed), int(rows));
  for (Dtype dtype : kDtypes) {
    for (Dtype codebook : kDtypes) {
      check_assign({.rows = {3, 5}, .dims = 16, .codes = 150, .dtype = dtype, .codebook_dtype = codebook});
    }
    for (Layout layout : kLayouts)
      check_assign({.rows = {4, 6}, .dims = 8, .codes = 130, .dtype = dtype, .layout = layout});
  }
  // One or many blocks: all codes in a block, or split among blocks.
  for (int multiprocessors : {1, 40}) {
    cuda_host::options.multiprocessors = multiprocessors;
    check_assign({.rows = {137}, .dims = 12, .codes = 1100});
    check_assign({.rows = {140}, .dims = 4, .codes = 400, .data = Data::duplicates});
    check_assign({.rows = {70}, .dims = 4, .codes = 128});
  }
  cuda_host::options.multiprocessors = 3;
}

void test_distributions() {
  for (int kind = 0; kind < static_cast<int>(Data::kinds); ++kind) {
    const Data data = static_cast<Data>(kind);
    for (Metric metric : kMetrics) {
      const int64_t left = check_assign({.rows = {40}, .dims = 8, .codes = 300, .data = data, .metric = metric}, {1});
      std::printf("data %d, metric %d: %d of 40 rows left to the scan\n", kind, static_cast<int>(metric), int(left));
      if (data == Data::equal) CHECK(left == 40, "equal codes: %d rows left", int(left));
      if (data != Data::equal) CHECK(left <= 20, "data %d: %d rows left", kind, int(left));
    }
    check_assign(
        {.rows = {24}, .dims = 5, .codes = 260, .dtype = Dtype::f64, .codebook_dtype = Dtype::f64, .data = data}, {2});
    check_assign({.rows = {24}, .dims = 24, .codes = 260, .dtype = Dtype::bf16, .data = data}, {3});
  }
}

// Values whose squares leave the range of fp32, or of fp64.
void test_extreme_scales() {
  for (Metric metric : kMetrics) {
    for (double scale : {1e-320, 1e-160, 1e-42, 1e-25, 1e25, 1e38, 1e160}) {
      const Dtype dtype = scale > 1e-50 && scale < 1e39 ? Dtype::f32 : Dtype::f64;
      for (double other : {1.0, scale}) {
        VqProblem p({.rows = {9}, .dims = 6, .codes = 140, .dtype = dtype, .codebook_dtype = dtype, .metric = metric});
        for (int64_t i = 0; i < p.x.elements; ++i) {
          p.x.set(i, rounded(p.xs[i] * other / 4, dtype));
          p.xs[i] = p.x.at(i);
        }
        for (int64_t i = 0; i < p.codebook.elements; ++i) {
          p.codebook.set(i, rounded(p.es[i] * scale / 4, dtype));
          p.es[i] = p.codebook.at(i);
        }
        Nearest(p).check(p, run_assign(p));
      }
    }
  }
}

// Without the certificate an index may differ from the definition's where scores are close, nowhere else.
void test_uncertified() {
  for (Metric metric : kMetrics) {
    const VqProblem p(
        {.rows = {140}, .dims = 12, .codes = 300, .metric = metric, .exact = false, .masked = true, .special = true});
    const Assigned r = run_assign(p);
    for (int64_t n = 0; n < 140; ++n) {
      const int64_t got = r.indices.at(n);
      if (p.mask[n] == 0 || !p.finite_row(n)) {
        CHECK(got == (p.mask[n] == 0 ? -1 : 0), "row %d: %d", int(n), int(got));
        continue;
      }
      const std::vector<double> scores = canonical_scores(p, n);
      const double best = *std::min_element(scores.begin(), scores.end());
      CHECK(got >= 0 && got < 300 && scores[got] <= best + 1e-4, "row %d: %d", int(n), int(got));
    }
  }
}

void test_topk() {
  for (Metric metric : kMetrics) {
    for (int64_t k : {1, 2, 33, 70}) {
      check_assign({.rows = {9}, .dims = 5, .codes = 70, .metric = metric, .k = k, .masked = true, .special = true});
    }
  }
  check_assign({.rows = {5}, .dims = 3, .codes = 400, .data = Data::duplicates, .k = 100});
  check_assign({.rows = {70}, .dims = 3, .codes = 200, .dtype = Dtype::f64, .k = 4});
  check_assign({.rows = {3, 4},
                .dims = 8,
                .codes = 90,
                .dtype = Dtype::f16,
                .layout = Layout::transposed,
                .k = 5,
                .int32 = true});
  cuda_host::options.multiprocessors = 40;
  check_assign({.rows = {6}, .dims = 4, .codes = 500, .k = 40});
  cuda_host::options.multiprocessors = 3;
}

void test_gather() {
  for (RowReduction reduction : {RowReduction::off, RowReduction::none, RowReduction::mean, RowReduction::sum}) {
    for (int64_t dims : {1, 7, 16, 70}) {
      for (Layout layout : kLayouts) {
        check_gather(
            {.rows = {3, 61}, .dims = dims, .codes = 9, .layout = layout, .special = true, .reduction = reduction});
        check_gather({.rows = {3, 41}, .dims = dims, .codes = 9, .layout = layout, .reduction = reduction});
      }
    }
    for (Dtype dtype : kDtypes) {
      for (Dtype codebook : kDtypes) {
        check_gather({.rows = {21},
                      .dims = 10,
                      .codes = 5,
                      .dtype = dtype,
                      .codebook_dtype = codebook,
                      .int32 = true,
                      .reduction = reduction});
      }
    }
  }
}

void test_backward() {
  for (Estimator estimator : {Estimator::none, Estimator::ste, Estimator::rotation}) {
    for (int64_t dims : {1, 7, 16, 70}) {
      for (Layout layout : kLayouts) {
        for (bool weighted : {false, true}) {
          const VqCase c = {.rows = {3, 11},
                            .dims = dims,
                            .codes = 9,
                            .layout = layout,
                            .estimator = estimator,
                            .weighted = weighted};
          check_backward(c, true, true);
        }
      }
    }
    const VqCase c = {.rows = {21}, .dims = 10, .codes = 5, .estimator = estimator};
    check_backward(c, true, false);
    check_backward(c, false, true);
    check_backward(c, false, false);
    for (Dtype dtype : kDtypes) {
      for (Dtype codebook : kDtypes) {
        check_backward({.rows = {21},
                        .dims = 10,
                        .codes = 5,
                        .dtype = dtype,
                        .codebook_dtype = codebook,
                        .int32 = true,
                        .estimator = estimator},
                       true, true);
      }
    }
    // Rows, codes and their sums of length zero.
    VqCase small = {.rows = {12}, .dims = 8, .codes = 3, .data = Data::tiny, .estimator = estimator};
    check_backward(small, true, true);
  }
}

void test_segment_sum() {
  for (double absmax : {-1.0, 0.0, 3.0, 4.0}) {
    for (int64_t dims : {1, 7, 16, 70}) {
      for (Layout layout : kLayouts) {
        check_segment_sum({.rows = {3, 110}, .dims = dims, .codes = 9, .layout = layout, .special = true}, true,
                          absmax);
      }
    }
    for (Dtype dtype : kDtypes) {
      for (Dtype codebook : kDtypes) {
        check_segment_sum(
            {.rows = {40}, .dims = 5, .codes = 300, .dtype = dtype, .codebook_dtype = codebook, .int32 = true}, false,
            absmax);
      }
    }
    check_segment_sum({.rows = {1500}, .dims = 3, .codes = 2}, false, absmax);  // long segments
    check_segment_sum({.rows = {0}, .dims = 3, .codes = 2}, false, absmax);
  }
  for (bool special : {false, true}) {
    check_segment_sum({.rows = {700}, .dims = 5, .codes = 3, .special = special, .weighted = true}, special, -1);
    check_segment_sum(
        {.rows = {60}, .dims = 40, .codes = 8, .dtype = Dtype::bf16, .special = special, .weighted = true}, special,
        -1);
  }
  // Values of rows that are not skipped stay in their code and dim.
  VqProblem p({.rows = {6}, .dims = 2, .codes = 3});
  p.x.set(4, NAN);
  int64_t index[6] = {0, 0, 1, 1, 2, 2};
  float counts[3], sums[6];
  const Merge merge = p.merge({p.x.stride});
  VqSegmentSum call{};
  call.shape = merge.shape(6, 6);
  call.indices = {index, false};
  call.values = p.rows_of(merge, p.x, 0);
  call.dims = 2;
  call.codes = 3;
  call.counts = counts;
  call.sums = sums;
  ScratchMemory memory;
  CHECK(cuda::vq_segment_sum(call, memory.scratch(cuda::vq_segment_sum_scratch(call)), nullptr) == 0, "launch");
  for (int i = 0; i < 6; ++i) CHECK(std::isnan(sums[i]) == (i == 2), "sum %d: %g", i, sums[i]);
}

// A row's index hangs on nothing but the row and the codebook.
void test_rows_alone() {
  const VqCase c = {.rows = {130}, .dims = 7, .codes = 180, .data = Data::fitted};
  const VqProblem all(c);
  const Assigned want = run_assign(all);
  for (int64_t n : {0, 64, 129}) {
    VqProblem one(c);
    one.c.rows = {1};
    one.x = make({1, 7}, Dtype::f32);
    for (int64_t d = 0; d < 7; ++d) one.x.set(d, all.xs[n * 7 + d]);
    CHECK(run_assign(one).indices.at(0) == want.indices.at(n), "row %d", int(n));
  }
}

// No index reads or writes outside of the codebook.
void test_indices_out_of_range() {
  for (bool int32 : {false, true}) {
    VqProblem p({.rows = {3}, .dims = 2, .codes = 4, .int32 = int32});
    int64_t wide[3] = {4, -7, int64_t{1} << 40};
    int32_t narrow[3] = {4, -7, 1 << 30};
    const Tensor quantized = make(p.shape, Dtype::f32);
    const Merge merge = p.merge({quantized.stride});
    VqGather call{};
    p.set(call);
    call.shape = merge.shape(3, 3);
    call.indices = {int32 ? static_cast<void*>(narrow) : wide, int32};
    call.quantized = p.rows_of(merge, quantized, 0);
    call.fill = 5;
    CHECK(cuda::vq_gather(call, {}, nullptr) == 0, "launch");
    for (int i = 0; i < 6; ++i) CHECK(quantized.at(i) == 5, "element %d: %g", i, quantized.at(i));
  }
}

void test_empty() {
  const VqCase c = {.rows = {0}, .dims = 4, .codes = 6};
  check_assign(c);
  check_gather(c);
  check_gather({.rows = {0}, .dims = 4, .codes = 6, .reduction = RowReduction::none});
  check_backward(c, true, true);
}

}  // namespace
}  // namespace vaeops::test

int main() {
  using namespace vaeops::test;
  test_scan();
  test_fast();
  test_distributions();
  test_extreme_scales();
  test_uncertified();
  test_topk();
  test_gather();
  test_backward();
  test_segment_sum();
  test_rows_alone();
  test_indices_out_of_range();
  test_empty();
  return report();
}
