// Calls of vector quantization, run through the CUDA launchers on the CPU and checked against the definition.
#pragma once
#include <algorithm>
#include <string>

#include "cuda_host.h"
#include "scratch.h"

namespace vaeops::test {

// How x and the codebook are drawn.
enum class Data { normal, taming, fitted, offset, midpoints, duplicates, near, cauchy, tiny, huge, equal, kinds };

struct VqCase {
  Sizes rows = {5};
  int64_t dims = 3, codes = 7;
  Dtype dtype = Dtype::f32, codebook_dtype = Dtype::f32;
  Layout layout = Layout::contiguous;  // of what is shaped like x; transposed: the last row dim is contiguous
  Data data = Data::normal;
  Metric metric = Metric::l2;
  int64_t k = 0;
  bool exact = true, masked = false, int32 = false;
  bool special = false;  // some rows and codes hold NaN and Inf, one code is zero
  RowReduction reduction = RowReduction::mean;
  Estimator estimator = Estimator::ste;
  bool weighted = false;

  int64_t n() const { return product(rows); }
  Dtype wide() const { return dtype == Dtype::f64 ? dtype : compute(codebook_dtype); }
  std::string name() const {
    std::string s = "rows";
    for (int64_t r : rows) s += " " + std::to_string(r);
    s += ", D " + std::to_string(dims) + ", K " + std::to_string(codes) + ", k " + std::to_string(k);
    const int options[] = {static_cast<int>(dtype),     static_cast<int>(codebook_dtype), static_cast<int>(layout),
                           static_cast<int>(data),      static_cast<int>(metric),         static_cast<int>(exact),
                           static_cast<int>(masked),    static_cast<int>(int32),          static_cast<int>(special),
                           static_cast<int>(reduction), static_cast<int>(estimator),      static_cast<int>(weighted)};
    s += ", dtypes layout data metric exact masked int32 special reduction estimator weighted";
    for (int option : options) s += " " + std::to_string(option);
    return s;
  }
};

// The value as a dtype holds it.
inline double rounded(double x, Dtype dtype) {
  if (dtype == Dtype::f64) return x;
  const float single = static_cast<float>(x);
  const uint16_t bits = dtype == Dtype::bf16 ? __bfloat16_as_ushort(__float2bfloat16_rn(single))
                                             : __half_as_ushort(__float2half_rn(single));
  return dtype == Dtype::f32 ? single : read(reinterpret_cast<const char*>(&bits), dtype);
}

struct VqProblem {
  VqCase c;
  Sizes shape;  // [*R, D]
  Tensor x, codebook;
  std::vector<uint8_t> mask;   // [N]
  std::vector<double> xs, es;  // [N, D], [K, D]
  std::mt19937_64 random{1234};

  explicit VqProblem(const VqCase& c_) : c(c_), shape(c.rows) {
    shape.push_back(c.dims);
    x = make(shape, c.dtype, c.layout);
    codebook = make({c.codes, c.dims}, c.codebook_dtype);
    draw();
    const int64_t n = c.n();
    if (c.special) {
      const double bad[] = {NAN, INFINITY, -INFINITY};
      for (int64_t i = 0; i < n; i += 5) xs[i * c.dims + i % c.dims] = bad[i % 3];
      for (int64_t i = 1; i < c.codes; i += 4) es[i * c.dims + i % c.dims] = bad[i % 3];
      for (int64_t d = 0; d < c.dims; ++d) es[c.codes / 2 * c.dims + d] = 0;
    }
    for (int64_t i = 0; i < n * c.dims; ++i) {
      const int64_t at = offset_of(shape, x.stride, i);
      x.set(at, rounded(xs[i], c.dtype));
      xs[i] = x.at(at);
    }
    for (int64_t i = 0; i < c.codes * c.dims; ++i) {
      codebook.set(i, rounded(es[i], c.codebook_dtype));
      es[i] = codebook.at(i);
    }
    for (int64_t i = 0; i < n && c.masked; ++i) mask.push_back(random() % 3 != 0);
  }

