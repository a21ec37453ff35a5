"""Drop-in quantizers: the peers' values in fp64, their state_dicts, and where they are wrong."""

import copy

import pytest
import torch
import torch.nn.functional as F
from compat_case import assert_same_training, twins
from torch import nn

from vaeops.compat import audiocraft, diffusers, lucidrains, taming


@pytest.mark.parametrize("make", [
    lambda: lucidrains.VectorQuantize(4, 8, kmeans_init=True, kmeans_iters=1, threshold_ema_dead_code=1),
    pytest.param(lambda: lucidrains.VectorQuantize(4, 8, affine_param=True, codebook_diversity_loss_weight=1,
                                                   commitment_use_cross_entropy_loss=True),
                 marks=pytest.mark.slow),
    pytest.param(lambda: lucidrains.ResidualVQ(dim=4, num_quantizers=2, codebook_size=8, beam_size=2),
                 marks=pytest.mark.slow),
    lambda: taming.VectorQuantizer2(8, 4, 0.25),
    lambda: audiocraft.EuclideanCodebook(4, 8, kmeans_init=True, kmeans_iters=1),
])  # fmt: skip
def test_compile_whole(make):
    torch._dynamo.reset()
    layer = make()
    eager = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (20, 24):
        x = (
            torch.randn(2, 4, rows, 1)
            if isinstance(layer, taming.VectorQuantizer2)
            else torch.randn(2, rows, 4)
        )
        torch.testing.assert_close(compiled(x)[0], eager(x)[0])
        torch.testing.assert_close(layer.state_dict(), eager.state_dict())


# ---- taming and diffusers


class Restated(nn.Module):
    """VQGAN's quantizer, from its formula."""

    def __init__(self, n_e, e_dim, beta, legacy):
        super().__init__()
        self.beta, self.legacy = beta, legacy
        self.embedding = nn.Embedding(n_e, e_dim)
        self.embedding.weight.data.uniform_(-1 / n_e, 1 / n_e)

    def forward(self, z):
        rows = z.movedim(1, -1)
        e = self.embedding.weight
        indices = (rows.unsqueeze(-2) - e).square().sum(-1).argmin(-1)
        q = F.embedding(indices, e)
        commit, codebook = F.mse_loss(rows, q.detach()), F.mse_loss(q, rows.detach())
        loss = commit + self.beta * codebook if self.legacy else self.beta * commit + codebook
        return (rows + (q - rows).detach()).movedim(-1, 1), loss, (None, None, indices.flatten())


def image_call(layer, x):
    quantized, loss, (_, _, indices) = layer(x)
    return quantized, indices, loss


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("cls", [taming.VectorQuantizer2, diffusers.VectorQuantizer])
def test_taming_trains_as_its_formula(cls, legacy):
    ours, theirs = twins(cls, Restated, 8, 4, 0.25, legacy=legacy)
    assert_same_training(ours, theirs, shape=(2, 3, 5), call=image_call, first=True)
    theirs.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("sane", [True, False])
def test_diffusers_trains_as_the_peer(legacy, sane):
    vae = pytest.importorskip("diffusers.models.autoencoders.vae")
    ours, theirs = twins(
        diffusers.VectorQuantizer, vae.VectorQuantizer, 8, 4, 0.25, legacy=legacy, sane_index_shape=sane
    )
    assert_same_training(ours, theirs, shape=(2, 3, 5), call=image_call, first=True)
    theirs.load_state_dict(ours.state_dict())
    indices = torch.randint(8, (2, 3, 5))
    for shape in ((2, 3, 5, 4), None):
        a, b = (m.get_codebook_entry(indices.clone(), shape) for m in (ours, theirs))
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("unknown", ["extra", 1, "random"])
@pytest.mark.parametrize("sane", [True, False])
def test_remapped_indices(tmp_path, unknown, sane):
    import numpy as np

    path = str(tmp_path / "used.npy")
    np.save(path, np.array([5, 2, 7, 2]))
    options = {"remap": path, "unknown_index": unknown, "sane_index_shape": sane}
    ours = taming.VectorQuantizer2(8, 4, 0.25, **options)
    assert set(ours.state_dict()) == {"embedding.weight", "used"}
    codes = torch.arange(8)
    mapped = ours.remap_to_used(codes)
    assert mapped[[5, 2, 7]].tolist() == [0, 1, 2]
    others = mapped[[0, 1, 3, 4, 6]]
    assert (
        ((others >= 0) & (others < 4)).all()
        if unknown == "random"
        else (others == (4 if unknown == "extra" else 1)).all()
    )
    assert ours.unmap_to_all(torch.tensor([0, 1, 2, 3])).tolist() == [5, 2, 7, 2]
    z = torch.randn(2, 4, 3, 5)
    assert ours(z)[2][2].shape == ((2, 3, 5) if sane else (30, 1))
    vae = pytest.importorskip("diffusers.models.autoencoders.vae")
    theirs = vae.VectorQuantizer(8, 4, 0.25, **options)
    theirs.load_state_dict(ours.state_dict())
    if unknown != "random":
        assert torch.equal(ours(z)[2][2], theirs(z)[2][2])
    entry = torch.tensor([[0, 1, 2, 3], [4, 1, 0, 2]] if unknown == "extra" else [[0, 1, 2, 3], [3, 1, 0, 2]])
    kept = entry.clone()
    torch.testing.assert_close(
        ours.get_codebook_entry(entry, (2, 2, 2, 4)), theirs.get_codebook_entry(kept.clone(), (2, 2, 2, 4))
    )
    assert torch.equal(entry, kept)


