"""Sums of rows by index in Triton, in a fixed order. Specification: vaeops/ref/vq.py.

A stable sort of the indices lists every code's rows in row order. A program adds at most PIECE rows of one
code; what a code has beyond them is cut into pieces of PIECE rows, summed first. Nothing is added atomically.
"""

import torch
import triton
import triton.language as tl

from ...ref.vq import FIXED_POINT_BITS
from .. import _layout as layout
from ._rows import FIXED, is_finite, next_power_of_two, power_of_two, row_offset, rows_at

PIECE = 1024  # rows


def settings(dims: int) -> tuple[int, int, int]:
    """(rows, dims of a step, warps) of a program: up to 1024 fp64 elements. Not tuned on a GPU yet."""
    BD = min(128, max(8, next_power_of_two(dims)))
    return min(32, 1024 // BD), BD, 4


@triton.jit(do_not_specialize=FIXED)
def keys_kernel(
    values, values_at,  # [N, D]
    indices,  # int64 or int32 [N]
    keys,  # int32 [N]: the index, or -1 for rows with a NaN or Inf
    rows: tl.int64, dims,
    R: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    row_ok = row < rows
    at = values + row_offset(row, values_at)
    bad = tl.zeros([R], tl.int32)
    for first in range(0, dims, BD):
        d = first + tl.arange(0, BD)
        v = tl.load(at[:, None] + d.to(tl.int64)[None, :] * values_at[0],
                    mask=row_ok[:, None] & (d < dims)[None, :], other=0.0)  # fmt: skip
        v = v if v.dtype == tl.float64 else v.to(tl.float32)
        bad = tl.maximum(bad, tl.max((~is_finite(v)).to(tl.int32), axis=1))
    key = tl.load(indices + row, mask=row_ok, other=-1)
    tl.store(keys + row, tl.where(bad > 0, -1, key.to(tl.int32)), mask=row_ok)


@triton.jit
def add_rows(values, values_at, weights, fixed_by, order, begin, end, d, dims,
             A: tl.constexpr, R: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """(sum of weights, sums [BD]) of rows order[begin:end] at dims d, in A."""
    count = tl.zeros([R], A)
    sums = tl.zeros([R, BD], A)
    for first in range(0, (end - begin).to(tl.int32), R):
        place = begin + first + tl.arange(0, R)
        ok = place < end
        row = tl.load(order + place, mask=ok, other=0)
        at = values + row_offset(row, values_at)
        v = tl.load(at[:, None] + d.to(tl.int64)[None, :] * values_at[0],
                    mask=ok[:, None] & (d < dims)[None, :], other=0.0).to(tl.float64)  # fmt: skip
        weight = ok.to(A)
        if weights is not None:
            weight = tl.load(weights + row, mask=ok, other=0.0).to(A)
            v = tl.where(ok[:, None], v * weight[:, None], 0.0)
        if fixed_by is not None:
            by = tl.load(fixed_by)
            v = v * power_of_two(by >> 1, tl.float64) * power_of_two(by - (by >> 1), tl.float64)
            v = tl.minimum(tl.maximum(v, -68719476736.0), 68719476736.0)  # 2^36
            v = (v + 6755399441055744.0) - 6755399441055744.0  # to the nearest integer, ties to even
        count += weight
        sums += v.to(A)
    return tl.sum(count, axis=0), tl.sum(sums, axis=0)


@triton.jit(do_not_specialize=FIXED)
def pieces_kernel(
    values, values_at,  # [N, D]
    weights,  # fp32 or fp64 [N], or None: 1
    fixed_by,  # int32 [1]: values are multiplied by 2^fixed_by and rounded; None: floating point
    order,  # int64 [N]: rows by code, then by number
    starts,  # int64 [K + 1]: where a code's rows start in `order`
    code_of,  # int64 [pieces]: the code of a piece, K where there is none
    pieces_end,  # int64 [K]: number of pieces of codes 0 .. k
    piece_count, piece_sums,  # A [pieces], [pieces, D]
    dims, codes,
    A: tl.constexpr, PIECE: tl.constexpr, R: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    piece = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    k = tl.load(code_of + piece)
    if k < codes:
        before = tl.load(pieces_end + k - 1, mask=k > 0, other=0)
        begin = tl.load(starts + k) + PIECE * (1 + piece - before)
        end = tl.minimum(begin + PIECE, tl.load(starts + k + 1))
        count, sums = add_rows(values, values_at, weights, fixed_by, order, begin, end, d, dims, A, R, BD)
        tl.store(piece_sums + piece * dims + d, sums, mask=d < dims)
        tl.store(piece_count + piece, count)  # by every block of dims, the same


@triton.jit(do_not_specialize=FIXED)
def segments_kernel(
    values, values_at, weights, fixed_by, order, starts,  # as in pieces_kernel
    pieces_end, piece_count, piece_sums,  # of pieces_kernel, or None: no code can have that many rows
    counts, sums,  # fp32, fp64 or int64, [K], [K, D]
    dims,
    A: tl.constexpr, PIECE: tl.constexpr, R: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    begin, end = tl.load(starts + k), tl.load(starts + k + 1)
    first_end = tl.minimum(end, begin + PIECE)
    count, total = add_rows(values, values_at, weights, fixed_by, order, begin, first_end, d, dims, A, R, BD)
    if piece_sums is not None:
        last = tl.load(pieces_end + k)
        more = tl.load(pieces_end + k - 1, mask=k > 0, other=0)
        for piece in range(more, last):
            count += tl.load(piece_count + piece)
            total += tl.load(piece_sums + piece * dims + d, mask=d < dims, other=0)
    tl.store(sums + k * dims + d, total, mask=d < dims)
    tl.store(counts + k, count)


def vq_segment_sum(values, indices, weights, absmax, K, skip_nonfinite, fp64):
    """`vaeops::vq_segment_sum`: a stable sort, then two launches; one more to leave rows out."""
    rows, dims = indices.numel(), values.shape[-1]
    out = torch.int64 if absmax is not None else torch.float64 if fp64 else torch.float32
    counts, sums = values.new_empty(K, dtype=out), values.new_empty((K, dims), dtype=out)
    if rows == 0:
        return counts.zero_(), sums.zero_()
    R, BD, warps = settings(dims)
    values_at, blocks = rows_at(values), -(-dims // BD)
    weights = None if weights is None else weights.contiguous()
    accumulated, A = (torch.int64, tl.int64) if absmax is not None else (torch.float64, tl.float64)
    options = {"num_warps": warps, "enable_fp_fusion": False}
    with layout.guard(values):
        fixed_by = None
        if absmax is not None:
            fixed_by = FIXED_POINT_BITS - absmax.double().frexp().exponent
        keys = indices.reshape(-1).to(torch.int32)
        if skip_nonfinite:
            given, keys = keys, torch.empty_like(keys)
            keys_kernel[(-(-rows // R),)](values, values_at, given, keys, rows, dims, R, BD, **options)
        keys, order = keys.sort(stable=True)
        starts = torch.searchsorted(keys, torch.arange(K + 1, dtype=torch.int32, device=keys.device))
        inputs = (values, values_at, weights, fixed_by, order, starts)
        pieces_end = piece_count = piece_sums = None
        pieces = rows // PIECE  # at most
        if pieces:
            pieces_end = ((starts.diff() - 1).clamp(min=0) // PIECE).cumsum(0)
            code_of = torch.searchsorted(pieces_end, torch.arange(pieces, device=keys.device), right=True)
            piece_count = sums.new_empty(pieces, dtype=accumulated)
            piece_sums = sums.new_empty((pieces, dims), dtype=accumulated)
            pieces_kernel[pieces, blocks](
                *inputs, code_of, pieces_end, piece_count, piece_sums, dims, K, A, PIECE, R, BD, **options
            )
        segments_kernel[K, blocks](
            *inputs, pieces_end, piece_count, piece_sums, counts, sums, dims, A, PIECE, R, BD, **options
        )
    return counts, sums
