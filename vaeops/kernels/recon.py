"""Reconstruction losses in Triton, reduced, in one launch each way. Specification: vaeops/ref/recon.py."""

import math

import torch
import triton
import triton.language as tl

from ..ref import gaussian as ref
from ..ref.recon import ELEMENTWISE, HALF_LEVEL
from . import _layout as layout
from ._tile import aligned, arrive, collect, load, release, store, store_sum, tile_at
from .gaussian._math import exp, log
from .rng import log1p_third

FIXED = (*layout.FIXED, "spread", "inverse", "constant", "half_level")
# Tiles that a program of a long multinomial row takes at least: each ends in four sums over the tile, which
# should be few among its elements.
ROW_TILES = 8


@triton.jit
def divide(x, y):
    return x / y if y.dtype == tl.float64 else tl.div_rn(x, y)


@triton.jit
def log_one_minus(x):
    """log(1 - x) for any x, without the rounding of 1 - x near 0."""
    rest = 1.0 - x
    if x.dtype == tl.float64:
        lost = tl.where(rest > 0.0, (rest - 1.0) + x, 0.0)
        result = tl.log(rest) - lost / tl.where(rest > 0.0, rest, 1.0)
    else:
        small = tl.abs(x) < 0.3333333333333333
        result = tl.where(small, log1p_third(tl.where(small, -x, 0.0)), log(rest))
    return result


@triton.jit
def softplus_of_negative(y):
    """log(1 + exp(-y)) for y >= 0: of 1 + e, e in [0, 1], or of half of it where e > 1/3."""
    e = exp(-y)
    if y.dtype == tl.float64:
        u = 1.0 + e
        result = tl.log(u) + (e - (u - 1.0)) / u
    else:
        halve = e > 0.3333333333333333
        result = log1p_third(tl.where(halve, (e - 1.0) * 0.5, e)) + tl.where(halve, 0.693147182, 0.0)
    return result


@triton.jit
def softplus(x):
    return tl.where(x < 0.0, 0.0, x) + softplus_of_negative(tl.abs(x))


@triton.jit
def sigmoid(x):
    e = exp(-tl.abs(x))
    return divide(tl.where(x < 0.0, e, 1.0), 1.0 + e)


@triton.jit
def sign_of(d, magnitude):
    """magnitude with d's sign, 0 at 0."""
    return tl.where(d > 0.0, magnitude, tl.where(d < 0.0, -magnitude, 0.0))


@triton.jit
def element(p, t, spread, inverse, constant, half_level, KIND: tl.constexpr):
    """The loss of an element. spread is the kind's scale s, inverse 1 / s, constant what the kind adds."""
    d = p - t
    if KIND == "bce":
        on, off = log(p), log_one_minus(p)
        on = tl.where(on < -100.0, -100.0, on)  # NaN stays
        off = tl.where(off < -100.0, -100.0, off)
        result = (t - 1.0) * off - t * on
    elif KIND == "bce_logits":
        # max(p, 0) - p t = |p| times the share of the target on p's wrong side; nothing there costs nothing,
        # even an infinite logit.
        size, wrong = tl.abs(p), tl.where(p > 0.0, 1.0 - t, t)
        result = tl.where(wrong == 0.0, 0.0, size * wrong) + softplus_of_negative(size)
    elif KIND == "mse":
        result = d * d
    elif KIND == "half_mse":
        result = 0.5 * (d * d)
    elif KIND == "l1":
        result = tl.abs(d)
    elif KIND == "huber":
        size = tl.abs(d)
        near = tl.where(size > spread, spread, size)
        result = near * tl.fma(near, -0.5, size)
    elif KIND == "gaussian_nll":
        z = d * inverse
        result = tl.fma(0.5 * z, z, constant)
    elif KIND == "laplace_nll":
        result = tl.fma(tl.abs(d), inverse, constant)
    else:
        middle, half = -d * inverse, half_level * inverse
        lowest, highest = t < half_level, t > 1.0 - half_level
        above = tl.where(highest, 0.0, softplus(-(middle + half)))
        below = tl.where(lowest, 0.0, softplus(middle - half))
        result = above + below + tl.where(lowest | highest, 0.0, constant)
    return result