  void draw() {
    std::normal_distribution<double> normal;
    std::cauchy_distribution<double> cauchy;
    const int64_t n = c.n(), dims = c.dims, codes = c.codes;
    xs.resize(n * dims);
    es.resize(codes * dims);
    const double scale = c.data == Data::tiny ? 1e-15 : c.data == Data::huge ? 1e15 : 1;
    for (double& e : es) e = (c.data == Data::cauchy ? cauchy(random) : normal(random)) * scale;
    for (double& v : xs) v = (c.data == Data::cauchy ? cauchy(random) : normal(random)) * scale;
    if (c.data == Data::taming) {
      for (double& e : es) e = (random() % 2001 / 1000.0 - 1) / static_cast<double>(codes);
    }
    if (c.data == Data::duplicates || c.data == Data::equal) {
      const int64_t different = c.data == Data::equal ? 1 : (codes + 6) / 7;
      for (int64_t i = different * dims; i < codes * dims; ++i) es[i] = es[i % (different * dims)];
    }
    // Pairs of codes that fp32 cannot tell apart once they are centred.
    for (int64_t i = codes / 2 * dims; i < codes * dims && c.data == Data::near; ++i) {
      const double e = rounded(es[i - codes / 2 * dims], c.codebook_dtype);
      es[i] = e * (1 + roundoff(c.codebook_dtype) * static_cast<double>(random() % 9 - 4.0));
    }
    for (int64_t i = 0; i < n && (c.data == Data::fitted || c.data == Data::midpoints); ++i) {
      const int64_t a = random() % codes, b = random() % codes;
      for (int64_t d = 0; d < dims; ++d) {
        const double e = rounded(es[a * dims + d], c.codebook_dtype), f = rounded(es[b * dims + d], c.codebook_dtype);
        xs[i * dims + d] = c.data == Data::midpoints ? (e + f) / 2 : e + 0.01 * normal(random);
      }
    }
    if (c.data == Data::offset) {
      for (double& e : es) e += 100;
      for (double& v : xs) v += 100;
    }
  }

