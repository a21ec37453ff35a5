"""What the tests of every reference model ask: one training on fused and on reference ops, noise by rows."""

import copy

import pytest
import torch

from vaeops import rng
from vaeops.models import load, save

SEED = torch.tensor([11, 0])


def count(model):
    return sum(p.numel() for p in model.parameters())


def objective(model, terms):
    return sum(model.weights[name] * loss.sum() for name, loss in terms.losses.items())


def train(model, draw, steps, lr=1e-3):
    """Adam on the weighted losses, batch after batch of `draw(step)`. Returns each step's Terms, detached."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    model.train()
    history = []
    for step in range(steps):
        terms = model.terms(*draw(step), seed=rng.fold_in(SEED, step))
        loss = objective(model, terms)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(terms._replace(losses={k: v.detach() for k, v in terms.losses.items()}))
    return history


def assert_ops_agree(make, *batch, steps=3):
    """The same first losses from make(ops="fused") and make(ops="ref")."""
    runs = []
    for ops in ("fused", "ref"):
        torch.manual_seed(0)
        runs.append(train(make(ops=ops), lambda step: batch, steps))
    for ours, theirs in zip(*runs):
        assert list(ours.losses) == list(theirs.losses)
        for name, loss in ours.losses.items():
            assert loss.dtype is torch.float32
            torch.testing.assert_close(loss, theirs.losses[name], rtol=1e-4, atol=1e-7)
    with pytest.raises(ValueError, match=r"ops must be one of .*got 'eager'"):
        make(ops="eager")


def assert_rows_draw_the_joined_noise(model, x):
    """Halves of a batch (an odd number of rows each) have the mean losses that the whole has."""
    half = len(x) // 2
    whole, first, second, wrong = (
        model.terms(part, seed=SEED, row=row).losses
        for part, row in ((x, 0), (x[:half], 0), (x[half:], half), (x[half:], 0))
    )
    for name, loss in whole.items():
        torch.testing.assert_close((first[name] + second[name]) / 2, loss)
    assert any(not torch.allclose(second[name], wrong[name]) for name in whole)


def assert_traces_and_autocasts(model, *batch):
    """One graph, of the same losses; fp32 losses near them under autocast."""
    traced, cast = copy.deepcopy(model), copy.deepcopy(model)
    losses = model.terms(*batch, seed=SEED, row=2).losses
    torch._dynamo.reset()
    compiled = torch.compile(traced.terms, fullgraph=True, backend="eager")
    again = compiled(*batch, seed=SEED, row=2).losses
    with torch.autocast("cpu", torch.bfloat16):
        low = cast.terms(*batch, seed=SEED, row=2).losses
    for name, loss in losses.items():
        assert torch.equal(again[name], loss) and low[name].dtype is torch.float32
        torch.testing.assert_close(low[name], loss, rtol=0.1, atol=0.02)


def assert_survives_its_file(model, path):
    """model, from `create`, is the same after `save` and `load`."""
    pytest.importorskip("safetensors")
    save(model, path)
    again = load(path).state_dict()
    assert model.state_dict().keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


def digits():
    """scikit-learn's digits: images [1797, 1, 8, 8] in [0, 1], labels int64 [1797], shuffled."""
    data = pytest.importorskip("sklearn.datasets").load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32)[order] / 16
    return images.unsqueeze(1), torch.tensor(data.target)[order]


def drawer(x, label=None, batch=64):
    """draw(step) -> a random batch, the same for the same step."""

    def draw(step):
        rows = torch.randint(len(x), (batch,), generator=torch.Generator().manual_seed(step))
        return (x[rows],) if label is None else (x[rows], label[rows])

    return draw


def mean_of(history, name, part):
    return float(torch.stack([terms.losses[name].sum() for terms in history[part]]).mean())
