"""A drop-in and its peer, trained side by side in fp64."""

from functools import partial

import pytest
import torch
from torch import nn

from vaeops.compat import lucidrains

# lucidrains' options
SGD = partial(torch.optim.SGD, lr=0.1)
LEARNED = {"learnable_codebook": True, "ema_update": False}
HEADS = {"heads": 2, "codebook_dim": 3}
PER_HEAD = {**HEADS, "separate_codebook_per_head": True}
CE = {"commitment_use_cross_entropy_loss": True}
DIVERSE = {"codebook_diversity_loss_weight": 0.3, "codebook_diversity_temperature": 2.0}
RANDOM = {"stochastic_sample_codes": True}
SOFT = {"straight_through": True, "rotation_trick": False}


@pytest.fixture
def peer(monkeypatch):
    """lucidrains' package, with two changes.

    It computes in fp32 whatever comes in; here `.float()` leaves fp64 as it is. Its averages overwrite the
    codes that backward has yet to read; here they are written elsewhere.
    """
    package = pytest.importorskip("vector_quantize_pytorch")
    codebook = package.vector_quantize_pytorch.Codebook
    update = codebook.update_ema

    def elsewhere(self):
        self.embed.data = self.embed.data.clone()
        update(self)

    monkeypatch.setattr(codebook, "update_ema", elsewhere)
    monkeypatch.setattr(
        torch.Tensor, "float", lambda t: t if t.dtype is torch.float64 else t.to(torch.float32)
    )
    return package


def twins(ours, theirs, *args, seed=0, **options):
    """The two classes' modules of the same arguments and state, in fp64."""
    made = []
    for cls in (theirs, ours):
        torch.manual_seed(seed)
        made.append(cls(*args, **options).double())
    made[1].load_state_dict(made[0].state_dict())
    return made[1], made[0]


def train(layer, steps, shape, dim, *, call=lambda layer, x: layer(x), first=False):
    """(outputs, losses and gradients over SGD steps of an encoder and the layer, the layer's state)"""
    torch.manual_seed(1)
    encoder = nn.Linear(6, dim).double()
    weight = torch.randn(dim, dtype=torch.float64)
    optimizer = torch.optim.SGD([*encoder.parameters(), *layer.parameters()], lr=0.05)
    data = torch.randn(steps, *shape, 6, dtype=torch.float64)
    seen = []
    for batch in data:
        x = encoder(batch)
        x = x.movedim(-1, 1) if first else x
        quantized, indices, loss, *_ = call(layer, x)
        value = quantized.movedim(1, -1) if first else quantized
        objective = (value * weight).square().mean() + loss.sum()
        optimizer.zero_grad()
        objective.backward()
        gradient = encoder.weight.grad.clone()
        optimizer.step()
        seen.append((quantized.detach(), indices, loss.detach().double(), gradient))
    return seen, layer.state_dict()


def assert_same_training(ours, theirs, steps=50, shape=(2, 20), dim=4, **options):
    (a, state_a), (b, state_b) = (train(m, steps, shape, dim, **options) for m in (ours, theirs))
    for step, (one, other) in enumerate(zip(a, b)):
        assert torch.equal(one[1], other[1]), f"indices of step {step}"
        for x, y in zip((one[0], *one[2:]), (other[0], *other[2:])):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)
    assert list(state_a) == list(state_b) or set(state_a) == set(state_b)
    for name in state_a:
        assert state_a[name].shape == state_b[name].shape and state_a[name].dtype is state_b[name].dtype
        torch.testing.assert_close(state_a[name], state_b[name], rtol=1e-9, atol=1e-9)


def lucidrains_pair(peer, *args, **options):
    return twins(lucidrains.VectorQuantize, peer.VectorQuantize, *args, **options)
