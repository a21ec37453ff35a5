"""What keeps a codebook alive: moving averages, revival of dead codes, k-means, and how well it is used.

Compositions on counts and sums. Nothing here reads a value back to the host, so all of it compiles and can be
captured in a CUDA graph.
"""

import torch
from torch import Tensor

from ...ref import vq as ref
from .. import rng
from .._library import check_impl
from . import check
from .assign import ASSIGN
from .quantize import finite_rows, statistics


def perplexity(counts: Tensor) -> Tensor:
    """exp of the entropy of the codes' use: how many codes are used, as if they were used equally.

        exp(-sum_k p_k log p_k),   p_k = counts_k / sum_j counts_j

    Args:
        counts: [*L, K], >= 0, any dtype.

    Returns:
        [*L], in [1, K]; 1 where all counts are zero. fp32 (fp64 for fp64).
    """
    if not isinstance(counts, Tensor):
        raise TypeError(f"perplexity: counts must be a tensor, got {type(counts).__name__}")
    counts = counts.to(ref.compute_dtype(counts))
    total = ref.tree_sum(counts).unsqueeze(-1)
    return ref.tree_sum(torch.special.entr(counts / torch.where(total > 0, total, 1))).exp()


def usage(counts: Tensor) -> Tensor:
    """The share of codes that are used at all: mean_k [counts_k > 0].

    Args:
        counts: [*L, K], any dtype.

    Returns:
        [*L] in [0, 1]. fp32 (fp64 for fp64).
    """
    if not isinstance(counts, Tensor):
        raise TypeError(f"usage: counts must be a tensor, got {type(counts).__name__}")
    return (counts > 0).to(ref.compute_dtype(counts)).mean(-1)


def _check_state(
    op: str, cluster_size: Tensor, embed_sum: Tensor, codebook: Tensor, **others: Tensor
) -> None:
    check.floating(op, "codebook", codebook)
    if codebook.dim() < 2:
        raise ValueError(f"{op}: codebook must have shape [*L, K, D], got {list(codebook.shape)}")
    given = {"cluster_size": cluster_size, "embed_sum": embed_sum, **others}
    for name, t in given.items():
        check.floating(op, name, t)
        check.on(op, name, t, codebook.device)
        shape = codebook.shape if name in ("embed_sum", "sums") else codebook.shape[:-1]
        if t.shape != shape:
            raise ValueError(
                f"{op}: {name} must have shape {list(shape)} for codebook {list(codebook.shape)}, "
                f"got {list(t.shape)}"
            )


def vq_ema_(cluster_size: Tensor, embed_sum: Tensor, codebook: Tensor, counts: Tensor, sums: Tensor, *,
            decay: float = 0.99, eps: float = 1e-5) -> None:  # fmt: skip
    """Move a codebook towards the mean of each code's rows. Changes its first three arguments in place.

        cluster_size <- decay cluster_size + (1 - decay) counts
        embed_sum    <- decay embed_sum + (1 - decay) sums
        codebook     <- embed_sum / size
        size_k = n (cluster_size_k + eps) / (n + K eps),   n = sum_k cluster_size_k
    An update without any row (counts all zero) changes nothing; with eps = 0, a code of size 0 stays where it
    is. With several processes, all-reduce counts and sums first: then every process makes the same bits.

    Args:
        cluster_size [*L, K], embed_sum [*L, K, D], codebook [*L, K, D]: the state; L, say, the levels of a
            residual quantizer. A codebook that requires a gradient may be given.
        counts [*L, K], sums [*L, K, D]: as `vector_quantize(..., stats=True)` returns them.
        decay: in [0, 1]. eps: >= 0, of the Laplace smoothing that keeps small clusters from dividing by zero.

    Source: van den Oord et al., "Neural Discrete Representation Learning", 2017, appendix A.
    """
    op = "vq_ema_"
    _check_state(op, cluster_size, embed_sum, codebook, counts=counts, sums=sums)
    check.number(op, "decay", decay, 0, 1)
    check.number(op, "eps", eps, 0, float("inf"), "[)")
    with torch.no_grad():
        counts, sums = counts.to(cluster_size.dtype), sums.to(embed_sum.dtype)
        any_row = (counts > 0).any(-1, keepdim=True)
        weight = (1 - decay) * any_row.to(cluster_size.dtype)
        cluster_size.lerp_(counts, weight)
        embed_sum.lerp_(sums, weight.unsqueeze(-1).to(embed_sum.dtype))
        n = ref.tree_sum(cluster_size).unsqueeze(-1)
        size = (cluster_size + eps) / (n + cluster_size.shape[-1] * eps) * n
        moved = embed_sum / size.unsqueeze(-1)
        codebook.copy_(torch.where((any_row & (size != 0)).unsqueeze(-1), moved, codebook))


def _shuffled(flat: Tensor, mask: Tensor | None, seed: Tensor) -> tuple[Tensor, Tensor]:
    """(order [N], n): the n rows of [N, D] that are masked in and finite, in random order; then the rest."""
    usable = finite_rows(flat)
    if mask is not None:
        usable = usable & mask.reshape(-1)
    keys = torch.where(usable, rng.normal((flat.shape[0],), seed), float("inf"))
    return keys.argsort(stable=True), usable.sum()


