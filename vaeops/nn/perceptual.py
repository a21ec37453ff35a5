"""Perceptual losses as layers: what to compare is set once, behind `vaeops.perceptual_loss`."""

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.perceptual import TargetCache, Term, check, feature_distance, perceptual_loss
from ..ops.perceptual.features import cached_maps
from ..ops.perceptual.loss import KnownGradient
from ._graph import Captured
from .vgg import VGGTrunk, moved

TAPS = ("relu2_1", "relu3_3")
LPIPS_TAPS = ("relu1_2", "relu2_2", "relu3_3", "relu4_3", "relu5_3")
STYLE_TAPS = ("relu1_2", "relu2_2", "relu3_3", "relu4_3")
VERSIONS = ("0.1", "0.0")


class _Replayed(KnownGradient):
    """Of (call, link, x, *target)."""

    @staticmethod
    def forward(call, link, x, *target):
        return call(x, *target)


class PerceptualLoss(nn.Module):
    """The distance of two images' features in a frozen VGG: `vaeops.perceptual_loss` and its settings.

        loss_b = sum over taps of weights[tap] * D(features_tap(x_b), features_tap(target_b))

        loss = PerceptualLoss(VGGTrunk.from_file("vgg16.pth"))
        total = recon + 0.1 * loss(decoded, image)            # image: or loss.encode(image), made once

    Args:
        trunk: a VGGTrunk; several losses may share it. It knows the images' range.
        taps, kind, weights, lin, terms, reduction, impl: as in `vaeops.perceptual_loss`.
        cuda_graph: on CUDA, capture the kernels of a call and replay them for the next ones of the same
            shapes and dtypes (at most 8 sets of them, each of which keeps its memory): for small images,
            whose kernels run faster than Python launches them. Results are the same. A call inside another
            capture or under torch.compile is not captured; a call with CPU tensors is an error, and so is
            one where x and the target both need a gradient.

    Shapes: x [B, 3, H, W]; target the same, or a TargetCache; -> [] or, for reduction="none", [B]. fp32.

    State: none. The trunk and `lin` are plain tensors that move with the module: no parameters, no buffers,
    nothing in the state_dict. `.train()` changes nothing, `.half()` and `.bfloat16()` leave them fp32.
    """

    def __init__(self, trunk: VGGTrunk, *, taps: Sequence[str | int] = TAPS, kind: str = "mse",
                 weights: Sequence[float] | None = None, lin: Sequence[Tensor] | None = None,
                 terms: Sequence[Term] | None = None, reduction: str = "mean", cuda_graph: bool = False,
                 impl: str | None = None) -> None:  # fmt: skip
        super().__init__()
        op = type(self).__name__
        check.trunk(op, trunk)
        if terms is None:
            terms = (Term(kind, taps, weights, lin),)
        else:
            check.terms(op, terms, Term, kind == "mse" and weights is None and lin is None and taps == TAPS)
        self.trunk, self.reduction, self.impl, self.terms = trunk, reduction, impl, tuple(terms)
        self.captured = Captured() if cuda_graph else None
        self.taps = _in_order(trunk, self.terms)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.terms = tuple(replace(t, lin=t.lin and moved(t.lin, fn)) for t in self.terms)
        if self.captured is not None:
            self.captured.clear()
        return self

    def encode(self, target: Tensor) -> TargetCache:
        """The target's features, without a graph: for a target that is compared with more than once."""
        return self.trunk.encode(target, self.taps)

    def forward(self, x: Tensor, target: Tensor | TargetCache) -> Any:
        return self._loss(x, target, self.reduction)

    def extra_repr(self) -> str:
        terms = "; ".join(f"{t.kind} at {', '.join(map(str, t.taps))}" for t in self.terms)
        return f"{terms}, reduction={self.reduction!r}"

    def _loss(self, x: Tensor, target: Tensor | TargetCache, reduction: str) -> Tensor:
        if self.captured is not None:
            if isinstance(x, Tensor) and x.device.type != "cuda":
                name = type(self).__name__
                raise ValueError(f"{name}: cuda_graph=True needs CUDA tensors, x is on {x.device}")
            if Captured.possible():
                return self._replayed(self.captured, x, target, reduction)
        return perceptual_loss(x, target, self.trunk, terms=self.terms, reduction=reduction, impl=self.impl)

    def _replayed(
        self, captured: Captured, x: Tensor, target: Tensor | TargetCache, reduction: str
    ) -> Tensor:
        needs_target = isinstance(target, Tensor) and target.requires_grad and torch.is_grad_enabled()
        needs_x = x.requires_grad and torch.is_grad_enabled()
        if needs_target and needs_x:
            raise ValueError(
                f"{type(self).__name__}: cuda_graph=True serves a gradient to x or to the target, not to both"
            )
        if needs_target:
            assert isinstance(target, Tensor)
            x, target = target, x  # every distance is symmetric
        wants = needs_x or needs_target
        if wants and x.dtype is torch.float16:
            x = x.float()  # as in perceptual_loss
        cached = (target.taps, target.identity) if isinstance(target, TargetCache) else None
        cut = self.trunk.cut(self.taps)  # a trunk that moves makes other cuts

        def call(x: Tensor, *target: Tensor) -> tuple[Tensor, ...]:
            to = target[0] if cached is None else TargetCache(target, *cached)
            out = perceptual_loss(x, to, self.trunk, terms=self.terms, reduction=reduction, return_grad=wants,
                                  impl=self.impl)  # fmt: skip
            return out if wants else (out,)

        def replay(x: Tensor, *target: Tensor) -> tuple[Tensor, ...]:
            return tuple(captured((cut, cached, wants, reduction), call, x, *target))

        maps = target.maps if isinstance(target, TargetCache) else (target.detach(),)
        return (_Replayed.apply(replay, x[:0].clone(), x, *maps) if wants else replay(x, *maps))[0]


