"""What updates a codebook; and the compositions: residual, scalar and stochastic quantizers, entropies."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
import vq_case
from budget import assert_within_budget

import vaeops
from vaeops import rng
from vaeops.ops.vq import sample
from vaeops.ref import vq as ref

SEED = torch.tensor([20_26, 11])
NAN = math.nan


# ---- counts


def test_perplexity_and_usage():
    counts = torch.tensor([[4.0, 4, 0, 0], [1, 1, 1, 1], [9, 0, 0, 0], [0, 0, 0, 0]])
    assert vaeops.usage(counts).tolist() == [0.5, 1, 0.25, 0]
    torch.testing.assert_close(vaeops.perplexity(counts), torch.tensor([2.0, 4, 1, 1]))
    skewed = torch.rand(1000)
    exact, eager = ((-(p * p.log()).sum()).exp() for p in (t / t.sum() for t in (skewed.double(), skewed)))
    assert_within_budget(vaeops.perplexity(skewed), exact, eager, "perplexity")
    assert vaeops.perplexity(skewed.double()).dtype is torch.float64
    assert vaeops.perplexity(torch.tensor([3, 3])) == 2 and vaeops.usage(torch.tensor([3, 0])) == 0.5


# ---- moving averages


def ema_by_hand(size, total, steps, decay, eps):
    for counts, sums in steps:
        size = decay * size + (1 - decay) * counts
        total = decay * total + (1 - decay) * sums
    n = size.sum()
    smoothed = (size + eps) / (n + len(size) * eps) * n
    return size, total, total / smoothed[:, None]


@pytest.mark.parametrize("decay", [0.99, 0.5, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_ema_is_the_formula(dtype, decay):
    k, d = 30, 5
    size, total, codebook = (t.to(dtype) for t in (torch.rand(k) * 5, torch.randn(k, d), torch.randn(k, d)))
    steps = [(torch.randint(0, 9, (k,)).to(dtype), torch.randn(k, d).to(dtype) * 3) for _ in range(60)]
    wide = lambda t: t.double()  # noqa: E731
    exact = ema_by_hand(wide(size), wide(total), [(wide(c), wide(s)) for c, s in steps], decay, 1e-5)
    eager = ema_by_hand(size, total, steps, decay, 1e-5)
    for counts, sums in steps:
        assert vaeops.vq_ema_(size, total, codebook, counts, sums, decay=decay, eps=1e-5) is None
    for name, a, b, c in zip(("cluster size", "sum", "codebook"), (size, total, codebook), exact, eager):
        if dtype is torch.float64:  # two orders of the same few operations
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
        else:
            assert_within_budget(a, b, c, name)


def test_ema_of_a_batch_without_rows_changes_nothing():
    state = [torch.rand(4), torch.randn(4, 3), torch.randn(4, 3)]
    before = [t.clone() for t in state]
    vaeops.vq_ema_(*state, torch.zeros(4), torch.zeros(4, 3))
    assert all(torch.equal(a, b) for a, b in zip(state, before))


def test_ema_without_smoothing_keeps_codes_that_were_never_used():
    codebook, sums = torch.randn(4, 3), torch.randn(4, 3)
    before, counts = codebook.clone(), torch.tensor([2.0, 0, 1, 0])
    sums[counts == 0] = 0
    vaeops.vq_ema_(torch.zeros(4), torch.zeros(4, 3), codebook, counts, sums, eps=0.0)
    used = counts > 0
    assert torch.equal(codebook[~used], before[~used])
    torch.testing.assert_close(codebook[used], sums[used] / counts[used].unsqueeze(1))


def test_ema_of_stacked_levels_is_each_level():
    state = [torch.rand(3, 4), torch.randn(3, 4, 2), torch.randn(3, 4, 2)]
    counts, sums = torch.randint(0, 5, (3, 4)).float(), torch.randn(3, 4, 2)
    counts[1], sums[1] = 0, 0
    levels = [[t[i].clone() for t in state] for i in range(3)]
    vaeops.vq_ema_(*state, counts, sums)
    for i, level in enumerate(levels):
        vaeops.vq_ema_(*level, counts[i], sums[i])
        assert all(torch.equal(a, b[i]) for a, b in zip(level, state))


def test_ema_moves_a_parameter():
    codebook = torch.nn.Parameter(torch.randn(4, 3))
    vaeops.vq_ema_(torch.ones(4), torch.ones(4, 3), codebook, torch.ones(4), torch.ones(4, 3))
    assert codebook.requires_grad and codebook.grad_fn is None
    torch.testing.assert_close(codebook.detach(), torch.ones(4, 3))


# ---- dead codes


def dead_state(k=10, d=4, dead=(1, 4, 5, 9)):
    size = torch.full((k,), 3.0)
    size[list(dead)] = 0.2
    return size, torch.randn(k, d), torch.randn(k, d)


def rows_in(rows, x):
    return [int((x == row).all(1).nonzero()) for row in rows]


def test_dead_codes_become_distinct_rows():
    x, dead = torch.randn(50, 4), [1, 4, 5, 9]
    size, total, codebook = dead_state()
    before = [t.clone() for t in (size, total, codebook)]
    revived = vaeops.vq_expire_(size, total, codebook, x, threshold=1.0, seed=SEED, reset=2.5)
    assert revived.nonzero().flatten().tolist() == dead
    assert len(set(rows_in(codebook[dead], x))) == 4
    assert torch.equal(total[dead], 2.5 * codebook[dead]) and bool((size[dead] == 2.5).all())
    alive = ~revived
    for a, b in zip((size, total, codebook), before):
        assert torch.equal(a[alive], b[alive])
    again = dead_state()
    vaeops.vq_expire_(*again, x, threshold=1.0, seed=SEED)
    assert torch.equal(again[2][dead], codebook[dead])  # the same seed, the same rows
    assert bool((again[0][dead] == 1.0).all())
    other = dead_state()
    vaeops.vq_expire_(*other, x, threshold=1.0, seed=rng.fold_in(SEED, 1))
    assert not torch.equal(other[2][dead], codebook[dead])


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_fewer_rows_than_dead_codes(rows):
    x = torch.randn(rows, 4)
    size, total, codebook = dead_state()
    kept = codebook.clone()
    revived = vaeops.vq_expire_(size, total, codebook, x, threshold=1.0, seed=SEED)
    assert revived.nonzero().flatten().tolist() == [1, 4, 5, 9][:rows]
    assert sorted(rows_in(codebook[revived], x)) == list(range(rows))
    assert torch.equal(codebook[~revived], kept[~revived])
    assert bool((size[[1, 4, 5, 9][rows:]] == 0.2).all())


def test_revival_takes_no_masked_and_no_bad_row():
    x = torch.randn(2, 4, 6)  # channel first: 12 rows
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[0, 3] = mask[1, 1] = mask[1, 2] = True
    x[1, 2, 2] = NAN
    size, total, codebook = dead_state()
    options = {"threshold": 1.0, "seed": SEED, "mask": mask, "channel_dim": 1}
    revived = vaeops.vq_expire_(size, total, codebook, x, **options)
    rows = torch.stack((x[0, :, 3], x[1, :, 1]))
    assert sorted(rows_in(codebook[revived], rows)) == [0, 1]
    options["mask"] = torch.zeros_like(mask)
    assert not vaeops.vq_expire_(*dead_state(), x, **options).any()


def test_every_row_may_be_chosen():
    x = torch.randn(8, 2)
    chosen = set()
    for i in range(60):
        state = torch.zeros(1), torch.zeros(1, 2), torch.zeros(1, 2)
        vaeops.vq_expire_(*state, x, threshold=1.0, seed=rng.fold_in(SEED, i))
        chosen |= set(rows_in(state[2], x))
    assert chosen == set(range(8))


# ---- k-means


def test_kmeans_finds_separate_clusters(impl):
    centres = torch.tensor([[10.0, 0], [-10, 0], [0, 10], [0, -10]])
    x = (centres[:, None] + torch.randn(4, 50, 2)).flatten(0, 1)
    best = min(
        (vaeops.kmeans(x, 4, 8, rng.fold_in(SEED, i), impl=impl) for i in range(6)),
        key=lambda found: float((x - found[0][vaeops.vq_assign(x, found[0])]).square().sum()),
    )
    codebook, counts = best
    order = vaeops.vq_assign(centres, codebook)
    assert sorted(order.tolist()) == [0, 1, 2, 3] and counts.tolist() == [50] * 4
    torch.testing.assert_close(codebook[order], x.view(4, 50, 2).mean(1))


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_kmeans_is_lloyds_algorithm(impl, metric):
    x = torch.randn(400, 6)
    codebook, _ = vaeops.kmeans(x, 20, 1, SEED, metric=metric, impl=impl)
    for iters in (2, 3, 4):
        rows = F.normalize(x, dim=1) if metric == "cosine" else x
        index = vaeops.vq_assign(rows, codebook, metric=metric)
        means = torch.stack([rows[index == k].double().mean(0) for k in range(20)])
        means = torch.where(means.isnan(), codebook.double(), means)
        means = F.normalize(means, dim=1) if metric == "cosine" else means
        codebook, counts = vaeops.kmeans(x, 20, iters, SEED, metric=metric, impl=impl)
        torch.testing.assert_close(codebook.double(), means, rtol=1e-6, atol=1e-6)
        assert torch.equal(counts, torch.bincount(index, minlength=20).float())


def test_kmeans_has_the_same_bits_everywhere(impl):
    x = torch.randn(300, 8).bfloat16()
    mask = torch.rand(300) < 0.8
    for a, b in zip(
        vaeops.kmeans(x, 30, 4, SEED, mask=mask, impl=impl),
        vaeops.kmeans(x, 30, 4, SEED, mask=mask, impl="ref"),
    ):
        assert a.dtype is torch.float32 and torch.equal(a, b)


def test_kmeans_edges(impl):
    x = torch.randn(3, 5)
    codebook, counts = vaeops.kmeans(x, 7, 3, SEED, impl=impl)
    assert sorted(rows_in(codebook[:3], x)) == [0, 1, 2]
    assert counts.tolist() == [1, 1, 1, 0, 0, 0, 0]
    x = torch.randn(20, 5)
    mask = torch.arange(20) < 4
    x[0, 0], x[10:] = NAN, 1e9
    codebook, counts = vaeops.kmeans(x, 3, 5, SEED, mask=mask, impl=impl)
    assert sorted(rows_in(codebook, x[1:4])) == [0, 1, 2] and counts.tolist() == [1, 1, 1]
    codebook, counts = vaeops.kmeans(x, 3, 2, SEED, mask=torch.zeros_like(mask), impl=impl)
    assert not codebook.any() and not counts.any()
    image = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    codebook, _ = vaeops.kmeans(image, 4, 3, SEED, channel_dim=1, impl=impl)
    want, _ = vaeops.kmeans(image.permute(0, 2, 3, 1).reshape(-1, 5), 4, 3, SEED, impl=impl)
    assert codebook.dtype is torch.float64 and torch.equal(codebook, want)


# ---- residual


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("estimator", ref.ESTIMATORS)
@pytest.mark.parametrize("reduction", ref.REDUCTIONS)
def test_residual_is_level_by_level(impl, dtype, estimator, reduction):
    x = torch.randn(2, 8, 5).to(dtype).requires_grad_()
    books = (torch.randn(3, 10, 8) * torch.tensor([1, 0.5, 0.2]).view(3, 1, 1)).requires_grad_()
    mask = torch.rand(2, 5) < 0.8
    options = {"mask": mask, "stats": True, "reduction": reduction, "impl": impl}
    out = vaeops.residual_vq(x, books, estimator=estimator, channel_dim=1, **options)
    residual = x.detach().movedim(1, -1).to(ref.compute_dtype(x))
    total = torch.zeros_like(residual)
    commit = torch.zeros_like(x)
    for i in range(3):
        level = vaeops.vector_quantize(residual.requires_grad_(), books[i].detach(), **options)
        assert torch.equal(out.indices[..., i], level.indices)
        for name in ("commit_loss", "codebook_loss"):
            assert torch.equal(getattr(out, name)[..., i].detach(), getattr(level, name).detach())
        assert torch.equal(out.counts[i], level.counts) and torch.equal(out.sums[i], level.sums)
        commit += torch.autograd.grad(level.commit_loss.sum(), residual)[0].movedim(-1, 1)
        total = total + level.quantized.detach()
        residual = residual.detach() - level.quantized.detach()
    assert out.quantized.dtype is dtype and out.quantized.shape == x.shape
    assert torch.equal(out.quantized.detach(), total.to(dtype).movedim(-1, 1))
    torch.testing.assert_close(
        torch.autograd.grad(out.commit_loss.sum(), x, retain_graph=True)[0], commit.to(dtype)
    )
    assert torch.autograd.grad(out.codebook_loss.sum(), books, retain_graph=True)[0].any()
    assert out.quantized.requires_grad == (estimator != "none")
    if estimator != "none":
        g = torch.randn_like(x)
        got = torch.autograd.grad(out.quantized, x, g, retain_graph=True)[0]
        g = g.movedim(1, -1).to(total.dtype)
        want = g if estimator == "ste" else ref.rotate_back(g, x.detach().movedim(1, -1).to(g.dtype), total)
        want = want.masked_fill(~mask.unsqueeze(-1), 0).movedim(-1, 1).to(dtype)
        torch.testing.assert_close(got, want)


def test_more_levels_come_nearer():
    x = torch.randn(200, 6)
    books = torch.stack([torch.randn(16, 6) * 0.6**i for i in range(6)])
    books[:, 0] = 0  # a level may add nothing
    errors = [float((x - vaeops.residual_vq(x, books[:q]).quantized).square().mean()) for q in range(1, 7)]
    assert errors == sorted(errors, reverse=True)
    assert torch.equal(
        vaeops.residual_vq(x, books[:1]).quantized, vaeops.vector_quantize(x, books[0]).quantized
    )


# ---- scalar


@pytest.mark.parametrize("levels", [[2], [3, 2], [8, 5, 5, 5], [7, 4, 2, 3]])
def test_fsq_reaches_every_code_and_decodes(levels):
    x = torch.randn(60_000 if len(levels) < 4 else 200_000, len(levels)) * 2
    quantized, indices = vaeops.fsq(x, levels)
    every = torch.tensor([digits[::-1] for digits in product(*(range(n) for n in levels[::-1]))]).float()
    width = torch.tensor([n // 2 for n in levels])
    table = (every - width) / width
    assert torch.equal(indices.unique(), torch.arange(math.prod(levels)))
    assert torch.equal(quantized, table[indices])
    assert torch.equal(vaeops.fsq_decode(torch.arange(len(table)), levels), table)
    assert float(quantized.abs().max()) <= 1
    # Codes are fixed points of rounding: a value on a level stays there.
    grid = quantized.view(-1, len(levels))[:500]
    bound = torch.tensor([(n - 1) * 1.001 / 2 for n in levels])
    offset = torch.tensor([0.5 if n % 2 == 0 else 0.0 for n in levels])
    back = torch.atanh(((grid * width + offset) / bound).clamp(-0.9999, 0.9999)) - torch.atanh(offset / bound)
    assert torch.equal(vaeops.fsq(back, levels)[0], grid)


def test_fsq_stays_in_range_with_many_levels():
    levels = [1024, 1003, 100_000]
    x = torch.tensor([[20.0] * 3, [-20.0] * 3, [math.inf] * 3, [0.3] * 3])
    quantized, indices = vaeops.fsq(x, levels)
    assert bool((quantized.abs() <= 1).all())
    assert [int(indices[0]), int(indices[1])] == [math.prod(levels) - 1, 0] and indices[2] == indices[0]
    assert torch.equal(vaeops.fsq_decode(indices, levels), quantized)


def test_fsq_gradient_is_that_of_the_squashing():
    levels = [8, 5]
    x = torch.randn(40, 2, dtype=torch.float64, requires_grad=True)
    g = torch.randn(40, 2, dtype=torch.float64)
    got = torch.autograd.grad(vaeops.fsq(x, levels)[0], x, g)[0]
    half = torch.tensor([(n - 1) * 1.001 / 2 for n in levels], dtype=torch.float64)
    shift = torch.atanh(torch.tensor([0.5, 0], dtype=torch.float64) / half)
    want = g * (1 - torch.tanh(x + shift) ** 2) * half / torch.tensor([4, 2])
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scalar_quantizers_keep_their_indices_in_low_precision(dtype):
    x = torch.randn(500, 6).to(dtype)
    for f in (lambda x: vaeops.fsq(x, [1000, 999, 7, 2, 3, 10]), vaeops.lfq):
        quantized, indices = f(x)
        wide = f(x.float())
        assert quantized.dtype is dtype and torch.equal(indices, wide[1])
        assert torch.equal(quantized, wide[0].to(dtype))


def test_lfq_is_the_sign():
    x = torch.randn(300, 7, requires_grad=True)
    quantized, indices = vaeops.lfq(x)
    assert torch.equal(quantized, torch.where(x > 0, 1.0, -1.0))
    digits = [int("".join("1" if v > 0 else "0" for v in row), 2) for row in x.tolist()]
    assert indices.tolist() == digits
    assert torch.equal(vaeops.lfq_decode(indices, 7), quantized)
    g = torch.randn_like(x)
    assert torch.equal(torch.autograd.grad(quantized, x, g)[0], g)
    codes = torch.tensor(list(product((-1.0, 1.0), repeat=7)))
    assert torch.equal(indices, vaeops.vq_assign(x, codes))  # the nearest of the implicit codebook


def test_scalar_quantizers_take_channel_first_and_bad_values():
    x = torch.randn(2, 3, 4, 5)
    for f, decode in (
        (
            lambda x, d: vaeops.fsq(x, [5, 4, 3], channel_dim=d),
            lambda i, d: vaeops.fsq_decode(i, [5, 4, 3], channel_dim=d),
        ),
        (lambda x, d: vaeops.lfq(x, channel_dim=d), lambda i, d: vaeops.lfq_decode(i, 3, channel_dim=d)),
    ):
        quantized, indices = f(x, 1)
        last = f(x.movedim(1, -1), -1)
        assert torch.equal(quantized.movedim(1, -1), last[0]) and torch.equal(indices, last[1])
        assert torch.equal(decode(indices, 1), quantized)
        bad = torch.tensor([[NAN, 1.0, 2.0], [math.inf, -math.inf, 0.5]])
        quantized, indices = f(bad, -1)
        assert quantized[0, 0].isnan() and bool(quantized.flatten()[1:].isfinite().all())
        assert torch.equal(decode(indices[1:], -1), quantized[1:]) and int(indices[0]) >= 0
        quantized, indices = f(torch.zeros(0, 3), -1)
        assert quantized.shape == (0, 3) and indices.shape == (0,)
    assert int(vaeops.lfq(torch.ones(1, 63))[1]) == 2**63 - 1


# ---- stochastic codes and entropies


def all_logits(x, e, metric):
    if metric == "l2":
        return -(x[:, None] - e).square().sum(-1)
    if metric == "cosine":
        x, e = F.normalize(x, dim=-1), F.normalize(e, dim=-1)
    return x @ e.t()


@pytest.mark.parametrize("metric", ref.METRICS)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0])
def test_sample_has_its_distribution(metric, temperature):
    x, e, n = torch.randn(1, 6), torch.randn(12, 6), 40_000
    drawn = vaeops.vq_sample(x.expand(n, 6), e, temperature, SEED, metric=metric)
    p = (all_logits(x.double(), e.double(), metric)[0] / temperature).softmax(0)
    expected, found = n * p, torch.bincount(drawn, minlength=12)
    common = expected > 5
    chi2 = float(((found - expected)[common] ** 2 / expected[common]).sum())
    assert chi2 < 12 + 5 * math.sqrt(2 * 12) and int(found[~common].sum()) < 40


def test_sample_is_the_noise_streams(monkeypatch):
    x, e, mask = torch.randn(50, 6), torch.randn(9, 6), torch.rand(50) < 0.8
    x[4, 0], e[2, 3] = NAN, NAN
    a, b = rng.normal((50, 9, 2), SEED).unbind(-1)
    noise = -((a * a + b * b) / 2).log()
    logits = torch.where(torch.arange(9) == 2, -math.inf, all_logits(x.nan_to_num(), e.nan_to_num(), "l2"))
    want = (logits / 0.5 + noise).argmax(1)
    want[4] = 0
    want[~mask] = -1
    drawn = vaeops.vq_sample(x, e, 0.5, SEED, mask=mask)
    assert torch.equal(drawn, want)
    monkeypatch.setattr(sample, "_CHUNK", 40)  # many chunks of few rows
    assert torch.equal(vaeops.vq_sample(x, e, 0.5, SEED, mask=mask), want)
    assert torch.equal(vaeops.vq_sample(x.t().contiguous(), e, 0.5, SEED, mask=mask, channel_dim=0), want)


def test_sample_at_temperature_zero_is_the_nearest_code():
    x, e = torch.randn(2, 6, 10), torch.randn(9, 6)
    nearest = vaeops.vq_assign(x, e, channel_dim=1)
    assert torch.equal(vaeops.vq_sample(x, e, 0.0, SEED, channel_dim=1), nearest)
    assert torch.equal(vaeops.vq_sample(x, e, 1e-6, SEED, channel_dim=1), nearest)
    assert vaeops.vq_sample(x[:0], e, 1.0, SEED, channel_dim=1).shape == (0, 10)


@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-60])
@pytest.mark.parametrize("metric", ref.METRICS)
def test_tiny_temperatures_are_the_limit(metric, temperature):
    """Ties are drawn evenly, all else is the nearest code."""
    x, e = 1e3 * torch.randn(400, 4), torch.randn(6, 4)
    nearest = vaeops.vq_assign(x, e, metric=metric)
    assert torch.equal(vaeops.vq_sample(x, e, temperature, SEED, metric=metric), nearest)
    sample_entropy, average = vaeops.vq_entropy(x, e, temperature=temperature, metric=metric)
    share = torch.bincount(nearest, minlength=6) / 400
    assert sample_entropy == 0
    torch.testing.assert_close(average, torch.special.entr(share).sum())
    twice = torch.cat((e, e))
    drawn = vaeops.vq_sample(x, twice, temperature, SEED, metric=metric)
    assert torch.equal(drawn % 6, nearest) and 120 < int((drawn >= 6).sum()) < 280
    sample_entropy = vaeops.vq_entropy(x, twice, temperature=temperature, metric=metric)[0]
    torch.testing.assert_close(sample_entropy, torch.tensor(math.log(2)))


def entropies(x, e, temperature, metric, mask):
    p = (all_logits(x, e, metric)[mask] / temperature).softmax(1)
    mean = p.mean(0)
    return torch.special.entr(p).sum(1).mean(), torch.special.entr(mean).sum()


@pytest.mark.parametrize("metric", ref.METRICS)
@pytest.mark.parametrize("chunk", [1 << 20, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_entropies_and_their_gradients(monkeypatch, metric, chunk, dtype):
    monkeypatch.setattr(sample, "_CHUNK", chunk)
    x, e, mask = torch.randn(40, 5).to(dtype), torch.randn(12, 5).to(dtype), torch.rand(40) < 0.7

    def run(f, *leaves):
        leaves = [t.detach().clone().requires_grad_() for t in leaves]
        outputs = f(*leaves)
        return *outputs, *torch.autograd.grad(1.3 * outputs[0] - 0.7 * outputs[1], leaves)

    ours = run(lambda x, e: vaeops.vq_entropy(x, e, temperature=0.8, metric=metric, mask=mask), x, e)
    exact = run(lambda x, e: entropies(x, e, 0.8, metric, mask), x.double(), e.double())
    eager = run(
        lambda x, e: entropies(*(t.to(ref.compute_dtype(x)) for t in (x, e)), 0.8, metric, mask), x, e
    )
    assert ours[0].dtype is ref.compute_dtype(x)
    for name, a, b, c in zip(("sample entropy", "average entropy", "d x", "d codebook"), ours, exact, eager):
        if dtype is torch.float64:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        else:
            assert_within_budget(a, b, c, name, factor=3.0)


def test_entropy_gradcheck():
    x, e = (torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (7, 5))
    for metric in ref.METRICS:
        assert torch.autograd.gradcheck(lambda x, e, m=metric: vaeops.vq_entropy(x, e, metric=m), (x, e))
    grad = torch.autograd.grad(sum(vaeops.vq_entropy(x, e)), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="vq_entropy: there is no double backward"):
        grad.sum().backward()


def test_entropy_leaves_out_what_cannot_count():
    x, e = torch.randn(2, 4, 6), torch.randn(5, 4)
    x[1, 2, 3], e[2, 0] = NAN, math.inf
    good = x.movedim(1, -1).reshape(-1, 4)
    good = good[good.isfinite().all(1)]
    leaves = x.requires_grad_(), e.requires_grad_()
    got = vaeops.vq_entropy(*leaves, channel_dim=1)
    want = vaeops.vq_entropy(good, e[[0, 1, 3, 4]].detach())
    torch.testing.assert_close(got, want)
    grads = torch.autograd.grad(sum(got), leaves)
    assert (
        all(bool(g.isfinite().all()) for g in grads) and not grads[0][1, :, 3].any() and not grads[1][2].any()
    )
    nothing = vaeops.vq_entropy(x, e, mask=torch.zeros(2, 6, dtype=torch.bool), channel_dim=1)
    assert [float(v.detach()) for v in nothing] == [0, 0]
    uniform = vaeops.vq_entropy(torch.zeros(3, 4), torch.ones(8, 4))
    torch.testing.assert_close(torch.stack(uniform), torch.full((2,), math.log(8)))


def test_entropies_far_from_the_origin():
    """|x|^2 and |e|^2 swamp the distances; both sides are centred."""
    x, e = torch.randn(50, 6) + 1000, torch.randn(8, 6) + 1000
    mask = torch.ones(50, dtype=torch.bool)
    exact = entropies(x.double(), e.double(), 1.0, "l2", mask)
    for a, b in zip(vaeops.vq_entropy(x, e), exact):
        assert abs(float(a) - float(b)) < 1e-4 * float(b)


def test_opcheck_of_the_opaque_loops():
    x, e = torch.randn(7, 3), torch.randn(5, 3)
    choosable, used = torch.ones(5, dtype=torch.bool), torch.ones(7, dtype=torch.bool)
    ops = torch.ops.vaeops
    torch.library.opcheck(ops.vq_sample.default, (x, e, choosable, SEED, 0.5, 0))
    torch.library.opcheck(ops.vq_entropy.default, (x, e, choosable, used, 0.5, 2))
    g, share = torch.tensor(1.0), torch.full((5,), 0.2)
    torch.library.opcheck(ops.vq_entropy_bwd.default, (g, g, x, e, choosable, used, share, 0.5, 0))


def test_training_a_codebook_lowers_its_error(impl):
    """The whole loop, as a user writes it: start, quantize, average, revive."""
    x, _ = vq_case.DISTRIBUTIONS["fitted"](600, 10, 8)
    codebook, counts = vaeops.kmeans(x[:64], 32, 2, SEED, impl=impl)
    size, total = counts.clone(), counts[:, None] * codebook
    losses = []
    for i in range(12):
        out = vaeops.vector_quantize(x, codebook, stats=True, impl=impl)
        vaeops.vq_ema_(size, total, codebook, out.counts, out.sums, decay=0.7)
        vaeops.vq_expire_(size, total, codebook, x, threshold=1.0, seed=rng.fold_in(SEED, i))
        losses.append(float(out.commit_loss))
    assert losses[-1] < 0.8 * losses[0] and float(vaeops.usage(out.counts)) > 0.9
