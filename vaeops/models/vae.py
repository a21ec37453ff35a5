"""Variational autoencoders with a Gaussian latent: what they share, and those of fully connected layers."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import rng
from ..nn import GaussianLatent
from ..ops.gaussian import gaussian_log_prob, reparameterize
from ..ops.recon import recon_loss
from .protocol import (
    Terms,
    check_label,
    check_sizes,
    check_weights,
    check_widths,
    check_x,
    impl_of,
    row_seeds,
)

# The density whose negative logarithm a reconstruction loss is, up to a constant: (kind, scale).
LIKELIHOODS: dict[str, tuple[str, float | None]] = {
    "bce_logits": ("bce_logits", None),
    "mse": ("gaussian_nll", math.sqrt(0.5)),
    "l1": ("laplace_nll", 1.0),
}
NOISE = ("normal", "uniform")


class VAEOutput(NamedTuple):
    """pred [B, *input_shape], as `decode` gives it; mu, logvar, z [B, latent]; kl [latent], a batch mean."""

    pred: Tensor
    mu: Tensor
    logvar: Tensor
    z: Tensor
    kl: Tensor


class VAE(nn.Module):
    """What the VAEs here share: all but `encoder`, x -> [B, 2 latent], and `decoder`, z -> [B, *input_shape].

    The encoder's output is mu and logvar side by side, the prior N(0, I). With classes a one-hot label is
    appended to what enters both nets.

    Args:
        input_shape: of one sample.
        latent: width of z.
        input_range: of the samples' values; None where they have no bounds.
        recon: the reconstruction loss, a kind of LIKELIHOODS. With "bce_logits" the decoder gives logits,
            otherwise what it gives is the sample.
        reduction: of the reconstruction loss, "batchmean": the sum over a sample, or "mean": over its
            elements.
        beta: the KL's weight; of its sum over the latent's dims, or with reduction="mean" of its mean.
        classes: number of labels; 0: no labels.
        ops: "fused" for vaeops' kernels, "ref" for the PyTorch reference.
    """

    encoder: nn.Module
    decoder: nn.Module

    def __init__(self, input_shape: Sequence[int], latent: int, *,
                 input_range: tuple[float, float] | None = (0.0, 1.0), recon: str = "bce_logits",
                 reduction: str = "batchmean", beta: float = 1.0, classes: int = 0,
                 ops: str = "fused") -> None:  # fmt: skip
        super().__init__()
        check_widths(self, 1, input_shape=input_shape)
        check_sizes(self, latent=latent)
        check_sizes(self, 0, classes=classes)
        check_weights(self, beta=beta)
        name = type(self).__name__
        if recon not in LIKELIHOODS:
            raise ValueError(f"{name}: recon must be one of {tuple(LIKELIHOODS)}, got {recon!r}")
        if reduction not in ("batchmean", "mean"):
            raise ValueError(f"{name}: reduction must be 'batchmean' or 'mean', got {reduction!r}")
        if recon == "bce_logits" and input_range != (0.0, 1.0):
            raise ValueError(f"{name}: recon='bce_logits' needs input_range (0.0, 1.0), got {input_range}")
        self.impl = impl_of(ops)
        self.input_shape, self.input_range, self.classes = tuple(input_shape), input_range, classes
        self.latent_dim, self.recon, self.reduction = latent, recon, reduction
        self.weights = {"recon": 1.0, "kl": beta / latent if reduction == "mean" else beta}
        self.latent = GaussianLatent(reduction="dim", ops=ops)

    def encode(self, x: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [B, *input_shape] -> mu, logvar [B, latent], views of one tensor."""
        check_x(self, x)
        mu, logvar = self.encoder(self._conditioned(x, label)).chunk(2, 1)
        return mu, logvar

    def decode(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        """z [B, latent] -> [B, *input_shape] in input_range; logits where `recon` is "bce_logits"."""
        return self.decoder(self._conditioned(z, label))

    def forward(self, x: Tensor, label: Tensor | None = None, *, seed: Tensor | None = None,
                eps: Tensor | None = None, row: int = 0) -> VAEOutput:  # fmt: skip
        """x [B, *input_shape]; label int64 [B]; seed, row, eps: the noise, as in `terms`."""
        mu, logvar = self.encode(x, label)
        if seed is not None:
            seed = row_seeds(seed, len(x), row)
        z, kl, _ = self.latent(mu, logvar, seed=seed, eps=eps)
        return VAEOutput(self.decode(z, label), mu, logvar, z, kl)

    def terms(self, x: Tensor, label: Tensor | None = None, *, seed: Tensor | None = None,
              eps: Tensor | None = None, row: int = 0) -> Terms:  # fmt: skip
        """The losses "recon" and "kl" [latent] of x [B, *input_shape], and mean |mu| and log-variance.

        seed int64 [2]: z's noise follows from it, that of x's first sample being sample `row`'s of the joined
        batch. eps [B, latent]: the noise itself. Without either z is drawn from a fresh seed in training, and
        is mu in eval.
        """
        out = self(x, label, seed=seed, eps=eps, row=row)
        monitors = {"mu_abs": out.mu.detach().abs().mean(), "logvar": out.logvar.detach().mean()}
        return Terms(self.losses(out, x), monitors)

    def losses(self, out: VAEOutput, x: Tensor) -> dict[str, Tensor]:
        """The terms' losses of a forward, in their order."""
        recon = recon_loss(out.pred, x, self.recon, reduction=self.reduction, impl=self.impl)
        return {"recon": recon, "kl": out.kl}

    @torch.no_grad()
    def reconstruct(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """x decoded from z = mu: [B, *input_shape] in input_range."""
        return self._sample_of(self.decode(self.encode(x, label)[0], label))

    @torch.no_grad()
    def sample(self, n: int, seed: Tensor, label: Tensor | None = None) -> Tensor:
        """n decoded draws from the prior: [n, *input_shape] in input_range.

        seed int64 [2] on the model's device; label int64 [n].
        """
        z = rng.normal((n, self.latent_dim), seed, impl=self.impl)
        return self._sample_of(self.decode(z, label))

    @torch.no_grad()
    def log_weights(self, x: Tensor, k: int, seed: Tensor, label: Tensor | None = None) -> Tensor:
        """log p(x | z) p(z) / q(z | x) of k draws of z for each sample, in nats: fp32 [k, B].

        Their logsumexp over k, less log k, is `objectives.iwae_bound`. p(x | z) is the density that the
        reconstruction loss is minus the logarithm of: a Bernoulli for "bce_logits", a normal of variance 1/2
        for "mse", a Laplace of scale 1 for "l1", each with its constant.
        """
        if k < 1:
            raise ValueError(f"log_weights: k must be at least 1, got {k}")
        mu, logvar = (t.expand(k, *t.shape) for t in self.encode(x, label))
        z = reparameterize(mu, logvar, seed=seed, impl=self.impl)
        labels = None if label is None else label.repeat(k)
        pred = self.decode(z.flatten(0, 1), labels).unflatten(0, (k, len(x)))
        kind, scale = LIKELIHOODS[self.recon]
        nll = recon_loss(pred, x, kind, scale=scale, reduction="sample", batch_ndim=2, impl=self.impl)
        zero = torch.zeros_like(z)
        log_pz = gaussian_log_prob(z, zero, zero, batch_ndim=2, impl=self.impl)
        log_qz = gaussian_log_prob(z, mu, logvar, batch_ndim=2, impl=self.impl)
        return log_pz - log_qz - nll

    def _sample_of(self, pred: Tensor) -> Tensor:
        return pred.sigmoid() if self.recon == "bce_logits" else pred

    def _conditioned(self, h: Tensor, label: Tensor | None) -> Tensor:
        check_label(self, label, len(h))
        if label is None or not self.classes:
            return h
        one_hot = torch.eye(self.classes, dtype=h.dtype, device=h.device)
        return torch.cat((h, F.embedding(label, one_hot)), 1)  # unlike one_hot it does not wait for a GPU


class MLPVAE(VAE):
    """in_dim - hidden - ... - latent - ... - hidden - in_dim, ReLU between.

    A sigmoid at the end brings samples into [0, 1]; logits and unbounded samples have none.

    Args:
        in_dim, latent: widths of the data and of z.
        hidden: widths of the encoder's hidden layers; the decoder mirrors them.
        input_range: (0.0, 1.0), or None for values without bounds.
        recon, reduction, beta, classes, ops: as in VAE. With classes the model is a conditional VAE.

    Source: Kingma & Welling, "Auto-Encoding Variational Bayes", 2014, appendix C, with ReLU for tanh;
    classes: Sohn et al., "Learning Structured Output Representation using Deep Conditional Generative
    Models", 2015; beta: Higgins et al., "beta-VAE", 2017.
    """

    def __init__(self, in_dim: int, hidden: Sequence[int], latent: int, *,
                 input_range: tuple[float, float] | None = (0.0, 1.0), recon: str = "bce_logits",
                 reduction: str = "batchmean", beta: float = 1.0, classes: int = 0,
                 ops: str = "fused") -> None:  # fmt: skip
        check_sizes(self, in_dim=in_dim)
        check_widths(self, hidden=hidden)
        input_range = None if input_range is None else (float(input_range[0]), float(input_range[1]))
        if input_range not in (None, (0.0, 1.0)):
            raise ValueError(f"MLPVAE: input_range must be (0.0, 1.0) or None, got {input_range}")
        super().__init__((in_dim,), latent, input_range=input_range, recon=recon, reduction=reduction,
                         beta=beta, classes=classes, ops=ops)  # fmt: skip
        self.encoder = mlp([in_dim + classes, *hidden, 2 * latent])
        self.decoder = mlp([latent + classes, *hidden[::-1], in_dim])
        if input_range is not None and recon != "bce_logits":
            self.decoder.append(nn.Sigmoid())


class WorkshopVAE(VAE):
    """The VAE of digits of a 2020 workshop: 784 - 512 - 256 - z - 256 - 512 - 784, squared error and KL.

    ReLU after the 512-wide layers alone, a sigmoid at the end; weights as in He et al. (2015), biases 0. The
    workshop drew z with noise from U(0, 1), by mistake: noise="uniform". It then reports a lower loss and
    is the worse model, since its z are not draws of the posterior whose KL it counts.

    Args:
        latent: width of z; the workshop has 20 and 2.
        noise: "normal", or "uniform" as above.
        in_dim: width of the data.
        ops: as in VAE.

    Source: MaxinAI, amld2020-workshop, ae_vae_mnist.
    """

    def __init__(self, latent: int = 20, *, noise: str = "normal", in_dim: int = 784,
                 ops: str = "fused") -> None:  # fmt: skip
        check_sizes(self, in_dim=in_dim)
        super().__init__((in_dim,), latent, recon="mse", ops=ops)
        if noise not in NOISE:
            raise ValueError(f"WorkshopVAE: noise must be one of {NOISE}, got {noise!r}")
        self.noise = noise
        self.encoder = nn.Sequential(mlp([in_dim, 512, 256]), nn.Linear(256, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent, 256), mlp([256, 512, in_dim]), nn.Sigmoid())
        he_init_(self)

    def forward(self, x: Tensor, label: Tensor | None = None, *, seed: Tensor | None = None,
                eps: Tensor | None = None, row: int = 0) -> VAEOutput:  # fmt: skip
        """As in VAE; eps is the noise itself, whatever `noise` is."""
        if self.noise == "uniform" and eps is None and (self.training or seed is not None):
            seeds = row_seeds(rng.make_seed(x.device) if seed is None else seed, len(x), row)
            normal = rng.normal((len(x), self.latent_dim), seeds, impl=self.impl)
            seed, eps = None, torch.special.ndtr(normal)  # a normal's distribution function of it is uniform
        return super().forward(x, label, seed=seed, eps=eps, row=row)


def mlp(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers with ReLU between."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def he_init_(model: nn.Module) -> None:
    """Weights of linear and convolutional layers as in He et al. (2015), biases 0."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
