"""Variational autoencoders of fully connected layers."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import rng
from ..nn import GaussianLatent


class VAEOutput(NamedTuple):
    """logits [B, in_dim] of the reconstruction; mu, logvar, z [B, latent]; kl [latent], its batch mean."""

    logits: Tensor
    mu: Tensor
    logvar: Tensor
    z: Tensor
    kl: Tensor


class MLPVAE(nn.Module):
    """in_dim - hidden - ... - latent - ... - hidden - in_dim, ReLU between, N(0, I) prior, logits out.

    mu and logvar come from one linear layer. In eval z is mu, unless the call gives noise.

    Args:
        in_dim, latent: widths of the data and of z.
        hidden: widths of the encoder's hidden layers; the decoder mirrors them.
        ops: "fused" for vaeops' kernels, "ref" for the PyTorch reference.

    Source: Kingma & Welling, "Auto-Encoding Variational Bayes", 2014, appendix C.1 (Bernoulli decoder) with
    ReLU for tanh; (784, (256, 256), 20) is the usual MNIST lesson.
    """

    def __init__(self, in_dim: int, hidden: Sequence[int], latent: int, *, ops: str = "fused") -> None:
        super().__init__()
        widths = [in_dim, *hidden]
        self.latent_dim = latent
        self.encoder = mlp([*widths, 2 * latent])
        self.latent = GaussianLatent(reduction="dim", ops=ops)
        self.decoder = mlp([latent, *widths[::-1]])

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, in_dim] -> mu, logvar [B, latent], views of one tensor."""
        mu, logvar = self.encoder(x).chunk(2, 1)
        return mu, logvar

    def forward(self, x: Tensor, *, seed: Tensor | None = None, eps: Tensor | None = None) -> VAEOutput:
        """x [B, in_dim]; seed, eps: the noise, as in `vaeops.reparam_kl`."""
        mu, logvar = self.encode(x)
        z, kl, _ = self.latent(mu, logvar, seed=seed, eps=eps)
        return VAEOutput(self.decoder(z), mu, logvar, z, kl)

    @torch.no_grad()
    def sample(self, n: int, seed: Tensor) -> Tensor:
        """n decoded draws from the prior, probabilities [n, in_dim]; seed int64 [2] on the model's device."""
        return self.decoder(rng.normal((n, self.latent_dim), seed)).sigmoid()


def mlp(widths: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
