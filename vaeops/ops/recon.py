"""Reconstruction losses, reduced, in one pass over the elements each way, and the ELBO made of them.

Specification: vaeops/ref/recon.py. The multinomial likelihood is a pair of ops of its own: its forward keeps
two numbers a sample, from which backward makes the softmax again.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..ref import gaussian, recon as ref
from ..ref.recon import KINDS, MULTINOMIAL_REDUCTIONS, SCALED
from ._autograd import Differentiable
from ._library import check_impl, define
from .gaussian import LatentOutput
from .gaussian.check import FLOATS
from .gaussian.reparam_kl import example_weights, per_example, to_front


def _triton(name: str) -> Callable:
    def launch(*args):
        from ..kernels import recon

        return getattr(recon, name)(*args)

    return launch


def _fake_recon_fwd(pred, target, weight, kind, scale, reduction, batch_ndim):
    shape = gaussian.reduced_shape(pred.shape, reduction, batch_ndim)
    return pred.new_empty(shape, dtype=gaussian.compute_dtype(pred.dtype))


def _fake_recon_bwd(grad, pred, *_):
    return torch.empty_like(pred)


def _ref_recon_bwd(grad, pred, *args):
    return torch.empty_like(pred).copy_(ref.recon_bwd(grad, pred, *args))


def _fake_multinomial_fwd(logits, target, weight):
    rows = logits.new_empty(logits.shape[:1], dtype=gaussian.compute_dtype(logits.dtype))
    return rows, torch.empty_like(rows, dtype=torch.float64), torch.empty_like(rows)


def _ref_multinomial_bwd(grad, logits, *args):
    return torch.empty_like(logits).copy_(ref.multinomial_bwd(grad, logits, *args))


_TENSORS = "Tensor pred, Tensor target, Tensor? weight"
_OPTIONS = "int kind, float scale, int reduction, int batch_ndim"
# Triton first until a GPU has measured both: its kernel is compiled for the kind and the types of a call.
define("recon_fwd", f"({_TENSORS}, {_OPTIONS}) -> Tensor",
       fake=_fake_recon_fwd, ref=ref.recon_fwd, triton=_triton("recon_fwd"), triton_first=True)  # fmt: skip
define("recon_bwd", f"(Tensor grad, {_TENSORS}, {_OPTIONS}) -> Tensor",
       fake=_fake_recon_bwd, ref=_ref_recon_bwd, triton=_triton("recon_bwd"), triton_first=True)  # fmt: skip
define("multinomial_fwd", "(Tensor logits, Tensor target, Tensor? weight) -> (Tensor, Tensor, Tensor)",
       fake=_fake_multinomial_fwd, ref=ref.multinomial_fwd, triton=_triton("multinomial_fwd"),
       triton_first=True)  # fmt: skip
define("multinomial_bwd",
       "(Tensor grad, Tensor logits, Tensor target, Tensor? weight, Tensor lse, Tensor total) -> Tensor",
       fake=_fake_recon_bwd, ref=_ref_multinomial_bwd, triton=_triton("multinomial_bwd"),
       triton_first=True)  # fmt: skip


def _fold_tensors(info, in_dims, tensors):
    pred, target = (to_front(t, d, info.batch_size) for t, d in zip(tensors[:2], in_dims))
    return pred, target, to_front(tensors[2], in_dims[2], info.batch_size, pred.dim())


def _fold_fwd(info, in_dims, tensors, options, call):
    kind, scale, reduction, batch_ndim = options
    pred, *others = _fold_tensors(info, in_dims, tensors)
    out = call((kind, scale, per_example(reduction), batch_ndim + 1), pred, *others)
    return gaussian.finish_per_example(out, pred.shape[1:], reduction, batch_ndim)


def _fold_bwd(info, in_dims, tensors, options, call):
    kind, scale, reduction, batch_ndim = options
    pred, *others = _fold_tensors(info, in_dims[1:], tensors[1:])
    grad = example_weights(
        to_front(tensors[0], in_dims[0], info.batch_size), pred.shape, reduction, batch_ndim
    )
    return call((kind, scale, per_example(reduction), batch_ndim + 1), grad, pred, *others)


_elementwise = Differentiable("recon_loss", "recon_fwd", "recon_bwd", outputs=1, tensors=3, wrt=1,
                              reference=ref.recon_bwd, fold_fwd=_fold_fwd, fold_bwd=_fold_bwd)  # fmt: skip


def _fold_rows(info, in_dims, tensors):
    """[R, D] tensors and [R] vectors, some with a vmapped dim V, as [V R, D] and [V R]."""
    pred, target, weight = _fold_tensors(info, in_dims, tensors)
    if weight is not None:
        weight = weight.expand(pred.shape).flatten(0, 1)
    rest = (to_front(t, d, info.batch_size).flatten() for t, d in zip(tensors[3:], in_dims[3:]))
    return pred.flatten(0, 1), target.flatten(0, 1), weight, *rest


def _fold_multinomial_fwd(info, in_dims, tensors, options, call):
    results = call(options, *_fold_rows(info, in_dims, tensors))
    return tuple(r.unflatten(0, (info.batch_size, -1)) for r in results)


def _fold_multinomial_bwd(info, in_dims, tensors, options, call):
    grad = to_front(tensors[0], in_dims[0], info.batch_size).flatten()
    gradient = call(options, grad, *_fold_rows(info, in_dims[1:], tensors[1:]))
    return gradient.unflatten(0, (info.batch_size, -1))


_multinomial = Differentiable("recon_loss", "multinomial_fwd", "multinomial_bwd", outputs=3, kept=2,
                              tensors=3, wrt=1, reference=ref.multinomial_bwd_of_inputs,
                              fold_fwd=_fold_multinomial_fwd, fold_bwd=_fold_multinomial_bwd)  # fmt: skip


def recon_loss(pred: Tensor, target: Tensor, kind: str, *, reduction: str = "batchmean", batch_ndim: int = 1,
               scale: float | None = None, weight: Tensor | None = None, mask: Tensor | None = None,
               impl: str | None = None) -> Tensor:  # fmt: skip
    r"""Minus the log-likelihood of a reconstruction, or a distance in its place, reduced.

    Per element, with p = pred, t = target, s = scale:
        "bce"                   -(t log p + (1 - t) log(1 - p))       p a probability; no logarithm below -100
        "bce_logits"            max(p, 0) - p t + log1p(exp(-|p|))    p its logit; the right infinity costs 0
        "mse", "half_mse"       (p - t)^2, (p - t)^2 / 2
        "l1"                    |p - t|                               gradient 0 at 0
        "huber"                 d^2 / 2 where d = |p - t| <= s, else s (d - s / 2)
        "gaussian_nll"          ((p - t) / s)^2 / 2 + log s + log(2 pi) / 2
        "laplace_nll"           |p - t| / s + log(2 s)
        "discretized_logistic"  -log(F(t + h) - F(t - h))             F logistic of mean p, scale s; h = 1/510
    and of a whole sample, p its logits over items and t their counts:
        "multinomial"           (sum t) logsumexp(p) - sum t p        up to a constant in t
    A discretized level is half of 1/255 wide to each side; the lowest (t < h) reaches down to -inf, the
    highest (t > 1 - h) up to +inf. A sample without counts has multinomial loss 0.

    Args:
        pred: [*B, *E], B the first `batch_ndim` dims; fp32, bf16, fp16 or fp64; any strides.
        target: broadcastable to pred; any floating dtype, uint8 (t / 255, an 8-bit image; for "multinomial"
            the counts themselves) or bool (0 and 1). Never copied to pred's dtype. Gets no gradient.
        kind: one of the above.
        reduction: "none" [*B, *E] | "dim" [*E], mean over the batch | "sample" [*B], sum over a sample |
            "batchmean" [], sum over all / number of samples | "mean" [], over all elements, masked ones
            included, | "sum" []. "multinomial": "sample", "batchmean", "sum".
        scale: s > 0, default 1; for the kinds that name it.
        weight: None, or a floating tensor broadcastable to pred: multiplies an element's loss, that is, for
            "multinomial", its count. An element of weight 0 is not looked at. Gets no gradient.
        mask: None, or a bool tensor broadcastable to pred. Where False the element counts for nothing,
            whatever it holds (NaN, too), and its gradient is 0; a multinomial's item leaves the softmax. For
            the mean over the mask: `recon_loss(..., mask=mask, reduction="sum") / mask.sum()`.
        impl: None for the device's best, or "ref" | "cpp" | "triton" | "cuda" to force one.

    Returns:
        fp32 (fp64 for fp64 pred), shaped by `reduction`. The gradient of pred is in its dtype and memory
        format ("multinomial" of more than two dims: row-major). Saved for backward: pred, target, weight or
        mask; for "multinomial" two numbers a sample more, and no softmax. Deterministic: bit-equal from run
        to run and for any thread count.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is taken; the same under torch.compile.

    Source: multinomial: Liang et al., "Variational Autoencoders for Collaborative Filtering", 2018;
    discretized logistic: Salimans et al., "PixelCNN++", 2017.
    """
    op = "recon_loss"
    _check_pred(op, pred, target)
    _check_options(op, pred, kind, reduction, batch_ndim, scale)
    for name, tensor in (("weight", weight), ("mask", mask)):
        if tensor is not None:
            _check_weight(op, name, tensor, pred)
    check_impl(op, impl, pred, "multinomial_fwd" if kind == "multinomial" else "recon_fwd")
    if target.shape != pred.shape:
        target = target.expand(pred.shape)
    if mask is not None:
        target, weight = ref.combined(target, weight, mask, kind)
    code = gaussian.REDUCTIONS.index(reduction)
    if kind != "multinomial":
        options = KINDS.index(kind), 1.0 if scale is None else float(scale), code, batch_ndim
        return _elementwise(impl, options, pred, target, weight)
    batch = pred.shape[:batch_ndim]
    if pred.dim() != 2 or batch_ndim != 1:
        weight = None if weight is None else _rows(weight.expand(pred.shape), batch_ndim)
        pred, target = _rows(pred, batch_ndim), _rows(target, batch_ndim)
    nll = _multinomial(impl, (), pred, target, weight)[0]
    if reduction == "sample":
        return nll.view(batch)
    return nll.sum() if reduction == "sum" else nll.sum() / torch.sym_max(nll.shape[0], 1)


def _rows(x: Tensor, batch_ndim: int) -> Tensor:
    """[*B, *E] as [R, D]"""
    x = x.flatten(batch_ndim)
    return x.flatten(0, batch_ndim - 1) if batch_ndim else x.unsqueeze(0)


def _check_pred(op: str, pred: Tensor, target: Tensor) -> None:
    for name, x in (("pred", pred), ("target", target)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    if pred.dtype not in FLOATS:
        raise TypeError(f"{op}: pred must be float32, bfloat16, float16 or float64, got {pred.dtype}")
    if target.dtype not in (*FLOATS, torch.uint8, torch.bool):
        raise TypeError(f"{op}: target must be floating point, uint8 or bool, got {target.dtype}")
    _check_broadcast(op, "target", target, pred)


def _check_broadcast(op: str, name: str, x: Tensor, pred: Tensor) -> None:
    if x.device != pred.device:
        raise ValueError(f"{op}: {name} is on {x.device}, it must be on pred's device {pred.device}")
    if x.dim() > pred.dim() or any(s not in (1, p) for s, p in zip(x.shape[::-1], pred.shape[::-1])):
        raise ValueError(f"{op}: {name} {list(x.shape)} does not broadcast to pred {list(pred.shape)}")
    if x.requires_grad:
        raise ValueError(f"{op}: {name} gets no gradient; pass {name}.detach()")


def _check_weight(op: str, name: str, x: Tensor, pred: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be None or a tensor, got {type(x).__name__}")
    takes = (torch.bool,) if name == "mask" else FLOATS
    if x.dtype not in takes:
        what = "bool" if name == "mask" else "floating point (a bool one is a mask=)"
        raise TypeError(f"{op}: {name} must be {what}, got {x.dtype}")
    _check_broadcast(op, name, x, pred)


def _check_options(
    op: str, pred: Tensor, kind: str, reduction: str, batch_ndim: int, scale: float | None
) -> None:
    if kind not in KINDS:
        raise ValueError(f"{op}: kind must be one of {KINDS}, got {kind!r}")
    multinomial = kind == "multinomial"
    takes = MULTINOMIAL_REDUCTIONS if multinomial else gaussian.REDUCTIONS
    if reduction not in takes:
        of = " for kind='multinomial'" if multinomial else ""
        raise ValueError(f"{op}: reduction must be one of {takes}{of}, got {reduction!r}")
    if not isinstance(batch_ndim, int) or isinstance(batch_ndim, bool):
        raise TypeError(f"{op}: batch_ndim must be an int, got {type(batch_ndim).__name__}")
    most = pred.dim() - multinomial
    if not 0 <= batch_ndim <= most:
        where = f"[0, {most}] for shape {list(pred.shape)}"
        raise ValueError(f"{op}: batch_ndim must be in {where}, got {batch_ndim}")
    if scale is None:
        return
    if kind not in SCALED:
        raise ValueError(f"{op}: kind={kind!r} has no scale (kinds with one: {SCALED}), got {scale!r}")
    if not isinstance(scale, (int, float)) or isinstance(scale, bool):
        raise TypeError(f"{op}: scale must be a float, got {type(scale).__name__}")
    if not 0 < scale < float("inf"):
        raise ValueError(f"{op}: scale must be finite and > 0, got {scale}")


class ElboOutput(NamedTuple):
    """loss = recon + beta * kl, and its two terms, all of one shape: [*B] or []."""

    loss: Tensor
    recon: Tensor
    kl: Tensor


def elbo(pred: Tensor, target: Tensor, latent: LatentOutput | Tensor, *, kind: str,
         beta: float | Tensor = 1.0, reduction: str = "batchmean", batch_ndim: int = 1,
         scale: float | None = None, weight: Tensor | None = None, mask: Tensor | None = None,
         impl: str | None = None) -> ElboOutput:  # fmt: skip
    """Minus the evidence lower bound: reconstruction plus beta times the KL divergence.

        loss = recon_loss(pred, target, kind) + beta kl

    Args:
        pred, target, kind, reduction, batch_ndim, scale, weight, mask, impl: as in `recon_loss`; reduction is
            "sample" | "batchmean" | "mean" | "sum".
        latent: what `reparam_kl` returned, or its kl, reduced alike: [*B] with reduction="sample", else [].
        beta: the KL's weight; a float, or a 0-d tensor (a `vaeops.nn.KLSchedule`'s).

    Returns:
        ElboOutput(loss, recon, kl): [*B] for "sample", else []. Both terms should count a sample whole
        ("batchmean" twice, say): "mean" divides the reconstruction by its own number of elements, which
        weighs the KL up by as much.

    Raises:
        TypeError, ValueError: naming the argument; also where kl and the reconstruction differ in shape.

    Source: Kingma & Welling, 2014; beta: Higgins et al., "beta-VAE", 2017.
    """
    op = "elbo"
    kl = latent.kl if hasattr(latent, "kl") else latent
    if not isinstance(kl, Tensor):
        raise TypeError(f"{op}: latent must be a LatentOutput or its kl, got {type(latent).__name__}")
    if reduction in ("none", "dim"):
        raise ValueError(f"{op}: reduction must be 'sample' or one that gives a scalar, got {reduction!r}")
    if isinstance(beta, Tensor):
        if beta.dim():
            raise ValueError(f"{op}: beta must be a float or a 0-d tensor, got {list(beta.shape)}")
    elif not isinstance(beta, (int, float)) or isinstance(beta, bool):
        raise TypeError(f"{op}: beta must be a float or a 0-d tensor, got {type(beta).__name__}")
    recon = recon_loss(pred, target, kind, reduction=reduction, batch_ndim=batch_ndim, scale=scale,
                       weight=weight, mask=mask, impl=impl)  # fmt: skip
    if kl.shape != recon.shape:
        raise ValueError(
            f"{op}: kl {list(kl.shape)} and the reconstruction {list(recon.shape)} must have one shape: "
            "reduce both by 'sample', or both to scalars"
        )
    return ElboOutput(recon + beta * kl, recon, kl)
