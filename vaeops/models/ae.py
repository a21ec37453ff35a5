"""Autoencoders: a bottleneck, no distribution over it, hence nothing to sample from."""

import math
from collections.abc import Sequence
from statistics import NormalDist

import torch
from torch import Tensor, nn

from .. import rng
from ..ops.recon import recon_loss
from .conv import mirrored
from .protocol import Terms, check_sizes, check_weights, check_widths, check_x, impl_of, row_seeds
from .vae import he_init_, mlp


class Autoencoder(nn.Module):
    """What the autoencoders here share: mean squared error of what `decoder` makes of `encoder`'s z.

    Samples are in [0, 1]; the decoder ends with a sigmoid, unless a model says otherwise.

    Args:
        input_shape: of one sample.
        latent: width of z.
        ops: "fused" for vaeops' kernels, "ref" for the PyTorch reference.
    """

    input_range = (0.0, 1.0)
    classes = 0
    encoder: nn.Sequential
    decoder: nn.Sequential

    def __init__(self, input_shape: Sequence[int], latent: int, *, ops: str = "fused") -> None:
        super().__init__()
        check_widths(self, 1, input_shape=input_shape)
        check_sizes(self, latent=latent)
        self.impl = impl_of(ops)
        self.input_shape, self.latent_dim = tuple(input_shape), latent
        self.weights = {"recon": 1.0}

    def encode(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """x [B, *input_shape] -> z [B, latent]. It looks at no label."""
        check_x(self, x)
        return self.encoder(x)

    def decode(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        """z [B, latent] -> [B, *input_shape] in [0, 1]."""
        return self.decoder(z)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))

    def terms(self, x: Tensor, label: Tensor | None = None, *, seed: Tensor | None = None,
              row: int = 0) -> Terms:  # fmt: skip
        """The loss "recon", an element's mean squared error, of x [B, *input_shape]; mean |z|.

        seed, row: a model with noise takes it from them; this one has none.
        """
        return self._terms(x, self.encode(x))

    def _terms(self, x: Tensor, z: Tensor) -> Terms:
        recon = recon_loss(self.decode(z), x, "mse", reduction="mean", impl=self.impl)
        return Terms({"recon": recon}, {"z_abs": z.detach().abs().mean()})

    @torch.no_grad()
    def reconstruct(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """x [B, *input_shape] -> the same in [0, 1], by way of z; without noise or dropout."""
        return self(x)


class MLPAutoencoder(Autoencoder):
    """in_dim - hidden - ... - latent - ... - hidden - in_dim, ReLU between, a sigmoid at the end.

    Without hidden layers and sigmoid it is linear: the best one spans what PCA's first components do.

    Args:
        in_dim, latent: widths of the data and of z.
        hidden: widths of the encoder's hidden layers, () for none; the decoder mirrors them.
        sigmoid: whether the decoder ends with one. What it gives may else lie outside of [0, 1].
        init: "torch" for PyTorch's own initial weights, "he" for He et al.'s (2015) with biases 0.
        ops: as in Autoencoder.

    Source: Hinton & Salakhutdinov, "Reducing the Dimensionality of Data with Neural Networks", 2006, with
    ReLU. (784, (512,), 20) with "he" is that of MaxinAI, amld2020-workshop, ae_vae_mnist. Linear: Baldi &
    Hornik, "Neural Networks and Principal Component Analysis", 1989.
    """

    def __init__(self, in_dim: int, hidden: Sequence[int], latent: int, *, sigmoid: bool = True,
                 init: str = "torch", ops: str = "fused") -> None:  # fmt: skip
        check_sizes(self, in_dim=in_dim)
        check_widths(self, hidden=hidden)
        super().__init__((in_dim,), latent, ops=ops)
        if init not in ("torch", "he"):
            raise ValueError(f"{type(self).__name__}: init must be 'torch' or 'he', got {init!r}")
        self.encoder = mlp([in_dim, *hidden, latent])
        self.decoder = mlp([latent, *hidden[::-1], in_dim])
        if sigmoid:
            self.decoder.append(nn.Sigmoid())
        if init == "he":
            he_init_(self)


class ConvAutoencoder(Autoencoder):
    """Stride-2 convolutions with batch norm and ReLU, a linear layer to z, and the mirror image.

    Args:
        latent: width of z.
        widths: channels after each convolution.
        channels, side: images are [channels, side, side].
        ops: as in Autoencoder.
    """

    def __init__(self, latent: int = 64, *, widths: Sequence[int] = (32, 64), channels: int = 1,
                 side: int = 28, ops: str = "fused") -> None:  # fmt: skip
        check_sizes(self, channels=channels, side=side)
        check_widths(self, 1, widths=widths)
        super().__init__((channels, side, side), latent, ops=ops)
        down, up, shape = mirrored(channels, side, widths, lambda c: [nn.BatchNorm2d(c), nn.ReLU()])
        flat = shape.numel()
        self.encoder = nn.Sequential(*down, nn.Flatten(), nn.Linear(flat, latent))
        self.decoder = nn.Sequential(nn.Linear(latent, flat), nn.Unflatten(1, shape), *up, nn.Sigmoid())


class DenoisingAutoencoder(MLPAutoencoder):
    """An MLPAutoencoder that sees a noisy x and is to give the clean one; dropout after its first layer.

        z = encoder(clamp(x + noise * eps, 0, 1)),    eps ~ N(0, 1)

    Args:
        in_dim, hidden, latent, ops: as in MLPAutoencoder.
        noise: deviation of the noise, in units of x.
        dropout: share of the first hidden layer that is dropped.

    Source: Vincent et al., "Stacked Denoising Autoencoders", 2010, with Gaussian noise.
    """

    def __init__(self, in_dim: int, hidden: Sequence[int], latent: int, *, noise: float = 0.3,
                 dropout: float = 0.2, ops: str = "fused") -> None:  # fmt: skip
        super().__init__(in_dim, hidden, latent, ops=ops)
        if not noise >= 0 or not 0 <= dropout < 1 or not hidden:
            raise ValueError(
                "DenoisingAutoencoder: noise must be >= 0, dropout in [0, 1) and hidden at least one width, "
                f"got {noise}, {dropout} and {list(hidden)}"
            )
        self.noise, self.dropout = noise, dropout
        self.dropped_below = NormalDist().inv_cdf(dropout) if dropout else -math.inf

    def terms(self, x: Tensor, label: Tensor | None = None, *, seed: Tensor | None = None,
              row: int = 0) -> Terms:  # fmt: skip
        """The loss "recon", against the clean x [B, in_dim]; mean |z|.

        seed int64 [2]: noise and dropout follow from it, those of x's first sample being sample `row`'s of
        the joined batch. Without it they are drawn afresh in training, and in eval x stays as it is; dropout
        is for training alone.
        """
        if seed is None:
            if not self.training:
                return super().terms(x)
            seed = rng.make_seed(x.device)
        check_x(self, x)
        h = self.encoder[:2](self.noisy(x, seed, row))
        if self.training:
            kept = self._normal(h, rng.fold_in(seed, 1), row) > self.dropped_below
            h = h * kept / (1 - self.dropout)
        return self._terms(x, self.encoder[2:](h))

    def noisy(self, x: Tensor, seed: Tensor, row: int = 0) -> Tensor:
        """x [B, in_dim] with noise, in [0, 1]; seed and row as in `terms`, which sees the same."""
        return (x + self.noise * self._normal(x, rng.fold_in(seed, 0), row)).clamp(0, 1)

    def _normal(self, like: Tensor, seed: Tensor, row: int) -> Tensor:
        return rng.normal(like.shape, row_seeds(seed, len(like), row), impl=self.impl).to(like.dtype)


class SparseAutoencoder(MLPAutoencoder):
    """An MLPAutoencoder whose code is not negative (a ReLU) and costs its absolute value.

    Args:
        in_dim, hidden, latent, ops: as in MLPAutoencoder.
        sparsity: weight of the code's cost, the mean of |z| over its dims.

    Source: Ng, "Sparse autoencoder", CS294A lecture notes, 2011, with an L1 penalty for the KL one.
    """

    def __init__(self, in_dim: int, hidden: Sequence[int], latent: int, *, sparsity: float = 1e-3,
                 ops: str = "fused") -> None:  # fmt: skip
        super().__init__(in_dim, hidden, latent, ops=ops)
        check_weights(self, sparsity=sparsity)
        self.encoder.append(nn.ReLU())
        self.weights["sparsity"] = sparsity

    def terms(self, x: Tensor, label: Tensor | None = None, *, seed: Tensor | None = None,
              row: int = 0) -> Terms:  # fmt: skip
        """The losses "recon" and "sparsity", mean |z|, of x [B, in_dim]; the share of zeros in z."""
        z = self.encode(x)
        losses, monitors = self._terms(x, z)
        losses["sparsity"] = recon_loss(z, z.new_zeros(()), "l1", reduction="mean", impl=self.impl)
        return Terms(losses, monitors | {"zeros": (z == 0).float().mean()})
