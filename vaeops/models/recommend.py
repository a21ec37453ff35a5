"""A variational autoencoder that recommends."""

import itertools
import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import rng
from ..nn import GaussianLatent
from ..ops.recon import recon_loss
from .protocol import Terms, check_sizes, check_weights, check_widths, check_x, impl_of, row_seeds


class MultVAEOutput(NamedTuple):
    """logits [B, items]; mu, logvar, z [B, latent]; kl [latent], its batch mean."""

    logits: Tensor
    mu: Tensor
    logvar: Tensor
    z: Tensor
    kl: Tensor


class MultVAE(nn.Module):
    """items - hidden - ... - latent - ... - hidden - items, tanh between; a user's items are multinomial.

    A user's row holds counts, or 1 for each item taken and 0 elsewhere. The encoder sees it divided by its
    norm, and in training each of its entries is 0 with probability `dropout` (the rest over 1 - dropout): the
    model learns to fill in what is missing. The higher an item's probability, the better it suits the user.

    Args:
        items: width of the data.
        hidden: widths of the encoder's hidden layers; the decoder mirrors them.
        latent: width of z.
        dropout: of the encoder's input, in [0, 1).
        beta: the KL's weight; the paper has it rise from 0 to about 0.2.
        ops: "fused" for vaeops' kernels, "ref" for the PyTorch reference.

    Source: Liang et al., "Variational Autoencoders for Collaborative Filtering", 2018; Mult-VAE^PR.
    """

    input_range = (0.0, 1.0)
    classes = 0

    def __init__(self, items: int, hidden: Sequence[int] = (600,), latent: int = 200, *, dropout: float = 0.5,
                 beta: float = 0.2, ops: str = "fused") -> None:  # fmt: skip
        super().__init__()
        check_sizes(self, items=items, latent=latent)
        check_widths(self, hidden=hidden)
        check_weights(self, beta=beta)
        if not 0 <= dropout < 1:
            raise ValueError(f"MultVAE: dropout must be in [0, 1), got {dropout}")
        self.impl = impl_of(ops)
        self.input_shape, self.latent_dim, self.dropout = (items,), latent, dropout
        # A normal is below the quantile of p with probability p.
        self.dropped_below = NormalDist().inv_cdf(dropout) if dropout else -math.inf
        self.weights = {"recon": 1.0, "kl": beta}
        self.encoder = _tanh_mlp([items, *hidden, 2 * latent])
        self.latent = GaussianLatent(reduction="dim", ops=ops)
        self.decoder = _tanh_mlp([latent, *hidden[::-1], items])
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_normal_(layer.weight)
                nn.init.normal_(layer.bias, std=1e-3)

    def forward(self, x: Tensor, *, seed: Tensor | None = None, eps: Tensor | None = None,
                row: int = 0) -> MultVAEOutput:  # fmt: skip
        """x [B, items] >= 0; seed, eps, row: as in `terms`. In eval z is mu, unless the call gives noise."""
        check_x(self, x)
        if self.training and seed is None:
            seed = rng.make_seed(x.device)
        h, drawn = F.normalize(x), None
        if seed is not None:
            dropped, drawn = (row_seeds(child, len(x), row) for child in rng.split(seed, 2))
            if self.training and self.dropout:
                keep = rng.normal(x.shape, dropped, impl=self.impl) > self.dropped_below
                h = h * keep / (1 - self.dropout)
        mu, logvar = self.encoder(h).chunk(2, 1)
        z, kl, _ = self.latent(mu, logvar, seed=drawn if eps is None else None, eps=eps)
        return MultVAEOutput(self.decoder(z), mu, logvar, z, kl)

    def terms(self, x: Tensor, label: Tensor | None = None, *, seed: Tensor | None = None,
              eps: Tensor | None = None, row: int = 0) -> Terms:  # fmt: skip
        """recon: -sum_i x_i log softmax(logits)_i of a user, batch mean; kl [latent].

        Args:
            x: [B, items] >= 0. label: not looked at.
            seed: int64 [2], of dropout and latent; fresh in training where none is given.
            eps: [B, latent], the latent's noise in place of the seed's.
            row: place of the first user in the joined batch.
        """
        out = self(x, seed=seed, eps=eps, row=row)
        recon = recon_loss(out.logits, x, "multinomial", impl=self.impl)
        monitors = {"mu_abs": out.mu.detach().abs().mean(), "logvar": out.logvar.detach().mean()}
        return Terms({"recon": recon, "kl": out.kl}, monitors)

    def encode(self, x: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [B, items] -> mu, logvar [B, latent]. Without dropout."""
        check_x(self, x)
        mu, logvar = self.encoder(F.normalize(x)).chunk(2, 1)
        return mu, logvar

    def decode(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        """z [B, latent] -> logits [B, items]: what to rank the items by."""
        return self.decoder(z)

    @torch.no_grad()
    def reconstruct(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """x [B, items] -> the items' probabilities [B, items], of z = mu."""
        return self.decode(self.encode(x)[0]).softmax(1)

    @torch.no_grad()
    def sample(self, n: int, seed: Tensor, label: Tensor | None = None) -> Tensor:
        """The tastes of n users drawn from the prior: probabilities [n, items]; seed int64 [2]."""
        return self.decode(rng.normal((n, self.latent_dim), seed, impl=self.impl)).softmax(1)


def _tanh_mlp(widths: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
    return nn.Sequential(*layers[:-1])
