"""Nearest-codebook vector quantization in plain PyTorch: what each kernel must compute, on any device.

The index of a row x_n is the smallest k with the smallest score s_nk, all values converted to fp64:
    l2      s = h / 2 - t         t = sum_d x_d e_d,  h = sum_d e_d^2: fma chains over d = 0 .. D-1, from 0
    cosine  s = -t / sqrt(h)      a code with h = 0 is never chosen
    dot     s = -t
with one fp64 rounding for the subtraction, the root and the division each. So it depends on the row and the
codebook alone, never on the batch, the tiling, the threads or the device. A code with a NaN or Inf element
is never chosen, nor is one whose score is NaN; where none can be, and for a row with a NaN or Inf element,
the index is 0. A row that the mask leaves out gets -1.

Products of fp32, bf16 and fp16 values are exact in fp64, so there multiply-then-add is the fma. fp64 inputs
take one made of error-free transformations, which is right while no product leaves the range 1e-290 to 1e290.

`vq_assign`, `vq_topk`, `vq_gather`, `vq_gather_bwd` and `vq_segment_sum` mirror the low-level ops: x is
[*R, D], codebook [K, D], N the product of R, whose rows count in row-major order. Rows are taken in chunks,
so no array of N x K elements exists. `vq_lookup` and `vector_quantize` mirror `vaeops.*`, differentiably.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

METRICS = ("l2", "cosine", "dot")
REDUCTIONS = ("none", "mean", "sum")
NO_LOSS = -1  # the low-level op's reduction code for "the loss is not wanted"
ESTIMATORS = ("none", "ste", "rotation")
FIXED_POINT_BITS = 36  # of a value at absmax: 2^27 rows of one code fit in int64

_CHUNK = 1 << 16  # scores of a chunk of rows: 512 KiB in fp64, which a core's cache holds
_TINY = 1e-6  # norms below it make the rotation fall back to straight-through


class VQOutput(NamedTuple):
    """What `vaeops.vector_quantize` returns; None for what was not asked for."""

    quantized: Tensor
    indices: Tensor
    commit_loss: Tensor
    codebook_loss: Tensor
    counts: Tensor | None
    sums: Tensor | None


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """fp64 where a tensor is, else fp32: the dtype of scores, losses and statistics."""
    return torch.float64 if any(t.dtype is torch.float64 for t in tensors) else torch.float32


def tree_sum(x: Tensor, dim: int = -1) -> Tensor:
    """Sum by halving: a fixed order of additions, so the bits depend on no thread count and no batch."""
    x = x.movedim(dim, -1)
    if x.shape[-1] == 0:
        return x.sum(-1)
    while x.shape[-1] > 1:
        if x.shape[-1] % 2:
            x = torch.nn.functional.pad(x, (0, 1))
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x.squeeze(-1)


def scale_by_power_of_two(x: Tensor, exponent: Tensor) -> Tensor:
    """x * 2^exponent in fp64, exactly: torch.exp2 and torch.ldexp may err, and 2^exponent may overflow."""
    half = exponent.long() // 2
    for part in (half, exponent.long() - half):
        x = x * ((part + 1023) << 52).view(torch.float64)
    return x


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a + b rounded, and what rounding lost, exactly (Knuth)."""
    total = a + b
    tail = total - a
    return total, (a - (total - tail)) + (b - tail)


