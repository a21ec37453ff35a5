"""What the kernels of a trunk share: a tile of pixels, and what happens to it behind a convolution.

Maps lie as [n, h, w, K]. A program has TH x TW pixels of one image (M of them, both even) and BK channels.
The pixels of a tile count by 2x2 windows, four to each: (top left, top right, bottom left, bottom right). So
a tile pools in registers.

A mask has one bit an element, bit k % 8 of byte k / 8 of a pixel; a pool's codes have two bits an element, at
2 (k % 4) of byte k / 4. Bytes are not shared between pixels.
"""

import triton
import triton.language as tl

# Kernel arguments that change from batch to batch and image to image: Triton must not compile anew for them.
FIXED = ("height", "width")


@triton.jit
def tile_at(height, width, TH: tl.constexpr, TW: tl.constexpr):
    """(image, row [M], column [M], the image's part of the tile [M]) of this program."""
    down = (height + TH - 1) // TH
    across = (width + TW - 1) // TW
    tile = tl.program_id(0)
    image = (tile // (down * across)).to(tl.int64)
    m = tl.arange(0, TH * TW)
    window = m // 4
    row = tile // across % down * TH + window // (TW // 2) * 2 + m // 2 % 2
    column = tile % across * TW + window % (TW // 2) * 2 + m % 2
    return image, row, column, (row < height) & (column < width)


@triton.jit
def windows_at(height, width, TH: tl.constexpr, TW: tl.constexpr):
    """The same of the tile's windows [M / 4] in the pooled map."""
    down = (height + TH - 1) // TH
    across = (width + TW - 1) // TW
    tile = tl.program_id(0)
    image = (tile // (down * across)).to(tl.int64)
    window = tl.arange(0, TH * TW // 4)
    row = tile // across % down * (TH // 2) + window // (TW // 2)
    column = tile % across * (TW // 2) + window % (TW // 2)
    return image, row, column, (row < height // 2) & (column < width // 2)


@triton.jit
def pixels(image, row, column, height, width):
    """int64: their number in [n, h, w]."""
    return (image * height + row) * width + column


@triton.jit
def channels(BK: tl.constexpr):
    return tl.program_id(1) * BK + tl.arange(0, BK)


@triton.jit
def elements(pixel, ok, k, K: tl.constexpr, BK: tl.constexpr):
    """Offsets [M, BK] in a map, and which of them exist."""
    exists = ok[:, None]
    if K % BK != 0:
        exists = exists & (k < K)[None, :]
    return pixel[:, None] * K + k[None, :], exists


@triton.jit
def packed_elements(pixel, ok, K: tl.constexpr, BK: tl.constexpr, EACH: tl.constexpr):
    """The same of bytes [M, BK / EACH] that hold EACH elements."""
    BYTES: tl.constexpr = (K + EACH - 1) // EACH
    byte = tl.program_id(1) * (BK // EACH) + tl.arange(0, BK // EACH)
    return pixel[:, None] * BYTES + byte[None, :], ok[:, None] & (byte < BYTES)[None, :]


@triton.jit
def store_packed(pointer, value, pixel, ok, K: tl.constexpr, M: tl.constexpr, BK: tl.constexpr,
                 EACH: tl.constexpr):  # fmt: skip
    """value int32 [M, BK] of 8 / EACH bits, packed."""
    place = tl.arange(0, EACH)[None, None, :] * (8 // EACH)
    byte = tl.sum(tl.reshape(value, [M, BK // EACH, EACH]) << place, axis=2)
    at, exists = packed_elements(pixel, ok, K, BK, EACH)
    tl.store(pointer + at, byte.to(tl.uint8), mask=exists)


@triton.jit
def load_packed(pointer, pixel, ok, K: tl.constexpr, M: tl.constexpr, BK: tl.constexpr, EACH: tl.constexpr):
    """int32 [M, BK], the transpose of store_packed."""
    at, exists = packed_elements(pixel, ok, K, BK, EACH)
    byte = tl.load(pointer + at, mask=exists, other=0).to(tl.int32)
    place = tl.arange(0, EACH)[None, None, :] * (8 // EACH)
    value = (byte[:, :, None] >> place) & ((1 << (8 // EACH)) - 1)
    return tl.reshape(value, [M, BK])


@triton.jit
def larger(a, a_code, b, b_code):
    """The first of equals; a NaN wins, the last of several."""
    second = (b > a) | (b != b)
    return tl.where(second, b, a), tl.where(second, b_code, a_code)


@triton.jit
def finish(
    v,  # fp32 [M, BK]: a convolution's products
    bias,  # fp32 [K], or None
    before,  # [n, h, w, K] before the ReLU, or None
    y,  # T [n, h, w, K] after it, or None
    mask,  # uint8 [n, h, w, K / 8] of the ReLU, or None
    pooled,  # T [n, h / 2, w / 2, K], or None
    code,  # uint8 [n, h / 2, w / 2, K / 4] of the pool, or None
    height, width,
    K: tl.constexpr, RELU: tl.constexpr, T: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    k = channels(BK)
    image, row, column, ok = tile_at(height, width, TH, TW)
    pixel = pixels(image, row, column, height, width)
    at, exists = elements(pixel, ok, k, K, BK)
    if bias is not None:
        v += tl.load(bias + k, mask=k < K, other=0.0)[None, :]
    if before is not None:
        tl.store(before + at, v, mask=exists)
    v = v.to(T).to(tl.float32)
    if RELU:
        v = tl.where(v < 0, 0.0, v)
    if y is not None:
        tl.store(y + at, v, mask=exists)
    if mask is not None:
        store_packed(mask, ((v > 0) | (v != v)).to(tl.int32), pixel, ok, K, TH * TW, BK, 8)
    if pooled is not None:
        window = tl.permute(tl.reshape(v, [TH * TW // 4, 2, 2, BK]), [0, 3, 1, 2])
        left, right = tl.split(window)
        top_left, bottom_left = tl.split(left)
        top_right, bottom_right = tl.split(right)
        zero = tl.zeros([TH * TW // 4, BK], tl.int32)
        most, which = larger(top_left, zero, top_right, zero + 1)
        most, which = larger(most, which, bottom_left, zero + 2)
        most, which = larger(most, which, bottom_right, zero + 3)
        image, row, column, ok = windows_at(height, width, TH, TW)
        pixel = pixels(image, row, column, height // 2, width // 2)
        at, exists = elements(pixel, ok, k, K, BK)
        tl.store(pooled + at, most, mask=exists)
        if code is not None:
            store_packed(code, which, pixel, ok, K, TH * TW // 4, BK, 4)


@triton.jit
def restrain(
    v,  # fp32 [M, BK]: the gradient of a layer's output
    after,  # T [n, h, w, K]: that of the tap there, or None
    mask,  # uint8 [n, h, w, K / 8] of the ReLU, or None
    before,  # T [n, h, w, K]: the gradient of the tap before the ReLU, or None
    out,  # T [n, h, w, K]: the gradient before the ReLU
    height, width,
    K: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    image, row, column, ok = tile_at(height, width, TH, TW)
    pixel = pixels(image, row, column, height, width)
    at, exists = elements(pixel, ok, channels(BK), K, BK)
    if after is not None:
        v += tl.load(after + at, mask=exists, other=0.0).to(tl.float32)
    if mask is not None:  # selects: a tap's gradient may be NaN
        v = tl.where(load_packed(mask, pixel, ok, K, TH * TW, BK, 8) != 0, v, 0.0)
    if before is not None:
        v += tl.load(before + at, mask=exists, other=0.0).to(tl.float32)
    tl.store(out + at, v, mask=exists)
