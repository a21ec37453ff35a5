"""Drop-in quantizers: the peers' values in fp64, their state_dicts, and where they are wrong."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vaeops.compat import audiocraft, diffusers, lucidrains, taming


@pytest.fixture
def peer(monkeypatch):
    """lucidrains' package. It computes in fp32 whatever comes in; here `.float()` leaves fp64 as it is."""
    package = pytest.importorskip("vector_quantize_pytorch")
    monkeypatch.setattr(torch.Tensor, "float", lambda t: t if t.dtype is torch.float64 else t.to(torch.float32))
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
    """Outputs and gradients of an encoder, the layer, and its loss, over SGD steps; then the layer's state."""
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


LUCIDRAINS = [
    {},
    {"rotation_trick": False},
    {"decay": 0.99, "eps": 1e-3, "commitment_weight": 0.25},
    {"use_cosine_sim": True},
    {"codebook_dim": 3},
    {"codebook_dim": 3, "layernorm_after_project_in": True},
    {"heads": 2, "codebook_dim": 2},
    {"heads": 2, "codebook_dim": 3, "separate_codebook_per_head": True, "use_cosine_sim": True},
    {"learnable_codebook": True, "ema_update": False},
    {"learnable_codebook": True, "ema_update": False, "sync_update_v": 0.5},
    {"learnable_codebook": True, "ema_update": False, "route_gradients_to_input": False},
    {"directional_reparam": True, "directional_reparam_variance": 0.0, "threshold_ema_dead_code": 1e-9},
    {"orthogonal_reg_weight": 10.0},
    {"orthogonal_reg_weight": 10.0, "orthogonal_reg_active_codes_only": True},
    {"freeze_codebook": True},
    {"manual_ema_update": True},
    {"commitment_weight": 0.0},
]


@pytest.mark.parametrize("options", LUCIDRAINS, ids=str)
def test_lucidrains_trains_as_the_peer(peer, options):
    ours, theirs = twins(lucidrains.VectorQuantize, peer.VectorQuantize, 4, 8, **options)
    assert_same_training(ours, theirs)