  Merge merge(const std::vector<Sizes>& strides) const {
    std::vector<Sizes> rows = strides;
    for (Sizes& s : rows) {
      if (!s.empty()) s.pop_back();
    }
    if (c.rows.empty()) {
      for (Sizes& s : rows) s.clear();
    }
    return Merge(c.rows, rows);
  }
  Rows rows_of(const Merge& m, const Tensor& t, size_t k) const {
    Rows rows;
    rows.operand = m.operand(t, k);
    rows.step = t.present() ? t.stride.back() : 0;
    return rows;
  }
  template <class Call>
  void set(Call& call) const {
    call.codebook = codebook.data();
    call.codebook_dtype = c.codebook_dtype;
    call.dims = c.dims;
    call.codes = c.codes;
  }
  Sizes row_major() const {  // strides of a contiguous tensor of x's shape
    return make(shape, Dtype::f32).stride;
  }
  bool finite_row(int64_t n) const {
    return std::all_of(&xs[n * c.dims], &xs[n * c.dims] + c.dims, [](double v) { return std::isfinite(v); });
  }
};

// [N] or [N, k] indices in their dtype.
struct IndexTensor {
  std::vector<int64_t> wide;
  std::vector<int32_t> narrow;
  IndexTensor(int64_t n, bool int32) : wide(int32 ? 0 : n, 77777), narrow(int32 ? n : 0, 77777) {}
  Indices call() { return {narrow.empty() ? static_cast<void*>(wide.data()) : narrow.data(), !narrow.empty()}; }
  int64_t at(int64_t i) const { return narrow.empty() ? wide[i] : narrow[i]; }
  int64_t size() const { return static_cast<int64_t>(wide.size() + narrow.size()); }
};

// Canonical scores of row n; +inf for what is never chosen.
inline std::vector<double> canonical_scores(const VqProblem& p, int64_t n) {
  const VqCase& c = p.c;
  std::vector<double> scores(c.codes, INFINITY);
  if (!p.finite_row(n)) return scores;
  for (int64_t k = 0; k < c.codes; ++k) {
    double h = 0, t = 0;
    bool chosen = true;
    for (int64_t d = 0; d < c.dims; ++d) {
      const double e = p.es[k * c.dims + d];
      chosen = chosen && std::isfinite(e);
      h = std::fma(e, e, h);
      t = std::fma(p.xs[n * c.dims + d], e, t);
    }
    const double s = c.metric == Metric::l2 ? 0.5 * h - t : c.metric == Metric::dot ? -t : -t / std::sqrt(h);
    if (chosen && !std::isnan(s) && (c.metric != Metric::cosine || h > 0)) scores[k] = s;
  }
  return scores;
}

struct Assigned {
  IndexTensor indices;
  Tensor scores;
  int64_t listed = 0;  // rows that the fast pass left to the exact scan
};

inline Assigned run_assign(const VqProblem& p) {
  const VqCase& c = p.c;
  const int64_t n = c.n(), width = std::max<int64_t>(c.k, 1);
  Assigned r{IndexTensor(n * width, c.int32), {}, 0};
  if (c.k > 0) r.scores = make({n, c.k}, c.wide());
  const Merge merge = p.merge({p.x.stride});
  VqAssign call{};
  p.set(call);
  call.shape = merge.shape(n, n);
  call.x = p.rows_of(merge, p.x, 0);
  call.mask = c.masked ? p.mask.data() : nullptr;
  call.metric = c.metric;
  call.exact = c.exact;
  call.k = c.k;
  call.indices = r.indices.call();
  call.scores = r.scores.data();
  call.scores_f64 = c.wide() == Dtype::f64;
  ScratchMemory memory;
  const int64_t bytes = cuda::vq_assign_scratch(call);
  CHECK(bytes <= 8 * c.codes * c.dims + 64 * n + (16 << 20), "%lld bytes of scratch: %s", static_cast<long long>(bytes),
        c.name().c_str());
  CHECK(cuda::vq_assign(call, memory.scratch(bytes), nullptr) == 0, "launch: %s", c.name().c_str());
  memory.check(c.name());
  // The list is the last part of the scratch memory.
  if (c.k == 0 && c.codes > 128) {
    const size_t end = memory.partials.size() - n % 2;
    for (size_t i = end - n; i < end; ++i) r.listed += std::isnan(memory.partials[i]) ? 0 : 1;
  }
  return r;
}

// Scores and indices by the definition: [N, max(k, 1)].
struct Nearest {
  std::vector<int64_t> indices;
  std::vector<double> scores;

