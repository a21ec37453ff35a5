"""A frozen VGG that perceptual losses look through."""

import copy
import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.perceptual import check
from ..ops.perceptual.features import Cut, TargetCache, trunk_features
from ..ref import perceptual as ref
from . import vgg_weights

_LOG = logging.getLogger("vaeops")
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class VGGTrunk(nn.Module):
    """The convolutions of a VGG, frozen: plain tensors, which are no parameters and no buffers.

    So optimizers, checkpoints and DistributedDataParallel do not see them. `.to()` moves them; they stay fp32
    (`precision` decides how they are used) unless `.double()`, which makes a trunk for the reference in fp64.
    `.train()` changes nothing. Copies, deep ones too, share the tensors; the trunk pickles. Share one trunk
    among all losses: each depth that is used holds packed weights beside it.

    Make one by `from_state_dict`, `from_file` or `random`.

    Args:
        arch: "vgg11" | "vgg13" | "vgg16" | "vgg19", or with "_bn".
        weights: of each convolution, in order: weight [K, C, 3, 3], bias [K]; with "_bn" also its batch
            norm's weight, bias, running_mean and running_var. fp32 ones are not copied: leave them as they
            are. (`from_state_dict` copies.)
        bn: of an arch with batch norm: "fold" (the default): the running statistics, folded into the
            convolutions in fp64 | "batch": the statistics of each batch that comes, as in training mode; the
            images of a batch then mix, and a loss must be "mean" or "sum".
        input_range: (lo, hi) of the images' values. uint8 images are 0 to 255 whatever it is.
        normalize: "imagenet": (u - mean) / std of torchvision's channels, u = (p - lo) / (hi - lo) | None:
            the images enter as they are | (mean, std): three numbers each, for u. Exact at the borders: what
            is padded is the normalised image.
        precision: "fp32" | "bf16": bf16 products with fp32 sums, where the device multiplies bf16 faster; on
            a CPU without AMX the fp32 kernels serve it, which are faster and more exact there. Maps are bf16.
        winograd: fp32 convolutions by Winograd's F(4x4, 3x3), which rounds a little more; False: directly.

    Attributes: the arguments, but weights; `device`, `dtype`, `checksum` (SHA-256 of the weights, with
    bn="fold" of the folded ones), `identity` (of arch, weights, input range and normalization, which tell
    whose features a TargetCache holds).
    """

    def __init__(self, arch: str, weights: Sequence[Tensor], *, bn: str | None = None,
                 input_range: tuple[float, float] = (-1.0, 1.0),
                 normalize: str | tuple[Sequence[float], Sequence[float]] | None = "imagenet",
                 precision: str = "fp32", winograd: bool = True) -> None:  # fmt: skip
        super().__init__()
        _check_arch(arch)
        self.arch, self.bn = arch, _bn(arch, bn)
        self.input_range, self.normalize = _range(input_range), normalize
        check.one_of("VGGTrunk", "precision", precision, ("fp32", "bf16"))
        self.precision, self.winograd = precision, bool(winograd)
        self._constants = _pixels(self.input_range, normalize)
        named = dict(zip((key for key, _ in vgg_weights.layout(arch)), weights))
        # A list that is too short or too long fails by its names too.
        named |= {f"weights[{i}]": w for i, w in enumerate(weights) if i >= len(named)}
        checked = vgg_weights.from_state_dict(named, arch)
        self._weights = [w.detach().float().contiguous() for w in checked]
        folds = self.bn == "fold"
        self._folded = vgg_weights.folded(self._weights) if folds else self._weights
        self._cuts: dict[tuple[int, ...], Cut] = {}
        self._packs: dict[Any, Tensor] = {}
        self.identity = hashlib.sha256(repr((arch, self._constants, self.checksum)).encode()).hexdigest()

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor], arch: str, **options: Any) -> "VGGTrunk":
        """From torchvision's `state_dict` of a VGG or of its `features`; options as the class takes them.

        Strict: missing, surplus and misshapen entries are listed in one ValueError. The classifier's are
        left out.
        """
        _check_arch(arch)
        return cls(arch, [w.clone() for w in vgg_weights.from_state_dict(state_dict, arch)], **options)

    @classmethod
    def from_file(cls, path: str | Path | None, arch: str, *, download: bool = False,
                  **options: Any) -> "VGGTrunk":  # fmt: skip
        """From a file; its checksum goes to the logger "vaeops".

        Args:
            path: .pth or .pt (loaded with weights_only=True), .safetensors or .npz, of torchvision's names;
                .npz also of "conv1_1_W" and "conv1_1_b"; .h5 of Keras' VGG16 and VGG19. Keras trained on BGR
                images less a mean: the first convolution is turned to take RGB, and the right normalisation
                is normalize=((123.68 / 255, 116.779 / 255, 103.939 / 255), (1 / 255, 1 / 255, 1 / 255)).
                None with download=True: torchvision's default weights, through torchvision.
            download: without it nothing is ever fetched.
        """
        _check_arch(arch)
        if path is not None and download:
            raise ValueError("VGGTrunk: download: give path=None with download=True")
        if path is None and not download:
            raise ValueError("VGGTrunk: path is None; give a file, or download=True")
        state_dict = vgg_weights.download(arch) if path is None else vgg_weights.from_file(path, arch)
        trunk = cls.from_state_dict(state_dict, arch, **options)
        _LOG.info("%s from %s: sha256 %s", arch, path or "torchvision", trunk.checksum)
        return trunk

    @classmethod
    def random(cls, arch: str, seed: int, **options: Any) -> "VGGTrunk":
        """He normal weights, the same for the same seed: for tests and measurements."""
        _check_arch(arch)
        return cls(arch, vgg_weights.random(arch, seed), **options)

    def features(self, x: Tensor, taps: Sequence[str | int], *, impl: str | None = None) -> list[Tensor]:
        """The maps [B, K, h, w] of x [B, 3, H, W] at the taps; x and taps as in `vaeops.perceptual_loss`.

        Channels_last strides; fp32 (bf16 for precision="bf16", fp64 for fp64), also under autocast. Gradient
        to x; saved for backward: x, a bit for each element before a ReLU and two for each pooled one. Double
        backward raises. With bn="batch", each convolution's output is saved.
        """
        return trunk_features("VGGTrunk.features", self, x, taps, impl)

    @torch.inference_mode(False)  # a graph may keep the maps for backward
    @torch.no_grad()
    def encode(self, x: Tensor, taps: Sequence[str | int], *, impl: str | None = None) -> TargetCache:
        """The maps of a target, kept for several losses; no graph.

        The loss is the same, to the bit, but for precision="bf16" on a CPU without AMX: there the kernels
        compute in fp32, and what is kept is rounded to bf16.
        """
        return TargetCache(trunk_features("VGGTrunk.encode", self, x, taps, impl), taps, self.identity)

    def prepare(self, taps: Sequence[str | int], *, impl: str | None = None) -> "VGGTrunk":
        """Packs the weights down to the last tap now, instead of at the first use; returns the trunk."""
        self.cut(taps).packed(impl)
        return self

    def cut(self, taps: Sequence[str | int]) -> Cut:
        """What the ops take of the trunk down to the last tap."""
        return self.cut_at(check.taps("VGGTrunk", self.arch, taps))

    def cut_at(self, codes: tuple[int, ...]) -> Cut:
        """`cut` for taps that are codes."""
        if codes not in self._cuts:
            layers = ref.ARCHS[self.arch.removesuffix("_bn")][: codes[-1] // 2 + 1]
            convolutions = sum(bool(channels) for channels in layers)
            weights, norms = self._folded[: 2 * convolutions], []
            if self.bn == "batch":
                each = [self._weights[6 * i : 6 * i + 6] for i in range(convolutions)]
                weights = [t for six in each for t in six[:2]]
                norms = [t for six in each for t in six[2:4]]
            algorithm = 2 if self.precision == "bf16" else 0 if self.winograd else 1
            self._cuts[codes] = Cut(layers, codes, tuple(weights), algorithm, self._constants, tuple(norms),
                                    vgg_weights.NORM_EPS, self._packs)  # fmt: skip
        return self._cuts[codes]

    def sequential(self) -> nn.Sequential:
        """The same net in PyTorch: torchvision's whole `features` with copies of the weights, frozen."""
        layers: list[nn.Module] = []
        channels, rest = 3, iter(self._weights)
        for out in ref.ARCHS[self.arch.removesuffix("_bn")]:
            if not out:
                layers.append(nn.MaxPool2d(2))
                continue
            made: list[nn.Module] = [nn.Conv2d(channels, out, 3, padding=1)]
            if self.bn is not None:
                made.append(nn.BatchNorm2d(out, vgg_weights.NORM_EPS))
            with torch.no_grad():
                for part in made:
                    part.to(self.device, self.dtype)
                    norm = isinstance(part, nn.BatchNorm2d)
                    for name in vgg_weights.NORM_PARTS if norm else vgg_weights.PARTS:
                        getattr(part, name).copy_(next(rest))
            layers += [*made, nn.ReLU(inplace=True)]
            channels = out
        return nn.Sequential(*layers).requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        return self._weights[0].device

    @property
    def dtype(self) -> torch.dtype:
        return self._weights[0].dtype

    @cached_property
    def checksum(self) -> str:
        digest = hashlib.sha256()
        for w in self._folded:
            digest.update(w.float().cpu().numpy().tobytes())
        return digest.hexdigest()

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        weights, shared = moved(self._weights, fn), self._folded is self._weights
        if all(new is old for new, old in zip(weights, self._weights)):
            return self
        self._weights, self._folded = weights, weights if shared else moved(self._folded, fn)
        self._cuts, self._packs = {}, {}
        return self

    def __deepcopy__(self, memo: dict) -> "VGGTrunk":
        tensors = (*self._weights, *self._folded, *self._packs.values())
        memo.update({id(t): t for t in tensors})
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def __getstate__(self) -> dict:
        """Packed weights belong to this machine."""
        return self.__dict__ | {"_cuts": {}, "_packs": {}}

    def extra_repr(self) -> str:
        options = f"bn={self.bn!r}, input_range={self.input_range}, normalize={self.normalize!r}"
        return f"{self.arch!r}, {options}, precision={self.precision!r}, winograd={self.winograd}"


def moved(weights: Sequence[Tensor], fn: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Where a module's `_apply` takes its tensors; to fp64 with them, but not below fp32.

    `fn` sees none of the weights: that of `to_empty` would lose what no checkpoint brings back.
    """
    like = fn(weights[0].new_empty(0))
    dtype = like.dtype if like.dtype in (torch.float32, torch.float64) else weights[0].dtype
    return [w.to(like.device, dtype) for w in weights]


def _check_arch(arch: str) -> None:
    check.one_of("VGGTrunk", "arch", arch, (*ref.ARCHS, *(f"{name}_bn" for name in ref.ARCHS)))


def _bn(arch: str, bn: str | None) -> str | None:
    if not arch.endswith("_bn"):
        if bn is not None:
            raise ValueError(f"VGGTrunk: bn={bn!r}, but {arch} has no batch norm")
        return None
    if bn not in (None, "fold", "batch"):
        raise ValueError(f"VGGTrunk: bn must be 'fold' or 'batch', got {bn!r}")
    return bn or "fold"


def _range(value: Any) -> tuple[float, float]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"VGGTrunk: input_range must be two numbers (lo, hi), got {value!r}")
    lo, hi = (check.number("VGGTrunk", "input_range", v) for v in value)
    if not lo < hi:
        raise ValueError(f"VGGTrunk: input_range must have lo < hi, got {value!r}")
    return lo, hi


def _pixels(input_range: tuple[float, float], normalize: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, mean, mean, rstd, rstd, rstd) of floating-point images, and of uint8 images."""
    lo, hi = input_range
    if normalize is None:  # uint8 images are brought to the range
        scale = 255 / (hi - lo)
        return (0.0, 0.0, 0.0, 1.0, 1.0, 1.0), (*[-lo * scale] * 3, *[1 / scale] * 3)
    if normalize == "imagenet":
        normalize = _IMAGENET
    if not isinstance(normalize, (tuple, list)) or len(normalize) != 2:
        raise ValueError(f"VGGTrunk: normalize must be 'imagenet', None or (mean, std), got {normalize!r}")
    for part in normalize:
        if not isinstance(part, Sequence) or isinstance(part, str) or len(part) != 3:
            raise ValueError(f"VGGTrunk: normalize must hold three means and three stds, got {normalize!r}")
    mean, std = ([check.number("VGGTrunk", "normalize", v) for v in part] for part in normalize)
    if not all(s > 0 and math.isfinite(1 / s) for s in std):
        raise ValueError(f"VGGTrunk: normalize: stds must be > 0, got {std}")

    def pixels(lo: float, span: float) -> tuple[float, ...]:
        return *(lo + m * span for m in mean), *(1 / (s * span) for s in std)

    return pixels(lo, hi - lo), pixels(0.0, 255.0)
