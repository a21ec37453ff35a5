// One call of a reconstruction loss with random contents, and what the formulas say of it, element by element.
#pragma once
#include <algorithm>
#include <string>

#include "check.h"
#include "loops.h"
#include "tensors.h"

namespace vaeops::test {

// What a target or a weight is given as; it varies along the dims `kept` (empty: all).
struct Given {
  bool present = true, bytes = false;
  Dtype dtype = Dtype::f32;
  std::vector<bool> kept = {};
};

constexpr int kKinds = 10;  // the ReconKinds, then the multinomial
constexpr int kMultinomial = 9;

struct ReconCase {
  Sizes shape;
  int batch_ndim = 1;
  Dtype dtype = Dtype::f32;
  int kind = static_cast<int>(ReconKind::mse);
  Reduction reduction = Reduction::batchmean;
  double scale = 0.3;
  Given target = {}, weight = {.present = false};
  double levels = 255;  // of a target of bytes
  Layout layout = Layout::contiguous;

  bool multinomial() const { return kind == kMultinomial; }
  std::string name() const {
    std::string s = "kind " + std::to_string(kind) + " [";
    for (int64_t d : shape) s += std::to_string(d) + " ";
    s += "] dtype " + std::to_string(static_cast<int>(dtype)) + " reduction " +
         std::to_string(static_cast<int>(reduction)) + " layout " + std::to_string(static_cast<int>(layout));
    for (const Given* g : {&target, &weight}) {
      const std::string type = g->bytes ? "bytes" : "dtype " + std::to_string(static_cast<int>(g->dtype));
      if (g->present) s += (g == &target ? ", target " : ", weight ") + type;
    }
    return s;
  }
};

// The same logical contents in every layout.
struct ReconProblem {
  ReconCase c;
  int64_t n, rows, width;
  Tensor pred, target, weight, grad;

  explicit ReconProblem(const ReconCase& c_, unsigned seed = 1) : c(c_) {
    if (c.multinomial()) {
      c.reduction = Reduction::sample;
      c.levels = 1;
    }
    n = product(c.shape);
    rows = product(c.shape, 0, static_cast<size_t>(c.batch_ndim));
    width = product(c.shape, static_cast<size_t>(c.batch_ndim));
    std::mt19937 random(seed);
    pred = make(c.shape, c.dtype, c.layout);
    const bool probability = c.kind == static_cast<int>(ReconKind::bce);
    const bool logit = c.multinomial() || c.kind == static_cast<int>(ReconKind::bce_logits);
    fill_in_order(pred, random, probability ? 0.02 : logit ? -6 : -0.5, probability ? 0.98 : logit ? 6 : 1.5);
    target = make_given(c.target);
    fill_in_order(target, random, 0, c.target.bytes ? c.multinomial() ? 4 : c.levels + 1 : 1);
    weight = make_given(c.weight);
    fill_in_order(weight, random, 0, c.weight.bytes ? 2 : 1);
    std::vector<bool> kept(c.shape.size());
    for (size_t d = 0; d < kept.size(); ++d) {
      const bool batch = static_cast<int>(d) < c.batch_ndim;
      kept[d] = c.reduction == Reduction::none || (c.reduction == Reduction::dim && !batch) ||
                (c.reduction == Reduction::sample && batch);
    }
    grad = make(c.shape, compute(c.dtype), Layout::contiguous, kept);
    fill_in_order(grad, random, -1, 2);
  }

  // Some weights become 0, and what they hide NaN.
  void hide() {
    if (!weight.present()) return;
    for (int64_t i = 0; i < n; i += 7) weight.set(at(weight, i), 0);
    if (c.multinomial() && !weight.bytes) return;  // then the weight is the count's alone
    for (int64_t i = 0; i < n; ++i) {
      if (weight.at(at(weight, i)) == 0) std::memset(pred.data() + at(pred, i) * pred.item(), 0xFF, pred.item());
    }
  }

  int64_t at(const Tensor& t, int64_t i) const { return offset_of(c.shape, t.stride, i); }
  int64_t reduced_n() const {
    return c.reduction == Reduction::none     ? n
           : c.reduction == Reduction::dim    ? width
           : c.reduction == Reduction::sample ? rows
                                              : 1;
  }
  int64_t reduced_at(int64_t i) const {
    return c.reduction == Reduction::none     ? i
           : c.reduction == Reduction::dim    ? i % width
           : c.reduction == Reduction::sample ? i / width
                                              : 0;
  }

