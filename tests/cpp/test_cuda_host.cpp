// The CUDA kernels' own sources, run on the CPU (cuda_host/), against fp64 and against themselves in other thread
// orders.
#include "cuda/noise.cuh"
#include "run_gaussian.h"

namespace vaeops::test {
namespace {

void test_philox() {
  const uint32_t pi[6] = {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0};
  const struct {
    uint64_t key;
    uint32_t counter[4], word[4];
  } known[] = {{0, {0, 0, 0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
               {~0ull, {~0u, ~0u, ~0u, ~0u}, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
               {pi[4] | static_cast<uint64_t>(pi[5]) << 32,
                {pi[0], pi[1], pi[2], pi[3]},
                {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}};  // Random123's kat_vectors
  for (const auto& k : known) {
    const cuda::Words w = cuda::philox(k.key, k.counter[0], k.counter[1], k.counter[2], k.counter[3]);
    for (int e = 0; e < 4; ++e) CHECK(w.x[e] == k.word[e], "word %d: %08x, should be %08x", e, w.x[e], k.word[e]);
  }
}

// Bits that vaeops.ref.rng gives.
void test_noise_bits() {
  const int64_t wrapping[2] = {0x0123456789ABCDEF, -3};  // the counter passes 2^64
  const uint32_t one[16] = {0x3f239d82, 0xbea5d375, 0xbe2b49dc, 0x3ef4fee2, 0x3efaea25, 0x3f921617,
                            0x3e006669, 0xbf430869, 0x3e97098e, 0x3fa1d9a9, 0x3f561c15, 0x3f06a4bf,
                            0x3de16bee, 0xbf4d97ec, 0xc00e4db4, 0x3e9a0fb4};
  const int64_t seeds[4] = {7, 11, -5, int64_t{1} << 40};
  const uint32_t two[12] = {0x3f0b032d, 0xbed2976f, 0x3f432008, 0x3dd22286, 0xbfc0ac26, 0xbe7fbcc2,
                            0x3f401c07, 0xbff14536, 0xbfa03b85, 0x3fa0c745, 0x3fd8e19d, 0x3ea9af5a};
  std::vector<float> out(16);
  CHECK(cuda::normal(out.data(), 16, {wrapping, 1}, nullptr) == 0, "launch");
  for (int i = 0; i < 16; ++i) CHECK(__float_as_uint(out[i]) == one[i], "normal %d: %08x", i, __float_as_uint(out[i]));
  out.assign(12, NAN);
  CHECK(cuda::normal(out.data(), 12, {seeds, 2}, nullptr) == 0, "launch");
  for (int i = 0; i < 12; ++i)
    CHECK(__float_as_uint(out[i]) == two[i], "stream normal %d: %08x", i, __float_as_uint(out[i]));

  const int64_t index[2] = {0, (int64_t{1} << 41) + 3};
  const int64_t children[4] = {1700582211817120190, -5528667401852415726, -1509555963406999431, 8106602480795896368};
  int64_t child[4] = {};
  CHECK(cuda::fold_in(seeds, 2, index, 1, child, 2, nullptr) == 0, "launch");
  for (int i = 0; i < 4; ++i) CHECK(child[i] == children[i], "child %d: %lld", i, static_cast<long long>(child[i]));
  CHECK(cuda::fold_in(seeds + 2, 0, index + 1, 0, child, 2, nullptr) == 0, "launch");
  for (int i = 0; i < 4; ++i) CHECK(child[i] == children[2 + i % 2], "broadcast child %d", i);
}

// sigma, expm1 and the gap over the whole range, and what must come of special arguments.
void test_exp() {
  double worst[3] = {};
  for (double x = -210; x < 180; x += 0.00937) {
    const float f = static_cast<float>(x);
    const cuda::Exp<float> e = cuda::exp_parts(f);
    const double want[3] = {std::exp(f / 2.0), std::expm1(static_cast<double>(f)), 0};
    const float got[3] = {e.sigma, e.expm1, e.gap};
    for (int k = 0; k < 2; ++k) {
      if (std::fabs(want[k]) > 3.4e38) {
        CHECK(std::isinf(got[k]), "output %d of exp_parts(%g): %g", k, x, got[k]);
      } else {
        const double ulp = std::fmax(std::fabs(want[k]) * 0x1p-23, 0x1p-149);
        // Half a power of two below overflow the polynomial is asked beyond its range: sigma is allowed 1e-5 there.
        const double allowed = k == 0 && f > 176.7f ? 64 : 1;
        worst[k] = std::fmax(worst[k], std::fabs(got[k] - want[k]) / ulp / allowed);
      }
    }
  }
  for (double x = 1e-12; x < 20; x *= 1.01) {  // near 0 the gap is x^2 / 2: no cancellation
    for (float f : {static_cast<float>(x), static_cast<float>(-x)}) {
      const double d = f,
                   gap = std::fabs(d) < 0.01 ? d * d / 2 * (1 + d / 3 * (1 + d / 4 * (1 + d / 5))) : std::expm1(d) - d;
      worst[2] = std::fmax(worst[2], std::fabs(cuda::exp_parts(f).gap - gap) / (gap * 0x1p-23));
    }
  }
  std::printf("exp_parts: sigma %.2f ulp, expm1 %.2f ulp, gap %.2f ulp\n", worst[0], worst[1], worst[2]);
  CHECK(worst[0] < 1.5, "sigma: %g ulp", worst[0]);
  CHECK(worst[1] < 4, "expm1: %g ulp", worst[1]);
  CHECK(worst[2] < 4, "gap: %g ulp", worst[2]);
  const cuda::Exp<float> low = cuda::exp_parts(-INFINITY), high = cuda::exp_parts(INFINITY), nan = cuda::exp_parts(NAN);
  CHECK(low.sigma == 0 && low.expm1 == -1 && low.gap == INFINITY, "-inf: %g %g %g", low.sigma, low.expm1, low.gap);
  CHECK(high.sigma == INFINITY && high.expm1 == INFINITY && high.gap == INFINITY, "inf");
  CHECK(std::isnan(nan.sigma) && std::isnan(nan.expm1) && std::isnan(nan.gap), "nan");
  CHECK(cuda::exp_parts(0.0f).gap == 0 && cuda::exp_parts(0.0f).sigma == 1, "zero");
}

constexpr Reduction kReductions[] = {Reduction::off,       Reduction::none, Reduction::dim, Reduction::sample,
                                     Reduction::batchmean, Reduction::mean, Reduction::sum};

void test_reductions() {
  const Sizes shapes[] = {{5, 16}, {7, 9}, {1, 1}, {40, 64}, {3, 2, 8, 12}, {97, 63}, {2, 9000}, {700, 3}, {3, 20000}};
  for (const Sizes& shape : shapes) {
    for (Reduction reduction : kReductions) check_case({.shape = shape, .reduction = reduction});
  }
  for (Reduction reduction : kReductions) {
    for (Dtype dtype : {Dtype::bf16, Dtype::f16, Dtype::f64}) {
      check_case({.shape = {24, 40}, .dtype = dtype, .reduction = reduction});
      check_case({.shape = {6, 5, 7}, .batch_ndim = 2, .dtype = dtype, .reduction = reduction});
    }
    if (reduction != Reduction::off) check_case({.shape = {24, 40}, .reduction = reduction, .sampled = false});
    check_case({.shape = {4, 6, 10}, .reduction = reduction, .layout = Layout::transposed});
    check_case({.shape = {4, 48}, .reduction = reduction, .layout = Layout::misaligned});
    check_case({.shape = {4, 6, 8}, .batch_ndim = 2, .reduction = reduction, .expanded = true});
    check_case({.shape = {37}, .batch_ndim = 0, .reduction = reduction});
    check_case({.shape = {37}, .batch_ndim = 1, .reduction = reduction});
  }
}

void test_options() {
  for (Param param : {Param::logvar, Param::logstd, Param::std}) {
    for (bool clamped : {false, true}) {
      for (const Sizes& shape : {Sizes{6, 24}, Sizes{6, 11}}) {
        check_case({.shape = shape, .param = param, .clamped = clamped, .temperature = 0.7});
        check_case({.shape = shape,
                    .reduction = Reduction::sample,
                    .param = param,
                    .clamped = clamped,
                    .prior_kept = {false, true}});
        check_case({.shape = shape,
                    .dtype = Dtype::f64,
                    .param = param,
                    .clamped = clamped,
                    .prior_dtype = Dtype::f64,
                    .prior_kept = {false, true}});
      }
    }
  }
  for (Dtype eps : {Dtype::f32, Dtype::bf16, Dtype::f16, Dtype::f64}) {
    check_case({.shape = {6, 24}, .eps_given = true, .eps_dtype = eps});
    check_case({.shape = {5, 7}, .eps_given = true, .eps_dtype = eps, .layout = Layout::transposed});
    check_case({.shape = {5, 16}, .dtype = Dtype::bf16, .prior_dtype = eps, .prior_kept = {false, true}});
  }
  for (int64_t length : {16, 8, 5, 7, 12}) check_case({.shape = {6, length}, .streams = 6});
  check_case({.shape = {3, 4, 9}, .batch_ndim = 2, .reduction = Reduction::sample, .streams = 12});
}

void test_priors() {
  const std::vector<bool> kept[] = {{false, true, false},  {false, true, true}, {true, false, false},
                                    {false, false, false}, {true, true, true},  {true, false, true},
                                    {false, false, true},  {true, true, false}};
  for (const auto& k : kept) {
    for (const Sizes& shape : {Sizes{4, 3, 40}, Sizes{5, 3, 7}, Sizes{2, 2, 20000}, Sizes{900, 2, 8}}) {
      check_case({.shape = shape, .prior_kept = k});
    }
    check_case({.shape = {4, 3, 16},
                .dtype = Dtype::f16,
                .reduction = Reduction::none,
                .prior_dtype = Dtype::f16,
                .prior_kept = k});
    check_case({.shape = {4, 3, 16}, .reduction = Reduction::off, .prior_kept = k});
  }
}

// log N(x; mu, sigma^2): the problem's gz serves as x.
void check_log_prob(const Case& c) {
  const Problem p(c);
  Results r;
  r.kl = make({p.reduced_n()}, compute(c.dtype));
  r.z = make(c.shape, c.dtype, c.layout);
  r.gmu = make(c.shape, c.dtype, c.layout);
  r.grho = make(c.shape, c.dtype, c.layout);
  const Merge merge(c.shape,
                    {p.gz.stride, p.mu.stride, p.rho.stride, p.gkl.stride, r.z.stride, r.gmu.stride, r.grho.stride});
  LogProbForward forward{};
  LogProbBackward backward{};
  for (LogProb* call : {static_cast<LogProb*>(&forward), static_cast<LogProb*>(&backward)}) {
    call->shape = merge.shape(p.n, p.rows);
    call->x = merge.operand(p.gz, 0);
    call->mu = merge.operand(p.mu, 1);
    call->rho = merge.operand(p.rho, 2);
    call->param = c.param;
    call->reduction = c.reduction;
  }
  forward.out = r.kl.data();
  backward.grad = merge.operand(p.gkl, 3);
  backward.gx = merge.operand(r.z, 4);
  backward.gmu = merge.operand(r.gmu, 5);
  backward.grho = merge.operand(r.grho, 6);
  ScratchMemory memory;
  CHECK(cuda::log_prob_forward(forward, memory.scratch(cuda::log_prob_forward_scratch(forward)), nullptr) == 0,
        "launch");
  CHECK(cuda::log_prob_backward(backward, nullptr) == 0, "launch");
  memory.check(c.name());

  const double scale = reduction_scale(c.reduction, forward.shape);
  std::vector<double> out(p.reduced_n()), gx(p.n), gmu(p.n), grho(p.n);
  for (int64_t i = 0; i < p.n; ++i) {
    const double x = element(c.shape, p.gz, i), mu = element(c.shape, p.mu, i), rho = element(c.shape, p.rho, i);
    const double lv = log_variance(rho, c.param), sigma = std::exp(lv / 2), t = (x - mu) / sigma;
    const double w = element(c.shape, p.gkl, i) * scale;
    const double chain = c.param == Param::logvar ? 0.5 : c.param == Param::logstd ? 1 : 1 / rho;
    out[p.reduced_at(i)] -= scale * 0.5 * (t * t + lv + std::log(2 * M_PI));
    gmu[i] = w * t / sigma;
    gx[i] = -gmu[i];
    grho[i] = w * chain * (t * t - 1);
  }
  compare("log prob", p, r.kl, out, r.kl.stride, {p.reduced_n()}, 16, 20);
  compare("gx", p, r.z, gx, r.z.stride, c.shape, 16, 20);
  compare("gmu", p, r.gmu, gmu, r.gmu.stride, c.shape, 16, 20);
  compare("grho", p, r.grho, grho, r.grho.stride, c.shape, 16, 60);
}

void test_log_prob() {
  for (Reduction reduction : kReductions) {
    if (reduction == Reduction::off) continue;
    for (Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f16, Dtype::f64}) {
      for (Param param : {Param::logvar, Param::logstd, Param::std}) {
        check_log_prob({.shape = {6, 40}, .dtype = dtype, .reduction = reduction, .param = param});
        check_log_prob({.shape = {5, 4, 7},
                        .batch_ndim = 2,
                        .dtype = dtype,
                        .reduction = reduction,
                        .param = param,
                        .layout = Layout::transposed,
                        .expanded = true});
      }
    }
    check_log_prob({.shape = {2, 9000}, .reduction = reduction});
    check_log_prob({.shape = {3000, 16}, .reduction = reduction});
  }
}

// A row's sum is the same bits wherever the row stands, and whatever its memory's layout.
void test_rows_alone() {
  for (int64_t length : {5, 20, 64, 72, 600, 2048, 5000, 20000}) {
    const Problem many({.shape = {6, length}, .reduction = Reduction::sample, .sampled = false});
    Results all;
    run_forward(many, all);
    for (int64_t row = 0; row < 6; ++row) {
      Problem one(
          {.shape = {1, length}, .reduction = Reduction::sample, .sampled = false, .layout = Layout::misaligned});
      for (int64_t i = 0; i < length; ++i) {
        one.mu.set(i, many.mu.at(row * length + i));
        one.rho.set(i, many.rho.at(row * length + i));
      }
      Results alone;
      run_forward(one, alone);
      CHECK(alone.kl.at(0) == all.kl.at(row), "row %lld of length %lld", static_cast<long long>(row),
            static_cast<long long>(length));
    }
  }
}

// More long rows than tickets: several rows count on one.
void test_shared_tickets() {
  const int64_t rows = cuda::kTickets + 30, length = 8200;
  Tensor mu = make({rows, length}, Dtype::f32), rho = make({rows, length}, Dtype::f32);
  for (int64_t i = 0; i < rows * length; ++i) mu.set(i, static_cast<double>(i / length)), rho.set(i, 0);
  GaussianForward call{};
  call.shape = {1, {rows * length}, rows * length, rows};
  for (Operand* o : {&call.mu, &call.rho}) o->linear = true, o->stride[0] = 1;
  call.mu.data = mu.data();
  call.rho.data = rho.data();
  call.reduction = Reduction::sample;
  std::vector<float> kl(rows, NAN);
  call.kl = kl.data();
  ScratchMemory memory;
  CHECK(cuda::gaussian_forward(call, memory.scratch(cuda::gaussian_forward_scratch(call)), nullptr) == 0, "launch");
  memory.check("shared tickets");
  for (int64_t r = 0; r < rows; ++r) {
    const double want = 0.5 * static_cast<double>(r * r * length);
    CHECK(std::fabs(kl[r] - want) <= 1e-6 * want, "row %lld: %g", static_cast<long long>(r), kl[r]);
  }
}

void test_empty() {
  for (const Sizes& shape : {Sizes{0, 5}, Sizes{4, 0}}) {
    for (Reduction reduction : kReductions) {
      if (shape[0] == 0 && reduction == Reduction::dim) continue;  // the caller's, as vaeops.h says
      Case c{.shape = shape, .reduction = reduction};
      Problem p({.shape = {4, 5}});
      p.c = c;
      p.n = 0;
      p.rows = shape[0];
      const int64_t sums = reduction == Reduction::sample ? shape[0] : reduction < Reduction::batchmean ? 0 : 1;
      std::vector<float> kl(static_cast<size_t>(sums), NAN);
      GaussianForward call{};
      call.shape = {2, {shape[0], shape[1]}, 0, shape[0]};
      call.reduction = reduction;
      call.kl = kl.data();
      ScratchMemory memory;
      CHECK(cuda::gaussian_forward(call, memory.scratch(cuda::gaussian_forward_scratch(call)), nullptr) == 0, "launch");
      for (float x : kl) CHECK(x == 0, "%g: %s", x, c.name().c_str());
    }
  }
  float prior[2][3];
  memset(prior, 0xFF, sizeof(prior));
  GaussianBackward call{};
  call.shape = {2, {0, 3}, 0, 0};
  call.prior_mu.data = call.prior_rho.data = prior;
  call.gprior_mu = prior[0];
  call.gprior_rho = prior[1];
  call.prior_n = 3;
  call.prior_stride[1] = 1;
  CHECK(cuda::gaussian_backward(call, {}, nullptr) == 0, "launch");
  for (int i = 0; i < 6; ++i) CHECK(prior[i / 3][i % 3] == 0, "prior gradient %d", i);
}

// NaN and infinity stay in their element and row; a log-variance of -inf is sigma 0, not NaN.
void test_special_values() {
  Problem p({.shape = {5, 16}, .reduction = Reduction::sample});
  p.mu.set(16, NAN);
  p.rho.set(33, -INFINITY);
  p.rho.set(50, 400);
  Results r;
  run_forward(p, r);
  run_backward(p, r);
  for (int64_t i = 0; i < 80; ++i) CHECK(std::isnan(r.z.at(i)) == (i == 16), "z[%d]: %g", int(i), r.z.at(i));
  CHECK(r.z.at(33) == p.mu.at(33), "sigma of -inf: %g", r.z.at(33));
  for (int row = 0; row < 5; ++row) {
    const double kl = r.kl.at(row);
    CHECK(row == 1 ? std::isnan(kl) : row == 2 || row == 3 ? kl == INFINITY : std::isfinite(kl), "row %d: %g", row, kl);
  }
  CHECK(!std::isnan(r.grho.at(33)) && std::isnan(r.gmu.at(16)), "gradients: %g %g", r.grho.at(33), r.gmu.at(16));
}

#ifdef VAEOPS_WITH_CPU
void test_same_bits_as_cpu() {
  std::vector<int64_t> seed = {1234567, -89, 5, 77};
  for (int64_t n : {1, 30, 4096, 100002}) {
    for (int64_t streams : {1, 2}) {
      std::vector<float> host(n), cpu(n);
      cuda::normal(host.data(), n, {seed.data(), streams}, nullptr);
      for (cpu::Isa isa : {cpu::Isa::scalar, cpu::Isa::avx2, cpu::Isa::avx512}) {
        if (n % streams != 0 || !cpu::set_isa(isa)) continue;
        cpu::normal(cpu.data(), n, {seed.data(), streams}, serially);
        CHECK(memcmp(host.data(), cpu.data(), n * sizeof(float)) == 0, "normals differ on ISA %d",
              static_cast<int>(isa));
      }
    }
  }
  for (Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f16, Dtype::f64}) {
    for (Param param : {Param::logvar, Param::logstd, Param::std}) {
      check_cpu({.shape = {6, 40}, .dtype = dtype, .param = param});
      check_cpu({.shape = {5, 41}, .dtype = dtype, .param = param, .clamped = true, .temperature = 0.7, .streams = 5});
      check_cpu(
          {.shape = {5, 9}, .dtype = dtype, .param = param, .prior_kept = {false, true}, .layout = Layout::transposed});
    }
  }
}
#endif

}  // namespace
}  // namespace vaeops::test

int main() {
  using namespace vaeops::test;
  test_philox();
  test_noise_bits();
  test_exp();
  test_reductions();
  test_options();
  test_priors();
  test_log_prob();
  test_rows_alone();
  test_shared_tickets();
  test_empty();
  test_special_values();
#ifdef VAEOPS_WITH_CPU
  test_same_bits_as_cpu();
#endif
  return report();
}
