// The noise stream (specification: vaeops/ref/rng.py) and the exponential of the Gaussian family.
//
// Normals are the same bits as on every other device: fp32 add, multiply, fma and square root alone, each rounded once.
// The intrinsics say so to the compiler, which may fuse or reorder plain operators.
#pragma once
#include "common.cuh"

namespace vaeops::cuda {

__device__ __forceinline__ float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ __forceinline__ double fused(double a, double b, double c) { return fma(a, b, c); }

struct Words {
  uint32_t x[4];
};

// One Philox4x32-10 block.
__device__ __forceinline__ Words philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
    const uint32_t high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
    c0 = high1 ^ c1 ^ k0;
    c2 = high0 ^ c3 ^ k1;
    c1 = low1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

__device__ __forceinline__ float poly(float, float acc) { return acc; }
// Horner's rule, highest power first.
template <class... Rest>
__device__ __forceinline__ float poly(float x, float acc, float next, Rest... rest) {
  return poly(x, __fmaf_rn(x, acc, next), rest...);
}

// Natural logarithm for u in [2^-33, 1]: u = 2^k m with m in [2/3, 4/3), then a polynomial in m - 1.
__device__ __forceinline__ float log_uniform(float u) {
  const uint32_t exponent = (__float_as_uint(u) - 0x3F2AAAABu) & 0xFF800000u;
  const float f = __fadd_rn(__uint_as_float(__float_as_uint(u) - exponent), -1.0f);
  const float k = __fmul_rn(static_cast<float>(static_cast<int32_t>(exponent)), 0x1p-23f);
  const float p = poly(f, -0.13191646f, 0.1396245f, -0.12115126f, 0.1401092f, -0.16685466f, 0.20010044f, -0.24999689f,
                       0.33333224f, -0.5f);
  return __fmaf_rn(k, 0.693147182f, __fmaf_rn(__fmul_rn(f, f), p, f));
}

// Sine and cosine of 2 pi word / 2^32. The angle is cut to an eighth of a turn in integers, so nothing is lost.
__device__ __forceinline__ void sincos_turn(uint32_t word, float& sine, float& cosine) {
  const float r = __fmul_rn(static_cast<float>(static_cast<int32_t>(word << 2)), 0x1p-32f);  // quarter turns
  const uint32_t quadrant = (word + 0x20000000u) >> 30;
  const float t = __fmul_rn(r, r);
  const float s = __fmaf_rn(__fmul_rn(r, t), poly(t, 0.00015820675f, -0.0046812664f, 0.07969258f, -0.6459641f),
                            __fmul_rn(r, 1.5707964f));
  const float c = poly(t, 0.0009040216f, -0.020860288f, 0.25366923f, -1.2337005f, 1.0f);
  const bool swap = quadrant & 1;
  sine = __uint_as_float(__float_as_uint(swap ? c : s) ^ ((quadrant & 2) << 30));
  cosine = __uint_as_float(__float_as_uint(swap ? s : c) ^ (((quadrant + 1) & 2) << 30));
}

__device__ __forceinline__ void box_muller(uint32_t a, uint32_t b, float& first, float& second) {
  const float u = __fmaf_rn(static_cast<float>(a), 0x1p-32f, 0x1p-33f);
  const float radius = __fsqrt_rn(__fmul_rn(-2.0f, log_uniform(u)));
  float sine, cosine;
  sincos_turn(b, sine, cosine);
  first = __fmul_rn(radius, cosine);
  second = __fmul_rn(radius, sine);
}

// The four normals of block `quad` of a stream.
__device__ __forceinline__ void draw(const int64_t* seed /* [2] */, int64_t quad, float (&normal)[4]) {
  const uint64_t counter = static_cast<uint64_t>(seed[1]) + static_cast<uint64_t>(quad);
  const Words w = philox(static_cast<uint64_t>(seed[0]), static_cast<uint32_t>(counter),
                         static_cast<uint32_t>(counter >> 32), 0, 0);
  box_muller(w.x[0], w.x[1], normal[0], normal[1]);
  box_muller(w.x[2], w.x[3], normal[2], normal[3]);
}

// Where logical element i lies in the S streams of n elements: its stream's seed, and its position there.
__device__ __forceinline__ const int64_t* stream_of(const Noise& noise, int64_t n, int64_t i, int64_t& position) {
  if (noise.streams <= 1) {
    position = i;
    return noise.seed;
  }
  return noise.seed + 2 * divide(i, n / noise.streams, position);
}

// Normals of consecutive elements, one at a time; a block is drawn when the elements enter it.
struct NoiseWalk {
  float normal[4] = {};
  bool started = false;

