"""Convolutional variational autoencoders of images."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import rng
from ..nn import GaussianLatent


class ImageVAEOutput(NamedTuple):
    """recon [B, 3, H, W] in [-1, 1]; mu, logvar, z [B, latent]; kl [], the batch mean."""

    recon: Tensor
    mu: Tensor
    logvar: Tensor
    z: Tensor
    kl: Tensor


class CelebAVAE(nn.Module):
    """The 64x64 convolutional VAE of faces of a 2020 workshop: 7,868,931 parameters with latent 128.

    Encoder: two 3x3 convolutions at 64x64, then three times one of stride 2 and one of stride 1, 32 to 256
    channels, batch norm and ReLU after each. mu and logvar are a linear layer each. Decoder: a linear layer,
    three times nearest-neighbour upsampling and a 3x3 convolution, a 1x1 convolution to colours, tanh.
    Weights start as in He et al. (2015). The workshop drew z with uniform noise, by mistake; here it is
    normal.

    Args:
        latent: width of z.
        ops: "fused" for vaeops' kernels, "ref" for the PyTorch reference.

    Source: MaxinAI, amld2020-workshop, CNN_VAE_CelebA.
    """

    WIDTH, DEPTH, SIDE = 32, 3, 64

    def __init__(self, latent: int = 128, *, ops: str = "fused") -> None:
        super().__init__()
        self.latent_dim = latent
        width = self.WIDTH
        down = [_block(3, width), _block(width, width)]
        for _ in range(self.DEPTH):
            down += [_block(width, 2 * width, stride=2), _block(2 * width, 2 * width)]
            width *= 2
        self.map_shape = (width, self.SIDE >> self.DEPTH, self.SIDE >> self.DEPTH)
        flat = width * (self.SIDE >> self.DEPTH) ** 2
        self.encoder = nn.Sequential(*down, nn.Flatten())
        self.mu, self.logvar = nn.Linear(flat, latent), nn.Linear(flat, latent)
        self.latent = GaussianLatent(reduction="batchmean", ops=ops)
        up: list[nn.Module] = [nn.Linear(latent, flat), nn.Unflatten(1, self.map_shape)]
        for _ in range(self.DEPTH):
            up += [nn.Upsample(scale_factor=2), _block(width, width // 2)]
            width //= 2
        self.decoder = nn.Sequential(*up, nn.Conv2d(width, 3, 1), nn.Tanh())
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, 3, 64, 64] in [-1, 1] -> mu, logvar [B, latent]."""
        features = self.encoder(x)
        return self.mu(features), self.logvar(features)

    def forward(self, x: Tensor, *, seed: Tensor | None = None, eps: Tensor | None = None) -> ImageVAEOutput:
        """x [B, 3, 64, 64] in [-1, 1]; seed, eps: the noise, as in `vaeops.reparam_kl`."""
        mu, logvar = self.encode(x)
        z, kl, _ = self.latent(mu, logvar, seed=seed, eps=eps)
        return ImageVAEOutput(self.decoder(z), mu, logvar, z, kl)

    @torch.no_grad()
    def sample(self, n: int, seed: Tensor) -> Tensor:
        """n decoded draws from the prior, [n, 3, 64, 64] in [-1, 1]; seed int64 [2] on the model's device."""
        return self.decoder(rng.normal((n, self.latent_dim), seed))


def _block(channels: int, out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)
    )
