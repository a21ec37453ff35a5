"""3x3 convolutions in Triton: of an image, of maps with few channels, and their input gradients.

Implicit matrix products over the nine taps. Operands have the maps' dtype T (fp32 or bf16), sums are fp32.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tile import FIXED, channels, finish, pixels, restrain, tile_at
from .pool import grid


def settings(dtype: torch.dtype) -> tuple[int, int, int, int, int, int]:
    """(rows, columns, most channels out, most channels in of a step, warps, stages) of a program.

    Not tuned on a GPU yet.
    """
    return 8, 16, 64, 64 if dtype is torch.bfloat16 else 32, 8, 3


def tiles(C: int, K: int, dtype: torch.dtype) -> tuple[int, int, int, int, int, int]:
    """`settings`, no larger than the layer. The first layer's 27 products are one step."""
    TH, TW, most_out, most_in, warps, stages = settings(dtype)
    out, step = (max(16, triton.next_power_of_2(n)) for n in (K, C))
    return TH, TW, min(most_out, out), min(most_in, step), warps, stages


def precision(dtype: torch.dtype) -> str:
    """Of fp32 products: TF32 where PyTorch allows it to cuDNN's convolutions, else three of them to one."""
    allowed = torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return "tf32" if allowed and dtype is torch.float32 else "tf32x3"


