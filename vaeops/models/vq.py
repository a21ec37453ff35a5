"""Autoencoders with a codebook between encoder and decoder."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..ops.vq import vector_quantize
from .vae import mlp


class VQVAEOutput(NamedTuple):
    """recon [B, in_dim] in [0, 1]; indices [B]; commit_loss, codebook_loss []; counts [codes]."""

    recon: Tensor
    indices: Tensor
    commit_loss: Tensor
    codebook_loss: Tensor
    counts: Tensor


class MLPVQVAE(nn.Module):
    """in_dim - hidden - ... - dim, one code for the whole input, dim - ... - hidden - in_dim, sigmoid.

    The codebook is learned by its own loss, as in the first paper: no moving averages, no revival.

    Args:
        in_dim: width of the data.
        hidden: widths of the encoder's hidden layers; the decoder mirrors them.
        dim, codes: the codebook is [codes, dim], drawn from U(-1/codes, 1/codes).
        ops: "fused" for vaeops' kernels, "ref" for the PyTorch reference.

    Source: van den Oord et al., "Neural Discrete Representation Learning", 2017. The defaults for MNIST,
    (784, (512,), 256, 32), are those of the AMLD 2020 workshop's notebook on VQ-VAE.
    """

    def __init__(
        self, in_dim: int, hidden: Sequence[int], dim: int, codes: int, *, ops: str = "fused"
    ) -> None:
        super().__init__()
        if ops not in ("fused", "ref"):
            raise ValueError(f"ops must be one of ('fused', 'ref'), got {ops!r}")
        self.impl = "ref" if ops == "ref" else None
        self.encoder = mlp([in_dim, *hidden, dim])
        self.codebook = nn.Parameter(torch.empty(codes, dim).uniform_(-1 / codes, 1 / codes))
        self.decoder = mlp([dim, *hidden[::-1], in_dim])
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> VQVAEOutput:
        """x [B, in_dim] in [0, 1]."""
        q = vector_quantize(self.encoder(x), self.codebook, stats=True, impl=self.impl)
        assert q.counts is not None  # they were asked for
        return VQVAEOutput(self.decode(q.quantized), q.indices, q.commit_loss, q.codebook_loss, q.counts)

    def decode(self, quantized: Tensor) -> Tensor:
        """[B, dim] -> [B, in_dim]. Of `self.codebook`: what each code stands for."""
        return self.decoder(quantized).sigmoid()
