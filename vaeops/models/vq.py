"""Autoencoders with a codebook between encoder and decoder.

Nothing in them is random: `terms` takes seed and row as every model does, and they change nothing.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..nn import VectorQuantize
from ..ops.recon import recon_loss
from ..ops.vq import VQOutput, perplexity, usage, vector_quantize, vq_assign, vq_lookup
from .protocol import Terms, check_sizes, check_widths, check_x, impl_of
from .vae import mlp


class VQVAEOutput(NamedTuple):
    """recon, as x; indices, as `encode` gives them; commit_loss, codebook_loss []; counts [codes].

    Of a model with two levels: indices of each, the losses added, counts [2, codes].
    """

    recon: Tensor
    indices: Tensor | tuple[Tensor, Tensor]
    commit_loss: Tensor
    codebook_loss: Tensor
    counts: Tensor


class _Quantized(nn.Module):
    """What the models here have in common.

    weights: which losses a model has, and their default weights. grids: the shape of a sample's codes, level
    by level. codes: K, the size of each codebook.
    """

    input_shape: tuple[int, ...]
    input_range = (-1.0, 1.0)
    classes = 0
    weights: dict[str, float]
    grids: tuple[tuple[int, ...], ...]
    codes: int
    impl: str | None

    def _check(self, channels: int, hidden: int, inner: int, blocks: int, dim: int, codes: int) -> None:
        check_sizes(self, channels=channels, inner=inner, dim=dim, codes=codes)
        check_sizes(self, 2, hidden=hidden)
        check_sizes(self, 0, blocks=blocks)

    def terms(self, x: Tensor, label: Tensor | None = None, *, seed: Tensor | None = None,
              row: int = 0) -> Terms:  # fmt: skip
        """recon, the mean squared error of an element, and the losses of the codes, means over elements too.

        In training an averaged codebook moves. Monitors: perplexity and usage of each codebook.
        """
        out: VQVAEOutput = self(x)
        losses = {
            "recon": recon_loss(out.recon, x, "mse", reduction="mean", impl=self.impl),
            "codebook": out.codebook_loss,
            "commit": out.commit_loss,
        }
        levels = ("",) if len(self.grids) == 1 else ("_top", "_bottom")
        counts = out.counts.view(len(levels), self.codes)
        monitors = {f"perplexity{level}": value for level, value in zip(levels, perplexity(counts))}
        monitors |= {f"usage{level}": value for level, value in zip(levels, usage(counts))}
        return Terms({name: losses[name] for name in self.weights}, monitors)


class MLPVQVAE(_Quantized):
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

    input_range = (0.0, 1.0)

    def __init__(
        self, in_dim: int, hidden: Sequence[int], dim: int, codes: int, *, ops: str = "fused"
    ) -> None:
        super().__init__()
        check_sizes(self, in_dim=in_dim, dim=dim, codes=codes)
        check_widths(self, hidden=hidden)
        self.impl = impl_of(ops)
        self.input_shape, self.grids, self.codes = (in_dim,), ((),), codes
        self.weights = {"recon": 1.0, "codebook": 1.0, "commit": 1.0}
        self.encoder = mlp([in_dim, *hidden, dim])
        self.codebook = nn.Parameter(torch.empty(codes, dim).uniform_(-1 / codes, 1 / codes))
        self.decoder = mlp([dim, *hidden[::-1], in_dim])
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> VQVAEOutput:
        """x [B, in_dim] in [0, 1]."""
        check_x(self, x)
        q = vector_quantize(self.encoder(x), self.codebook, stats=True, impl=self.impl)
        assert q.counts is not None  # they were asked for
        recon = self.decoder(q.quantized).sigmoid()
        return VQVAEOutput(recon, q.indices, q.commit_loss, q.codebook_loss, q.counts)

    def encode(self, x: Tensor) -> Tensor:
        """x [B, in_dim] in [0, 1] -> indices int64 [B]."""
        check_x(self, x)
        return vq_assign(self.encoder(x), self.codebook, impl=self.impl)

    def decode(self, indices: Tensor) -> Tensor:
        """indices int64 [B] -> [B, in_dim] in [0, 1]. Of arange(codes): what each code stands for."""
        return self.decoder(vq_lookup(indices, self.codebook, impl=self.impl)).sigmoid()

    @torch.no_grad()
    def reconstruct(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """x [B, in_dim] in [0, 1] -> the same."""
        return self.decode(self.encode(x))


class VQVAE(_Quantized):
    """A convolutional VQ-VAE: a code for each 4x4 patch of the image.

    Encoder: two 4x4 convolutions of stride 2, one 3x3, residual blocks (ReLU, 3x3 to `inner` channels, ReLU,
    1x1), a 1x1 to D channels. Decoder: a 3x3 convolution, residual blocks, two transposed 4x4 of stride 2.
    The codebook follows moving averages, and a code that fewer than one row a batch choose on average becomes
    a row of the batch.

    Args:
        channels: C of the image.
        side: H = W, or (H, W); multiples of 4.
        hidden: width of the layers; half as many after the first convolution.
        inner, blocks: of the residual stacks.
        dim, codes: D and K of the codebook.
        decay: of its averages.
        ops: "fused" for vaeops' kernels, "ref" for the PyTorch reference.

    Source: van den Oord et al., "Neural Discrete Representation Learning", 2017: layers of section 4.1,
    averages of appendix A.1, commitment weight 0.25; revival: Dhariwal et al., "Jukebox: A Generative Model
    for Music", 2020.
    """

    def __init__(self, channels: int = 3, side: int | Sequence[int] = 64, *, hidden: int = 128,
                 inner: int = 32, blocks: int = 2, dim: int = 64, codes: int = 512, decay: float = 0.99,
                 ops: str = "fused") -> None:  # fmt: skip
        super().__init__()
        self._check(channels, hidden, inner, blocks, dim, codes)
        self.impl = impl_of(ops)
        height, width = _sides("VQVAE", side, 4)
        self.input_shape, self.codes = (channels, height, width), codes
        self.grids = ((height // 4, width // 4),)
        self.weights = {"recon": 1.0, "commit": 0.25}
        self.encoder = nn.Sequential(
            *_down((channels, hidden // 2, hidden), inner, blocks), nn.Conv2d(hidden, dim, 1)
        )
        self.quantize = _codebook(dim, codes, decay, self.impl)
        self.decoder = nn.Sequential(*_up(dim, (hidden, hidden // 2, channels), inner, blocks))

    def forward(self, x: Tensor) -> VQVAEOutput:
        """x [B, C, H, W] in [-1, 1]."""
        check_x(self, x)
        q: VQOutput = self.quantize(self.encoder(x), stats=True)
        assert q.counts is not None  # they were asked for
        recon = self.decoder(q.quantized)
        return VQVAEOutput(recon, q.indices, q.commit_loss, q.codebook_loss, q.counts)

    def encode(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] in [-1, 1] -> indices int64 [B, H/4, W/4]."""
        check_x(self, x)
        return vq_assign(self.encoder(x), self.quantize.codebook, channel_dim=1, impl=self.impl)

    def decode(self, indices: Tensor) -> Tensor:
        """indices int64 [B, H/4, W/4] -> [B, C, H, W] in [-1, 1]."""
        codes = vq_lookup(indices, self.quantize.codebook, channel_dim=1, impl=self.impl)
        return self.decoder(codes).clamp(-1, 1)

    @torch.no_grad()
    def reconstruct(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """x [B, C, H, W] in [-1, 1] -> the same."""
        return self.decode(self.encode(x))


class VQVAE2(_Quantized):
    """A VQ-VAE of two levels: a code for each 8x8 patch, and, given those, one for each 4x4 patch.

        h = encoder(x), a quarter of the side;  t = top_encoder(h), an eighth
        top = codes of t;  bottom = codes of a 1x1 convolution of (h, top_decoder(top))
        recon = decoder(top, made twice as wide by a transposed convolution, and bottom)

    Args:
        channels: C of the image.
        side: H = W, or (H, W); multiples of 8.
        Others as in `VQVAE`; each level has a codebook of its own.

    Source: Razavi et al., "Generating Diverse High-Fidelity Images with VQ-VAE-2", 2019.
    """

    def __init__(self, channels: int = 3, side: int | Sequence[int] = 64, *, hidden: int = 128,
                 inner: int = 64, blocks: int = 2, dim: int = 64, codes: int = 512, decay: float = 0.99,
                 ops: str = "fused") -> None:  # fmt: skip
        super().__init__()
        self._check(channels, hidden, inner, blocks, dim, codes)
        self.impl = impl_of(ops)
        height, width = _sides("VQVAE2", side, 8)
        self.input_shape, self.codes = (channels, height, width), codes
        self.grids = ((height // 8, width // 8), (height // 4, width // 4))
        self.weights = {"recon": 1.0, "commit": 0.25}
        self.encoder = nn.Sequential(*_down((channels, hidden // 2, hidden), inner, blocks))
        self.top_encoder = nn.Sequential(*_down((hidden, hidden), inner, blocks), nn.Conv2d(hidden, dim, 1))
        self.top = _codebook(dim, codes, decay, self.impl)
        self.top_decoder = nn.Sequential(*_up(dim, (hidden, dim), inner, blocks))
        self.bottom_encoder = nn.Conv2d(hidden + dim, dim, 1)
        self.bottom = _codebook(dim, codes, decay, self.impl)
        self.widen = nn.ConvTranspose2d(dim, dim, 4, 2, 1)
        self.decoder = nn.Sequential(*_up(2 * dim, (hidden, hidden // 2, channels), inner, blocks))

    def forward(self, x: Tensor) -> VQVAEOutput:
        """x [B, C, H, W] in [-1, 1]."""
        check_x(self, x)
        h = self.encoder(x)
        top: VQOutput = self.top(self.top_encoder(h), stats=True)
        bottom: VQOutput = self.bottom(self._below(h, top.quantized), stats=True)
        assert top.counts is not None and bottom.counts is not None  # they were asked for
        return VQVAEOutput(
            self._decoded(top.quantized, bottom.quantized), (top.indices, bottom.indices),
            top.commit_loss + bottom.commit_loss, top.codebook_loss + bottom.codebook_loss,
            torch.stack((top.counts, bottom.counts)),
        )  # fmt: skip

    def _below(self, h: Tensor, top: Tensor) -> Tensor:
        return self.bottom_encoder(torch.cat((h, self.top_decoder(top)), 1))

    def _decoded(self, top: Tensor, bottom: Tensor) -> Tensor:
        return self.decoder(torch.cat((self.widen(top), bottom), 1))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, C, H, W] in [-1, 1] -> indices int64: top [B, H/8, W/8], bottom [B, H/4, W/4]."""
        check_x(self, x)
        h = self.encoder(x)
        top = vq_assign(self.top_encoder(h), self.top.codebook, channel_dim=1, impl=self.impl)
        codes = vq_lookup(top, self.top.codebook, channel_dim=1, impl=self.impl)
        bottom = vq_assign(self._below(h, codes), self.bottom.codebook, channel_dim=1, impl=self.impl)
        return top, bottom

    def decode(self, indices: tuple[Tensor, Tensor]) -> Tensor:
        """indices (top [B, H/8, W/8], bottom [B, H/4, W/4]) -> [B, C, H, W] in [-1, 1]."""
        books = self.top.codebook, self.bottom.codebook
        codes = (vq_lookup(i, book, channel_dim=1, impl=self.impl) for i, book in zip(indices, books))
        return self._decoded(*codes).clamp(-1, 1)

    @torch.no_grad()
    def reconstruct(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """x [B, C, H, W] in [-1, 1] -> the same."""
        return self.decode(self.encode(x))


class _Residual(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.ReLU(), nn.Conv2d(width, inner, 3, 1, 1, bias=False), nn.ReLU(), nn.Conv2d(inner, width, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def _down(widths: Sequence[int], inner: int, blocks: int) -> list[nn.Module]:
    """Each step between two widths halves the side."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Conv2d(fan_in, fan_out, 4, 2, 1), nn.ReLU()]
    stack = [_Residual(widths[-1], inner) for _ in range(blocks)]
    return [*layers, nn.Conv2d(widths[-1], widths[-1], 3, 1, 1), *stack, nn.ReLU()]


def _up(dim: int, widths: Sequence[int], inner: int, blocks: int) -> list[nn.Module]:
    """From dim channels; each step between two widths doubles the side."""
    layers: list[nn.Module] = [nn.Conv2d(dim, widths[0], 3, 1, 1)]
    layers += [_Residual(widths[0], inner) for _ in range(blocks)]
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.ReLU(), nn.ConvTranspose2d(fan_in, fan_out, 4, 2, 1)]
    return layers


def _codebook(dim: int, codes: int, decay: float, impl: str | None) -> VectorQuantize:
    return VectorQuantize(dim, codes, decay=decay, revive_below=1.0, channel_dim=1, impl=impl)


def _sides(model: str, side: int | Sequence[int], factor: int) -> tuple[int, int]:
    sides = tuple(side) if isinstance(side, Sequence) else (side, side)
    if len(sides) != 2 or not all(isinstance(s, int) and s >= factor and s % factor == 0 for s in sides):
        raise ValueError(f"{model}: side must hold positive multiples of {factor}, got {side!r}")
    return sides[0], sides[1]
