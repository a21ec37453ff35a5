"""Behind a convolution that Triton does not make: bias, ReLU, mask and pool in one pass; and the way back."""

import triton
import triton.language as tl
from torch import Tensor

from ._tile import FIXED, channels, elements, finish, load_packed, pixels, restrain, tile_at


def settings(channels: int) -> tuple[int, int, int, int]:
    """(rows, columns, channels of a tile, warps). Not tuned on a GPU yet: 16 elements a thread."""
    return 4, 8, min(64, max(16, triton.next_power_of_2(channels))), 4


@triton.jit(do_not_specialize=FIXED)
def finish_kernel(
    x,  # T [n, h, w, K]
    bias, before, y, mask, pooled, code,  # see finish; y may be x
    height, width,
    K: tl.constexpr, RELU: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    image, row, column, ok = tile_at(height, width, TH, TW)
    at, exists = elements(pixels(image, row, column, height, width), ok, channels(BK), K, BK)
    v = tl.load(x + at, mask=exists, other=0.0).to(tl.float32)
    finish(v, bias, before, y, mask, pooled, code, height, width, K, RELU, x.dtype.element_ty, TH, TW, BK)


@triton.jit(do_not_specialize=FIXED)
def restrain_kernel(
    g,  # T [n, h, w, K], with a code [n, h / 2, w / 2, K]: the gradient of a layer's output; None: it is 0
    code,  # uint8 [n, h / 2, w / 2, K / 4] of the pool that follows, or None
    after, mask, before, out,  # see restrain; out may be g where there is no code
    height, width,
    K: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    image, row, column, ok = tile_at(height, width, TH, TW)
    v = tl.zeros([TH * TW, BK], tl.float32)
    if code is not None:
        ok = ok & (row // 2 < height // 2) & (column // 2 < width // 2)
        pixel = pixels(image, row // 2, column // 2, height // 2, width // 2)
        at, exists = elements(pixel, ok, channels(BK), K, BK)
        place = (row % 2 * 2 + column % 2)[:, None]
        here = load_packed(code, pixel, ok, K, TH * TW, BK, 4) == place
        v = tl.where(here, tl.load(g + at, mask=exists, other=0.0).to(tl.float32), 0.0)
    elif g is not None:
        pixel = pixels(image, row, column, height, width)
        at, exists = elements(pixel, ok, channels(BK), K, BK)
        v = tl.load(g + at, mask=exists, other=0.0).to(tl.float32)
    restrain(v, after, mask, before, out, height, width, K, TH, TW, BK)


def grid(n: int, height: int, width: int, channels: int, TH: int, TW: int, BK: int) -> tuple[int, int]:
    """Programs for a map [n, channels, height, width]."""
    return n * -(-height // TH) * -(-width // TW), -(-channels // BK)


def run_finish(x: Tensor, bias: Tensor | None, relu: bool, outputs: tuple[Tensor | None, ...]) -> None:
    """x [n, K, h, w] channels_last; outputs (before, y, mask, pooled, code) of finish."""
    n, K, height, width = x.shape
    TH, TW, BK, warps = settings(K)
    finish_kernel[grid(n, height, width, K, TH, TW, BK)](
        x, bias, *outputs, height, width, K, relu, TH, TW, BK, num_warps=warps
    )


def run_restrain(
    g: Tensor | None, code: Tensor | None, below: tuple[Tensor | None, ...], out: Tensor
) -> None:
    """below (after, mask, before) of restrain; all maps channels_last."""
    n, K, height, width = out.shape
    TH, TW, BK, warps = settings(K)
    restrain_kernel[grid(n, height, width, K, TH, TW, BK)](
        g, code, *below, out, height, width, K, TH, TW, BK, num_warps=warps
    )
