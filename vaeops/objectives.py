"""What an objective does to already reduced terms: free bits, capacity, balancing, annealing, the IWAE.

None of it needs the latent's elements again, so none of it is an option of a kernel: call `gaussian_kl` or
`reparam_kl` with the reduction that the objective wants, and hand its `kl` on. Everything here is
differentiable PyTorch on small tensors, traces under torch.compile and never synchronises with the host.

    latent = vaeops.reparam_kl(mu, logvar, reduction="dim")
    loss = recon + beta() * objectives.free_bits(latent.kl, 0.1)
"""

import math

import torch
from torch import Tensor

from .ops.gaussian import gaussian_kl

SCHEDULES = ("constant", "linear", "cyclical", "cosine", "sigmoid")
_FREE_BITS = ("dim", "none", "sample")


def free_bits(kl: Tensor, floor: float | Tensor, *, reduction: str = "dim", batch_ndim: int = 1) -> Tensor:
    """The KL with a floor under each of its parts: a part below the floor costs `floor` and gets no gradient.

        "dim"     sum_d max(floor, kl_d)             kl [*E], the batch mean of each latent dim
        "none"    mean_b sum_d max(floor, kl_bd)     kl [*B, *E], each sample and dim for itself
        "sample"  mean_b max(floor, kl_b)            kl [*B], each sample's total

    "none" floors before the batch mean, so its value is never below that of "dim" with the same floor.

    Args:
        kl: the result of `gaussian_kl` or `reparam_kl` with the same `reduction`. A group of dims with one
            floor (a layer of a ladder) is the sum of its dims: pass [G] as "dim", [*B, G] as "none".
        floor: nats; a float >= 0, or a tensor that broadcasts to kl (another floor per dim, or a schedule).
        batch_ndim: how many leading dims of kl are batch; read with "none" alone, 1 otherwise.

    Returns:
        0-d, in kl's dtype. Gradient as torch.clamp's: one at the floor itself, zero below.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is taken.

    Source: Kingma et al., "Improving Variational Inference with Inverse Autoregressive Flow", 2016.
    """
    _check_kl("free_bits", kl)
    _check_number("free_bits", "floor", floor, kl)
    if reduction not in _FREE_BITS:
        raise ValueError(f"free_bits: reduction must be one of {_FREE_BITS}, got {reduction!r}")
    if reduction != "none" and batch_ndim != 1:
        raise ValueError(
            f"free_bits: batch_ndim is for reduction='none', got {batch_ndim} with {reduction!r}"
        )
    if not 0 <= batch_ndim <= kl.dim() and reduction == "none":
        raise ValueError(
            f"free_bits: batch_ndim must be in [0, {kl.dim()}] for kl {list(kl.shape)}, got {batch_ndim}"
        )
    floored = kl.clamp(min=floor).sum()
    if reduction == "dim":
        return floored
    samples = kl.shape[:batch_ndim].numel() if reduction == "none" else kl.numel()
    return floored / max(samples, 1)


def capacity(kl: Tensor, target: float | Tensor) -> Tensor:
    """|KL - C|, averaged: the KL is held at C nats, which a schedule raises.

    The shape of kl says which of the two published forms it is:
        []      |mean_b kl_b - C|     kl by "batchmean": the batch as a whole carries C (Burgess et al.)
        [*B]    mean_b |kl_b - C|     kl by "sample": every sample carries C; never below the other

    Args:
        kl: 0-d, or [*B].
        target: C in nats; a float >= 0, or a tensor that broadcasts to kl (a schedule's value).

    Returns:
        0-d, in kl's dtype. Multiply by gamma outside. The gradient at KL = C is 0.

    Source: Burgess et al., "Understanding disentangling in beta-VAE", 2018, equation 8.
    """
    _check_kl("capacity", kl)
    _check_number("capacity", "target", target, kl)
    return (kl - target).abs().sum() / max(kl.numel(), 1)