def test_taming_refuses_what_means_something_else():
    layer = taming.VectorQuantizer2(8, 4, 0.25)
    for options in ({"temp": 0.5}, {"rescale_logits": True}, {"return_logits": True}):
        with pytest.raises(ValueError, match=next(iter(options))):
            layer(torch.zeros(1, 4, 2, 2), **options)


def test_taming_picks_the_nearest_code_where_the_peers_formula_errs():
    """At the usual start the codes are within 1/K of the origin, and |z|^2 drowns what tells them apart."""
    vae = pytest.importorskip("diffusers.models.autoencoders.vae")
    torch.manual_seed(0)
    theirs, z = vae.VectorQuantizer(2048, 128, 0.25), torch.randn(1, 128, 20, 20)
    ours = diffusers.VectorQuantizer(2048, 128, 0.25)
    ours.load_state_dict(theirs.state_dict())
    e, rows = theirs.embedding.weight.double(), z.movedim(1, -1).reshape(-1, 128).double()
    nearest = (e.square().sum(1) / 2 - rows @ e.T).argmin(1)
    assert torch.equal(ours(z)[2][2], nearest)
    assert (theirs(z)[2][2] != nearest).any()


# ---- audiocraft


class RestatedEMA(nn.Module):
    """encodec's codebook, from its formula, less k-means and expiry."""

    def __init__(self, dim, codebook_size, decay=0.99, epsilon=1e-5, **_):
        super().__init__()
        self.decay, self.epsilon, self.size = decay, epsilon, codebook_size
        embed = torch.empty(codebook_size, dim)
        nn.init.kaiming_uniform_(embed)
        self.register_buffer("inited", torch.ones(1))
        self.register_buffer("cluster_size", torch.zeros(codebook_size))
        self.register_buffer("embed", embed)
        self.register_buffer("embed_avg", embed.clone())

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        indices = (rows.unsqueeze(1) - self.embed).square().sum(2).argmin(1)
        quantized = self.embed[indices].view_as(x)
        if self.training:
            one_hot = F.one_hot(indices, self.size).to(x.dtype)
            self.cluster_size.mul_(self.decay).add_(one_hot.sum(0), alpha=1 - self.decay)
            self.embed_avg.mul_(self.decay).add_(one_hot.t() @ rows, alpha=1 - self.decay)
            total = self.cluster_size.sum()
            size = (self.cluster_size + self.epsilon) / (total + self.size * self.epsilon) * total
            self.embed.copy_(self.embed_avg / size.unsqueeze(1))
        return quantized, indices.view(x.shape[:-1])


def codebook_call(layer, x):
    quantized, indices = layer(x.detach())
    return x + (quantized - x).detach(), indices, F.mse_loss(x, quantized)


def test_audiocraft_trains_as_its_formula():
    ours, theirs = twins(
        audiocraft.EuclideanCodebook, RestatedEMA, 4, 8, threshold_ema_dead_code=0, decay=0.9
    )
    assert_same_training(ours, theirs, call=codebook_call)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 4, dtype=torch.float64)
    assert torch.equal(ours.decode(ours.encode(x)), ours.eval()(x)[0])
    with pytest.raises(RuntimeError, match="foo"):
        ours.load_state_dict({**theirs.state_dict(), "foo": torch.zeros(1)})


def test_audiocraft_kmeans_start_holds():
    """The peer keeps means where sums belong, so its next step divides every code by its cluster's size."""
    centres = 10 * torch.randn(8, 4)
    x = centres.repeat_interleave(20, 0) + 0.01 * torch.randn(160, 4)
    ours = audiocraft.EuclideanCodebook(4, 8, kmeans_init=True, threshold_ema_dead_code=0)
    assert ours.state_dict()["inited"] == 0
    for _ in range(3):
        ours(x)
    assert ours.state_dict()["inited"] == 1
    assert (torch.cdist(ours.embed[0], x).min(1).values < 0.1).all()
    resumed = audiocraft.EuclideanCodebook(4, 8, kmeans_init=True)
    resumed.load_state_dict(ours.state_dict())
    assert resumed.started and torch.equal(resumed.embed, ours.embed)


def test_audiocraft_revival_lasts():
    """The peer writes the stale average over the replacement in the same step."""
    ours = audiocraft.EuclideanCodebook(2, 4, threshold_ema_dead_code=1)
    with torch.no_grad():
        ours.embed.copy_(torch.tensor([[[0.0, 0], [0, 1], [90, 90], [99, 99]]]))
        ours.cluster_size.fill_(5)
        ours.cluster_size[0, 2:] = 0
        ours.embed_avg.copy_(ours.embed * 5)
    x = torch.tensor([[0.0, 0], [0, 1], [3, 0], [0, 4]])
    ours(x)
    rows = ours.embed[0, 2:]
    assert (torch.cdist(rows, x).min(1).values == 0).all()
    torch.testing.assert_close(ours.embed_avg[0, 2:] / ours.cluster_size[0, 2:, None], rows)
