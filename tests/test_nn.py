"""Modules over the ops: modes, state, what they pass on, tracing."""

import pytest
import torch

import vaeops
from vaeops import objectives
from vaeops.nn import GaussianLatent, KLSchedule, PosteriorMonitor

SEED = torch.tensor([7, 0])


def posterior(*shape):
    g = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=g), torch.randn(shape, generator=g)


@pytest.mark.parametrize("ops", ["fused", "ref"])
def test_latent_in_training_is_reparam_kl(ops):
    mu, logvar = posterior(5, 3)
    prior = (logvar, mu)
    options = {"param": "logstd", "clamp": (-1.0, 0.5), "reduction": "sample", "temperature": 0.7}
    z, kl, seed = GaussianLatent(ops=ops, **options)(mu, logvar, prior=prior, seed=SEED)
    expected = vaeops.reparam_kl(mu, logvar, prior=prior, seed=SEED, **options)
    torch.testing.assert_close(z, expected.z)
    torch.testing.assert_close(kl, expected.kl)
    assert torch.equal(seed, SEED)


def test_latent_draws_anew_at_every_call_and_obeys_manual_seed():
    mu, logvar = posterior(5, 3)
    latent = GaussianLatent()
    torch.manual_seed(1)
    first, second = latent(mu, logvar), latent(mu, logvar)
    torch.manual_seed(1)
    assert not torch.equal(first.z, second.z)
    assert torch.equal(first.z, latent(mu, logvar).z)
    g = torch.Generator().manual_seed(3)
    expected = vaeops.reparam_kl(mu, logvar, generator=torch.Generator().manual_seed(3))
    assert torch.equal(latent(mu, logvar, generator=g).z, expected.z)


@pytest.mark.parametrize("ops", ["fused", "ref"])
def test_latent_in_eval_is_the_mode_unless_noise_is_given(ops):
    mu, logvar = posterior(5, 3)
    latent = GaussianLatent(ops=ops, reduction="dim").eval()
    z, kl, seed = latent(mu, logvar[:, :1])
    assert torch.equal(z, mu) and seed is None
    torch.testing.assert_close(kl, vaeops.gaussian_kl(mu, logvar[:, :1], reduction="dim"))
    noisy = latent(mu, logvar, seed=SEED)
    torch.testing.assert_close(noisy.z, vaeops.reparam_kl(mu, logvar, seed=SEED).z)
    eps = torch.randn(5, 3)
    torch.testing.assert_close(latent(mu, logvar, eps=eps).z, mu + (0.5 * logvar).exp() * eps)


def test_latent_compiles_in_both_modes():
    latent = GaussianLatent()
    compiled = torch.compile(latent, fullgraph=True, dynamic=True, backend="aot_eager")
    for mode in (True, False):
        latent.train(mode)
        for rows in (4, 6):
            mu, logvar = (t.requires_grad_() for t in posterior(rows, 3))
            seed = SEED if mode else None
            got, expected = compiled(mu, logvar, seed=seed), latent(mu, logvar, seed=seed)
            torch.testing.assert_close(got.z, expected.z)
            for a, b in zip(
                torch.autograd.grad(got.kl, (mu, logvar)), torch.autograd.grad(expected.kl, (mu, logvar))
            ):
                torch.testing.assert_close(a, b)


def test_latent_refuses_unknown_ops_and_passes_bad_options_on():
    with pytest.raises(ValueError, match=r"ops must be one of \('fused', 'ref'\), got 'fast'"):
        GaussianLatent(ops="fast")
    with pytest.raises(ValueError, match="reduction must be one of"):
        GaussianLatent(reduction="total")(*posterior(2, 2))
    assert "reduction='batchmean'" in repr(GaussianLatent())


@pytest.mark.parametrize("kind", objectives.SCHEDULES)
def test_schedule_follows_anneal(kind):
    options = {"stop": 0.5} | ({"steps": 6, "start": 0.1} if kind != "constant" else {})
    schedule = KLSchedule(kind, **options)
    for i in range(9):
        value = schedule()
        assert value.shape == () and value.dtype is torch.float32
        torch.testing.assert_close(value, objectives.anneal(torch.tensor(i), kind, **options))
        schedule.step()


def test_schedule_resumes_from_its_state():
    schedule = KLSchedule("linear", steps=10)
    for _ in range(3):
        schedule.step()
    resumed = KLSchedule("linear", steps=10)
    resumed.load_state_dict(schedule.state_dict())
    assert resumed() == schedule() == torch.tensor(3) / 10


