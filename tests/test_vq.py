"""Vector quantization's kernels: values exact by the definition, layouts, edges, opcheck.

Gradients and transforms: test_vq_gradients.py. What updates a codebook: test_vq_update.py. Bad arguments:
test_vq_arguments.py.
"""

import functools
import math

import numpy as np
import pytest
import torch
import vq_case
from budget import assert_within_budget

import vaeops
from vaeops.ref import vq as ref

OPS = torch.ops.vaeops
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INF, NAN = math.inf, math.nan


def op(name, impl):
    return getattr(getattr(OPS, name), impl)


def extended(t):
    """In NumPy's widest floating point: a result in fp64 needs a more exact one to compare with."""
    return t.double().numpy().astype(np.longdouble)


def channel_first(x):
    """The same [N, D] values with D strided, as of an image [B, D, H W] seen with the channels last."""
    return x.t().contiguous().t()


# ---- the nearest code, exactly


@functools.cache
def answer(name, metric, n, k, d):
    """(the indices, how many the usual formula gets wrong): one for every implementation, so made once."""
    torch.manual_seed(n + k + d)
    x, e = vq_case.DISTRIBUTIONS[name](n, k, d)
    expected = vq_case.nearest(x, e, metric)
    return expected, int((vq_case.eager(x, e) != expected).sum()) if metric == "l2" and n else 0


def check_nearest(impl, name, shapes, metric="l2"):
    rows = wrong = eager_wrong = 0
    for n, k, d in shapes:
        expected, its_wrong = answer(name, metric, n, k, d)
        torch.manual_seed(n + k + d)
        x, e = vq_case.DISTRIBUTIONS[name](n, k, d)
        got = vaeops.vq_assign(x, e, metric=metric, impl=impl)
        rows, wrong, eager_wrong = rows + n, wrong + int((got != expected).sum()), eager_wrong + its_wrong
    print(
        f"{name:16s} {metric:6s} {rows:7d} rows, wrong: {wrong} (the textbook formula in fp32: {eager_wrong})"
    )
    assert wrong == 0


@pytest.mark.parametrize("name", vq_case.DISTRIBUTIONS)
def test_nearest_code(impl, name):
    check_nearest(impl, name, vq_case.SHAPES)


@pytest.mark.slow
@pytest.mark.parametrize("name", vq_case.DISTRIBUTIONS)
def test_nearest_code_at_large_sizes(impl, name):
    duplicates = name in (
        "duplicates",
        "near duplicates",
        "integers",
        "denormals",
    )  # the oracle scores every pair
    shapes = [s for s in vq_case.LARGE if not duplicates or math.prod(s[:2]) <= 1 << 24]
    check_nearest(impl, name, shapes if impl != "ref" else shapes[:3])


@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize("name", ["gauss", "fitted", "offset 20", "duplicates", "scale 1e-15", "midpoints"])
def test_nearest_code_by_other_metrics(impl, name, metric):
    check_nearest(impl, name, vq_case.SHAPES[1::2], metric)


@pytest.mark.parametrize("name", ["gauss", "offset 100", "midpoints", "taming"])
@pytest.mark.parametrize("metric", ref.METRICS)
@pytest.mark.parametrize(
    ("x_dtype", "e_dtype"),
    [(a, b) for a in DTYPES for b in DTYPES if (a, b) != (torch.float32, torch.float32)],
    ids=str,
)
def test_nearest_code_in_every_dtype(impl, name, metric, x_dtype, e_dtype):
    for n, k, d in ((33, 65, 8), (17, 64, 33)):
        x, e = vq_case.DISTRIBUTIONS[name](n, k, d)
        x, e = x.to(x_dtype), e.to(e_dtype)
        if e_dtype is torch.float64:
            e = e + 1e-9 * torch.randn(k, d, dtype=torch.float64)  # bits that fp32 has not
        assert torch.equal(vaeops.vq_assign(x, e, metric=metric, impl=impl), vq_case.nearest(x, e, metric))


