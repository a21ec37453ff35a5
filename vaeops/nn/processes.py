"""What data-parallel processes tell each other to keep their codebooks equal. One alone asks nobody."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .. import rng
from ..ops.vq.quantize import finite_rows


def world(sync: bool) -> tuple[int, int]:
    """(number of processes, which of them this is)"""
    if sync and dist.is_available() and dist.is_initialized():
        return dist.get_world_size(), dist.get_rank()
    return 1, 0


def all_reduce(tensors: Sequence[Tensor], processes: int, largest: bool = False) -> list[Tensor]:
    """Sums over the processes, or maxima: one flat buffer for each dtype."""
    result = list(tensors)
    if processes == 1:
        return result
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        which = [i for i, t in enumerate(tensors) if t.dtype is dtype]
        flat = torch.cat([tensors[i].flatten() for i in which])
        dist.all_reduce(flat, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
        for i, part in zip(which, flat.split([tensors[i].numel() for i in which])):
            result[i] = part.view_as(tensors[i])
    return result


def spread(xs: Sequence[Tensor], indices: Sequence[Tensor], seeds: Sequence[Tensor], slots: int,
           processes: int, rank: int) -> list[tuple[Tensor, Tensor]]:  # fmt: skip
    """Rows from all over the joined batch: for each x [*R, D], `slots` random rows, all different.

    The used rows (index >= 0, finite) of all processes, in order of rank, are cut in `slots` equal parts, and
    one row is drawn from each: the choice depends on the joined batch and the seed, not on how it is split.

    Returns:
        For each x (rows [slots, D], usable [slots]): this process's rows, zeros where another one has the
        row, so that the sum over the processes has them all; usable is False where there are too few rows.
    """
    used = [((i >= 0) & finite_rows(x)).flatten() for x, i in zip(xs, indices)]
    here = torch.stack([u.sum() for u in used])
    counts = here.unsqueeze(0)
    if processes > 1:
        counts = here.new_zeros(processes, len(xs))
        counts[rank] = here
        dist.all_reduce(counts)
    total, first = counts.sum(0), counts[:rank].sum(0)

    slot = torch.arange(slots, device=here.device)
    result = []
    for x, u, seed, n, before, own in zip(xs, used, seeds, total, first, here):
        noise = torch.special.ndtr(rng.normal((slots,), seed).double())
        drawn = ((slot + torch.where(n > slots, noise, 0)) * (n / slots)).long().clamp(max=n - 1)
        usable = (drawn != drawn.roll(1)) | (slot == 0)
        local = drawn - before
        mine = usable & (local >= 0) & (local < own)
        rows = x.new_zeros(slots, x.shape[-1])
        if u.shape[0]:
            at = torch.searchsorted(u.cumsum(0), local + 1).clamp(max=u.shape[0] - 1)
            rows = x[_unravel(at, x.shape[:-1])].masked_fill(~mine.unsqueeze(-1), 0)
        result.append((rows, usable & (n > 0)))
    return result


def _unravel(at: Tensor, shape: torch.Size) -> tuple[Tensor, ...]:
    """Row numbers as indices into dims of any strides: flattening those would copy the rows."""
    where: list[Tensor] = []
    for size in reversed(shape):
        where.insert(0, at % size)
        at = at // size
    return tuple(where)