def _two_product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a * b rounded, and what rounding lost, exactly (Dekker, with Veltkamp's split of each factor)."""
    product = a * b
    wide_a, wide_b = a * (2.0**27 + 1), b * (2.0**27 + 1)
    a_hi, b_hi = wide_a - (wide_a - a), wide_b - (wide_b - b)
    a_lo, b_lo = a - a_hi, b - b_hi
    return product, ((a_hi * b_hi - product) + a_hi * b_lo + a_lo * b_hi) + a_lo * b_lo


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c rounded once, in fp64: the two tails are summed to odd, then added to the head.

    Source: Boldo & Melquiond, "Emulation of a FMA and correctly rounded sums: proved algorithms using
    rounding to odd", 2008.
    """
    product, product_tail = _two_product(a, b)
    low, low_tail = _two_sum(c, product_tail)
    high, high_tail = _two_sum(product, low)
    tails, lost = _two_sum(high_tail, low_tail)
    bits = tails.view(torch.int64)
    towards = torch.where((lost > 0) == (tails > 0), 1, -1)
    tails = torch.where((lost != 0) & (bits & 1 == 0), bits + towards, bits).view(torch.float64)
    result = high + tails
    return torch.where(result.isfinite(), result, a * b + c)


def _sqrt(x: Tensor) -> Tensor:
    """Correctly rounded fp64 root; torch's is one ulp off in places. x >= 0."""
    root = x.sqrt()
    square, tail = _two_product(root, root)
    step = ((x - square) - tail) / (2 * root)
    return torch.where(step.isfinite(), root + step, root)


def _chain(a: Tensor, b: Tensor, exact_products: bool) -> Tensor:
    """sum_d a[d] b[d], d in order from 0, each step one fma; the tensors of d broadcast together."""
    total = torch.zeros(
        torch.broadcast_shapes(a.shape[1:], b.shape[1:]), dtype=torch.float64, device=a.device
    )
    for a_d, b_d in zip(a, b):
        total = total.addcmul_(a_d, b_d) if exact_products else fma(a_d, b_d, total)
    return total


def _scores(x: Tensor, codebook: Tensor, metric: int) -> Iterator[tuple[slice, Tensor]]:
    """(rows, scores): slices of the rows of x [N, D], and their scores [n, K], +inf where never chosen."""
    exact_products = compute_dtype(x, codebook) is torch.float32
    codes = codebook.double().t().contiguous()  # [D, K]
    h = _chain(codes, codes, exact_products)
    norm = _sqrt(h)
    choosable = codes.isfinite().all(0) & ((h > 0) if metric == 1 else True)
    step = max(1, _CHUNK // codebook.shape[0])
    for start in range(0, x.shape[0], step):
        rows = slice(start, min(start + step, x.shape[0]))
        part = x[rows].double()
        t = _chain(part.t().unsqueeze(2), codes.unsqueeze(1), exact_products)
        s = 0.5 * h - t if metric == 0 else -t / norm if metric == 1 else -t
        usable = choosable & part.isfinite().all(1, keepdim=True) & ~s.isnan()
        yield rows, torch.where(usable, s, math.inf)


def _index_dtype(int32: bool) -> torch.dtype:
    return torch.int32 if int32 else torch.int64


def vq_assign(
    x: Tensor, codebook: Tensor, mask: Tensor | None, metric: int, exact: bool, int32: bool
) -> Tensor:
    """Indices [*R]. `exact=False` allows an implementation to differ in near-ties; this one never does."""
    flat = x.reshape(-1, x.shape[-1])
    indices = torch.empty(flat.shape[0], dtype=_index_dtype(int32), device=x.device)
    for rows, s in _scores(flat, codebook, metric):
        indices[rows] = s.argmin(1)
    indices = indices.view(x.shape[:-1])
    return indices if mask is None else indices.masked_fill(~mask, -1)


def vq_topk(
    x: Tensor, codebook: Tensor, mask: Tensor | None, k: int, metric: int, exact: bool, int32: bool
) -> tuple[Tensor, Tensor]:
    """(scores, indices) [*R, k], ascending by (fp64 score, index).

    Codes that are never chosen come last, in order of their index, with score +inf; so a row with NaN or Inf
    gets 0 .. k-1. A masked row gets index -1 and score +inf throughout.
    """
    flat = x.reshape(-1, x.shape[-1])
    scores = torch.empty(flat.shape[0], k, dtype=compute_dtype(x, codebook), device=x.device)
    indices = torch.empty(flat.shape[0], k, dtype=_index_dtype(int32), device=x.device)
    for rows, s in _scores(flat, codebook, metric):
        s, order = s.sort(dim=1, stable=True)
        scores[rows], indices[rows] = s[:, :k], order[:, :k]
    scores, indices = scores.view(*x.shape[:-1], k), indices.view(*x.shape[:-1], k)
    if mask is None:
        return scores, indices
    unused = ~mask.unsqueeze(-1)
    return scores.masked_fill(unused, math.inf), indices.masked_fill(unused, -1)


def _check_indices(indices: Tensor, codes: int) -> None:
    """Out-of-range indices are an error where looking costs no synchronisation."""
    if indices.device.type == "cpu" and bool(((indices < -1) | (indices >= codes)).any()):
        raise RuntimeError(
            f"indices must be in [-1, {codes}), got {int(indices.min())} to {int(indices.max())}"
        )


def vq_gather(
    indices: Tensor, codebook: Tensor, x: Tensor | None, fill: float, reduction: int
) -> tuple[Tensor, Tensor | None]:
    """(quantized, loss): codebook[index], and l_n = mean_d (x_d - e_d)^2 reduced over the rows.

    quantized has x's shape, dtype and strides; without x it is [*R, D] contiguous in the codebook's dtype.
    Rows with index -1 hold `fill` and have no loss; a row of x with a NaN or Inf element is NaN in both.
    loss: None without x or with NO_LOSS, [*R] for "none"; "mean" is sum_n l_n / N_valid (0 where no row is
    valid), "sum" the sum over all elements.
    """
    _check_indices(indices, codebook.shape[0])
    unused = (indices < 0).unsqueeze(-1)
    e = codebook[indices.clamp(min=0).long()]
    if x is None:
        return e.masked_fill(unused, fill), None
    poisoned = ~x.isfinite().all(-1, keepdim=True)
    quantized = torch.empty_like(x)
    quantized.copy_(e.to(x.dtype).masked_fill(poisoned, math.nan).masked_fill(unused, fill))
    if reduction == NO_LOSS:
        return quantized, None
    dtype = compute_dtype(x, codebook)
    difference = (x.to(dtype) - e.to(dtype)).masked_fill(unused, 0).masked_fill(poisoned & ~unused, math.nan)
    row = tree_sum(difference.square())
    if reduction == 0:
        return quantized, row / x.shape[-1]
    total = tree_sum(row.double().flatten())
    if reduction == 1:
        total = total / (x.shape[-1] * (indices >= 0).sum().clamp(min=1))
    return quantized, total.to(dtype)


def vq_gather_bwd(
    gq: Tensor | None, w: Tensor | None, x: Tensor, codebook: Tensor, indices: Tensor, estimator: int
) -> Tensor:
    """gx_n = E(gq_n) + 2 w_n (x_n - e_n), of x's shape, dtype and strides; 0 in rows with index -1.

    w: [] or [*R], the gradient of sum_d (x_d - e_d)^2. E: 0 ("none"), gq ("ste"), or the rotation
        (|e| / |x|) (g - 2 t (t.g) + 2 u (v.g)),    u = x / |x|,  v = e / |e|,  t = (u + v) / |u + v|
    which falls back to gq where |x|, |e| or |u + v| < 1e-6.
    Source of the rotation: Fifty et al., "Restructuring Vector Quantization with the Rotation Trick", 2024.
    """
    _check_indices(indices, codebook.shape[0])
    dtype = compute_dtype(x, codebook)
    v = x.to(dtype)
    e = codebook[indices.clamp(min=0).long()].to(dtype)
    gx = torch.zeros_like(v)
    if gq is not None and estimator:
        gx = gq.to(dtype)
        if estimator == 2:
            gx = rotate_back(gx, v, e)
    if w is not None:
        gx = gx + 2 * (w.unsqueeze(-1) if w.dim() else w).to(dtype) * (v - e)
    return torch.empty_like(x).copy_(gx.masked_fill((indices < 0).unsqueeze(-1), 0))


def rotate_back(g: Tensor, x: Tensor, e: Tensor) -> Tensor:
    """The rotation trick's gradient of x; all [*R, D]."""
    norm_x, norm_e = (tree_sum(a.square()).sqrt().unsqueeze(-1) for a in (x, e))
    u, v = x / norm_x, e / norm_e
    t = u + v
    norm_t = tree_sum(t.square()).sqrt().unsqueeze(-1)
    t = t / norm_t
    dot = lambda a, b: tree_sum(a * b).unsqueeze(-1)  # noqa: E731
    rotated = (norm_e / norm_x) * (g - 2 * t * dot(t, g) + 2 * u * dot(v, g))
    return torch.where((norm_x < _TINY) | (norm_e < _TINY) | (norm_t < _TINY), g, rotated)


def vq_segment_sum(
    values: Tensor,
    indices: Tensor,
    weights: Tensor | None,
    absmax: Tensor | None,
    K: int,
    skip_nonfinite: bool,
    fp64: bool,
) -> tuple[Tensor, Tensor]:
    """counts [K] = sum of w_n, sums [K, D] = sum of w_n values_n, over the rows n of each index.

    Rows with index -1 count nowhere; with skip_nonfinite, nor do rows with a NaN or Inf element. Accumulated
    in fp64, each code's rows in row order; returned in fp32, or fp64 with `fp64`. With absmax (weights None)
    both are int64 in fixed point: rint(value 2^(36 - e)), saturating at +-2^36, where 2^(e-1) <= absmax < 2^e
    (e = 0 for absmax 0): the same for any split of the rows. Fixed point has no NaN: give skip_nonfinite too.
    """
    _check_indices(indices, K)
    flat, index = values.reshape(-1, values.shape[-1]), indices.reshape(-1).long()
    out = index < 0
    if skip_nonfinite:
        out = out | ~flat.isfinite().all(-1)
    index = index.masked_fill(out, K)  # a code more, which is thrown away
    if absmax is not None:
        up = FIXED_POINT_BITS - absmax.double().frexp().exponent
        limit = 2.0**FIXED_POINT_BITS
        flat = scale_by_power_of_two(flat.double(), up).round().clamp(-limit, limit).long()
        counts, sums = flat.new_zeros(K + 1), flat.new_zeros(K + 1, flat.shape[1])
        return counts.index_add_(0, index, torch.ones_like(index))[:K], sums.index_add_(0, index, flat)[:K]
    w = torch.ones_like(index, dtype=torch.float64) if weights is None else weights.reshape(-1).double()
    flat = flat.double() if weights is None else flat.double() * w.unsqueeze(-1)
    counts = flat.new_zeros(K + 1).index_add_(0, index, w)
    sums = flat.new_zeros(K + 1, flat.shape[1]).index_add_(0, index, flat)
    dtype = torch.float64 if fp64 else torch.float32
    return counts[:K].to(dtype), sums[:K].to(dtype)


def vq_lookup(
    indices: Tensor, codebook: Tensor, *, channel_dim: int = -1, fill: float = 0.0, impl: str | None = None
) -> Tensor:
    """Reference of `vaeops.vq_lookup`: same arguments, differentiable PyTorch throughout."""
    _only_ref(impl)
    return vq_gather(indices, codebook, None, fill, NO_LOSS)[0].movedim(-1, channel_dim)


def vector_quantize(x, codebook, *, metric="l2", estimator="ste", mask=None, channel_dim=-1,
                    stats=False, reduction="mean", precision="exact", deterministic=None,
                    impl=None) -> VQOutput:  # fmt: skip
    """Reference of `vaeops.vector_quantize`: same arguments, differentiable PyTorch throughout.

    Sums here are in floating point whatever `deterministic` says: fixed point is the kernels' way to the
    same value.
    """
    _only_ref(impl)
    rows = x.movedim(channel_dim, -1)
    fixed = rows.detach()
    indices = vq_assign(fixed, codebook.detach(), mask, METRICS.index(metric), precision == "exact", False)
    dtype = compute_dtype(x, codebook)
    unused = (indices < 0).unsqueeze(-1)
    e = codebook[indices.clamp(min=0)]

    def loss(a: Tensor, b: Tensor) -> Tensor:
        poisoned = ~fixed.isfinite().all(-1, keepdim=True) & ~unused
        squared = (a.to(dtype) - b.to(dtype)).square().masked_fill(unused, 0).masked_fill(poisoned, math.nan)
        if reduction == "sum":
            return squared.sum()
        row = squared.mean(-1)
        return row if reduction == "none" else row.sum() / (indices >= 0).sum().clamp(min=1)

    quantized = vq_gather(indices, codebook.detach(), fixed, 0.0, NO_LOSS)[0]
    through = rows.masked_fill(unused, 0)
    if estimator == "rotation":
        through = rotated(rows.to(dtype), e.detach().to(dtype)).masked_fill(unused, 0).to(x.dtype)
    if estimator != "none":
        quantized = quantized + (through - through.detach())  # adds exactly 0
    counts = sums = None
    if stats:
        wide = codebook.dtype is torch.float64
        counts, sums = vq_segment_sum(fixed, indices, None, None, codebook.shape[0], True, wide)
    return VQOutput(
        quantized.movedim(-1, channel_dim),
        indices,
        loss(rows, e.detach()),
        loss(fixed, e),
        counts,
        sums,
    )


def rotated(x: Tensor, e: Tensor) -> Tensor:
    """The rotation and rescaling that carry x to e, as a linear map of x."""
    fixed = x.detach()
    norm_x, norm_e = fixed.norm(dim=-1, keepdim=True), e.norm(dim=-1, keepdim=True)
    u, v = fixed / norm_x, e / norm_e
    t = u + v
    norm_t = t.norm(dim=-1, keepdim=True)
    t = t / norm_t
    # Where the rotation falls back, its own branch must hold no NaN: 0 * NaN would reach the gradient.
    straight = (norm_x < _TINY) | (norm_e < _TINY) | (norm_t < _TINY)
    u, v, t, scale = (a.masked_fill(straight, 0) for a in (u, v, t, norm_e / norm_x))
    turned = x - 2 * t * (t * x).sum(-1, keepdim=True) + 2 * v * (u * x).sum(-1, keepdim=True)
    return torch.where(straight, x, scale * turned)


def _only_ref(impl: str | None) -> None:
    if impl not in (None, "ref"):
        raise ValueError(f"vaeops.ref has no impl={impl!r}: it is the reference itself")
