"""The noise stream in Triton: Philox4x32-10 and a portable Box-Muller. Specification: vaeops/ref/rng.py.

Bits match the other implementations because fp32 add, multiply, fma and sqrt_rn are rounded alike everywhere.
That needs `enable_fp_fusion=False` at launch: a multiply and an add must not become one fma behind our back.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _layout as layout
from ._tile import aligned, tile_at


@triton.jit
def philox(key, low, high):
    """Four uint32 words of the block whose 128-bit counter is (low, high) under `key`, all int64."""
    k0, k1 = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    c0, c1 = low.to(tl.uint32), (low >> 32).to(tl.uint32)
    c2, c3 = high.to(tl.uint32), (high >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        p0, p1 = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c2 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0, (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = p1.to(tl.uint32), p0.to(tl.uint32)
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def log1p_third(f):
    """log(1 + f) of fp32 |f| <= 1/3."""
    p = tl.fma(f, -0.13191646, 0.1396245)
    p = tl.fma(f, p, -0.12115126)
    p = tl.fma(f, p, 0.1401092)
    p = tl.fma(f, p, -0.16685466)
    p = tl.fma(f, p, 0.20010044)
    p = tl.fma(f, p, -0.24999689)
    p = tl.fma(f, p, 0.33333224)
    p = tl.fma(f, p, -0.5)
    return tl.fma(f * f, p, f)


@triton.jit
def log_normal_range(u):
    """Natural logarithm of normal u > 0, 0.94 ulp: u = 2^k m with m in [2/3, 4/3), a polynomial in m - 1."""
    bits = u.to(tl.uint32, bitcast=True)
    exponent = (bits - 0x3F2AAAAB) & 0xFF800000
    f = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    k = exponent.to(tl.int32, bitcast=True).to(tl.float32) * 1.1920928955078125e-7
    return tl.fma(k, 0.693147182, log1p_third(f))


@triton.jit
def sincos(word):
    """Sine and cosine of 2 pi word / 2^32. The angle is cut to an eighth of a turn in integers, exactly."""
    signed = (word << 2).to(tl.int32, bitcast=True)
    r = signed.to(tl.float32) * 2.3283064365386963e-10  # quarter turns in [-1/2, 1/2)
    quadrant = (word + 0x20000000) >> 30
    t = r * r
    s = tl.fma(t, 0.00015820675, -0.0046812664)
    s = tl.fma(t, s, 0.07969258)
    s = tl.fma(t, s, -0.6459641)
    s = tl.fma(r * t, s, r * 1.5707964)
    c = tl.fma(t, 0.0009040216, -0.020860288)
    c = tl.fma(t, c, 0.25366923)
    c = tl.fma(t, c, -1.2337005)
    c = tl.fma(t, c, 1.0)
    swap = (quadrant & 1) != 0
    sine, cosine = tl.where(swap, c, s), tl.where(swap, s, c)
    return tl.where((quadrant & 2) != 0, -sine, sine), tl.where(((quadrant + 1) & 2) != 0, -cosine, cosine)


@triton.jit
def box_muller(a, b):
    # In (0, 1]: |normal| <= 6.76.
    u = tl.fma(a.to(tl.float32), 2.3283064365386963e-10, 1.1641532182693481e-10)
    radius = tl.sqrt_rn(log_normal_range(u) * -2.0)
    s, c = sincos(b)
    return radius * c, radius * s


@triton.jit
def normal_tile(seed, tile, first_col, per_stream, ONE_STREAM: tl.constexpr, QUADS: tl.constexpr,
                R: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """Normals [R, C] of a tile (see tile_at).

    QUADS: every row of the tile begins a Philox block and lies in one stream, so a block makes four of them;
    `per_stream` is in rows. Otherwise each element makes its own block and takes its lane; `per_stream` is in
    elements.
    """
    row, col, row_ok, col_ok, cols = tile
    if QUADS:
        place, ok = row, row_ok
    else:
        place, ok = row * cols + col, row_ok & col_ok
    if ONE_STREAM:
        key, offset = tl.load(seed), tl.load(seed + 1)
    else:
        stream = place // per_stream
        place -= stream * per_stream
        key, offset = tl.load(seed + 2 * stream, mask=ok), tl.load(seed + 2 * stream + 1, mask=ok)
    across = first_col // 4 + tl.arange(0, C // 4)[None, :]
    quad = place * (cols // 4) + across if QUADS else place // 4
    counter = offset + quad  # wraps modulo 2^64
    w0, w1, w2, w3 = philox(key, counter, counter * 0)
    if QUADS:
        n0, n1 = box_muller(w0, w1)
        n2, n3 = box_muller(w2, w3)
        return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), [R, C])
    else:
        second = (place & 2) != 0
        n0, n1 = box_muller(tl.where(second, w2, w0), tl.where(second, w3, w1))
        return tl.where((place & 1) != 0, n1, n0)


@triton.jit(do_not_specialize=layout.FIXED)
def normal_kernel(
    seed,  # int64 [S, 2]
    out,  # fp32 [S, length]
    rows: tl.int64, cols: tl.int64,
    ALIGNED: tl.constexpr, ONE_STREAM: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    cols = aligned(cols, ALIGNED)
    tile, first_col = tile_at(tl.program_id(0), 0, rows, cols, 1, "none", R, C)
    row, col, row_ok, col_ok, _ = tile
    value = normal_tile(seed, tile, first_col, 1, ONE_STREAM, True, R, C)
    tl.store(out + row * cols + col, value, mask=row_ok & col_ok)


@triton.jit(do_not_specialize=("n",))
def fold_in_kernel(
    seed,  # int64 [n or 1, 2]
    index,  # int64 [n or 1]
    child,  # int64 [n, 2]
    n: tl.int64,
    ONE_SEED: tl.constexpr, ONE_INDEX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = i < n
    s = i * 0 if ONE_SEED else i
    key, offset = tl.load(seed + 2 * s, mask=ok), tl.load(seed + 2 * s + 1, mask=ok)
    which = tl.load(index + (i * 0 if ONE_INDEX else i), mask=ok)
    w0, w1, w2, w3 = philox(key, offset, which | -(1 << 63))  # the top bit, which the noise stream leaves 0
    tl.store(child + 2 * i, w0.to(tl.int64) | (w1.to(tl.int64) << 32), mask=ok)
    tl.store(child + 2 * i + 1, w2.to(tl.int64) | (w3.to(tl.int64) << 32), mask=ok)


def normal(seed: Tensor, size: list[int]) -> Tensor:
    """fp32 normals of `vaeops::normal`: seed [2] or [*S, 2], S a prefix of size."""
    out = seed.new_empty(size, dtype=torch.float32)
    if out.numel() == 0:
        return out
    block, warps = layout.settings(out.dtype)
    streams = seed.numel() // 2
    with layout.guard(out):
        shape = torch.Size((streams, out.numel() // streams))
        v = layout.view(shape, [], 1 if streams > 1 else None, 1, block)
        grid = (-(-v.rows // v.R) * -(-v.cols // v.C),)
        normal_kernel[grid](
            seed.contiguous(), out, v.rows, v.cols, v.cols % 16 == 0, streams == 1, v.R, v.C,
            num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def fold_in(seed: Tensor, index: Tensor) -> Tensor:
    """int64 [..., 2] of `vaeops::fold_in`: seed [..., 2] and index [...] broadcast."""
    shape = torch.broadcast_shapes(seed.shape[:-1], index.shape)
    child = seed.new_empty((*shape, 2))
    n = child.numel() // 2
    if n == 0:
        return child
    one_seed, one_index = seed.numel() == 2, index.numel() == 1
    seed = seed.contiguous() if one_seed else seed.expand(*shape, 2).contiguous()
    index = index if one_index else index.expand(shape).contiguous()
    block = 256
    with layout.guard(child):
        fold_in_kernel[(-(-n // block),)](seed, index, child, n, one_seed, one_index, block, num_warps=4)
    return child
