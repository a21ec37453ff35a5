"""Distances of two maps and their gradients in Triton, in one pass. Specification: vaeops/ref/perceptual.py.

A program takes P pixels of one image and goes over its channels in steps. It leaves one partial sum, and a
second kernel adds those of an image in the order of their index, in fp64. "gram" is a pair of matrix products
and goes through torch.bmm.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ref.perceptual import DISTANCES, LPIPS_EPS, _count, compute_dtype
from .. import _layout as layout
from .._exact import TRITON, divide, root

FIXED = ("pixels", "tiles", "count", "weight")
LPIPS, GRAM = DISTANCES.index("lpips"), DISTANCES.index("gram")


def settings(channels: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """(pixels of a tile, channels of a step, warps). Not tuned on a GPU yet: 8 fp32 elements a thread."""
    step = min(128, max(16, triton.next_power_of_2(channels)))
    return (1024 >> (dtype is torch.float64)) // step, step, 4


@triton.jit
def pixel_offset(image, pixel, at):
    """int64 [P]: where pixels of an image lie."""
    if len(at) == 3:
        offset = pixel * at[2]
    else:
        offset = pixel // at[4] * at[3] + pixel % at[4] * at[2]
    return image * at[0] + offset


@triton.jit
def load_map(pointer, offset, c, at, ok, A: tl.constexpr):
    return tl.load(pointer + offset[:, None] + c.to(tl.int64)[None, :] * at[1], mask=ok, other=0.0).to(A)


@triton.jit
def store_map(pointer, value, offset, c, at, ok, ADD: tl.constexpr, A: tl.constexpr):
    place = pointer + offset[:, None] + c.to(tl.int64)[None, :] * at[1]
    if ADD:
        value += tl.load(place, mask=ok, other=0.0).to(A)
    tl.store(place, value, mask=ok)


@triton.jit(do_not_specialize=FIXED)
def distance_kernel(
    a, a_at, b, b_at,  # [n, C, h, w]
    lin,  # fp32 [C]; lpips alone, else None
    out,  # A [n, h * w]: each pixel's distance; or None
    partial,  # A [n, tiles]: a tile's, times `count`; or None
    grad,  # A [n, h * w] or [n]: of the distance; None: `weight`
    ga, ga_at, gb, gb_at,  # gradients; None: not wanted
    pixels: tl.int64, tiles, count: tl.int64, weight,
    CHANNELS: tl.constexpr, KIND: tl.constexpr, PER_PIXEL: tl.constexpr, ADD: tl.constexpr,
    A: tl.constexpr, P: tl.constexpr, BC: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    image = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    pixel = tile.to(tl.int64) * P + tl.arange(0, P)
    there = pixel < pixels
    a_offset, b_offset = pixel_offset(image, pixel, a_at), pixel_offset(image, pixel, b_at)
    if ga is not None:
        ga_offset = pixel_offset(image, pixel, ga_at)
    if gb is not None:
        gb_offset = pixel_offset(image, pixel, gb_at)
    w = (tl.full([P], 1.0, A) * weight).to(A)
    if grad is not None:
        place = image * pixels + pixel if PER_PIXEL else image + pixel * 0
        w = tl.load(grad + place, mask=there, other=0.0)
    divisor = tl.full([P], 1.0, A) * count.to(A)
    w = divide(w, divisor)

    if KIND == 3:
        a_square, b_square = tl.zeros([P], A), tl.zeros([P], A)
        for first in range(0, CHANNELS, BC):
            c = first + tl.arange(0, BC)
            ok = there[:, None] & (c < CHANNELS)[None, :]
            u, v = load_map(a, a_offset, c, a_at, ok, A), load_map(b, b_offset, c, b_at, ok, A)
            a_square += tl.sum(u * u, axis=1)
            b_square += tl.sum(v * v, axis=1)
        a_norm, b_norm = root(a_square), root(b_square)
        one = tl.full([P], 1.0, A)
        a_inverse, b_inverse = divide(one, a_norm + EPS), divide(one, b_norm + EPS)

    total = tl.zeros([P], A)
    a_along, b_along = tl.zeros([P], A), tl.zeros([P], A)
    for first in range(0, CHANNELS, BC):
        c = first + tl.arange(0, BC)
        ok = there[:, None] & (c < CHANNELS)[None, :]
        u, v = load_map(a, a_offset, c, a_at, ok, A), load_map(b, b_offset, c, b_at, ok, A)
        if KIND == 3:
            scale = tl.load(lin + c, mask=c < CHANNELS, other=0.0).to(A)[None, :]
            d = u * a_inverse[:, None] - v * b_inverse[:, None]
            term = scale * d * d
            a_along += tl.sum(2 * scale * d * u, axis=1)
            b_along += tl.sum(2 * scale * d * v, axis=1)
        else:
            d = u - v
            far = tl.abs(d)
            if KIND == 0:
                term, slope = d * d, 2 * d
            elif KIND == 1:
                term, slope = far, tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d)).to(A)
            else:
                term = tl.where(far < 1, 0.5 * d * d, far - 0.5)
                slope = tl.where(d > 1, 1.0, tl.where(d < -1, -1.0, d)).to(A)
            g = w[:, None] * slope
            if ga is not None:
                store_map(ga, g, ga_offset, c, ga_at, ok, ADD, A)
            if gb is not None:
                store_map(gb, -g, gb_offset, c, gb_at, ok, ADD, A)
        total += tl.sum(term, axis=1)
    if out is not None:
        tl.store(out + image * pixels + pixel, divide(total, divisor), mask=there)
    if partial is not None:
        tl.store(partial + image * tiles + tile, tl.sum(total, axis=0))

    if KIND == 3:
        if ga is not None or gb is not None:
            # At a zero pixel the unit vector has no derivative.
            a_zero, b_zero = a_square == 0, b_square == 0
            a_along = divide(a_along * a_inverse, tl.where(a_zero, one, a_norm))
            b_along = divide(b_along * b_inverse, tl.where(b_zero, one, b_norm))
            for first in range(0, CHANNELS, BC):
                c = first + tl.arange(0, BC)
                ok = there[:, None] & (c < CHANNELS)[None, :]
                u, v = load_map(a, a_offset, c, a_at, ok, A), load_map(b, b_offset, c, b_at, ok, A)
                scale = tl.load(lin + c, mask=c < CHANNELS, other=0.0).to(A)[None, :]
                slope = 2 * scale * (u * a_inverse[:, None] - v * b_inverse[:, None])
                if ga is not None:
                    g = (w * a_inverse)[:, None] * (slope - u * a_along[:, None])
                    g = tl.where(a_zero[:, None], 0.0, g)
                    store_map(ga, g, ga_offset, c, ga_at, ok, ADD, A)
                if gb is not None:
                    g = (w * b_inverse)[:, None] * (v * b_along[:, None] - slope)
                    g = tl.where(b_zero[:, None], 0.0, g)
                    store_map(gb, g, gb_offset, c, gb_at, ok, ADD, A)


@triton.jit(do_not_specialize=FIXED)
def total_kernel(
    partial,  # A [n, tiles]
    out,  # A [n]: the sums over `count`
    tiles, count: tl.int64,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    sums = tl.zeros([512], tl.float64)
    for first in range(0, tiles, 512):
        tile = first + tl.arange(0, 512)
        sums += tl.load(partial + image * tiles + tile, mask=tile < tiles, other=0.0).to(tl.float64)
    tl.store(out + image, tl.sum(sums, axis=0) / count.to(tl.float64))


def map_at(t: Tensor | None) -> tuple[int, ...] | None:
    """Strides (image, channel, pixel), and (row, width) where rows do not follow one another."""
    if t is None:
        return None
    image, channel, row, column = t.stride()
    height, width = t.shape[2:]
    if width == 1:
        return image, channel, row
    if height == 1 or row == width * column:
        return image, channel, column
    return image, channel, column, row, width


def run_distance(
    a: Tensor, b: Tensor, lin: Tensor | None, kind: int, mean: bool, *,
    out: Tensor | None = None, pixels_out: Tensor | None = None, grad: Tensor | None = None,
    weight: float = 1.0, ga: Tensor | None = None, gb: Tensor | None = None, add: bool = False,
) -> None:  # fmt: skip
    """Distances into out [n] or pixels_out [n, h, w]. Gradients into ga and gb, or onto them where `add`;
    their cotangents are `grad` (of either shape) or `weight`."""
    n, C, height, width = a.shape
    spatial = pixels_out is not None or (grad is not None and grad.dim() == 3)
    count = _count(a, kind, mean, spatial)
    dtype = compute_dtype(a, b)
    P, BC, warps = settings(C, dtype)
    tiles = -(-height * width // P)
    partial = None if out is None else a.new_empty((n, tiles), dtype=dtype)
    distance_kernel[(n * tiles,)](
        a, map_at(a), b, map_at(b), lin, pixels_out, partial, None if grad is None else grad.contiguous(),
        ga, map_at(ga), gb, map_at(gb), height * width, tiles, count, weight,
        C, kind, grad is not None and grad.dim() == 3, add, TRITON[dtype], P, BC, LPIPS_EPS, num_warps=warps,
    )  # fmt: skip
    if out is not None:
        total_kernel[(n,)](partial, out, tiles, count, num_warps=4)


def _grams(a: Tensor) -> tuple[Tensor, Tensor]:
    """(a as [n, h * w, C], its Gram matrices)."""
    rows = a.permute(0, 2, 3, 1).reshape(a.shape[0], -1, a.shape[1]).to(compute_dtype(a))
    return rows, torch.bmm(rows.transpose(1, 2), rows) / (rows.shape[1] * rows.shape[2])


def run_gram(
    a: Tensor, b: Tensor, mean: bool, *, out: Tensor | None = None, grad: Tensor | None = None,
    weight: float = 1.0, ga: Tensor | None = None, gb: Tensor | None = None, add: bool = False,
) -> None:  # fmt: skip
    """As run_distance, which also sums: a Gram matrix is a map [C, C] of one channel."""
    (a_rows, a_gram), (b_rows, b_gram) = _grams(a), _grams(b)
    difference = a_gram - b_gram
    if out is not None:
        zero = torch.zeros_like(difference)
        run_distance(difference.unsqueeze(1), zero.unsqueeze(1), None, 0, mean, out=out)
    if ga is None and gb is None:
        return
    scale = 4.0 / (_count(a, GRAM, mean, False) * a[0].numel())
    w = difference.mul(scale * weight if grad is None else (scale * grad).view(-1, 1, 1))
    for g, rows, sign in ((ga, a_rows, 1.0), (gb, b_rows, -1.0)):
        if g is not None:
            made = torch.bmm(rows, w).mul_(sign).transpose(1, 2).unflatten(2, a.shape[2:])
            g.add_(made) if add else g.copy_(made)


def run(a: Tensor, b: Tensor, lin: Tensor | None, kind: int, mean: bool, **options) -> None:
    """Any kind: see run_distance."""
    if kind == GRAM:
        run_gram(a, b, mean, **options)
    else:
        run_distance(a, b, lin, kind, mean, **options)


def feature_distance_fwd(a, b, lin, kind, mean, spatial):
    """`vaeops::feature_distance_fwd`: two launches, one where spatial."""
    shape = (a.shape[0], *a.shape[2:]) if spatial else a.shape[:1]
    out = a.new_empty(shape, dtype=compute_dtype(a, b))
    if a.numel() == 0:
        return out.zero_()
    lin = None if lin is None else lin.contiguous()
    with layout.guard(a), torch.autocast(a.device.type, enabled=False):
        run(a, b, lin, kind, mean, **{"pixels_out" if spatial else "out": out})
    return out


def feature_distance_bwd(grad, a, b, lin, kind, mean, spatial):
    """`vaeops::feature_distance_bwd`: one launch."""
    ga, gb = torch.empty_like(a), torch.empty_like(b)
    if a.numel() == 0:
        return ga, gb
    lin = None if lin is None else lin.contiguous()
    with layout.guard(a), torch.autocast(a.device.type, enabled=False):
        run(a, b, lin, kind, mean, grad=grad.to(compute_dtype(a, b)), ga=ga, gb=gb)
    return ga, gb
