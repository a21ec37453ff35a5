"""A codebook and how it learns: statistics joined over processes, moving averages, k-means start, revival.

Every process holds the same codebook. What it learns from are sums over rows, so the processes add theirs
and apply the same update: one flat all-reduce for all codebooks of a model, whatever their number.
"""

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import vq
from ..ops.vq import check
from ..ops.vq.quantize import fixed_point_sums, from_fixed_point, row_absmax, statistics
from .processes import all_reduce, spread, world

CANDIDATES = 1024  # dead codes revived in one step, at most: bounds the rows that processes exchange


def recomputing() -> bool:
    """Whether a forward runs inside a backward pass, as activation checkpointing makes it run again.

    Eager only: a compiled function cannot ask.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class Codebook(nn.Module):
    """H codebooks [K, D] of a layer, and the moving averages that they follow.

    Its names in the state_dict are the field's: embed [H, K, D], embed_avg [H, K, D], cluster_size [H, K],
    initted bool []. Buffers are fp32 and stay so under .half() and .bfloat16(); .double() makes them fp64.

    Args:
        dim, size, heads: D, K, H.
        ema: the codebook follows averages (a buffer); False: an optimizer moves it (a Parameter).
        normalize: codes have norm 1, as the cosine metric wants them.
        sync: join the statistics of all processes.
        Others as in `VectorQuantize`.
    """

    embed: Tensor
    embed_avg: Tensor
    cluster_size: Tensor
    initted: Tensor

    def __init__(self, dim: int, size: int, *, heads: int = 1, ema: bool = True, normalize: bool = False,
                 decay: float = 0.99, eps: float = 1e-5, kmeans_init: bool = False, kmeans_iters: int = 10,
                 revive_below: float = 0.0, deterministic: str | None = None,
                 sync: bool = True) -> None:  # fmt: skip
        super().__init__()
        op = "VectorQuantize"
        check.count(op, "codebook_size", size)
        check.number(op, "decay", decay, 0, 1)
        check.number(op, "eps", eps, 0, float("inf"), "[)")
        check.number(op, "revive_below", revive_below, 0, float("inf"), "[)")
        if kmeans_init:
            check.count(op, "kmeans_iters", kmeans_iters)
        self.ema, self.normalize, self.decay, self.eps = ema, normalize, decay, eps
        self.kmeans_iters, self.revive_below = kmeans_iters, revive_below
        self.bitwise, self.sync = deterministic == "bitwise", sync
        embed = torch.empty(heads, size, dim)
        nn.init.kaiming_uniform_(embed)
        if normalize:
            embed = F.normalize(embed, dim=-1)
        if ema:
            self.register_buffer("embed", embed)
        else:
            self.embed = nn.Parameter(embed)
        self.register_buffer("embed_avg", embed.clone())
        self.register_buffer("cluster_size", torch.ones(heads, size))
        self.register_buffer("initted", torch.tensor(not kmeans_init))
        # `initted` for Python: asking the tensor would wait for the device and break a compiled graph.
        self.started = not kmeans_init
        self._looked_up: Tensor | None = None  # the codebook of the last call that updated it
        self._forget()

    def _forget(self) -> None:
        """Nothing was seen since the last update."""
        # No buffers: DistributedDataParallel would overwrite them with those of the first process.
        self._seen: list[tuple[Sequence[Tensor], Sequence[Tensor]]] = []
        self._counts: Tensor | None = None
        self._sums: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_looked_up": None}  # of use to this step's backward alone

    def _apply(self, fn, recurse=True):
        """Moves with the model; a dtype below fp32 is not taken on."""
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = getattr(self, name)
            if moved.is_floating_point() and moved.dtype.itemsize < 4:
                setattr(self, name, buffer.to(moved.device))
        return self

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self._forget()
        self._looked_up = None
        if not self.initted.is_meta:
            self.started = bool(self.initted)

    @property
    def tracks(self) -> bool:
        """Whether batches move anything here."""
        return self.ema or self.revive_below > 0

    def tables(self, updates: bool) -> tuple[Tensor, ...]:
        """H codebooks [K, D] to look rows up in. `updates`: this call will then update them.

        A checkpointed forward that runs again gets the codebook that it got the first time.
        """
        if not updates:
            return self.embed.unbind(0)
        # Backward reads the codebook that the lookup used, after the update has changed `embed`.
        table = self._looked_up if recomputing() else None
        if table is None:
            table = self.embed.detach().clone()
            if not torch.compiler.is_compiling():
                self._looked_up = table
        if self.embed.requires_grad:
            table = torch.where(self.embed == table, self.embed, table)
        return table.unbind(0)

    def _check_written(self) -> None:
        """Under `fully_shard` a forward has a copy of a parameter, and what is written into it is lost."""
        if not self.ema and getattr(self, "_is_fsdp_managed_module", False):
            raise RuntimeError(
                "VectorQuantize: with fully_shard a learned codebook can be neither started by k-means nor "
                "revived: use ema=True, or no kmeans_init and no revive_below"
            )

    @torch.no_grad()
    def start(self, xs: Sequence[Tensor], masks: Sequence[Tensor | None]) -> None:
        """k-means over the rows of all processes, xs: H tensors [*R, D]. The first batch does it.

        Lloyd's iterations from K rows spread over the batch. A code that no row is nearest to stays where it
        is; one for which there was no row, where it was initialised.
        """
        self._check_written()
        for x, e, m in zip(xs, self.embed, masks):  # as the lookup that follows would
            check.rows("vector_quantize", x, e, -1)
            check.mask("vector_quantize", m, x)
        processes, rank = world(self.sync)
        zeros = (torch.zeros(x.shape[:-1], dtype=torch.int64, device=x.device) for x in xs)
        indices = [i if m is None else i.masked_fill(~m, -1) for i, m in zip(zeros, masks)]
        samples = spread(xs, indices, self.seeds().unbind(0), self.embed.shape[1], processes, rank)
        rows = all_reduce([r.to(self.embed.dtype) for r, _ in samples], processes)
        usable = torch.stack([u for _, u in samples])
        embed = torch.where(usable.unsqueeze(-1), torch.stack(rows), self.embed)
        counts = torch.ones_like(self.cluster_size)
        metric = "cosine" if self.normalize else "l2"
        for _ in range(self.kmeans_iters):
            embed = self.normalized(embed)
            found = [vq.vq_assign(x, e, metric=metric, mask=m) for x, e, m in zip(xs, embed, masks)]
            self.observe(xs, found)
            ((counts, sums),) = joined([self], [], processes)[0]
            means = sums / counts.clamp(min=1).unsqueeze(-1)
            embed = torch.where((counts > 0).unsqueeze(-1), means, embed)
        self.embed.copy_(self.normalized(embed))
        # An empty cluster weighs as much as one row: without a weight its code would fall to the origin.
        self.cluster_size.copy_(counts.clamp(min=1))
        self.embed_avg.copy_(self.embed * self.cluster_size.unsqueeze(-1))
        self.initted.fill_(True)
        self.started = True

    @torch.no_grad()
    def observe(self, xs: Sequence[Tensor], indices: Sequence[Tensor],
                found: Sequence[tuple[Tensor, Tensor]] | None = None) -> None:  # fmt: skip
        """Keep what H lookups of rows [*R, D] say until the next update; `found`: their (counts, sums).

        With deterministic="bitwise" the rows are kept: fixed point needs the largest of them all. Revival
        keeps those of the last call.
        """
        xs = [x.detach() for x in xs]
        if self.bitwise:
            self._seen.append((xs, indices))
            return
        if found is None:
            codes, dtype = self.embed.shape[1], self.cluster_size.dtype
            found = [statistics(x, i, codes, dtype) for x, i in zip(xs, indices)]
        self._add(found)
        if self.revive_below > 0:
            self._seen = [(xs, indices)]

    def _add(self, found: Sequence[tuple[Tensor, Tensor]]) -> None:
        counts, sums = (torch.stack(parts) for parts in zip(*found))
        self._counts = counts if self._counts is None else self._counts + counts
        self._sums = sums if self._sums is None else self._sums + sums

    def absmax(self) -> Tensor | None:
        """The largest used |x| of each codebook [H], for fixed-point sums; None where they are not wanted."""
        if not self.bitwise:
            return None
        largest = torch.zeros_like(self.cluster_size[:, 0])
        for xs, indices in self._seen:
            rows = torch.stack([row_absmax(x, i) for x, i in zip(xs, indices)])
            largest = torch.maximum(largest, rows.to(largest.dtype))
        return largest

    def take(self, absmax: Tensor | None) -> tuple[Tensor, Tensor]:
        """(counts [H, K], sums [H, K, D]) since the last update, now forgotten; int64 with absmax."""
        heads, codes, dim = self.embed.shape
        if absmax is not None:
            for xs, indices in self._seen:
                found = [fixed_point_sums(x, i, a, codes) for x, i, a in zip(xs, indices, absmax)]
                self._add(found)
        dtype = self.cluster_size.dtype if absmax is None else torch.int64
        counts = self.cluster_size.new_zeros((heads, codes), dtype=dtype)
        sums = self.cluster_size.new_zeros((heads, codes, dim), dtype=dtype)
        if self._counts is not None and self._sums is not None:
            counts, sums = self._counts, self._sums
        self._forget()
        return counts, sums

    def seen(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """(xs, indices) of the last call; no rows where there was none."""
        if self._seen:
            return self._seen[-1]
        heads, _, dim = self.embed.shape
        empty = self.embed_avg.new_empty(0, dim)
        return [empty] * heads, [empty.new_empty(0, dtype=torch.int64)] * heads

    def apply_statistics(self, counts: Tensor, sums: Tensor) -> None:
        """One step of the averages, and of an averaged codebook; nothing where no row was counted."""
        embed = self.embed if self.ema else self.embed.detach().clone()
        vq.vq_ema_(self.cluster_size, self.embed_avg, embed, counts, sums, decay=self.decay, eps=self.eps)
        if self.ema and self.normalize:
            moved = (counts > 0).any(1)[:, None, None]
            self.embed.copy_(torch.where(moved, self.normalized(self.embed), self.embed))

    def revive(self, candidates: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Dead codes become rows of the batch. For each codebook: rows [R, D], which are usable [R]."""
        self._check_written()
        states = zip(self.cluster_size, self.embed_avg, self.embed, self.seeds())
        for (size, average, code, seed), (x, usable) in zip(states, candidates):
            vq.vq_expire_(size, average, code, x, mask=usable, threshold=self.revive_below, seed=seed)

    def seeds(self) -> Tensor:
        """int64 [H, 2], from the state: the same in every process and in a run that resumes."""
        bits = self.cluster_size.double().view(torch.int64)
        odd = 2 * torch.arange(bits.shape[1], device=bits.device) + 1
        key = (bits * odd).sum(1)
        return torch.stack([key, torch.zeros_like(key)], 1)

    def normalized(self, codes: Tensor) -> Tensor:
        return F.normalize(codes, dim=-1) if self.normalize else codes


