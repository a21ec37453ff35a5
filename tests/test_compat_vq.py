"""Drop-in quantizers: the peers' values in fp64, their state_dicts, and where they are wrong."""

import copy
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


def lucidrains_pair(peer, *args, **options):
    return twins(lucidrains.VectorQuantize, peer.VectorQuantize, *args, **options)


@pytest.mark.parametrize(
    ("options", "shape", "first"),
    [
        ({"channel_last": False}, (2, 20), True),
        ({"accept_image_fmap": True, "heads": 2, "codebook_dim": 3}, (2, 3, 5), True),
        ({"accept_3d_fmap": True}, (2, 3, 2, 2), True),
        ({}, (9,), False),
    ],
    ids=str,
)
def test_lucidrains_layouts(peer, options, shape, first):
    ours, theirs = lucidrains_pair(peer, 4, 8, **options)
    assert_same_training(ours, theirs, steps=3, shape=shape, first=first)
    if "heads" not in options:  # of shared heads the peer does not join the codes
        indices = torch.randint(8, shape)
        for name in ("get_codes_from_indices", "get_output_from_indices"):
            torch.testing.assert_close(getattr(ours, name)(indices), getattr(theirs, name)(indices))


@pytest.mark.parametrize(
    "options", [{}, {"return_zeros_for_masked_padding": False}, {"rotation_trick": False}], ids=str
)
def test_lucidrains_masks_and_lengths(peer, options):
    mask = torch.rand(2, 20) < 0.7
    lens = torch.tensor([20, 3])
    for call in (lambda m, x: m(x, mask=mask), lambda m, x: m(x, lens=lens)):
        ours, theirs = lucidrains_pair(peer, 4, 8, **options)
        assert_same_training(ours, theirs, steps=5, call=call)


def test_lucidrains_arguments_of_the_call(peer):
    ours, theirs = lucidrains_pair(peer, 4, 8)
    weight = torch.rand(8).double()

    def call(layer, x):
        layer(x, freeze_codebook=True)
        layer(x, accum_ema_update=True)
        layer(x + 1, ema_update=False)
        quantized, indices, loss, parts = layer(x + 2, ema_update_weight=weight, return_loss_breakdown=True)
        layer(x, ema_update_weight=lambda sums, counts: counts / (1 + counts))
        return quantized, indices, loss + parts.commitment

    assert_same_training(ours, theirs, steps=5, call=call)


def test_lucidrains_manual_updates(peer):
    ours, theirs = lucidrains_pair(peer, 4, 8, manual_ema_update=True, heads=2, codebook_dim=2)

    def call(layer, x):
        result = layer(x)
        layer._codebook.update_ema()
        layer.update_indices(x.detach(), torch.arange(80).view(2, 20, 2) % 8)
        return result

    assert_same_training(ours, theirs, steps=5, call=call)


def test_lucidrains_eval_and_codebook_property(peer):
    for options in ({}, {"heads": 2, "separate_codebook_per_head": True, "codebook_dim": 2}):
        ours, theirs = lucidrains_pair(peer, 4, 8, **options)
        x = torch.randn(2, 5, 4, dtype=torch.float64)
        for a, b in zip(ours.eval()(x), theirs.eval()(x)):
            torch.testing.assert_close(a, b, check_dtype=False)
        codes = torch.randn_like(theirs.codebook)
        ours.codebook = codes
        assert torch.equal(ours.codebook, codes)


def test_lucidrains_state_goes_back(peer):
    ours, theirs = lucidrains_pair(peer, 4, 8, codebook_dim=3)
    ours(torch.randn(2, 20, 4, dtype=torch.float64))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 20, 4, dtype=torch.float64)
    for a, b in zip(ours.eval()(x), theirs.eval()(x)):
        torch.testing.assert_close(a, b, check_dtype=False)


