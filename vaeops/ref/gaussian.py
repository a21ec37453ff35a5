"""The Gaussian step in plain PyTorch: what each kernel must compute, on any device, in fp32 or fp64.

q = N(mu, sigma^2) per element, with sigma written as log-variance, log-deviation or deviation (`param`).
    sample            z  = mu + temperature * sigma * eps
    KL to N(0, I)     kl = (mu^2 + g(log sigma^2)) / 2,                      g(x) = expm1(x) - x
    KL to N(m, s^2)   kl = (((mu - m) / s)^2 + g(log sigma^2 - log s^2)) / 2
    log density       log N(x; mu, sigma^2) = -(((x - mu) / sigma)^2 + log sigma^2 + log 2 pi) / 2
The textbook form 1 + lv - mu^2 - exp(lv) cancels: in fp32 it is 44 % wrong at scale 1e-4. There g is
summed as its series.

The public functions mirror `vaeops.*` argument for argument. `gaussian_fwd` / `gaussian_bwd` and
`log_prob_fwd` / `log_prob_bwd` mirror the low-level ops; the `_bwd` pair is itself differentiable, which is
what serves double backward.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import rng

PARAMS = ("logvar", "logstd", "std")
REDUCTIONS = ("none", "dim", "sample", "batchmean", "mean", "sum")
NO_KL = -1  # the low-level ops' reduction code for "the KL is not wanted"


class LatentOutput(NamedTuple):
    """z, its KL, and the seed that drew it (None where eps was given)."""

    z: Tensor
    kl: Tensor
    seed: Tensor | None


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def expm1_gap(x: Tensor) -> Tensor:
    """g(x) = expm1(x) - x = x^2/2! + x^3/3! + ..., without cancellation near 0. Non-negative."""
    small = x.abs() < 0.5
    t = torch.where(small, x, 0.0)  # keeps the unused branch's gradient finite
    series = torch.zeros_like(t)
    for k in range(17, 1, -1):  # 0.5^18 / 18! < 1e-21
        series = (series + 1.0 / math.factorial(k)) * t
    return torch.where(small, series * t, torch.where(x == math.inf, x, torch.expm1(x) - x))


def _log_variance(rho: Tensor, param: int) -> Tensor:
    return (rho, 2 * rho, 2 * rho.log() if param == 2 else rho)[param]


def _sigma(rho: Tensor, param: int) -> Tensor:
    return rho if param == 2 else (_log_variance(rho, param) / 2).exp()


def _unpack(q: Tensor, rho: Tensor | None, packed_dim: int) -> tuple[Tensor, Tensor]:
    if rho is not None:
        return q, rho
    mu, rho = q.chunk(2, packed_dim)
    return mu, rho


def batch_count(shape: torch.Size, batch_ndim: int) -> int:
    return shape[:batch_ndim].numel()


def _weight_shape(shape: torch.Size, batch_ndim: int, reduction: int) -> list[int]:
    """The shape in which a gradient of the reduced KL broadcasts over the elements."""
    return [*shape[:batch_ndim], *[1] * (len(shape) - batch_ndim)] if reduction == 2 else []


def scale(shape: torch.Size, batch_ndim: int, reduction: int) -> float:
    """What a sum over elements is multiplied by. Zero rows give a zero loss, not 0 / 0."""
    count = {1: batch_count(shape, batch_ndim), 3: batch_count(shape, batch_ndim), 4: shape.numel()}.get(
        reduction, 1
    )
    return 1.0 / max(count, 1)


def reduce(x: Tensor, reduction: int, batch_ndim: int) -> Tensor:
    """Per-element values to the reduction asked for (an index into REDUCTIONS)."""
    factor = scale(x.shape, batch_ndim, reduction)
    if reduction == 0:
        return x
    if reduction == 1:
        return x.flatten(0, batch_ndim - 1).sum(0) * factor if batch_ndim else x.clone()
    if reduction == 2:
        return x.flatten(batch_ndim).sum(-1) if x.dim() > batch_ndim else x.clone()
    return x.sum() * factor


def finish_per_example(x: Tensor, shape: torch.Size, reduction: int, batch_ndim: int) -> Tensor:
    """x [V, ...], reduced per element or sample under vmap, to the one asked for; `shape`: one example's."""
    if reduction == 1 and batch_ndim:
        x = x.flatten(1, batch_ndim).sum(1)
    if reduction > 2:
        x = x.reshape(x.shape[0], -1).sum(1)
    return x if reduction in (0, 2) else x * scale(shape, batch_ndim, reduction)


def reduced_shape(shape: torch.Size, reduction: int, batch_ndim: int) -> list[int]:
    return list((shape, shape[batch_ndim:], shape[:batch_ndim], (), (), ())[reduction])


def spread(grad: Tensor, shape: torch.Size, reduction: int, batch_ndim: int) -> Tensor:
    """Transpose of `reduce`: the gradient of each element, broadcastable to `shape`."""
    if reduction == 2:
        grad = grad.reshape(_weight_shape(shape, batch_ndim, reduction))
    return grad * scale(shape, batch_ndim, reduction)


