"""Vector quantization of a batch, with the gradients and statistics that training needs.

Specification: vaeops/ref/vq.py. The gradients are surrogates (straight-through, rotation), so there is one
autograd Function with a backward of its own, and no backward of that.
"""

import torch
from torch import Tensor
from torch.autograd import Function

from ...ref import vq as ref
from ...ref.vq import VQOutput
from .._autograd import Once, check_traced, forward_mode
from .._library import check_impl, define, overloads
from . import check
from .assign import ASSIGN, triton_kernel
from .lookup import GATHER, SEGMENT_SUM

DETERMINISTIC = (None, "bitwise")


def _fake_gather_bwd(gq, w, x, codebook, indices, estimator):
    return torch.empty_like(x)


define("vq_gather_bwd",
       "(Tensor? gq, Tensor? w, Tensor x, Tensor codebook, Tensor indices, int estimator) -> Tensor",
       fake=_fake_gather_bwd, ref=ref.vq_gather_bwd, triton=triton_kernel("vq_gather_bwd"))  # fmt: skip
_GATHER_BWD = overloads("vq_gather_bwd")


class _Quantize(Function):
    """(quantized, commit_loss, codebook_loss); the two losses have one value and different gradients."""

    @staticmethod
    def forward(x, codebook, indices, counts, sums, options):
        _, reduction, impl, _ = options
        quantized, loss = GATHER[impl](indices, codebook, x, 0.0, reduction)
        return quantized, loss, loss.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        *saved, ctx.options = inputs
        ctx.save_for_backward(*saved)
        ctx.set_materialize_grads(False)
        if ctx.options[0] == 0:
            ctx.mark_non_differentiable(output[0])

    @staticmethod
    def backward(ctx, gq, g_commit, g_codebook):
        x, codebook, indices, counts, sums = ctx.saved_tensors
        estimator, reduction, impl, masked = ctx.options
        marked = indices if masked else None
        gx = ge = None
        if ctx.needs_input_grad[0] and (g_commit is not None or (gq is not None and estimator)):
            w = None if g_commit is None else _per_element(g_commit, x, marked, reduction)
            gx = _GATHER_BWD[impl](gq, w, x, codebook, indices, estimator)
        if ctx.needs_input_grad[1] and g_codebook is not None:
            w = _per_element(g_codebook, x, marked, reduction)
            if reduction == 0:
                counts, sums = SEGMENT_SUM[impl](x, indices, w, None, codebook.shape[0], True, True)
                w = torch.ones_like(counts[0])
            elif counts is None:
                counts, sums = SEGMENT_SUM[impl](x, indices, None, None, codebook.shape[0], True, True)
            # In fp64: c e and S are nearly equal where the codes fit. A code that no row chose may be NaN.
            c = counts.unsqueeze(1)
            ge = (2 * w * (torch.where(c != 0, c * codebook, 0) - sums)).to(codebook.dtype)
        if forward_mode() or (torch.is_grad_enabled() and not torch.compiler.is_compiling()):
            causes = (gq, g_commit, g_codebook, x, codebook)
            gx, ge = (None if g is None else Once.apply("vector_quantize", g, *causes) for g in (gx, ge))
        return gx, ge, None, None, None, None


class _NoForward(_Quantize):
    """For forward mode, which would pass by silently. torch.compile takes no Function with a jvp."""

    @staticmethod
    def jvp(ctx, *_):
        raise NotImplementedError("vector_quantize: there is no forward-mode derivative (jvp), only backward")


def _per_element(g: Tensor, x: Tensor, indices: Tensor | None, reduction: int) -> Tensor:
    """The gradient of sum_d (x_d - e_d)^2, [] or [*R], from that of the reduced loss.

    indices: None where every row is used.
    """
    if reduction == 0:
        return g / x.shape[-1]
    if reduction == 2:
        return g
    if indices is None:
        return g / torch.sym_max(x.numel(), 1)
    return g / (x.shape[-1] * (indices >= 0).sum().clamp(min=1))