def test_lucidrains_bridge(peer):
    def make(cls):
        torch.manual_seed(0)
        return cls(4, 8, vq_bridge=nn.Linear(4, 4)).double()

    theirs, ours = make(peer.VectorQuantize), make(lucidrains.VectorQuantize)
    ours.load_state_dict(theirs.state_dict())
    assert_same_training(ours, theirs, steps=10)


RESIDUAL = [
    {"num_quantizers": 3, "codebook_size": 8},
    {"num_quantizers": 3, "codebook_size": 8, "rotation_trick": False, "quant_grad_frac": 0.5},
    {"codebook_size": (8, 4), "codebook_dim": 3},
    {"num_quantizers": 3, "codebook_size": 8, "shared_codebook": True},
    {"num_quantizers": 2, "codebook_size": 8, "use_cosine_sim": True, "commitment_weight": 0.5},
    {"num_quantizers": 3, "codebook_size": 8, "learnable_codebook": True, "ema_update": False},
]


@pytest.mark.parametrize("options", RESIDUAL, ids=str)
def test_lucidrains_residual_trains_as_the_peer(peer, options):
    ours, theirs = twins(lucidrains.ResidualVQ, peer.ResidualVQ, dim=4, **options)
    assert_same_training(ours, theirs, steps=20)
    x = torch.randn(2, 6, 4, dtype=torch.float64)
    ours, theirs = ours.eval(), theirs.eval()
    for a, b in zip(ours(x, return_all_codes=True), theirs(x, return_all_codes=True)):
        torch.testing.assert_close(a, b, check_dtype=False, rtol=1e-9, atol=1e-9)
    indices = ours(x)[1]
    torch.testing.assert_close(ours.get_output_from_indices(indices), theirs.get_output_from_indices(indices))
    torch.testing.assert_close(ours.get_output_from_indices(indices), ours(x)[0])


def test_lucidrains_residual_dropout_masks_and_images(peer):
    options = {"num_quantizers": 4, "codebook_size": 8, "quantize_dropout": True,
               "quantize_dropout_cutoff_index": 1, "quantize_dropout_multiple_of": 2}  # fmt: skip
    for seed in range(4):
        ours, theirs = twins(lucidrains.ResidualVQ, peer.ResidualVQ, dim=4, **options)
        assert_same_training(
            ours, theirs, steps=2, call=lambda m, x, s=seed: m(x, rand_quantize_dropout_fixed_seed=s)
        )
    indices = torch.randint(-1, 8, (2, 5, 2))
    torch.testing.assert_close(ours.get_codes_from_indices(indices), theirs.get_codes_from_indices(indices))
    mask = torch.rand(2, 20) < 0.7
    ours, theirs = twins(lucidrains.ResidualVQ, peer.ResidualVQ, dim=4, num_quantizers=2, codebook_size=8)
    assert_same_training(ours, theirs, steps=2, call=lambda m, x: m(x, mask=mask))


