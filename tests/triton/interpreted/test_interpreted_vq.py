"""Vector quantization: indices equal to the reference's, values within budget."""

import pytest
import torch
from budget import assert_within_budget

import vaeops
from vaeops.kernels import vq
from vaeops.kernels.vq import _pack, assign, segment
from vaeops.ref import vq as ref

L2, COSINE, DOT = range(3)


@pytest.fixture(autouse=True)
def _large_programs(monkeypatch):
    """The interpreter's time goes by operations, whatever their size."""
    monkeypatch.setattr(assign, "REFINED_ROWS", 64)


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check_assign(x, codebook, metric=L2, mask=None, exact=True, int32=False):
    ours = vq.vq_assign(x, codebook, mask, metric, exact, int32)
    want = ref.vq_assign(x, codebook, mask, metric, exact, int32)
    assert ours.dtype is want.dtype
    assert torch.equal(ours, want), f"{int((ours != want).sum())} of {want.numel()} rows differ"
    return ours


@pytest.mark.parametrize("D", [1, 3, 8, 16, 33, 64])
@pytest.mark.parametrize("metric", [L2, COSINE, DOT])
def test_assign(D, metric):
    check_assign(normal(70, D), normal(150, D, seed=1), metric)


def test_assign_reads_many_dims_in_steps(monkeypatch):
    monkeypatch.setattr(assign, "settings", lambda dims, compute: (16, 16, 4))
    check_assign(normal(20, 50), normal(70, 50, seed=1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("codes", [torch.float32, torch.float64], ids=str)
def test_assign_dtypes(dtype, codes):
    check_assign(normal(40, 8, dtype=dtype), normal(150, 8, dtype=codes, seed=1), int32=True)


def near_ties(rows, codes, D, gap, dtype=torch.float32):
    """Rows half-way between two codes, give or take `gap`: neighbours of the fast pass in different tiles."""
    e = normal(codes, D, seed=1, dtype=torch.float64)
    order = torch.randperm(codes, generator=torch.Generator().manual_seed(2))[: 2 * rows].view(2, rows)
    e[order[1]] = e[order[0]] + 0.1 * normal(rows, D, seed=3)
    tilt = 0.5 + gap * normal(rows, 1, seed=4)
    return (tilt * e[order[0]] + (1 - tilt) * e[order[1]]).to(dtype), e.to(dtype)


def hard_cases():
    x, e = normal(64, 8), normal(200, 8, seed=1)
    unit = torch.nn.functional.normalize
    cauchy = torch.distributions.Cauchy(0, 1).icdf
    uniform = torch.rand(200, 8, generator=torch.Generator().manual_seed(5)).clamp(1e-4, 1 - 1e-4)
    tilted, tied = near_ties(64, 256, 8, 1e-7)
    yield "near ties", tilted, tied
    yield "near ties in fp64", *near_ties(64, 256, 8, 1e-15, torch.float64)
    yield "near ties in bf16", *near_ties(64, 256, 8, 1e-7, torch.bfloat16)
    yield "far from the origin", tilted + 1000, tied + 1000
    yield "rows far from the codes", x * 1e6, e
    yield "codes far from the rows", x * 1e-6, e
    yield "start of training", x, (uniform * 2 - 1) / 200
    yield "on the sphere", unit(x), unit(e)
    yield "low rank", x[:, :2] @ e[:2], e[:, :2] @ e[:2]
    yield "heavy tails", cauchy(uniform[:64]), cauchy(uniform)
    yield "every code five times", x, e[:64].repeat(5, 1)
    yield "every code the same", x[:8], e[:1].expand(330, 8)
    yield "only zeros", x[:8], torch.zeros(300, 8)
    yield "large", tilted * 1e15, tied * 1e15
    yield "small", tilted * 1e-15, tied * 1e-15
    yield "largest", x[:8] * 3e38 / x.abs().amax(), e[:100] * 3e38 / e.abs().amax()
    yield "subnormal", x[:8] * 1e-40, e[:100] * 1e-40
    yield "largest in fp64", x[:8].double() * 1e154, e[:100].double() * 1e154
    yield "small in fp64", x[:8].double() * 1e-140, e[:100].double() * 1e-140


@pytest.mark.parametrize("name, x, e", [pytest.param(*case, id=case[0]) for case in hard_cases()])
def test_assign_of_hard_cases(name, x, e):
    for metric in (L2, COSINE) if name != "subnormal" else (L2,):
        check_assign(x, e, metric)


def found_tiles(x, codebook, exact=True):
    packed = _pack.pack(codebook, L2, torch.float32, 64)
    return assign.nearest_tiles(x, packed, None, torch.float32, exact)


def test_the_fast_pass_leaves_one_tile_of_most_rows():
    found = found_tiles(normal(128, 32), normal(512, 32, seed=1))
    candidates = (found.low.flatten(1) <= found.upper.amin(1, keepdim=True)).sum(1)
    assert candidates.min() >= 1 and candidates.double().mean() < 1.2
    assert bool((found.others.amin(1) > found.upper.amin(1)).all())


@pytest.mark.parametrize("metric", [L2, COSINE, DOT])
def test_bounds_hold(metric):
    """Of each tile that a row keeps: the fast pass misses its least score by no more than the bound."""
    for name, x, e in [*hard_cases()][:10:3]:
        compute = ref.compute_dtype(x, e)
        packed = _pack.pack(e.contiguous(), metric, compute, 64)
        exact, fast = (assign.nearest_tiles(x, packed, None, compute, flag) for flag in (True, False))
        x, e = x.double(), e.double()
        if metric == L2:
            x, e = x - packed.mu, e - packed.mu
        if metric == COSINE:
            e = torch.nn.functional.normalize(e)
        s = (e.square().sum(1) / 2 if metric == L2 else 0) - x @ e.t()
        by = torch.minimum(15 - torch.frexp(x.abs().amax(1)).exponent, packed.shift + 30) + packed.shift
        s = torch.nn.functional.pad(s * 2.0 ** by.double().unsqueeze(1), (0, -len(e) % 64), value=torch.inf)
        true = s.unflatten(1, (-1, 64)).amin(2)
        in_both = (exact.kept == fast.kept) & (exact.kept >= 0)
        assert in_both.double().mean() > 0.2, name
        true = true.gather(1, exact.kept.clamp(min=0).long().flatten(1)).view_as(exact.low)
        bound = (fast.low.double() - exact.low.double())[in_both]
        assert bool(((fast.low.double() - true)[in_both].abs() <= bound).all()), name


def test_without_bounds_the_hard_cases_are_hard():
    x, e = near_ties(64, 256, 8, 1e-7)
    fast = vq.vq_assign(x, e, None, L2, False, False)
    want = ref.vq_assign(x, e, None, L2, True, False)
    assert (fast != want).any()
    x, e = x.double(), e.double()
    distance = lambda index: (x - e[index]).norm(dim=1)  # noqa: E731
    assert bool((distance(fast) <= distance(want) * 1.01).all())


def test_more_candidates_than_a_row_keeps(monkeypatch):
    monkeypatch.setattr(assign, "SPLITS", 1)
    x, e = normal(6, 4), normal(60, 4, seed=1).repeat(8, 1)
    found = found_tiles(x, e)
    assert found.low.shape == (6, 1, 4) and bool((found.others <= found.upper).all())
    check_assign(x, e)


def test_few_rows_share_the_codebook():
    x, e = normal(5, 2), normal(700, 2, seed=1)
    assert found_tiles(x, e).low.shape == (5, 11, 4)
    check_assign(x, e)


def test_an_index_depends_on_its_row_alone():
    x, e = normal(150, 4), normal(150, 4, seed=1)
    together = check_assign(x, e)
    assert torch.equal(vq.vq_assign(x[7:8], e, None, L2, True, False), together[7:8])
    assert torch.equal(vq.vq_assign(x.flip(0), e, None, L2, True, False), together.flip(0))


def layouts(rows, D):
    x = normal(*rows, D)
    yield x
    yield x.transpose(0, -1).contiguous().transpose(0, -1)
    yield x.movedim(-1, 1).contiguous().movedim(1, -1)  # channel-first
    yield normal(*rows, 3 * D)[..., ::3]
    yield x[:1].expand_as(x)


@pytest.mark.parametrize("x", [*layouts((3, 4, 5), 6)])
def test_assign_layouts(x):
    check_assign(x, normal(70, 12, seed=1)[:, ::2])


@pytest.mark.parametrize("metric", [L2, COSINE, DOT])
def test_assign_edges(metric):
    x, e = normal(12, 5), normal(80, 5, seed=1)
    x[2, 3], x[5, 0], x[6] = torch.nan, torch.inf, 0
    e[7], e[9, 1], e[70, 2], e[11] = torch.nan, torch.inf, -torch.inf, 0
    mask = torch.arange(12) % 4 > 0
    check_assign(x, e, metric)
    ours = check_assign(x, e, metric, mask, int32=True)
    assert ours[2] == ours[5] == 0 and ours[4] == -1
    for codes in (e[7:8], e[9:10], e[11:12]):  # NaN alone, Inf alone, zero alone
        check_assign(x, codes, metric)
    assert check_assign(x[:0], e, metric).shape == (0,)
    assert check_assign(x[0], e, metric).shape == ()
    assert bool((check_assign(x, e, metric, torch.zeros_like(mask)) == -1).all())


@pytest.mark.parametrize("metric", [L2, COSINE, DOT])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_topk(metric, dtype, monkeypatch):
    monkeypatch.setattr(assign, "SORT_ELEMENTS", 1000)
    x, e = normal(3, 6, 5, dtype=dtype), normal(80, 5, seed=1)
    x[0, 1], e[3], e[40], e[41] = torch.nan, torch.inf, e[4], 0
    mask = torch.rand(3, 6, generator=torch.Generator().manual_seed(1)) > 0.2
    for k, int32 in ((1, False), (7, True), (80, False)):
        ours, want = (f.vq_topk(x, e, mask, k, metric, True, int32) for f in (vq, ref))
        assert all(o.dtype is w.dtype and torch.equal(o, w) for o, w in zip(ours, want))


def same_layout(ours, want):
    assert (ours.shape, ours.dtype, ours.stride()) == (want.shape, want.dtype, want.stride())


def inputs(rows=(7, 10), D=20, K=9, dtype=torch.float32):
    x, e = normal(*rows, D, dtype=dtype), normal(K, D, seed=1)
    return x, e, torch.randint(-1, K, rows, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("reduction", [-1, 0, 1, 2])
def test_gather(reduction, dtype):
    x, e, indices = inputs(dtype=dtype)
    quantized, loss = vq.vq_gather(indices.int(), e, x, 0.5, reduction)
    want, eager = ref.vq_gather(indices, e, x, 0.5, reduction)
    same_layout(quantized, want)
    if dtype is torch.bfloat16:  # the interpreter truncates where a GPU rounds
        torch.testing.assert_close(quantized, want, rtol=2**-7, atol=0)
    else:
        assert torch.equal(quantized, want)
    if reduction < 0:
        assert loss is None
        return
    same_layout(loss, eager)
    exact = ref.vq_gather(indices, e.double(), x.double(), 0.5, reduction)[1]
    assert_within_budget(loss, exact, eager, f"loss, {ref.REDUCTIONS[reduction]}", factor=2)


@pytest.mark.parametrize("x", [*layouts((3, 4, 5), 6)])
def test_gather_layouts(x):
    _, e, indices = inputs((3, 4, 5), 6)
    ours, want = (f.vq_gather(indices, e, x, 0.0, 0) for f in (vq, ref))
    same_layout(ours[0], want[0])
    assert torch.equal(ours[0], want[0])
    torch.testing.assert_close(ours[1], want[1])
    g, w = x.flip(0) + 1, torch.rand(3, 4, 5)
    for estimator in range(3):
        ours, want = (f.vq_gather_bwd(g, w, x, e, indices, estimator) for f in (vq, ref))
        same_layout(ours, want)
        torch.testing.assert_close(ours, want)


def test_gather_without_x():
    _, e, indices = inputs()
    for codes in (e, e.half(), e.double(), e.t().contiguous().t()):
        ours, want = (f.vq_gather(indices, codes, None, -2.5, -1) for f in (vq, ref))
        same_layout(ours[0], want[0])
        assert torch.equal(ours[0], want[0]) and ours[1] is None


def test_gather_edges(monkeypatch):
    monkeypatch.setattr("vaeops.kernels.vq.gather.MAX_PROGRAMS", 2)  # a program takes many rows
    x, e, indices = inputs((90,), 130)
    x[3, 129], x[4, 0], x[5], indices[3:6] = torch.inf, torch.nan, torch.nan, torch.tensor([2, 1, -1])
    for reduction in (0, 1, 2):
        ours, want = (f.vq_gather(indices, e, x, 0.5, reduction) for f in (vq, ref))
        torch.testing.assert_close(ours, want, equal_nan=True)
        ours, want = (f.vq_gather(indices[6:], e, x[6:], 0.5, reduction) for f in (vq, ref))
        torch.testing.assert_close(ours, want)
        for rows, index in ((x[:0], indices[:0]), (x, torch.full_like(indices, -1))):
            ours, want = (f.vq_gather(index, e, rows, 0.5, reduction) for f in (vq, ref))
            assert torch.equal(ours[1], want[1]) and not ours[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("estimator", range(3))
def test_gather_backward(estimator, dtype):
    x, e, indices = inputs(dtype=dtype)
    x[0, :3], e[4] = 0, 0  # the rotation has no direction
    x[1, 0] = -2 * e[indices[1, 0].clamp(min=0)].to(dtype)
    g = normal(*x.shape, dtype=dtype, seed=5)
    for w in (None, torch.tensor(0.3), torch.rand(indices.shape)):
        for gq in (g, None):
            ours, eager = (f.vq_gather_bwd(gq, w, x, e, indices, estimator) for f in (vq, ref))
            wide = None if gq is None else gq.double()
            exact = ref.vq_gather_bwd(wide, w, x.double(), e.double(), indices, estimator)
            same_layout(ours, eager)
            assert_within_budget(ours, exact, eager, f"gx, {ref.ESTIMATORS[estimator]}", factor=3)
    assert vq.vq_gather_bwd(g[:0], None, x[:0], e, indices[:0], estimator).shape == x[:0].shape


def test_the_rotation_of_a_row_that_is_not_finite_onto_a_zero_code():
    """There is no direction to turn to: the gradient goes straight through, which 0 * inf would spoil."""
    x, e, indices = inputs()
    x[0, 0, 3], x[0, 1, 3], e[0], indices[0, :2] = torch.inf, torch.nan, 0, 0
    ours, want = (f.vq_gather_bwd(x.nan_to_num(), None, x, e, indices, 2) for f in (vq, ref))
    assert want.isfinite().all()
    torch.testing.assert_close(ours, want)


def test_no_index_reads_outside_of_the_codebook():
    x, e, indices = inputs()
    indices[0, :3] = torch.tensor([5, 8, -2])  # of 5 codes, with others behind them
    unused = (indices < 0) | (indices >= 5)
    masked = indices.masked_fill(unused, -1)
    for ours, want in zip(vq.vq_gather(indices, e[:5], x, 0.5, 1), ref.vq_gather(masked, e[:5], x, 0.5, 1)):
        torch.testing.assert_close(ours, want)
    ours, want = (f.vq_gather_bwd(x, None, x, e[:5], i, 1) for f, i in ((vq, indices), (ref, masked)))
    assert torch.equal(ours, want)


@pytest.mark.parametrize("piece", [1024, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_segment_sum(piece, dtype, monkeypatch):
    """A piece of 4 rows: most codes have several."""
    monkeypatch.setattr(segment, "PIECE", piece)
    for x in [*layouts((3, 4, 5), 5)][:: 1 if dtype is torch.float32 else 4]:
        x = x.to(dtype)
        indices = inputs((3, 4, 5), 5)[2]
        weights = torch.rand(indices.shape, generator=torch.Generator().manual_seed(3))
        for w, fp64 in ((None, False), (weights, True)):
            ours, want = (f.vq_segment_sum(x, indices, w, None, 9, False, fp64) for f in (vq, ref))
            assert ours[0].dtype is want[0].dtype
            torch.testing.assert_close(ours, want, rtol=1e-12 if fp64 else 1e-6, atol=1e-12 if fp64 else 1e-6)


def test_segment_sum_edges():
    x, _, indices = inputs((50,), 140)
    x[3, 139], x[4, 0], x[5] = torch.inf, torch.nan, torch.nan
    indices[3:5] = 2
    for w in (None, torch.rand(50)):
        ours, want = (f.vq_segment_sum(x, indices, w, None, 20, True, False) for f in (vq, ref))
        torch.testing.assert_close(ours, want)
        assert not ours[0][9:].any() and not ours[1][9:].any()
    assert all(not t.any() for t in vq.vq_segment_sum(x[:0], indices[:0], None, None, 4, True, False))
    ours, want = (f.vq_segment_sum(x, indices, None, None, 20, False, False) for f in (vq, ref))
    torch.testing.assert_close(ours, want, equal_nan=True)


def test_fixed_point_sums(monkeypatch):
    x, _, indices = inputs((50,), 5)
    x[3] = torch.nan
    largest = x[4:].abs().amax()
    for absmax in (largest, largest.double() * 8, largest / 4, torch.tensor(0.0), torch.tensor(1e-40)):
        ours, want = (f.vq_segment_sum(x, indices, None, absmax, 9, True, False) for f in (vq, ref))
        assert all(o.dtype is torch.int64 and torch.equal(o, w) for o, w in zip(ours, want))
        order = torch.randperm(50)
        monkeypatch.setattr(segment, "PIECE", 3)
        again = vq.vq_segment_sum(x[order], indices[order], None, absmax, 9, True, False)
        assert all(torch.equal(o, a) for o, a in zip(ours, again))


def test_the_public_functions_take_it():
    x, e = normal(2, 5, 3, 4), normal(70, 5, seed=1)
    found = []
    for impl in ("triton", "ref"):
        x, e = x.detach().requires_grad_(), e.detach().requires_grad_()
        out = vaeops.vector_quantize(x, e, channel_dim=1, stats=True, estimator="rotation", impl=impl)
        loss = out.quantized.sin().sum() + out.commit_loss + 2 * out.codebook_loss
        found.append(
            [*out, *torch.autograd.grad(loss, (x, e)), *vaeops.vq_topk(x, e, 3, channel_dim=1, impl=impl)]
        )
    for ours, want in zip(*found):
        torch.testing.assert_close(ours, want)