def test_fp64_needs_a_true_fma(impl):
    """Half-way between two codes, a product that is rounded before its addition decides otherwise."""
    unfused_wrong = 0
    for _ in range(200):
        codebook = torch.randn(2, 3, dtype=torch.float64)
        x = codebook.mean(0, keepdim=True)
        expected = vq_case.scores(x, codebook).argmin(1)
        assert torch.equal(vaeops.vq_assign(x, codebook, impl=impl), expected)
        t, h = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        for d in range(3):
            t, h = t + x[0, d] * codebook[:, d], h + codebook[:, d] * codebook[:, d]
        unfused_wrong += int((0.5 * h - t).argmin() != expected)
    assert unfused_wrong > 10


@pytest.mark.parametrize("metric", ref.METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("k", [1, 2, 5, 37, 70])
def test_topk(impl, metric, dtype, k):
    for name in ("gauss", "integers", "midpoints"):
        x, e = vq_case.DISTRIBUTIONS[name](13, 70, 6)
        x, e = x.to(dtype), torch.where(torch.rand(70, 1) < 0.1, NAN, e)
        s, order = vq_case.scores(x, e, metric).sort(dim=1, stable=True)
        scores, indices = vaeops.vq_topk(x, e, k, metric=metric, impl=impl)
        assert torch.equal(indices, order[:, :k])
        assert scores.dtype is ref.compute_dtype(x, e) and torch.equal(scores, s[:, :k].to(scores.dtype))
        assert torch.equal(indices[:, 0], vaeops.vq_assign(x, e, metric=metric, impl=impl))


def test_topk_edges(impl):
    x, e = torch.randn(4, 3), torch.randn(5, 3)
    x[1, 2], mask = NAN, torch.tensor([True, True, False, True])
    scores, indices = vaeops.vq_topk(x, e, 2, mask=mask, index_dtype=torch.int32, impl=impl)
    assert indices.dtype is torch.int32
    assert indices[1].tolist() == [0, 1] and scores[1].tolist() == [INF, INF]
    assert indices[2].tolist() == [-1, -1] and scores[2].tolist() == [INF, INF]
    e[:] = INF
    scores, indices = vaeops.vq_topk(x, e, 5, impl=impl)
    assert torch.equal(indices, torch.arange(5).expand(4, 5)) and bool((scores == INF).all())


def test_fast_is_nearly_exact(impl):
    x, e = vq_case.DISTRIBUTIONS["gauss"](300, 512, 64)
    fast = vaeops.vq_assign(x, e, precision="fast", impl=impl)
    distance = lambda i: (x.double() - e[i].double()).square().sum(1)  # noqa: E731
    best = distance(vq_case.nearest(x, e))
    assert bool((distance(fast) <= best * 1.05).all())
    x[0, 0], e[3, 1] = NAN, NAN
    mask = torch.arange(300) != 7
    fast = vaeops.vq_assign(x, e, precision="fast", mask=mask, impl=impl)
    assert fast[0] == 0 and fast[7] == -1 and not bool((fast == 3).any())


# ---- an index depends on its row and the codebook alone


@pytest.mark.parametrize("metric", ref.METRICS)
@pytest.mark.parametrize(("n", "k", "d"), [(70, 300, 24), (41, 1030, 64)])
def test_index_does_not_depend_on_the_batch(impl, metric, n, k, d):
    assign = lambda x, e, **kw: vaeops.vq_assign(x, e, metric=metric, impl=impl, **kw)  # noqa: E731
    for name in ("taming", "offset 100", "near duplicates"):
        x, e = vq_case.DISTRIBUTIONS[name](n, k, d)
        want = assign(x, e)
        order = torch.randperm(n)
        assert torch.equal(torch.cat([assign(row[None], e) for row in x[:9]]), want[:9])
        assert torch.equal(assign(x[order], e), want[order])
        assert torch.equal(torch.cat([assign(p, e) for p in x.split(17)]), want)
        assert torch.equal(assign(torch.cat((torch.full((5, d), 1e30), x)), e)[5:], want)
        assert torch.equal(assign(torch.cat((x, x[:1].expand(64, d))), e)[:n], want)
        assert torch.equal(assign(x, e, index_dtype=torch.int32), want.int())
        assert torch.equal(assign(x.double(), e.double()), want)  # the values are what counts
        few = x.bfloat16()
        assert torch.equal(assign(few, e), assign(few.float(), e))


def layouts(x):
    """The same values [N, D], or an image of them, in other memory; with the channel dim."""
    n, d = x.shape
    yield "every second row", x.repeat_interleave(2, 0)[::2], -1
    yield "every second column", x.repeat_interleave(2, 1)[:, ::2], -1
    yield "transposed", channel_first(x), -1
    yield "channel first", x.t().contiguous(), 0
    yield "offset", torch.cat((x.new_ones(3), x.flatten()))[3:].view(n, d), -1
    yield "image", x.view(2, -1, 3, d).permute(0, 3, 1, 2).contiguous(), 1
    yield "channels last image", x.view(2, -1, 3, d).permute(0, 3, 1, 2), 1
    yield "middle", x.view(2, -1, 3, d).movedim(-1, 2).contiguous(), 2
    yield "padded image", torch.nn.functional.pad(x.view(2, -1, 3, d), (1, 2, 3, 1))[:, :, 3:-1, 1:-2], -1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(impl, dtype):
    x, e = torch.randn(66, 24).to(dtype), torch.randn(130, 24)
    e = e.double() if dtype is torch.float64 else e
    mask = torch.rand(66) < 0.8
    want = vaeops.vector_quantize(x, e, mask=mask, stats=True, reduction="none", impl=impl)
    gq, w = torch.randn(66, 24).to(dtype), torch.rand(66, dtype=want.commit_loss.dtype)
    want_gx = op("vq_gather_bwd", impl)(gq, w, x, e, want.indices, 2)
    for name, view, dim in layouts(x):
        rows = view.movedim(dim, -1)
        got = vaeops.vector_quantize(view, e, mask=mask.view(rows.shape[:-1]), stats=True, channel_dim=dim,
                                     reduction="none", impl=impl)  # fmt: skip
        assert got.quantized.shape == view.shape, name
        like = torch.empty_like(rows).movedim(-1, dim)
        assert got.quantized.stride() == like.stride(), name
        for a, b in zip(got, want):
            a = a.movedim(dim, -1) if a.shape == view.shape and a.dtype is dtype and a.dim() > 1 else a
            assert torch.equal(a.reshape(b.shape), b), name
        index = got.indices
        gx = op("vq_gather_bwd", impl)(gq.view(rows.shape), w.view(index.shape), rows, e, index, 2)
        assert gx.stride() == torch.empty_like(rows).stride()
        assert torch.equal(gx.reshape(66, 24), want_gx), name
    for name, view, dim in layouts(e.to(torch.float32)[:66]):
        if view.dim() == 2:
            codes = view.movedim(dim, -1)
            assert torch.equal(
                vaeops.vq_assign(x, codes, impl=impl), vaeops.vq_assign(x, codes.contiguous(), impl=impl)
            ), name


def test_expanded_rows(impl):
    x, e = torch.randn(1, 8), torch.randn(20, 8)
    wide = x.expand(50, 8)
    assert torch.equal(vaeops.vq_assign(wide, e, impl=impl), vaeops.vq_assign(x, e, impl=impl).expand(50))
    out = vaeops.vector_quantize(torch.randn(9, 1).expand(9, 8), e, stats=True, impl=impl)
    assert out.quantized.shape == (9, 8) and float(out.counts.sum()) == 9


# ---- edges


def test_ties_go_to_the_lowest_index(impl):
    e = torch.randn(40, 5)
    codebook = torch.cat((e, e.flip(0), e))
    x = torch.cat((e + 0.001, e))
    assert bool((vaeops.vq_assign(x, codebook, impl=impl) < 40).all())
    same = torch.ones(1000, 7)
    assert not vaeops.vq_assign(torch.randn(33, 7), same, impl=impl).any()


@pytest.mark.parametrize("metric", ref.METRICS)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_nan_and_inf(impl, metric, bad):
    x, e = torch.randn(50, 6), torch.randn(70, 6)
    clean = vaeops.vq_assign(x, torch.cat((e[:10], e[11:])), metric=metric, impl=impl)
    e[10, 3], x[4, 5] = bad, bad
    got = vaeops.vq_assign(x, e, metric=metric, impl=impl)
    want = clean + (clean >= 10)
    want[4] = 0
    assert torch.equal(got, want)
    assert not vaeops.vq_assign(x, torch.full_like(e, bad), metric=metric, impl=impl).any()


def test_a_zero_code_has_no_direction(impl):
    x, e = torch.randn(30, 4), torch.randn(5, 4)
    e[0] = 0
    assert bool((vaeops.vq_assign(x, e, metric="cosine", impl=impl) > 0).all())
    assert not vaeops.vq_assign(x, torch.zeros(5, 4), metric="cosine", impl=impl).any()
    assert not vaeops.vq_assign(torch.zeros(2, 4), e, metric="l2", impl=impl).any()


def test_the_losses_are_two_tensors(impl):
    x, e = torch.randn(4, 5), torch.randn(3, 5)
    for out in (
        vaeops.vector_quantize(x, e, impl=impl),
        vaeops.vector_quantize(x.requires_grad_(), e, impl=impl),
        vaeops.nn.FSQ([5] * 5)(x),
    ):
        before = out.codebook_loss.clone()
        out.commit_loss.detach().add_(1)
        assert torch.equal(out.codebook_loss, before)


def test_a_bad_row_stays_alone(impl):
    x, e = torch.randn(20, 6), torch.randn(9, 6)
    x[3, 2], x[5] = NAN, INF
    out = vaeops.vector_quantize(x, e, stats=True, reduction="none", impl=impl)
    rows = torch.tensor([i for i in range(20) if i not in (3, 5)])
    clean = vaeops.vector_quantize(x[rows], e, stats=True, reduction="none", impl=impl)
    assert bool(out.quantized[[3, 5]].isnan().all()) and bool(out.commit_loss[[3, 5]].isnan().all())
    assert out.indices[[3, 5]].tolist() == [0, 0]
    assert torch.equal(out.quantized[rows], clean.quantized)
    assert torch.equal(out.commit_loss[rows], clean.commit_loss)
    assert torch.equal(out.counts, clean.counts) and torch.equal(out.sums, clean.sums)
    assert bool(vaeops.vector_quantize(x, e, impl=impl).commit_loss.isnan())


@pytest.mark.parametrize("reduction", ref.REDUCTIONS)
def test_masked_rows(impl, reduction):
    x, e = torch.randn(5, 8, 6), torch.randn(9, 6)
    mask = torch.rand(5, 8) < 0.6
    x[~mask] = NAN  # padding may hold anything
    out = vaeops.vector_quantize(x, e, mask=mask, stats=True, reduction=reduction, impl=impl)
    used = vaeops.vector_quantize(x[mask], e, stats=True, reduction=reduction, impl=impl)
    assert torch.equal(out.indices[mask], used.indices) and bool((out.indices[~mask] == -1).all())
    assert torch.equal(out.quantized[mask], used.quantized) and not out.quantized[~mask].any()
    assert torch.equal(out.counts, used.counts) and torch.equal(out.sums, used.sums)
    if reduction == "none":
        assert torch.equal(out.commit_loss[mask], used.commit_loss) and not out.commit_loss[~mask].any()
    else:
        torch.testing.assert_close(out.commit_loss, used.commit_loss)


@pytest.mark.parametrize("reduction", ref.REDUCTIONS)
@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6), (4, 6)])
def test_no_rows_at_all(impl, reduction, shape):
    """Empty, or all masked out: no loss, not 0 / 0."""
    x, e = torch.randn(shape, requires_grad=True), torch.randn(9, 6, requires_grad=True)
    mask = torch.zeros(shape[:-1], dtype=torch.bool)
    for m in (mask, None) if x.numel() == 0 else (mask,):
        out = vaeops.vector_quantize(x, e, mask=m, stats=True, reduction=reduction, impl=impl)
        assert out.quantized.shape == shape and out.indices.shape == shape[:-1]
        assert not out.quantized.any() and not out.commit_loss.any() and not out.counts.any()
        (out.quantized.sum() + out.commit_loss.sum() + out.codebook_loss.sum()).backward()
        assert x.grad.shape == shape and not x.grad.any() and not e.grad.any()
    scores, indices = vaeops.vq_topk(x, e, 3, mask=mask, impl=impl)
    assert scores.shape == indices.shape == (*shape[:-1], 3)