 private:
  Tensor make_given(const Given& g) const {
    return g.present ? make(c.shape, g.dtype, c.layout, g.kept, g.bytes) : Tensor{};
  }
  template <class Random>
  void fill_in_order(Tensor& t, Random& random, double low, double high) {
    std::uniform_real_distribution<double> draw(low, high);
    for (int64_t i = 0; t.present() && i < n; ++i) t.set(at(t, i), draw(random));
  }
};

struct ReconResults {
  Tensor loss, gradient, lse, total;

  // Every output in logical order.
  std::vector<double> values(const ReconProblem& p) const {
    std::vector<double> all;
    for (int64_t i = 0; i < p.n; ++i) all.push_back(gradient.at(p.at(gradient, i)));
    for (const Tensor* t : {&loss, &lse, &total}) {
      for (int64_t i = 0; i < t->elements; ++i) all.push_back(t->at(i));
    }
    return all;
  }
};

// Forward, then backward, by the kernels that `run` launches.
template <class Run>
ReconResults run_by(const Run& run, const ReconProblem& p) {
  const ReconCase& c = p.c;
  ReconResults r;
  r.loss = make({p.reduced_n()}, compute(c.dtype));
  r.gradient = make(c.shape, c.dtype, c.layout);
  const Merge merge(c.shape, {p.pred.stride, p.target.stride, p.weight.stride, p.grad.stride, r.gradient.stride});
  const auto fill = [&](auto& call, Operand& pred) {
    call.shape = merge.shape(p.n, p.rows);
    call.shape.width = p.width;
    pred = merge.operand(p.pred, 0);
    call.target = merge.operand(p.target, 1);
    call.weight = merge.operand(p.weight, 2);
  };
  if (c.multinomial()) {
    r.total = make({p.rows}, compute(c.dtype));
    r.lse = make({p.rows}, Dtype::f64);
    double* const lse = reinterpret_cast<double*>(r.lse.data());
    MultinomialForward forward{};
    fill(forward, forward.logits);
    forward.nll = r.loss.data();
    forward.total = r.total.data();
    forward.lse = lse;
    run(forward);
    MultinomialBackward backward{};
    fill(backward, backward.logits);
    backward.grad = p.grad.data();
    backward.total = r.total.data();
    backward.lse = lse;
    backward.glogits = merge.operand(r.gradient, 4);
    run(backward);
    return r;
  }
  const auto options = [&](Recon& call) {
    fill(call, call.pred);
    call.levels = c.target.bytes ? c.levels : 1;
    call.kind = static_cast<ReconKind>(c.kind);
    call.scale = c.scale;
    call.reduction = c.reduction;
  };
  ReconForward forward{};
  options(forward);
  forward.out = r.loss.data();
  run(forward);
  ReconBackward backward{};
  options(backward);
  backward.grad = merge.operand(p.grad, 3);
  backward.gpred = merge.operand(r.gradient, 4);
  run(backward);
  return r;
}

struct OnCpu {
  ParallelFor parallel;
  void operator()(const ReconForward& call) const { cpu::recon_forward(call, parallel); }
  void operator()(const ReconBackward& call) const { cpu::recon_backward(call, parallel); }
  void operator()(const MultinomialForward& call) const { cpu::multinomial_forward(call, parallel); }
  void operator()(const MultinomialBackward& call) const { cpu::multinomial_backward(call, parallel); }
};

inline ReconResults run(const ReconProblem& p, ParallelFor parallel) { return run_by(OnCpu{parallel}, p); }

// A number, and how many roundoffs of the compute type of which size may be between it and ours.
struct Bounded {
  long double value = 0, size = 0;
};

inline void element(ReconKind kind, long double p, long double t, long double s, Bounded& loss, Bounded& slope) {
  const long double d = p - t, size = std::fabs(d), half_log_two_pi = 0.918938533204672741780329736406L;
  const auto sigmoid = [](long double x) { return 1 / (1 + std::exp(-x)); };
  switch (kind) {
    case ReconKind::bce:
      loss = {-t * std::fmax(std::log(p), -100.0L) - (1 - t) * std::fmax(std::log1p(-p), -100.0L), 1};
      slope = {d / std::fmax(p * (1 - p), 1e-12L), 1};
      break;
    case ReconKind::bce_logits:
      loss = {std::fmax(p, 0.0L) - p * t + std::log1p(std::exp(-std::fabs(p))), 1};
      slope = {sigmoid(p) - t, 1};
      break;
    case ReconKind::mse:
      loss = {d * d};
      slope = {2 * d};
      break;
    case ReconKind::half_mse:
      loss = {d * d / 2};
      slope = {d};
      break;
    case ReconKind::l1:
      loss = {size};
      slope = {static_cast<long double>((d > 0) - (d < 0))};
      break;
    case ReconKind::huber:
      loss = {size <= s ? d * d / 2 : s * (size - s / 2), s * s};
      slope = {size <= s ? d : std::copysign(s, d)};
      break;
    case ReconKind::gaussian_nll:
      loss = {(d / s) * (d / s) / 2 + std::log(s) + half_log_two_pi,
              (d / s) * (d / s) / 2 + std::fabs(std::log(s)) + 1};
      slope = {d / (s * s)};
      break;
    case ReconKind::laplace_nll:
      loss = {size / s + std::log(2 * s), size / s + std::fabs(std::log(2 * s))};
      slope = {((d > 0) - (d < 0)) / s};
      break;
    case ReconKind::discretized_logistic: {
      const long double h = 1 / 510.0L, a = (t + h - p) / s, b = (t - h - p) / s;
      const long double above = t > 1 - h ? 0 : sigmoid(-a), below = t < h ? 0 : sigmoid(b);
      // F(a) - F(b), by the small ones of F and 1 - F
      const long double share = above == 0   ? sigmoid(-b)
                                : below == 0 ? sigmoid(a)
                                : a + b > 0  ? sigmoid(-b) - above
                                             : sigmoid(a) - below;
      loss = {-std::log(share), std::fabs(a) + std::fabs(std::log(255 * s)) + 1};
      slope = {(above - below) / s, (std::fabs(a) + 1) / s};
      break;
    }
  }
  loss.size += std::fabs(loss.value);
  slope.size += std::fabs(slope.value);
}

// Reads element i as the kernels do: in the compute type, bytes divided by their number of levels.
inline void operands(const ReconProblem& p, int64_t i, long double& pred, long double& target, double& weight) {
  const bool wide = p.c.dtype == Dtype::f64;
  const double t = p.target.at(p.at(p.target, i)) / (p.c.target.bytes ? p.c.levels : 1);
  weight = p.weight.present() ? p.weight.at(p.at(p.weight, i)) : 1;
  if (!wide) weight = static_cast<float>(weight);
  pred = p.pred.at(p.at(p.pred, i));
  target = wide ? t : static_cast<float>(t);
}

struct Expected {
  std::vector<Bounded> loss, gradient, lse, total;

