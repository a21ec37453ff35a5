"""The codebook as the fast pass of vq_assign reads it: centred, scaled, in fp16, with bounds of its error.

A tile is G consecutive codes. Centring by mu (the mean code, with l2 only) adds the same number to all scores
of a row: |e|^2/2 - x.e = |e - mu|^2/2 - (x - mu).(e - mu) + f(x). Scaling by 2^n keeps fp16 in range.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._rows import exponent, is_finite, power_of_two

L2, COSINE, DOT = 0, 1, 2
PROGRAMS = 64  # that sum the codebook: each leaves one partial sum per dim
BLOCK_D = 16


@triton.jit
def totals_kernel(
    codebook,  # [K, D]
    total,  # fp64 [PROGRAMS, D]: sums of finite elements
    largest,  # fp64 [PROGRAMS, blocks of D]: the largest finite |element|
    codes, dims, per_program,
    G: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    p, block = tl.program_id(0), tl.program_id(1)
    d = block * BD + tl.arange(0, BD)[None, :]
    first = p.to(tl.int64) * per_program
    sums = tl.zeros([G, BD], tl.float64)
    most = tl.zeros([G, BD], tl.float64)
    for step in range(0, per_program, G):
        k = step + tl.arange(0, G)[:, None]
        ok = (k < per_program) & (first + k < codes) & (d < dims)
        e = tl.load(codebook + (first + k) * dims + d, mask=ok, other=0.0).to(tl.float64)
        e = tl.where(is_finite(e), e, 0.0)
        sums += e
        most = tl.maximum(most, tl.abs(e))
    d = block * BD + tl.arange(0, BD)
    tl.store(total + p * dims + d, tl.sum(sums, axis=0), mask=d < dims)
    tl.store(largest + p * tl.num_programs(1) + block, tl.max(tl.max(most, axis=1), axis=0))


@triton.jit
def pack_kernel(
    codebook,  # [K, D]
    total, largest,  # of totals_kernel
    mu,  # C [D], or None: not centred
    shift,  # int32 [1]: codes are scaled by 2^shift
    rounded,  # fp16 [tiles * G, D]: scaled codes; 0 for codes that cannot be chosen
    half,  # fp32 [tiles * G]: |scaled code|^2 / 2, or 0 by the metric; inf for codes that cannot be chosen
    bound,  # fp32 [tiles, 4]: what `nearest_tiles_kernel` multiplies by numbers of the row
    base,  # fp64 [tiles * G], of the exact score: h / 2, sqrt(h) or 0; NaN for codes that cannot be chosen
    copy,  # the codebook's dtype [tiles, D, G], or None
    codes, dims,
    METRIC: tl.constexpr, PROGRAMS: tl.constexpr, G: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    g = tl.arange(0, G)
    k = tile * G + g
    p = tl.arange(0, PROGRAMS)[:, None]
    parts = PROGRAMS * ((dims + BD - 1) // BD)
    top = tl.zeros([256], tl.float64)
    for start in range(0, parts, 256):
        part = start + tl.arange(0, 256)
        top = tl.maximum(top, tl.load(largest + part, mask=part < parts, other=0.0))
    top = tl.max(top, axis=0)
    # |e - mu| < 2 * top, |e / |e|| <= 1: below 2^15, half of fp16's range.
    n = 14 - exponent(top + 0.5 * (top == 0)) if METRIC != 1 else exponent(top) * 0 + 13
    n = tl.minimum(tl.maximum(n, -900), 900)
    scale = power_of_two(n, tl.float64)

    inside = k < codes
    h = tl.zeros([G], tl.float64)
    good = inside
    for c in range(dims):
        given = tl.load(codebook + k * dims + c, mask=inside, other=0.0)
        if copy is not None:
            tl.store(copy + (tile * dims + c) * G + g, given)
        value = given.to(tl.float64)
        h = tl.fma(value, value, h)
        good = good & is_finite(value)
    if METRIC == 1:
        good = good & (h > 0)
    norm = tl.sqrt(tl.where(good, h, 1.0))
    inverse = 1.0 / norm

    square = tl.zeros([G], tl.float64)
    residual = tl.zeros([G], tl.float64)
    for first in range(0, dims, BD):
        d = first + tl.arange(0, BD)[None, :]
        ok = good[:, None] & (d < dims)
        e = tl.load(codebook + k[:, None] * dims + d, mask=ok, other=0.0).to(tl.float64)
        if METRIC == 1:
            e = e * inverse[:, None]
        if mu is not None:
            sums = tl.load(total + p * dims + d, mask=d < dims, other=0.0)
            mean = (tl.sum(sums, axis=0, keep_dims=True) / codes).to(mu.dtype.element_ty)
            if tile == 0:
                tl.store(mu + d, mean, mask=d < dims)
            e = tl.where(good[:, None], e - mean.to(tl.float64), 0.0)
        e *= scale
        near = e.to(tl.float16)
        tl.store(rounded + k[:, None] * dims + d, near, mask=d < dims)
        gap = e - near.to(tl.float64)
        square += tl.sum(e * e, axis=1)
        residual += tl.sum(gap * gap, axis=1)

    nothing = tl.zeros([G], tl.float64)
    bias = 0.5 * square if METRIC == 0 else nothing
    start = 0.5 * h if METRIC == 0 else norm if METRIC == 1 else nothing
    length = scale if METRIC == 1 else scale * tl.max(tl.where(good, norm, 0.0), axis=0)
    tl.store(half + k, tl.where(good, bias, float("inf")).to(tl.float32))
    tl.store(base + k, tl.where(good, start, float("nan")))

    # Rounding of the fp32 sum of products (tensor cores truncate) and of the definition's fp64 arithmetic on
    # uncentred values, both with a margin of two.
    sum_error = (dims + 16) * 2.384185791015625e-07  # 2^-22
    own_error = (2 * dims + 8) * 1.1102230246251565e-16  # 2^-53
    e_norm = tl.sqrt(tl.max(square, axis=0))
    e_gap = tl.sqrt(tl.max(residual, axis=0))
    # Where the definition itself may over- or underflow, bounds of inf have all codes scored.
    usable = (top == 0) | ((top > 3.8725919148493183e-121) & (top < 3.273390607896142e150))  # 2^-400, 2^500
    up = tl.where(usable, 1.0009765625, float("inf"))
    tl.store(bound + 4 * tile, (up * e_norm).to(tl.float32))
    tl.store(bound + 4 * tile + 1, (up * (e_gap + sum_error * (e_norm + e_gap))).to(tl.float32))
    bias_error = 4.76837158203125e-07 * tl.max(bias, axis=0)  # 2^-21
    if METRIC == 0:
        bias_error += own_error * 0.5 * length * length
    tl.store(bound + 4 * tile + 2, (up * bias_error).to(tl.float32))
    tl.store(bound + 4 * tile + 3, (up * own_error * length).to(tl.float32))
    if tile == 0:
        tl.store(shift, n)


class Packed(NamedTuple):
    """Outputs of pack_kernel, and where the exact scores read code (tile, d, g)."""

    mu: Tensor | None
    shift: Tensor
    rounded: Tensor
    half: Tensor
    bound: Tensor
    base: Tensor
    exact: Tensor
    exact_strides: tuple[int, int, int]  # of tile, d, g


def pack(codebook: Tensor, metric: int, compute: torch.dtype, G: int) -> Packed:
    """codebook [K, D] contiguous; two launches. Makes 6 K D + 13 K bytes, less where codes are not fp32."""
    K, D = codebook.shape
    tiles, blocks = -(-K // G), -(-D // BLOCK_D)
    new = codebook.new_empty
    total = new((PROGRAMS, D), dtype=torch.float64)
    largest = new((PROGRAMS, blocks), dtype=torch.float64)
    # An fp64 copy would take too much memory; its codes are read as they lie.
    copy = new((tiles, D, G)) if codebook.dtype is not torch.float64 else None
    packed = Packed(
        new(D, dtype=compute) if metric == L2 else None, new(1, dtype=torch.int32),
        new((tiles * G, D), dtype=torch.float16), new(tiles * G, dtype=torch.float32),
        new((tiles, 4), dtype=torch.float32), new(tiles * G, dtype=torch.float64),
        codebook if copy is None else copy, (G * D, 1, D) if copy is None else (D * G, G, 1),
    )  # fmt: skip
    totals_kernel[PROGRAMS, blocks](codebook, total, largest, K, D, -(-K // PROGRAMS), 16, BLOCK_D)
    pack_kernel[(tiles,)](
        codebook, total, largest, *packed[:6], copy, K, D,
        metric, PROGRAMS, G, BLOCK_D, enable_fp_fusion=False,
    )  # fmt: skip
    return packed
