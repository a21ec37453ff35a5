"""Compositions on reduced KLs: values and gradients against the formula spelt out, tracing, bad arguments."""

import math

import pytest
import torch

import vaeops
from vaeops import objectives


def posterior(rows=5, dims=3, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)

    def draw():
        return (0.5 * torch.randn(rows, dims, generator=g, dtype=dtype)).requires_grad_()

    return draw(), draw()


def elements(mu, logvar):
    return 0.5 * (mu**2 + logvar.exp() - 1 - logvar)


def check_gradients(ours, theirs, inputs):
    for a, b in zip(torch.autograd.grad(3 * ours, inputs), torch.autograd.grad(3 * theirs, inputs)):
        torch.testing.assert_close(a, b)


def test_free_bits_per_dim():
    mu, logvar = posterior()
    floor = 0.15
    ours = objectives.free_bits(vaeops.gaussian_kl(mu, logvar, reduction="dim"), floor)
    means = [elements(mu, logvar)[:, d].sum() / 5 for d in range(3)]
    assert min(means) < floor < max(means)  # both branches are taken
    theirs = sum(m if m > floor else torch.tensor(floor, dtype=m.dtype) for m in means)
    torch.testing.assert_close(ours, theirs)
    check_gradients(ours, theirs, (mu, logvar))


def test_free_bits_per_sample_and_dim():
    mu, logvar = posterior()
    ours = objectives.free_bits(vaeops.gaussian_kl(mu, logvar, reduction="none"), 0.1, reduction="none")
    kl = elements(mu, logvar)
    assert (kl < 0.1).any() and (kl > 0.1).any()
    theirs = torch.where(kl > 0.1, kl, 0.1).sum() / 5
    torch.testing.assert_close(ours, theirs)
    check_gradients(ours, theirs, (mu, logvar))


def test_free_bits_per_sample():
    mu, logvar = posterior()
    kl = elements(mu, logvar).sum(1)
    floor = float(kl.detach().median()) + 1e-3
    ours = objectives.free_bits(vaeops.gaussian_kl(mu, logvar, reduction="sample"), floor, reduction="sample")
    theirs = torch.where(kl > floor, kl, floor).mean()
    torch.testing.assert_close(ours, theirs)
    check_gradients(ours, theirs, (mu, logvar))


def test_free_bits_gradient_at_the_floor_is_one():
    kl = torch.tensor([0.1, 0.5, 2.0], requires_grad=True)
    objectives.free_bits(kl, 0.5).backward()
    assert kl.grad.tolist() == [0.0, 1.0, 1.0]


def test_free_bits_takes_a_floor_per_dim():
    kl = torch.tensor([0.1, 0.5, 2.0])
    assert objectives.free_bits(kl, torch.tensor([0.2, 0.2, 3.0])) == torch.tensor(0.2 + 0.5 + 3.0)


def test_free_bits_batch_dims():
    kl = torch.rand(2, 3, 4)
    ours = objectives.free_bits(kl, 0.5, reduction="none", batch_ndim=2)
    torch.testing.assert_close(ours, kl.clamp(min=0.5).sum() / 6)


def test_empty_batch_is_zero():
    assert objectives.free_bits(torch.zeros(0, 3), 0.5, reduction="none") == 0
    assert objectives.free_bits(torch.zeros(0), 0.5, reduction="sample") == 0
    assert objectives.capacity(torch.zeros(0), 1.0) == 0


def test_capacity_of_the_batch_and_of_each_sample():
    mu, logvar = posterior()
    kl = elements(mu, logvar).sum(1)
    target = float(kl.detach().median())
    batch = objectives.capacity(vaeops.gaussian_kl(mu, logvar), target)
    sample = objectives.capacity(vaeops.gaussian_kl(mu, logvar, reduction="sample"), target)
    torch.testing.assert_close(batch, (kl.sum() / 5 - target).abs())
    torch.testing.assert_close(sample, (kl - target).abs().mean())
    assert sample > batch
    check_gradients(batch, (kl.mean() - target).abs(), (mu, logvar))