  explicit Nearest(const VqProblem& p) {
    const VqCase& c = p.c;
    const int64_t width = std::max<int64_t>(c.k, 1);
    for (int64_t n = 0; n < c.n(); ++n) {
      const bool used = !c.masked || p.mask[n] != 0;
      const std::vector<double> row = canonical_scores(p, n);
      std::vector<int64_t> order(c.codes);
      for (int64_t k = 0; k < c.codes; ++k) order[k] = k;
      std::partial_sort(order.begin(), order.begin() + width, order.end(),
                        [&](int64_t a, int64_t b) { return row[a] < row[b] || (row[a] == row[b] && a < b); });
      for (int64_t i = 0; i < width; ++i) {
        indices.push_back(used ? order[i] : -1);
        scores.push_back(used ? rounded(row[order[i]], c.wide()) : INFINITY);
      }
    }
  }
  void check(const VqProblem& p, const Assigned& r) const {
    for (size_t i = 0; i < indices.size(); ++i) {
      const int64_t at = static_cast<int64_t>(i), got = r.indices.at(at);
      CHECK(got == indices[i], "place %d: %d, not %d: %s", int(i), int(got), int(indices[i]), p.c.name().c_str());
      if (p.c.k > 0) CHECK(r.scores.at(at) == scores[i], "score at %d: %s", int(i), p.c.name().c_str());
    }
  }
};

// The definition's indices, in drawn orders of threads too. Returns how many rows the fast pass left to the scan.
inline int64_t check_assign(const VqCase& c, const std::vector<uint64_t>& seeds = {0, 1}) {
  const VqProblem p(c);
  const Nearest want(p);
  int64_t listed = 0;
  for (uint64_t seed : seeds) {
    cuda_host::options.seed = seed;
    const Assigned r = run_assign(p);
    want.check(p, r);
    listed = r.listed;
  }
  cuda_host::options.seed = 0;
  return listed;
}

// Indices to gather by, some of them -1.
inline IndexTensor drawn_indices(VqProblem& p, bool unused) {
  IndexTensor indices(p.c.n(), p.c.int32);
  for (int64_t i = 0; i < indices.size(); ++i) {
    const int64_t k = unused && p.random() % 4 == 0 ? -1 : static_cast<int64_t>(p.random() % p.c.codes);
    if (p.c.int32) indices.narrow[i] = static_cast<int32_t>(k);
    if (!p.c.int32) indices.wide[i] = k;
  }
  return indices;
}

inline bool close(double got, double want, double allowed) {
  if (std::isnan(want)) return std::isnan(got);
  if (std::isinf(want)) return got == want;
  return std::fabs(got - want) <= allowed;
}

inline void check_gather(const VqCase& c) {
  VqProblem p(c);
  IndexTensor indices = drawn_indices(p, true);
  const int64_t n = c.n();
  const bool off = c.reduction == RowReduction::off;
  const double u = roundoff(c.wide());
  std::vector<char> bits;
  for (uint64_t seed : {0, 1, 2}) {
    cuda_host::options.seed = seed;
    // Without x (and loss) the codebook's dtype, contiguous.
    for (bool compared : {true, false}) {
      const Dtype dtype = compared ? c.dtype : c.codebook_dtype;
      const Tensor quantized = make(p.shape, dtype, compared ? c.layout : Layout::contiguous);
      const Tensor loss = make({c.reduction == RowReduction::none ? n : 1}, c.wide());
      const Merge merge = p.merge({compared ? p.x.stride : Sizes{}, quantized.stride});
      VqGather call{};
      p.set(call);
      call.shape = merge.shape(n, n);
      call.indices = indices.call();
      if (compared) call.x = p.rows_of(merge, p.x, 0);
      call.quantized = p.rows_of(merge, quantized, 1);
      call.fill = -2.5;
      call.reduction = compared ? c.reduction : RowReduction::off;
      call.loss = compared && !off ? loss.data() : nullptr;
      ScratchMemory memory;
      CHECK(cuda::vq_gather(call, memory.scratch(cuda::vq_gather_scratch(call)), nullptr) == 0, "launch: %s",
            c.name().c_str());
      memory.check(c.name());
      double total = 0, valid = 0;
      for (int64_t i = 0; i < n; ++i) {
        const int64_t k = indices.at(i);
        const bool bad = compared && k >= 0 && !p.finite_row(i);
        double sum = 0;
        for (int64_t d = 0; d < c.dims; ++d) {
          const double e = k < 0 ? -2.5 : p.es[k * c.dims + d];
          const double got = element(p.shape, quantized, i * c.dims + d);
          CHECK(close(got, bad ? NAN : rounded(e, dtype), 0), "row %d, dim %d: %g: %s", int(i), int(d), got,
                c.name().c_str());
          sum += k < 0 ? 0 : (p.xs[i * c.dims + d] - e) * (p.xs[i * c.dims + d] - e);
        }
        if (bad) sum = NAN;
        total += sum;
        valid += k >= 0 ? 1 : 0;
        if (!compared || c.reduction != RowReduction::none) continue;
        const double want = sum / static_cast<double>(c.dims);
        CHECK(close(loss.at(i), want, 6 * u * want + (c.wide() == Dtype::f64 ? c.dims * u * want : 0)),
              "loss of row %d: %g, not %g: %s", int(i), loss.at(i), want, c.name().c_str());
      }
      if (compared && (c.reduction == RowReduction::mean || c.reduction == RowReduction::sum)) {
        const double want =
            c.reduction == RowReduction::sum ? total : total / static_cast<double>(c.dims) / std::max(valid, 1.0);
        const double terms = c.wide() == Dtype::f64 ? static_cast<double>(n * c.dims) : 0;
        CHECK(close(loss.at(0), want, (6 + terms) * u * want), "loss: %g, not %g: %s", loss.at(0), want,
              c.name().c_str());
      }
      if (!compared) continue;
      std::vector<char> all = quantized.contents();
      if (!off) {
        for (char byte : loss.contents()) all.push_back(byte);
      }
      if (seed == 0) bits = all;
      CHECK(all == bits, "thread order %d changes the result: %s", int(seed), c.name().c_str());
    }
  }
  cuda_host::options.seed = 0;
}

// `with_gq`, `with_w`: which gradients arrive.
inline void check_backward(const VqCase& c, bool with_gq, bool with_w) {
  VqProblem p(c);
  IndexTensor indices = drawn_indices(p, true);
  const int64_t n = c.n(), dims = c.dims;
  Tensor gq = make(p.shape, c.dtype, c.layout);
  fill(gq, p.random, -1, 1);
  Tensor w = make({c.weighted ? n : 1}, c.wide());
  fill(w, p.random, -1, 1);
  const double u = roundoff(c.wide());
  for (uint64_t seed : {0, 1}) {
    cuda_host::options.seed = seed;
    const Tensor gx = make(p.shape, c.dtype, c.layout);
    const Merge merge = p.merge({p.x.stride, with_gq ? gq.stride : Sizes{}, gx.stride});
    VqGatherBackward call{};
    p.set(call);
    call.shape = merge.shape(n, n);
    call.indices = indices.call();
    call.x = p.rows_of(merge, p.x, 0);
    if (with_gq) call.gq = p.rows_of(merge, gq, 1);
    call.gx = p.rows_of(merge, gx, 2);
    call.w = with_w ? w.data() : nullptr;
    call.w_per_row = c.weighted;
    call.estimator = c.estimator;
    CHECK(cuda::vq_gather_backward_scratch(call) == 0, "no scratch is expected");
    CHECK(cuda::vq_gather_backward(call, {}, nullptr) == 0, "launch: %s", c.name().c_str());
    for (int64_t i = 0; i < n; ++i) {
      const int64_t k = indices.at(i);
      double xx = 0, ee = 0, ww = 0, wg = 0, vg = 0, gg = 0;
      std::vector<double> g(dims), e(dims);
      for (int64_t d = 0; d < dims; ++d) {
        g[d] = with_gq ? element(p.shape, gq, i * dims + d) : 0;
        e[d] = k >= 0 ? p.es[k * dims + d] : 0;
        xx += p.xs[i * dims + d] * p.xs[i * dims + d];
        ee += e[d] * e[d];
        gg += g[d] * g[d];
      }
      const double length_x = std::sqrt(xx), length_e = std::sqrt(ee);
      for (int64_t d = 0; d < dims; ++d) {
        const double v = e[d] / length_e, sum = p.xs[i * dims + d] / length_x + v;
        ww += sum * sum;
        wg += sum * g[d];
        vg += v * g[d];
      }
      const bool rotates = with_gq && c.estimator == Estimator::rotation && length_x >= 1e-6 && length_e >= 1e-6 &&
                           std::sqrt(ww) >= 1e-6;
      if (rotates && std::sqrt(ww) < 1e-3) continue;  // u + v has lost its digits
      for (int64_t d = 0; d < dims; ++d) {
        const double x = p.xs[i * dims + d];
        double want = c.estimator == Estimator::none ? 0 : g[d], size = std::fabs(want);
        if (rotates) {
          want = length_e / length_x * (g[d] - 2 * (x / length_x + e[d] / length_e) * wg / ww + 2 * x / length_x * vg);
          size = length_e / length_x * 5 * std::sqrt(gg) / std::sqrt(ww);
        }
        const double pull = with_w ? 2 * w.at(c.weighted ? i : 0) * (x - e[d]) : 0;
        want = k < 0 ? 0 : want + pull;
        const double allowed = (rotates ? 16 : 4) * u * (size + std::fabs(pull)) +
                               (c.wide() == Dtype::f64 ? dims * u * size : 0) + roundoff(c.dtype) * std::fabs(want) +
                               smallest(c.dtype);
        const double got = element(p.shape, gx, i * dims + d);
        CHECK(close(got, want, allowed), "row %d, dim %d: %g, not %g: %s", int(i), int(d), got, want, c.name().c_str());
      }
    }
  }
  cuda_host::options.seed = 0;
}

// `absmax` < 0: floating sums.
inline void check_segment_sum(const VqCase& c, bool skip_nonfinite, double absmax) {
  VqProblem p(c);
  IndexTensor indices = drawn_indices(p, true);
  const int64_t n = c.n(), dims = c.dims;
  const bool fixed = absmax >= 0, out_f64 = c.codebook_dtype == Dtype::f64;
  const Dtype out = out_f64 || fixed ? Dtype::f64 : Dtype::f32;  // int64 is as long
  Tensor weights = make({n}, c.wide()), limit = make({1}, c.wide());
  fill(weights, p.random, 0, 2);
  limit.set(0, absmax);
  std::vector<double> counts(c.codes), sums(c.codes * dims), sizes(c.codes * dims), weight_sizes(c.codes);
  int exponent = 0;
  std::frexp(limit.at(0), &exponent);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t k = indices.at(i);
    if (k < 0 || (skip_nonfinite && !p.finite_row(i))) continue;
    const double weight = c.weighted && !fixed ? weights.at(i) : 1;
    counts[k] += weight;
    for (int64_t d = 0; d < dims; ++d) {
      double v = p.xs[i * dims + d] * weight;
      if (fixed) v = std::max(-0x1p36, std::min(0x1p36, std::nearbyint(std::ldexp(v, 36 - exponent))));
      sums[k * dims + d] += v;
      sizes[k * dims + d] += std::fabs(v);
    }
  }
  std::vector<char> bits;
  for (uint64_t seed : {0, 1, 2}) {
    cuda_host::options.seed = seed;
    const Tensor got_counts = make({c.codes}, out), got_sums = make({c.codes, dims}, out);
    const Merge merge = p.merge({p.x.stride});
    VqSegmentSum call{};
    call.shape = merge.shape(n, n);
    call.indices = indices.call();
    call.values = p.rows_of(merge, p.x, 0);
    call.weights = c.weighted && !fixed ? weights.data() : nullptr;
    call.weights_f64 = call.absmax_f64 = c.wide() == Dtype::f64;
    call.absmax = fixed ? limit.data() : nullptr;
    call.dims = dims;
    call.codes = c.codes;
    call.skip_nonfinite = skip_nonfinite;
    call.out_f64 = out_f64;
    call.counts = got_counts.data();
    call.sums = got_sums.data();
    ScratchMemory memory;
    const int64_t bytes = cuda::vq_segment_sum_scratch(call);
    CHECK(bytes <= 8 * c.codes * dims + 64 * n + (16 << 20), "%lld bytes of scratch: %s", static_cast<long long>(bytes),
          c.name().c_str());
    CHECK(cuda::vq_segment_sum(call, memory.scratch(bytes), nullptr) == 0, "launch: %s", c.name().c_str());
    const auto value = [&](const Tensor& t, int64_t i) {
      int64_t integer;
      std::memcpy(&integer, t.data() + i * bytes_of(out), fixed ? 8 : 4);
      return fixed ? static_cast<double>(integer) : t.at(i);
    };
    for (int64_t k = 0; k < c.codes; ++k) {
      const double count = value(got_counts, k), u = fixed ? 0 : roundoff(out) + static_cast<double>(n) * 0x1p-53;
      CHECK(close(count, counts[k], (c.weighted ? u : 0) * counts[k]), "count %d: %g, not %g: %s", int(k), count,
            counts[k], c.name().c_str());
      for (int64_t d = 0; d < dims; ++d) {
        const double sum = value(got_sums, k * dims + d), want = sums[k * dims + d];
        CHECK(close(sum, want, u * sizes[k * dims + d]), "sum %d, %d: %g, not %g: %s", int(k), int(d), sum, want,
              c.name().c_str());
      }
    }
    std::vector<char> all = got_counts.contents();
    for (char byte : got_sums.contents()) all.push_back(byte);
    if (seed == 0) bits = all;
    CHECK(all == bits, "thread order %d changes the result: %s", int(seed), c.name().c_str());
  }
  cuda_host::options.seed = 0;
}

}  // namespace vaeops::test
