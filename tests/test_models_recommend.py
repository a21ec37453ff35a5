"""Mult-VAE: losses against their formula, noise by rows, and that it recommends."""

import os
from pathlib import Path

import model_case as case
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vaeops.models import MultVAE, create

ROOT = Path(os.environ.get("VAEOPS_DATA", "data"))


def baskets(n=6, items=13):
    return (torch.rand(n, items, generator=torch.Generator().manual_seed(3)) < 0.4).float()


def test_parameter_count():
    assert case.count(create("mult-vae")) == 2_381_682


def test_losses_and_gradients_are_those_of_the_formula():
    model = MultVAE(13, (8,), 3, dropout=0).double()
    x, eps = baskets().double(), torch.randn(6, 3, dtype=torch.float64)
    losses, monitors = model.terms(x, eps=eps)
    h = torch.tanh(F.linear(x / x.norm(dim=1, keepdim=True), model.encoder[0].weight, model.encoder[0].bias))
    mu, logvar = F.linear(h, model.encoder[2].weight, model.encoder[2].bias).split(3, 1)
    h = F.linear(mu + (logvar / 2).exp() * eps, model.decoder[0].weight, model.decoder[0].bias)
    logits = F.linear(torch.tanh(h), model.decoder[2].weight, model.decoder[2].bias)
    recon = -(x * logits.log_softmax(1)).sum(1).mean()
    kl = -0.5 * (1 + logvar - mu.square() - logvar.exp()).mean(0)
    assert list(losses) == ["recon", "kl"] == list(model.weights)
    torch.testing.assert_close(losses["recon"], recon)
    torch.testing.assert_close(losses["kl"], kl)
    torch.testing.assert_close(monitors["mu_abs"], mu.detach().abs().mean())
    parameters = list(model.parameters())
    ours = torch.autograd.grad(losses["recon"] + 0.3 * losses["kl"].sum(), parameters)
    right = torch.autograd.grad(recon + 0.3 * kl.sum(), parameters)
    for a, b in zip(ours, right):
        torch.testing.assert_close(a, b)


def test_dropout_in_training_alone():
    """Kept entries are scaled, about half are dropped, and no noise is drawn in eval."""
    model = MultVAE(1000, (4,), 2)
    seen = []
    model.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = torch.ones(40, 1000)
    model(x, seed=case.SEED)
    model(x, seed=case.SEED)
    model(x)
    model.eval()
    out = model(x)
    (first, again, fresh, clean), unit = seen, 1000**-0.5
    assert first.unique().tolist() == [0, pytest.approx(2 * unit)]
    assert abs(float((first > 0).float().mean()) - 0.5) < 5 * 0.5 / 200
    assert torch.equal(first, again) and not torch.equal(first, fresh)
    torch.testing.assert_close(clean, torch.full_like(clean, unit))
    assert torch.equal(out.z, out.mu) and torch.equal(out.mu, model.encode(x)[0])


def test_rows_draw_the_joined_noise():
    model = MultVAE(13, (8,), 3)
    case.assert_rows_draw_the_joined_noise(model, baskets())
    case.assert_rows_draw_the_joined_noise(MultVAE(13, (8,), 3, dropout=0), baskets())


def test_a_user_without_items():
    model = MultVAE(13, (8,), 3)
    x = baskets()
    x[2] = 0
    losses = model.terms(x, seed=case.SEED).losses
    objective = case.objective(model, model.terms(x, seed=case.SEED))
    assert all(loss.isfinite().all() for loss in losses.values())
    assert all(g.isfinite().all() for g in torch.autograd.grad(objective, model.parameters()))


def test_training_agrees_with_the_reference():
    case.assert_ops_agree(lambda **o: MultVAE(13, (8,), 3, **o), baskets())


def test_one_graph_and_fp32_losses(tmp_path):
    model = create("mult-vae", items=13, hidden=(8,), latent=3)
    case.assert_traces_and_autocasts(model, baskets())
    case.assert_survives_its_file(model, tmp_path / "model.safetensors")


def test_probabilities():
    model = MultVAE(13, (8,), 3).eval()
    x = baskets()
    shown, drawn = model.reconstruct(x), model.sample(4, case.SEED)
    assert torch.equal(shown, model.decode(model.encode(x)[0]).softmax(1))
    for p in (shown, drawn):
        torch.testing.assert_close(p.sum(1), torch.ones(len(p)))
    assert drawn.shape == (4, 13) and torch.equal(drawn, model.sample(4, case.SEED))


def test_bad_input():
    with pytest.raises(ValueError, match=r"x must be \[B, 13\], got \[2, 12\]"):
        MultVAE(13, (8,), 3).terms(torch.zeros(2, 12))
    for dropout in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got"):
            MultVAE(13, dropout=dropout)


@pytest.mark.slow
@pytest.mark.skipif(
    not (ROOT / "ml-100k").is_dir(),
    reason=f"no ml-100k/ in {ROOT}: set VAEOPS_DATA to where the data sets are",
)
def test_it_recommends_what_users_took():
    """MovieLens-100k: of 100 users that it never saw, from 4 of 5 items taken, recall of the fifth part."""
    rows = np.loadtxt(ROOT / "ml-100k" / "u.data.gz", dtype=np.int64)
    taken = torch.zeros(943, 1682)
    liked = rows[rows[:, 2] >= 4]
    taken[liked[:, 0] - 1, liked[:, 1] - 1] = 1
    taken = taken[taken.sum(1) >= 5]
    train, tested = taken[:-100], taken[-100:]
    hidden = (torch.rand(tested.shape, generator=torch.Generator().manual_seed(0)) < 0.2) & (tested > 0)
    torch.manual_seed(0)
    model = MultVAE(1682, (200,), 64)
    history = case.train(model, case.drawer(train, batch=128), 300)
    first, last = (case.mean_of(history, "recon", part) for part in (slice(1), slice(-20, None)))
    model.eval()
    given = tested.masked_fill(hidden, 0)

    def recall(scores, k=20):
        best = scores.masked_fill(given > 0, -torch.inf).topk(k).indices
        hits = hidden.gather(1, best).sum(1) / hidden.sum(1).clamp(min=1, max=k)
        return float(hits[hidden.any(1)].mean())

    ours, popular = recall(model.reconstruct(given)), recall(train.sum(0).expand_as(given))
    print("recon", first, last, "recall@20", ours, "of the most popular", popular)
    assert last < 0.9 * first and ours > 1.3 * popular
