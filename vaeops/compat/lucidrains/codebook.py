"""The peer's codebook: vaeops', with the ways to update it that the peer offers beyond."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...nn import codebook as base
from ...nn.processes import all_reduce, spread, world


class Codebook(base.Codebook):
    """The codebook of a `VectorQuantize`, with the updates that the peer offers beyond vaeops'."""

    def __init__(
        self,
        *args: Any,
        learnable: bool,
        manual: bool,
        bridge: nn.Module | None,
        sync_kmeans: bool,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self.sync_kmeans = sync_kmeans
        if learnable and self.ema:  # a regularized codebook: averages move it, and its loss has a gradient
            embed = self.embed.detach()
            del self.embed
            self.embed = nn.Parameter(embed)
        self.manual = manual
        self.vq_bridge = bridge
        # How the coming update is made; the caller sets them.
        self.moves = self.ema
        self.weight: Tensor | Callable[[Tensor, Tensor], Tensor] | None = None

    @property
    def ema_update(self) -> bool:
        return self.ema

    def tables(self, updates: bool) -> tuple[Tensor, ...]:
        tables = super().tables(updates)
        return tables if self.vq_bridge is None else self.vq_bridge(torch.stack(tables)).unbind(0)

    def start(self, xs: Sequence[Tensor], masks: Sequence[Tensor | None]) -> None:
        """With sync_kmeans=False from the rows of the first process alone, whose codes all take."""
        processes, _ = world(self.sync)
        if self.sync_kmeans or processes == 1:
            return super().start(xs, masks)
        self.sync = False
        super().start(xs, masks)
        self.sync = True
        for state in (self.embed.data, self.cluster_size, self.embed_avg):
            dist.broadcast(state, 0)

    def see(self, xs: tuple[Tensor, ...], masks: tuple[Tensor | None, ...]) -> None:
        """Rows in training, before they are looked up."""

    def own_rows(self, xs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Rows where the codes are, if those are looked up elsewhere."""
        return xs

    @torch.no_grad()
    def observe(self, xs: Sequence[Tensor], indices: Sequence[Tensor],
                found: Sequence[tuple[Tensor, Tensor]] | None = None) -> None:  # fmt: skip
        own = self.own_rows(tuple(xs))
        super().observe(own, indices, found if own[0] is xs[0] else None)

    def apply_statistics(self, counts: Tensor, sums: Tensor) -> None:
        weight = self.weight(sums, counts) if callable(self.weight) else self.weight
        if weight is None and self.moves == self.ema:
            return super().apply_statistics(counts, sums)
        rate = torch.ones_like(counts) if weight is None else weight.to(counts).expand_as(counts)
        rate = (1 - self.decay) * rate * (counts.sum(1, keepdim=True) > 0)
        self.cluster_size.lerp_(counts, rate)
        self.embed_avg.lerp_(sums, rate.unsqueeze(-1))
        if self.moves:
            self.update_ema()

    @torch.no_grad()
    def update_ema(self) -> None:
        """The codes from the averages as they stand: after steps with manual_ema_update."""
        total = self.cluster_size.sum(1, keepdim=True)
        smoothed = (self.cluster_size + self.eps) / (total + self.cluster_size.shape[1] * self.eps) * total
        self.embed.copy_(self.normalized(self.embed_avg / smoothed.unsqueeze(-1)))

    @torch.no_grad()
    def expire_codes_(self, xs: tuple[Tensor, ...]) -> None:
        """Dead codes become rows of xs, H tensors [*R, D]."""
        if not (self.training and self.revive_below > 0):
            return
        xs = self.own_rows(xs)
        processes, rank = world(self.sync)
        everywhere = [torch.zeros(x.shape[:-1], dtype=torch.int64, device=x.device) for x in xs]
        samples = spread(xs, everywhere, self.seeds().unbind(0), base.CANDIDATES, processes, rank)
        rows = all_reduce([r for r, _ in samples], processes)
        self.revive([(r, usable) for r, (_, usable) in zip(rows, samples)])