def _noise(shape: torch.Size, seed: Tensor | None, eps: Tensor | None, dtype: torch.dtype) -> Tensor:
    if eps is None:
        assert seed is not None
        eps = rng.normal(shape, seed)
    return eps.to(dtype)


def _kl_elements(
    mu: Tensor, lv: Tensor, prior_mu: Tensor | None, prior_rho: Tensor | None, param: int
) -> Tensor:
    if prior_mu is None or prior_rho is None:
        return 0.5 * (mu * mu + expm1_gap(lv))
    prior_mu, prior_rho = prior_mu.to(mu.dtype), prior_rho.to(mu.dtype)
    t = (mu - prior_mu) / _sigma(prior_rho, param)
    return 0.5 * (t * t + expm1_gap(lv - _log_variance(prior_rho, param)))


def _latent(
    mu, rho, prior_mu, prior_rho, seed, eps, param, clamp_lo, clamp_hi, reduction, batch_ndim, temperature
):
    """(z or None, kl or None) in the compute dtype, differentiable."""
    dtype = compute_dtype(mu.dtype)
    m, r = mu.to(dtype), rho.to(dtype)
    if not (math.isinf(clamp_lo) and math.isinf(clamp_hi)):
        r = r.clamp(clamp_lo, clamp_hi)
    z = kl = None
    if seed is not None or eps is not None:
        z = m + temperature * _sigma(r, param) * _noise(mu.shape, seed, eps, dtype)
    if reduction != NO_KL:
        elements = _kl_elements(m, _log_variance(r, param), prior_mu, prior_rho, param)
        kl = reduce(elements, reduction, batch_ndim)
    return z, kl


def gaussian_fwd(q, rho, prior_mu, prior_rho, seed, eps, packed_dim, param, clamp_lo, clamp_hi,
                 reduction, batch_ndim, temperature):  # fmt: skip
    """(z, kl); None for the one that was not asked for: no seed and no eps, or reduction NO_KL."""
    mu, rho = _unpack(q, rho, packed_dim)
    z, kl = _latent(
        mu, rho, prior_mu, prior_rho, seed, eps, param, clamp_lo, clamp_hi, reduction, batch_ndim, temperature
    )
    return None if z is None else torch.empty_like(mu).copy_(z), None if kl is None else kl.contiguous()


def gaussian_bwd(gz, gkl, q, rho, prior_mu, prior_rho, seed, eps, packed_dim, param, clamp_lo,
                 clamp_hi, reduction, batch_ndim, temperature):  # fmt: skip
    """Gradients of (q, rho, prior_mu, prior_rho), None for None. gz or gkl may be None, not both.

    With w the gradient of each element's KL, d = log sigma^2 - log s^2 and t = (mu - m) / s:
        d mu = gz + w t / s      d lv = (gz T sigma eps + w expm1(d)) / 2
        d m  = -w t / s          d ls = -w (expm1(d) + t^2) / 2
    and through `param`'s own derivative, zero where the clamp is outside its bounds.
    """
    mu, raw = _unpack(q, rho, packed_dim)
    dtype = compute_dtype(mu.dtype)
    m, r0 = mu.to(dtype), raw.to(dtype)
    r = r0.clamp(clamp_lo, clamp_hi)
    g_m = g_r = torch.zeros_like(m)
    g_pm = g_pr = None
    chain = 2 / r if param == 2 else (1.0, 2.0)[param]  # d log-variance / d rho
    if gz is not None:
        gz = gz.to(dtype)
        g_m = g_m + gz
        shift = temperature * _noise(mu.shape, seed, eps, dtype) * gz
        g_r = g_r + (shift if param == 2 else shift * _sigma(r, param) * (0.5 * chain))
    if gkl is not None:
        w = spread(gkl, mu.shape, reduction, batch_ndim)
        if prior_mu is None:
            g_m = g_m + w * m
            g_r = g_r + w * (0.5 * chain) * torch.expm1(_log_variance(r, param))
        else:
            pm, pr = prior_mu.to(dtype), prior_rho.to(dtype)
            s = _sigma(pr, param)
            t = (m - pm) / s
            e = torch.expm1(_log_variance(r, param) - _log_variance(pr, param))
            g_m = g_m + w * t / s
            g_r = g_r + w * (0.5 * chain) * e
            g_pm = (-w * t / s).expand_as(m).sum_to_size(prior_mu.shape).to(prior_mu.dtype)
            prior_chain = 2 / pr if param == 2 else chain
            g_pr = (
                (-0.5 * w * prior_chain * (e + t * t))
                .expand_as(m)
                .sum_to_size(prior_rho.shape)
                .to(prior_rho.dtype)
            )
    elif prior_mu is not None:
        g_pm, g_pr = torch.zeros_like(prior_mu), torch.zeros_like(prior_rho)
    g_r = torch.where((r0 < clamp_lo) | (r0 > clamp_hi), 0.0, g_r)
    g_m, g_r = g_m.to(mu.dtype), g_r.to(mu.dtype)
    return (torch.cat((g_m, g_r), packed_dim), None, g_pm, g_pr) if rho is None else (g_m, g_r, g_pm, g_pr)


