"""The ELBO, ELBOLoss and the importance-weighted bound: what they compose, tracing, bad arguments."""

import math

import pytest
import torch

import vaeops
from vaeops import objectives
from vaeops.nn import ELBOLoss, KLSchedule


def batch(rows=6, dtype=torch.float32):
    pred, mu, logvar = (torch.randn(rows, d, dtype=dtype, requires_grad=True) for d in (20, 4, 4))
    return pred, torch.rand(rows, 20, dtype=dtype), mu, logvar


@pytest.mark.parametrize("reduction", ["sample", "batchmean", "sum"])
@pytest.mark.parametrize("beta", [2.5, torch.tensor(2.5)], ids=["float", "tensor"])
def test_elbo_is_its_two_terms(reduction, beta):
    pred, target = torch.randn(6, 20, requires_grad=True), torch.rand(6, 20)
    mu, logvar = (torch.randn(6, 4, requires_grad=True) for _ in range(2))
    latent = vaeops.reparam_kl(mu, logvar, reduction=reduction)
    mask = torch.rand(6, 20) < 0.5
    for given in (latent, latent.kl):
        out = vaeops.elbo(pred, target, given, kind="mse", beta=beta, reduction=reduction, mask=mask)
        recon = vaeops.recon_loss(pred, target, "mse", reduction=reduction, mask=mask)
        assert torch.equal(out.recon, recon) and torch.equal(out.kl, latent.kl)
        torch.testing.assert_close(out.loss, recon + 2.5 * latent.kl)
    a = torch.autograd.grad(out.loss.sum(), (pred, mu, logvar), retain_graph=True)
    b = torch.autograd.grad((recon + 2.5 * latent.kl).sum(), (pred, mu, logvar))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reduction", ["batchmean", "sample"])
def test_plain_is_elbo(reduction):
    pred, target, mu, logvar = batch()
    mask = torch.rand(6, 20) < 0.5
    criterion = ELBOLoss("huber", beta=0.3, scale=0.5, reduction=reduction, param="logstd")
    kl = vaeops.gaussian_kl(mu, logvar, param="logstd", reduction=reduction)
    expected = vaeops.elbo(
        pred, target, kl, kind="huber", scale=0.5, beta=0.3, reduction=reduction, mask=mask
    )
    for a, b in zip(criterion(pred, target, mu, logvar, mask=mask), expected):
        assert torch.equal(a, b)
    latent = vaeops.reparam_kl(mu, logvar, param="logstd", reduction=criterion.kl_reduction)
    for a, b in zip(criterion(pred, target, latent, mask=mask), expected):
        assert torch.equal(a, b)


def test_free_bits_and_capacity():
    pred, target, mu, logvar = batch()
    kl_dim = vaeops.gaussian_kl(mu, logvar, reduction="dim")
    recon = vaeops.recon_loss(pred, target, "bce_logits")
    for free in (0.5, 5.0):
        criterion = ELBOLoss("bce_logits", beta=2.0, free_bits=free)
        for latent in ((mu, logvar), (vaeops.reparam_kl(mu, logvar, reduction="dim"),)):
            out = criterion(pred, target, *latent)
            torch.testing.assert_close(out.loss, recon + 2 * objectives.free_bits(kl_dim, free))
            torch.testing.assert_close(out.kl, kl_dim.sum())
    capacity = KLSchedule("linear", steps=4, stop=8.0)
    criterion = ELBOLoss("bce_logits", beta=10.0, capacity=capacity)
    for step in range(3):
        out = criterion(pred, target, mu, logvar)
        torch.testing.assert_close(out.loss, recon + 10 * (kl_dim.sum() - 2.0 * step).abs())
        torch.testing.assert_close(out.kl, kl_dim.sum())
        criterion.capacity.step()


def test_a_schedule_is_a_submodule_and_its_count_travels():
    criterion = ELBOLoss("mse", beta=KLSchedule("linear", steps=10))
    pred, target, mu, logvar = batch()
    assert torch.equal(*criterion(pred, target, mu, logvar)[:2])  # beta 0
    for _ in range(5):
        criterion.beta.step()
    other = ELBOLoss("mse", beta=KLSchedule("linear", steps=10))
    other.load_state_dict(criterion.state_dict())
    loss, recon, kl = other(pred, target, mu, logvar)
    torch.testing.assert_close(loss, recon + 0.5 * kl)
    assert "kind='mse'" in repr(other) and "KLSchedule" in repr(other)


def test_a_learned_prior_gets_gradients():
    pred, target, mu, logvar = batch()
    prior = tuple(torch.randn(4, requires_grad=True) for _ in range(2))
    out = ELBOLoss("l1", free_bits=0.01)(pred, target, mu, logvar, prior=prior)
    torch.testing.assert_close(out.kl, vaeops.gaussian_kl(mu, logvar, prior=prior))
    grads = torch.autograd.grad(out.loss, (pred, mu, logvar, *prior))
    assert all(bool(g.isfinite().all()) and bool(g.any()) for g in grads)