  explicit Expected(const ReconProblem& p)
      : loss(static_cast<size_t>(p.reduced_n())), gradient(static_cast<size_t>(p.n)) {
    p.c.multinomial() ? rows(p) : elements(p);
  }

 private:
  void elements(const ReconProblem& p) {
    const Reduction reduction = p.c.reduction;
    const long double divisor = reduction == Reduction::dim || reduction == Reduction::batchmean ? p.rows
                                : reduction == Reduction::mean                                   ? p.n
                                                                                                 : 1;
    const long double terms =
        static_cast<long double>(p.n) / static_cast<long double>(std::max<size_t>(1, loss.size()));
    for (int64_t i = 0; i < p.n; ++i) {
      long double pred = 0, target = 0;
      double weight = 1;
      operands(p, i, pred, target, weight);
      if (weight == 0) continue;
      Bounded value, slope;
      element(static_cast<ReconKind>(p.c.kind), pred, target, p.c.scale, value, slope);
      Bounded& sum = loss[p.reduced_at(i)];
      sum.value += weight * value.value / divisor;
      sum.size += std::fabs(weight) / divisor * (3 * value.size + (4 + terms / 64) * std::fabs(value.value));
      const long double g = p.grad.at(p.at(p.grad, i)) * weight / divisor;
      gradient[i] = {g * slope.value, 3 * std::fabs(g) * slope.size};
    }
  }

