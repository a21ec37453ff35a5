"""The Gaussian step: sample and KL of a diagonal Gaussian, in one pass over the elements each way.

Kernels read mu and rho (what `param` says: log-variance, log-deviation or deviation) once, make the noise
again in backward instead of storing it, and return the KL already reduced. Formulas: vaeops/ref/gaussian.py,
the specification.
"""

from collections.abc import Callable
from typing import overload

import torch
from torch import Tensor

from ...ref import gaussian as ref
from ...ref.gaussian import NO_KL, LatentOutput
from .._autograd import Differentiable
from .._library import check_impl, define
from . import check

# One op serves mu and rho as two tensors, or packed in one: `q` holds both halves along packed_dim, no rho.
_TENSORS = "Tensor q, Tensor? rho, Tensor? prior_mu, Tensor? prior_rho, Tensor? seed, Tensor? eps"
_OPTIONS = (
    "int packed_dim, int param, float clamp_lo, float clamp_hi, "
    "int reduction, int batch_ndim, float temperature"
)


def _halves(q: Tensor, rho: Tensor | None, packed_dim: int) -> Tensor:
    return q if rho is not None else q.narrow(packed_dim, 0, q.shape[packed_dim] // 2)


def _fake_fwd(
    q, rho, prior_mu, prior_rho, seed, eps, packed_dim, param, lo, hi, reduction, batch_ndim, temperature
):
    mu = _halves(q, rho, packed_dim)
    z = torch.empty_like(mu) if seed is not None or eps is not None else None
    if reduction == NO_KL:
        return z, None
    shape = ref.reduced_shape(mu.shape, reduction, batch_ndim)
    return z, mu.new_empty(shape, dtype=ref.compute_dtype(mu.dtype))


def _fake_bwd(gz, gkl, q, rho, prior_mu, prior_rho, *options):
    return tuple(
        empty_gradient(t, prior)
        for t, prior in ((q, False), (rho, False), (prior_mu, True), (prior_rho, True))
    )


def empty_gradient(t: Tensor | None, prior: bool) -> Tensor | None:
    """A gradient has its tensor's memory format; a prior's, which is a sum over the batch, is contiguous."""
    if t is None:
        return None
    return torch.empty_like(t, memory_format=torch.contiguous_format if prior else torch.preserve_format)


def _ref_bwd(gz, gkl, *args):
    grads = ref.gaussian_bwd(gz, gkl, *args)
    likes = (empty_gradient(t, i > 1) for i, t in enumerate(args[:4]))
    return tuple(g if like is None else like.copy_(g) for g, like in zip(grads, likes))


def triton_kernel(name: str) -> Callable:
    def launch(*args):
        from ...kernels import gaussian

        return getattr(gaussian, name)(*args)

    return launch


define("gaussian_fwd", f"({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor)",
       fake=_fake_fwd, ref=ref.gaussian_fwd, triton=triton_kernel("gaussian_fwd"))  # fmt: skip
define("gaussian_bwd",
       f"(Tensor? gz, Tensor? gkl, {_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
       fake=_fake_bwd, ref=_ref_bwd, triton=triton_kernel("gaussian_bwd"))  # fmt: skip


@overload
def to_front(x: Tensor, dim: int | None, size: int, rank: int | None = None) -> Tensor: ...
@overload
def to_front(x: None, dim: int | None, size: int, rank: int | None = None) -> None: ...
def to_front(x: Tensor | None, dim: int | None, size: int, rank: int | None = None) -> Tensor | None:
    """x with its vmapped dim in front (expanded if it has none); `rank` pads a broadcast tensor behind it."""
    if x is None:
        return None
    x = x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x if rank is None else x.reshape(size, *[1] * (rank - x.dim()), *x.shape[1:])


def per_example(reduction: int) -> int:
    """The reduction that keeps vmapped examples apart; `ref.finish_per_example` does the rest."""
    return reduction if reduction < 1 else 0 if reduction == 1 else 2


def example_weights(grad: Tensor, shape: torch.Size, reduction: int, batch_ndim: int) -> Tensor:
    """A gradient [V, ...] of a vmapped reduction as that of `per_example(reduction)`; shape: [V, *B, *E]."""
    if reduction in (0, 2):
        return grad
    grad = grad * ref.scale(shape[1:], batch_ndim, reduction)
    tail = shape[batch_ndim + 1 :] if reduction == 1 else ()
    return grad.reshape(shape[0], *[1] * batch_ndim, *tail).expand(
        shape if reduction == 1 else shape[: batch_ndim + 1]
    )


def _fold_tensors(info, in_dims, tensors, packed_dim):
    """(q, rho, prior_mu, prior_rho, seed, eps), packed_dim of a vmapped call as one with a batch dim more."""
    q = to_front(tensors[0], in_dims[0], info.batch_size)
    rank = q.dim()
    rest = zip(tensors[1:], in_dims[1:], (None, rank, rank, None, None))
    return q, *(to_front(t, d, info.batch_size, r) for t, d, r in rest), packed_dim + 1


def _fold_fwd(info, in_dims, tensors, options, call):
    packed_dim, param, lo, hi, reduction, batch_ndim, temperature = options
    *folded, packed_dim = _fold_tensors(info, in_dims, tensors, packed_dim)
    z, kl = call((packed_dim, param, lo, hi, per_example(reduction), batch_ndim + 1, temperature), *folded)
    shape = _halves(folded[0], folded[1], packed_dim).shape[1:]
    return z, kl if reduction == NO_KL else ref.finish_per_example(kl, shape, reduction, batch_ndim)


def _fold_bwd(info, in_dims, args, options, call):
    (gz, gkl), tensors = args[:2], args[2:]
    packed_dim, param, lo, hi, reduction, batch_ndim, temperature = options
    *folded, packed_dim = _fold_tensors(info, in_dims[2:8], tensors, packed_dim)
    gz = to_front(gz, in_dims[0], info.batch_size)
    gkl = to_front(gkl, in_dims[1], info.batch_size)
    if gkl is not None:
        gkl = example_weights(gkl, _halves(folded[0], folded[1], packed_dim).shape, reduction, batch_ndim)
    folded_options = (packed_dim, param, lo, hi, per_example(reduction), batch_ndim + 1, temperature)
    grads = call(folded_options, gz, gkl, *folded)
    prior = (None if t is None else g.reshape(info.batch_size, *_example_shape(t, d))
             for g, t, d in zip(grads[2:], tensors[2:4], in_dims[4:6]))  # fmt: skip
    return grads[0], grads[1], *prior


def _example_shape(t: Tensor, dim: int | None) -> torch.Size:
    return t.shape if dim is None else t.movedim(dim, 0).shape[1:]


_step = Differentiable("reparam_kl (or a part of it)", "gaussian_fwd", "gaussian_bwd", outputs=2, tensors=6,
                       wrt=4, reference=ref.gaussian_bwd, fold_fwd=_fold_fwd, fold_bwd=_fold_bwd)  # fmt: skip


def reparam_kl(mu: Tensor, logvar: Tensor, *, prior: tuple[Tensor, Tensor] | None = None,
               param: str = "logvar", clamp: tuple[float, float] | None = None,
               reduction: str = "batchmean", batch_ndim: int = 1, temperature: float = 1.0,
               seed: Tensor | None = None, generator: torch.Generator | None = None,
               eps: Tensor | None = None, impl: str | None = None) -> LatentOutput:  # fmt: skip
    r"""Sample q = N(mu, sigma^2) and take its KL divergence from the prior, in one pass each way.

        z  = mu + temperature * sigma * eps,    eps ~ N(0, 1)
        kl = (mu^2 + sigma^2 - 1 - log sigma^2) / 2                                 prior N(0, I)
        kl = (((mu - m) / s)^2 + (sigma / s)^2 - 1 - log (sigma / s)^2) / 2         prior N(m, s^2)
    summed by `reduction`, in nats. Near the prior the KL is a series: no cancellation, never negative.

    Args:
        mu, logvar: [*B, *E], B the first `batch_ndim` dims (samples), E the latent's dims; one floating
            dtype; broadcast together. Any strides; an expanded mu (stride 0) is read once and never copied.
        prior: None for N(0, I), or (mu_p, logvar_p), each broadcastable to [*B, *E]; both get gradients.
        param: what the second argument, and the prior's, is: "logvar" = log sigma^2, "logstd" = log sigma,
            "std" = sigma.
        clamp: (lo, hi) for the second argument, with torch.clamp's gradient (zero outside, one at bounds).
        reduction: "none" [*B, *E] | "dim" [*E], mean over the batch | "sample" [*B], sum over a sample |
            "batchmean" [], sum over all / number of samples | "mean" [], over all elements | "sum" [].
        batch_ndim: how many leading dims are batch. K samples of one posterior: mu.expand(K, *mu.shape),
            batch_ndim=2.
        temperature: scales the noise, not the KL; finite, >= 0.
        seed: int64 [2] (`vaeops.rng.make_seed`), or [*S, 2] with S leading batch dims: one stream per sample.
            The same seed draws the same noise, on any device. Default: a fresh one, from torch's default
            generator.
        generator: draws the seed; not under torch.compile.
        eps: the noise itself, [*B, *E], any floating dtype; gets no gradient.
        impl: None for the device's best, or "ref" | "cpp" | "triton" | "cuda" to force one.

    Returns:
        LatentOutput(z, kl, seed): z in mu's dtype and memory format; kl in fp32 (fp64 for fp64); seed None
        with eps.

    Saved for backward: mu, logvar, the prior, the seed (or eps). The noise is made again.
    Deterministic: bit-equal from run to run and for any thread count. z is the same bits on every CPU; on a
    GPU within 2 ulp. Under autocast nothing is cast: mu and logvar are taken as they come.
    Source: Kingma & Welling, "Auto-Encoding Variational Bayes", 2014, appendix B.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is taken; the same under torch.compile.
    """
    mu, logvar = check.pair("reparam_kl", "mu", "logvar", mu, logvar)
    options = check.options("reparam_kl", mu, 0, param, clamp, reduction, batch_ndim, temperature)
    mu_p, rho_p = check.prior_pair("reparam_kl", prior, mu)
    check_impl("reparam_kl", impl, mu)
    seed, eps = check.noise("reparam_kl", mu, batch_ndim, seed, generator, eps)
    z, kl = _step(impl, options, mu, logvar, mu_p, rho_p, seed, eps)
    return LatentOutput(z, kl, seed)


def reparam_kl_packed(moments: Tensor, *, dim: int = 1, prior: tuple[Tensor, Tensor] | None = None,
                      param: str = "logvar", clamp: tuple[float, float] | None = None,
                      reduction: str = "batchmean", batch_ndim: int = 1, temperature: float = 1.0,
                      seed: Tensor | None = None, generator: torch.Generator | None = None,
                      eps: Tensor | None = None, impl: str | None = None) -> LatentOutput:  # fmt: skip
    """`reparam_kl` of one tensor with mu and logvar as the two halves of `dim`, as in diffusers' encoders.

    Args:
        moments: mu = the first half along `dim`, logvar = the second; that dim's size is even.
        dim: int, negative counts from the end.
        Others as in `reparam_kl`; shapes are those of one half.

    Returns:
        LatentOutput; the gradient is written into one tensor of moments' shape, without a concatenation.

    Raises:
        ValueError: dim out of range, or its size odd; and as `reparam_kl`.
    """
    op = "reparam_kl_packed"
    if not isinstance(moments, Tensor):
        raise TypeError(f"{op}: moments must be a tensor, got {type(moments).__name__}")
    if moments.dtype not in check.FLOATS:
        raise TypeError(f"{op}: moments must be float32, bfloat16, float16 or float64, got {moments.dtype}")
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise TypeError(f"{op}: dim must be an int, got {type(dim).__name__}")
    rank = moments.dim()
    if not -rank <= dim < rank:
        raise ValueError(
            f"{op}: dim must be in [{-rank}, {rank - 1}] for shape {list(moments.shape)}, got {dim}"
        )
    dim %= rank
    if moments.shape[dim] % 2:
        raise ValueError(f"{op}: moments must have an even size along dim {dim}, got {list(moments.shape)}")
    options = check.options(op, moments, dim, param, clamp, reduction, batch_ndim, temperature)
    # Cut only for the checks that look at a half's shape: once kernels have turned the caches over, two calls
    # into torch cost as much as a small kernel.
    plain = prior is None and seed is None and eps is None
    half = moments if plain else moments.detach().narrow(dim, 0, moments.shape[dim] // 2)
    mu_p, rho_p = check.prior_pair(op, prior, half)
    check_impl(op, impl, moments)
    seed, eps = check.noise(op, half, batch_ndim, seed, generator, eps)
    z, kl = _step(impl, options, moments, None, mu_p, rho_p, seed, eps)
    return LatentOutput(z, kl, seed)


def reparameterize(mu: Tensor, logvar: Tensor, *, param: str = "logvar",
                   clamp: tuple[float, float] | None = None, temperature: float = 1.0,
                   seed: Tensor | None = None, generator: torch.Generator | None = None,
                   eps: Tensor | None = None, impl: str | None = None) -> Tensor:  # fmt: skip
    """The sample alone: z = mu + temperature * sigma * eps. Arguments, noise, gradients as in `reparam_kl`.

    A seed [*S, 2] may have any leading dims of mu as streams.

    Returns:
        z [*B, *E] in mu's dtype and memory format: the same bits as `reparam_kl(...).z` of the same seed.
    """
    mu, logvar = check.pair("reparameterize", "mu", "logvar", mu, logvar)
    dim, code, lo, hi, _, _, scale = check.options(
        "reparameterize", mu, 0, param, clamp, "none", 0, temperature
    )
    check_impl("reparameterize", impl, mu)
    seed, eps = check.noise("reparameterize", mu, mu.dim(), seed, generator, eps)
    z, _ = _step(impl, (dim, code, lo, hi, NO_KL, 0, scale), mu, logvar, None, None, seed, eps)
    return z


def gaussian_kl(mu: Tensor, logvar: Tensor, *, prior: tuple[Tensor, Tensor] | None = None,
                param: str = "logvar", clamp: tuple[float, float] | None = None,
                reduction: str = "batchmean", batch_ndim: int = 1,
                impl: str | None = None) -> Tensor:  # fmt: skip
    """The KL alone: KL(N(mu, sigma^2) || prior) in nats. Arguments and gradients as in `reparam_kl`.

    Returns:
        kl in fp32 (fp64 for fp64), shaped by `reduction`: the same bits as `reparam_kl(...).kl`.
    """
    mu, logvar = check.pair("gaussian_kl", "mu", "logvar", mu, logvar)
    options = check.options("gaussian_kl", mu, 0, param, clamp, reduction, batch_ndim, 1.0)
    mu_p, rho_p = check.prior_pair("gaussian_kl", prior, mu)
    check_impl("gaussian_kl", impl, mu)
    _, kl = _step(impl, options, mu, logvar, mu_p, rho_p, None, None)
    return kl
