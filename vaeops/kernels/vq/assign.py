"""Nearest codes in Triton, exact. Specification: vaeops/ref/vq.py.

1. `pack`: the codebook in fp16, with bounds of what that costs (_pack.py).
2. `nearest_tiles_kernel`: scores of all codes on tensor cores. A row keeps the four tiles of codes that come
   nearest, with rigorous bounds of their scores, and the least bound of all others.
3. `refine_kernel`: the definition's fp64 scores of the tiles that can hold the nearest code; of all codes
   where that can be more than four.

Memory beyond the output: 6 K D + 13 K bytes and 40 bytes a row. No launch waits for the host.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _layout as layout
from .._exact import TRITON, root
from ._pack import Packed, pack
from ._rows import (
    FIXED,
    accumulator,
    exponent,
    is_finite,
    next_power_of_two,
    power_of_two,
    row_offset,
    rows_at,
)

TILE = 64  # codes
TOP = 4  # tiles a row keeps
SPLITS = 32  # parts of the codebook, at most, that a row's programs share
PROGRAMS = 264  # fewer rows than these take: the codebook is split
REFINED_ROWS = 2  # of a program of refine_kernel
SORT_ELEMENTS = 1 << 22  # scores that vq_topk sorts at a time


def settings(dims: int, compute: torch.dtype) -> tuple[int, int, int]:
    """(rows, dims of a step, warps) of a program of the fast pass. Not tuned on a GPU yet.

    Up to 256 dims a program keeps its rows in fp16; above, it reads them again for every tile.
    """
    rows = 64 if compute is torch.float64 or 128 < dims <= 256 else 128
    return rows, max(16, next_power_of_two(dims)) if dims <= 256 else 64, 8


@triton.jit
def scaled_rows(x, row_ok, mu, first, dims, step, scale, BD: tl.constexpr, C: tl.constexpr):
    """Dims first .. first + BD of rows (pointers x): as given, and centred and scaled; [rows, BD] of C."""
    d = first + tl.arange(0, BD)
    ok = row_ok[:, None] & (d < dims)[None, :]
    given = tl.load(x[:, None] + d.to(tl.int64)[None, :] * step, mask=ok, other=0.0).to(C)
    centred = given
    if mu is not None:
        centred = tl.where(ok, given - tl.load(mu + d, mask=d < dims, other=0.0)[None, :], 0.0)
    return given, centred * scale[:, None]


@triton.jit
def rounded_rows(scaled):
    return tl.where(is_finite(scaled), scaled, 0.0).to(tl.float32).to(tl.float16)


@triton.jit(do_not_specialize=FIXED)
def nearest_tiles_kernel(
    x,  # [N, D]
    x_at,
    mask,  # uint8 [N], or None
    mu, code_shift, rounded, half, bound,  # of pack_kernel
    low,  # fp32 [N, splits, TOP]: lower bounds of the best tiles' scores
    kept,  # int32 [N, splits, TOP]: which tiles those are
    others,  # fp32 [N, splits]: the least lower bound of all other tiles
    upper,  # fp32 [N, splits]: an upper bound of the least score; -inf for rows that need no scores
    rows: tl.int64, dims, tiles, per_program: tl.int32,
    EXACT: tl.constexpr, C: tl.constexpr,
    BN: tl.constexpr, G: tl.constexpr, BD: tl.constexpr, ONE_STEP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    row_ok = row < rows
    used = row_ok
    if mask is not None:
        used = used & (tl.load(mask + row, mask=row_ok, other=0) != 0)
    x = x + row_offset(row, x_at)
    step = x_at[0]

    one = tl.full([BN], 1.0, C)
    most = tl.zeros([BN], C)
    most_given = tl.zeros([BN], C)
    bad = tl.zeros([BN], tl.int32)
    for first in range(0, dims, 16):
        given, centred = scaled_rows(x, used, mu, first, dims, step, one, 16, C)
        bad = tl.maximum(bad, tl.max((~is_finite(given)).to(tl.int32), axis=1))
        most_given = tl.maximum(most_given, tl.max(tl.abs(given), axis=1))
        most = tl.maximum(most, tl.max(tl.abs(centred), axis=1))
    # Below 2^15; and below 2^30 times the codes' scale, which keeps the scores in range.
    codes_by = tl.load(code_shift)
    limit = 900 if C.is_fp64() else 100
    rows_by = tl.minimum(tl.minimum(15 - exponent(most), codes_by + 30), limit)
    scale = power_of_two(rows_by, C)
    ratio_by = rows_by - codes_by
    ratio = power_of_two(tl.maximum(ratio_by, -120), tl.float32)
    in_range = (ratio_by >= -120) & (most < float("inf"))
    if C.is_fp64():
        in_range = in_range & (most_given < 3.273390607896142e150)  # 2^500: the definition may overflow

    square = tl.zeros([BN], tl.float32)
    residual = tl.zeros([BN], tl.float32)
    length = tl.zeros([BN], tl.float32)
    for first in range(0, dims, 16):
        given, scaled = scaled_rows(x, used, mu, first, dims, step, scale, 16, C)
        fp16 = rounded_rows(scaled).to(tl.float32)
        gap = (scaled - fp16.to(C)).to(tl.float32)
        given = (given * scale[:, None]).to(tl.float32)
        square += tl.sum(fp16 * fp16, axis=1)
        residual += tl.sum(gap * gap, axis=1)
        length += tl.sum(given * given, axis=1)
    grow = 1.0 + (dims + 4096) * 2.384185791015625e-07  # rounding of these sums, and of the bound
    length = root(length) * grow
    square = root(square) * grow
    # x - mu was rounded to fp32 before it was rounded to fp16.
    residual = root(residual) * grow + 2.384185791015625e-07 * square + 1e-18
    if ONE_STEP:
        _, scaled = scaled_rows(x, used, mu, 0, dims, step, scale, BD, C)
        near = rounded_rows(scaled)

    low0 = tl.full([BN], float("inf"), tl.float32)
    low1, low2, low3, rest, least = low0, low0, low0, low0, low0
    kept0 = tl.full([BN], -1, tl.int32)
    kept1, kept2, kept3 = kept0, kept0, kept0
    split = tl.program_id(1)
    for tile in range(split * per_program, tl.minimum((split + 1) * per_program, tiles)):
        k = (tile * G + tl.arange(0, G)).to(tl.int64)
        if ONE_STEP:
            d = tl.arange(0, BD)
            e = tl.load(rounded + k[None, :] * dims + d[:, None], mask=(d < dims)[:, None], other=0.0)
            products = tl.dot(near, e, input_precision="ieee")
        else:
            products = tl.zeros([BN, G], tl.float32)
            for first in range(0, dims, BD):
                _, scaled = scaled_rows(x, used, mu, first, dims, step, scale, BD, C)
                d = first + tl.arange(0, BD)
                e = tl.load(rounded + k[None, :] * dims + d[:, None], mask=(d < dims)[:, None], other=0.0)
                products = tl.dot(rounded_rows(scaled), e, products, input_precision="ieee")
        score = tl.min(tl.load(half + k)[None, :] * ratio[:, None] - products, axis=1)
        b = bound + 4 * tile
        error = (
            residual * tl.load(b) + square * tl.load(b + 1) + ratio * tl.load(b + 2) + length * tl.load(b + 3)
        )
        error = tl.where(in_range & is_finite(error), error * 1.001 + 1e-9, float("inf"))
        if not EXACT:
            error = tl.where(is_finite(error), 0.0, float("inf"))
        least = tl.minimum(least, score + error)
        new_low, new = score - error, tl.full([BN], 0, tl.int32) + tile
        # Insert the tile into the sorted four; what falls out is one of the others.
        before = new_low < low0
        low0, new_low = tl.where(before, new_low, low0), tl.where(before, low0, new_low)
        kept0, new = tl.where(before, new, kept0), tl.where(before, kept0, new)
        before = new_low < low1
        low1, new_low = tl.where(before, new_low, low1), tl.where(before, low1, new_low)
        kept1, new = tl.where(before, new, kept1), tl.where(before, kept1, new)
        before = new_low < low2
        low2, new_low = tl.where(before, new_low, low2), tl.where(before, low2, new_low)
        kept2, new = tl.where(before, new, kept2), tl.where(before, kept2, new)
        before = new_low < low3
        low3, new_low = tl.where(before, new_low, low3), tl.where(before, low3, new_low)
        kept3 = tl.where(before, new, kept3)
        rest = tl.minimum(rest, new_low)

    least = tl.where(used & (bad == 0), least, float("-inf"))
    place = row * tl.num_programs(1) + split
    tl.store(others + place, rest, mask=row_ok)
    tl.store(upper + place, least, mask=row_ok)
    tl.store(low + 4 * place, low0, mask=row_ok)
    tl.store(low + 4 * place + 1, low1, mask=row_ok)
    tl.store(low + 4 * place + 2, low2, mask=row_ok)
    tl.store(low + 4 * place + 3, low3, mask=row_ok)
    tl.store(kept + 4 * place, kept0, mask=row_ok)
    tl.store(kept + 4 * place + 1, kept1, mask=row_ok)
    tl.store(kept + 4 * place + 2, kept2, mask=row_ok)
    tl.store(kept + 4 * place + 3, kept3, mask=row_ok)


@triton.jit
def exact_scores(x, step, row_ok, codes, code_ok, base, dims, d_step, METRIC: tl.constexpr):
    """fp64 scores [R, G] by the definition, of pointers x [R] and codes [R, G]; base of pack_kernel."""
    t = tl.zeros(codes.shape, tl.float64)
    for _ in range(dims):
        v = tl.load(x, mask=row_ok, other=0.0).to(tl.float64)
        e = tl.load(codes, mask=code_ok, other=0.0).to(tl.float64)
        t = tl.fma(tl.broadcast_to(v[:, None], t.shape), e, t)
        x += step
        codes += d_step
    return -t / base if METRIC == 1 else base - t


@triton.jit(do_not_specialize=FIXED)
def refine_kernel(
    x,  # [N, D]
    x_at,
    mask,  # uint8 [N], or None
    exact, base,  # of pack
    low, kept, others, upper,  # of nearest_tiles_kernel
    indices,  # int64 or int32 [N]
    rows: tl.int64, codes: tl.int64, dims, tiles, programs: tl.int32,
    tile_step: tl.int64, d_step: tl.int64, g_step: tl.int64,
    METRIC: tl.constexpr, EXACT: tl.constexpr, R: tl.constexpr, G: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    row_ok = row < rows
    part = tl.arange(0, SPLITS)[None, :]
    ok = row_ok[:, None] & (part < programs)
    place = row[:, None] * programs + part
    least = tl.min(tl.load(upper + place, mask=ok, other=float("inf")), axis=1)
    rest = tl.min(tl.load(others + place, mask=ok, other=float("inf")), axis=1)
    slot = tl.arange(0, 4 * SPLITS)[None, :]
    ok = row_ok[:, None] & (slot < 4 * programs)
    place = row[:, None] * programs * 4 + slot
    candidate = tl.load(low + place, mask=ok, other=float("inf")) <= least[:, None]
    tile_of = tl.load(kept + place, mask=ok, other=-1)

    settled = (least < float("inf")) & ((rest > least) | (not EXACT))
    candidate = candidate & settled[:, None]
    count = tl.where(settled, tl.sum(candidate.to(tl.int32), axis=1), tiles)
    count = tl.where(row_ok & (least > float("-inf")), count, 0)
    x = x + row_offset(row, x_at)
    g = tl.arange(0, G)[None, :]
    best = tl.full([R], float("inf"), tl.float64)
    index = tl.zeros([R], tl.int64)
    tile = tl.full([R], -1, tl.int32)
    for i in range(tl.max(count, axis=0)):
        # A row takes its candidates by ascending tile, or every tile.
        following = tl.min(tl.where(candidate & (tile_of > tile[:, None]), tile_of, tiles), axis=1)
        tile = tl.where(settled, following, i)
        active = i < count
        k = tile.to(tl.int64)[:, None] * G + g
        code_ok = active[:, None] & (k < codes)
        start = tl.load(base + k, mask=code_ok, other=float("nan"))
        code = exact + tile.to(tl.int64)[:, None] * tile_step + g * g_step
        s = exact_scores(x, x_at[0], active, code, code_ok, start, dims, d_step, METRIC)
        s = tl.where(s == s, s, float("inf"))  # codes that cannot be chosen
        least_score = tl.min(s, axis=1)
        first = tl.min(tl.where(s == least_score[:, None], k, codes), axis=1)
        better = (least_score < best) | ((least_score == best) & (first < index))
        best = tl.where(better, least_score, best)
        index = tl.where(better, first, index)
    if mask is not None:
        index = tl.where(tl.load(mask + row, mask=row_ok, other=0) != 0, index, -1)
    tl.store(indices + row, index, mask=row_ok)


@triton.jit(do_not_specialize=FIXED)
def scores_kernel(
    x,  # [N, D]
    x_at,
    codebook,  # [K, D]
    base,  # fp64 [tiles * G], of pack_kernel
    scores,  # fp64 [rows, K], of rows first .. first + rows
    first: tl.int64, rows: tl.int64, codes: tl.int64, dims,
    METRIC: tl.constexpr, R: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    # One dim of programs: a grid's second one ends at 65535.
    tiles = ((codes + G - 1) // G).to(tl.int32)
    pid = tl.program_id(0)
    row = (pid // tiles).to(tl.int64) * R + tl.arange(0, R)
    row_ok = row < rows
    k = (pid % tiles).to(tl.int64) * G + tl.arange(0, G)[None, :]
    ok = row_ok[:, None] & (k < codes)
    start = tl.load(base + k, mask=k < codes, other=float("nan"))
    place = codebook + k * dims + row[:, None] * 0
    s = exact_scores(x + row_offset(first + row, x_at), x_at[0], row_ok, place, ok, start, dims, 1, METRIC)
    tl.store(scores + row[:, None] * codes + k, tl.where(s == s, s, float("inf")), mask=ok)


class Tiles(NamedTuple):
    """What the fast pass leaves, see nearest_tiles_kernel."""

    low: Tensor
    kept: Tensor
    others: Tensor
    upper: Tensor


def nearest_tiles(x: Tensor, packed: Packed, mask: Tensor | None, compute: torch.dtype, exact: bool) -> Tiles:
    """The fast pass over x [*R, D]; mask uint8, contiguous."""
    rows, dims, tiles = x.shape[:-1].numel(), x.shape[-1], packed.bound.shape[0]
    BN, BD, warps = settings(dims, compute)
    blocks = -(-rows // BN)
    per_program = -(-tiles // min(tiles, SPLITS, max(1, PROGRAMS // blocks)))
    splits = -(-tiles // per_program)
    low = x.new_empty((rows, splits, TOP), dtype=torch.float32)
    others = x.new_empty((rows, splits), dtype=torch.float32)
    found = Tiles(low, torch.empty_like(low, dtype=torch.int32), others, torch.empty_like(others))
    nearest_tiles_kernel[blocks, splits](
        x, rows_at(x), mask, packed.mu, packed.shift, packed.rounded, packed.half, packed.bound, *found,
        rows, dims, tiles, per_program, exact, TRITON[compute], BN, TILE, BD, dims <= BD,
        num_warps=warps, num_stages=3,
    )  # fmt: skip
    return found


def vq_assign(x, codebook, mask, metric, exact, int32):
    """`vaeops::vq_assign`: four launches."""
    indices = x.new_empty(x.shape[:-1], dtype=torch.int32 if int32 else torch.int64)
    rows, dims, codes = indices.numel(), x.shape[-1], codebook.shape[0]
    if rows == 0:
        return indices
    mask = None if mask is None else mask.contiguous().view(torch.uint8)
    compute = accumulator(x, codebook)
    with layout.guard(x):
        packed = pack(codebook.contiguous(), metric, compute, TILE)
        found = nearest_tiles(x, packed, mask, compute, exact)
        splits = found.low.shape[1]
        refine_kernel[(-(-rows // REFINED_ROWS),)](
            x, rows_at(x), mask, packed.exact, packed.base, *found, indices,
            rows, codes, dims, packed.bound.shape[0], splits, *packed.exact_strides,
            metric, exact, REFINED_ROWS, TILE, 1 if splits == 1 else SPLITS,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return indices


def vq_topk(x, codebook, mask, k, metric, exact, int32):
    """`vaeops::vq_topk`: exact scores of a few rows at a time, sorted. `exact` changes nothing."""
    shape, (codes, dims) = (*x.shape[:-1], k), codebook.shape
    scores = x.new_empty(shape, dtype=accumulator(x, codebook))
    indices = x.new_empty(shape, dtype=torch.int32 if int32 else torch.int64)
    rows = indices.numel() // k
    codebook = codebook.contiguous()
    with layout.guard(x):
        base = pack(codebook, metric, scores.dtype, TILE).base if rows else None
        step = max(1, SORT_ELEMENTS // codes)
        for first in range(0, rows, step):
            count = min(step, rows - first)
            part = x.new_empty((count, codes), dtype=torch.float64)
            scores_kernel[(-(-count // REFINED_ROWS) * -(-codes // TILE),)](
                x, rows_at(x), codebook, base, part, first, count, codes, dims, metric, REFINED_ROWS, TILE,
                num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
            part, order = part.sort(dim=1, stable=True)
            scores.view(-1, k)[first : first + count] = part[:, :k]
            indices.view(-1, k)[first : first + count] = order[:, :k]
    if mask is not None:
        unused = ~mask.unsqueeze(-1)
        scores.masked_fill_(unused, float("inf"))
        indices.masked_fill_(unused, -1)
    return scores, indices
