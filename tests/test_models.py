"""The reference models: sizes, modes, and the same training on fused and on reference ops."""

import pytest
import torch
import torch.nn.functional as F

from vaeops.models import MLPVAE, MLPVQVAE, CelebAVAE
from vaeops.train import workshop_vq

SEED = torch.tensor([11, 0])


@pytest.mark.parametrize(
    ("sizes", "parameters"),
    [((784, (256, 256), 20), 549_688), ((784, (256, 256), 10), 541_988), ((784, (512, 256), 50), 1_105_780)],
)
def test_parameter_counts(sizes, parameters):
    assert sum(p.numel() for p in MLPVAE(*sizes).parameters()) == parameters


def test_the_workshop_s_vae_of_faces():
    model = CelebAVAE()
    assert sum(p.numel() for p in model.parameters()) == 7_868_931
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    out = model(x, seed=SEED)
    assert out.recon.shape == x.shape and out.z.shape == (2, 128) and out.recon.abs().max() <= 1
    reference = CelebAVAE(ops="ref")
    reference.load_state_dict(model.state_dict())
    torch.testing.assert_close(reference(x, seed=SEED).kl, out.kl)
    assert model.sample(3, SEED).shape == (3, 3, 64, 64)
    model.eval()
    assert torch.equal(model(x).z, model.encode(x)[0])


def test_shapes_and_modes():
    model = MLPVAE(12, (16,), 3)
    x = torch.rand(5, 12)
    out = model(x, seed=SEED)
    assert [t.shape for t in out] == [(5, 12), (5, 3), (5, 3), (5, 3), (3,)]
    assert not torch.equal(out.z, out.mu)
    samples = model.sample(7, SEED)
    assert samples.shape == (7, 12) and samples.min() >= 0 and samples.max() <= 1
    assert torch.equal(samples, model.sample(7, SEED)) and not torch.equal(samples, model.sample(7, SEED + 1))
    model.eval()
    out = model(x)
    assert torch.equal(out.z, out.mu) and torch.equal(out.logits, model.decoder(model.encode(x)[0]))


def losses_and_gradients(ops, dtype=torch.float32, steps=3):
    """Loss of each step, and step 1's gradients, of one training that follows from constants alone."""
    torch.manual_seed(0)
    model = MLPVAE(64, (32,), 4, ops=ops).to(dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    x = torch.rand(32, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    losses, first = [], None
    for step in range(steps):
        out = model(x, seed=SEED + torch.tensor([0, 32 * step]))
        loss = F.binary_cross_entropy_with_logits(out.logits, x, reduction="sum") / 32 + out.kl.sum()
        optimizer.zero_grad()
        loss.backward()
        first = first or [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        losses.append(loss.item())
    return losses, first


def test_training_agrees_with_the_reference():
    fused, gradients = losses_and_gradients("fused")
    eager, eager_gradients = losses_and_gradients("ref")
    exact, exact_gradients = losses_and_gradients("ref", torch.float64)
    ulp = torch.finfo(torch.float32).eps
    assert abs(fused[0] - exact[0]) <= 2 * (abs(eager[0] - exact[0]) + ulp * abs(exact[0]))
    used = []
    for ours, theirs, right in zip(gradients, eager_gradients, exact_gradients):
        budget = 3 * ((theirs - right).abs().max() + ulp * right.abs().max())
        used.append(float((ours - right).abs().max() / budget))
    print(f"share of the gradient budget used: {max(used):.2f}")
    assert max(used) <= 1
    assert fused[-1] < fused[0]
    for ours, theirs in zip(fused, eager):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_refuses_unknown_ops():
    with pytest.raises(ValueError, match="ops must be one of"):
        MLPVAE(4, (4,), 2, ops="eager")


@pytest.mark.parametrize(("codes", "parameters"), [(10, 1_069_584), (32, 1_075_216)])
def test_parameter_counts_with_a_codebook(codes, parameters):
    assert sum(p.numel() for p in MLPVQVAE(784, (512,), 256, codes).parameters()) == parameters


def test_training_with_a_codebook_agrees_with_the_reference():
    images = torch.rand(256, 5, 5, generator=torch.Generator().manual_seed(2))
    options = {"codes": 8, "dim": 6, "hidden": (16,), "commitment": 1.0, "steps": workshop_vq.TAIL, "seed": 5}
    ours, theirs = (workshop_vq.train(images, **options, ops=ops) for ops in ("fused", "ref"))
    assert ours.recon == pytest.approx(theirs.recon, rel=1e-4)
    assert ours.perplexity == pytest.approx(theirs.perplexity, rel=1e-4)
    with pytest.raises(ValueError, match="ops must be one of"):
        MLPVQVAE(4, (4,), 2, 3, ops="eager")
