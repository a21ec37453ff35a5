"""The distance between two feature maps. Specification: vaeops/ref/perceptual.py."""

import torch

from ...ref import perceptual as ref
from .._autograd import Differentiable
from .._library import define
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


def _fold(tensors, in_dims, size):
    """Maps [V, B, C, h, w] as [V * B, C, h, w]; the linear weights have no vmapped dim."""
    if in_dims[-1] is not None:
        raise ValueError("feature_distance: lin cannot be vmapped")
    folded = []
    for t, dim in zip(tensors[:-1], in_dims):
        t = t.unsqueeze(0).expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
        folded.append(t.flatten(0, 1))
    return *folded, tensors[-1]


def _fold_fwd(info, in_dims, tensors, options, call):
    folded = _fold(tensors, in_dims, info.batch_size)
    return call(options, *folded).unflatten(0, (info.batch_size, -1))


def _fold_bwd(info, in_dims, tensors, options, call):
    grads = call(options, *_fold(tensors, in_dims, info.batch_size))
    return tuple(g.unflatten(0, (info.batch_size, -1)) for g in grads)


DISTANCE = Differentiable("feature_distance_fwd", "feature_distance_bwd", outputs=1, tensors=3, wrt=2,
                          reference=ref.distance_bwd, fold_fwd=_fold_fwd, fold_bwd=_fold_bwd)  # fmt: skip
