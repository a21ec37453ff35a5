"""Codes by index with their loss, and the gradient of both, in Triton. Specification: vaeops/ref/vq.py.

T is x's dtype; C is fp64 where x or the codebook is, else fp32. A program walks whole rows, D in steps.
An index that is no code's counts as -1, so that none reads outside of the codebook.
"""

import torch
import triton
import triton.language as tl

from .. import _layout as layout
from .._exact import TRITON, divide, root
from .._tile import arrive, release
from ._rows import FIXED, accumulator, is_finite, next_power_of_two, row_offset, rows_at

MAX_PROGRAMS = 4096  # that leave partial sums: the last one adds them


def settings(dims: int, wide: bool) -> tuple[int, int, int]:
    """(rows, dims of a step, warps) of a program: at most 1024 elements, 512 in fp64. Not tuned yet."""
    BD = min(128, max(8, next_power_of_two(dims)))
    return min(32, (512 if wide else 1024) // BD), BD, 4


@triton.jit
def load_rows(x, d, dims, step, row_ok, C: tl.constexpr):
    """[R, BD] of C: dims d of rows (pointers x [R])."""
    ok = row_ok[:, None] & (d < dims)[None, :]
    return tl.load(x[:, None] + d.to(tl.int64)[None, :] * step, mask=ok, other=0.0).to(C)


@triton.jit
def load_codes(codebook, k, d, dims, used, C: tl.constexpr):
    """[R, BD] of C: dims d of codes k [R]."""
    return tl.load(
        codebook + k[:, None] * dims + d[None, :], mask=used[:, None] & (d < dims)[None, :], other=0.0
    ).to(C)


@triton.jit(do_not_specialize=(*FIXED, "fill"))
def gather_kernel(
    indices,  # int64 or int32 [N]
    codebook,  # [K, D]
    x, x_at,  # [N, D], or None
    quantized, quantized_at,  # [N, D]
    loss,  # C, [N] or [1], or None: not wanted
    partial, ticket,  # fp64 [2, programs]: sums and numbers of rows; int32 [1]; None for a loss per row
    rows: tl.int64, codes, dims, per_program: tl.int32, programs: tl.int32, fill: tl.float64,
    REDUCTION: tl.constexpr, C: tl.constexpr, R: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    W: tl.constexpr = tl.float64 if quantized.dtype.element_ty == tl.float64 else tl.float32
    pid = tl.program_id(0)
    total = tl.zeros([R], tl.float64)
    valid = tl.zeros([R], tl.float64)
    for i in range(per_program):
        row = (pid * per_program + i).to(tl.int64) * R + tl.arange(0, R)
        row_ok = row < rows
        k = tl.load(indices + row, mask=row_ok, other=-1).to(tl.int64)
        used = (k >= 0) & (k < codes)
        square = tl.zeros([R], C)
        bad = tl.zeros([R], tl.int32)
        if x is not None:
            at = x + row_offset(row, x_at)
            for first in range(0, dims, BD):
                d = first + tl.arange(0, BD)
                v = load_rows(at, d, dims, x_at[0], used, C)
                e = load_codes(codebook, k, d, dims, used, C)
                bad = tl.maximum(bad, tl.max((~is_finite(v)).to(tl.int32), axis=1))
                square += tl.sum((v - e) * (v - e), axis=1)
        out = quantized + row_offset(row, quantized_at)
        for first in range(0, dims, BD):
            d = first + tl.arange(0, BD)
            e = load_codes(codebook, k, d, dims, used, codebook.dtype.element_ty)
            e = e.to(quantized.dtype.element_ty).to(W)
            e = tl.where(bad[:, None] > 0, float("nan"), e)
            e = tl.where(used[:, None], e, tl.cast(fill, W))
            tl.store(out[:, None] + d.to(tl.int64)[None, :] * quantized_at[0], e,
                     mask=row_ok[:, None] & (d < dims)[None, :])  # fmt: skip
        if loss is not None:
            square = tl.where(bad > 0, float("nan"), square)
            if REDUCTION == 0:
                tl.store(loss + row, divide(square, dims + tl.zeros([R], C)), mask=row_ok)
            else:
                total += square.to(tl.float64)
                valid += used.to(tl.float64)
    if loss is not None and REDUCTION > 0:
        tl.store(partial + pid, tl.sum(total, axis=0))
        tl.store(partial + programs + pid, tl.sum(valid, axis=0))
        if arrive(ticket, 0, programs):
            sums = tl.zeros([256], tl.float64)
            numbers = tl.zeros([256], tl.float64)
            for start in range(0, programs, 256):
                p = start + tl.arange(0, 256)
                sums += tl.load(partial + p, mask=p < programs, other=0.0, cache_modifier=".cg")
                numbers += tl.load(partial + programs + p, mask=p < programs, other=0.0, cache_modifier=".cg")
            value = tl.sum(sums, axis=0)
            if REDUCTION == 1:
                value = value / (dims * tl.maximum(tl.sum(numbers, axis=0), 1.0))
            tl.store(loss, value)
            release(ticket, 0)


@triton.jit(do_not_specialize=FIXED)
def gather_bwd_kernel(
    gq, gq_at,  # T [N, D], or None: no gradient reaches `quantized`
    w,  # fp32 or fp64, [N] or [1], or None: no gradient reaches the loss
    x, x_at,  # T [N, D]
    codebook,  # [K, D]
    indices,  # int64 or int32 [N]
    gx, gx_at,  # T [N, D]
    rows: tl.int64, codes, dims,
    ESTIMATOR: tl.constexpr, PER_ROW: tl.constexpr, C: tl.constexpr, R: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    row_ok = row < rows
    k = tl.load(indices + row, mask=row_ok, other=-1).to(tl.int64)
    used = (k >= 0) & (k < codes)
    x = x + row_offset(row, x_at)
    gx = gx + row_offset(row, gx_at)
    if gq is not None:
        gq = gq + row_offset(row, gq_at)
    if w is not None:
        weight = 2 * tl.load(w + (row if PER_ROW else row * 0), mask=row_ok, other=0.0).to(C)
    if gq is not None and ESTIMATOR == 2:
        xx = tl.zeros([R], C)
        ee = tl.zeros([R], C)
        xg = tl.zeros([R], C)
        eg = tl.zeros([R], C)
        for first in range(0, dims, BD):
            d = first + tl.arange(0, BD)
            v = load_rows(x, d, dims, x_at[0], used, C)
            e = load_codes(codebook, k, d, dims, used, C)
            g = load_rows(gq, d, dims, gq_at[0], used, C)
            xx += tl.sum(v * v, axis=1)
            ee += tl.sum(e * e, axis=1)
            xg += tl.sum(v * g, axis=1)
            eg += tl.sum(e * g, axis=1)
        norm_x, norm_e = root(xx), root(ee)
        one = tl.full([R], 1.0, C)
        inverse_x, inverse_e = divide(one, norm_x), divide(one, norm_e)
        tt = tl.zeros([R], C)
        for first in range(0, dims, BD):
            d = first + tl.arange(0, BD)
            t = load_rows(x, d, dims, x_at[0], used, C) * inverse_x[:, None]
            t += load_codes(codebook, k, d, dims, used, C) * inverse_e[:, None]
            tt += tl.sum(t * t, axis=1)
        stays = (norm_x < 1e-6) | (norm_e < 1e-6) | (root(tt) < 1e-6)
        # The rotation is to_g * g + to_x * x + to_e * e.
        to_g = norm_e * inverse_x
        along_t = divide(2 * (xg * inverse_x + eg * inverse_e), tt)
        to_x = to_g * (2 * eg * inverse_e - along_t) * inverse_x
        to_e = -to_g * along_t * inverse_e
    for first in range(0, dims, BD):
        d = first + tl.arange(0, BD)
        v = load_rows(x, d, dims, x_at[0], used, C)
        e = load_codes(codebook, k, d, dims, used, C)
        total = tl.zeros([R, BD], C)
        if gq is not None and ESTIMATOR > 0:
            total = load_rows(gq, d, dims, gq_at[0], used, C)
            if ESTIMATOR == 2:
                turned = to_g[:, None] * total + to_x[:, None] * v + to_e[:, None] * e
                total = tl.where(stays[:, None], total, turned)
        if w is not None:
            total += weight[:, None] * (v - e)
        total = tl.where(used[:, None], total, 0.0)
        tl.store(gx[:, None] + d.to(tl.int64)[None, :] * gx_at[0], total,
                 mask=row_ok[:, None] & (d < dims)[None, :])  # fmt: skip


def vq_gather(indices, codebook, x, fill, reduction):
    """`vaeops::vq_gather`: one launch."""
    codes, dims = codebook.shape
    quantized = codebook.new_empty((*indices.shape, dims)) if x is None else torch.empty_like(x)
    compute = accumulator(x, codebook)
    loss = None
    if x is not None and reduction >= 0:
        loss = x.new_empty(indices.shape if reduction == 0 else (), dtype=compute)
    rows = indices.numel()
    if rows == 0:
        return quantized, loss if loss is None else loss.zero_()
    R, BD, warps = settings(dims, compute is torch.float64)
    per_program = -(-rows // (R * MAX_PROGRAMS))
    programs = -(-rows // (R * per_program))
    summed = loss is not None and reduction > 0
    partial = codebook.new_empty((2, programs), dtype=torch.float64) if summed else None
    with layout.guard(codebook):
        gather_kernel[(programs,)](
            indices.contiguous(), codebook.contiguous(), x, rows_at(x), quantized, rows_at(quantized), loss,
            partial, layout.tickets(codebook, 1) if summed else None,
            rows, codes, dims, per_program, programs, fill, reduction, TRITON[compute], R, BD,
            num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
    return quantized, loss


def vq_gather_bwd(gq, w, x, codebook, indices, estimator):
    """`vaeops::vq_gather_bwd`: one launch."""
    gx = torch.empty_like(x)
    rows, (codes, dims) = indices.numel(), codebook.shape
    if rows == 0:
        return gx
    compute = accumulator(x, codebook)
    R, BD, warps = settings(dims, compute is torch.float64)
    with layout.guard(x):
        gather_bwd_kernel[(-(-rows // R),)](
            gq, rows_at(gq), None if w is None else w.contiguous(), x, rows_at(x), codebook.contiguous(),
            indices.contiguous(), gx, rows_at(gx), rows, codes, dims,
            estimator, w is not None and w.dim() > 0, TRITON[compute], R, BD,
            num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
    return gx