@triton.jit
def slope(p, t, spread, inverse, half_level, KIND: tl.constexpr):
    """d element / d p"""
    d = p - t
    if KIND == "bce":
        variance = p * (1.0 - p)
        result = divide(d, tl.where(variance < 1e-12, 1e-12, variance))
    elif KIND == "bce_logits":
        result = sigmoid(p) - t
    elif KIND == "mse":
        result = d + d
    elif KIND == "half_mse":
        result = d
    elif KIND == "l1":
        result = sign_of(d, 1.0)
    elif KIND == "huber":
        result = tl.where(d > spread, spread, tl.where(d < -spread, -spread, d))
    elif KIND == "gaussian_nll":
        result = d * inverse * inverse
    elif KIND == "laplace_nll":
        result = sign_of(d, inverse)
    else:
        middle, half = -d * inverse, half_level * inverse
        up = tl.where(t > 1.0 - half_level, 0.0, sigmoid(-(middle + half)))
        down = tl.where(t < half_level, 0.0, sigmoid(middle - half))
        result = (up - down) * inverse
    return result


@triton.jit
def level(target, F: tl.constexpr):
    """A target as the loss reads it: t / 255 of uint8, correctly rounded."""
    t = target.to(F)
    if target.dtype == tl.uint8:
        if tl.float64 == F:
            t = t / 255.0
        else:
            q = t * 0.003921568859368563
            t = tl.fma(tl.fma(q, -255.0, t), 0.003921568859368563, q)
    return t


@triton.jit
def weighted(value, weight, tile, sizes, weight_at, WIDE: tl.constexpr, F: tl.constexpr):
    """value times its weight; 0 where that is 0 or masks it out, whatever value is."""
    if weight is None:
        result = value
    else:
        w = load(weight, tile, sizes, weight_at, WIDE)
        if w.dtype == tl.int1:
            result = tl.where(w, value, 0.0)
        else:
            w = w.to(F)
            result = tl.where(w == 0.0, 0.0, value * w)
    return result