def test_kl_balance_scales_each_sides_gradient():
    q, p = posterior(), posterior(1)
    kl = vaeops.gaussian_kl(*q, prior=p)
    ours = objectives.kl_balance(q, p, 0.8)
    torch.testing.assert_close(ours, kl)
    inputs = (*q, *p)
    for scale, a, b in zip(
        (0.2, 0.2, 0.8, 0.8), torch.autograd.grad(ours, inputs), torch.autograd.grad(kl, inputs)
    ):
        torch.testing.assert_close(a, scale * b)


def test_kl_balance_reduction():
    q, p = posterior(), posterior()
    ours = objectives.kl_balance(q, p, reduction="sample", param="logstd")
    torch.testing.assert_close(ours, vaeops.gaussian_kl(*q, prior=p, reduction="sample", param="logstd"))


def test_balance_groups():
    kl = torch.tensor([[1.0, 3.0], [3.0, 9.0]], dtype=torch.float64, requires_grad=True)
    size = torch.tensor([1.0, 2.0])
    a, b = (2 + 0.01) / 1, (6 + 0.01) / 2
    weights = torch.tensor([a, b], dtype=torch.float64) / ((a + b) / 2)
    ours = objectives.balance_groups(kl, size)
    torch.testing.assert_close(ours, kl.detach() @ weights)
    ours.sum().backward()
    torch.testing.assert_close(kl.grad, weights.expand(2, 2))  # no gradient through the weights
    torch.testing.assert_close(objectives.balance_groups(torch.ones(4, 3)), torch.full((4,), 3.0))


def test_active_units_and_collapse():
    nan = math.nan
    assert objectives.active_units(torch.tensor([0.0, 0.01, 0.02, 3.0, nan])) == 2
    assert objectives.active_units(torch.tensor([0.0, 0.3]), threshold=0.5) == 0
    assert objectives.collapsed(torch.tensor([0.0, 0.01]))
    assert not objectives.collapsed(torch.tensor([0.0, 0.02]))
    assert not objectives.collapsed(torch.tensor([0.0, nan]))


def test_merge_moments_does_not_cancel():
    x = 1e4 + torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    state = torch.zeros((), dtype=torch.int64), torch.zeros(3), torch.zeros(3)
    for part in x.split((1, 0, 30, 33)):
        state = objectives.merge_moments(*state, part)
    count, mean, m2 = state
    assert count == 64
    torch.testing.assert_close(mean, x.mean(0))
    torch.testing.assert_close(m2 / 63, x.double().var(0).float(), rtol=2e-3, atol=0)


@pytest.mark.parametrize("kind", objectives.SCHEDULES)
def test_anneal_begins_at_start_and_ends_at_stop(kind):
    options = {"steps": 40, "start": 0.25, "stop": 2.0}
    values = objectives.anneal(torch.arange(61), kind, **options)
    assert values.dtype is torch.float32
    assert values[0] == (2.0 if kind == "constant" else 0.25)
    torch.testing.assert_close(values[40:], torch.full((21,), 2.0))
    if kind in ("linear", "cosine", "sigmoid"):
        assert (values[1:41] > values[:40]).all()
        torch.testing.assert_close(values[20], torch.tensor((0.25 + 2) / 2))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.bfloat16])
def test_anneal_is_fp32(dtype):
    assert objectives.anneal(torch.tensor(3, dtype=dtype), "linear", steps=10).dtype is torch.float32


def test_anneal_formulas():

    def at(step, kind, **o):
        return float(objectives.anneal(torch.tensor(step), kind, steps=100, **o))

    assert at(30, "linear") == pytest.approx(0.3)
    assert at(25, "cosine") == pytest.approx((1 - math.cos(math.pi / 4)) / 2)

    def logistic(t):
        return 1 / (1 + math.exp(-8 * (t - 0.5)))

    expected = (logistic(0.3) - logistic(0)) / (logistic(1) - logistic(0))
    assert at(30, "sigmoid", steepness=8) == pytest.approx(expected)
    cycle = [at(step, "cyclical", cycles=2, ratio=0.4) for step in (0, 10, 20, 49, 50, 60, 99, 100, 500)]
    assert cycle == pytest.approx([0, 0.5, 1, 1, 0, 0.5, 1, 1, 1])


