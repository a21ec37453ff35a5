"""Reconstruction losses' test inputs, the losses as users write them, and their comparison with ours."""

import math

import torch
import torch.nn.functional as F
from budget import assert_within_budget

import vaeops
from vaeops.ref import gaussian, recon as ref

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
TARGETS = {
    "floating": lambda shape: torch.rand(shape),
    "bfloat16": lambda shape: torch.rand(shape).bfloat16(),
    "uint8": lambda shape: torch.randint(0, 256, shape, dtype=torch.uint8),
    "bool": lambda shape: torch.rand(shape) < 0.5,
}


def reductions(kind):
    return ref.MULTINOMIAL_REDUCTIONS if kind == "multinomial" else gaussian.REDUCTIONS


def scale_of(kind):
    return 0.3 if kind in ref.SCALED else None


def make(kind, shape, dtype=torch.float32):
    pred = torch.rand(shape) * 0.96 + 0.02 if kind == "bce" else 2 * torch.randn(shape)
    return pred.to(dtype)


def textbook(pred, target, kind, *, reduction, batch_ndim=1, scale=None, weight=None, mask=None):
    """What a user writes today, in the dtype of the prediction throughout."""
    t = target.to(pred.dtype)
    if target.dtype is torch.uint8 and kind != "multinomial":
        t = t / 255
    if mask is not None:
        weight = mask if weight is None else torch.where(mask, weight, 0)
    weight = torch.ones((), dtype=pred.dtype) if weight is None else weight.to(pred.dtype)
    code = gaussian.REDUCTIONS.index(reduction)
    if kind == "multinomial":
        p = pred if mask is None else pred.masked_fill(~mask, -1e4)
        rows = -(F.log_softmax(p.flatten(batch_ndim), -1) * (t * weight).flatten(batch_ndim)).sum(-1)
        return gaussian.reduce(rows, code, rows.dim())
    s, d = scale, pred - t
    if kind == "discretized_logistic":
        a, b, width = (t + 1 / 510 - pred) / s, (t - 1 / 510 - pred) / s, -math.expm1(-1 / (255 * s))
        inner = F.softplus(-a) + F.softplus(b) - math.log(width)
        loss = torch.where(t < 1 / 510, F.softplus(-a), torch.where(t > 1 - 1 / 510, F.softplus(b), inner))
    else:
        loss = {
            "bce": lambda: -(t * pred.log() + (1 - t) * (1 - pred).log()),
            "bce_logits": lambda: F.binary_cross_entropy_with_logits(pred, t, reduction="none"),
            "mse": lambda: d**2,
            "half_mse": lambda: 0.5 * d**2,
            "l1": lambda: d.abs(),
            "huber": lambda: F.huber_loss(pred, t, delta=s, reduction="none"),
            "gaussian_nll": lambda: 0.5 * (d / s) ** 2 + math.log(s) + 0.5 * math.log(2 * math.pi),
            "laplace_nll": lambda: d.abs() / s + math.log(2 * s),
        }[kind]()
    return gaussian.reduce(loss * weight, code, batch_ndim)


def run(function, pred, target, kind, cotangent, **options):
    """The loss and the gradient of `function` for a fresh leaf."""
    leaf = pred.clone().requires_grad_()
    loss = function(leaf, target, kind, **options)
    loss.backward(cotangent.to(loss.dtype))
    return loss.detach(), leaf.grad


def check_against_reference(impl, kind, shape, dtype, target="floating", *, reduction="sample", batch_ndim=1,
                            weight=None, mask=None):  # fmt: skip
    pred, t = make(kind, shape, dtype), TARGETS[target](shape)
    if target == "floating":
        t = t.to(dtype)
    options = {"reduction": reduction, "batch_ndim": batch_ndim, "scale": scale_of(kind), "weight": weight,
               "mask": mask}  # fmt: skip
    out = gaussian.reduced_shape(pred.shape, gaussian.REDUCTIONS.index(reduction), batch_ndim)
    cotangent = torch.rand(out, dtype=torch.float64) + 0.5
    ours = run(vaeops.recon_loss, pred, t, kind, cotangent, impl=impl, **options)
    exact = run(ref.recon_loss, pred.double(), t, kind, cotangent, **options)
    if dtype is torch.float64:  # the reference has no more digits: what sums of so many may differ by
        for a, b in zip(ours, exact):
            assert float((a - b).abs().max()) <= pred.numel() * torch.finfo(dtype).eps * float(b.abs().max())
        return
    eager = run(textbook, pred, t, kind, cotangent, **options)
    for name, a, b, c, factor in zip(("loss", "d pred"), ours, exact, eager, (2.0, 3.0)):
        assert_within_budget(a, b, c, f"{kind} {name}", factor=factor)
