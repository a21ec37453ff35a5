"""The losses that the peer offers beside the commitment to the nearest code."""

from collections.abc import Sequence
from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from . import search


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Over the rows [*R] with mask True; 0 where there is none."""
    if mask is None:
        return values.mean() if values.numel() else values.sum()
    return torch.where(mask, values, 0).sum() / mask.sum().clamp(min=1)


def cross_entropy(xs: Sequence[Tensor], codes: Sequence[Tensor], targets: Sequence[Tensor],
                  masks: Sequence[Tensor | None], cosine: bool) -> Tensor:  # fmt: skip
    """The mean over rows of -log softmax(l)_target; rows that are masked, or have target -1, do not count."""
    fixed = [t if m is None else t.masked_fill(~m, -1) for t, m in zip(targets, masks)]
    each = zip(xs, codes, fixed)
    total = torch.stack([search.cross_entropy(x, c, cosine, t) for x, c, t in each]).sum()
    return total / torch.stack([(t >= 0).sum() for t in fixed]).sum().clamp(min=1)


def diversity(xs: Sequence[Tensor], codes: Sequence[Tensor], masks: Sequence[Tensor | None], cosine: bool,
              temperature: float, shared_heads: bool) -> Tensor:  # fmt: skip
    """-entropy of the mean choice over the batch, and over heads that share a codebook, at each position."""
    values = []
    for x, c, mask in zip(xs, codes, masks):
        used = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device) if mask is None else mask
        per_row = c.dim() > 2
        if shared_heads:
            x, used = x.movedim(-2, 0).flatten(0, 1), used.movedim(-1, 0).flatten(0, 1)
            c = c.movedim(-3, 0).flatten(0, 1) if per_row else c
        batch, positions = x.shape[0], x.shape[1:-1].numel()
        c = c.reshape(batch, positions, *c.shape[-2:]) if per_row else c
        x, used = x.reshape(batch, positions, x.shape[-1]), used.reshape(batch, positions)
        values.append(search.diversity(x, c, cosine, temperature, used))
    return torch.stack(values).mean()


def orthogonal(embed: Tensor, used: Tensor | None, most: int | None) -> Tensor:
    """sum of squared cosines of all pairs of codes / K^2 - 1 / K, from a D x D matrix; embed [H, K, D].

    used: indices of the codes that count, None for all; most: so many of them, drawn at random.

    Source: Shin et al., "Translation-equivariant Image Quantizer", 2021, eq. 2.
    """
    codes = F.normalize(embed, dim=-1, eps=1e-6)
    heads, size, _ = codes.shape
    kept = torch.ones(size, dtype=torch.bool, device=codes.device)
    if used is not None:
        kept = torch.zeros(size + 1, dtype=torch.bool, device=codes.device)
        kept = kept.index_fill(0, used.flatten() % (size + 1), True)[:size]  # -1 is the code more
    if most is not None and size > most:
        drawn = (torch.rand(size, device=codes.device) + kept).topk(most).indices
        codes, kept = codes[:, drawn], kept[drawn]
    codes = codes * kept.unsqueeze(-1)
    gram = codes.mT @ codes
    n = kept.sum().to(codes.dtype)
    return gram.square().sum() / (heads * n**2) - 1 / n


def directional(x: Tensor, e: Tensor, variance: float) -> Tensor:
    """x moved by |e - x| in the direction of e - x plus noise.

    Source: Vali et al., "DiVeQ: Differentiable Vector Quantization Using the Reparameterization Trick", 2025.
    """
    error = e.to(x.dtype) - x
    towards = F.normalize(error + sqrt(variance) * torch.randn_like(error), dim=-1, eps=1e-6)
    return x + towards.detach() * error.norm(dim=-1, keepdim=True)
