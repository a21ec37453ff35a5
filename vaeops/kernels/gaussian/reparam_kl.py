"""The Gaussian step in Triton: sample and KL in one launch, their gradients in one.

Specification: vaeops/ref/gaussian.py. T is mu's dtype; F is the one to compute in: fp64 for fp64, else fp32.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ref import gaussian as ref
from .. import _layout as layout
from .._tile import aligned, arrive, collect, load, release, store, store_sum, tile_at
from ..rng import normal_tile
from ._math import chain, deviation, expm1_and_gap, inverse_deviation, log_variance


@triton.jit
def clamped(rho, lo, hi):
    """torch.clamp: NaN stays."""
    return tl.where(rho < lo, lo, tl.where(rho > hi, hi, rho))


@triton.jit(do_not_specialize=layout.FIXED)
def forward_kernel(
    mu, rho,  # T
    prior_mu, prior_rho,  # any floating dtype, or None: N(0, I)
    seed,  # int64 [S, 2], or None
    eps,  # any floating dtype, or None: drawn from seed
    z,  # T, or None: no sample wanted
    kl,  # F, in the reduced shape, or None: not wanted
    partial, ticket,  # F [groups * chunks], int32 [groups]; None without a sum over tiles
    mu_at, rho_at, prior_mu_at, prior_rho_at, eps_at, z_at, sizes,  # strides
    rows: tl.int64, cols: tl.int64, per_stream: tl.int64,
    chunks: tl.int32, tiles: tl.int32, group_tiles: tl.int32,
    scale: tl.float64, clamp_lo: tl.float64, clamp_hi: tl.float64, temperature: tl.float64,
    PARAM: tl.constexpr, CLAMP: tl.constexpr, AXIS: tl.constexpr, WIDE: tl.constexpr, ALIGNED: tl.constexpr,
    ONE_STREAM: tl.constexpr, QUADS: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    cols = aligned(cols, ALIGNED)
    F: tl.constexpr = tl.float64 if mu.dtype.element_ty == tl.float64 else tl.float32
    pid = tl.program_id(0)
    group, chunk = pid // chunks, pid % chunks
    total = tl.zeros([R, C], F)
    for k in range(tiles):
        tile, first_col = tile_at(group, chunk * tiles + k, rows, cols, group_tiles, AXIS, R, C)
        row, col, row_ok, col_ok, _ = tile
        inside = row_ok & col_ok
        m = load(mu, tile, sizes, mu_at, WIDE).to(F)
        r = load(rho, tile, sizes, rho_at, WIDE).to(F)
        if CLAMP:
            r = clamped(r, tl.cast(clamp_lo, F), tl.cast(clamp_hi, F))
        if z is not None:
            if eps is not None:
                noise = load(eps, tile, sizes, eps_at, WIDE)
            else:
                noise = normal_tile(seed, tile, first_col, per_stream, ONE_STREAM, QUADS, R, C)
            sample = tl.fma(tl.cast(temperature, F) * deviation(r, PARAM), noise.to(F), m)
            store(z, sample, tile, sizes, z_at, WIDE)
        if kl is not None:
            lv = log_variance(r, PARAM)
            if prior_mu is not None:
                p = load(prior_mu, tile, sizes, prior_mu_at, WIDE).to(F)
                s = load(prior_rho, tile, sizes, prior_rho_at, WIDE).to(F)
                t = (m - p) * inverse_deviation(s, PARAM)
                lv = lv - log_variance(s, PARAM)
            else:
                t = m
            _, gap = expm1_and_gap(lv)
            element = tl.where(inside, 0.5 * tl.fma(t, t, gap), 0.0)
            if AXIS == "none":
                tl.store(kl + row * cols + col, element, mask=inside)
            elif AXIS == "rows":
                value = tl.sum(element, axis=1, keep_dims=True)
                tl.store(kl + row, value * scale, mask=row_ok)
            else:
                total += element
    if kl is not None and (AXIS == "all" or AXIS == "columns"):
        store_sum(total, kl, partial, group, chunk, chunks, cols, scale, AXIS, R, C)
        if chunks > 1:
            if arrive(ticket, group, chunks):
                collect(kl, partial, group, chunks, cols, scale, AXIS, R, C)
                release(ticket, group)


@triton.jit(do_not_specialize=layout.FIXED)
def backward_kernel(
    gz,  # T, or None: no gradient reaches z
    gkl,  # F, broadcast, or None: no gradient reaches the KL
    mu, rho,  # T
    prior_mu, prior_rho,  # any floating dtype, or None: N(0, I)
    seed, eps,  # as in forward_kernel
    gmu, grho,  # T
    gprior_mu, gprior_rho,  # one element per group (AXIS "all"), row, column or element; None without a prior
    partial, partial_rho, ticket,  # F [groups * chunks] each, int32 [groups]; None without a sum over tiles
    gz_at, gkl_at, mu_at, rho_at, prior_mu_at, prior_rho_at, eps_at, gmu_at, grho_at, sizes,  # strides
    rows: tl.int64, cols: tl.int64, per_stream: tl.int64,
    chunks: tl.int32, tiles: tl.int32, group_tiles: tl.int32,
    scale: tl.float64, clamp_lo: tl.float64, clamp_hi: tl.float64, temperature: tl.float64,
    PARAM: tl.constexpr, CLAMP: tl.constexpr, AXIS: tl.constexpr, WIDE: tl.constexpr, ALIGNED: tl.constexpr,
    ONE_STREAM: tl.constexpr, QUADS: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    cols = aligned(cols, ALIGNED)
    F: tl.constexpr = tl.float64 if mu.dtype.element_ty == tl.float64 else tl.float32
    pid = tl.program_id(0)
    group, chunk = pid // chunks, pid % chunks
    total_m = tl.zeros([R, C], F)
    total_r = tl.zeros([R, C], F)
    for k in range(tiles):
        tile, first_col = tile_at(group, chunk * tiles + k, rows, cols, group_tiles, AXIS, R, C)
        row, col, row_ok, col_ok, _ = tile
        inside = row_ok & col_ok
        m = load(mu, tile, sizes, mu_at, WIDE).to(F)
        given = load(rho, tile, sizes, rho_at, WIDE).to(F)
        r = given
        if CLAMP:
            lo, hi = tl.cast(clamp_lo, F), tl.cast(clamp_hi, F)
            r = clamped(given, lo, hi)
        if gz is not None:
            d_m = load(gz, tile, sizes, gz_at, WIDE).to(F)
            if eps is not None:
                noise = load(eps, tile, sizes, eps_at, WIDE)
            else:
                noise = normal_tile(seed, tile, first_col, per_stream, ONE_STREAM, QUADS, R, C)
            shift = tl.cast(temperature, F) * noise.to(F) * d_m
            d_r = shift if PARAM == "std" else chain(r, shift * deviation(r, PARAM), PARAM)
        else:
            d_m = tl.zeros([R, C], F)
            d_r = tl.zeros([R, C], F)
        if gkl is not None:
            w = load(gkl, tile, sizes, gkl_at, WIDE).to(F) * tl.cast(scale, F)
            lv = log_variance(r, PARAM)
            if prior_mu is not None:
                p = load(prior_mu, tile, sizes, prior_mu_at, WIDE).to(F)
                s = load(prior_rho, tile, sizes, prior_rho_at, WIDE).to(F)
                inverse = inverse_deviation(s, PARAM)
                t = (m - p) * inverse
                e, _ = expm1_and_gap(lv - log_variance(s, PARAM))
                pull = w * t * inverse
                d_m += pull
                to_m = tl.where(inside, -pull, 0.0)
                to_r = tl.where(inside, -chain(s, w * tl.fma(t, t, e), PARAM), 0.0)
                if AXIS == "none":
                    tl.store(gprior_mu + row * cols + col, to_m, mask=inside)
                    tl.store(gprior_rho + row * cols + col, to_r, mask=inside)
                elif AXIS == "rows":
                    tl.store(gprior_mu + row, tl.sum(to_m, axis=1, keep_dims=True), mask=row_ok)
                    tl.store(gprior_rho + row, tl.sum(to_r, axis=1, keep_dims=True), mask=row_ok)
                else:
                    total_m += to_m
                    total_r += to_r
            else:
                e, _ = expm1_and_gap(lv)
                d_m += w * m
            d_r += chain(r, w * e, PARAM)
        if CLAMP:
            d_r = tl.where((given < lo) | (given > hi), 0.0, d_r)
        store(gmu, d_m, tile, sizes, gmu_at, WIDE)
        store(grho, d_r, tile, sizes, grho_at, WIDE)
    if gprior_mu is not None and (AXIS == "all" or AXIS == "columns"):
        store_sum(total_m, gprior_mu, partial, group, chunk, chunks, cols, 1.0, AXIS, R, C)
        store_sum(total_r, gprior_rho, partial_rho, group, chunk, chunks, cols, 1.0, AXIS, R, C)
        if chunks > 1:
            if arrive(ticket, group, chunks):
                collect(gprior_mu, partial, group, chunks, cols, 1.0, AXIS, R, C)
                collect(gprior_rho, partial_rho, group, chunks, cols, 1.0, AXIS, R, C)
                release(ticket, group)


def gaussian_fwd(q, rho, prior_mu, prior_rho, seed, eps, packed_dim, param, clamp_lo, clamp_hi, reduction,
                 batch_ndim, temperature):  # fmt: skip
    """(z, kl) of `vaeops::gaussian_fwd`, None for the one that is not wanted: one launch."""
    mu, rho = _halves(q, rho, packed_dim)
    seed = None if eps is not None else seed
    z = kl = None
    if seed is not None or eps is not None:
        z = torch.empty_like(mu)
    F = ref.compute_dtype(mu.dtype)
    if reduction != ref.NO_KL:
        kl = mu.new_empty(ref.reduced_shape(mu.shape, reduction, batch_ndim), dtype=F)
    if mu.numel() == 0:
        return z, None if kl is None else kl.zero_()
    operands = (*_operands(mu, rho, prior_mu, prior_rho, eps), None if z is None else z.stride())
    block, warps = layout.settings(mu.dtype)
    sums = layout.reduction_sums(mu.shape, reduction, batch_ndim, block)
    launch = layout.plan(mu.shape, operands, sums, _streams(seed), block)
    with layout.guard(mu):
        forward_kernel[launch.grid](
            mu, rho, prior_mu, prior_rho, _packed(seed), eps, z, kl,
            *launch.workspace(1, F, mu), *launch.strides, *launch.sizes,
            ref.scale(mu.shape, batch_ndim, reduction), clamp_lo, clamp_hi, temperature,
            ref.PARAMS[param], _clamps(clamp_lo, clamp_hi), *launch.constants,
            num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
    return z, kl


def gaussian_bwd(gz, gkl, q, rho, prior_mu, prior_rho, seed, eps, packed_dim, param, clamp_lo, clamp_hi,
                 reduction, batch_ndim, temperature):  # fmt: skip
    """Gradients of (q, rho, prior_mu, prior_rho), None for an absent one: one launch.

    A prior that is broadcast along dims on both sides of one that it has adds a sum over partial results.
    """
    gq = torch.empty_like(q)
    grho = None if rho is None else torch.empty_like(rho)
    g_mu, g_rho = _halves(gq, grho, packed_dim)
    mu, rho = _halves(q, rho, packed_dim)
    seed = None if eps is not None or gz is None else seed
    eps = None if gz is None else eps
    gkl = None if reduction == ref.NO_KL else gkl
    prior = () if prior_mu is None or gkl is None or mu.numel() == 0 else (prior_mu, prior_rho)
    if not prior:
        g_prior = [None if p is None else p.new_zeros(p.shape) for p in (prior_mu, prior_rho)]
        prior_mu = prior_rho = None
    if mu.numel() == 0:
        return gq, grho, *g_prior
    operands = (
        None if gz is None else gz.stride(),
        None if gkl is None else layout.reduced_strides(gkl, mu.shape, reduction, batch_ndim),
        *_operands(mu, rho, prior_mu, prior_rho, eps),
        g_mu.stride(),
        g_rho.stride(),
    )
    block, warps = layout.settings(mu.dtype)
    sums = layout.broadcast_sums(prior[0].shape, mu.shape, block) if prior else layout.NO_SUMS
    F = ref.compute_dtype(mu.dtype)
    g_sums = [_prior_sums(p, sums, F) for p in prior]
    launch = layout.plan(mu.shape, operands, sums, _streams(seed), block)
    with layout.guard(mu):
        backward_kernel[launch.grid](
            gz, gkl, mu, rho, prior_mu, prior_rho, _packed(seed), eps, g_mu, g_rho,
            *(g_sums or (None, None)), *launch.workspace(2, F, mu),
            *launch.strides, *launch.sizes,
            ref.scale(mu.shape, batch_ndim, reduction), clamp_lo, clamp_hi, temperature,
            ref.PARAMS[param], _clamps(clamp_lo, clamp_hi), *launch.constants,
            num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
    if prior:
        g_prior = [_to_prior(s, p) for s, p in zip(g_sums, prior)]
    return gq, grho, *g_prior


def _halves(q: Tensor, rho: Tensor | None, packed_dim: int) -> tuple[Tensor, Tensor]:
    if rho is not None:
        return q, rho
    half = q.shape[packed_dim] // 2
    return q.narrow(packed_dim, 0, half), q.narrow(packed_dim, half, half)


def _operands(mu, rho, prior_mu, prior_rho, eps) -> tuple[tuple[int, ...] | None, ...]:
    """Strides, in mu's shape, of what both directions read."""
    return (
        mu.stride(),
        rho.stride(),
        None if prior_mu is None else layout.broadcast_strides(prior_mu, mu.shape),
        None if prior_rho is None else layout.broadcast_strides(prior_rho, mu.shape),
        None if eps is None else eps.stride(),
    )


def _streams(seed: Tensor | None) -> int:
    return 1 if seed is None else seed.numel() // 2


def _packed(seed: Tensor | None) -> Tensor | None:
    return None if seed is None else seed.contiguous()


def _clamps(lo: float, hi: float) -> bool:
    return not (math.isinf(lo) and math.isinf(hi))


def _prior_sums(prior: Tensor, sums: layout.Sums, dtype: torch.dtype) -> Tensor:
    """What the kernel writes for the prior: its gradient, or sums that are not yet complete."""
    if sums.shape == ():
        return torch.empty_like(prior, memory_format=torch.contiguous_format)
    return prior.new_empty(sums.shape, dtype=dtype)


def _to_prior(sums: Tensor, prior: Tensor) -> Tensor:
    if sums.shape == prior.shape:
        return sums
    missing = sums.dim() - prior.dim()
    return sums.sum_to_size((1,) * missing + prior.shape).view(prior.shape).to(prior.dtype)
