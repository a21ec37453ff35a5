// exp and log for one instruction set. No include guard: see foreach_isa.h.

// One evaluation of exp serves all that the step needs of h = log sigma. With f = h - j log 2:
//     sigma = exp(h)     gap = expm1(h) - h     u = expm1(h)
// (Above h = 88.38, half a power of two below overflow, j stays 127 and sigma is within 1e-5.)
// For |h| < 0.35, j = 0 and gap is the series itself: no cancellation near the prior, and no select.
// Then expm1(2h) = u (u + 2) and expm1(2h) - 2h = u^2 + 2 gap.
struct Exp {
  F sigma, gap, u;
};

VAEOPS_INLINE Exp exp_parts(F h) {
  const F top = at_most(h, 89.0f);     // exp overflows at 88.72
  const F x = at_least(top, -104.0f);  // and rounds to 0 here
  const F magic = set1(0x1.8p23f);     // adding it rounds to an integer
  const F j = at_most(fma(x, set1(1.44269504f), magic) - magic, 127.0f);
  const F f = fnma(j, set1(1.42860677e-6f), fnma(j, set1(0.693145752f), x));
  const F q = horner(f, set1(1.37805939e-3f), 8.37312452e-3f, 4.16695364e-2f, 1.66664720e-1f, 4.99999851e-1f);
  const F r = q * (f * f), growth = f + r;
  const F power = power_of_two(j), below = power - set1(1.0f);
  Exp e;
  e.sigma = fma(power, growth, power);
  e.u = fma(power, growth, below);
  e.gap = fma(power, r, fma(power, f, below) - top);
  return e;
}

// Natural logarithm of any float.
VAEOPS_INLINE F log(F x) {
  const Mask subnormal = less(x, set1(0x1p-126f));
  const F y = log_unit(select(subnormal, x * set1(0x1p23f), x));
  const F shifted = select(subnormal, y - set1(23 * 0.693147182f), y);
  const F infinity = set1(__builtin_inff());
  const F positive = select(less(x, infinity), shifted, x);
  const F other =
      (x - x) + select(less(x, set1(0.0f)), infinity - infinity, set1(0.0f) - infinity);  // 0: -inf; else NaN
  return select(less(set1(0.0f), x), positive, other);
}

// log(1 - x) for any x, without the rounding of 1 - x near 0.
VAEOPS_INLINE F log_one_minus(F x) {
  const F minus = set1(0.0f) - x;
  return select(less(absolute(x), set1(1 / 3.0f)), log1p_third(minus), log(set1(1.0f) + minus));
}

// exp(x) for x <= 0.
VAEOPS_INLINE F exp_of_negative(F x) {
  x = at_least(x, -104.0f);  // rounds to 0 here
  const F magic = set1(0x1.8p23f);
  const F j = fma(x, set1(1.44269504f), magic) - magic;
  const F f = fnma(j, set1(1.42860677e-6f), fnma(j, set1(0.693145752f), x));
  const F q = horner(f, set1(1.37805939e-3f), 8.37312452e-3f, 4.16695364e-2f, 1.66664720e-1f, 4.99999851e-1f);
  const F power = power_of_two(j);
  return fma(power, fma(q, f * f, f), power);
}

// log(1 + exp(-y)) for y >= 0: the logarithm of 1 + e, e in [0, 1], or of half of it where e > 1/3.
VAEOPS_INLINE F softplus_of_negative(F y) {
  const F e = exp_of_negative(set1(0.0f) - y);
  const Mask halve = less(set1(1 / 3.0f), e);
  const F f = select(halve, (e - set1(1.0f)) * set1(0.5f), e);
  return log1p_third(f) + select(halve, set1(0.693147182f), set1(0.0f));
}

VAEOPS_INLINE F softplus(F x) { return at_least(x, 0.0f) + softplus_of_negative(absolute(x)); }  // log(1 + exp(x))

VAEOPS_INLINE F sigmoid(F x) {
  const F e = exp_of_negative(set1(0.0f) - absolute(x));
  return select(less(x, set1(0.0f)), e, set1(1.0f)) / (set1(1.0f) + e);
}
