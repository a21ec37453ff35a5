"""Variational autoencoders of images, of convolutions."""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..nn import VGGTrunk
from ..ops.perceptual import perceptual_loss
from .protocol import check_sizes, check_weights, check_widths
from .vae import VAE, VAEOutput, he_init_


def mirrored(channels: int, side: int, widths: Sequence[int], after: Callable[[int], list[nn.Module]]
             ) -> tuple[list[nn.Module], list[nn.Module], torch.Size]:  # fmt: skip
    """Stride-2 convolutions, channels to widths, and transposed ones that undo them size by size.

    after(width): what follows each but the last. Returns both stacks and the shape [C, H, W] between them.
    """
    down: list[nn.Module] = []
    up: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise((channels, *widths))):
        down += [nn.Conv2d(fan_in, fan_out, 3, 2, 1), *after(fan_out)]
        bigger = nn.ConvTranspose2d(fan_out, fan_in, 3, 2, 1, output_padding=1 - side % 2)
        up = [bigger, *(after(fan_in) if i else []), *up]
        side = (side + 1) // 2
    return down, up, torch.Size((widths[-1], side, side))


class ConvVAE(VAE):
    """Stride-2 convolutions with batch norm and leaky ReLU (0.2), a linear layer to mu and logvar; mirrored.

    Args:
        latent: width of z.
        widths: channels after each convolution.
        channels, side: images are [channels, side, side] in [0, 1]; the decoder gives logits.
        beta, ops: as in VAE.
    """

    def __init__(self, latent: int = 32, *, widths: Sequence[int] = (32, 64, 128), channels: int = 1,
                 side: int = 28, beta: float = 1.0, ops: str = "fused") -> None:  # fmt: skip
        check_sizes(self, channels=channels, side=side)
        check_widths(self, 1, widths=widths)
        super().__init__((channels, side, side), latent, beta=beta, ops=ops)
        down, up, shape = mirrored(channels, side, widths, lambda c: [nn.BatchNorm2d(c), nn.LeakyReLU(0.2)])
        flat = shape.numel()
        self.encoder = nn.Sequential(*down, nn.Flatten(), nn.Linear(flat, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent, flat), nn.Unflatten(1, shape), *up)


class ConvVAESmall(VAE):
    """Stride-2 convolutions with ReLU, a hidden linear layer, another to mu and logvar; nearly mirrored.

    No batch norm, so an image's result depends on that image alone. The decoder's first layer has no ReLU.

    Args:
        latent: width of z.
        widths, hidden: channels after each convolution, width of the hidden layer.
        channels, side, beta, ops: as in ConvVAE.
    """

    def __init__(self, latent: int = 20, *, widths: Sequence[int] = (32, 64), hidden: int = 256,
                 channels: int = 1, side: int = 28, beta: float = 1.0,
                 ops: str = "fused") -> None:  # fmt: skip
        check_sizes(self, channels=channels, side=side, hidden=hidden)
        check_widths(self, 1, widths=widths)
        super().__init__((channels, side, side), latent, beta=beta, ops=ops)
        down, up, shape = mirrored(channels, side, widths, lambda c: [nn.ReLU()])
        flat = shape.numel()
        self.encoder = nn.Sequential(
            *down, nn.Flatten(), nn.Linear(flat, hidden), nn.ReLU(), nn.Linear(hidden, 2 * latent)
        )
        self.decoder = nn.Sequential(
            nn.Linear(latent, hidden), nn.Linear(hidden, flat), nn.ReLU(), nn.Unflatten(1, shape), *up
        )


class FaceVAE(VAE):
    """A VAE of colour images in [-1, 1]: L1 distance, KL, and where a trunk is given a perceptual loss.

    Args:
        latent: width of z.
        side: images are [3, side, side].
        beta: the KL's weight.
        trunk: a VGGTrunk of images in [-1, 1]; its squared feature distance at relu2_1 and relu3_3, summed
            over an image, is then the loss "perceptual". It is no part of the state_dict.
        perceptual: that loss' weight.
        ops: as in VAE.
    """

    def __init__(self, latent: int, side: int, *, beta: float = 1.0, trunk: VGGTrunk | None = None,
                 perceptual: float = 0.01, ops: str = "fused") -> None:  # fmt: skip
        check_sizes(self, side=side)
        check_weights(self, perceptual=perceptual)
        super().__init__((3, side, side), latent, input_range=(-1.0, 1.0), recon="l1", beta=beta, ops=ops)
        if trunk is not None and trunk.input_range != self.input_range:
            raise ValueError(
                f"{type(self).__name__}: trunk must take images in (-1.0, 1.0), got {trunk.input_range}"
            )
        self.trunk = trunk
        if trunk is not None:
            self.weights["perceptual"] = perceptual

    def losses(self, out: VAEOutput, x: Tensor) -> dict[str, Tensor]:
        losses = super().losses(out, x)
        if self.trunk is not None:
            distance = perceptual_loss(out.pred, x, self.trunk, reduction="sum", impl=self.impl)
            losses["perceptual"] = distance / max(len(x), 1)
        return losses


