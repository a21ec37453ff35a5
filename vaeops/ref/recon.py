"""Reconstruction losses in plain PyTorch: what each kernel must compute, on any device, in fp32 or fp64.

Per element, with p = pred, t = target, s = scale:
    bce                   -(t log p + (1 - t) log(1 - p)), no logarithm below -100
    bce_logits            max(p, 0) - p t + log1p(exp(-|p|))
    mse, half_mse         (p - t)^2, and half of it
    l1                    |p - t|
    huber                 d^2 / 2 where d = |p - t| <= s, else s (d - s / 2)
    gaussian_nll          ((p - t) / s)^2 / 2 + log s + log(2 pi) / 2
    laplace_nll           |p - t| / s + log(2 s)
    discretized_logistic  -log(F(t + h) - F(t - h)), F the logistic distribution of mean p, scale s;
                          h = 1/510, lower F = 0 at t < h, upper F = 1 at t > 1 - h
and of a whole sample with counts t:
    multinomial           (sum t) logsumexp(p) - sum t p

An element that is masked out, or weighs 0, is not looked at: its loss and gradient are 0 whatever it holds.
The public functions mirror `vaeops.*`; the `_fwd` and `_bwd` pairs mirror the low-level ops, and each `_bwd`
is itself differentiable, which is what serves double backward.
"""

import math

import torch
from torch import Tensor

from . import gaussian

ELEMENTWISE = (
    "bce", "bce_logits", "mse", "half_mse", "l1", "huber", "gaussian_nll", "laplace_nll",
    "discretized_logistic",
)  # fmt: skip
KINDS = (*ELEMENTWISE, "multinomial")
SCALED = ("huber", "gaussian_nll", "laplace_nll", "discretized_logistic")  # those that read `scale`
MULTINOMIAL_REDUCTIONS = ("sample", "batchmean", "sum")
logsigmoid = torch.nn.functional.logsigmoid
HALF_LEVEL = 1 / 510  # half the distance of two levels of an 8-bit image in [0, 1]


def values(target: Tensor, dtype: torch.dtype) -> Tensor:
    """A target as the loss reads it: an 8-bit image's levels become t / 255."""
    return target.to(dtype) / 255 if target.dtype is torch.uint8 else target.to(dtype)