  __device__ __forceinline__ float at(const Noise& noise, int64_t n, int64_t i) {
    int64_t position;
    const int64_t* seed = stream_of(noise, n, i, position);
    const int lane = static_cast<int>(position & 3);
    if (!started || lane == 0) draw(seed, position >> 2, normal);
    started = true;
    return lane == 0 ? normal[0] : lane == 1 ? normal[1] : lane == 2 ? normal[2] : normal[3];
  }
};

// One exponential gives all three, none of them by cancellation.
template <class C>
struct Exp {
  C sigma;  // exp(x / 2)
  C expm1;  // exp(x) - 1
  C gap;    // exp(x) - 1 - x
};

__device__ __forceinline__ float power_of_two(int32_t exponent) {  // in [-126, 127]
  return __uint_as_float((static_cast<uint32_t>(exponent) + 127u) << 23);
}

// h = x / 2 = j ln 2 + f, exp(f) = 1 + f + r with r a polynomial times f^2: exp(h) - 1 - h then needs no subtraction of
// nearly equal numbers, and (exp(h) - 1)^2 + 2 (exp(h) - 1 - h) = exp(x) - 1 - x.
__device__ __forceinline__ Exp<float> exp_parts(float x) {
  const float h = __fmul_rn(0.5f, x);
  const float h1 = h > 89.0f ? 89.0f : h;  // exp(89) overflows; written so that NaN stays
  const float hc = h1 < -104.0f ? -104.0f : h1;
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits: no conversions, which are slow.
  const float shifted = fminf(__fmaf_rn(hc, 1.44269504f, 12582912.0f), 12582912.0f + 127.0f);
  const float j = __fadd_rn(shifted, -12582912.0f);
  const int32_t power = static_cast<int32_t>(__float_as_uint(shifted) - 0x4B400000u);
  const float f = __fmaf_rn(-j, 1.42860677e-6f, __fmaf_rn(-j, 0.693145752f, hc));
  const float q = poly(f, 1.37805939e-3f, 8.37312452e-3f, 4.16695364e-2f, 1.66664720e-1f, 4.99999851e-1f);
  const float r = __fmul_rn(q, __fmul_rn(f, f));
  // 2^j by two normal factors, whose product may be subnormal and is exact.
  const int32_t normal = power < -100 ? -100 : power;
  const float scale = __fmul_rn(power_of_two(normal), power_of_two(power - normal));
  const float growth = __fadd_rn(f, r), below = __fadd_rn(scale, -1.0f);
  const float u = __fmaf_rn(scale, growth, below);                                   // exp(h) - 1
  const float gh = __fmaf_rn(scale, r, __fadd_rn(__fmaf_rn(scale, f, below), -h1));  // exp(h) - 1 - h
  return {__fmaf_rn(scale, growth, scale), __fmul_rn(u, __fadd_rn(u, 2.0f)), __fmaf_rn(u, u, __fmul_rn(2.0f, gh))};
}

__device__ __forceinline__ Exp<double> exp_parts(double x) {
  const double e = expm1(x);
  double gap = e - x;
  if (fabs(x) < 0.5) {
    double series = 0, factorial = 355687428096000.0;  // 17!
    for (int k = 17; k > 1; --k) {
      series = (series + 1.0 / factorial) * x;
      factorial /= k;
    }
    gap = series * x;
  }
  return {exp(0.5 * x), e, gap};
}

// 1 / sigma = exp(-x / 2), finite for any x so that a difference of zero stays zero.
__device__ __forceinline__ float inverse_sigma(float x) { return exp_parts(-x > 176.0f ? 176.0f : -x).sigma; }
__device__ __forceinline__ double inverse_sigma(double x) { return exp(0.5 * (-x > 1400.0 ? 1400.0 : -x)); }

}  // namespace vaeops::cuda
