"""Quantizers without a codebook: each channel is rounded on its own.

fp32 inside (fp64 for fp64): in bf16, levels and indices collapse. Straight-through gradients, by composition,
so they are differentiable any number of times.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...ref import vq as ref
from . import check

_MARGIN = 1e-3  # of the outermost levels: tanh never reaches 1


def _rows(op: str, x: Tensor, channel_dim: int) -> Tensor:
    check.floating(op, "x", x)
    if x.dim() < 1:
        raise ValueError(f"{op}: x must have at least one dim, got shape []")
    return x.movedim(check.channel_dim(op, channel_dim, x.dim()), -1)


def _check_levels(op: str, levels: Sequence[int]) -> list[int]:
    is_list = isinstance(levels, (tuple, list)) and len(levels) > 0
    if not is_list or any(not isinstance(n, int) or isinstance(n, bool) for n in levels):
        raise TypeError(f"{op}: levels must be a list of ints, got {levels!r}")
    if any(n < 2 for n in levels):
        raise ValueError(f"{op}: levels must each be at least 2, got {levels!r}")
    if math.prod(levels) > 2**63:
        raise ValueError(f"{op}: levels must have a product of at most 2^63, got {math.prod(levels)}")
    return list(levels)


def _vector(values: Sequence[float], like: Tensor) -> Tensor:
    """[D] from Python numbers without a copy from the host, which a CUDA graph could not hold."""
    return torch.cat([like.new_full((1,), v) for v in values])


def _strides(levels: Sequence[int]) -> list[int]:
    return [math.prod(levels[:d]) for d in range(len(levels))]


def fsq(x: Tensor, levels: Sequence[int], *, channel_dim: int = -1) -> tuple[Tensor, Tensor]:
    """Finite scalar quantization: channel d is squashed and rounded to one of levels[d] values.

        b = tanh(x + s) h - o,   h = (L - 1)(1 + 1e-3) / 2,   o = 1/2 for even L, else 0,   s = atanh(o / h)
        quantized = round(b) / floor(L / 2),    d quantized / d x = d b / d x / floor(L / 2)
        index = sum_d (round(b_d) + floor(L_d / 2)) prod_{j<d} L_j

    Args:
        x: [*R, D], or with the D channels at `channel_dim`; any floating dtype.
        levels: D ints >= 2; their product, the number of codes, at most 2^63.

    Returns:
        (quantized of x's shape and dtype, in [-1, 1]; indices int64 [*R]). A row with NaN has index 0; its
        other elements are quantized all the same.

    Source: Mentzer et al., "Finite Scalar Quantization: VQ-VAE Made Simple", 2023.
    """
    op = "fsq"
    rows, levels = _rows(op, x, channel_dim), _check_levels(op, levels)
    if rows.shape[-1] != len(levels):
        raise ValueError(
            f"{op}: x {list(x.shape)} must have {len(levels)} channels, one for each of levels, "
            f"got {rows.shape[-1]}"
        )
    v = rows.to(ref.compute_dtype(x))
    halves = [(n - 1) * (1 + _MARGIN) / 2 for n in levels]
    offsets = [0.5 if n % 2 == 0 else 0.0 for n in levels]
    shifts = [math.atanh(o / h) for o, h in zip(offsets, halves)]
    width = _vector([n // 2 for n in levels], v)
    bounded = torch.tanh(v + _vector(shifts, v)) * _vector(halves, v) - _vector(offsets, v)
    # Clamped: beyond 1001 levels h's margin reaches the next one.
    code = bounded.detach().round().clamp(-width, _vector([(n - 1) // 2 for n in levels], v))
    smooth = bounded / width
    quantized = code / width + (smooth - smooth.detach())  # adds exactly 0
    digits = (code + width).nan_to_num(nan=0.0).long()
    index = (digits * _vector(_strides(levels), digits)).sum(-1).masked_fill(code.isnan().any(-1), 0)
    return quantized.to(x.dtype).movedim(-1, channel_dim), index


def fsq_decode(indices: Tensor, levels: Sequence[int], *, channel_dim: int = -1,
               dtype: torch.dtype = torch.float32) -> Tensor:  # fmt: skip
    """The quantized values of `fsq`'s indices.

    Args:
        indices: [*R], int64 or int32, in [0, product of levels).
        levels: as given to `fsq`.

    Returns:
        [*R, D] in `dtype`, the channels at `channel_dim`.
    """
    op = "fsq_decode"
    levels = _check_levels(op, levels)
    check.indices(op, indices, indices.device if isinstance(indices, Tensor) else torch.device("cpu"))
    dim = check.channel_dim(op, channel_dim, indices.dim() + 1)
    wide = indices.long().unsqueeze(-1)
    digits = wide // _vector(_strides(levels), wide) % _vector(levels, wide)
    width = _vector([n // 2 for n in levels], wide)
    exact = torch.float64 if dtype is torch.float64 else torch.float32
    return ((digits - width).to(exact) / width.to(exact)).to(dtype).movedim(-1, dim)


def lfq(x: Tensor, *, channel_dim: int = -1) -> tuple[Tensor, Tensor]:
    """Lookup-free quantization: each channel becomes its sign, and the signs are the index's binary digits.

        quantized = 1 where x > 0, else -1,    d quantized / d x = 1
        index = sum_d [x_d > 0] 2^(D - 1 - d)
    The entropies of its implicit codebook are `vq_entropy`'s with all 2^D sign vectors.

    Args:
        x: [*R, D], D <= 63, or with the D channels at `channel_dim`; any floating dtype.

    Returns:
        (quantized of x's shape and dtype; indices int64 [*R]). NaN stays NaN, and is a 0 in the index.

    Source: Yu et al., "Language Model Beats Diffusion: Tokenizer is Key to Visual Generation", 2023.
    """
    rows = _rows("lfq", x, channel_dim)
    if rows.shape[-1] > 63:
        raise ValueError(f"lfq: x must have at most 63 channels, got {rows.shape[-1]}")
    fixed = rows.detach()
    positive = fixed > 0
    sign = torch.where(positive, 1.0, -1.0).to(x.dtype).masked_fill(fixed.isnan(), math.nan)
    quantized = sign + (rows - fixed).nan_to_num(nan=0.0)  # adds exactly 0, for Inf too
    place = torch.arange(rows.shape[-1] - 1, -1, -1, device=x.device)
    return quantized.movedim(-1, channel_dim), (positive.long() << place).sum(-1)


def lfq_decode(indices: Tensor, dims: int, *, channel_dim: int = -1,
               dtype: torch.dtype = torch.float32) -> Tensor:  # fmt: skip
    """The signs of `lfq`'s indices.

    Args:
        indices: [*R], int64 or int32, in [0, 2^D).
        dims: D, in [1, 63].

    Returns:
        [*R, D] of -1 and 1 in `dtype`, the channels at `channel_dim`.
    """
    op = "lfq_decode"
    check.count(op, "dims", dims, 63)
    check.indices(op, indices, indices.device if isinstance(indices, Tensor) else torch.device("cpu"))
    dim = check.channel_dim(op, channel_dim, indices.dim() + 1)
    place = torch.arange(dims - 1, -1, -1, device=indices.device)
    bits = (indices.long().unsqueeze(-1) >> place) & 1
    return (2 * bits - 1).to(dtype).movedim(-1, dim)
