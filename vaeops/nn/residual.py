"""Residual quantizers as layers: a chain of codebooks, each for what those before it left over."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import vq
from ..ops.vq import VQOutput, check
from ..ops.vq.residual import with_gradient
from ..ref.vq import ESTIMATORS
from .codebook import recomputing, update_codebooks
from .quantize import VectorQuantize, mask_of


class ResidualVQ(nn.Module):
    """Quantize by a sum of Q codes, one of each codebook: `vaeops.residual_vq` with codebooks that learn.

        r_1 = project_in(x),   q_i = nearest code of r_i,   r_{i+1} = r_i - q_i,   quantized = sum_i q_i
    The codebooks move after the last level, all with one all-reduce where there are several processes.

    Args:
        dim: channels of x.
        codebook_size: K of every level, or a sequence of Q.
        num_quantizers: Q.
        codebook_dim: D of a code; a linear layer on each side where it is not dim.
        shared_codebook: all levels use one codebook, which moves by the statistics of all.
        estimator: as in `VectorQuantize`, applied once, between project_in(x) and the sum.
        channel_dim, accumulate: as in `VectorQuantize`.
        options: of each level's `VectorQuantize`.

    Shapes: x [*R, dim] -> VQOutput: quantized as x; indices [*R, Q]; losses [Q]; counts [Q, K] and sums
    [Q, K, D] as in `VectorQuantize`, None where the levels' K differ.
    State: `layers.<i>._codebook` as in `VectorQuantize`; `project_in`, `project_out` where there are any.
    """

    layers: Sequence[VectorQuantize]

    def __init__(self, dim: int, codebook_size: int | Sequence[int], num_quantizers: int | None = None, *,
                 codebook_dim: int | None = None, shared_codebook: bool = False, estimator: str = "ste",
                 channel_dim: int = -1, accumulate: bool = False, **options: Any) -> None:  # fmt: skip
        super().__init__()
        if isinstance(codebook_size, int):
            if num_quantizers is None:
                raise TypeError("ResidualVQ: num_quantizers is needed where codebook_size is an int")
            codebook_size = [codebook_size] * num_quantizers
        if num_quantizers not in (None, len(codebook_size)) or not codebook_size:
            raise ValueError(
                f"ResidualVQ: num_quantizers must be the length of codebook_size {list(codebook_size)}, "
                f"got {num_quantizers}"
            )
        if shared_codebook and len(set(codebook_size)) > 1:
            raise ValueError(
                f"ResidualVQ: shared_codebook needs one codebook_size, got {list(codebook_size)}"
            )
        check.one_of("ResidualVQ", "estimator", estimator, ESTIMATORS)
        if "heads" in options:
            raise TypeError(
                "ResidualVQ: heads is no option of a level; GroupedResidualVQ splits the channels"
            )
        inner = dim if codebook_dim is None else codebook_dim
        self.project_in = nn.Linear(dim, inner) if inner != dim else nn.Identity()
        self.project_out = nn.Linear(inner, dim) if inner != dim else nn.Identity()
        self.channel_dim, self.estimator, self.deferred = channel_dim, estimator, accumulate
        layers = [VectorQuantize(inner, size, estimator="none", accumulate=accumulate, **options)
                  for size in codebook_size]  # fmt: skip
        for layer in layers:
            layer.deferred = True
            if shared_codebook:
                layer._codebook = layers[0]._codebook
        self.layers = nn.ModuleList(layers)  # type: ignore[assignment]

    def forward(self, x: Tensor, mask: Tensor | None = None, lens: Tensor | None = None, *,
                levels: int | None = None, stats: bool = False) -> VQOutput:  # fmt: skip
        """mask, lens, stats: as in `VectorQuantize`. levels: the first so many alone.

        For quantizer dropout draw `levels` at each training step, the same on all processes.
        """
        if levels is not None and not 1 <= levels <= len(self.layers):
            raise ValueError(f"ResidualVQ: levels must be in [1, {len(self.layers)}], got {levels}")
        rows = x.movedim(self.channel_dim, -1)
        mask = mask_of("ResidualVQ", rows.shape[:-1], mask, lens)
        h = self.project_in(rows)
        residual = h.to(torch.promote_types(h.dtype, torch.float32))
        total = torch.zeros_like(residual)
        outs: list[VQOutput] = []
        for layer in self.layers[:levels]:
            out = layer(residual, mask, stats=stats)
            residual = residual - out.quantized
            total = total + out.quantized
            outs.append(out)
        if self.training and not self.deferred and not recomputing():
            update_codebooks(self)

        y = self.project_out(with_gradient(total, h, self.estimator, mask))
        if mask is not None and not isinstance(self.project_out, nn.Identity):
            y = y.masked_fill(~mask.unsqueeze(-1), 0)
        same = len({o.counts.shape for o in outs if o.counts is not None}) == 1
        return VQOutput(
            y.movedim(-1, self.channel_dim),
            torch.stack([o.indices for o in outs], -1),
            torch.stack([o.commit_loss for o in outs]),
            torch.stack([o.codebook_loss for o in outs]),
            torch.stack([o.counts for o in outs if o.counts is not None]) if same else None,
            torch.stack([o.sums for o in outs if o.sums is not None]) if same else None,
        )

    def update(self) -> None:
        """With accumulate=True: move the codebooks by what they saw."""
        update_codebooks(self)

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """indices [*R, Q'], Q' <= Q -> each level's codes [Q', *R, D], before the projection; -1 -> 0."""
        each = zip(self.layers, indices.unbind(-1))
        return torch.stack([vq.vq_lookup(i, layer._codebook.embed[0]) for layer, i in each])

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """indices [*R, Q'], Q' <= Q -> what the layer gave as `quantized`; 0 where all are -1."""
        y = self.project_out(self.get_codes_from_indices(indices).sum(0))
        return y.masked_fill((indices < 0).all(-1, keepdim=True), 0).movedim(-1, self.channel_dim)


class GroupedResidualVQ(nn.Module):
    """The channels in G groups, each quantized by a `ResidualVQ` of its own.

    Args:
        dim: channels of x, a multiple of groups.
        groups: G.
        channel_dim, accumulate, and options: as in `ResidualVQ`, whose dim is dim / G.

    Shapes: x [*R, dim] -> VQOutput: quantized as x; indices [*R, G, Q]; losses [G, Q]; counts [G, Q, K] and
    sums [G, Q, K, D / G] as in `ResidualVQ`. State: `rvqs.<g>` as in `ResidualVQ`.
    Source: Yang et al., "HiFi-Codec: Group-residual Vector Quantization", 2023.
    """

    rvqs: Sequence[ResidualVQ]

    def __init__(self, dim: int, *args: Any, groups: int = 1, channel_dim: int = -1, accumulate: bool = False,
                 **options: Any) -> None:  # fmt: skip
        super().__init__()
        check.count("GroupedResidualVQ", "groups", groups)
        if dim % groups:
            raise ValueError(f"GroupedResidualVQ: dim {dim} must be a multiple of groups, got {groups}")
        self.groups, self.channel_dim, self.accumulate = groups, channel_dim, accumulate
        rvqs = [ResidualVQ(dim // groups, *args, accumulate=accumulate, **options) for _ in range(groups)]
        for rvq in rvqs:
            rvq.deferred = True
        self.rvqs = nn.ModuleList(rvqs)  # type: ignore[assignment]

    def forward(self, x: Tensor, mask: Tensor | None = None, lens: Tensor | None = None, *,
                levels: int | None = None, stats: bool = False) -> VQOutput:  # fmt: skip
        """As `ResidualVQ`'s."""
        rows = x.movedim(self.channel_dim, -1)
        mask = mask_of("GroupedResidualVQ", rows.shape[:-1], mask, lens)
        parts = rows.chunk(self.groups, -1)
        outs = [rvq(part, mask, levels=levels, stats=stats) for rvq, part in zip(self.rvqs, parts)]
        if self.training and not self.accumulate and not recomputing():
            update_codebooks(self)
        quantized, indices, commit, codebook, counts, sums = zip(*outs)
        return VQOutput(
            torch.cat(quantized, -1).movedim(-1, self.channel_dim),
            torch.stack(indices, -2),
            torch.stack(commit),
            torch.stack(codebook),
            None if counts[0] is None else torch.stack(counts),
            None if sums[0] is None else torch.stack(sums),
        )

    def update(self) -> None:
        """With accumulate=True: move the codebooks by what they saw."""
        update_codebooks(self)

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """indices [*R, G, Q'] -> codes [G, Q', *R, D]."""
        each = zip(self.rvqs, indices.unbind(-2))
        return torch.stack([rvq.get_codes_from_indices(i) for rvq, i in each])

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """indices [*R, G, Q'] -> what the layer gave as `quantized`."""
        each = zip(self.rvqs, indices.unbind(-2))
        return torch.cat([rvq.get_output_from_indices(i) for rvq, i in each], -1).movedim(
            -1, self.channel_dim
        )
