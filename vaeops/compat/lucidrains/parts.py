"""One codebook's rows, quantized: fused where the nearest code is wanted, composed for anything else."""

from typing import NamedTuple

import torch
from torch import Tensor

from ...ops.vq import vector_quantize, vq_assign, vq_lookup, vq_topk
from ...ops.vq.residual import with_gradient
from . import search
from .losses import directional, masked_mean


class How(NamedTuple):
    """How the rows of a call are quantized."""

    cosine: bool
    topk: int | None
    draw: float | None  # temperature of random codes
    soft: float | None  # temperature of the Gumbel-softmax's gradient
    routed: bool  # the output's gradient goes to the rows
    rotation: bool  # by rotation
    directional: float | None  # along x to the code, with noise of this variance
    learned: bool  # the codebook takes the gradient of the commitment loss
    sync_update_v: float

    @property
    def metric(self) -> str:
        return "cosine" if self.cosine else "l2"

    @property
    def estimator(self) -> str:
        if not self.routed or self.directional is not None:
            return "none"
        return "rotation" if self.rotation else "ste"


class Part(NamedTuple):
    """What one codebook makes of its rows [*R, D]."""

    quantized: Tensor  # [*R, D], or [*R, k, D] with topk
    indices: Tensor  # [*R], or [*R, k]
    commit: Tensor  # [], or [*R, k]
    found: tuple[Tensor, Tensor] | None  # (counts, sums), where they are known


def quantize_part(x: Tensor, codes: Tensor, mask: Tensor | None, how: How, stats: bool) -> Part:
    """Rows x [*R, D]; codes [K, D], or of each row [*R, K, D]."""
    if how.topk is None and codes.dim() == 2 and how.draw is None and how.soft is None:
        out = vector_quantize(x, codes if how.learned else codes.detach(), mask=mask, stats=stats,
                              metric=how.metric, estimator=how.estimator)  # fmt: skip
        quantized, indices, commit = out.quantized, out.indices, out.commit_loss
        found = (out.counts, out.sums) if out.counts is not None and out.sums is not None else None
        if how.learned:  # one loss, which both sides minimise
            commit = commit + (out.codebook_loss - out.codebook_loss.detach())
        chosen = quantized
        if how.estimator == "none" and (codes.requires_grad or how.routed):
            chosen = vq_lookup(indices, codes)
    else:
        found = None
        indices = _choose(x, codes, mask, how)
        chosen = pick(codes, indices)
        if how.soft is not None:
            blend = search.soft(x, codes, how.cosine, how.soft)
            blend = blend if how.topk is None else blend.unsqueeze(-2)
            chosen = chosen + (blend - blend.detach())
        if how.topk is not None:
            x = x.unsqueeze(-2).expand(*indices.shape, x.shape[-1])
            mask = mask if mask is None else mask.unsqueeze(-1).expand(indices.shape)
        error = ((chosen if how.learned else chosen.detach()) - x).square().mean(-1)
        commit = masked_mean(error, mask)
        if how.topk is not None:
            commit = error if mask is None else error.masked_fill(~mask, 0)
        quantized = with_gradient(chosen.detach(), x, how.estimator, mask)
    if how.routed and how.directional is not None:
        quantized = directional(x, chosen, how.directional)
    elif not how.routed and chosen.requires_grad:
        quantized = chosen.to(x.dtype)
    if how.sync_update_v > 0:
        quantized = quantized + how.sync_update_v * (quantized - quantized.detach())
    return Part(quantized, indices, commit, found)


@torch.no_grad()
def _choose(x: Tensor, codes: Tensor, mask: Tensor | None, how: How) -> Tensor:
    """Indices [*R] or [*R, k]; -1 where masked."""
    k = how.topk
    if how.draw is not None:
        indices = search.draw(x, codes, how.cosine, how.draw, k)
    elif codes.dim() > 2:
        l = search.logits(x, codes, how.cosine)  # noqa: E741
        indices = l.argmax(-1) if k is None else l.topk(k, -1).indices
    elif k is not None:
        return vq_topk(x, codes, k, metric=how.metric, mask=mask)[1]
    else:
        return vq_assign(x, codes, metric=how.metric, mask=mask)
    if mask is None:
        return indices
    return indices.masked_fill(~mask if k is None else ~mask.unsqueeze(-1), -1)


def pick(codes: Tensor, indices: Tensor) -> Tensor:
    """Codes [K, D] at indices [...]; or each row's [*R, K, D] at [*R] or [*R, k]. 0 at -1."""
    if codes.dim() == 2:
        return vq_lookup(indices, codes)
    one = indices.dim() == codes.dim() - 2
    at = (indices.unsqueeze(-1) if one else indices).unsqueeze(-1)
    picked = codes.gather(-2, at.clamp(min=0).expand(*at.shape[:-1], codes.shape[-1])).masked_fill(at < 0, 0)
    return picked.squeeze(-2) if one else picked
