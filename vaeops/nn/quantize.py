"""Vector quantization as layers: codebooks that learn, behind `vaeops.vector_quantize`."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import vq
from ..ops._library import IMPLS
from ..ops.vq import VQOutput, check
from ..ref.vq import ESTIMATORS
from .codebook import Codebook, learn, recomputing, update_codebooks

METRICS = ("l2", "cosine")


def mask_of(op: str, rows: torch.Size, mask: Tensor | None, lens: Tensor | None) -> Tensor | None:
    """bool [*R] from a mask, or from the lengths [B] of sequences [B, T]."""
    if lens is None:
        return mask
    if mask is not None:
        raise ValueError(f"{op}: give mask or lens, not both")
    if len(rows) != 2 or lens.shape != rows[:1]:
        raise ValueError(
            f"{op}: lens must be [B] for sequences [B, T], got {list(lens.shape)} for {list(rows)}"
        )
    return torch.arange(rows[1], device=lens.device) < lens.unsqueeze(1)


class VectorQuantize(nn.Module):
    """Vector quantization with a codebook that learns: `vaeops.vector_quantize` and the state around it.

        x -> project in -> split into heads -> nearest codes -> project out

    In training, each call moves an averaged codebook by the rows it saw: by `vaeops.vq_ema_`, after the
    lookup, so the output is made of the codes before. In eval nothing moves. Losses come unweighted: add
    beta * out.commit_loss to the objective, and out.codebook_loss where the codebook is learned.

        vq = VectorQuantize(64, 1024);  out = vq(x);  loss = recon(out.quantized) + 0.25 * out.commit_loss

    Args:
        dim: channels of x.
        codebook_size: K.
        codebook_dim: D of a code. Default: dim / heads. A linear layer on each side where heads * D != dim.
        heads: parts that a row is cut in, each quantized alone; indices are then [*R, heads].
        separate_codebook_per_head: a codebook for each head; otherwise they share one.
        metric: "l2"; or "cosine": rows and codes are normalized, losses and output are of those.
        ema: the codebook follows moving averages (a buffer); False: it is a Parameter, which gets the
            gradient of codebook_loss.
        decay, eps: of the averages; as in `vaeops.vq_ema_`.
        kmeans_init, kmeans_iters: the first batch in training starts the codebook by k-means.
        revive_below: a code whose average count falls below it becomes a row of the batch; 0: none does.
        estimator, precision, impl: as in `vaeops.vector_quantize`.
        deterministic: "bitwise": the same codebook for any split of the rows over processes and
            micro-batches.
        channel_dim: where x has its channels, say 1 for [B, dim, H, W].
        freeze: the codebook stays as it is, in training too. An attribute that may be set later.
        accumulate: a call only collects; `update()`, once an optimizer step, moves the codebook by all the
            rows since the last one: N micro-batches make the update of the big batch.

    Shapes: x [*R, dim] -> VQOutput: quantized as x; indices [*R], or [*R, heads]; losses []; counts [K] and
    sums [K, D] (with a codebook per head [heads, K], [heads, K, D]) of this process's rows in training, else
    None unless the call says stats=True.

    State: `_codebook.embed`, `.embed_avg` [H, K, D], `.cluster_size` [H, K], `.initted` []; fp32 buffers that
    stay fp32 under .half() and .bfloat16(). `project_in`, `project_out` where there are any.

    Processes of torch.distributed's default group join their statistics; each must call the layer equally
    often, if with no rows. Their codebooks stay bit-identical when they started equal.
    Checkpointing: a forward that runs again in backward neither counts again nor sees the moved codebook.
    Where a layer runs several times before one backward this needs accumulate=True; and a compiled function
    does not notice that it runs again, so there the checkpoint goes inside, around other layers.
    """

    def __init__(self, dim: int, codebook_size: int, *, codebook_dim: int | None = None, heads: int = 1,
                 separate_codebook_per_head: bool = False, metric: str = "l2", ema: bool = True,
                 decay: float = 0.99, eps: float = 1e-5, kmeans_init: bool = False, kmeans_iters: int = 10,
                 revive_below: float = 0.0, estimator: str = "ste", precision: str = "exact",
                 deterministic: str | None = None, channel_dim: int = -1, freeze: bool = False,
                 accumulate: bool = False, impl: str | None = None) -> None:  # fmt: skip
        super().__init__()
        op = "VectorQuantize"
        check.one_of(op, "metric", metric, METRICS)
        check.one_of(op, "estimator", estimator, ESTIMATORS)
        check.one_of(op, "precision", precision, check.PRECISIONS)
        if impl is not None:
            check.one_of(op, "impl", impl, IMPLS)
        check.count(op, "dim", dim)
        check.count(op, "heads", heads)
        if codebook_dim is None:
            if dim % heads:
                raise ValueError(f"VectorQuantize: dim {dim} must be a multiple of heads, got {heads}")
            codebook_dim = dim // heads
        check.count(op, "codebook_dim", codebook_dim)
        if deterministic not in (None, "bitwise"):
            raise ValueError(
                f"VectorQuantize: deterministic must be None or 'bitwise', got {deterministic!r}"
            )
        inner = codebook_dim * heads
        self.project_in = nn.Linear(dim, inner) if inner != dim else nn.Identity()
        self.project_out = nn.Linear(inner, dim) if inner != dim else nn.Identity()
        self.heads, self.separate = heads, separate_codebook_per_head and heads > 1
        self.channel_dim, self.freeze, self.accumulate = channel_dim, freeze, accumulate
        self.deferred = False  # a layer above calls `learn`, for several codebooks at once
        self.options: dict[str, Any] = {
            "metric": metric,
            "estimator": estimator,
            "precision": precision,
            "impl": impl,
        }
        self._codebook = Codebook(codebook_dim, codebook_size, heads=heads if self.separate else 1, ema=ema,
                                  normalize=metric == "cosine", decay=decay, eps=eps, kmeans_init=kmeans_init,
                                  kmeans_iters=kmeans_iters, revive_below=revive_below,
                                  deterministic=deterministic)  # fmt: skip

    @property
    def codebook(self) -> Tensor:
        """[K, D], or [heads, K, D] with a codebook per head."""
        return self._codebook.embed if self.separate else self._codebook.embed[0]

    def forward(self, x: Tensor, mask: Tensor | None = None, lens: Tensor | None = None, *,
                stats: bool = False) -> VQOutput:  # fmt: skip
        """mask: bool [*R], True = use; or lens: int [B] for x [B, T, dim]. stats: in eval too."""
        book = self._codebook
        x = x.movedim(self.channel_dim, -1)
        mask = mask_of("VectorQuantize", x.shape[:-1], mask, lens)
        h = self.project_in(x)
        parts, masks = self._split(h, mask)
        if self.training and not book.started and not self.freeze:
            book.start([p.detach() for p in parts], masks)

        learning = self.training and not self.freeze and book.tracks
        tables = book.tables(learning and not self.accumulate)
        if self.freeze:
            tables = tuple(t.detach() for t in tables)
        outs = [vq.vector_quantize(p, t, mask=m, stats=learning or stats, **self.options)
                for p, t, m in zip(parts, tables, masks)]  # fmt: skip
        if learning and not recomputing():
            found = [(o.counts, o.sums) for o in outs if o.counts is not None and o.sums is not None]
            book.observe(parts, [o.indices for o in outs], found)
            if not (self.accumulate or self.deferred):
                learn([book])
        return self._join(outs, h.dtype, mask)

    def _split(self, h: Tensor, mask: Tensor | None) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        """Rows [*R, heads * D] and their mask, one for each codebook."""
        if self._codebook.normalize:
            h = h if self.heads == 1 else h.unflatten(-1, (self.heads, -1))
            h = F.normalize(h.to(torch.promote_types(h.dtype, torch.float32)), dim=-1)
        elif self.heads > 1:
            h = h.unflatten(-1, (self.heads, -1))
        if self.separate:
            return h.unbind(-2), (mask,) * self.heads
        if mask is not None and self.heads > 1:
            mask = mask.unsqueeze(-1).expand(*mask.shape, self.heads)
        return (h,), (mask,)

    def _join(self, outs: list[VQOutput], dtype: torch.dtype, mask: Tensor | None) -> VQOutput:
        """The outputs of all codebooks as one."""
        quantized, indices, commit, codebook, counts, sums = outs[0]
        if self.separate:
            quantized = torch.stack([o.quantized for o in outs], -2)
            indices = torch.stack([o.indices for o in outs], -1)
            commit = torch.stack([o.commit_loss for o in outs]).mean()
            codebook = torch.stack([o.codebook_loss for o in outs]).mean()
            if counts is not None:
                counts = torch.stack([o.counts for o in outs if o.counts is not None])
                sums = torch.stack([o.sums for o in outs if o.sums is not None])
        quantized = self._project(quantized.to(dtype), mask)
        return VQOutput(quantized, indices, commit, codebook, counts, sums)

    def _project(self, codes: Tensor, mask: Tensor | None) -> Tensor:
        """Codes [*R, D] or [*R, heads, D] as the output; 0 where the mask is False."""
        y = self.project_out(codes.flatten(-2) if self.heads > 1 else codes)
        if mask is not None and not isinstance(self.project_out, nn.Identity):
            y = y.masked_fill(~mask.unsqueeze(-1), 0)
        return y.movedim(-1, self.channel_dim)

    def update(self) -> None:
        """With accumulate=True: move the codebook by what it saw. For many layers `update_codebooks`."""
        update_codebooks(self)

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """indices [*R], or [*R, heads] -> codes [*R, heads * D], before the projection; -1 -> 0."""
        return self._codes(indices).movedim(-1, self.channel_dim)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """indices [*R], or [*R, heads] -> what the layer gave as `quantized`; -1 -> 0."""
        used = indices >= 0 if self.heads == 1 else (indices >= 0).all(-1)
        y = self.project_out(self._codes(indices))
        return y.masked_fill(~used.unsqueeze(-1), 0).movedim(-1, self.channel_dim)

    def _codes(self, indices: Tensor) -> Tensor:
        if not self.separate:
            codes = vq.vq_lookup(indices, self._codebook.embed[0])
            return codes.flatten(-2) if self.heads > 1 else codes
        each = zip(indices.unbind(-1), self._codebook.embed)
        return torch.cat([vq.vq_lookup(i, e) for i, e in each], -1)

    def extra_repr(self) -> str:
        book = self._codebook
        heads, codes, dim = book.embed.shape
        options = {**self.options, "ema": book.ema, "decay": book.decay, "channel_dim": self.channel_dim,
                   "freeze": self.freeze, "accumulate": self.accumulate}  # fmt: skip
        return f"{heads} x {codes} x {dim}, " + ", ".join(f"{k}={v!r}" for k, v in options.items())