def finite_rows(x: Tensor) -> Tensor:
    """bool [*R]: rows [*R, D] without NaN and Inf."""
    return _largest(x).isfinite()


def _largest(x: Tensor) -> Tensor:
    """max |x| of each row; NaN where there is one. No array of x's size is made.

    By two extremes: on a CPU the infinity norm takes ten times as long.
    """
    x, last = x.detach(), x.dim() - 1  # counted from the front: with dim=-1 an empty batch does not trace
    return torch.maximum(x.amax(last), -x.amin(last))


def row_absmax(x: Tensor, indices: Tensor) -> Tensor:
    """max |x| over the rows [*R, D] that count: index >= 0, no NaN or Inf. 0-d, fp32 or fp64; 0 for none.

    With several processes, its maximum over all of them is what `statistics` needs.
    """
    largest = _largest(x)
    counted = (indices >= 0) & largest.isfinite()
    largest = torch.where(counted, largest, 0).flatten()
    return torch.nn.functional.pad(largest, (0, 1)).amax().to(ref.compute_dtype(x))


def fixed_point_sums(x: Tensor, indices: Tensor, absmax: Tensor, codes: int,
                     impl: str | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """int64 (counts [K], sums [K, D]) of rows [*R, D], which add up over any split of the rows."""
    return SEGMENT_SUM[impl](x.detach(), indices, None, absmax, codes, True, False)


def from_fixed_point(counts: Tensor, sums: Tensor, absmax: Tensor,
                     dtype: torch.dtype) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(counts, sums) in floating point, from their sums over all processes."""
    down = absmax.double().frexp().exponent - ref.FIXED_POINT_BITS
    return counts.to(dtype), ref.scale_by_power_of_two(sums.double(), down).to(dtype)


def statistics(x: Tensor, indices: Tensor, codes: int, dtype: torch.dtype, deterministic: str | None = None,
               impl: str | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(counts [K], sums [K, D]) of rows [*R, D] in `dtype`; rows with NaN or Inf count nowhere."""
    if deterministic == "bitwise":
        absmax = row_absmax(x, indices)
        return from_fixed_point(*fixed_point_sums(x, indices, absmax, codes, impl), absmax, dtype)
    fp64 = dtype is torch.float64
    return SEGMENT_SUM[impl](x.detach(), indices, None, None, codes, True, fp64)


def vector_quantize(x: Tensor, codebook: Tensor, *, metric: str = "l2", estimator: str = "ste",
                    mask: Tensor | None = None, channel_dim: int = -1, stats: bool = False,
                    reduction: str = "mean", precision: str = "exact", deterministic: str | None = None,
                    impl: str | None = None) -> VQOutput:  # fmt: skip
    """Replace each row by its nearest code, with a gradient, the two losses and the codebook's statistics.

        quantized_n = e[index_n]                         index_n as `vq_assign` finds it
        l_n = sum_d (x_nd - e_d)^2 / D,   e = e[index_n]
        commit_loss = codebook_loss = sum_n l_n / N_valid     gradient to x and to the codebook, respectively
        counts_k = #{n: index_n = k},   sums_k = sum of those x_n
    Losses are unweighted: VQ-VAE's objective is codebook_loss + beta * commit_loss; with an averaged codebook
    (`vq_ema_`) take commit_loss alone.

    Args:
        x: [*R, D], or with the D channels at `channel_dim`; any floating dtype, any strides.
        codebook: [K, D], any floating dtype.
        metric, precision, impl: as in `vq_assign`.
        estimator: how the gradient g of quantized reaches x. "ste": dx = g. "rotation": dx = the rotation and
            scaling that carry x to e, transposed, of g; g itself where |x|, |e| or |x/|x| + e/|e|| < 1e-6.
            "none": not at all. To the codebook it never does; `vq_lookup` of the indices is for that.
        mask: bool [*R], True = use. A masked row has index -1, quantized 0, no loss and no gradient.
        stats: whether counts and sums are wanted.
        reduction: of the losses: "mean" [], over the valid rows and D (0 where no row is valid) | "sum" [],
            over all elements | "none" [*R], l_n, 0 where masked.
        deterministic: None: counts and sums are the same bits from run to run, for any number of threads.
            "bitwise" (with stats=True): also for any order and any split of the rows, by fixed-point sums
            that keep 36 bits of the largest |x|.

    Returns:
        VQOutput(quantized, indices, commit_loss, codebook_loss, counts, sums).
        quantized: x's shape, dtype and strides; the codes bit for bit, cast to x's dtype.
        indices: int64 [*R]. Losses: fp32 (fp64 where x or the codebook is).
        counts [K], sums [K, D]: fp32 (fp64 where the codebook is), no gradient; None without stats. A row
        with a NaN or Inf element has NaN in quantized and in the losses, and never touches the statistics
        nor the codebook's gradient.
        Saved for backward: x, codebook, indices (and fp64 statistics where stats and the codebook's gradient
        are both wanted). With stats and a codebook that needs no gradient, a copy of it is saved, so that
        `vq_ema_` may follow before backward. Forward memory beyond inputs and outputs is O(N + K D).

    Raises:
        TypeError, ValueError: naming the argument, what came and what is taken; the same under torch.compile.
        RuntimeError: on double backward. NotImplementedError: on a tangent of forward mode.

    Source: van den Oord et al., "Neural Discrete Representation Learning", 2017; the rotation: Fifty et al.,
    "Restructuring Vector Quantization with the Rotation Trick", 2024.
    """
    op = "vector_quantize"
    rows = check.rows(op, x, codebook, channel_dim)
    check.mask(op, mask, rows)
    metric_code = check.one_of(op, "metric", metric, ref.METRICS)
    options = (
        check.one_of(op, "estimator", estimator, ref.ESTIMATORS),
        check.one_of(op, "reduction", reduction, ref.REDUCTIONS),
        impl,
        mask is not None,
    )
    exact = check.exact(op, precision)
    if deterministic not in DETERMINISTIC:
        raise ValueError(f"{op}: deterministic must be None or 'bitwise', got {deterministic!r}")
    if deterministic and not stats:
        raise ValueError(f"{op}: deterministic='bitwise' is about counts and sums, it needs stats=True")
    check_impl(op, impl, rows)

    codes, dtype = codebook.shape[0], ref.compute_dtype(codebook)
    fixed_rows, fixed_codebook = rows.detach(), codebook.detach()
    indices = ASSIGN[impl](fixed_rows, fixed_codebook, mask, metric_code, exact, False)
    counts = sums = wide_counts = wide_sums = None
    check_traced(op)
    forward = forward_mode()
    wants_codebook = forward or (torch.is_grad_enabled() and codebook.requires_grad)
    if stats and wants_codebook and deterministic is None and options[1] != 0:
        wide_counts, wide_sums = statistics(fixed_rows, indices, codes, torch.float64, None, impl)
        counts, sums = wide_counts.to(dtype), wide_sums.to(dtype)
    elif stats:
        counts, sums = statistics(fixed_rows, indices, codes, dtype, deterministic, impl)

    if wants_codebook or (torch.is_grad_enabled() and rows.requires_grad):
        if torch.compiler.is_compiling() and rows is codebook:
            rows = rows.view_as(rows)  # Dynamo refuses a Function that is given one tensor twice
        if stats and not wants_codebook:
            codebook = fixed_codebook.clone()  # vq_ema_ may change the codebook before backward
        function = _NoForward if forward else _Quantize
        quantized, commit, codebook_loss = function.apply(
            rows, codebook, indices, wide_counts, wide_sums, options
        )
    else:
        quantized, commit = GATHER[impl](indices, fixed_codebook, fixed_rows, 0.0, options[1])
        codebook_loss = commit.clone()  # one may be changed in place
    if rows is not x:
        quantized = quantized.movedim(-1, channel_dim)
    return VQOutput(quantized, indices, commit, codebook_loss, counts, sums)
