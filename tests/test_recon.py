"""Reconstruction losses: values and gradients against fp64, special values, what is kept for backward."""

import math

import pytest
import torch
import torch.nn.functional as F
from budget import assert_within_budget
from recon_case import DTYPES, TARGETS, check_against_reference, make, reductions, run, scale_of, textbook

import vaeops
from vaeops.ref import gaussian, recon as ref

INF, NAN = math.inf, math.nan


# ---- values and gradients against fp64


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ref.KINDS)
def test_reductions(isa, kind, dtype):
    for reduction in reductions(kind):
        check_against_reference("cpp", kind, (37, 29), dtype, reduction=reduction)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", ref.KINDS)
def test_targets(isa, kind, target, dtype):
    check_against_reference("cpp", kind, (6, 200), dtype, target)
    check_against_reference("cpp", kind, (3, 784), dtype, target, reduction="sum")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ref.KINDS)
def test_weights_and_masks(isa, kind, dtype):
    shape = (7, 3, 45)
    mask, item_mask = torch.rand(shape) < 0.7, torch.rand(45) < 0.7
    weight, sample_weight = torch.rand(shape), torch.rand(7, 1, 1).double()
    for given in ({"mask": mask}, {"mask": item_mask}, {"weight": weight}, {"weight": sample_weight},
                  {"weight": weight.bfloat16(), "mask": item_mask}):  # fmt: skip
        for reduction in ("sample", "sum"):
            check_against_reference("cpp", kind, shape, dtype, reduction=reduction, **given)


@pytest.mark.parametrize(
    "shape",
    [(1, 1), (1, 63), (97, 7), (3, 1025), (2, 17_000), (40, 700), (3, 12_288), (3, 4, 33, 20), (1025, 3)],
)
@pytest.mark.parametrize("kind", ["bce_logits", "mse", "multinomial"])
def test_sizes(isa, kind, shape):
    for reduction in ("sample", "batchmean") if kind == "multinomial" else ("sample", "dim", "batchmean"):
        for batch_ndim in range(1, min(len(shape), 3)):
            for target in ("floating", "uint8"):
                check_against_reference("cpp", kind, shape, torch.float32, target, reduction=reduction,
                                        batch_ndim=batch_ndim)  # fmt: skip


@pytest.mark.parametrize("kind", ["mse", "l1", "bce_logits", "bce"])
def test_the_sum_of_equal_elements_does_not_drift(isa, kind):
    pred, target = torch.full((3, 20000), 0.3), torch.full((3, 20000), 0.2)
    for reduction in ("sum", "sample"):
        loss = vaeops.recon_loss(pred, target, kind, reduction=reduction)
        exact = ref.recon_loss(pred.double(), target.double(), kind, reduction=reduction)
        torch.testing.assert_close(loss.double(), exact, rtol=5e-7, atol=0)


def test_levels_of_an_8_bit_image_are_those_of_a_division(isa):
    levels = torch.arange(256, dtype=torch.uint8)
    zeros = torch.zeros(256)
    assert torch.equal(vaeops.recon_loss(zeros, levels, "l1", reduction="none"), levels.float() / 255)


@pytest.mark.parametrize("scale", [0.002, 0.05, 3.0, 500.0])
def test_discretized_levels_sum_to_one(isa, scale):
    """The probabilities of the 256 levels sum to 1, wherever the mean is."""
    levels = torch.arange(256, dtype=torch.uint8)
    for mean in (-0.5, 0.0, 0.371, 1.0):
        pred = torch.full((256,), mean)
        nll = vaeops.recon_loss(pred, levels, "discretized_logistic", scale=scale, reduction="none")
        assert bool(nll.isfinite().all())
        assert abs(float((-nll.double()).exp().sum()) - 1) < 1e-5
        torch.testing.assert_close(
            nll,
            ref.recon_loss(
                pred.double(), levels, "discretized_logistic", scale=scale, reduction="none"
            ).float(),
        )


def test_gaussian_and_laplace_agree_with_torch_distributions():
    pred, target = torch.randn(4, 9).double(), torch.randn(4, 9).double()
    for kind, law in (
        ("gaussian_nll", torch.distributions.Normal),
        ("laplace_nll", torch.distributions.Laplace),
    ):
        expected = -law(pred, 0.7).log_prob(target).sum(1)
        got = vaeops.recon_loss(pred, target, kind, scale=0.7, reduction="sample")
        torch.testing.assert_close(got, expected)


def test_multinomial_agrees_with_torch_distributions_up_to_a_constant():
    logits, counts = torch.randn(3, 5).double(), torch.tensor([1.0, 0, 4, 2, 0])
    law = torch.distributions.Multinomial(7, logits=logits)
    constant = math.lgamma(8) - sum(math.lgamma(c + 1) for c in counts.tolist())
    nll = vaeops.recon_loss(logits, counts, "multinomial", reduction="sample")
    torch.testing.assert_close(constant - law.log_prob(counts.double()), nll)