def test_schedule_does_not_recompile():
    schedule = KLSchedule("cosine", steps=10)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    @torch.compile(fullgraph=True, backend=count)
    def weighted(x):
        schedule.step()
        return schedule() * x

    values = [float(weighted(torch.ones(()))) for _ in range(6)]
    assert values == sorted(set(values)) and len(graphs) == 1


@pytest.mark.parametrize(
    ("error", "match", "kind", "options"),
    [
        (ValueError, "kind must be one of .* got 'step'", "step", {}),
        (TypeError, r"'linear' does not read \['cycles'\]", "linear", {"steps": 3, "cycles": 2}),
        (TypeError, r"'constant' does not read \['start'\]", "constant", {"start": 0.0}),
        (TypeError, "'sigmoid' needs steps", "sigmoid", {}),
        (ValueError, "at least 1, got 0", "linear", {"steps": 0}),
        (ValueError, "ratio must be in", "cyclical", {"steps": 3, "ratio": 2.0}),
    ],
)
def test_schedule_refuses(error, match, kind, options):
    with pytest.raises(error, match=match):
        KLSchedule(kind, **options)


def test_monitor_averages_over_unequal_batches():
    mu, logvar = posterior(60, 4)
    mu = mu * torch.tensor([1.0, 1e-3, 2.0, 0.0]) + 5.0
    monitor = PosteriorMonitor(4)
    for m, lv in zip(mu.split((7, 33, 20)), logvar.split((7, 33, 20))):
        monitor.update(m, vaeops.gaussian_kl(m, lv, reduction="dim"))
    torch.testing.assert_close(monitor.kl, vaeops.gaussian_kl(mu, logvar, reduction="dim"))
    torch.testing.assert_close(monitor.variance(), mu.var(0), rtol=1e-4, atol=1e-7)
    assert monitor.active_units() == 2 and not monitor.collapsed()
    assert monitor.summary()["samples"] == 60 and monitor.summary()["active_units"] == 2
    monitor.reset()
    assert all(not b.any() for b in monitor.buffers())


def test_monitor_flags_a_collapsed_posterior():
    monitor = PosteriorMonitor(4)
    mu, logvar = posterior(50, 4)
    mu, logvar = 0.01 * mu, 0.01 * logvar
    monitor.update(mu, vaeops.gaussian_kl(mu, logvar, reduction="dim"))
    assert monitor.summary() == {
        "samples": 50,
        "kl": float(monitor.kl.sum()),
        "active_units": 0,
        "collapsed": True,
    }


def test_monitor_takes_spatial_latents_low_precision_and_graphs():
    monitor = PosteriorMonitor((2, 3, 3))
    mu = torch.randn(4, 5, 2, 3, 3, dtype=torch.bfloat16, requires_grad=True)  # two batch dims
    kl = vaeops.gaussian_kl(mu, mu * 0, reduction="dim", batch_ndim=2)
    monitor.update(mu, kl)
    assert int(monitor.count) == 20
    assert all(not b.requires_grad for b in monitor.buffers())
    assert [b.dtype for b in monitor.buffers()] == [torch.int64] + [torch.float32] * 3
    torch.testing.assert_close(monitor.variance(), mu.detach().float().flatten(0, 1).var(0))


def test_monitor_stays_fp32_in_a_low_precision_model():
    monitor = PosteriorMonitor(2)
    monitor.update(torch.tensor([[0.1, 1.0], [0.3, 2.0]]), torch.tensor([1 / 3, 2 / 3]))
    before = [b.clone() for b in monitor.buffers()]
    torch.nn.Sequential(monitor).bfloat16()
    for a, b in zip(before, monitor.buffers()):
        assert a.dtype is b.dtype and torch.equal(a, b)
    assert monitor.to("meta").kl.is_meta


def test_monitor_traces_and_stays_empty_for_an_empty_batch():
    monitor = PosteriorMonitor(3)
    update = torch.compile(monitor.update, fullgraph=True, backend="eager")
    update(torch.zeros(0, 3), torch.zeros(3))
    assert not monitor.variance().any()
    mu, logvar = posterior(9, 3)
    update(mu, vaeops.gaussian_kl(mu, logvar, reduction="dim"))
    torch.testing.assert_close(monitor.variance(), mu.var(0))


@pytest.mark.parametrize(("mu", "kl"), [((5, 4), (3,)), ((3,), (3,)), ((5, 3), (5,)), ((5, 3), ())])
def test_monitor_refuses_other_shapes(mu, kl):
    with pytest.raises(ValueError, match="PosteriorMonitor: mu must be"):
        PosteriorMonitor(3).update(torch.zeros(mu), torch.zeros(kl))