class StyleLoss(PerceptualLoss):
    """The distance of two images' Gram matrices, which hold which features go together, but not where.

        G = F F^T / (C h w)    [C, C], F [C, h w] the features at a tap
        loss_b = sum over taps of weights[tap] * mean (G(x_b) - G(target_b))^2

    Args: as of `PerceptualLoss`; reduction="sum" takes the sum over C, C, and over the batch.

    Source: Gatys, Ecker & Bethge, "Image Style Transfer Using Convolutional Neural Networks", 2016; Johnson
    et al., 2016, whose normalization by C h w this is.
    """

    def __init__(self, trunk: VGGTrunk, taps: Sequence[str | int] = STYLE_TAPS, *,
                 weights: Sequence[float] | None = None, reduction: str = "mean", cuda_graph: bool = False,
                 impl: str | None = None) -> None:  # fmt: skip
        super().__init__(trunk, taps=taps, kind="gram", weights=weights, reduction=reduction,
                         cuda_graph=cuda_graph, impl=impl)  # fmt: skip


class LPIPS(PerceptualLoss):
    """Learned perceptual similarity: unit feature vectors, their difference weighed by linear layers.

        d_b = sum over taps of mean over h, w of sum_c lin_c (u_c - v_c)^2      u = f(x) / (|f(x)| + 1e-10)
    v so of the target. A pixel whose features are all zero has gradient zero, not NaN.

    Args:
        trunk: a VGGTrunk of VGG16, with the input range of your images. The weights of version "0.1" were
            fitted with normalize="imagenet", those of "0.0" with normalize=None and input_range=(-1, 1);
            asked for by name, they refuse another trunk.
        lin: the linear layers: "0.1" or "0.0" of the installed lpips package (which is not imported); the
            path of such a file; tensors [K], one a tap; or None: all ones.
        taps: the maps that are compared.
        spatial: each pixel's distance instead of their mean, each tap's upsampled to H x W (bilinear).
        reduction: "none" | "mean" | "sum", of the values [B]. Each image's distance stays the mean over its
            pixels whatever the reduction.
        cuda_graph: as in `PerceptualLoss`; not with spatial or per_layer.

    Shapes: [B, 3, H, W] twice -> [B], or [] by reduction; spatial [B, 1, H, W]. per_layer=True returns
    (value, [each tap's part of it]). Spatial and per-layer values run the trunk on both images and keep what
    `VGGTrunk.features` keeps; the plain value is the fused `vaeops.perceptual_loss`, which says how exact the
    image gradient is in fp32.

    Source: Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", 2018.
    """

    def __init__(self, trunk: VGGTrunk, lin: Sequence[Tensor] | str | Path | None = "0.1", *,
                 taps: Sequence[str | int] = LPIPS_TAPS, spatial: bool = False, reduction: str = "none",
                 cuda_graph: bool = False, impl: str | None = None) -> None:  # fmt: skip
        check.trunk("LPIPS", trunk)
        if trunk.bn == "batch":
            raise ValueError("LPIPS: trunk: bn='batch' mixes the images, give one with bn='fold'")
        cut = trunk.cut(taps)
        channels = [cut.channels(tap) for tap in cut.taps]
        if isinstance(lin, str) and lin in VERSIONS:
            _check_trunk(trunk, lin)
        if lin is None:
            lin = [torch.ones(c) for c in channels]
        elif isinstance(lin, (str, Path)):
            lin = read_linear("LPIPS", lin, channels)
        like = cut.weights[0]
        lin = [w.detach().to(like.device, like.dtype) for w in lin]
        if reduction not in ("none", "mean", "sum"):
            raise ValueError(f"LPIPS: reduction must be one of ('none', 'mean', 'sum'), got {reduction!r}")
        if spatial and cuda_graph:
            raise ValueError("LPIPS: cuda_graph=True is for the plain value, not for spatial=True")
        super().__init__(trunk, taps=taps, kind="lpips", lin=lin, reduction=reduction, cuda_graph=cuda_graph,
                         impl=impl)  # fmt: skip
        self.spatial = spatial

    def forward(self, x: Tensor, target: Tensor | TargetCache, per_layer: bool = False) -> Any:
        if not (self.spatial or per_layer):
            return self._reduced(self._loss(x, target, "none"))
        if self.captured is not None:
            raise ValueError("LPIPS: cuda_graph=True is for the plain value, not for per_layer=True")
        ours = self.trunk.features(x, self.taps)
        if isinstance(target, TargetCache):
            theirs = cached_maps("LPIPS", x, target, self.trunk, self.trunk.cut(self.taps))
        else:
            check.image("LPIPS", "target", target)
            check.same_image("LPIPS", x, target)
            theirs = self.trunk.features(target, self.taps)
        size = x.shape[2:] if self.spatial else None
        parts = layer_distances(ours, theirs, self.terms[0].lin or (), size, self.impl)
        parts = [self._reduced(p) for p in parts]
        value = torch.stack(parts).sum(0)
        return (value, parts) if per_layer else value

    def _reduced(self, value: Tensor) -> Tensor:
        return (
            value if self.reduction == "none" else value.mean() if self.reduction == "mean" else value.sum()
        )