# ---- gather, loss, sums


@pytest.mark.parametrize("e_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [1, 3, 16, 65, 700])
def test_gather_and_loss(impl, x_dtype, e_dtype, d):
    x, e = torch.randn(133, d).to(x_dtype), torch.randn(50, d).to(e_dtype)
    for index_dtype in (torch.int64, torch.int32):
        indices = torch.randint(-1, 50, (133,), dtype=index_dtype)
        used = indices >= 0
        codes = e[indices.clamp(min=0).long()]
        want = torch.where(used[:, None], codes.to(x_dtype), torch.tensor(0.5, dtype=x_dtype))
        error = np.where(used[:, None], extended(x) - extended(codes), 0) ** 2
        dtype = ref.compute_dtype(x, e)
        eager = torch.where(used[:, None], x.to(dtype) - codes.to(dtype), 0).square()
        reduced = [(s.mean(1), s.mean(1).sum() / int(used.sum()), s.sum()) for s in (error, eager)]
        for code, (exact_loss, eager_loss) in enumerate(zip(*reduced)):
            quantized, loss = op("vq_gather", impl)(indices, e, x, 0.5, code)
            assert quantized.dtype is x_dtype and torch.equal(quantized, want)
            assert loss.dtype is dtype
            exact_loss = torch.from_numpy(np.asarray(exact_loss, dtype=np.float64))
            assert_within_budget(loss, exact_loss, eager_loss, f"loss {ref.REDUCTIONS[code]}")
        quantized, loss = op("vq_gather", impl)(indices, e, x, 0.5, ref.NO_LOSS)
        assert torch.equal(quantized, want) and loss is None
        plain, loss = op("vq_gather", impl)(indices, e, None, -2.0, ref.NO_LOSS)
        assert plain.dtype is e_dtype and plain.is_contiguous() and loss is None
        assert torch.equal(plain, torch.where(used[:, None], codes, torch.tensor(-2.0, dtype=e_dtype)))


@pytest.mark.slow
@pytest.mark.skipif(vaeops._native.why_not("_ops_cpu") is not None, reason="too much for the reference")
def test_more_than_2_31_elements():
    d = 64
    x = torch.zeros(2**31 // d + 8, d, dtype=torch.bfloat16)
    x[-8:] = torch.randn(8, d)
    codebook = torch.randn(5, d)
    codebook[3] = 0  # the nearest of a zero row
    out = vaeops.vector_quantize(x, codebook, stats=True, reduction="sum")
    last = vaeops.vector_quantize(x[-8:].clone(), codebook, stats=True, reduction="sum")
    assert bool((out.indices[:-8] == 3).all()) and torch.equal(out.indices[-8:], last.indices)
    assert torch.equal(out.quantized[-8:], last.quantized) and not out.quantized[-1000:-8].any()
    assert torch.equal(out.sums, last.sums) and torch.equal(out.commit_loss, last.commit_loss)
    assert abs(int(out.counts[3]) - (x.shape[0] - 8)) <= 8  # fp32 holds 2^25 to a multiple of 4


@pytest.mark.parametrize("index", [-2, 50, 2**40])
def test_an_index_out_of_range_is_an_error(impl, index):
    e, x = torch.randn(50, 4), torch.randn(3, 4)
    indices = torch.tensor([0, index, 1])
    with pytest.raises(RuntimeError, match="indices"):
        vaeops.vq_lookup(indices, e, impl=impl)
    with pytest.raises(RuntimeError, match="indices"):
        op("vq_segment_sum", impl)(x, indices, None, None, 50, False, False)
    with pytest.raises(RuntimeError, match="indices"):
        op("vq_gather_bwd", impl)(x, None, x, e, indices, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("n", "k", "d"), [(0, 3, 2), (1000, 7, 5), (300, 1000, 33), (2000, 3, 64)])
def test_segment_sums(impl, dtype, weighted, n, k, d):
    x, indices = torch.randn(n, d).to(dtype), torch.randint(-1, k, (n,))
    w = torch.rand(n, dtype=ref.compute_dtype(x)) if weighted else None
    weights = torch.ones(n, dtype=torch.float64) if w is None else w.double()
    used = indices >= 0
    one_hot = (indices[:, None] == torch.arange(k)) * weights[:, None]
    exact_counts, exact_sums = extended(one_hot).sum(0), extended(one_hot).T @ extended(x)
    for fp64 in (False, True):
        counts, sums = op("vq_segment_sum", impl)(x, indices, w, None, k, False, fp64)
        assert counts.dtype is sums.dtype is (torch.float64 if fp64 else torch.float32)
        scaled = (weights[:, None] * x.double()).to(sums.dtype)
        eager_counts = sums.new_zeros(k).index_add_(0, indices[used], weights[used].to(sums.dtype))
        eager_sums = sums.new_zeros(k, d).index_add_(0, indices[used], scaled[used])
        for name, ours, exact, eager in (("counts", counts, exact_counts, eager_counts),
                                         ("sums", sums, exact_sums, eager_sums)):  # fmt: skip
            assert_within_budget(ours, torch.from_numpy(exact.astype(np.float64)), eager, name)
        if not weighted:  # the very bits: added in row order in fp64
            ordered = torch.zeros(k, d, dtype=torch.float64)
            for i, row in zip(indices[used].tolist(), x[used].double()):
                ordered[i] += row
            assert torch.equal(sums, ordered.to(sums.dtype))


def test_segment_sums_leave_bad_rows_out_where_asked(impl):
    x, indices = torch.randn(30, 4), torch.randint(0, 5, (30,))
    x[2, 1], x[7, 0] = NAN, -INF
    good = torch.tensor([i for i in range(30) if i not in (2, 7)])
    segment_sum = op("vq_segment_sum", impl)
    counts, sums = segment_sum(x, indices, None, None, 5, True, False)
    want = segment_sum(x[good], indices[good], None, None, 5, True, False)
    assert torch.equal(counts, want[0]) and torch.equal(sums, want[1])
    counts, sums = segment_sum(x, indices, None, None, 5, False, False)
    assert int(counts.sum()) == 30 and bool(sums[indices[2], 1].isnan()) and bool(sums[indices[7], 0] == -INF)
    hurt = torch.zeros(5, 4, dtype=torch.bool)
    hurt[indices[2], 1] = hurt[indices[7], 0] = True
    assert bool(sums[~hurt].isfinite().all())  # no NaN * 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 3e-30, 1e4])
def test_fixed_point_sums(impl, dtype, scale):
    """Against Python's integers, which have no rounding of their own."""
    x = (torch.randn(200, 3, dtype=torch.float64) * scale).to(dtype)
    x[5] = 100 * scale  # beyond absmax: saturates
    indices = torch.randint(-1, 4, (200,))
    absmax = torch.tensor(4.5 * scale, dtype=ref.compute_dtype(x))
    up = 36 - math.frexp(absmax.item())[1]
    counts, sums = op("vq_segment_sum", impl)(x, indices, None, absmax, 4, True, False)
    index = indices[x.isfinite().all(1)]
    want = [[0] * 3 for _ in range(4)]
    for i, row in zip(indices.tolist(), x.double().tolist()):
        for d, value in enumerate(row):
            if i >= 0 and math.isfinite(value):
                want[i][d] += max(-(2**36), min(2**36, round(math.ldexp(value, up))))
    assert counts.dtype is sums.dtype is torch.int64
    assert sums.tolist() == want and counts.tolist() == [int((index == k).sum()) for k in range(4)]
    zero = op("vq_segment_sum", impl)(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), None,
                                      torch.tensor(0.0), 2, True, False)  # fmt: skip
    assert zero[0].tolist() == [3, 0] and not zero[1].any()


# ---- determinism


def test_bitwise_sums_are_equal_for_any_order_and_split(impl):
    x, e = torch.randn(999, 5) * 10 ** torch.empty(999, 1).uniform_(-3, 3), torch.randn(20, 5)
    x[17, 2] = NAN
    quantize = lambda x: vaeops.vector_quantize(x, e, stats=True, deterministic="bitwise", impl=impl)  # noqa: E731
    want = quantize(x)
    for _ in range(3):
        got = quantize(x[torch.randperm(999)])
        assert torch.equal(got.counts, want.counts) and torch.equal(got.sums, want.sums)
    exact = vaeops.vector_quantize(x.double(), e.double(), stats=True, impl="ref")
    assert torch.equal(want.counts.double(), exact.counts)
    # 36 bits of the largest element, in each of at most 999 terms; then rounded to fp32.
    bound = 999 * float(x.nan_to_num().abs().max()) * 2.0**-36 + exact.sums.abs() * 2.0**-24
    assert bool(((want.sums.double() - exact.sums).abs() <= bound).all())

    from vaeops.ops.vq import quantize as parts

    absmax = parts.row_absmax(x, want.indices)
    split = [
        parts.fixed_point_sums(p, i, absmax, 20, impl) for p, i in zip(x.split(100), want.indices.split(100))
    ]
    counts, sums = (sum(part[j] for part in split) for j in (0, 1))
    counts, sums = parts.from_fixed_point(counts, sums, absmax, torch.float32)
    assert torch.equal(counts, want.counts) and torch.equal(sums, want.sums)


def test_bits_do_not_depend_on_the_number_of_threads(impl):
    x, e = torch.randn(1500, 12), torch.randn(100, 12)
    fixed = {"reduction": "sum", "stats": True, "deterministic": "bitwise"}
    results = []
    threads = torch.get_num_threads()
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        results.append(
            [
                *vaeops.vector_quantize(x, e, stats=True, impl=impl),
                *vaeops.vector_quantize(x, e, **fixed, impl=impl),
                *op("vq_segment_sum", impl)(x, torch.arange(1500) % 100, x[:, 0], None, 100, False, False),
                *vaeops.vq_topk(x[:300], e, 3, impl=impl),
            ]
        )  # fmt: skip
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


# ---- opcheck


def op_arguments():
    x, e = torch.randn(3, 5, 8).movedim(1, -1), torch.randn(11, 5)
    mask, indices = torch.rand(3, 8) > 0.3, torch.randint(-1, 11, (3, 8))
    plain, flat = torch.randn(7, 5).bfloat16(), torch.randint(-1, 11, (7,), dtype=torch.int32)
    wide = e.double()
    yield "vq_assign", (x, e, mask, 0, True, False)
    yield "vq_assign", (plain[:0], wide, None, 1, False, True)
    yield "vq_topk", (x, e, mask, 3, 2, True, True)
    yield "vq_topk", (plain, wide, None, 11, 0, True, False)
    for reduction in (-1, 0, 1, 2):
        yield "vq_gather", (indices, e, x, 0.0, reduction)
        yield "vq_gather", (flat, wide, plain, 1.0, reduction)
    yield "vq_gather", (indices, e.t().contiguous().t(), None, 2.0, -1)
    for estimator in (0, 1, 2):
        yield "vq_gather_bwd", (x, torch.rand(3, 8), x, e, indices, estimator)
        yield "vq_gather_bwd", (plain, torch.rand((), dtype=torch.float64), plain, wide, flat, estimator)
    yield "vq_gather_bwd", (None, torch.rand(()), plain, e, flat, 1)
    yield "vq_gather_bwd", (x, None, x, e, indices, 1)
    yield "vq_segment_sum", (x, indices, None, None, 11, True, False)
    yield "vq_segment_sum", (x, indices, torch.rand(3, 8), None, 11, False, True)
    yield "vq_segment_sum", (plain, flat, None, torch.tensor(4.0), 11, True, False)
    yield "vq_segment_sum", (x[:0], indices[:0], None, None, 11, False, False)


@pytest.mark.parametrize("overload", ["default", "ref", "cpp"])
def test_opcheck(overload):
    for name, args in op_arguments():
        torch.library.opcheck(op(name, overload), args)
