"""Perceptual losses: the distance of VGG features and the image gradient that a decoder needs.

The eager rows are what people run: hooks on a whole frozen VGG16, the same net cut at its last tap, that one
in bf16 and channels_last. LPIPS runs against its own package, the workshop's loss against its literal code.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vaeops
from vaeops.compat.workshop import HookPerceptualLoss

from .. import peers
from ..case import COMPILE, Inputs, Row, our_impls

TAPS = ("relu2_1", "relu3_3")
LAYERS = (6, 15)  # the same, as indices of torchvision's vgg16().features
PER_PIXEL = 372_096  # operations of the convolutions up to relu3_3, two a multiplication
BF16, CACHED = "vaeops, bf16", "vaeops, cached target"
# Error budgets: loss relative, image gradient relative in L2. In bf16 more ReLUs flip, in PyTorch's most.
FP32 = {"loss": 1e-6, "gradient": 2e-3}
HALF, RIVAL_HALF = {"loss": 5e-3, "gradient": 0.1}, {"loss": 5e-3, "gradient": 0.2}


@lru_cache(maxsize=2)
def _trunk(arch: str, precision: str, device: torch.device, bn: str | None = None) -> vaeops.VGGTrunk:
    return vaeops.VGGTrunk.random(arch, seed=0, normalize=None, precision=precision, bn=bn).to(device)


def _eager(features: nn.Sequential) -> Callable[[Tensor, Tensor], tuple]:
    """The net cut at its last tap, the target's features without a graph."""

    def maps(image: Tensor) -> list[Tensor]:
        found = []
        for i, layer in enumerate(features):
            image = layer(image)
            if i in LAYERS:
                found.append(image)
        return found

    def loss(x: Tensor, target: Tensor) -> tuple:
        with torch.no_grad():
            wanted = maps(target)
        return (sum(F.mse_loss(a.float(), b.float()) for a, b in zip(maps(x), wanted)),)

    return loss


class Hooks:
    """Forward hooks on a whole net, as the common recipe has it."""

    def __init__(self, features: nn.Sequential, reduction: str = "mean") -> None:
        self.features, self.reduction, self.found = features, reduction, {}
        for i in LAYERS:
            features[i].register_forward_hook(self._keep(i))

    def _keep(self, i: int):
        def hook(module, inputs, output):
            self.found[i] = output.clone()

        return hook

    def __call__(self, x: Tensor, target: Tensor) -> tuple:
        self.features(x)
        ours = dict(self.found)
        self.features(target)
        return (sum(F.mse_loss(ours[i], self.found[i], reduction=self.reduction) for i in LAYERS),)


