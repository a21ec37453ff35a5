"""What needs the logits of all codes: random codes, soft codes, and losses over them.

    l_nk = -|x_n - e_k|, or with use_cosine_sim x_n.e_k, both of norm 1
Rows are taken in chunks, and again in backward, so no rows x codes array exists as a whole.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_CHUNK = 1 << 22  # logits held at once


def logits(x: Tensor, codes: Tensor, cosine: bool) -> Tensor:
    """[*R, K] of rows [*R, D] and codes [K, D], or of codes for each row [*R, K, D]."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, codes.dtype), torch.float32)
    x, codes = x.to(dtype), codes.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        if cosine:
            return x @ codes.mT if codes.dim() == 2 else (codes @ x.unsqueeze(-1)).squeeze(-1)
        if codes.dim() > 2:
            return -F.pairwise_distance(x.unsqueeze(-2), codes)
        mean = codes.detach().mean(0)  # distances do not depend on it, their digits do
        x, codes = x - mean, codes - mean
        squares = x.square().sum(-1, keepdim=True) + codes.square().sum(-1) - 2 * (x @ codes.mT)
        return -squares.clamp(min=1e-8).sqrt()


def in_chunks(part: Callable[..., Tensor], x: Tensor, codes: Tensor, *others: Tensor) -> list[Tensor]:
    """part(x, codes, *others) for chunks of the first dimension; codes [K, D] go whole to each."""
    per_row = x.shape[1:-1].numel() * codes.shape[-2]
    size = max(1, _CHUNK // max(1, per_row))
    if len(x) <= size:
        return [part(x, codes, *others)]
    cut = [t.split(size) for t in (x, *others)]
    codes_of = codes.split(size) if codes.dim() > 2 else [codes] * len(cut[0])
    return [
        checkpoint(part, rows, c, *rest, use_reentrant=False) for c, (rows, *rest) in zip(codes_of, zip(*cut))
    ]


@torch.no_grad()
def draw(x: Tensor, codes: Tensor, cosine: bool, temperature: float, k: int | None) -> Tensor:
    """A random code of each row [*R] by softmax(l / temperature), or k different ones [*R, k].

    The largest l / temperature + Gumbel noise: from torch's generator, in order of the rows.
    """

    def part(x: Tensor, codes: Tensor) -> Tensor:
        l = logits(x, codes, cosine) / temperature  # noqa: E741
        l = l - (-torch.rand_like(l).clamp(min=1e-20).log()).log()  # noqa: E741
        return l.argmax(-1) if k is None else l.topk(k, -1).indices

    each = codes if codes.dim() == 2 else codes.flatten(0, -3)
    chosen = torch.cat(in_chunks(part, x.flatten(0, -2), each))
    return chosen.view(*x.shape[:-1], *chosen.shape[1:])


def soft(x: Tensor, codes: Tensor, cosine: bool, temperature: float) -> Tensor:
    """sum_k softmax(l / temperature)_k e_k: [*R, D], with gradient by the softmax alone."""

    def part(x: Tensor, codes: Tensor) -> Tensor:
        weight = (logits(x, codes, cosine) / temperature).softmax(-1)
        fixed = codes.detach().to(weight.dtype)
        return weight @ fixed if codes.dim() == 2 else (weight.unsqueeze(-2) @ fixed).squeeze(-2)

    each = codes if codes.dim() == 2 else codes.flatten(0, -3)
    return torch.cat(in_chunks(part, x.flatten(0, -2), each)).view(x.shape)


def cross_entropy(x: Tensor, codes: Tensor, cosine: bool, targets: Tensor) -> Tensor:
    """The sum over rows of -log softmax(l)_target; -1 counts nothing."""

    def part(x: Tensor, codes: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits(x, codes, cosine), targets, ignore_index=-1, reduction="sum")

    each = codes if codes.dim() == 2 else codes.flatten(0, -3)
    return torch.stack(in_chunks(part, x.flatten(0, -2), each, targets.flatten())).sum()


def diversity(x: Tensor, codes: Tensor, cosine: bool, temperature: float, used: Tensor) -> Tensor:
    """-mean over positions of the entropy of P, with P the mean over the batch of softmax(l * temperature).

    x [B, P, D], codes [K, D] or [B, P, K, D], used bool [B, P]; a position without a used row is left out.
    """

    def part(x: Tensor, codes: Tensor, used: Tensor) -> Tensor:
        share = (logits(x, codes, cosine) * temperature).softmax(-1)
        n = used.sum(1, keepdim=True)
        share = torch.where(used.unsqueeze(-1), share, 0).sum(1) / n.clamp(min=1)
        return (share * share.clamp(min=1e-5).log()).sum()

    each = codes if codes.dim() == 2 else codes.transpose(0, 1)
    total = torch.stack(in_chunks(part, x.transpose(0, 1), each, used.t())).sum()
    return total / used.any(0).sum().clamp(min=1)
