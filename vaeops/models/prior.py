"""A prior over the codes of a VQ-VAE: with it a VQ-VAE makes new images.

    codes = encode_dataset(vqvae, images.split(256))             # [N, T], to train the prior on
    prior = CodePrior(vqvae.codes, codes.shape[1])               # prior.terms(codes[rows]).losses["nll"]
    made = decode_codes(vqvae, prior.sample(16, seed))           # [16, *vqvae.input_shape]

Of two levels of codes the top comes first.
"""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import rng
from .protocol import Terms, check_label, check_sizes, check_x, impl_of
from .vq import MLPVQVAE, VQVAE, VQVAE2

_SMALLEST = 2.0**-26  # of an exponential draw, as in `vaeops.vq_sample`


class CodePrior(nn.Module):
    """A causal transformer over the T codes of an image: p(c) = prod_i p(c_i | c_1 ... c_{i-1}, label).

    Pre-norm blocks of self-attention and a GELU layer of four times the width; learned positions; what stands
    before the first code is learned, for each label. The levels of a VQ-VAE-2 are one sequence, top first.

    Args:
        codes: K, how many there are.
        length: T.
        width, layers, heads: of the transformer; heads must divide width.
        classes: labels of a conditional prior, or 0.
        source: checksum of the VQ-VAE whose codes these are, as the data set `codes` has it. The trainer sets
            it, and then refuses the codes of other weights, which mean something else.
        ops: "fused" | "ref": who draws the noise of `sample`, the same bits either way.

    Source: the prior of van den Oord et al., 2017, with the network of Radford et al., "Language Models are
    Unsupervised Multitask Learners", 2019, in place of a PixelCNN.
    """

    input_range = None

    def __init__(self, codes: int = 512, length: int = 49, *, width: int = 128, layers: int = 4,
                 heads: int = 4, classes: int = 0, source: str | None = None,
                 ops: str = "fused") -> None:  # fmt: skip
        super().__init__()
        check_sizes(self, codes=codes, length=length, width=width, layers=layers, heads=heads)
        check_sizes(self, 0, classes=classes)
        if width % heads:
            raise ValueError(f"CodePrior: width {width} must be a multiple of heads, got {heads}")
        self.impl = impl_of(ops)
        self.codes, self.input_shape, self.classes = codes, (length,), classes
        self.source = source
        self.weights = {"nll": 1.0}
        self.start = nn.Embedding(max(classes, 1), width)
        self.embed = nn.Embedding(codes, width)
        self.position = nn.Parameter(torch.zeros(length, width))
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, codes))
        for module in self.modules():
            if isinstance(module, nn.Embedding | nn.Linear):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """x [B, T] integers in [0, K), label int64 [B] -> logits [B, T, K], the i-th from x[:, :i] alone."""
        check_x(self, x)
        if x.is_floating_point() or x.dtype is torch.bool:
            raise TypeError(f"CodePrior: x must hold codes of an integer dtype, got {x.dtype}")
        h = torch.cat((self._start(len(x), label), self.embed(x[:, :-1].long())), 1) + self.position
        for block in self.blocks:
            h = block(h)
        return self.head(h)

    def _start(self, n: int, label: Tensor | None) -> Tensor:
        """[n, 1, width]"""
        check_label(self, label, n)
        index = label if self.classes else torch.zeros(n, dtype=torch.int64, device=self.position.device)
        return self.start(index).unsqueeze(1)

    def terms(self, x: Tensor, label: Tensor | None = None, *, seed: Tensor | None = None,
              row: int = 0) -> Terms:  # fmt: skip
        """nll: -log p(c_i | ...) in nats, a mean over codes. Nothing is random: seed, row change nothing."""
        logits = self(x, label).flatten(0, 1)
        nll = F.cross_entropy(logits.float(), x.long().flatten())
        return Terms({"nll": nll}, {"perplexity": nll.detach().exp()})

    @torch.no_grad()
    def sample(self, n: int, seed: Tensor, label: Tensor | None = None) -> Tensor:
        """n draws, code after code: int64 [n, T]; seed int64 [2] on the model's device, label int64 [n].

            c_i = argmax_k logits_ik - log((a^2 + b^2) / 2)
        a, b: the normals (j K + k) 2 and (j K + k) 2 + 1 of `rng.fold_in(seed, i)`, for image j.
        """
        h, drawn = self._start(n, label), []
        caches: list[list[Tensor]] = [[] for _ in self.blocks]
        for i, position in enumerate(self.position):
            h = h + position
            for block, cache in zip(self.blocks, caches):
                h = block(h, cache)
            pairs = rng.normal((n, self.codes, 2), rng.fold_in(seed, i), impl=self.impl)
            exponential = (pairs.square().sum(-1) / 2).clamp(min=_SMALLEST)
            drawn.append((self.head(h[:, 0]).float() - exponential.log()).argmax(1))
            h = self.embed(drawn[-1]).unsqueeze(1)
        return torch.stack(drawn, 1)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, h: Tensor, cache: list[Tensor] | None = None) -> Tensor:
        """h [B, T, width]; with a cache, of the keys and values so far, the next position [B, 1, width]."""
        q, k, v = self.qkv(self.norm(h)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if cache is not None:
            cache[:] = [torch.cat((old, new), 2) for old, new in zip(cache, (k, v))] or [k, v]
            k, v = cache
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None)
        h = h + self.out(attended.transpose(1, 2).flatten(2))
        return h + self.mlp(h)


@torch.no_grad()
def encode_dataset(model: MLPVQVAE | VQVAE | VQVAE2, batches: Iterable[Tensor]) -> Tensor:
    """The codes of images, row after row: int64 [N, T] on the CPU; of two levels the top's come first.

    batches: tensors [B, *input_shape] in the model's input_range, say `images.split(256)`.
    """
    rows = []
    for x in batches:
        codes = model.encode(x)
        levels = codes if isinstance(codes, tuple) else (codes,)
        rows.append(torch.cat([level.reshape(len(x), -1) for level in levels], 1).cpu())
    return torch.cat(rows)


@torch.no_grad()
def decode_codes(model: MLPVQVAE | VQVAE | VQVAE2, codes: Tensor) -> Tensor:
    """The images of codes int64 [n, T], as `encode_dataset` orders them: [n, *input_shape] in input_range."""
    sizes = [math.prod(grid) for grid in model.grids]
    if codes.dim() != 2 or codes.shape[1] != sum(sizes):
        raise ValueError(f"decode_codes: codes must be [n, {sum(sizes)}], got {list(codes.shape)}")
    levels = [level.reshape(-1, *grid) for level, grid in zip(codes.split(sizes, 1), model.grids)]
    if isinstance(model, VQVAE2):
        return model.decode((levels[0], levels[1]))
    return model.decode(levels[0])