def log_prob_fwd(x, mu, rho, param, reduction, batch_ndim):
    dtype = compute_dtype(x.dtype)
    v, m, r = x.to(dtype), mu.to(dtype), rho.to(dtype)
    t = (v - m) / _sigma(r, param)
    elements = -0.5 * (t * t + _log_variance(r, param) + math.log(2 * math.pi))
    return reduce(elements, reduction, batch_ndim).contiguous()


def log_prob_bwd(grad, x, mu, rho, param, reduction, batch_ndim):
    """With t = (x - mu) / sigma: d x = -w t / sigma, d mu = w t / sigma, d log sigma^2 = w (t^2 - 1) / 2."""
    dtype = compute_dtype(x.dtype)
    v, m, r = x.to(dtype), mu.to(dtype), rho.to(dtype)
    s = _sigma(r, param)
    t = (v - m) / s
    w = spread(grad, x.shape, reduction, batch_ndim)
    chain = 2 / r if param == 2 else (1.0, 2.0)[param]
    g = w * t / s
    return (-g).to(x.dtype), g.to(x.dtype), (0.5 * w * chain * (t * t - 1)).to(x.dtype)


def _bounds(clamp: tuple[float, float] | None) -> tuple[float, float]:
    return (-math.inf, math.inf) if clamp is None else clamp


def reparam_kl(mu, logvar, *, prior=None, param="logvar", clamp=None, reduction="batchmean", batch_ndim=1,
               temperature=1.0, seed=None, generator=None, eps=None, impl=None) -> LatentOutput:  # fmt: skip
    """Reference of `vaeops.reparam_kl`: same arguments, differentiable PyTorch throughout."""
    only_ref(impl)
    mu, logvar = torch.broadcast_tensors(mu, logvar)
    if seed is None and eps is None:
        seed = torch.randint(-(2**63), 2**63 - 1, (2,), device=mu.device, generator=generator)
    (prior_mu, prior_rho), (lo, hi) = prior or (None, None), _bounds(clamp)
    z, kl = _latent(mu, logvar, prior_mu, prior_rho, seed, eps, PARAMS.index(param), lo, hi,
                    REDUCTIONS.index(reduction), batch_ndim, temperature)  # fmt: skip
    assert z is not None and kl is not None
    return LatentOutput(z.to(mu.dtype), kl, None if eps is not None else seed)


def reparam_kl_packed(moments, *, dim=1, **options) -> LatentOutput:
    """Reference of `vaeops.reparam_kl_packed`."""
    return reparam_kl(*moments.chunk(2, dim), **options)


def reparameterize(
    mu, logvar, *, param="logvar", clamp=None, temperature=1.0, seed=None, generator=None, eps=None, impl=None
) -> Tensor:
    """Reference of `vaeops.reparameterize`."""
    return reparam_kl(mu, logvar, param=param, clamp=clamp, temperature=temperature, seed=seed,
                      generator=generator, eps=eps, impl=impl, reduction="none").z  # fmt: skip


def gaussian_kl(
    mu, logvar, *, prior=None, param="logvar", clamp=None, reduction="batchmean", batch_ndim=1, impl=None
) -> Tensor:
    """Reference of `vaeops.gaussian_kl`."""
    only_ref(impl)
    mu, logvar = torch.broadcast_tensors(mu, logvar)
    (prior_mu, prior_rho), (lo, hi) = prior or (None, None), _bounds(clamp)
    _, kl = _latent(mu, logvar, prior_mu, prior_rho, None, None, PARAMS.index(param), lo, hi,
                    REDUCTIONS.index(reduction), batch_ndim, 1.0)  # fmt: skip
    assert kl is not None
    return kl


def gaussian_log_prob(
    x, mu, logvar, *, param="logvar", reduction="sample", batch_ndim=1, impl=None
) -> Tensor:
    """Reference of `vaeops.gaussian_log_prob`."""
    only_ref(impl)
    x, mu, logvar = torch.broadcast_tensors(x, mu, logvar)
    return log_prob_fwd(x, mu, logvar, PARAMS.index(param), REDUCTIONS.index(reduction), batch_ndim)


def gaussian_nll(x, mu, logvar, *, param="logvar", reduction="batchmean", batch_ndim=1, impl=None) -> Tensor:
    """Reference of `vaeops.gaussian_nll`."""
    return -gaussian_log_prob(
        x, mu, logvar, param=param, reduction=reduction, batch_ndim=batch_ndim, impl=impl
    )


def only_ref(impl: str | None) -> None:
    if impl not in (None, "ref"):
        raise ValueError(f"vaeops.ref has no impl={impl!r}: it is the reference itself")
