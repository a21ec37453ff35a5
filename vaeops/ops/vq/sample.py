"""Stochastic codes, and the entropies that keep a codebook in use, without an array of N x K elements.

    p_nk = softmax over k of l_nk / temperature
    l2      l = -|x - e|^2
    cosine  l = x.e / (|x| |e|)
    dot     l = x.e
Rows are taken in chunks, and in backward again. fp32 (fp64 where x or the codebook is), also under autocast.
A code with a NaN or Inf element, and for "cosine" a zero code, has probability 0.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd import Function

from ...ref import vq as ref
from .. import rng
from .._autograd import Once
from .._library import library
from . import check
from .assign import vq_assign
from .quantize import finite_rows

_CHUNK = 1 << 20  # logits of a chunk of rows: 4 MiB
_SMALLEST = 2.0**-26  # of an exponential draw: fp32 noise cannot tell what lies below 2^-25 from 0


def _chunks(rows: int, codes: int) -> Iterator[slice]:
    step = max(2, _CHUNK // codes // 2 * 2)  # even: two rows of pairs of normals are whole Philox blocks
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _centre(e: Tensor, choosable: Tensor, metric: int) -> tuple[Tensor, Tensor | float]:
    """Codes around their mean, which the l2 logits do not depend on and which costs their digits."""
    e = torch.where(choosable.unsqueeze(1), e, 0)
    mean = e.sum(0) / choosable.sum().clamp(min=1) if metric == 0 else 0.0
    return torch.where(choosable.unsqueeze(1), e - mean, 0), mean


def _logits(x: Tensor, e: Tensor, choosable: Tensor, temperature: float, metric: int) -> Tensor:
    """[n, K], less what a row has in common; the largest is 0, so overflow makes no +inf."""
    l = 2 * x @ e.t() - e.square().sum(1) if metric == 0 else x @ e.t()  # noqa: E741
    l = torch.where(choosable, l, -torch.inf)  # noqa: E741
    return (l - l.amax(1, keepdim=True)) / temperature


def _without_autocast(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, enabled=False)


def _sample(
    x: Tensor, codebook: Tensor, choosable: Tensor, seed: Tensor, temperature: float, metric: int
) -> Tensor:
    indices = torch.empty(x.shape[0], dtype=torch.int64, device=x.device)
    e, mean = _centre(codebook, choosable, metric)
    with _without_autocast(x):
        for rows in _chunks(x.shape[0], e.shape[0]):
            l = _logits(x[rows] - mean, e, choosable, temperature, metric)  # noqa: E741
            pairs = rng.normal((*l.shape, 2), rng.advance(seed, 2 * rows.start * e.shape[0]))
            exponential = (pairs.square().sum(-1) / 2).clamp(min=_SMALLEST)
            indices[rows] = torch.where(choosable, l - exponential.log(), -torch.inf).argmax(1)
    return indices


def _entropies(x: Tensor, codebook: Tensor, choosable: Tensor, used: Tensor, temperature: float, metric: int
               ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(mean over rows of H(p_n), H(P), P): P [K] the mean of p_n."""
    e, mean = _centre(codebook, choosable, metric)
    total = x.new_zeros((), dtype=torch.float64)
    share = x.new_zeros(e.shape[0], dtype=torch.float64)
    with _without_autocast(x):
        for rows in _chunks(x.shape[0], e.shape[0]):
            p = _logits(x[rows] - mean, e, choosable, temperature, metric).softmax(1)
            p = torch.where(used[rows].unsqueeze(1), p, 0)
            total += torch.special.entr(p).sum(dtype=torch.float64)
            share += p.sum(0, dtype=torch.float64)
        n = used.sum().clamp(min=1)
        share = (share / n).nan_to_num(nan=0.0)
        return (total / n).to(x.dtype), torch.special.entr(share).sum().to(x.dtype), share.to(x.dtype)


