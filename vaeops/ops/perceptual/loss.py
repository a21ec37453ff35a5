"""Perceptual losses and the image gradient in one call. Specification: vaeops/ref/perceptual.py.

The trunk is frozen and no image mixes with another, so the gradient of an image's loss is known when its loss
is: the op makes both, chunk by chunk, and backward only scales.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from ...ref import perceptual as ref
from .._autograd import Once, check_traced
from .._library import check_impl, define, overloads
from . import check
from .distance import DISTANCE, folded, reduced
from .features import Cut, TargetCache, cached_maps, features
from .trunk import triton_kernel


def _fake_fwd(x, target, target_maps, weights, packed, lin, layers, taps, pixels, target_pixels, head_tap,
              head_kind, head_weight, mean, algorithm, want_grad):  # fmt: skip
    losses = x.new_empty((len(head_tap), x.shape[0]), dtype=ref.compute_dtype(x, *weights))
    return losses, x.new_empty(x.shape) if want_grad else None


define("perceptual_fwd",
       "(Tensor x, Tensor? target, Tensor[] target_maps, Tensor[] weights, Tensor packed, Tensor[] lin,"
       " int[] layers, int[] taps, float[] pixels, float[] target_pixels, int[] head_tap, int[] head_kind,"
       " float[] head_weight, bool mean, int algorithm, bool want_grad) -> (Tensor, Tensor)",
       fake=_fake_fwd, ref=ref.perceptual_fwd, triton=triton_kernel("perceptual_fwd"),
       cuda=False)  # fmt: skip
_PERCEPTUAL = overloads("perceptual_fwd")

_TAPS = ("relu2_1", "relu3_3")
_MOST_HEADS = 64  # kVggHeads of csrc/vaeops.h


@dataclass(frozen=True, eq=False)
class Term:
    """weight * sum over taps of weights[tap] * distance: one loss of several that share a run of the trunk.

    kind, taps, weights, lin: as in `perceptual_loss`.
    """

    kind: str
    taps: Sequence[str | int]
    weights: Sequence[float] | None = None
    lin: Sequence[Tensor] | None = None
    weight: float = 1.0


# What a call is less its tensors: (impl, target maps, linear weights, *options), the options being
# (layers, taps, pixels, target_pixels, head_tap, head_kind, head_weight, mean, algorithm). Tensors follow as
# (x, target or None, packed, *target maps, *linear weights, *weights).


def _run(static: tuple, x: Tensor, target: Tensor | None, packed: Tensor, tensors: Sequence[Tensor],
         want_grad: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(each image's weighted loss [B], its gradient where wanted)."""
    impl, maps, lin, *options = static
    target_maps, lins, weights = tensors[:maps], tensors[maps : maps + lin], tensors[maps + lin :]
    losses, gx = _PERCEPTUAL[impl](x, target, target_maps, weights, packed, lins, *options, want_grad)
    return weighted(losses, options[6]), gx


def weighted(losses: Sequence[Tensor] | Tensor, weights: Sequence[float]) -> Tensor:
    """sum_i weights_i losses[i], in this order."""
    terms = [loss if weight == 1 else weight * loss for loss, weight in zip(losses, weights)]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