def update_codebooks(model: nn.Module) -> None:
    """Move every codebook in a model by what it saw since the last update, with one flat all-reduce.

    For layers with accumulate=True, once an optimizer step. Every process must call it. In "bitwise" mode one
    small all-reduce comes before (the scales), with revival another one (how many rows each process has).
    """
    books = [m for m in model.modules() if isinstance(m, Codebook) and m.training and m.tracks]
    learn([b for b in books if b.sync])
    learn([b for b in books if not b.sync])


@torch.no_grad()
def learn(books: Sequence[Codebook]) -> None:
    """The update of codebooks that agree on `sync`."""
    if not books:
        return
    processes, rank = world(books[0].sync)
    reviving = [b for b in books if b.revive_below > 0]
    samples: list[tuple[Tensor, Tensor]] = []
    if reviving:
        xs, indices = ([t for b in reviving for t in b.seen()[i]] for i in (0, 1))
        seeds = [s for b in reviving for s in b.seeds()]
        samples = spread(xs, indices, seeds, CANDIDATES, processes, rank)
    # In one dtype everywhere: a process that saw nothing does not know that of the rows.
    found, rows = joined(books, [r.to(books[0].cluster_size.dtype) for r, _ in samples], processes)
    for book, (counts, sums) in zip(books, found):
        book.apply_statistics(counts, sums)
    candidates = iter(zip(rows, samples))
    for book in reviving:
        book.revive([(r, usable) for r, (_, usable) in islice(candidates, len(book.embed))])


def joined(books: Sequence[Codebook], rows: Sequence[Tensor],
           processes: int) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:  # fmt: skip
    """(counts [H, K], sums [H, K, D]) of each book, and the rows of `spread`, over all processes."""
    largest = [b.absmax() for b in books]
    scales = iter(all_reduce([a for a in largest if a is not None], processes, largest=True))
    scale = [next(scales) if b.bitwise else None for b in books]
    counts, sums = zip(*(b.take(a) for b, a in zip(books, scale)))
    as_bits = any(b.bitwise for b in books)
    if as_bits:
        # Into the integers' buffer: only one process has a value where the others have zero, so the sum of
        # the bits is the value's bits.
        rows = [r.double().view(torch.int64) for r in rows]
    flat = all_reduce([*counts, *sums, *rows], processes)
    found = []
    for book, a, n, total in zip(books, scale, flat, flat[len(books) :]):
        if a is not None:
            n, total = from_fixed_point(n, total, a[:, None, None], book.cluster_size.dtype)
        found.append((n, total))
    rows = flat[2 * len(books) :]
    return found, [r.view(torch.float64) for r in rows] if as_bits else rows