def _entropies_bwd(g_sample: Tensor, g_average: Tensor, x: Tensor, codebook: Tensor, choosable: Tensor,
                   used: Tensor, share: Tensor, temperature: float, metric: int
                   ) -> tuple[Tensor, Tensor]:  # fmt: skip
    """With H_n = H(p_n), P the mean of p_n and N the rows used:

    d H_n / d l_nk = -p_nk (log p_nk + H_n) / temperature
    d H(P) / d l_nk = p_nk (a_k - sum_j p_nj a_j) / temperature,   a_k = -log P_k / N
    """
    e, mean = _centre(codebook, choosable, metric)
    gx, ge = torch.zeros_like(x), torch.zeros_like(codebook)
    n = used.sum().clamp(min=1)
    with _without_autocast(x):
        a = -g_average / n * torch.where(share > 0, share, 1).log()
        for rows in _chunks(x.shape[0], e.shape[0]):
            v = torch.where(used[rows].unsqueeze(1), x[rows] - mean, 0)
            log_p = _logits(v, e, choosable, temperature, metric).log_softmax(1)
            p = torch.where(used[rows].unsqueeze(1) & choosable, log_p.exp(), 0)
            log_p = torch.where(p > 0, log_p, 0)
            entropy = -(p * log_p).sum(1, keepdim=True)
            gl = p * (a - (p * a).sum(1, keepdim=True) - g_sample / n * (log_p + entropy)) / temperature
            if metric == 0:  # sum_k gl = 0, so what a row has in common has no gradient
                gl = 2 * gl
                ge -= gl.sum(0).unsqueeze(1) * e
            gx[rows] = gl @ e
            ge += gl.t() @ v
    return gx, ge