class KnownGradient(Function):
    """(value [] or [B], gx [B, 3, H, W]) of (how, link, x, *tensors), made together: backward only scales.

    link: x in the gradient's graph, for a second derivative to run into; None: it is not looked for.
    """

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output[1], inputs[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.count = len(inputs)

    @staticmethod
    def backward(ctx, g, _):
        gx, link = ctx.saved_tensors
        out = None if g is None else (gx * g.view(-1, 1, 1, 1)).to(gx.dtype)
        if out is not None and torch.is_grad_enabled() and link is not None:
            out = Once.apply("perceptual_loss", out, g, link)
        return None, None, out, *[None] * (ctx.count - 3)


class _Traced(KnownGradient):
    """Of (static, link, x, target, packed, *tensors)."""

    @staticmethod
    def forward(static, link, x, target, packed, *tensors):
        return _run(static, x, target, packed, tensors, True)


class _Full(_Traced):
    """The same with forward mode, which torch.compile does not take."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        _Traced.setup_context(ctx, inputs, output)
        ctx.save_for_forward(output[1])

    @staticmethod
    def jvp(ctx, static, link, x, *others):
        if x is None or any(t is not None for t in others):
            raise NotImplementedError("perceptual_loss: forward mode serves x alone, not the target, nor lin")
        (gx,) = ctx.saved_for_forward
        return (gx * x).to(torch.promote_types(gx.dtype, torch.float32)).sum((1, 2, 3)), None

    @staticmethod
    def vmap(info, in_dims, static, link, x, target, packed, *tensors):
        """The vmapped dim is more images."""
        _, _, x_dim, target_dim, _, *dims = in_dims
        maps = static[1]
        if any(dim is not None for dim in dims[maps:]):
            raise ValueError("perceptual_loss: lin cannot be vmapped")
        x, target = folded(x, x_dim, info.batch_size), folded(target, target_dim, info.batch_size)
        made = [folded(t, dim, info.batch_size) for t, dim in zip(tensors[:maps], dims)]
        outputs = _Full.apply(static, x[:0].clone(), x, target, packed, *made, *tensors[maps:])
        return tuple(t.unflatten(0, (info.batch_size, -1)) for t in outputs), (0, 0)


def _attached(static: tuple, x: Tensor, target: Tensor | None, packed: Tensor, tensors: Sequence[Tensor],
              want_grad: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`_run`, with a graph to x where x wants one."""
    if torch.compiler.is_compiling():
        check_traced("perceptual_loss")
        if torch.is_grad_enabled() and x.requires_grad:
            return _Traced.apply(static, None, x, target, packed, *tensors)
    elif (
        (torch.is_grad_enabled() and x.requires_grad)
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
    ):
        return _Full.apply(static, x[:0].clone(), x, target, packed, *tensors)
    return _run(static, x.detach(), None if target is None else target.detach(), packed, tensors, want_grad)


def _heads(op: str, trunk: Any, terms: Sequence[Term]) -> tuple[Cut, tuple, list[Tensor]]:
    """The trunk cut for all terms; each distance's tap (a position), kind and weight; lpips' weights."""
    codes = [check.taps(op, trunk.arch, term.taps) for term in terms]
    cut = trunk.cut_at(tuple(sorted({code for taps in codes for code in taps})))
    heads, lin = [], []
    for term, taps in zip(terms, codes):
        kind = check.one_of(op, "kind", term.kind, ref.DISTANCES)
        scale = check.number(op, "weight", term.weight)
        if term.kind == "lpips":
            lin += check.lin(op, term.lin, [cut.channels(tap) for tap in taps], trunk.device)
        elif term.lin is not None:
            raise ValueError(f"{op}: lin is for kind='lpips', got kind={term.kind!r}")
        for tap, weight in zip(taps, check.weights(op, "weights", term.weights, len(taps))):
            heads.append((cut.taps.index(tap), kind, scale * weight))
    if len(heads) > _MOST_HEADS:
        raise ValueError(f"{op}: terms: at most {_MOST_HEADS} distances in one call, got {len(heads)}")
    return cut, tuple(zip(*heads)), lin


def _targets(op: str, x: Tensor, target: Any, trunk: Any,
             cut: Cut) -> tuple[Tensor | None, list[Tensor]]:  # fmt: skip
    """(target image, target maps): one of them there, checked against x."""
    if not isinstance(target, TargetCache):
        if not isinstance(target, Tensor):
            got = type(target).__name__
            raise TypeError(f"{op}: target must be an image or a TargetCache, got {got}")
        check.image(op, "target", target)
        check.same_image(op, x, target)
        wide = target.dtype is torch.float64 and not (x.dtype is torch.float64 or cut.fp64)
        return (target.float() if wide else target), []
    return None, cached_maps(op, x, target, trunk, cut)


def perceptual_loss(x: Tensor, target: Tensor | TargetCache, trunk: Any, *,
                    taps: Sequence[str | int] = _TAPS, kind: str = "mse",
                    weights: Sequence[float] | None = None, lin: Sequence[Tensor] | None = None,
                    terms: Sequence[Term] | None = None, reduction: str = "mean", return_grad: bool = False,
                    impl: str | None = None) -> Any:  # fmt: skip
    """The distance of two images' features in a frozen VGG, and its gradient, made in the same call.

        loss_b = sum over taps of weights[tap] * D(features_tap(x_b), features_tap(target_b))
    D as in `feature_distance`. With `terms`, the sum over terms of term.weight * the same.

    Args:
        x: [B, 3, H, W], any floating dtype and strides, values in the trunk's input range; or uint8, 0 to 255
            whatever the range, which has no gradient. H and W are at least 2^(pools down to the deepest tap).
        target: an image of x's size, of any such dtype; or the trunk's `encode` of it.
        trunk: VGGTrunk, on x's device.
        taps: names ("conv3_1" before the ReLU, "relu3_1" after it, "pool3") or indices into torchvision's
            `features`, in the net's order.
        kind: "mse" | "l1" | "smooth_l1" | "lpips" | "gram".
        weights: a number for each tap; None: 1.
        lin: for "lpips": a tensor [K] for each tap; gets no gradient.
        terms: several losses from one run of the trunk, instead of kind, weights and lin (and of taps); their
            taps are at most 64 together.
        reduction: "mean": the batch's mean, [] | "sum": its sum, and each D a sum instead of a mean, [] |
            "none": [B].
        return_grad: also the gradient of the returned loss (of its sum, for "none") with respect to x.
        impl: None for the device's best, or "ref" | "cpp" | "triton" to force one.

    Returns:
        loss, or (loss, gradient [B, 3, H, W] in x's dtype, detached). Losses are fp32, also under autocast.
        With x, or the trunk, in fp64 the reference runs in fp64.
        Gradients go to x, to the target, or to both. Saved for backward: the gradient of the one that needs
        it (fp32 for fp16, so that a gradient scaler's factor comes before the rounding); where both do, what
        `VGGTrunk.features` and `feature_distance` save. On a CPU the kernels take some images at a time, so
        memory does not grow with B. Each image's loss and gradient depend on that image alone: in the C++
        kernels they are the same bits for any batch and number of threads, on CUDA the same but for
        rounding, since cuDNN chooses its algorithm by the batch. NaN and Inf stay in their image. A trunk
        with bn="batch" mixes the images of a batch by intention: in the C++ kernels their loss is the same
        bits for any number of threads, and backward keeps each convolution's output.
        In fp32 rounding can turn a ReLU or a pool over, as in PyTorch's own fp32. The tests
        (tests/test_perceptual.py) hold the image gradient within 2e-3 of fp64's, relative in L2, and within
        1e-5 where fp64 takes the ReLUs and pools of the run; a turned one costs more on a small image.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is taken; the same under torch.compile.
        RuntimeError: on double backward; in forward mode, for a tangent of anything but x.

    Source: Johnson et al., "Perceptual Losses for Real-Time Style Transfer and Super-Resolution", 2016.
    """
    op = "perceptual_loss"
    check.image(op, "x", x)
    check.trunk(op, trunk, x.device)
    if terms is None:
        terms = (Term(kind, taps, weights, lin),)
    else:
        check.terms(op, terms, Term, kind == "mse" and weights is None and lin is None and taps == _TAPS)
    reduction_code = check.one_of(op, "reduction", reduction, ref.REDUCTIONS)
    cut, heads, lins = _heads(op, trunk, terms)
    check.deep_enough(op, x, cut.layers)
    image, maps = _targets(op, x, target, trunk, cut)
    impl = check.double(op, impl, x.dtype is torch.float64 or cut.fp64)
    check_impl(op, impl, x, "perceptual_fwd")
    if return_grad and x.dtype is torch.uint8:
        raise TypeError(f"{op}: return_grad: x is uint8, which has no gradient")

    if cut.norms:
        check.scalar(op, reduction, return_grad)
        check.several_values(op, x, cut.layers)

    def fused(ours: Tensor, theirs: Tensor | None) -> tuple[Tensor, Tensor]:
        pixels = cut.pixels(ours.dtype), cut.pixels(torch.float32 if theirs is None else theirs.dtype)
        static = (impl, len(maps), len(lins), cut.layers, cut.taps, *pixels, *heads, mean, cut.algorithm)
        if ours.dtype is torch.float16:
            ours = ours.float()  # the gradient is kept before it is scaled, which fp16 has no room for
        return _attached(static, ours, theirs, cut.packed(impl), (*maps, *lins, *cut.weights), return_grad)

    mean, gx = reduction != "sum", None
    wants_target = torch.is_grad_enabled() and image is not None and image.requires_grad
    if cut.norms or (wants_target and x.requires_grad):
        value = _by_maps(cut, heads, lins, x, image, maps, mean, impl)
    elif image is not None and wants_target:
        value = fused(image, x)[0]  # every distance is symmetric
    else:
        value, gx = fused(x, image)
    loss = reduced(value, reduction_code)
    if not return_grad:
        return loss
    gx = (fused(x.detach(), image)[1] if gx is None else gx).detach()
    gx = gx / torch.sym_max(gx.shape[0], 1) if reduction == "mean" else gx
    return loss, gx.to(x.dtype)


def _by_maps(cut: Cut, heads: tuple, lins: Sequence[Tensor], x: Tensor, image: Tensor | None,
             maps: Sequence[Tensor], mean: bool, impl: str | None) -> Tensor:  # fmt: skip
    """Each image's weighted loss [B] by way of the maps, whose graphs reach x and the target image."""
    ours = features(cut, x, impl)
    theirs = maps if image is None else features(cut, image, impl)
    remaining = iter(lins)
    losses = []
    for tap, kind, _ in zip(*heads):
        lin = next(remaining) if kind == ref.DISTANCES.index("lpips") else None
        a, b = ours[tap], theirs[tap].to(ours[tap].dtype)
        losses.append(DISTANCE(impl, (kind, mean, False), a, b, lin))
    return weighted(losses, heads[2])