def _relative(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


@dataclass(frozen=True)
class LossCase:
    """Mean squared distance at relu2_1 and relu3_3 of a frozen VGG16, and the image gradient."""

    batch: int
    side: int
    small: bool = False
    family: str = "perceptual"
    dtype: torch.dtype = torch.float32
    ceiling: str = "matmul"
    memory: str = "kept"
    allowed: ClassVar = FP32
    _per_pixel: int = field(default=PER_PIXEL, repr=False)

    @property
    def name(self) -> str:
        return f"{self.batch}x{self.side}x{self.side}"

    @property
    def elements(self) -> int:
        return self.batch * 3 * self.side**2

    @property
    def work_forward(self) -> int:
        return 2 * self._per_pixel * self.batch * self.side**2

    @property
    def work_backward(self) -> int:
        return self.work_forward // 2

    def inputs(self, device: torch.device) -> Inputs:
        x, target = (torch.rand(self.batch, 3, self.side, self.side, device=device) * 2 - 1 for _ in range(2))
        return Inputs((x.requires_grad_(), target), torch.ones((), device=device))

    def rows(self, device: torch.device, compiled: bool) -> list[Row]:
        trunk = _trunk("vgg16", "fp32", device)
        cut = trunk.sequential()[: LAYERS[-1] + 1]
        half = trunk.sequential()[: LAYERS[-1] + 1].bfloat16().to(memory_format=torch.channels_last)
        in_bf16 = _eager(half)

        def channels_last(x: Tensor, target: Tensor) -> tuple:
            like = {"dtype": torch.bfloat16, "memory_format": torch.channels_last}
            return in_bf16(x.to(**like), target.to(**like))

        rows = [Row("hooks", Hooks(trunk.sequential())), Row("eager", _eager(cut)),
                Row("eager bf16", channels_last)]  # fmt: skip
        if compiled:
            rows.append(Row(COMPILE, torch.compile(_eager(cut), fullgraph=True, dynamic=False)))

        def loss(trunk: vaeops.VGGTrunk, impl: str | None = None) -> Callable[..., tuple]:
            return lambda x, target: (vaeops.perceptual_loss(x, target, trunk, taps=TAPS, impl=impl),)

        rows += [
            Row(name, loss(trunk, impl), ours=True) for name, impl in our_impls(device, "perceptual_fwd")
        ]
        rows.append(Row(BF16, loss(_trunk("vgg16", "bf16", device)), ours=True))
        rows.append(Row(CACHED, _Cached(trunk), ours=True))
        return rows

    def exact(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and gradient in fp64."""
        trunk = _trunk("vgg16", "fp32", x.device)
        x = x.detach().double().requires_grad_()
        loss = _eager(trunk.sequential()[: LAYERS[-1] + 1].double())(x, target.double())[0]
        return loss.detach(), torch.autograd.grad(loss, x)[0]

    def check(self, row: Row, inputs: Inputs) -> dict[str, float]:
        x, target = inputs.leaves
        loss = row.call(x, target)[0]
        (gradient,) = torch.autograd.grad(loss, x)
        exact_loss, exact_gradient = self.exact(x, target)
        tf32 = x.is_cuda and torch.backends.cudnn.conv.fp32_precision == "tf32"  # PyTorch's default
        rounded = HALF if row.ours else RIVAL_HALF
        allowed = rounded if tf32 or "bf16" in row.name else self.allowed
        return {
            "loss": _relative(loss.detach(), exact_loss) / allowed["loss"],
            "gradient": _relative(gradient, exact_gradient) / allowed["gradient"],
        }


class _Cached:
    """The target's features made once, as when one batch serves several steps."""

    def __init__(self, trunk: vaeops.VGGTrunk) -> None:
        self.trunk, self.of, self.cache = trunk, None, None

    def __call__(self, x: Tensor, target: Tensor) -> tuple:
        if self.of is not target:
            self.of, self.cache = target, self.trunk.encode(target, TAPS)
        return (vaeops.perceptual_loss(x, self.cache, self.trunk, taps=TAPS),)


@dataclass(frozen=True)
class WorkshopCase(LossCase):
    """The workshop's own loss: VGG16 with batch norm in training mode, hooks on layers 5 and 15."""

    family: str = "perceptual-workshop"
    allowed: ClassVar = {"loss": 1e-5, "gradient": 5e-3}  # each batch norm rounds once more
    _per_pixel: int = field(default=224_640, repr=False)  # up to conv3_1

    def rows(self, device: torch.device, compiled: bool) -> list[Row]:
        ours = HookPerceptualLoss(trunk=_trunk("vgg16_bn", "fp32", device, "batch"), bn="batch")
        return [
            Row("workshop", _literal_workshop(device)),
            Row(our_impls(device, "perceptual_fwd")[0][0], lambda x, target: (ours(x, target),), ours=True),
        ]

    def exact(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().double().requires_grad_()
        loss = _literal_workshop(x.device, torch.float64)(x, target.double())[0]
        return loss.detach(), torch.autograd.grad(loss, x)[0]


def _literal_workshop(device: torch.device, dtype: torch.dtype = torch.float32) -> Callable[..., tuple]:
    features = _trunk("vgg16_bn", "fp32", device, "batch").sequential().to(dtype).train()
    kept: dict[int, Tensor] = {}
    for i in (5, 15):
        features[i].register_forward_hook(lambda module, inputs, output, i=i: kept.__setitem__(i, output))

    def loss(x: Tensor, target: Tensor) -> tuple:
        features(x)
        ours = dict(kept)
        features(target)
        return (sum(F.mse_loss(ours[i], kept[i], reduction="sum") for i in kept),)

    return loss


@lru_cache(maxsize=1)
def _lpips_trunk(device: torch.device) -> vaeops.VGGTrunk:
    return vaeops.VGGTrunk.random("vgg16", seed=0, input_range=(-1, 1), normalize="imagenet").to(device)


def _lpips_package(device: torch.device) -> nn.Module:
    """The package's own module, its VGG given our weights."""
    package = peers.lpips_module(net="vgg")
    layers = [m for name, part in package.net.named_children() if name.startswith("slice") for m in part]
    weights = [m for m in _lpips_trunk(device).sequential() if isinstance(m, nn.Conv2d)]
    for theirs, ours in zip((m for m in layers if isinstance(m, nn.Conv2d)), weights, strict=True):
        theirs.load_state_dict(ours.state_dict())
    return package.eval().requires_grad_(False).to(device)


@dataclass(frozen=True)
class LPIPSCase(LossCase):
    """LPIPS 0.1 on VGG16 (five taps, down to relu5_3), a batch's mean."""

    family: str = "lpips"
    _per_pixel: int = field(default=611_712, repr=False)

    def rows(self, device: torch.device, compiled: bool) -> list[Row]:
        ours, rows = vaeops.nn.LPIPS(_lpips_trunk(device), "0.1", reduction="mean"), []
        with contextlib.suppress(peers.NotInstalled):
            package = _lpips_package(device)
            rows.append(Row("lpips", lambda x, target: (package(x, target).mean(),)))
        return [
            *rows,
            Row(our_impls(device, "perceptual_fwd")[0][0], lambda x, target: (ours(x, target),), ours=True),
        ]

    def exact(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().double().requires_grad_()
        loss = vaeops.nn.LPIPS(_lpips_trunk(x.device), "0.1", reduction="mean")(x, target.double())
        return loss.detach(), torch.autograd.grad(loss, x)[0]


CASES = [
    LossCase(16, 64),
    LossCase(64, 64),
    LossCase(4, 128),
    LossCase(1, 256),
    LossCase(1, 512),
    LossCase(2, 32, small=True),
    WorkshopCase(16, 64),
    LPIPSCase(4, 256),
]