def vq_expire_(cluster_size: Tensor, embed_sum: Tensor, codebook: Tensor, x: Tensor, *, threshold: float,
               seed: Tensor, reset: float | None = None, mask: Tensor | None = None,
               channel_dim: int = -1) -> Tensor:  # fmt: skip
    """Put rows of x in the place of codes that are hardly used. Changes its first three arguments in place.

    A code is dead where cluster_size < threshold. The i-th dead code takes row i of a random order of x:
        codebook_k <- x_n,   cluster_size_k <- reset,   embed_sum_k <- reset x_n
    no row twice; where rows are fewer than dead codes, the last dead codes wait for another batch.

    Args:
        cluster_size [K], embed_sum [K, D], codebook [K, D]: as in `vq_ema_`.
        x: [*R, D], or with the D channels at `channel_dim`. Rows with a NaN or Inf element are never taken.
        threshold: >= 0.
        seed: int64 [2] (`vaeops.rng.make_seed`); the same seed and rows choose the same, on any device.
        reset: > 0, the size that a revived code starts with. Default: the threshold.
        mask: bool [*R], True = may be taken.

    Returns:
        bool [K], which codes were revived. With several processes, give every one the same x (gathered
        candidates) and the same seed.
    """
    op = "vq_expire_"
    check.codebook(op, codebook)
    _check_state(op, cluster_size, embed_sum, codebook)
    rows = check.rows(op, x, codebook, channel_dim)
    check.mask(op, mask, rows)
    check.number(op, "threshold", threshold, 0, float("inf"), "[)")
    reset = threshold if reset is None else check.number(op, "reset", reset, 0, float("inf"), "()")
    rng.check_seed(op, seed, x.device, ())
    with torch.no_grad():
        flat = rows.reshape(-1, rows.shape[-1])
        dead = cluster_size < threshold
        if flat.shape[0] == 0:
            return torch.zeros_like(dead)
        order, usable = _shuffled(flat, mask, seed)
        rank = dead.cumsum(0) - 1
        revived = dead & (rank < usable)
        taken = flat[order[rank.clamp(0, flat.shape[0] - 1)]].to(embed_sum.dtype)
        column = revived.unsqueeze(-1)
        codebook.copy_(torch.where(column, taken.to(codebook.dtype), codebook))
        embed_sum.copy_(torch.where(column, reset * taken, embed_sum))
        cluster_size.copy_(torch.where(revived, reset, cluster_size))
    return revived


def kmeans(x: Tensor, K: int, iters: int, seed: Tensor, *, metric: str = "l2", mask: Tensor | None = None,
           channel_dim: int = -1, impl: str | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Lloyd's algorithm from K random rows: a codebook to start with.

    Each of `iters` rounds assigns every row to its nearest code, then moves each code to the mean of its
    rows; a code without rows stays where it is. With fewer than K rows, some codes start equal, and all but
    the first of these stay without rows.

    Args:
        x: [*R, D], or with the D channels at `channel_dim`, at least one row. Rows with a NaN or Inf element
            are left out.
        K: int >= 1. iters: int >= 1.
        seed: int64 [2] (`vaeops.rng.make_seed`), which chooses the first codes.
        metric: "l2"; or "cosine": rows and codes are scaled to norm 1.
        mask: bool [*R], True = use.
        impl: as in `vq_assign`.

    Returns:
        (codebook [K, D], counts [K]), fp32 (fp64 for fp64), no gradient. counts: the rows of each code in the
        last round, whose mean the code is: `vq_ema_` starts from cluster_size = counts and embed_sum =
        counts * codebook. Zeros where no row can be used. Deterministic, for any number of threads.
    """
    op = "kmeans"
    check.floating(op, "x", x)
    if x.dim() < 1:
        raise ValueError(f"{op}: x must have at least one dim, got shape []")
    rows = x.detach().movedim(check.channel_dim(op, channel_dim, x.dim()), -1)
    check.mask(op, mask, rows)
    check.count(op, "K", K)
    check.count(op, "iters", iters)
    check.one_of(op, "metric", metric, ref.METRICS[:2])
    rng.check_seed(op, seed, x.device, ())
    check_impl(op, impl, x)
    flat = rows.reshape(-1, rows.shape[-1])
    if 0 in flat.shape:
        raise ValueError(f"{op}: x must have at least one row and one dim, got shape {list(x.shape)}")
    dtype = ref.compute_dtype(x)

    def on_sphere(e: Tensor) -> Tensor:
        return torch.nn.functional.normalize(e, dim=-1) if metric == "cosine" else e

    with torch.no_grad():
        if metric == "cosine":
            flat = on_sphere(flat.to(dtype))
        order, usable = _shuffled(flat, mask, seed)
        first = order[torch.arange(K, device=x.device) % usable.clamp(min=1)]
        codebook = torch.where(usable > 0, flat[first].to(dtype), 0)
        used = finite_rows(flat) if mask is None else finite_rows(flat) & mask.reshape(-1)
        for _ in range(iters):
            indices = ASSIGN[impl](flat, codebook, used, ref.METRICS.index(metric), True, False)
            counts, sums = statistics(flat, indices, K, dtype, None, impl)
            mean = on_sphere(sums / counts.clamp(min=1).unsqueeze(-1))
            codebook = torch.where(counts.unsqueeze(-1) > 0, mean, codebook)
    return codebook, counts
