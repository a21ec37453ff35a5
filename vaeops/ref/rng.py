"""The noise stream in plain PyTorch: the specification every kernel must match bit for bit.

Philox4x32-10 (Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3") makes 32-bit words; a
portable Box-Muller turns them into normals with fp32 add, multiply, fma and square root alone. Those four are
exactly rounded on every machine, so the bits are the same on a CPU, under Triton and in CUDA; a libm
logarithm or cosine would differ.

Words are held in int64 tensors, because PyTorch has no uint32 arithmetic. The one operation that PyTorch
lacks, an fp32 fma that rounds once, is made here from fp64: slow, and right.
"""

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
# Top bit of the fourth counter word. The noise stream leaves it 0, so derived seeds never meet drawn noise.
_FOLD_TAG = 1 << 31


def philox(
    key: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words per counter (Philox4x32-10). `key` holds 64 bits; words are int64 below 2^32."""
    c0, c1, c2, c3 = counter
    k0, k1 = key & _LOW, (key >> 32) & _LOW
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wraps modulo 2^64: the bits of the unsigned product
        c0, c1, c2, c3 = ((p1 >> 32) & _LOW) ^ c1 ^ k0, p1 & _LOW, ((p0 >> 32) & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3


def fold_in(seed: Tensor, index: Tensor) -> Tensor:
    """One child seed per (seed, index): the Philox block of counter (offset, index) under the seed's key.

    seed [..., 2] int64 and index [...] int64 >= 0 broadcast together; returns [..., 2] int64.
    """
    key, offset, index = torch.broadcast_tensors(seed[..., 0], seed[..., 1], index)
    words = (offset & _LOW, (offset >> 32) & _LOW, index & _LOW, ((index >> 32) & _LOW) | _FOLD_TAG)
    a, b, c, d = philox(key, words)
    return torch.stack((a | (b << 32), c | (d << 32)), dim=-1)


def _fma(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    """a * b + c rounded once to fp32. fp64 holds the product; the sum rounded to odd is safe to cast."""
    product = a.double() * (b.double() if isinstance(b, Tensor) else _f32(b))
    addend = (
        c.double() if isinstance(c, Tensor) else torch.tensor(_f32(c), dtype=torch.float64, device=a.device)
    )
    total = product + addend
    tail = total - product
    error = (product - (total - tail)) + (addend - tail)  # TwoSum: total + error is the exact sum
    bits = total.contiguous().view(torch.int64)
    inexact_and_even = (error != 0) & (bits & 1 == 0)
    towards = torch.where((error > 0) == (total > 0), 1, -1)
    return torch.where(inexact_and_even, bits + towards, bits).view(torch.float64).float()


def _f32(x: float) -> float:
    """The fp64 value of x rounded to fp32: constants below are written in decimal."""
    return torch.tensor(x, dtype=torch.float32).item()


def _poly(x: Tensor, *coefficients: float) -> Tensor:
    acc: Tensor | float = coefficients[0]
    for c in coefficients[1:]:
        acc = _fma(x, acc, c)
    assert isinstance(acc, Tensor)
    return acc


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32).long() & _LOW


def _from_bits(x: Tensor) -> Tensor:
    return torch.where(x >= 1 << 31, x - (1 << 32), x).int().view(torch.float32)


def _log(u: Tensor) -> Tensor:
    """Natural logarithm for u in [2^-33, 1], 0.94 ulp: u = 2^k m, m in [2/3, 4/3), a polynomial in m - 1."""
    bits = _bits(u)
    exponent = (bits - 0x3F2AAAAB) & 0xFF800000
    f = _from_bits((bits - exponent) & _LOW) - 1.0
    k = torch.where(exponent >= 1 << 31, exponent - (1 << 32), exponent).float() * 2.0**-23
    p = _poly(
        f,
        -0.13191646,
        0.1396245,
        -0.12115126,
        0.1401092,
        -0.16685466,
        0.20010044,
        -0.24999689,
        0.33333224,
        -0.5,
    )
    return _fma(k, 0.693147182, _fma(f * f, p, f))


def _sincos(word: Tensor) -> tuple[Tensor, Tensor]:
    """Sine and cosine of 2 pi word / 2^32. The angle is cut to 1/8 of a turn in integers, without loss."""
    folded = (word << 2) & _LOW
    # Quarter turns in [-1/2, 1/2).
    r = torch.where(folded >= 1 << 31, folded - (1 << 32), folded).float() * 2.0**-32
    quadrant = ((word + 0x20000000) & _LOW) >> 30
    t = r * r
    s = _fma(r * t, _poly(t, 0.00015820675, -0.0046812664, 0.07969258, -0.6459641), r * _f32(1.5707964))
    c = _poly(t, 0.0009040216, -0.020860288, 0.25366923, -1.2337005, 1.0)
    swap = quadrant & 1 == 1
    s, c = torch.where(swap, c, s), torch.where(swap, s, c)
    return torch.where(quadrant & 2 == 2, -s, s), torch.where((quadrant + 1) & 2 == 2, -c, c)


def _box_muller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    u = _fma(a.float(), 2.0**-32, 2.0**-33)  # in (0, 1]: |normal| <= 6.76
    # Rounded once; torch's fp32 sqrt may call a library that is not.
    radius = (-2.0 * _log(u)).double().sqrt().float()
    s, c = _sincos(b)
    return radius * c, radius * s


def normal(size: list[int] | torch.Size, seed: Tensor) -> Tensor:
    """fp32 standard normals: element i is lane i % 4 of Philox block (seed[1] + i // 4) under key seed[0].

    seed [2] is one stream over the row-major order of `size`; seed [*S, 2], S a prefix of `size`, is one
    stream per entry, each counted from its own first element.
    """
    size = torch.Size(size)
    if seed.device.type == "mps":  # has no fp64, which the exact fma needs
        return normal(size, seed.cpu()).to(seed.device)
    streams = seed.shape[:-1].numel()
    length = size[seed.dim() - 1 :].numel()
    quads = torch.arange((length + 3) // 4, device=seed.device)
    flat = seed.reshape(streams, 2)
    counter = flat[:, 1:] + quads  # wraps modulo 2^64
    zero = torch.zeros_like(counter)
    a, b, c, d = philox(flat[:, :1], (counter & _LOW, (counter >> 32) & _LOW, zero, zero))
    lanes = torch.stack((*_box_muller(a, b), *_box_muller(c, d)), dim=-1)
    return lanes.reshape(streams, -1)[:, :length].reshape(size)
