"""log N(x; mu, sigma^2), reduced, in one pass each way. Specification: vaeops/ref/gaussian.py."""

import torch
from torch import Tensor

from ...ref import gaussian as ref
from .._autograd import Differentiable
from .._library import check_impl, define
from . import check
from .reparam_kl import example_weights, per_example, to_front, triton_kernel


def _fake_log_prob_fwd(x, mu, rho, param, reduction, batch_ndim):
    return x.new_empty(ref.reduced_shape(x.shape, reduction, batch_ndim), dtype=ref.compute_dtype(x.dtype))


def _fake_log_prob_bwd(grad, x, mu, rho, param, reduction, batch_ndim):
    return torch.empty_like(x), torch.empty_like(mu), torch.empty_like(rho)


def _ref_log_prob_bwd(grad, *tensors_and_options):
    grads = ref.log_prob_bwd(grad, *tensors_and_options)
    return tuple(torch.empty_like(t).copy_(g) for g, t in zip(grads, tensors_and_options))


define("gaussian_log_prob_fwd",
       "(Tensor x, Tensor mu, Tensor rho, int param, int reduction, int batch_ndim) -> Tensor",
       fake=_fake_log_prob_fwd, ref=ref.log_prob_fwd, triton=triton_kernel("log_prob_fwd"))  # fmt: skip
define("gaussian_log_prob_bwd",
       "(Tensor grad, Tensor x, Tensor mu, Tensor rho, int param, int reduction, int batch_ndim)"
       " -> (Tensor, Tensor, Tensor)",
       fake=_fake_log_prob_bwd, ref=_ref_log_prob_bwd, triton=triton_kernel("log_prob_bwd"))  # fmt: skip


def _fold_fwd(info, in_dims, tensors, options, call):
    x, mu, rho = (to_front(t, d, info.batch_size) for t, d in zip(tensors, in_dims))
    param, reduction, batch_ndim = options
    out = call((param, per_example(reduction), batch_ndim + 1), x, mu, rho)
    return ref.finish_per_example(out, x.shape[1:], reduction, batch_ndim)


def _fold_bwd(info, in_dims, tensors, options, call):
    grad, x, mu, rho = (to_front(t, d, info.batch_size) for t, d in zip(tensors, in_dims))
    param, reduction, batch_ndim = options
    grad = example_weights(grad, x.shape, reduction, batch_ndim)
    return call((param, per_example(reduction), batch_ndim + 1), grad, x, mu, rho)


_log_prob = Differentiable("gaussian_log_prob", "gaussian_log_prob_fwd", "gaussian_log_prob_bwd", outputs=1,
                           tensors=3, wrt=3, reference=ref.log_prob_bwd,
                           fold_fwd=_fold_fwd, fold_bwd=_fold_bwd)  # fmt: skip


def gaussian_log_prob(x: Tensor, mu: Tensor, logvar: Tensor, *, param: str = "logvar",
                      reduction: str = "sample", batch_ndim: int = 1,
                      impl: str | None = None) -> Tensor:  # fmt: skip
    """Log-density of x under a diagonal Gaussian, in nats.

        log N(x; mu, sigma^2) = -(((x - mu) / sigma)^2 + log sigma^2 + log 2 pi) / 2

    Args:
        x, mu, logvar: [*B, *E], B the first `batch_ndim` dims; one floating dtype; broadcast together; any
            strides.
        param: what `logvar` is: "logvar" = log sigma^2, "logstd" = log sigma, "std" = sigma.
        reduction: "none" [*B, *E] | "dim" [*E], mean over the batch | "sample" [*B], sum over a sample (the
            joint density) | "batchmean" [] | "mean" [] | "sum" [].
        batch_ndim, impl: as in `reparam_kl`.

    Returns:
        fp32 (fp64 for fp64). Gradients to x, mu and logvar. Saved for backward: the three inputs.
        Deterministic as `reparam_kl`.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is taken; the same under torch.compile.
    """
    op = "gaussian_log_prob"
    mu, logvar = check.pair(op, "mu", "logvar", mu, logvar)
    x, mu = check.pair(op, "x", "mu", x, mu)
    if logvar.shape != mu.shape:
        logvar = logvar.expand_as(mu)
    _, param_code, _, _, reduction_code, _, _ = check.options(
        op, mu, 0, param, None, reduction, batch_ndim, 1.0
    )
    check_impl(op, impl, mu)
    return _log_prob(impl, (param_code, reduction_code, batch_ndim), x, mu, logvar)


def gaussian_nll(x: Tensor, mu: Tensor, logvar: Tensor, *, param: str = "logvar",
                 reduction: str = "batchmean", batch_ndim: int = 1,
                 impl: str | None = None) -> Tensor:  # fmt: skip
    """Minus the log-density of x under a diagonal Gaussian with a deviation of its own for every element.

        (((x - mu) / sigma)^2 + log sigma^2 + log 2 pi) / 2

    It is a reconstruction loss: the decoder gives mu and logvar. With one fixed deviation for all,
    `recon_loss(..., "gaussian_nll", scale=sigma)` reads less.

    Args:
        x, mu, logvar, param, reduction, batch_ndim, impl: as in `gaussian_log_prob`.

    Returns:
        -gaussian_log_prob(...), in fp32 (fp64 for fp64). Gradients to x, mu and logvar.
    """
    return -gaussian_log_prob(
        x, mu, logvar, param=param, reduction=reduction, batch_ndim=batch_ndim, impl=impl
    )