@pytest.mark.parametrize("kind", ["bce", "l1", "huber"])
def test_values_and_gradients_are_torchs(isa, kind):
    """Also where the formula alone does not say: logarithms of 0, the corner of |d|."""
    pred = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.25, 0.5, 1e-30, 0.3]).requires_grad_()
    target = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.5, 0.5, 1.0, 0.0])
    ours = vaeops.recon_loss(pred, target, kind, reduction="none", scale=0.25 if kind == "huber" else None)
    theirs = {"bce": F.binary_cross_entropy, "l1": F.l1_loss,
              "huber": lambda p, t, reduction: F.huber_loss(p, t, delta=0.25, reduction=reduction)}[kind](
        pred, target, reduction="none")  # fmt: skip
    torch.testing.assert_close(ours, theirs)
    a, b = (torch.autograd.grad(x.sum(), pred)[0] for x in (ours, theirs))
    torch.testing.assert_close(a, b)


def test_infinite_logits(isa):
    """An infinite logit costs nothing on the right side, everything on the wrong; gradients are finite."""
    pred = torch.tensor([INF, INF, INF, -INF, -INF, -INF, NAN]).requires_grad_()
    target = torch.tensor([1.0, 0, 0.5, 0, 1, 0.5, 1])
    loss = vaeops.recon_loss(pred, target, "bce_logits", reduction="none")
    expected = torch.tensor([0, INF, INF, 0, INF, INF, NAN])
    torch.testing.assert_close(loss, expected, equal_nan=True)
    torch.testing.assert_close(
        ref.recon_loss(pred.detach(), target, "bce_logits", reduction="none"), expected, equal_nan=True
    )
    gradient = torch.autograd.grad(loss.sum(), pred)[0]
    torch.testing.assert_close(gradient, torch.tensor([0, 1, 0.5, 0, -1, -0.5, NAN]), equal_nan=True)


def test_large_logits_keep_their_digits(isa):
    pred = torch.linspace(-120, 120, 4801)
    for target in (0.0, 1.0):
        loss = vaeops.recon_loss(pred, torch.tensor(target), "bce_logits", reduction="none")
        exact = F.softplus(pred.double() * (1 - 2 * target), threshold=200)
        normal = exact > 2.0**-126
        relative = ((loss.double() - exact).abs() / exact)[normal]
        assert float(relative.max()) < 3e-7, float(relative.max())


@pytest.mark.parametrize("kind", ref.KINDS)
@pytest.mark.parametrize("impl", ["cpp", "ref"])
def test_what_a_mask_hides_is_not_looked_at(isa, kind, impl):
    pred, target = make(kind, (4, 150)), torch.rand(4, 150)
    mask = torch.rand(4, 150) < 0.6
    options = {"kind": kind, "mask": mask, "reduction": "sample", "scale": scale_of(kind), "impl": impl}
    leaf = pred.clone().requires_grad_()
    clean = vaeops.recon_loss(leaf, target, **options)
    clean.sum().backward()
    assert bool(leaf.grad[~mask].eq(0).all())
    for bad in (NAN, INF, -INF):
        dirty = pred.masked_fill(~mask, bad).requires_grad_()
        loss = vaeops.recon_loss(dirty, target.masked_fill(~mask, bad), **options)
        loss.sum().backward()
        assert torch.equal(loss, clean) and torch.equal(dirty.grad, leaf.grad)
        if kind != "multinomial":
            weighed = {**options, "mask": None, "weight": mask.float()}
            assert torch.equal(vaeops.recon_loss(dirty, target, **weighed), clean)
    everything = vaeops.recon_loss(leaf, target, **{**options, "mask": torch.zeros(150, dtype=torch.bool)})
    assert bool(everything.eq(0).all())
    assert bool(torch.autograd.grad(everything.sum(), leaf)[0].eq(0).all())


@pytest.mark.parametrize("kind", ref.KINDS)
def test_nan_stays_in_its_row(isa, kind):
    pred, target = make(kind, (6, 300)), torch.rand(6, 300)
    options = {"reduction": "sample", "scale": scale_of(kind)}
    clean = vaeops.recon_loss(pred, target, kind, **options)
    pred[2, 130] = NAN
    loss = vaeops.recon_loss(pred, target, kind, **options)
    rows = [0, 1, 3, 4, 5]
    assert torch.equal(loss[rows], clean[rows]) and bool(loss[2].isnan())


def test_gaussian_nll_is_minus_the_log_density(isa):
    x, mu, logvar = (torch.randn(5, 80, requires_grad=True) for _ in range(3))
    for reduction in gaussian.REDUCTIONS:
        for param, rho in (("logvar", logvar), ("std", logvar.exp())):
            nll = vaeops.gaussian_nll(x, mu, rho, param=param, reduction=reduction)
            assert torch.equal(nll, -vaeops.gaussian_log_prob(x, mu, rho, param=param, reduction=reduction))
    fixed = vaeops.recon_loss(mu, x.detach(), "gaussian_nll", scale=0.5)
    torch.testing.assert_close(vaeops.gaussian_nll(x, mu, torch.full_like(mu, 0.5), param="std"), fixed)


# ---- the multinomial