def _weighted(pred: Tensor, target: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """(p, t, w) in the compute dtype; where w is 0, p and t are harmless."""
    dtype = gaussian.compute_dtype(pred.dtype)
    p, t = pred.to(dtype), values(target, dtype)
    if weight is None:
        return p, t, None
    counts = weight != 0
    return torch.where(counts, p, 0.5), torch.where(counts, t, 0.5), weight.to(dtype)


def _interval(p: Tensor, t: Tensor, s: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ends a > b of the level's interval in units of s; whether F stays below 1, and above 0, at them."""
    return (t + HALF_LEVEL - p) / s, (t - HALF_LEVEL - p) / s, ~(t > 1 - HALF_LEVEL), ~(t < HALF_LEVEL)


def _element(p: Tensor, t: Tensor, kind: str, s: float) -> Tensor:
    if kind == "bce":
        return -(t * p.log().clamp(min=-100) + (1 - t) * torch.log1p(-p).clamp(min=-100))
    if kind == "bce_logits":  # t softplus(-p) + (1 - t) softplus(p); an infinite logit that is right costs 0
        on = torch.where(t == 0, 0.0, -t * logsigmoid(p))
        return on + torch.where(t == 1, 0.0, (t - 1) * logsigmoid(-p))
    if kind == "mse":
        return (p - t).square()
    if kind == "half_mse":
        return (p - t).square() / 2
    d = (p - t).abs()
    if kind == "l1":
        return d
    if kind == "huber":
        near = d.clamp(max=s)
        return near * (d - near / 2)
    if kind == "gaussian_nll":
        return ((p - t) / s).square() / 2 + (math.log(s) + math.log(2 * math.pi) / 2)
    if kind == "laplace_nll":
        return d / s + math.log(2 * s)
    # sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)), and a - b is a constant.
    a, b, below, above = _interval(p, t, s)
    width = math.log(-math.expm1(-2 * HALF_LEVEL / s))
    inner = (above & below).to(p.dtype)
    return -(torch.where(below, logsigmoid(a), 0.0) + torch.where(above, logsigmoid(-b), 0.0) + inner * width)


def _slope(p: Tensor, t: Tensor, kind: str, s: float) -> Tensor:
    """d element / d p"""
    if kind == "bce":
        return (p - t) / (p * (1 - p)).clamp(min=1e-12)
    if kind == "bce_logits":
        return torch.sigmoid(p) - t
    if kind == "mse":
        return 2 * (p - t)
    if kind == "half_mse":
        return p - t
    if kind == "l1":
        return (p - t).sign()
    if kind == "huber":
        return (p - t).clamp(-s, s)
    if kind == "gaussian_nll":
        return (p - t) / s / s
    if kind == "laplace_nll":
        return (p - t).sign() / s
    a, b, below, above = _interval(p, t, s)
    return (torch.where(below, torch.sigmoid(-a), 0.0) - torch.where(above, torch.sigmoid(b), 0.0)) / s


def _elements(pred: Tensor, target: Tensor, weight: Tensor | None, kind: int, scale: float) -> Tensor:
    p, t, w = _weighted(pred, target, weight)
    element = _element(p, t, KINDS[kind], scale)
    return element if w is None else element * w


def recon_fwd(pred, target, weight, kind, scale, reduction, batch_ndim):
    return gaussian.reduce(_elements(pred, target, weight, kind, scale), reduction, batch_ndim).contiguous()


def recon_bwd(grad, pred, target, weight, kind, scale, reduction, batch_ndim):
    p, t, w = _weighted(pred, target, weight)
    g = gaussian.spread(grad, pred.shape, reduction, batch_ndim) * _slope(p, t, KINDS[kind], scale)
    return (g if w is None else g * w).to(pred.dtype)


def _counts(logits: Tensor, target: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Logits and weighted counts in the compute dtype; an item that a mask leaves out has logit -inf."""
    dtype = gaussian.compute_dtype(logits.dtype)
    x, t = logits.to(dtype), target.to(dtype)
    if weight is None:
        return x, t
    if weight.dtype is torch.bool:
        return torch.where(weight, x, -math.inf), torch.where(weight, t, 0.0)
    return x, t * weight.to(dtype)


def multinomial_fwd(logits, target, weight):
    """(nll, logsumexp, sum of counts) of each row [R]. A row without counts costs 0.

    logsumexp is in fp64: backward takes it from logits of its own size, which leaves little of its digits.
    """
    x, t = _counts(logits, target, weight)
    total = t.sum(-1)
    top = x.detach().amax(-1) if x.shape[-1] else torch.zeros_like(total)
    top = torch.where(top.isfinite(), top, 0.0)
    lse = top.double() + (x - top.unsqueeze(-1)).logsumexp(-1).double()
    drawn = torch.where(t == 0, 0.0, t * torch.where(t == 0, 0.0, x)).sum(-1)
    nll = torch.where(total == 0, 0.0, total.double() * lse) - drawn.double()
    return nll.to(x.dtype), lse, total


def multinomial_bwd(grad, logits, target, weight, lse, total):
    """d logits = grad (total softmax(logits) - counts)"""
    x, t = _counts(logits, target, weight)
    total, lse = total.unsqueeze(-1), torch.where(lse == -math.inf, 0.0, lse).unsqueeze(-1)
    high = lse.to(x.dtype)
    low = torch.where(high.isfinite(), lse - high, 0.0).to(x.dtype)
    expected = torch.where(total == 0, 0.0, total * (x - high - low).exp())
    g = grad.unsqueeze(-1) * (expected - t)
    if weight is not None and weight.dtype is torch.bool:
        g = torch.where(weight, g, 0.0)
    return g.to(logits.dtype)


def multinomial_bwd_of_inputs(grad, logits, target, weight, *_):
    """The same as a function of its inputs alone: lse moves with the logits."""
    _, lse, total = multinomial_fwd(logits, target, weight)
    return multinomial_bwd(grad, logits, target, weight, lse, total)


def combined(target: Tensor, weight: Tensor | None, mask: Tensor | None,
             kind: str) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(target, weight) with the mask taken into either."""
    if mask is None or weight is None:
        return target, weight if mask is None else mask
    if kind != "multinomial":
        return target, torch.where(mask, weight, 0.0)
    # There a weight is of the counts alone; a mask also takes its item out of the softmax.
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return target.to(dtype) * weight.to(dtype), mask


def recon_loss(pred, target, kind, *, reduction="batchmean", batch_ndim=1, scale=None, weight=None, mask=None,
               impl=None) -> Tensor:  # fmt: skip
    """Reference of `vaeops.recon_loss`: same arguments, differentiable PyTorch throughout."""
    gaussian.only_ref(impl)
    target, weight = combined(target.expand(pred.shape), weight, mask, kind)
    if kind != "multinomial":
        return recon_fwd(pred, target, weight, KINDS.index(kind), 1.0 if scale is None else scale,
                         gaussian.REDUCTIONS.index(reduction), batch_ndim)  # fmt: skip
    if weight is not None:
        weight = weight.expand(pred.shape).flatten(batch_ndim)
    nll, _, _ = multinomial_fwd(pred.flatten(batch_ndim), target.flatten(batch_ndim), weight)
    return gaussian.reduce(nll, gaussian.REDUCTIONS.index(reduction), nll.dim())
