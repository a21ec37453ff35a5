"""Device functions of the Gaussian family, in fp32 (fp64 for fp64). Formulas: vaeops/ref/gaussian.py."""

import triton
import triton.language as tl

from ..rng import log_normal_range


@triton.jit
def power_of_two(k):
    """2^k for integral fp32 k in [-126, 127]."""
    return ((k.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exp_parts(h):
    """exp(h), expm1(h) and expm1(h) - h of fp32, from one reduction h = j log 2 + f and one polynomial.

    exp has the bits of the CPU kernels. The last result does not cancel near 0, where it is h^2 / 2.
    """
    top = tl.where(h > 89.0, 89.0, h)  # exp overflows there; the comparison keeps NaN
    low = tl.where(top < -104.0, -104.0, top)  # and rounds to 0 there
    j = tl.fma(low, 1.44269504, 12582912.0) - 12582912.0  # to the nearest integer
    j = tl.where(j > 127.0, 127.0, j)
    f = tl.fma(j, -0.693145752, low)
    f = tl.fma(j, -1.42860677e-6, f)
    q = tl.fma(f, 1.37805939e-3, 8.37312452e-3)
    q = tl.fma(f, q, 4.16695364e-2)
    q = tl.fma(f, q, 1.66664720e-1)
    q = tl.fma(f, q, 4.99999851e-1)
    r = q * (f * f)
    growth = f + r
    normal = tl.where(j < -100.0, -100.0, j)
    s = power_of_two(normal) * power_of_two(j - normal)  # 2^j: exact, also where it is subnormal
    exp = tl.fma(s, growth, s)
    expm1 = tl.fma(s, growth, s - 1.0)
    gap = tl.fma(s, r, tl.fma(s, f, s - 1.0) - top)
    return exp, expm1, gap


@triton.jit
def exp(h):
    if h.dtype == tl.float64:
        result = tl.exp(h)
    else:
        result, _, _ = exp_parts(h)
    return result


@triton.jit
def expm1_and_gap(x):
    """expm1(x) and g(x) = expm1(x) - x."""
    if x.dtype == tl.float64:
        small = tl.abs(x) < 0.5
        t = tl.where(small, x, 0.0)
        series = t * 0.0 + 1.0
        for k in tl.static_range(17, 2, -1):  # 0.5^18 / 18! < 1e-21
            series = series * t * (1.0 / k) + 1.0
        expm1 = tl.exp(x) - 1.0
        gap = tl.where(small, t * t * 0.5 * series, expm1 - x)
        expm1 = tl.where(small, t + gap, expm1)
    else:
        _, u, half_gap = exp_parts(x * 0.5)
        expm1 = u * (u + 2.0)
        gap = tl.fma(u, u, 2.0 * half_gap)
    return expm1, gap


@triton.jit
def log(x):
    """Natural logarithm: -inf at 0, NaN below."""
    if x.dtype == tl.float64:
        result = tl.log(x)
    else:
        subnormal = x < 1.1754943508222875e-38
        result = log_normal_range(tl.where(subnormal, x * 16777216.0, x))
        result = tl.where(subnormal, result - 16.63553237915039, result)
        result = tl.where((x > 0.0) & (x < float("inf")), result, tl.where(x < 0.0, float("nan"), x))
        result = tl.where(x == 0.0, float("-inf"), result)
    return result


@triton.jit
def log_variance(rho, PARAM: tl.constexpr):
    if PARAM == "logvar":
        result = rho
    elif PARAM == "logstd":
        result = rho * 2.0
    else:
        result = log(rho) * 2.0
    return result


@triton.jit
def deviation(rho, PARAM: tl.constexpr):
    """sigma."""
    if PARAM == "logvar":
        result = exp(rho * 0.5)
    elif PARAM == "logstd":
        result = exp(rho)
    else:
        result = rho
    return result


@triton.jit
def reciprocal(x):
    return 1.0 / x if x.dtype == tl.float64 else tl.div_rn(tl.full(x.shape, 1.0, tl.float32), x)


@triton.jit
def inverse_deviation(rho, PARAM: tl.constexpr):
    """1 / sigma, kept finite for fp32 log-deviations below -88."""
    if PARAM == "std":
        result = reciprocal(rho)
    else:
        h = -rho if PARAM == "logstd" else rho * -0.5
        if h.dtype != tl.float64:
            h = tl.where(h > 88.0, 88.0, h)
        result = exp(h)
    return result


@triton.jit
def chain(rho, x, PARAM: tl.constexpr):
    """A gradient x of log sigma^2, doubled, as one of rho: x * (d log sigma^2 / d rho) / 2."""
    if PARAM == "logvar":
        result = x * 0.5
    elif PARAM == "logstd":
        result = x
    else:
        result = x * reciprocal(rho)
    return result