def test_compiles():
    torch._dynamo.reset()
    criterion = ELBOLoss("bce_logits", beta=KLSchedule("linear", steps=4), free_bits=0.2)
    compiled = torch.compile(criterion, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (6, 9):
        criterion.beta.step()
        pred, target, mu, logvar = batch(rows)
        a, b = (f(pred, target, mu, logvar) for f in (compiled, criterion))
        torch.testing.assert_close(a.loss, b.loss)
        for x, y in zip(*(torch.autograd.grad(out.loss, (pred, mu, logvar)) for out in (a, b))):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: ELBOLoss("mse", reduction="sum"), ValueError, "reduction must be one of"),
        (lambda: ELBOLoss("mse", free_bits=1, capacity=1), ValueError, "give one of free_bits and capacity"),
        (lambda: ELBOLoss("mse", free_bits=1, reduction="sample"), ValueError, "are of a batch"),
        (lambda: ELBOLoss("l3"), ValueError, "kind must be one of"),
        (lambda: ELBOLoss("mse", param="var"), ValueError, "param must be one of"),
        (lambda: ELBOLoss("mse", beta="2"), TypeError, "beta must be a float or a KLSchedule, got str"),
        (lambda: ELBOLoss("mse", free_bits=None), TypeError, "free_bits must be a float, got NoneType"),
        (lambda: ELBOLoss("mse", free_bits=-1), ValueError, "free_bits must be >= 0"),
        (lambda: ELBOLoss("mse", capacity=True), TypeError, "capacity must be a float or a KLSchedule"),
        (lambda: ELBOLoss("mse")(*batch()[:3]), TypeError, "logvar is missing"),
        (
            lambda: ELBOLoss("mse")(*batch()[:2], vaeops.reparam_kl(*batch()[2:]), batch()[3]),
            TypeError,
            "a LatentOutput has its KL",
        ),
        (
            lambda: ELBOLoss("mse")(*batch()[:2], vaeops.reparam_kl(*batch()[2:], reduction="dim")),
            ValueError,
            r"must be reduced by 'batchmean' to \[\], got \[4\]",
        ),
        (
            lambda: ELBOLoss("mse", free_bits=1)(*batch()[:2], vaeops.reparam_kl(*batch()[2:])),
            ValueError,
            r"must be reduced by 'dim' to \[4\], got \[\]",
        ),
    ],
)
def test_bad_arguments(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_iwae_bound():
    terms = tuple(torch.randn(5, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    bound = objectives.iwae_bound(*terms)
    weights = (terms[0] + terms[1] - terms[2]).exp()
    torch.testing.assert_close(bound, weights.mean(0).log())
    assert torch.autograd.gradcheck(objectives.iwae_bound, terms)
    one = [t[:1] for t in terms]
    torch.testing.assert_close(objectives.iwae_bound(*one), (one[0] + one[1] - one[2])[0])
    far = torch.full((4, 1), -2000.0)  # a log-likelihood of images: exp of it is 0
    torch.testing.assert_close(objectives.iwae_bound(far, far, far), torch.tensor([-2000.0]))
    with pytest.raises(
        ValueError, match=r"log_pz must be \[K, \*B\] with K >= 1, all three alike, got \[5\]"
    ):
        objectives.iwae_bound(terms[0], terms[1][:, 0], terms[2])
    with pytest.raises(TypeError, match="log_qz must be a tensor"):
        objectives.iwae_bound(terms[0], terms[1], 0.0)


def test_iwae_bound_grows_towards_the_evidence():
    """x ~ N(z, 1), z ~ N(0, 1): log p(x) is known; a posterior that is off leaves a gap, which K closes."""
    torch.manual_seed(0)
    x = torch.full((400, 1), 0.7, dtype=torch.float64)
    mu, logvar = torch.zeros_like(x), torch.zeros_like(x)
    bounds = []
    for k in (1, 8, 64):
        many = (k, *x.shape)
        z = vaeops.reparameterize(mu.expand(many), logvar.expand(many))
        log_px = -vaeops.recon_loss(z, x, "gaussian_nll", reduction="sample", batch_ndim=2)
        log_pz, log_qz = (
            vaeops.gaussian_log_prob(z, mu.expand(many), logvar.expand(many), batch_ndim=2) for _ in range(2)
        )
        bounds.append(float(objectives.iwae_bound(log_px, log_pz, log_qz).mean()))
    evidence = float(torch.distributions.Normal(0, math.sqrt(2)).log_prob(torch.tensor(0.7)))
    assert bounds[0] < bounds[1] < bounds[2] < evidence + 0.01
    assert evidence - bounds[2] < 0.02 < evidence - bounds[0]