def test_compositions_trace():
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def loss(mu, logvar, step):
        kl = vaeops.gaussian_kl(mu, logvar, reduction="dim")
        weight = objectives.anneal(step, "cyclical", steps=10)
        kl_sample = vaeops.gaussian_kl(mu, logvar, reduction="sample")
        total = weight * objectives.free_bits(kl, 0.1) + objectives.capacity(kl_sample, 0.5)
        balanced = objectives.kl_balance((mu, logvar), (logvar, mu))
        return total + balanced + objectives.active_units(kl) + objectives.collapsed(kl)

    for rows in (5, 8):
        mu, logvar = posterior(rows)
        step = torch.tensor(3)
        compiled = loss(mu, logvar, step)
        eager = loss._torchdynamo_orig_callable(mu, logvar, step)
        torch.testing.assert_close(compiled, eager)
        check_gradients(compiled, eager, (mu, logvar))


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (TypeError, "free_bits: kl must be a tensor, got float", lambda: objectives.free_bits(1.0, 0.1)),
        (
            TypeError,
            "floating point, got torch.int64",
            lambda: objectives.free_bits(torch.ones(3).long(), 0.1),
        ),
        (
            ValueError,
            "floor must be finite and >= 0, got -1",
            lambda: objectives.free_bits(torch.ones(3), -1),
        ),
        (
            TypeError,
            "floor must be a float or a tensor, got str",
            lambda: objectives.free_bits(torch.ones(3), "a"),
        ),
        (ValueError, "got 'mean'", lambda: objectives.free_bits(torch.ones(3), 0.1, reduction="mean")),
        (ValueError, "batch_ndim is for", lambda: objectives.free_bits(torch.ones(3), 0.1, batch_ndim=2)),
        (
            ValueError,
            r"in \[0, 1\]",
            lambda: objectives.free_bits(torch.ones(3), 0.1, reduction="none", batch_ndim=2),
        ),
        (
            ValueError,
            r"floor \[2\] does not broadcast to kl \[3\]",
            lambda: objectives.free_bits(torch.ones(3), torch.ones(2)),
        ),
        (
            ValueError,
            r"target \[3\] does not broadcast to kl \[\]",
            lambda: objectives.capacity(torch.ones(()), torch.ones(3)),
        ),
        (ValueError, "target must be finite", lambda: objectives.capacity(torch.ones(3), math.inf)),
        (
            ValueError,
            r"alpha must be in \[0, 1\], got 2",
            lambda: objectives.kl_balance(posterior(), posterior(), 2),
        ),
        (TypeError, "alpha must be a float", lambda: objectives.kl_balance(posterior(), posterior(), None)),
        (TypeError, "prior must be two tensors", lambda: objectives.kl_balance(posterior(), None)),
        (ValueError, r"kl must be \[\*B, G\], got \[3\]", lambda: objectives.balance_groups(torch.ones(3))),
        (
            ValueError,
            r"a tensor \[3\], got \[2\]",
            lambda: objectives.balance_groups(torch.ones(2, 3), torch.ones(2)),
        ),
        (TypeError, "statistic must be a tensor", lambda: objectives.active_units([1.0])),
        (ValueError, "kind must be one of", lambda: objectives.anneal(torch.tensor(1), "steps")),
        (TypeError, "step must be a tensor", lambda: objectives.anneal(1, "linear")),
        (ValueError, "at least 1, got 0", lambda: objectives.anneal(torch.tensor(1), "linear", steps=0)),
        (
            ValueError,
            r"ratio must be in \(0, 1\]",
            lambda: objectives.anneal(torch.tensor(1), "cyclical", ratio=0.0),
        ),
    ],
)
def test_bad_arguments(error, match, call):
    with pytest.raises(error, match=match):
        call()
