"""The distance between two feature maps. Specification: vaeops/ref/perceptual.py."""

import torch
from torch import Tensor

from ...ref import perceptual as ref
from .._autograd import Differentiable
from .._library import check_impl, define
from . import check
from .trunk import triton_kernel


def _fake_fwd(a, b, lin, kind, mean, spatial):
    shape = (a.shape[0], *a.shape[2:]) if spatial else a.shape[:1]
    return a.new_empty(shape, dtype=ref.compute_dtype(a, b))


def _fake_bwd(grad, a, b, lin, kind, mean, spatial):
    return torch.empty_like(a), torch.empty_like(b)


_OPTIONS = "Tensor a, Tensor b, Tensor? lin, int kind, bool mean, bool spatial"
define("feature_distance_fwd", f"({_OPTIONS}) -> Tensor",
       fake=_fake_fwd, ref=ref.distance, triton=triton_kernel("feature_distance_fwd"),
       cuda=False)  # fmt: skip
define("feature_distance_bwd", f"(Tensor grad, {_OPTIONS}) -> (Tensor, Tensor)",
       fake=_fake_bwd, ref=ref.feature_distance_bwd, triton=triton_kernel("feature_distance_bwd"),
       cuda=False)  # fmt: skip


def folded(t: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """[B, ...] with a vmapped dim of `size` (None: none, so it is repeated) as [size * B, ...]."""
    if t is None:
        return None
    return (t.unsqueeze(0).expand(size, *t.shape) if dim is None else t.movedim(dim, 0)).flatten(0, 1)


def _fold(tensors, in_dims, size):
    """The linear weights, the last, have no vmapped dim."""
    if in_dims[-1] is not None:
        raise ValueError("feature_distance: lin cannot be vmapped")
    return *(folded(t, dim, size) for t, dim in zip(tensors[:-1], in_dims)), tensors[-1]


def _fold_fwd(info, in_dims, tensors, options, call):
    folded = _fold(tensors, in_dims, info.batch_size)
    return call(options, *folded).unflatten(0, (info.batch_size, -1))


def _fold_bwd(info, in_dims, tensors, options, call):
    grads = call(options, *_fold(tensors, in_dims, info.batch_size))
    return tuple(g.unflatten(0, (info.batch_size, -1)) for g in grads)


DISTANCE = Differentiable("feature_distance", "feature_distance_fwd", "feature_distance_bwd", outputs=1,
                          tensors=3, wrt=2, reference=ref.distance_bwd,
                          fold_fwd=_fold_fwd, fold_bwd=_fold_bwd)  # fmt: skip


def reduced(values: Tensor, reduction: int) -> Tensor:
    """Losses [B, ...] by the batch's mean (0 for an empty batch) or sum, or as they are."""
    if reduction == 0:
        return values
    total = values.sum()
    return total if reduction == 2 else total / torch.sym_max(values.numel(), 1)


def feature_distance(a: Tensor, b: Tensor, *, kind: str = "mse", lin: Tensor | None = None,
                     spatial: bool = False, reduction: str = "mean",
                     impl: str | None = None) -> Tensor:  # fmt: skip
    """The distance between feature maps a and b, say of `VGGTrunk.features`.

        mse        mean (a - b)^2                                    over C, h, w
        l1         mean |a - b|
        smooth_l1  mean d^2 / 2 where |d| < 1, else |d| - 1/2        d = a - b
        lpips      mean over h, w of sum_c lin_c (u - v)^2           u = a / (|a| + 1e-10), v so of b
        gram       mean (A - B)^2 over C, C                          A = a a^T / (C h w)

    Args:
        a, b: [B, C, h, w], one floating dtype, any strides.
        kind: as above.
        lin: [C], for "lpips" and only there. Gets no gradient.
        spatial: the pixels apart: means over C alone. Not for "gram".
        reduction: "mean": the mean of the images' distances, [] | "sum": every mean above is a sum, and the
            images are summed too, [] | "none": each image's, [B].
            With spatial: [] | [] | [B, 1, h, w].
        impl: None for the device's best, or "ref" | "cpp" | "triton" to force one.

    Returns:
        fp32 (fp64 for fp64), computed so, also under autocast. Gradients of any order to a and b; l1's is 0
        where a = b, that of "lpips" 0 at a pixel whose norm is 0. Saved for backward: a, b, lin. Each image's
        value depends on that image alone, and is the same bits for any number of threads.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is taken; the same under torch.compile.

    Source of "lpips": Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric",
    2018; of "gram": Gatys et al., "Image Style Transfer Using Convolutional Neural Networks", 2016.
    """
    op = "feature_distance"
    check.maps(op, a, b)
    code = check.one_of(op, "kind", kind, ref.DISTANCES)
    reduction_code = check.one_of(op, "reduction", reduction, ref.REDUCTIONS)
    if kind == "lpips":
        lin = check.lin_tensor(op, lin, a.shape[1], a.device)
    elif lin is not None:
        raise ValueError(f"{op}: lin is for kind='lpips', got kind={kind!r}")
    if spatial and kind == "gram":
        raise ValueError(f"{op}: spatial: kind='gram' has no pixels")
    check_impl(op, impl, a, "feature_distance_fwd")
    values = DISTANCE(impl, (code, reduction != "sum", bool(spatial)), a, b, lin)
    return reduced(values.unsqueeze(1) if spatial else values, reduction_code)
