"""The maps of a frozen trunk, differentiable in the image, and what an op takes of a trunk.

Backward needs no activations: a bit for each ReLU and two for each pooled element are kept. Batch norm on the
statistics of the batch needs them: the convolutions' outputs are kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ... import _native
from ...ref import perceptual as ref
from .._autograd import Once, check_traced, forward_mode
from .._library import check_impl
from . import check
from .trunk import BATCHNORM_BWD, BATCHNORM_FWD, FEATURES_BWD, FEATURES_FWD, PACK


@dataclass(frozen=True, eq=False)
class Cut:
    """A trunk up to its last tap, as the ops take it. Letters as in vaeops/ref/perceptual.py.

    layers, taps, algorithm: as there.
    weights: [w0, b0, ...]; batch norm folded in, unless `norms` is there.
    norms: [weight, bias, ...] of the batch norm after each convolution, which takes the batch's statistics.
    constants: `pixels` of floating-point images, and of uint8 images.
    packs: packed weights by what was packed, shared by all cuts of a trunk.
    """

    layers: tuple[int, ...]
    taps: tuple[int, ...]
    weights: tuple[Tensor, ...]
    algorithm: int
    constants: tuple[tuple[float, ...], tuple[float, ...]]
    norms: tuple[Tensor, ...] = ()
    norm_eps: float = 1e-5
    packs: dict[Any, Tensor] = field(default_factory=dict)

    def pixels(self, dtype: torch.dtype) -> tuple[float, ...]:
        return self.constants[dtype is torch.uint8]

    @property
    def fp64(self) -> bool:
        return self.weights[0].dtype is torch.float64

    def channels(self, tap: int) -> int:
        """K of the map at a tap."""
        return next(k for k in self.layers[tap // 2 :: -1] if k)

    def packed(self, impl: str | None) -> Tensor:
        """All weights, packed by `impl`: once for each depth."""
        # bf16 is packed for the instruction set that is to multiply it.
        key = impl, self.layers, _native.isa() if self.algorithm == 2 else None
        if key in self.packs:
            return self.packs[key]
        with torch.inference_mode(False), torch.no_grad():  # a graph may keep it for backward
            made = PACK[impl](self.weights, self.layers, self.algorithm)
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            made = torch.func.debug_unwrap(made)  # it outlives the transform
        if type(made) is Tensor:  # and not what an export calculates with
            self.packs[key] = made
        return made


class _Features(Function):
    """(*maps, saved) of (static, x, packed, *weights)."""

    @staticmethod
    def forward(static, x, packed, *weights):
        impl, layers, taps, pixels, algorithm = static
        maps, saved = FEATURES_FWD[impl](x, weights, packed, layers, taps, pixels, algorithm, True)
        return *maps, saved

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.static, *tensors = inputs
        ctx.save_for_backward(output[-1], *tensors)
        ctx.mark_non_differentiable(output[-1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *grads):
        impl, layers, taps, pixels, algorithm = ctx.static
        saved, x, packed, *weights = ctx.saved_tensors
        nothing = (None,) * (1 + len(weights))
        grads = grads[:-1]
        if all(g is None for g in grads):
            return None, None, *nothing
        gx = FEATURES_BWD[impl](grads, x, weights, packed, saved, layers, taps, pixels, algorithm)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            gx = Once.apply("VGGTrunk.features", gx, x, *grads)
        return None, gx, *nothing


class _BatchFeatures(Function):
    """(*maps, *kept, stats) of (static, x, packed, *weights, *norms); kept: an output of each convolution."""

    @staticmethod
    def forward(static, x, packed, *tensors):
        impl, convolutions, *options = static
        weights, norms = tensors[: 2 * convolutions], tensors[2 * convolutions :]
        maps, kept, stats = BATCHNORM_FWD[impl](x, weights, norms, packed, *options, True)
        return *maps, *kept, stats

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.static, *tensors = inputs
        ctx.taps = len(ctx.static[3])
        ctx.save_for_backward(*output[ctx.taps :], *tensors)
        ctx.mark_non_differentiable(*output[ctx.taps :])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *grads):
        impl, convolutions, *options = ctx.static
        saved = iter(ctx.saved_tensors)
        kept, (stats, x, packed), weights, norms = (
            [*islice(saved, n)] for n in (convolutions, 3, 2 * convolutions, 2 * convolutions)
        )
        nothing = (None,) * (1 + 4 * convolutions)
        grads = grads[: ctx.taps]
        if all(g is None for g in grads):
            return None, None, *nothing
        gx = BATCHNORM_BWD[impl](grads, x, weights, norms, packed, kept, stats, *options)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            gx = Once.apply("VGGTrunk.features", gx, x, *grads)
        return None, gx, *nothing


def features(cut: Cut, x: Tensor, impl: str | None) -> list[Tensor]:
    """The maps of x at the taps of the cut, with a graph where x asks for one."""
    packed, where = cut.packed(impl), (cut.layers, cut.taps, cut.pixels(x.dtype))
    check_traced("VGGTrunk.features")
    graph = forward_mode() or (torch.is_grad_enabled() and x.requires_grad)
    if cut.norms:
        options = (*where, cut.norm_eps, cut.algorithm)
        if graph:
            static = (impl, len(cut.weights) // 2, *options)
            return list(_BatchFeatures.apply(static, x, packed, *cut.weights, *cut.norms)[: len(cut.taps)])
        return BATCHNORM_FWD[impl](x.detach(), cut.weights, cut.norms, packed, *options, False)[0]
    if graph:
        return list(_Features.apply((impl, *where, cut.algorithm), x, packed, *cut.weights)[:-1])
    return FEATURES_FWD[impl](x.detach(), cut.weights, packed, *where, cut.algorithm, False)[0]


class TargetCache:
    """The maps of a target, made once by `VGGTrunk.encode`: constants, without a graph.

    Args:
        maps: [B, K, h, w] a tap; fp32, or bf16 (fp64 for fp64).
        taps: their names or indices, as `VGGTrunk.encode` took them.
        identity: `VGGTrunk.identity` of the trunk that made them. A loss takes it with a trunk of the same
            weights, input range and normalization only.

    `len(cache)` is B, `cache[2:5]`, `cache[[0, 3]]` and `cache[mask]` are caches of some images,
    `cache.to(...)` moves it or makes it bf16.
    """

    def __init__(self, maps: Sequence[Tensor], taps: Sequence[str | int], identity: str) -> None:
        if len(maps) != len(taps) or not maps:
            raise ValueError(f"TargetCache: one map a tap is needed, got {len(maps)} maps, {len(taps)} taps")
        self.maps, self.taps, self.identity = tuple(m.detach() for m in maps), tuple(taps), identity

    def to(self, *args: Any, **kwargs: Any) -> "TargetCache":
        return TargetCache([m.to(*args, **kwargs) for m in self.maps], self.taps, self.identity)

    def __len__(self) -> int:
        return self.maps[0].shape[0]

    def __getitem__(self, which: Any) -> "TargetCache":
        if isinstance(which, int):
            if not -len(self) <= which < len(self):
                raise IndexError(f"TargetCache: image {which} of {len(self)}")
            which = slice(which, which + 1 or None)
        return TargetCache([m[which] for m in self.maps], self.taps, self.identity)

    def __repr__(self) -> str:
        return f"TargetCache({len(self)} images, taps={self.taps})"


def cached_maps(op: str, x: Tensor, target: TargetCache, trunk: Any, cut: Cut) -> list[Tensor]:
    """Those of the taps of the cut, checked against x and the trunk."""
    if target.identity != trunk.identity:
        raise ValueError(
            f"{op}: target was encoded by another trunk ({target.identity[:8]}) than this {trunk.arch} "
            f"({trunk.identity[:8]}): other weights, input_range or normalize"
        )
    made = dict(zip(check.taps(op, trunk.arch, target.taps), target.maps))
    missing = [tap for tap in cut.taps if tap not in made]
    if missing:
        names = ref.tap_names(trunk.arch, missing)
        raise ValueError(f"{op}: target was encoded at {target.taps}, {', '.join(names)} is missing")
    maps = [made[tap] for tap in cut.taps]
    check.target_maps(op, x, maps, ref.map_shapes(x, cut.layers, cut.taps), cut.fp64)
    return maps


def trunk_features(
    op: str, trunk: Any, x: Tensor, taps: Sequence[str | int], impl: str | None
) -> list[Tensor]:
    """`VGGTrunk.features` and `.encode`: checks, then the maps."""
    check.image(op, "x", x)
    check.trunk(op, trunk, x.device)
    cut = trunk.cut(taps)
    check.deep_enough(op, x, cut.layers)
    if cut.norms:
        check.several_values(op, x, cut.layers)
    impl = check.double(op, impl, x.dtype is torch.float64 or cut.fp64)
    check_impl(op, impl, x, "vgg_features_fwd")
    return features(cut, x, impl)
