"""Perceptual losses' test inputs, and the loss as users write it, on torchvision's layers in fp64."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

import vaeops
from vaeops.nn import vgg_weights

# Of vgg11: name -> torchvision's index into `features`.
INDEX = {
    "conv1_1": 0, "relu1_1": 1, "pool1": 2, "conv2_1": 3, "relu2_1": 4, "pool2": 5, "conv3_1": 6,
    "relu3_1": 7, "conv3_2": 8, "relu3_2": 9, "pool3": 10, "conv4_1": 11, "relu4_1": 12,
}  # fmt: skip
TAPS = ("relu1_1", "conv2_1", "relu3_2")
KINDS = ("mse", "l1", "smooth_l1", "lpips", "gram")


@lru_cache(maxsize=8)
def stored(arch: str) -> list[Tensor]:
    return vgg_weights.random(arch, seed=0)


def state_dict(arch: str, prefix: str = "features.") -> dict[str, torch.Tensor]:
    return {prefix + name: w for (name, _), w in zip(vgg_weights.layout(arch), stored(arch))}


@lru_cache(maxsize=64)
def trunk(arch: str = "vgg11", **options) -> vaeops.VGGTrunk:
    return vaeops.VGGTrunk(arch, stored(arch), **options)


@lru_cache(maxsize=4)
def layers(arch: str = "vgg11", dtype: torch.dtype = torch.float64) -> torch.nn.Sequential:
    return trunk(arch).sequential().to(dtype)


def images(batch: int, height: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Two, alike as an image and its reconstruction are."""
    x = torch.rand(batch, 3, height, width) * 2 - 1
    return x.to(dtype), (x + 0.3 * torch.randn_like(x)).clamp(-1, 1).to(dtype)


def normalized(x: Tensor) -> Tensor:
    """[-1, 1] as torchvision's nets take it."""
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=x.dtype).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225], dtype=x.dtype).view(3, 1, 1)
    return ((x + 1) / 2 - mean) / std


def textbook_maps(x: Tensor, taps=TAPS) -> list[Tensor]:
    """Of vgg11, in x's dtype."""
    v, found = normalized(x), []
    wanted = [INDEX[tap] for tap in taps]
    for i, layer in enumerate(layers("vgg11", x.dtype)[: wanted[-1] + 1]):
        v = layer(v.clone())  # the ReLU works in place
        if i in wanted:
            found.append(v)
    return found


def textbook_distance(a: Tensor, b: Tensor, kind: str, lin: Tensor | None, mean: bool) -> Tensor:
    """[B]."""
    reduced = (lambda t: t.flatten(1).mean(1)) if mean else (lambda t: t.flatten(1).sum(1))
    if kind == "gram":
        grams = [torch.einsum("bchw,bdhw->bcd", t, t) / t[0].numel() for t in (a, b)]
        return reduced((grams[0] - grams[1]) ** 2)
    if kind == "lpips":
        a, b = (t / (t.square().sum(1, keepdim=True).sqrt() + 1e-10) for t in (a, b))
        return reduced(torch.einsum("bchw,c->bhw", (a - b) ** 2, lin.to(a.dtype)))
    loss = {"mse": F.mse_loss, "l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss}[kind]
    return reduced(loss(a, b, reduction="none"))


def textbook_loss(x, target, *, taps=TAPS, kind="mse", weights=None, lin=None, reduction="mean") -> Tensor:
    """In fp64."""
    pairs = zip(textbook_maps(x.double(), taps), textbook_maps(target.double(), taps))
    losses = 0
    for i, (a, b) in enumerate(pairs):
        weight = 1 if weights is None else weights[i]
        losses = losses + weight * textbook_distance(a, b, kind, lin and lin[i], reduction != "sum")
    return {"none": losses, "mean": losses.mean(), "sum": losses.sum()}[reduction]


def linear(taps=TAPS, arch: str = "vgg11") -> list[Tensor]:
    """Weights of "lpips", always the same, some of them 0."""
    cut, generator = trunk(arch).cut(taps), torch.Generator().manual_seed(1)
    return [torch.rand(cut.channels(tap), generator=generator).sub(0.2).clamp(min=0) for tap in cut.taps]


def options(kind: str, taps=TAPS) -> dict:
    return {"taps": taps, "kind": kind, **({"lin": linear(taps)} if kind == "lpips" else {})}


def relative(got: Tensor, exact: Tensor) -> float:
    """In L2."""
    return float((got.detach().double() - exact.detach().double()).norm() / exact.detach().double().norm())


def gradient(function, x: Tensor, *args, cotangent: Tensor | None = None, **kwargs) -> tuple[Tensor, Tensor]:
    """(loss, d loss / dx)."""
    x = x.detach().clone().requires_grad_()
    loss = function(x, *args, **kwargs)
    cotangent = torch.ones_like(loss) if cotangent is None else cotangent.to(loss.dtype)
    return loss.detach(), torch.autograd.grad(loss, x, cotangent)[0]