def test_lucidrains_residual_takes_images():
    """The peer's version 1.32 raises for any."""
    image, rows = (
        lucidrains.ResidualVQ(dim=4, num_quantizers=2, codebook_size=8, accept_image_fmap=flag)
        for flag in (True, False)
    )
    rows.load_state_dict(image.state_dict())
    x = torch.randn(2, 4, 3, 5)
    a, b = image(x), rows(x.flatten(2).mT)
    torch.testing.assert_close(a[0].flatten(2).mT, b[0])
    assert torch.equal(a[1].flatten(1, 2), b[1])
    quantized, indices, _ = image.eval()(x)
    torch.testing.assert_close(image.get_codes_from_indices(indices).sum(0).movedim(-1, 1), quantized)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"commitment_use_cross_entropy_loss": True}, "commitment_use_cross_entropy_loss"),
        ({"codebook_diversity_loss_weight": 0.1}, "codebook_diversity_loss_weight"),
        ({"codebook_diversity_temperature": 1.0}, "codebook_diversity_temperature"),
        ({"stochastic_sample_codes": True}, "stochastic_sample_codes"),
        ({"sample_codebook_temp": 0.5}, "sample_codebook_temp"),
        ({"straight_through": True}, "straight_through"),
        ({"in_place_codebook_optimizer": torch.optim.SGD}, "in_place_codebook_optimizer"),
        ({"manual_in_place_optimizer_update": True}, "manual_in_place_optimizer_update"),
        ({"affine_param": True}, "affine_param"),
        ({"sync_affine_param": True}, "sync_affine_param"),
        ({"affine_param_batch_decay": 0.5}, "affine_param_batch_decay"),
        ({"affine_param_codebook_decay": 0.5}, "affine_param_codebook_decay"),
        ({"sync_kmeans": False}, "sync_kmeans"),
        ({"layernorm_after_project_in": True}, "layernorm_after_project_in"),
        ({"use_cosine_sim": True, "learnable_codebook": True, "ema_update": False}, "use_cosine_sim"),
        ({"learnable_codebook": True}, "ema_update"),
        ({"rotation_trick": True, "directional_reparam": True}, "rotation_trick"),
        ({"directional_reparam": True}, "threshold_ema_dead_code"),
        ({"sync_update_v": 0.5}, "learnable_codebook"),
        ({"sync_update_v": 2.0}, "sync_update_v"),
        ({"vq_bridge": nn.Identity(), "learnable_codebook": False}, "vq_bridge"),
    ],
    ids=str,
)
def test_lucidrains_refuses_what_it_cannot_do(options, name):
    with pytest.raises(ValueError, match=f"VectorQuantize: .*{name}"):
        lucidrains.VectorQuantize(4, 8, **options)


@pytest.mark.parametrize("name", ["indices", "topk", "sample_codebook_temp", "codebook_transform_fn"])
def test_lucidrains_refuses_in_the_call(name):
    with pytest.raises(ValueError, match=f"VectorQuantize.forward: {name} must be None"):
        lucidrains.VectorQuantize(4, 8)(torch.zeros(1, 2, 4), **{name: 1})


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"beam_size": 2}, "beam_size"),
        ({"eval_beam_size": 2}, "eval_beam_size"),
        ({"beam_score_quantizer_weights": [1.0, 1.0]}, "beam_score_quantizer_weights"),
        ({"implicit_neural_codebook": True}, "implicit_neural_codebook"),
        ({"mlp_kwargs": {"depth": 2}}, "mlp_kwargs"),
        ({"heads": 2}, "heads"),
        ({"codebook_size": (4, 4, 4)}, "num_quantizers"),
        ({"codebook_size": (4, 8), "shared_codebook": True}, "shared_codebook"),
        ({"stochastic_sample_codes": True}, "stochastic_sample_codes"),
    ],
    ids=str,
)
def test_lucidrains_residual_refuses(options, match):
    with pytest.raises(ValueError, match=match):
        lucidrains.ResidualVQ(**{"dim": 4, "num_quantizers": 2, "codebook_size": 8} | options)


def test_lucidrains_knows_every_argument_of_the_peer(peer):
    import inspect

    for ours, theirs in (
        (lucidrains.VectorQuantize, peer.VectorQuantize),
        (lucidrains.VectorQuantize.forward, peer.VectorQuantize.forward),
        (lucidrains.ResidualVQ.forward, peer.ResidualVQ.forward),
    ):
        a, b = (inspect.signature(f).parameters for f in (ours, theirs))
        assert list(a) == list(b)
        for name in a:
            assert a[name].default == b[name].default, name
    a, b = (inspect.signature(c).parameters for c in (lucidrains.ResidualVQ, peer.ResidualVQ))
    assert list(a) == list(b)