def test_multinomial_of_many_items(isa):
    """100,000 items, few of them with a count, rows without any, logits masked by -inf."""
    logits = 3 * torch.randn(5, 100_000)
    counts = (torch.rand(5, 100_000) < 1e-3).float() * torch.randint(1, 9, (5, 100_000))
    counts[3] = 0
    hidden = (torch.rand(5, 100_000) < 0.2) & (counts == 0)
    logits[hidden] = -INF
    cotangent = torch.rand(5).double()
    options = {"reduction": "sample"}
    ours = run(vaeops.recon_loss, logits, counts, "multinomial", cotangent, **options)
    exact = run(ref.recon_loss, logits.double(), counts, "multinomial", cotangent, **options)
    eager = run(textbook, logits.masked_fill(hidden, -1e4), counts, "multinomial", cotangent, **options)
    for name, a, b, c, factor in zip(("loss", "d logits"), ours, exact, eager, (2.0, 3.0)):
        assert_within_budget(a, b, c, name, factor=factor)
    assert ours[0][3] == 0 and bool(ours[1][3].eq(0).all()) and bool(ours[1][hidden].eq(0).all())


@pytest.mark.parametrize("impl", ["cpp", "ref"])
def test_multinomial_of_extreme_logits(isa, impl):
    forward, backward = (
        getattr(getattr(torch.ops.vaeops, f"multinomial_{name}"), impl) for name in ("fwd", "bwd")
    )
    logits = torch.tensor(
        [[1e4, 9999.0, -1e4, 0], [-1e4] * 4, [-INF] * 4, [-INF, 3.0, -INF, -INF], [INF, 0, 0, 0]]
    )
    counts = torch.tensor([[1.0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 5, 0, 0], [0, 1, 0, 0]])
    nll, lse, total = forward(logits, counts, None)
    expected = F.softplus(torch.tensor(-1.0))
    torch.testing.assert_close(nll, torch.tensor([3 * expected + 2, math.log(4), 0, 0, INF]))
    torch.testing.assert_close(lse, torch.logsumexp(logits.double(), 1), rtol=1e-9, atol=1e-7)
    assert torch.equal(total, counts.sum(1))
    gradient = backward(torch.ones(5), logits, counts, None, lse, total)
    assert bool(gradient[:4].isfinite().all()) and bool(gradient[2].eq(0).all())
    torch.testing.assert_close(gradient[:4].sum(1), torch.zeros(4), atol=1e-5, rtol=0)


def test_multinomial_keeps_two_numbers_a_sample():
    logits, counts = torch.randn(8, 500, requires_grad=True), torch.randint(0, 3, (8, 500), dtype=torch.uint8)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        vaeops.recon_loss(logits, counts, "multinomial")
    assert sum(t.nbytes for t in kept) == logits.nbytes + counts.nbytes + 8 * (4 + 8)


# ---- gradients


@pytest.mark.parametrize("impl", ["cpp", "ref"])
@pytest.mark.parametrize("kind", ref.KINDS)
def test_gradcheck_and_gradgradcheck(kind, impl):
    pred = make(kind, (3, 5), torch.float64).requires_grad_()
    target = torch.rand(3, 5).double()
    given = ({}, {"mask": torch.rand(5) < 0.6}, {"weight": torch.rand(3, 1).double()})
    for i, reduction in enumerate(reductions(kind)):
        options = given[i % 3] | {"reduction": reduction, "scale": scale_of(kind), "impl": impl}

        def f(pred, options=options):
            return vaeops.recon_loss(pred, target, kind, **options)

        assert torch.autograd.gradcheck(f, (pred,), check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(f, (pred,))


@pytest.mark.parametrize("kind", ref.KINDS)
def test_memory_kept_for_backward_and_no_grad(kind):
    pred, target = make(kind, (16, 32)).requires_grad_(), torch.randint(0, 5, (16, 32), dtype=torch.uint8)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        vaeops.recon_loss(pred, target, kind)
        inputs = pred.nbytes + target.nbytes + (16 * (4 + 8) if kind == "multinomial" else 0)
        assert sum(t.nbytes for t in kept) == inputs
        kept.clear()
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                assert vaeops.recon_loss(pred, target, kind).grad_fn is None
    assert not kept


def test_results_do_not_depend_on_batch_or_threads():
    threads = torch.get_num_threads()
    for kind in ref.KINDS:
        pred, target = make(kind, (64, 1700)), torch.rand(64, 1700)
        rows = vaeops.recon_loss(pred, target, kind, reduction="sample")
        part = vaeops.recon_loss(pred[10:13], target[10:13], kind, reduction="sample")
        assert torch.equal(part, rows[10:13])
        for reduction in reductions(kind):
            results = []
            for n in (1, 2, 3):
                torch.set_num_threads(n)
                leaf = pred.clone().requires_grad_()
                loss = vaeops.recon_loss(leaf, target, kind, reduction=reduction)
                results.append((loss, *torch.autograd.grad(loss.sum(), leaf)))
            torch.set_num_threads(threads)
            for other in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(results[0], other))