@triton.jit
def products(
    x,  # T [n, h, w, C]
    weight,  # T [K, 3, 3, C]
    height, width,
    C: tl.constexpr, K: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BK: tl.constexpr,
    BC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """fp32 [M, BK]: the convolution at this program's pixels and channels, without bias."""
    image, row, column, ok = tile_at(height, width, TH, TW)
    pixel = pixels(image, row, column, height, width)
    k = channels(BK)
    sums = tl.zeros([TH * TW, BK], tl.float32)
    STEPS: tl.constexpr = (C + BC - 1) // BC
    for step in range(9 * STEPS):
        tap = step // STEPS
        down, right = tap // 3 - 1, tap % 3 - 1
        inside = ok & (row + down >= 0) & (row + down < height)
        inside = inside & (column + right >= 0) & (column + right < width)
        c = step % STEPS * BC + tl.arange(0, BC)
        a_ok = inside[:, None]
        b_ok = (k < K)[None, :]
        if C % BC != 0:
            a_ok = a_ok & (c < C)[None, :]
            b_ok = b_ok & (c < C)[:, None]
        at = (pixel + (down * width + right)) * C
        a = tl.load(x + at[:, None] + c[None, :], mask=a_ok, other=0.0)
        b = tl.load(weight + k[None, :] * (9 * C) + (tap * C + c)[:, None], mask=b_ok, other=0.0)
        sums = tl.dot(a, b, sums, input_precision=PRECISION)
    return sums


@triton.jit(do_not_specialize=FIXED)
def conv_kernel(
    x,  # T [n, h, w, C]
    weight,  # T [K, 3, 3, C]
    bias, before, y, mask, pooled, code,  # see finish
    height, width,
    C: tl.constexpr, K: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    v = products(x, weight, height, width, C, K, TH, TW, BK, BC, PRECISION)
    finish(v, bias, before, y, mask, pooled, code, height, width, K, RELU, x.dtype.element_ty, TH, TW, BK)


@triton.jit(do_not_specialize=FIXED)
def conv_bwd_kernel(
    g,  # T [n, h, w, K]: the gradient of the convolution's output
    rotated,  # T [C, 3, 3, K]: the weights, turned by 180 degrees
    after, mask, before, out,  # see restrain: [n, h, w, C], of the layer below
    height, width,
    K: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    v = products(g, rotated, height, width, K, C, TH, TW, BK, BC, PRECISION)
    restrain(v, after, mask, before, out, height, width, C, TH, TW, BK)


@triton.jit
def of_channel(c, values):
    """values[c], of three."""
    return tl.where(c == 0, values[0], tl.where(c == 1, values[1], values[2])).to(tl.float32)


@triton.jit(do_not_specialize=FIXED)
def conv_first_kernel(
    x, x_at,  # fp32, bf16, fp16 or uint8 [n, 3, H, W]
    mean, rstd,  # three numbers each: (x - mean) * rstd enters, 0 outside the image
    weight,  # T [K, 3, 3, 3], channels first
    bias, before, y, mask, pooled, code,  # see finish
    height, width,
    K: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    image, row, column, ok = tile_at(height, width, TH, TW)
    j = tl.arange(0, 32)  # 27 products: channel, row, column
    c = j // 9
    from_row = row[:, None] + (j // 3 % 3 - 1)[None, :]
    from_column = column[:, None] + (j % 3 - 1)[None, :]
    inside = (from_row >= 0) & (from_row < height) & (from_column >= 0) & (from_column < width)
    inside = inside & ok[:, None] & (j < 27)[None, :]
    at = from_row.to(tl.int64) * x_at[2] + from_column.to(tl.int64) * x_at[3]
    at += (image * x_at[0] + c.to(tl.int64) * x_at[1])[None, :]
    p = tl.load(x + at, mask=inside, other=0).to(tl.float32)
    p = tl.where(inside, (p - of_channel(c, mean)[None, :]) * of_channel(c, rstd)[None, :], 0.0)
    k = channels(BK)
    b_ok = (j < 27)[:, None] & (k < K)[None, :]
    b = tl.load(weight + k[None, :] * 27 + j[:, None], mask=b_ok, other=0.0)
    v = tl.dot(p.to(weight.dtype.element_ty), b, input_precision=PRECISION)
    finish(
        v, bias, before, y, mask, pooled, code, height, width, K, RELU, weight.dtype.element_ty, TH, TW, BK
    )


@triton.jit(do_not_specialize=FIXED)
def conv_first_bwd_kernel(
    g,  # T [n, H, W, K]
    rotated,  # T [3, 3, 3, K]: the weights, turned by 180 degrees
    rstd,
    gx, gx_at,  # fp32, bf16 or fp16 [n, 3, H, W]
    height, width,
    K: tl.constexpr, PRECISION: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    v = products(g, rotated, height, width, K, 3, TH, TW, BK, BC, PRECISION)
    image, row, column, ok = tile_at(height, width, TH, TW)
    c = tl.arange(0, BK)
    v = v * of_channel(c, rstd)[None, :]
    at = (image * gx_at[0] + row.to(tl.int64) * gx_at[2] + column.to(tl.int64) * gx_at[3])[:, None]
    tl.store(gx + at + c.to(tl.int64)[None, :] * gx_at[1], v, mask=ok[:, None] & (c < 3)[None, :])


def run_conv(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool,
             outputs: tuple[Tensor | None, ...]) -> None:  # fmt: skip
    """x [n, C, h, w] channels_last; weight [K, 3, 3, C]; outputs (before, y, mask, pooled, code)."""
    n, C, height, width = x.shape
    K = weight.shape[0]
    TH, TW, BK, BC, warps, stages = tiles(C, K, x.dtype)
    conv_kernel[grid(n, height, width, K, TH, TW, BK)](
        x, weight, bias, *outputs, height, width, C, K, relu, precision(x.dtype), TH, TW, BK, BC,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip


def run_conv_bwd(g: Tensor, rotated: Tensor, below: tuple[Tensor | None, ...], out: Tensor) -> None:
    """g [n, K, h, w], out [n, C, h, w] channels_last; rotated [C, 3, 3, K]; below (after, mask, before)."""
    n, K, height, width = g.shape
    C = rotated.shape[0]
    TH, TW, BK, BC, warps, stages = tiles(K, C, g.dtype)
    conv_bwd_kernel[grid(n, height, width, C, TH, TW, BK)](
        g, rotated, *below, out, height, width, K, C, precision(g.dtype), TH, TW, BK, BC,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip


def run_conv_first(x: Tensor, pixels: Sequence[float], weight: Tensor, bias: Tensor | None, relu: bool,
                   outputs: tuple[Tensor | None, ...]) -> None:  # fmt: skip
    """x [n, 3, H, W] of any strides; weight [K, 3, 3, 3], channels first; outputs as in run_conv."""
    n, _, height, width = x.shape
    K = weight.shape[0]
    TH, TW, BK, _, warps, _ = tiles(3, K, weight.dtype)
    conv_first_kernel[grid(n, height, width, K, TH, TW, BK)](
        x, x.stride(), tuple(pixels[:3]), tuple(pixels[3:]), weight, bias, *outputs, height, width,
        K, relu, precision(weight.dtype), TH, TW, BK, num_warps=warps,
    )  # fmt: skip


def run_conv_first_bwd(g: Tensor, rotated: Tensor, rstd: Sequence[float], gx: Tensor) -> None:
    """g [n, K, H, W] channels_last; rotated [3, 3, 3, K]; gx [n, 3, H, W] of any strides."""
    n, K, height, width = g.shape
    TH, TW, BK, BC, warps, stages = tiles(K, 3, g.dtype)
    conv_first_bwd_kernel[grid(n, height, width, 3, TH, TW, BK)](
        g, rotated, tuple(rstd), gx, gx.stride(), height, width,
        K, precision(g.dtype), TH, TW, BK, BC, num_warps=warps, num_stages=stages,
    )  # fmt: skip