@triton.jit(do_not_specialize=FIXED)
def forward_kernel(
    pred, target, weight,  # T, any, any or None
    out,  # F, in the reduced shape
    partial, ticket,  # F [groups * chunks], int32 [groups]; None without a sum over tiles
    pred_at, target_at, weight_at, sizes,  # strides
    rows: tl.int64, cols: tl.int64, per_stream: tl.int64,
    chunks: tl.int32, tiles: tl.int32, group_tiles: tl.int32,
    scale: tl.float64, spread: tl.float64, inverse: tl.float64, constant: tl.float64, half_level: tl.float64,
    KIND: tl.constexpr, AXIS: tl.constexpr, WIDE: tl.constexpr, ALIGNED: tl.constexpr,
    ONE_STREAM: tl.constexpr, QUADS: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    cols = aligned(cols, ALIGNED)
    F: tl.constexpr = tl.float64 if pred.dtype.element_ty == tl.float64 else tl.float32
    s, inv, const = tl.cast(spread, F), tl.cast(inverse, F), tl.cast(constant, F)
    half = tl.cast(half_level, F)
    pid = tl.program_id(0)
    group, chunk = pid // chunks, pid % chunks
    total = tl.zeros([R, C], F)
    for k in range(tiles):
        tile, _ = tile_at(group, chunk * tiles + k, rows, cols, group_tiles, AXIS, R, C)
        row, col, row_ok, col_ok, _ = tile
        inside = row_ok & col_ok
        p = load(pred, tile, sizes, pred_at, WIDE).to(F)
        t = level(load(target, tile, sizes, target_at, WIDE), F)
        loss = element(p, t, s, inv, const, half, KIND)
        loss = tl.where(inside, weighted(loss, weight, tile, sizes, weight_at, WIDE, F), 0.0)
        if AXIS == "none":
            tl.store(out + row * cols + col, loss, mask=inside)
        elif AXIS == "rows":
            tl.store(out + row, tl.sum(loss, axis=1, keep_dims=True) * scale, mask=row_ok)
        else:
            total += loss
    if AXIS == "all" or AXIS == "columns":
        store_sum(total, out, partial, group, chunk, chunks, cols, scale, AXIS, R, C)
        if chunks > 1:
            if arrive(ticket, group, chunks):
                collect(out, partial, group, chunks, cols, scale, AXIS, R, C)
                release(ticket, group)


@triton.jit(do_not_specialize=FIXED)
def backward_kernel(
    grad,  # F, broadcast
    pred, target, weight,  # T, any, any or None
    gpred,  # T
    grad_at, pred_at, target_at, weight_at, gpred_at, sizes,  # strides
    rows: tl.int64, cols: tl.int64, per_stream: tl.int64,
    chunks: tl.int32, tiles: tl.int32, group_tiles: tl.int32,
    scale: tl.float64, spread: tl.float64, inverse: tl.float64, half_level: tl.float64,
    KIND: tl.constexpr, AXIS: tl.constexpr, WIDE: tl.constexpr, ALIGNED: tl.constexpr,
    ONE_STREAM: tl.constexpr, QUADS: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    cols = aligned(cols, ALIGNED)
    F: tl.constexpr = tl.float64 if pred.dtype.element_ty == tl.float64 else tl.float32
    tile, _ = tile_at(tl.program_id(0), 0, rows, cols, group_tiles, AXIS, R, C)
    g = load(grad, tile, sizes, grad_at, WIDE).to(F) * tl.cast(scale, F)
    p = load(pred, tile, sizes, pred_at, WIDE).to(F)
    t = level(load(target, tile, sizes, target_at, WIDE), F)
    d = slope(p, t, tl.cast(spread, F), tl.cast(inverse, F), tl.cast(half_level, F), KIND)
    store(gpred, g * weighted(d, weight, tile, sizes, weight_at, WIDE, F), tile, sizes, gpred_at, WIDE)


@triton.jit
def item(logits, target, weight, tile, sizes, logits_at, target_at, weight_at,
         WIDE: tl.constexpr, F: tl.constexpr):  # fmt: skip
    """Logits, weighted counts, and whether the items take part; those that do not: -inf and 0."""
    _, _, row_ok, col_ok, _ = tile
    counts = row_ok & col_ok
    x = load(logits, tile, sizes, logits_at, WIDE).to(F)
    t = load(target, tile, sizes, target_at, WIDE).to(F)
    if weight is not None:
        w = load(weight, tile, sizes, weight_at, WIDE)
        if w.dtype == tl.int1:
            counts = counts & w
        else:
            t = t * w.to(F)
    return tl.where(counts, x, float("-inf")), tl.where(counts, t, 0.0), counts


@triton.jit
def merge(top, sum, axis: tl.constexpr):
    """Pairs (top, sum), each for sum exp(top), along an axis, as one such pair."""
    highest = tl.max(top, axis=axis, keep_dims=True)
    shift = tl.where(top == highest, 0.0, top - highest)  # inf - inf would be NaN
    return highest, tl.sum(sum * exp(shift), axis=axis, keep_dims=True)


@triton.jit
def finish_row(nll, lse, total, row, ok, top, sum, count, drawn):
    log_sum = top.to(tl.float64) + log(sum).to(tl.float64)
    tl.store(lse + row, log_sum, mask=ok)
    tl.store(total + row, count, mask=ok)
    paid = tl.where(count == 0.0, 0.0, count.to(tl.float64) * log_sum)
    tl.store(nll + row, paid - drawn.to(tl.float64), mask=ok)


@triton.jit(do_not_specialize=FIXED)
def multinomial_forward_kernel(
    logits, target, weight,  # [rows, cols]: T, any, any or None
    nll, lse, total,  # [rows]: F, fp64, F
    tops, sums, counts, drawns, ticket,  # F [rows, chunks], int32 [rows]; None where tiles hold whole rows
    logits_at, target_at, weight_at, sizes,  # strides
    rows: tl.int64, cols: tl.int64, per_stream: tl.int64,
    chunks: tl.int32, tiles: tl.int32, group_tiles: tl.int32,
    AXIS: tl.constexpr, WIDE: tl.constexpr, ALIGNED: tl.constexpr,
    ONE_STREAM: tl.constexpr, QUADS: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    cols = aligned(cols, ALIGNED)
    F: tl.constexpr = tl.float64 if logits.dtype.element_ty == tl.float64 else tl.float32
    pid = tl.program_id(0)
    group, chunk = pid // chunks, pid % chunks
    # Every lane of the tile goes its own way down the chunk; the lanes meet once, at the end.
    top = tl.full([R, C], float("-inf"), F)
    sum = tl.zeros([R, C], F)
    count = tl.zeros([R, C], F)
    drawn = tl.zeros([R, C], F)
    for k in range(tiles):
        tile, _ = tile_at(group, chunk * tiles + k, rows, cols, group_tiles, AXIS, R, C)
        x, t, _ = item(logits, target, weight, tile, sizes, logits_at, target_at, weight_at, WIDE, F)
        # A lane with nothing but -inf counts them for exp(0). The first finite logit, here or in a lane that
        # it meets, multiplies that by 0.
        e = exp(tl.where(x == top, 0.0, -tl.abs(x - top)))
        higher = x > top
        sum = tl.where(higher, tl.fma(sum, e, 1.0), sum + e)
        top = tl.where(higher, x, top)
        count += t
        drawn += tl.where(t == 0.0, 0.0, t * x)
    top, sum = merge(top, sum, 1)
    count = tl.sum(count, axis=1, keep_dims=True)
    drawn = tl.sum(drawn, axis=1, keep_dims=True)
    if AXIS == "rows":
        row = group.to(tl.int64) * R + tl.arange(0, R)[:, None]
        finish_row(nll, lse, total, row, row < rows, top, sum, count, drawn)
    else:
        one = tl.arange(0, 1)[:, None]
        first = group.to(tl.int64) * chunks
        tl.store(tops + first + chunk + one, top)
        tl.store(sums + first + chunk + one, sum)
        tl.store(counts + first + chunk + one, count)
        tl.store(drawns + first + chunk + one, drawn)
        if arrive(ticket, group, chunks):
            lane = tl.arange(0, C)[None, :]  # there are fewer chunks
            ok = lane < chunks
            tops_of = tl.load(tops + first + lane, mask=ok, other=float("-inf"), cache_modifier=".cg")
            sums_of = tl.load(sums + first + lane, mask=ok, other=0.0, cache_modifier=".cg")
            counts_of = tl.load(counts + first + lane, mask=ok, other=0.0, cache_modifier=".cg")
            drawns_of = tl.load(drawns + first + lane, mask=ok, other=0.0, cache_modifier=".cg")
            top, sum = merge(tops_of, sums_of, 1)
            count = tl.sum(counts_of, axis=1, keep_dims=True)
            drawn = tl.sum(drawns_of, axis=1, keep_dims=True)
            finish_row(nll, lse, total, group + one, one < rows, top, sum, count, drawn)
            release(ticket, group)


@triton.jit(do_not_specialize=FIXED)
def multinomial_backward_kernel(
    grad, lse, total,  # [rows], broadcast: F, fp64, F
    logits, target, weight,  # [rows, cols]: T, any, any or None
    glogits,  # T [rows, cols]
    grad_at, lse_at, total_at, logits_at, target_at, weight_at, glogits_at, sizes,  # strides
    rows: tl.int64, cols: tl.int64, per_stream: tl.int64,
    chunks: tl.int32, tiles: tl.int32, group_tiles: tl.int32,
    AXIS: tl.constexpr, WIDE: tl.constexpr, ALIGNED: tl.constexpr,
    ONE_STREAM: tl.constexpr, QUADS: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    cols = aligned(cols, ALIGNED)
    F: tl.constexpr = tl.float64 if logits.dtype.element_ty == tl.float64 else tl.float32
    tile, _ = tile_at(tl.program_id(0), 0, rows, cols, group_tiles, AXIS, R, C)
    g = load(grad, tile, sizes, grad_at, WIDE)
    log_sum = load(lse, tile, sizes, lse_at, WIDE)
    log_sum = tl.where(log_sum == float("-inf"), 0.0, log_sum)
    # In two parts: logits may be as large as it, and what is left of them has its last digits.
    high = log_sum.to(F)
    low = tl.where(tl.abs(high) < float("inf"), (log_sum - high.to(tl.float64)).to(F), 0.0)
    count = load(total, tile, sizes, total_at, WIDE)
    x, t, inside = item(logits, target, weight, tile, sizes, logits_at, target_at, weight_at, WIDE, F)
    expected = tl.where(count == 0.0, 0.0, count * exp(x - high - low))
    store(glogits, tl.where(inside, g * (expected - t), 0.0), tile, sizes, glogits_at, WIDE)


def _strides(pred, target, weight):
    weight_at = None if weight is None else layout.broadcast_strides(weight, pred.shape)
    return pred.stride(), target.stride(), weight_at


def _constant(kind, scale):
    """What an element's loss has beside what depends on the element."""
    if kind == "gaussian_nll":
        return math.log(scale) + math.log(2 * math.pi) / 2
    if kind == "laplace_nll":
        return math.log(2 * scale)
    return -math.log(-math.expm1(-2 * HALF_LEVEL / scale)) if kind == "discretized_logistic" else 0.0


def recon_fwd(pred, target, weight, kind, scale, reduction, batch_ndim):
    """`vaeops::recon_fwd`: one launch."""
    shape, name = pred.shape, ELEMENTWISE[kind]
    out = pred.new_empty(ref.reduced_shape(shape, reduction, batch_ndim), dtype=ref.compute_dtype(pred.dtype))
    if pred.numel() == 0:
        return out.zero_()
    block, warps = layout.settings(pred.dtype)
    sums = layout.reduction_sums(shape, reduction, batch_ndim, block)
    launch = layout.plan(shape, _strides(pred, target, weight), sums, 1, block)
    with layout.guard(pred):
        forward_kernel[launch.grid](
            pred, target, weight, out, *launch.workspace(1, out.dtype, pred), *launch.strides, *launch.sizes,
            ref.scale(shape, batch_ndim, reduction), scale, 1 / scale, _constant(name, scale), HALF_LEVEL,
            name, *launch.constants, num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def recon_bwd(grad, pred, target, weight, kind, scale, reduction, batch_ndim):
    """Gradient of pred of `vaeops::recon_bwd`: one launch."""
    gpred = torch.empty_like(pred)
    if pred.numel() == 0:
        return gpred
    block, warps = layout.settings(pred.dtype)
    grad_at = layout.reduced_strides(grad, pred.shape, reduction, batch_ndim)
    operands = (grad_at, *_strides(pred, target, weight), gpred.stride())
    launch = layout.plan(pred.shape, operands, layout.NO_SUMS, 1, block)
    with layout.guard(pred):
        backward_kernel[launch.grid](
            grad, pred, target, weight, gpred, *launch.strides, *launch.sizes,
            ref.scale(pred.shape, batch_ndim, reduction), scale, 1 / scale, HALF_LEVEL, ELEMENTWISE[kind],
            *launch.constants, num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
    return gpred


def multinomial_fwd(logits, target, weight):
    """(nll, lse, total) of `vaeops::multinomial_fwd`: one launch."""
    nll = logits.new_empty(logits.shape[:1], dtype=ref.compute_dtype(logits.dtype))
    lse, total = torch.empty_like(nll, dtype=torch.float64), torch.empty_like(nll)
    if logits.numel() == 0:
        return nll.zero_(), lse.fill_(-math.inf), total.zero_()
    block, warps = layout.settings(logits.dtype)
    sums = layout.reduction_sums(logits.shape, 2, 1, block)
    launch = layout.plan(logits.shape, _strides(logits, target, weight), sums, 1, block, ROW_TILES)
    with layout.guard(logits):
        multinomial_forward_kernel[launch.grid](
            logits, target, weight, nll, lse, total, *launch.workspace(4, nll.dtype, logits), *launch.strides,
            *launch.sizes, *launch.constants, num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
    return nll, lse, total


def multinomial_bwd(grad, logits, target, weight, lse, total):
    """Gradient of the logits of `vaeops::multinomial_bwd`: one launch."""
    glogits = torch.empty_like(logits)
    if logits.numel() == 0:
        return glogits
    block, warps = layout.settings(logits.dtype)
    rows = (layout.reduced_strides(x, logits.shape, 2, 1) for x in (grad, lse, total))
    operands = (*rows, *_strides(logits, target, weight), glogits.stride())
    launch = layout.plan(logits.shape, operands, layout.NO_SUMS, 1, block)
    with layout.guard(logits):
        multinomial_backward_kernel[launch.grid](
            grad, lse, total, logits, target, weight, glogits, *launch.strides, *launch.sizes,
            *launch.constants, num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
    return glogits
