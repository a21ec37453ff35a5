"""VQGAN's adaptive weight on a small step: taming's pattern, and ours with one pass through VGG less."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import vaeops
from vaeops.compat.taming import VectorQuantizer2, adaptive_weight

TAPS = ("relu1_2", "relu2_2", "relu3_3")
FLIPS = 1e-2  # a ReLU that rounding flips moves the gradient of a small image by about 2e-3


class Calls(TorchDispatchMode):
    """Counts this library's low-level ops."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, _, name = function.name().partition("::")
        if namespace == "vaeops":
            self.counts[name.partition(".")[0]] += 1
        return function(*args, **(kwargs or {}))


class VQGAN(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 16, 4, 2, 1), nn.SiLU(), nn.Conv2d(16, 8, 4, 2, 1))
        self.quantize = VectorQuantizer2(32, 8, beta=0.25)
        self.decoder = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.SiLU(), nn.Upsample(scale_factor=4),
                                     nn.Conv2d(16, 3, 3, padding=1))  # fmt: skip
        self.discriminator = nn.Sequential(
            nn.Conv2d(3, 16, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(16, 1, 4, 2, 1)
        )

    @property
    def last_layer(self):
        return self.decoder[-1].weight

    def forward(self, image):
        z, codes, _ = self.quantize(self.encoder(image))
        x = self.decoder(z)
        return x, codes, -self.discriminator(x).mean()


@pytest.fixture
def step():
    torch.manual_seed(2)
    model, image = VQGAN(), torch.rand(4, 3, 32, 32) * 2 - 1
    trunk = vaeops.VGGTrunk.random("vgg16", 3)
    return model, image, trunk.prepare(TAPS)


def maps_apart(x, image, trunk):
    """The loss through its maps, as `lpips` and torch have it: each backward runs through the net."""
    ours, theirs = trunk.features(x, TAPS), trunk.encode(image, TAPS).maps
    return sum(F.mse_loss(a, b) for a, b in zip(ours, theirs))


def tamings(model, image, trunk, perceptual_loss):
    """One gradient of each loss at the last layer, then backward through all."""
    x, codes, gan = model(image)
    nll = F.l1_loss(x, image) + perceptual_loss(x, image, trunk)
    nll_grad = torch.autograd.grad(nll, model.last_layer, retain_graph=True)[0]
    gan_grad = torch.autograd.grad(gan, model.last_layer, retain_graph=True)[0]
    weight = torch.clamp(torch.norm(nll_grad) / (torch.norm(gan_grad) + 1e-4), 0.0, 1e4).detach() * 0.8
    (nll + weight * gan + codes).backward()
    return weight


def ours(model, image, trunk):
    """The image's gradient is made with the loss; the rest of the way is the last layer."""
    x, codes, gan = model(image)
    perceptual, image_grad = vaeops.perceptual_loss(x, image, trunk, taps=TAPS, return_grad=True)
    l1 = F.l1_loss(x, image)
    image_grad = image_grad + torch.autograd.grad(l1, x, retain_graph=True)[0]
    nll_grad = torch.autograd.grad(x, model.last_layer, image_grad, retain_graph=True)[0]
    gan_grad = torch.autograd.grad(gan, model.last_layer, retain_graph=True)[0]
    weight = adaptive_weight(nll_grad, gan_grad, 0.8)
    (l1 + perceptual + weight * gan + codes).backward()
    return weight


def run(model, call):
    """(weight, gradients of the decoder and the encoder, calls of low-level ops)"""
    model.zero_grad()
    with Calls() as calls:
        weight = call()
    parameters = [*model.encoder.parameters(), *model.decoder.parameters()]
    return weight, [p.grad.clone() for p in parameters], calls.counts


def test_the_same_weight_and_step_with_one_vgg_pass_less(step):
    model, image, trunk = step
    wanted, theirs, passes = run(model, lambda: tamings(model, image, trunk, maps_apart))
    found, grads, fused = run(model, lambda: ours(model, image, trunk))
    assert 0.01 < float(wanted) < 1e4 and abs(found - wanted) < 1e-4 * wanted
    for one, other in zip(grads, theirs):
        assert (one - other).norm() < FLIPS * other.norm()
    # Two runs forward and two backward, against one call that is two runs forward and one backward.
    assert passes["vgg_features_fwd"] == 2 and passes["vgg_features_bwd"] == 2
    assert fused["perceptual_fwd"] == 1
    assert not any(fused[name] for name in ("vgg_features_fwd", "vgg_features_bwd"))


def test_against_a_vgg_in_pytorch(step):
    model, image, trunk = step
    features = trunk.sequential()

    def hooked(x, image, trunk):
        found = []
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        for picture in (x, image):
            h, maps = ((picture + 1) / 2 - mean) / std, []
            for i, layer in enumerate(features[:16]):
                h = layer(h)
                if i in (3, 8, 15):
                    maps.append(h)
            found.append(maps)
        return sum(F.mse_loss(a, b) for a, b in zip(*found))

    wanted = tamings(model, image, trunk, hooked)
    assert abs(ours(model, image, trunk) - wanted) < 1e-4 * wanted


def test_limits():
    """A discriminator that says nothing yet counts `limit` at most; no graph comes out."""
    big, none = torch.full((3, 4), 5.0, requires_grad=True), torch.zeros(3, 4)
    assert float(adaptive_weight(big, none, 0.5)) == 0.5 * 1e4
    assert float(adaptive_weight(none, big)) == 0
    assert not adaptive_weight(big * 2, big).requires_grad
    torch.testing.assert_close(adaptive_weight(big, big, eps=0), torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"gan_grad must have nll_grad's shape \[3, 4\], got \[4, 3\]"):
        adaptive_weight(big, big.T)