def kl_balance(posterior: tuple[Tensor, Tensor], prior: tuple[Tensor, Tensor], alpha: float = 0.8, *,
               param: str = "logvar", reduction: str = "batchmean", batch_ndim: int = 1,
               impl: str | None = None) -> Tensor:  # fmt: skip
    """The KL between a posterior and a learned prior, pulling the prior harder than the posterior.

        alpha KL(sg q || p) + (1 - alpha) KL(q || sg p)          sg: stop-gradient

    The value is KL(q || p) for every alpha; the prior's gradient is scaled by alpha, q's by 1 - alpha.

    Args:
        posterior, prior: (mu, logvar) each, as `gaussian_kl` takes them; the prior broadcasts.
        alpha: in [0, 1].
        param, reduction, batch_ndim, impl: as in `gaussian_kl`.

    Returns:
        The reduced KL in fp32 (fp64 for fp64). It is two calls of `gaussian_kl`, one for each term.

    Source: Hafner et al., "Mastering Atari with Discrete World Models", 2021, algorithm 2.
    """
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool):
        raise TypeError(f"kl_balance: alpha must be a float, got {type(alpha).__name__}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"kl_balance: alpha must be in [0, 1], got {alpha}")
    for name, pair in (("posterior", posterior), ("prior", prior)):
        if (
            not isinstance(pair, (tuple, list))
            or len(pair) != 2
            or not all(isinstance(t, Tensor) for t in pair)
        ):
            raise TypeError(f"kl_balance: {name} must be two tensors (mu, logvar)")

    def kl(q: tuple[Tensor, ...], p: tuple[Tensor, ...]) -> Tensor:
        return gaussian_kl(q[0], q[1], prior=(p[0], p[1]), param=param, reduction=reduction,
                           batch_ndim=batch_ndim, impl=impl)  # fmt: skip

    stopped_q, stopped_p = tuple(t.detach() for t in posterior), tuple(t.detach() for t in prior)
    return alpha * kl(stopped_q, tuple(prior)) + (1 - alpha) * kl(tuple(posterior), stopped_p)


def iwae_bound(log_px: Tensor, log_pz: Tensor, log_qz: Tensor) -> Tensor:
    """The importance-weighted bound on log p(x) from K samples z_k of the posterior.

        log 1/K sum_k p(x | z_k) p(z_k) / q(z_k | x)

    For K = 1 it is the evidence lower bound with its KL estimated by the sample; it grows with K towards
    log p(x). Each term reduced by "sample" with `batch_ndim=2`, over samples expanded to [K, B, ...]:

        z = reparam_kl(mu.expand(K, *mu.shape), logvar.expand(K, *mu.shape), batch_ndim=2).z
        log_px = -recon_loss(decode(z), x, "bce_logits", reduction="sample", batch_ndim=2)
        log_pz = gaussian_log_prob(z, zeros_like(z), zeros_like(z), batch_ndim=2)
        log_qz = gaussian_log_prob(z, mu.expand_as(z), logvar.expand_as(z), batch_ndim=2)
        loss = -iwae_bound(log_px, log_pz, log_qz).mean()

    Args:
        log_px: [K, *B], log p(x | z_k), nats. log_pz: [K, *B], log p(z_k). log_qz: [K, *B], log q(z_k | x).

    Returns:
        [*B], in the dtype of the three. A larger value is better. The gradient is the plain one.

    Source: Burda et al., "Importance Weighted Autoencoders", 2016, equation 8.
    """
    for name, term in (("log_px", log_px), ("log_pz", log_pz), ("log_qz", log_qz)):
        _check_kl("iwae_bound", term, name)
        if term.dim() < 1 or term.shape != log_px.shape or not term.shape[0]:
            raise ValueError(
                f"iwae_bound: {name} must be [K, *B] with K >= 1, all three alike, got {list(term.shape)}"
            )
    return (log_px + log_pz - log_qz).logsumexp(0) - math.log(log_px.shape[0])


def balance_groups(kl: Tensor, size: Tensor | None = None) -> Tensor:
    """The KL of a hierarchy's groups, weighted so that no group is switched off while the KL weight warms up.

        c_g = (mean_b |kl_bg| + 0.01) / size_g,   c_g /= mean_g c_g,   result_b = sum_g c_g kl_bg

    A group with a small KL gets a small weight, hence little pressure to shrink. Weights have no gradient.

    Args:
        kl: [*B, G], the KL of each sample and group in nats.
        size: [G], how much KL a group is due, usually its number of spatial positions; None for equal groups.

    Returns:
        [*B]. Use it during warm-up, the plain sum over groups afterwards.

    Source: Vahdat & Kautz, "NVAE: A Deep Hierarchical Variational Autoencoder", 2020, appendix A.
    """
    _check_kl("balance_groups", kl)
    if kl.dim() < 2:
        raise ValueError(f"balance_groups: kl must be [*B, G], got {list(kl.shape)}")
    if size is not None and (not isinstance(size, Tensor) or size.shape != kl.shape[-1:]):
        got = list(size.shape) if isinstance(size, Tensor) else type(size).__name__
        raise ValueError(f"balance_groups: size must be None or a tensor [{kl.shape[-1]}], got {got}")
    weight = kl.detach().abs().flatten(0, -2).mean(0) + 0.01
    if size is not None:
        weight = weight / size
    return (kl * (weight / weight.mean())).sum(-1)


def active_units(statistic: Tensor, threshold: float = 0.01) -> Tensor:
    """How many latent dims carry information: the number whose statistic exceeds `threshold`.

    Args:
        statistic: [*E], one of: KL of each dim in nats (`reduction="dim"`), or the variance over x of E[z|x]
            (`moments` below), which is the definition of Burda et al.
        threshold: 0.01 is theirs.

    Returns:
        int64, 0-d. A NaN is not active.

    Source: Burda et al., "Importance Weighted Autoencoders", 2016, section 5.
    """
    _check_kl("active_units", statistic, "statistic")
    return (statistic > threshold).sum()


def collapsed(kl_dim: Tensor, threshold: float = 0.01) -> Tensor:
    """Whether the posterior has collapsed onto the prior: no latent dim has a KL above `threshold` nats.

    Args:
        kl_dim: [*E], from `reduction="dim"`.

    Returns:
        bool, 0-d. False where a KL is NaN: that is another illness.
    """
    _check_kl("collapsed", kl_dim, "kl_dim")
    return (kl_dim <= threshold).all()


def merge_moments(count: Tensor, mean: Tensor, m2: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Take a batch into a running count, mean and sum of squared deviations, without cancellation.

        n = count + B,   d = mean_b x - mean
        mean' = mean + d B / n,   m2' = m2 + sum_b (x - mean_b x)^2 + d^2 count B / n

    Args:
        count: int64 []. mean, m2: [*E], zeros to begin with. x: [B, *E].

    Returns:
        (count, mean, m2), new tensors. The unbiased variance is m2 / (count - 1).

    Source: Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm for computing sample
    variances", 1979.
    """
    batch = x.shape[0]
    x = x.to(mean.dtype)
    total = count + batch
    center = x.sum(0) / max(batch, 1)
    delta = center - mean
    share = batch / total.clamp(min=1)
    return total, mean + delta * share, m2 + (x - center).square().sum(0) + delta.square() * count * share


def anneal(step: Tensor, kind: str, *, steps: int = 1, start: float = 0.0, stop: float = 1.0, cycles: int = 4,
           ratio: float = 0.5, steepness: float = 10.0) -> Tensor:  # fmt: skip
    """The value of a schedule at `step`; with t = step / steps, held at `stop` from t = 1 on:

        "constant"  stop
        "linear"    start + (stop - start) t
        "cosine"    start + (stop - start) (1 - cos pi t) / 2
        "sigmoid"   start + (stop - start) (1 + tanh(k (t - 1/2) / 2) / tanh(k / 4)) / 2      k = steepness
        "cyclical"  `cycles` equal parts: a linear rise over the first `ratio` of each, then a rest at stop

    The sigmoid is the logistic curve of slope k, stretched to begin at `start` and end at `stop` exactly.

    Args:
        step: int64 or floating tensor, any shape, on the device where the value is wanted.
        steps, cycles: ints >= 1. ratio: in (0, 1]. steepness: > 0.

    Returns:
        fp32 of step's shape (fp64 for fp64).

    Source: cyclical: Fu et al., "Cyclical Annealing Schedule", 2019; sigmoid: Bowman et al., "Generating
    Sentences from a Continuous Space", 2016.
    """
    if kind not in SCHEDULES:
        raise ValueError(f"anneal: kind must be one of {SCHEDULES}, got {kind!r}")
    if not isinstance(step, Tensor):
        raise TypeError(f"anneal: step must be a tensor, got {type(step).__name__}")
    if steps < 1 or cycles < 1:
        raise ValueError(f"anneal: steps and cycles must be at least 1, got {steps} and {cycles}")
    if not 0 < ratio <= 1 or not 0 < steepness < math.inf:
        raise ValueError(
            f"anneal: ratio must be in (0, 1] and steepness positive, got {ratio} and {steepness}"
        )
    dtype = torch.float64 if step.dtype is torch.float64 else torch.float32
    t = (step.to(dtype) / steps).clamp(0, 1)
    if kind == "constant":
        rise = torch.ones_like(t)
    elif kind == "linear":
        rise = t
    elif kind == "cosine":
        rise = (1 - torch.cos(math.pi * t)) / 2
    elif kind == "sigmoid":
        rise = (1 + torch.tanh(steepness * (t - 0.5) / 2) / math.tanh(steepness / 4)) / 2
    else:
        place = torch.where(t < 1, (t * cycles).frac(), 1.0)
        rise = (place / ratio).clamp(max=1)
    return start + (stop - start) * rise


def _check_kl(op: str, kl: Tensor, name: str = "kl") -> None:
    if not isinstance(kl, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(kl).__name__}")
    if not kl.is_floating_point():
        raise TypeError(f"{op}: {name} must be floating point, got {kl.dtype}")


def _check_number(op: str, name: str, value: float | Tensor, kl: Tensor) -> None:
    """A float >= 0, or a tensor that broadcasts to kl; its value is not read: that would synchronise."""
    if isinstance(value, Tensor):
        if value.dim() > kl.dim() or any(s not in (1, k) for s, k in zip(value.shape[::-1], kl.shape[::-1])):
            raise ValueError(f"{op}: {name} {list(value.shape)} does not broadcast to kl {list(kl.shape)}")
        return
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be a float or a tensor, got {type(value).__name__}")
    if not 0 <= value < math.inf:
        raise ValueError(f"{op}: {name} must be finite and >= 0, got {value}")