  void rows(const ReconProblem& p) {
    lse.resize(static_cast<size_t>(p.rows));
    total.resize(static_cast<size_t>(p.rows));
    std::vector<long double> x(static_cast<size_t>(p.width)), counts(x.size());
    for (int64_t row = 0; row < p.rows; ++row) {
      long double top = -INFINITY, sum = 0, drawn = 0, size = 0;
      for (int64_t i = 0; i < p.width; ++i) {
        double weight = 1;
        operands(p, row * p.width + i, x[i], counts[i], weight);
        if (p.c.weight.bytes && weight == 0) x[i] = -INFINITY;
        counts[i] *= weight;
        top = std::fmax(top, x[i]);
        total[row].value += counts[i];
        if (counts[i] != 0) drawn += counts[i] * x[i];
      }
      const bool possible = top > -INFINITY;
      for (int64_t i = 0; possible && i < p.width; ++i) {
        sum += std::exp(x[i] - top);
        if (counts[i] != 0) size += counts[i] * (2 + top - x[i]);
      }
      const long double log_sum = possible ? top + std::log(sum) : -INFINITY, counted = total[row].value;
      // In fp32 the logits' common size is in fp64, and costs nothing.
      const long double common = p.c.dtype == Dtype::f64 && possible ? std::fabs(top) : 0;
      lse[row] = {log_sum, 8 + 4 * common};
      total[row].size = 32 * counted;
      loss[row] = {counted == 0 ? 0 : counted * log_sum - drawn,
                   counted == 0 ? 0 : 8 * (size + counted * (1 + common))};
      const long double g = p.grad.at(row);
      for (int64_t i = 0; i < p.width; ++i) {
        const long double share = possible && counted != 0 ? counted * std::exp(x[i] - log_sum) : 0;
        const bool out = p.c.weight.bytes && x[i] == -INFINITY;
        const long double spread = share == 0 ? 0 : share * (2 + log_sum - x[i] + common);
        gradient[row * p.width + i] = {out ? 0 : g * (share - counts[i]),
                                       out ? 0 : 4 * std::fabs(g) * (spread + counts[i])};
      }
    }
  }
};

// Ours within its bound, plus one rounding to the result's own type.
inline void compare(const char* what, const ReconProblem& p, const Tensor& ours, const std::vector<Bounded>& expected,
                    bool in_order, const std::string& where, double slack) {
  const double inner = slack * roundoff(compute(p.c.dtype)), outer = roundoff(ours.dtype);
  for (size_t i = 0; i < expected.size(); ++i) {
    const int64_t k = static_cast<int64_t>(i);
    const double got = ours.at(in_order ? k : p.at(ours, k)), want = static_cast<double>(expected[i].value);
    if (std::isinf(want)) {
      CHECK(got == want, "%s[%zu]: %g, should be %g: %s", what, i, got, want, where.c_str());
      continue;
    }
    const double allowed =
        inner * static_cast<double>(expected[i].size) + outer * std::fabs(want) + smallest(ours.dtype);
    CHECK(std::fabs(got - want) <= allowed, "%s[%zu]: %.9g, should be %.9g (allowed %.2g): %s", what, i, got, want,
          allowed, where.c_str());
  }
}

inline void check_values(const ReconProblem& p, const ReconResults& r, const std::string& where, double slack = 1) {
  const Expected expected(p);
  compare("loss", p, r.loss, expected.loss, true, where, slack);
  compare("gradient", p, r.gradient, expected.gradient, false, where, slack);
  if (!p.c.multinomial()) return;
  compare("lse", p, r.lse, expected.lse, true, where, slack);
  compare("total", p, r.total, expected.total, true, where, slack);
}

// Bit by bit, but that a NaN is any NaN.
inline bool same(const std::vector<double>& a, const std::vector<double>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](double x, double y) {
    return std::isnan(x) ? std::isnan(y) : x == y && std::signbit(x) == std::signbit(y);
  });
}

}  // namespace vaeops::test