# Opaque to torch.compile: a loop over chunks of a dynamic number of rows cannot be traced.
def _define(name: str, signature: str, kernel: Callable, fake: Callable) -> None:
    library.define(name + signature, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vaeops::{name}", fake, lib=library)


_TENSORS, _OPTIONS = "Tensor x, Tensor codebook, Tensor choosable", "float temperature, int metric"
_define("vq_sample", f"({_TENSORS}, Tensor seed, {_OPTIONS}) -> Tensor", _sample,
        lambda x, *_: x.new_empty(x.shape[0], dtype=torch.int64))  # fmt: skip
_define("vq_entropy", f"({_TENSORS}, Tensor used, {_OPTIONS}) -> (Tensor, Tensor, Tensor)", _entropies,
        lambda x, e, *_: (x.new_empty(()), x.new_empty(()), x.new_empty(e.shape[0])))  # fmt: skip
_define("vq_entropy_bwd",
        f"(Tensor g_sample, Tensor g_average, {_TENSORS}, Tensor used, Tensor share, {_OPTIONS})"
        " -> (Tensor, Tensor)",
        _entropies_bwd, lambda g, h, x, e, *_: (torch.empty_like(x), torch.empty_like(e)))  # fmt: skip


class _Entropy(Function):
    @staticmethod
    def forward(x, codebook, choosable, used, temperature, metric):
        return torch.ops.vaeops.vq_entropy(x, codebook, choosable, used, temperature, metric)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *saved, ctx.temperature, ctx.metric = inputs
        ctx.save_for_backward(*saved, output[2])
        ctx.mark_non_differentiable(output[2])

    @staticmethod
    def backward(ctx, g_sample, g_average, _):
        saved = ctx.saved_tensors
        gradients = torch.ops.vaeops.vq_entropy_bwd(g_sample, g_average, *saved, ctx.temperature, ctx.metric)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            gradients = (Once.apply("vq_entropy", g, g_sample, g_average, *saved[:2]) for g in gradients)
        return *gradients, None, None, None, None


def _operands(rows: Tensor, codebook: Tensor, metric: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x [N, D], codebook [K, D], choosable [K], finite [N]) in the compute dtype; of norm 1 for cosine."""
    dtype = ref.compute_dtype(rows, codebook)
    finite, choosable = finite_rows(rows).reshape(-1), finite_rows(codebook)
    x = torch.where(finite.unsqueeze(1), rows.reshape(-1, rows.shape[-1]).to(dtype), 0)
    e = torch.where(choosable.unsqueeze(1), codebook.to(dtype), 0)
    if metric == 1:
        choosable = choosable & (e.detach() != 0).any(1)
        x, e = torch.nn.functional.normalize(x, dim=1), torch.nn.functional.normalize(e, dim=1)
    return x, e, choosable, finite


def _not_zero(temperature: float, dtype: torch.dtype) -> float:
    """The temperature, or the smallest number that the dtype does not take for 0."""
    return max(float(temperature), torch.finfo(dtype).tiny)


def vq_sample(x: Tensor, codebook: Tensor, temperature: float, seed: Tensor, *, metric: str = "l2",
              mask: Tensor | None = None, channel_dim: int = -1) -> Tensor:  # fmt: skip
    """A random code for each row, drawn from softmax(l / temperature).

        index_n = argmax_k l_nk / temperature + G_nk,   G = -log((a^2 + b^2) / 2)
    with l as at the head of this file: -|x - e|^2, the cosine, or x.e. a and b are the noise stream's normals
    (n K + k) 2 and (n K + k) 2 + 1 of `seed`: the same on any device, up to the rounding of l.

    Args:
        x: [*R, D], or with the D channels at `channel_dim`. codebook: [K, D].
        temperature: >= 0; 0 is `vq_assign`.
        seed: int64 [2] (`vaeops.rng.make_seed`).
        metric: "l2" | "cosine" | "dot".
        mask: bool [*R], True = use.

    Returns:
        indices int64 [*R]; -1 where masked, 0 for a row with a NaN or Inf element. No gradient.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is taken; the same under torch.compile.
    """
    op = "vq_sample"
    rows = check.rows(op, x, codebook, channel_dim)
    check.mask(op, mask, rows)
    code = check.one_of(op, "metric", metric, ref.METRICS)
    check.number(op, "temperature", temperature, 0, float("inf"), "[)")
    rng.check_seed(op, seed, x.device, ())
    if temperature == 0:
        return vq_assign(rows, codebook, metric=metric, mask=mask)
    v, e, choosable, finite = _operands(rows.detach(), codebook.detach(), code)
    indices = torch.ops.vaeops.vq_sample(v, e, choosable, seed, _not_zero(temperature, v.dtype), code)
    indices = indices.masked_fill(~finite, 0).reshape(rows.shape[:-1])
    return indices if mask is None else indices.masked_fill(~mask, -1)


def vq_entropy(x: Tensor, codebook: Tensor, *, temperature: float = 1.0, metric: str = "l2",
               mask: Tensor | None = None, channel_dim: int = -1) -> tuple[Tensor, Tensor]:  # fmt: skip
    """How sure each row is of its code, and how evenly the codes are used: the two entropies, in nats.

        sample_entropy = mean_n H(p_n),   avg_entropy = H(mean_n p_n),   H(p) = -sum_k p_k log p_k
    with p_n = softmax(l_n / temperature), l as at the head of this file. Entropy losses subtract the second
    from the first.

    Args:
        x: [*R, D], or with the D channels at `channel_dim`. codebook: [K, D].
        temperature: > 0.
        metric: "l2" | "cosine" | "dot".
        mask: bool [*R], True = use. Rows with a NaN or Inf element are left out too.

    Returns:
        (sample_entropy [], avg_entropy []), fp32 (fp64 where x or the codebook is); 0 where no row is used.
        Gradients to x and the codebook; double backward raises. Saved for backward: x, codebook, mean_n p_n.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is taken; the same under torch.compile.

    Source: Jansen et al., "Coincidence, Categorization, and Consolidation", 2019; Yu et al., "Language Model
    Beats Diffusion: Tokenizer is Key to Visual Generation", 2023.
    """
    op = "vq_entropy"
    rows = check.rows(op, x, codebook, channel_dim)
    check.mask(op, mask, rows)
    code = check.one_of(op, "metric", metric, ref.METRICS)
    check.number(op, "temperature", temperature, 0, float("inf"), "()")
    v, e, choosable, used = _operands(rows, codebook, code)
    if mask is not None:
        used = used & mask.reshape(-1)
    sample, average, _ = _Entropy.apply(v, e, choosable, used, _not_zero(temperature, v.dtype), code)
    return sample, average
