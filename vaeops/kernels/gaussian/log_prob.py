"""log N(x; mu, sigma^2) in Triton, reduced, in one launch each way. Specification: vaeops/ref/gaussian.py."""

import torch
import triton
import triton.language as tl

from ...ref import gaussian as ref
from .. import _layout as layout
from .._tile import aligned, arrive, collect, load, release, store, store_sum, tile_at
from ._math import chain, inverse_deviation, log_variance


@triton.jit(do_not_specialize=layout.FIXED)
def forward_kernel(
    x, mu, rho,  # T
    out,  # F, in the reduced shape
    partial, ticket,  # F [groups * chunks], int32 [groups]; None without a sum over tiles
    x_at, mu_at, rho_at, sizes,  # strides
    rows: tl.int64, cols: tl.int64, per_stream: tl.int64,
    chunks: tl.int32, tiles: tl.int32, group_tiles: tl.int32,
    scale: tl.float64,
    PARAM: tl.constexpr, AXIS: tl.constexpr, WIDE: tl.constexpr, ALIGNED: tl.constexpr,
    ONE_STREAM: tl.constexpr, QUADS: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    cols = aligned(cols, ALIGNED)
    F: tl.constexpr = tl.float64 if mu.dtype.element_ty == tl.float64 else tl.float32
    pid = tl.program_id(0)
    group, chunk = pid // chunks, pid % chunks
    total = tl.zeros([R, C], F)
    for k in range(tiles):
        tile, _ = tile_at(group, chunk * tiles + k, rows, cols, group_tiles, AXIS, R, C)
        row, col, row_ok, col_ok, _ = tile
        inside = row_ok & col_ok
        v = load(x, tile, sizes, x_at, WIDE).to(F)
        m = load(mu, tile, sizes, mu_at, WIDE).to(F)
        r = load(rho, tile, sizes, rho_at, WIDE).to(F)
        t = (v - m) * inverse_deviation(r, PARAM)
        twice = tl.fma(t, t, log_variance(r, PARAM)) + 1.8378770664093453  # + log 2 pi
        element = tl.where(inside, -0.5 * twice, 0.0)
        if AXIS == "none":
            tl.store(out + row * cols + col, element, mask=inside)
        elif AXIS == "rows":
            tl.store(out + row, tl.sum(element, axis=1, keep_dims=True) * scale, mask=row_ok)
        else:
            total += element
    if AXIS == "all" or AXIS == "columns":
        store_sum(total, out, partial, group, chunk, chunks, cols, scale, AXIS, R, C)
        if chunks > 1:
            if arrive(ticket, group, chunks):
                collect(out, partial, group, chunks, cols, scale, AXIS, R, C)
                release(ticket, group)


@triton.jit(do_not_specialize=layout.FIXED)
def backward_kernel(
    grad,  # F, broadcast
    x, mu, rho,  # T
    gx, gmu, grho,  # T
    grad_at, x_at, mu_at, rho_at, gx_at, gmu_at, grho_at, sizes,  # strides
    rows: tl.int64, cols: tl.int64, per_stream: tl.int64,
    chunks: tl.int32, tiles: tl.int32, group_tiles: tl.int32,
    scale: tl.float64,
    PARAM: tl.constexpr, AXIS: tl.constexpr, WIDE: tl.constexpr, ALIGNED: tl.constexpr,
    ONE_STREAM: tl.constexpr, QUADS: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    cols = aligned(cols, ALIGNED)
    F: tl.constexpr = tl.float64 if mu.dtype.element_ty == tl.float64 else tl.float32
    tile, _ = tile_at(tl.program_id(0), 0, rows, cols, group_tiles, AXIS, R, C)
    w = load(grad, tile, sizes, grad_at, WIDE).to(F) * tl.cast(scale, F)
    v = load(x, tile, sizes, x_at, WIDE).to(F)
    m = load(mu, tile, sizes, mu_at, WIDE).to(F)
    r = load(rho, tile, sizes, rho_at, WIDE).to(F)
    inverse = inverse_deviation(r, PARAM)
    t = (v - m) * inverse
    g = w * t * inverse
    store(gx, -g, tile, sizes, gx_at, WIDE)
    store(gmu, g, tile, sizes, gmu_at, WIDE)
    store(grho, chain(r, w * (t * t - 1.0), PARAM), tile, sizes, grho_at, WIDE)


def log_prob_fwd(x, mu, rho, param, reduction, batch_ndim):
    """`vaeops::gaussian_log_prob_fwd`: one launch."""
    out = x.new_empty(ref.reduced_shape(x.shape, reduction, batch_ndim), dtype=ref.compute_dtype(x.dtype))
    if x.numel() == 0:
        return out.zero_()
    block, warps = layout.settings(x.dtype)
    operands = (x.stride(), mu.stride(), rho.stride())
    sums = layout.reduction_sums(x.shape, reduction, batch_ndim, block)
    launch = layout.plan(x.shape, operands, sums, 1, block)
    with layout.guard(x):
        forward_kernel[launch.grid](
            x, mu, rho, out, *launch.workspace(1, out.dtype, x), *launch.strides, *launch.sizes,
            ref.scale(x.shape, batch_ndim, reduction), ref.PARAMS[param], *launch.constants,
            num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def log_prob_bwd(grad, x, mu, rho, param, reduction, batch_ndim):
    """Gradients of (x, mu, rho) of `vaeops::gaussian_log_prob_bwd`: one launch."""
    grads = torch.empty_like(x), torch.empty_like(mu), torch.empty_like(rho)
    if x.numel() == 0:
        return grads
    block, warps = layout.settings(x.dtype)
    operands = (
        layout.reduced_strides(grad, x.shape, reduction, batch_ndim),
        *(t.stride() for t in (x, mu, rho, *grads)),
    )
    launch = layout.plan(x.shape, operands, layout.NO_SUMS, 1, block)
    with layout.guard(x):
        backward_kernel[launch.grid](
            grad, x, mu, rho, *grads, *launch.strides, *launch.sizes,
            ref.scale(x.shape, batch_ndim, reduction), ref.PARAMS[param], *launch.constants,
            num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
    return grads
