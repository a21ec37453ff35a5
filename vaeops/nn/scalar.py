"""Quantizers whose codebook is a grid, or a linear map of a fixed one: FSQ, LFQ, SimVQ as layers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import vq
from ..ops.vq import VQOutput, check
from ..ref.vq import ESTIMATORS, METRICS

_CHOICES = {"metric": METRICS, "estimator": ESTIMATORS, "precision": check.PRECISIONS}


class _Projected(nn.Module):
    """Linear layers around a quantizer of `inner` channels, where x has another number of them."""

    def __init__(self, dim: int | None, inner: int, channel_dim: int) -> None:
        super().__init__()
        dim = inner if dim is None else dim
        self.project_in = nn.Linear(dim, inner) if dim != inner else nn.Identity()
        self.project_out = nn.Linear(inner, dim) if dim != inner else nn.Identity()
        self.channel_dim = channel_dim

    def _in(self, x: Tensor) -> Tensor:
        return self.project_in(x.movedim(self.channel_dim, -1))

    def _out(self, quantized: Tensor) -> Tensor:
        return self.project_out(quantized).movedim(-1, self.channel_dim)

    def _dtype(self) -> torch.dtype:
        """Of decoded codes: the projection's, else fp32."""
        weight = getattr(self.project_out, "weight", None)
        return torch.float32 if weight is None else weight.dtype


class FSQ(_Projected):
    """Finite scalar quantization: `vaeops.fsq`, with linear layers where x has not one channel a level.

    Args:
        levels: L_1 .. L_D, the number of values of each channel.
        dim: channels of x. Default: D.
        channel_dim: where x has its channels.

    Shapes: x [*R, dim] -> VQOutput: quantized as x; indices [*R]; losses 0 [], since nothing is learned; no
    statistics.
    """

    def __init__(self, levels: Sequence[int], dim: int | None = None, *, channel_dim: int = -1) -> None:
        super().__init__(dim, len(levels), channel_dim)
        self.levels = tuple(levels)
        self.get_codes_from_indices(torch.zeros(1, dtype=torch.int64))  # bad levels show here

    def forward(self, x: Tensor) -> VQOutput:
        quantized, indices = vq.fsq(self._in(x), self.levels)
        zeros = torch.zeros(2, device=x.device)
        return VQOutput(self._out(quantized), indices, zeros[0], zeros[1], None, None)

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """indices [*R] -> quantized values [*R, D], before the projection."""
        return vq.fsq_decode(indices, self.levels, channel_dim=self.channel_dim, dtype=self._dtype())

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """indices [*R] -> what the layer gave as `quantized`."""
        return self._out(vq.fsq_decode(indices, self.levels, dtype=self._dtype()))

    def extra_repr(self) -> str:
        return f"levels={self.levels}, channel_dim={self.channel_dim}"


class LFQ(_Projected):
    """Lookup-free quantization: `vaeops.lfq`, the sign of each channel, and the entropies of its codebook.

        out = lfq(x);  sample, average = lfq.entropy(x)
        loss = ... + beta * out.commit_loss + gamma * (sample - average)

    Args:
        bits: D; the codebook is all 2^D sign vectors.
        dim: channels of x. Default: D; otherwise linear layers on both sides.
        channel_dim: where x has its channels.

    Shapes: x [*R, dim] -> VQOutput: quantized as x; indices [*R]; commit_loss [], the mean of (h - sign h)^2
    over the projected h; codebook_loss 0; no statistics.
    """

    def __init__(self, bits: int, dim: int | None = None, *, channel_dim: int = -1) -> None:
        super().__init__(dim, check.count("LFQ", "bits", bits, 63), channel_dim)
        self.bits = bits

    def forward(self, x: Tensor) -> VQOutput:
        h = self._in(x)
        quantized, indices = vq.lfq(h)
        wide = torch.promote_types(h.dtype, torch.float32)
        commit = (h.to(wide) - quantized.detach()).square().mean() if h.numel() else h.sum().to(wide)
        return VQOutput(self._out(quantized), indices, commit, torch.zeros_like(commit).detach(), None, None)

    def entropy(
        self, x: Tensor, *, temperature: float = 0.01, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(sample_entropy [], avg_entropy []) of softmax(2 h.c / temperature) over the 2^D sign vectors c.

        As in `vaeops.vq_entropy`. That makes a codebook of 2^D x D: for D up to 18 or so.
        """
        codes = vq.lfq_decode(torch.arange(2**self.bits, device=x.device), self.bits)
        return vq.vq_entropy(self._in(x), codes, temperature=temperature / 2, metric="dot", mask=mask)

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """indices [*R] -> signs [*R, D], before the projection."""
        return vq.lfq_decode(indices, self.bits, channel_dim=self.channel_dim, dtype=self._dtype())

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """indices [*R] -> what the layer gave as `quantized`."""
        return self._out(vq.lfq_decode(indices, self.bits, dtype=self._dtype()))

    def extra_repr(self) -> str:
        return f"bits={self.bits}, channel_dim={self.channel_dim}"


class SimVQ(nn.Module):
    """Vector quantization with the codebook W c_k: c_k fixed and random, W learned, so no code can die.

    Every step moves all codes. Objective: out.codebook_loss + beta * out.commit_loss, beta 0.25 in the paper.

    Args:
        dim: channels of x. codebook_size: K.
        frozen_dim: channels of c_k. Default: dim.
        transform: the map from [K, frozen_dim] to [K, dim]. Default: a linear layer without bias.
        channel_dim: where x has its channels.
        options: metric, estimator, precision, impl of `vaeops.vector_quantize`.

    Shapes: x [*R, dim] -> VQOutput as `vaeops.vector_quantize` gives it.
    State: `frozen_codebook` [K, frozen_dim], `code_transform`.
    Source: Zhu et al., "Addressing Representation Collapse in Vector Quantized Models with One Linear Layer",
    2024.
    """

    frozen_codebook: Tensor

    def __init__(self, dim: int, codebook_size: int, *, frozen_dim: int | None = None,
                 transform: nn.Module | None = None, channel_dim: int = -1,
                 **options: Any) -> None:  # fmt: skip
        super().__init__()
        for name, choices in _CHOICES.items():
            if name in options:
                check.one_of("SimVQ", name, options[name], choices)
        frozen_dim = dim if frozen_dim is None else frozen_dim
        self.register_buffer("frozen_codebook", torch.randn(codebook_size, frozen_dim) * frozen_dim**-0.5)
        self.code_transform = nn.Linear(frozen_dim, dim, bias=False) if transform is None else transform
        self.channel_dim, self.options = channel_dim, options

    @property
    def codebook(self) -> Tensor:
        """[K, dim], with its gradient to the transform."""
        return self.code_transform(self.frozen_codebook)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, stats: bool = False) -> VQOutput:
        """mask, stats: as in `vaeops.vector_quantize`."""
        return vq.vector_quantize(x, self.codebook, mask=mask, stats=stats, channel_dim=self.channel_dim,
                                  **self.options)  # fmt: skip

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """indices [*R] -> codes [*R, dim]; -1 -> 0."""
        return vq.vq_lookup(indices, self.codebook, channel_dim=self.channel_dim)