class CelebAVAE(FaceVAE):
    """The 64x64 convolutional VAE of faces of a 2020 workshop: 7,868,931 parameters with latent 128.

    Encoder: two 3x3 convolutions, then three times one of stride 2 and one of stride 1, 32 to 256 channels,
    batch norm and ReLU after each; a linear layer to mu and logvar. Decoder: a linear layer, three times
    nearest-neighbour upsampling and a 3x3 convolution, a 1x1 convolution to colours, tanh. Weights start as
    in He et al. (2015). The workshop drew z with uniform noise, by mistake; here it is normal.

    Args:
        latent: width of z.
        side: images are [3, side, side]; a multiple of 8.
        width: channels of the first convolution.
        beta, trunk, perceptual, ops: as in FaceVAE.

    Source: MaxinAI, amld2020-workshop, CNN_VAE_CelebA.
    """

    DEPTH = 3

    def __init__(self, latent: int = 128, *, side: int = 64, width: int = 32, beta: float = 1.0,
                 trunk: VGGTrunk | None = None, perceptual: float = 0.01,
                 ops: str = "fused") -> None:  # fmt: skip
        super().__init__(latent, side, beta=beta, trunk=trunk, perceptual=perceptual, ops=ops)
        _check_side(self, side, self.DEPTH)
        check_sizes(self, width=width)
        down = [_block(3, width), _block(width, width)]
        for _ in range(self.DEPTH):
            down += [_block(width, 2 * width, stride=2), _block(2 * width, 2 * width)]
            width *= 2
        shape = torch.Size((width, side >> self.DEPTH, side >> self.DEPTH))
        flat = shape.numel()
        self.encoder = nn.Sequential(*down, nn.Flatten(), nn.Linear(flat, 2 * latent))
        up: list[nn.Module] = [nn.Linear(latent, flat), nn.Unflatten(1, shape)]
        for _ in range(self.DEPTH):
            up += [nn.Upsample(scale_factor=2), _block(width, width // 2)]
            width //= 2
        self.decoder = nn.Sequential(*up, nn.Conv2d(width, 3, 1), nn.Tanh())
        he_init_(self)


class CelebAVAEXL(FaceVAE):
    """A residual VAE of 128x128 faces: 36 million parameters with latent 256.

    Encoder: at each width two 3x3 convolutions with a skip, then one of stride 2 to the next width, down to
    4x4; a linear layer to mu and logvar. Decoder: a linear layer, and the same upwards with nearest-neighbour
    upsampling, then tanh. Group norm, of 16 channels a group, and SiLU before each convolution of a block.
    Group norm and not batch norm: an image's loss then does not depend on the others of its batch, so that
    micro-batches and the ranks of a data-parallel run sum to the joined batch's gradient, and running a block
    again in backward moves no running statistics.

    Args:
        latent: width of z.
        side: images are [3, side, side]; a multiple of 2^(len(widths) - 1).
        widths: channels at each size, the first at full size; multiples of 16.
        checkpointing: keep each stage's input alone in training, and run the stage again in backward. The
            gradients are the same bits.
        beta, trunk, perceptual, ops: as in FaceVAE.

    Source: residual blocks: He et al., "Identity Mappings in Deep Residual Networks", 2016; norm: Wu & He,
    "Group Normalization", 2018; last convolution of a block starting at zero: Goyal et al., "Accurate, Large
    Minibatch SGD", 2017.
    """

    def __init__(self, latent: int = 256, *, side: int = 128,
                 widths: Sequence[int] = (32, 64, 128, 256, 512, 512), checkpointing: bool = False,
                 beta: float = 1.0, trunk: VGGTrunk | None = None, perceptual: float = 0.01,
                 ops: str = "fused") -> None:  # fmt: skip
        super().__init__(latent, side, beta=beta, trunk=trunk, perceptual=perceptual, ops=ops)
        check_widths(self, 1, widths=widths)
        if any(width % GROUP for width in widths):
            raise ValueError(f"CelebAVAEXL: widths must be multiples of {GROUP}, got {list(widths)}")
        depth = len(widths) - 1
        _check_side(self, side, depth)
        first, last = widths[0], widths[-1]
        shape = torch.Size((last, side >> depth, side >> depth))
        flat = shape.numel()
        down: list[nn.Module] = [nn.Conv2d(3, first, 3, padding=1)]
        up: list[nn.Module] = [nn.Sequential(_normed(first), nn.Conv2d(first, 3, 3, padding=1), nn.Tanh())]
        for width, smaller in itertools.pairwise(widths):
            down.append(nn.Sequential(ResidualBlock(width), nn.Conv2d(width, smaller, 3, 2, 1)))
            bigger = [nn.Upsample(scale_factor=2), nn.Conv2d(smaller, width, 3, padding=1)]
            up.insert(0, nn.Sequential(*bigger, ResidualBlock(width)))
        self.encoder = Stages(
            [*down, ResidualBlock(last), _normed(last), nn.Flatten(), nn.Linear(flat, 2 * latent)],
            checkpointing,
        )
        self.decoder = Stages(
            [nn.Linear(latent, flat), nn.Unflatten(1, shape), ResidualBlock(last), *up], checkpointing
        )


GROUP = 16  # channels that are normalised together


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), 3x3 convolutions of one width; x itself to begin with."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Sequential(_normed(width), nn.Conv2d(width, width, 3, padding=1))
        self.second = nn.Sequential(_normed(width), nn.Conv2d(width, width, 3, padding=1))
        for parameter in self.second[1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x))


class Stages(nn.Sequential):
    """A Sequential that may keep each stage's input alone, and run the stage again in backward."""

    def __init__(self, stages: Sequence[nn.Module], checkpointing: bool) -> None:
        super().__init__(*stages)
        self.checkpointing = checkpointing

    def forward(self, x: Tensor) -> Tensor:
        for stage in self:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(stage, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x = stage(x)
        return x


def _block(channels: int, out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)
    )


def _normed(width: int) -> nn.Sequential:
    return nn.Sequential(nn.GroupNorm(width // GROUP, width), nn.SiLU())


def _check_side(model: nn.Module, side: int, depth: int) -> None:
    if side <= 0 or side % 2**depth:
        raise ValueError(f"{type(model).__name__}: side must be a multiple of {2**depth}, got {side}")