def layer_distances(ours: Sequence[Tensor], theirs: Sequence[Tensor], lin: Sequence[Tensor],
                    size: Sequence[int] | None, impl: str | None) -> list[Tensor]:  # fmt: skip
    """LPIPS of each tap's maps: [B], or upsampled to `size` [B, 1, H, W]."""
    parts = [feature_distance(a, b.to(a.dtype), kind="lpips", lin=w, spatial=size is not None,
                              reduction="none", impl=impl)
             for a, b, w in zip(ours, theirs, lin)]  # fmt: skip
    if size is None:
        return parts
    return [F.interpolate(p, size=tuple(size), mode="bilinear", align_corners=False) for p in parts]


def read_linear(op: str, source: str | Path, channels: Sequence[int], net: str = "vgg") -> list[Tensor]:
    """The linear layers [K] of LPIPS, from a file of the lpips package, or of its version "0.1" or "0.0"."""
    if source in VERSIONS:
        spec = importlib.util.find_spec("lpips")  # finds the files without running the package
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(
                f"{op}: the linear weights of version {source} are read from the lpips package, which is not "
                "installed; give the path of its file, or tensors"
            )
        source = Path(spec.submodule_search_locations[0], "weights", f"v{source}", f"{net}.pth")
    given = torch.load(source, map_location="cpu", weights_only=True)
    wanted = {f"lin{i}.model.1.weight": (1, c, 1, 1) for i, c in enumerate(channels)}
    missing, extra = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    if missing or extra:
        raise ValueError(f"{op}: {source}: missing {missing or 'nothing'}, unknown {extra or 'nothing'}")
    for name, shape in wanted.items():
        if given[name].shape != shape:
            raise ValueError(f"{op}: {source}: {name} must be {list(shape)}, got {list(given[name].shape)}")
    return [given[name].float().flatten() for name in wanted]


def _check_trunk(trunk: VGGTrunk, version: str) -> None:
    fits = trunk.normalize == "imagenet" if version == "0.1" else trunk.normalize is None
    if not fits or (version == "0.0" and tuple(trunk.input_range) != (-1, 1)):
        wanted = "'imagenet'" if version == "0.1" else "None and input_range=(-1, 1)"
        raise ValueError(
            f"LPIPS: version {version} needs a trunk with normalize={wanted}, this one has "
            f"normalize={trunk.normalize!r} and input_range={tuple(trunk.input_range)}"
        )


def _in_order(trunk: VGGTrunk, terms: Sequence[Term]) -> tuple[str | int, ...]:
    """All terms' taps in the net's order, each once."""
    names = {code: tap for term in terms for code, tap in zip(trunk.cut(term.taps).taps, term.taps)}
    return tuple(names[code] for code in sorted(names))