@pytest.mark.parametrize("make", [
    lambda: lucidrains.VectorQuantize(4, 8, kmeans_init=True, kmeans_iters=1, threshold_ema_dead_code=1),
    pytest.param(lambda: lucidrains.ResidualVQ(dim=4, num_quantizers=2, codebook_size=8),
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


# ---- where lucidrains' quantizer is wrong


def test_an_all_true_mask_changes_nothing(peer):
    ours, theirs = lucidrains_pair(peer, 4, 8, use_cosine_sim=True, freeze_codebook=True)
    x, mask = 3 * torch.randn(2, 20, 4, dtype=torch.float64), torch.ones(2, 20, dtype=torch.bool)
    torch.testing.assert_close(ours(x, mask=mask)[2], ours(x)[2])
    torch.testing.assert_close(ours(x)[2], theirs(x)[2])
    assert theirs(x, mask=mask)[2] > 5 * theirs(x)[2]


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("options", [{"codebook_dim": 3}, {"heads": 2, "codebook_dim": 2}], ids=str)
def test_masks_go_with_projections_and_heads(peer, options):
    ours, theirs = lucidrains_pair(peer, 4, 8, **options)
    x, mask = torch.randn(2, 20, 4, dtype=torch.float64), torch.rand(2, 20) < 0.5
    with pytest.raises(RuntimeError):
        theirs(x, mask=mask)
    quantized, indices, _ = ours(x, mask=mask)
    assert not quantized[~mask].any() and (indices[~mask] == -1).all() and (indices[mask] >= 0).all()
    ours.load_state_dict(theirs.state_dict())
    short = ours(x, mask=mask)
    ours.load_state_dict(theirs.state_dict())
    packed = ours(x[mask].unsqueeze(0))
    torch.testing.assert_close(short[0][mask], packed[0][0])
    torch.testing.assert_close(short[2], packed[2])


def test_one_nan_stays_in_its_row(peer):
    ours, theirs = lucidrains_pair(peer, 4, 8)
    x = torch.randn(2, 20, 4, dtype=torch.float64)
    x[0, 3, 1] = math.nan
    theirs(x)
    quantized, indices, loss = ours(x)
    assert theirs.codebook[:, 1].isnan().all()
    assert ours.codebook.isfinite().all() and ours._codebook.cluster_size.isfinite().all()
    assert quantized[0, 3].isnan().all() and indices[0, 3] == 0 and loss.isnan()


def test_a_batch_without_rows_has_no_loss_and_moves_nothing(peer):
    ours, theirs = lucidrains_pair(peer, 4, 8)
    x, mask = torch.randn(2, 20, 4, dtype=torch.float64), torch.zeros(2, 20, dtype=torch.bool)
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    assert theirs(x, mask=mask)[2].isnan() and ours(x, mask=mask)[2] == 0
    assert all(torch.equal(v, before[k]) for k, v in ours.state_dict().items())


def test_averages_stay_fp32(peer):
    ours, theirs = (c.VectorQuantize(4, 8, decay=0.999).bfloat16() for c in (lucidrains, peer))
    assert theirs._codebook.cluster_size.dtype is torch.bfloat16
    assert ours._codebook.cluster_size.dtype is ours.codebook.dtype is torch.float32
    x = torch.randn(2, 20, 4, dtype=torch.bfloat16)
    assert ours(x)[0].dtype is torch.bfloat16


def test_ties_go_to_the_lowest_index_and_the_nearest_code_wins(peer):
    ours, theirs = (c.VectorQuantize(2, 3, decay=0.5) for c in (lucidrains, peer))
    codes = torch.tensor([[1.00005, 0.0], [1.0, 0.0], [1.0, 0.0]])
    for layer in (ours, theirs):
        layer.codebook = codes
        layer.eval()
    x = torch.tensor([[[1.0, 0.0]]])
    assert ours(x)[1].item() == 1 and theirs(x)[1].item() == 0  # distances under 1e-4 are all one to the peer


def test_the_rotation_at_the_origin(peer):
    ours, theirs = lucidrains_pair(peer, 4, 8)
    gradients = []
    for layer in (ours, theirs):
        x = torch.full((1, 1, 4), 1e-9, dtype=torch.float64, requires_grad=True)
        gradients.append(torch.autograd.grad(layer(x)[0].sum(), x)[0].abs().max())
    assert gradients[0] == 1 and gradients[1] > 1e4


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
