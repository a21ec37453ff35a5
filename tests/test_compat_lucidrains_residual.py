"""lucidrains' ResidualVQ: the peer's values in fp64, its state_dict, and where it is wrong."""

import copy

import pytest
import torch
from compat_case import CE, DIVERSE, LEARNED, RANDOM, SGD, assert_same_training, peer as peer, twins

from vaeops.compat import lucidrains

RESIDUAL = [
    {"num_quantizers": 3, "codebook_size": 8},
    {"num_quantizers": 3, "codebook_size": 8, "rotation_trick": False, "quant_grad_frac": 0.5},
    {"codebook_size": (8, 4), "codebook_dim": 3},
    {"num_quantizers": 3, "codebook_size": 8, "shared_codebook": True},
    {"num_quantizers": 2, "codebook_size": 8, "use_cosine_sim": True, "commitment_weight": 0.5},
    {"num_quantizers": 3, "codebook_size": 8, "learnable_codebook": True, "ema_update": False},
]


@pytest.mark.parametrize("options", RESIDUAL, ids=str)
def test_residual_trains_as_the_peer(peer, options):
    ours, theirs = twins(lucidrains.ResidualVQ, peer.ResidualVQ, dim=4, **options)
    assert_same_training(ours, theirs, steps=20)
    x = torch.randn(2, 6, 4, dtype=torch.float64)
    ours, theirs = ours.eval(), theirs.eval()
    for a, b in zip(ours(x, return_all_codes=True), theirs(x, return_all_codes=True)):
        torch.testing.assert_close(a, b, check_dtype=False, rtol=1e-9, atol=1e-9)
    indices = ours(x)[1]
    torch.testing.assert_close(ours.get_output_from_indices(indices), theirs.get_output_from_indices(indices))
    torch.testing.assert_close(ours.get_output_from_indices(indices), ours(x)[0])


def test_residual_dropout_masks_and_images(peer):
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


def test_residual_takes_images():
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


BASE = {"num_quantizers": 3, "codebook_size": 8}
QINCO = {**BASE, "implicit_neural_codebook": True, "mlp_kwargs": {"depth": 2, "dim_hidden": 5}}
STILL = {"ema_update": False}  # with beams the peer's averages do not see the levels after the first
MORE = [
    {**BASE, **CE},
    {**BASE, **DIVERSE},
    {**BASE, **RANDOM, "sample_codebook_temp": 0.5},
    {**BASE, "affine_param": True},
    {**BASE, **LEARNED, "in_place_codebook_optimizer": SGD},
    {**BASE, "diveq": True, "rotation_trick": False},
    {**BASE, "beam_size": 3, **STILL},
    {**BASE, "beam_size": 2, "eval_beam_size": 3, "beam_score_quantizer_weights": [1.0, 0.5, 0.2], **STILL},
    {**BASE, "beam_size": 2, "codebook_dim": 3, "commitment_weight": 0.5, "quant_grad_frac": 0.3, **STILL},
    {"codebook_size": (8, 4), "beam_size": 4, **STILL},
    {**BASE, **LEARNED, "beam_size": 2, "rotation_trick": False},
    QINCO,
    {**QINCO, "mlp_kwargs": {}, "quant_grad_frac": 0.5, "rotation_trick": False},
    {**QINCO, **CE},
    {**QINCO, "codebook_size": (8, 4, 6), "shared_codebook": False},
]


def residual_pair(peer, **options):
    return twins(lucidrains.ResidualVQ, peer.ResidualVQ, dim=4, **options)


@pytest.mark.parametrize("options", MORE, ids=str)
def test_residual_options_train_as_the_peer(peer, options):
    """With equal noise, and states that go both ways."""
    ours, theirs = residual_pair(peer, **options)
    assert_same_training(ours, theirs, steps=20)
    theirs.load_state_dict(ours.state_dict())
    if "affine_param" in options or "diveq" in options:  # the peer's are wrong in eval
        return
    x = torch.randn(2, 6, 4, dtype=torch.float64)
    for a, b in zip(ours.eval()(x, return_all_codes=True), theirs.eval()(x, return_all_codes=True)):
        torch.testing.assert_close(a, b, check_dtype=False)
    for name in ("get_codes_from_indices", "get_output_from_indices"):
        indices = ours(x)[1]
        torch.testing.assert_close(getattr(ours, name)(indices), getattr(theirs, name)(indices))


@pytest.mark.parametrize(
    "options", [{**BASE, "codebook_dim": 3}, {**BASE, "shared_codebook": True}, QINCO], ids=str
)
def test_residual_state_goes_both_ways(peer, options):
    made = {}
    for source, target in ((lucidrains, peer), (peer, lucidrains)):
        torch.manual_seed(0)
        a = source.ResidualVQ(dim=4, **options).double()
        torch.manual_seed(1)
        b = target.ResidualVQ(dim=4, **options).double()
        a(torch.randn(2, 20, 4, dtype=torch.float64))
        b.load_state_dict(a.state_dict(), strict=True)
        x = torch.randn(2, 20, 4, dtype=torch.float64)
        for one, other in zip(a.eval()(x), b.eval()(x)):
            torch.testing.assert_close(one, other, check_dtype=False)
        made[source] = set(a.state_dict())
    assert made[lucidrains] == made[peer]


def test_beam_of_the_call_and_masks(peer):
    mask = torch.rand(2, 20) < 0.7
    for call in (
        lambda m, x: m(x, beam_size=3),
        lambda m, x: m(x, beam_size=3, mask=mask),
        lambda m, x: m(x, beam_size=1, mask=mask, sample_codebook_temp=0.3),
    ):
        ours, theirs = residual_pair(peer, **BASE, **STILL, beam_size=2)
        assert_same_training(ours, theirs, steps=5, call=call)


def test_dropout_with_beams_and_implicit_codebooks(peer):
    for options in ({**BASE, **STILL, "beam_size": 2}, QINCO):
        ours, theirs = residual_pair(peer, **options, quantize_dropout=True)
        for seed in range(3):
            call = lambda m, x, s=seed: m(x, rand_quantize_dropout_fixed_seed=s, return_all_codes=True)[:3]  # noqa: E731
            assert_same_training(ours, theirs, steps=2, call=call)
        indices = torch.randint(-1, 8, (2, 5, 2))
        indices[..., 1] = indices[..., 1].masked_fill(indices[..., 0] < 0, -1)
        a, b = (m.get_codes_from_indices(indices) for m in (ours, theirs))
        torch.testing.assert_close(a, b)


def test_beams_of_random_codes():
    """The peer's beams come in another order, so its noise falls on others."""
    layer = lucidrains.ResidualVQ(dim=4, **BASE, beam_size=3, **RANDOM, **STILL)
    x = torch.randn(2, 50, 4)
    (a, i, _), (b, j, _) = layer(x), layer(x)
    assert not torch.equal(i, j)
    for quantized, indices in ((a, i), (b, j)):
        torch.testing.assert_close(quantized, layer.get_output_from_indices(indices))
    assert torch.equal(layer.eval()(x)[1], layer(x)[1])


def test_a_wider_beam_is_no_worse():
    torch.manual_seed(0)
    layer = lucidrains.ResidualVQ(dim=4, num_quantizers=4, codebook_size=16).eval()
    x = torch.randn(1, 200, 4)
    errors = [(layer(x, beam_size=j)[0] - x).square().mean() for j in (1, 4, 16)]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"beam_score_quantizer_weights": [1.0]}, "beam_score_quantizer_weights"),
        ({"heads": 2}, "heads"),
        ({"codebook_size": (4, 4, 4)}, "num_quantizers"),
        ({"codebook_size": (4, 8), "shared_codebook": True}, "shared_codebook"),
        ({"quantize_dropout_cutoff_index": -1}, "quantize_dropout_cutoff_index"),
        ({"implicit_neural_codebook": True, "use_cosine_sim": True}, "use_cosine_sim"),
    ],
    ids=str,
)
def test_residual_refuses_what_the_peer_refuses(peer, options, match):
    options = {"dim": 4, "num_quantizers": 2, "codebook_size": 8} | options
    with pytest.raises(ValueError, match=match):
        lucidrains.ResidualVQ(**options)
    with pytest.raises(AssertionError):
        peer.ResidualVQ(**options)


# ---- where the peer is wrong


def test_residual_cross_entropy_against_given_indices(peer):
    """The peer raises. Its quantizers, one after the other, say what is due."""
    ours, theirs = residual_pair(peer, **BASE)
    x, given = torch.randn(2, 20, 4, dtype=torch.float64), torch.randint(8, (2, 20, 3))
    with pytest.raises(ValueError, match="unpack"):
        residual_pair(peer, **BASE)[1](x, indices=given)
    residual, expected = x, 0
    for i, layer in enumerate(theirs.layers):
        quantized, loss = layer(residual, indices=given[..., i])
        residual, expected = residual - quantized.detach(), expected + loss
    quantized, loss = ours(x, indices=given)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(quantized, x - residual)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    with pytest.raises(ValueError, match="beam"):
        ours(x, indices=given, beam_size=2)


def test_frozen_levels_stay(peer):
    """The peer forgets freeze_codebook of the constructor, and in a beam search that of the call."""
    x = torch.randn(2, 20, 4, dtype=torch.float64)
    for options, call in (({"freeze_codebook": True}, {}), ({"beam_size": 2}, {"freeze_codebook": True})):
        ours, theirs = residual_pair(peer, **BASE, **options)
        before = ours.layers[0].codebook.clone()
        ours(x, **call), theirs(x, **call)
        assert torch.equal(ours.layers[0].codebook, before)
        assert not torch.equal(theirs.layers[0].codebook, before)


def test_a_shared_codebook_with_its_own_optimizer_moves(peer):
    """The peer's never takes a step."""
    options = {**BASE, **LEARNED, "shared_codebook": True, "in_place_codebook_optimizer": SGD}
    ours, theirs = residual_pair(peer, **options)
    x, before = torch.randn(2, 20, 4, dtype=torch.float64), ours.layers[0].codebook.detach().clone()
    for layer in (ours, theirs):
        layer(x)[2].sum()
    assert torch.equal(theirs.layers[0].codebook, before)
    gradient = theirs.layers[0]._codebook.embed.grad
    torch.testing.assert_close(ours.layers[0].codebook, before - 0.1 * gradient[0])
    ours(x)[2].sum().backward()


def test_beams_where_the_peers_fail(peer):
    """Without a commitment loss, with implicit codebooks, k-means, affine codes, images, small codebooks."""
    x = torch.randn(2, 20, 4)
    more = [{"commitment_weight": 0.0}, {"implicit_neural_codebook": True}, {"kmeans_init": True},
            {"affine_param": True}, {"codebook_size": 2}]  # fmt: skip
    for options in more:
        ours, theirs = (
            m.ResidualVQ(dim=4, **{**BASE, "beam_size": 4, **options}) for m in (lucidrains, peer)
        )
        quantized, indices, losses = ours(x)
        assert quantized.shape == x.shape and indices.shape == (2, 20, 3) and losses.shape == (3,)
        ours.eval()
        quantized, indices, _ = ours(x)
        torch.testing.assert_close(ours.get_output_from_indices(indices), quantized)
        with pytest.raises(Exception):  # noqa: B017
            theirs(x)
    ours = lucidrains.ResidualVQ(dim=4, **BASE, beam_size=3, accept_image_fmap=True, codebook_dim=3).eval()
    image = torch.randn(2, 4, 3, 5)
    quantized, indices, _ = ours(image)
    assert quantized.shape == image.shape and indices.shape == (2, 3, 5, 3)
    torch.testing.assert_close(quantized.movedim(1, -1), ours.get_output_from_indices(indices))


@pytest.mark.parametrize("masked", [False, True])
def test_every_level_learns_from_the_best_beam(peer, masked):
    """The peer's averages see the first level alone; here it is told the others."""
    ours, theirs = residual_pair(peer, **BASE, beam_size=3)
    for _ in range(5):
        x, mask = torch.randn(2, 20, 4, dtype=torch.float64), torch.rand(2, 20) < 0.6 if masked else None
        before = copy.deepcopy(theirs)
        a, b = ours(x, mask=mask), theirs(x, mask=mask)
        assert torch.equal(a[1], b[1])
        assert torch.equal(before.layers[1].codebook, theirs.layers[1].codebook)
        codes = before.get_codes_from_indices(b[1])
        for i in (1, 2):
            theirs.layers[i].update_indices(x - codes[:i].sum(0), b[1][..., i], mask=mask)
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_a_beam_and_a_shared_codebook():
    """Codes in any order have one sum, so the orders may differ; the averages count every level's code."""
    layer = lucidrains.ResidualVQ(dim=4, **BASE, beam_size=2, shared_codebook=True, decay=0.5)
    indices, size = layer(torch.randn(2, 20, 4))[1], torch.ones(8)
    for i in range(3):
        size = (size + indices[..., i].flatten().bincount(minlength=8)) / 2
    torch.testing.assert_close(layer.layers[0]._codebook.cluster_size[0], size)


def test_diveq_in_eval_gives_the_codes(peer):
    """The peer adds its noise in eval too."""
    ours, theirs = residual_pair(peer, **BASE, diveq=True, rotation_trick=False)
    x = torch.randn(2, 20, 4, dtype=torch.float64)
    quantized, indices, _ = ours.eval()(x)
    torch.testing.assert_close(quantized, ours.get_output_from_indices(indices))
    assert not torch.equal(theirs.eval()(x)[0], theirs(x)[0])


def test_a_beam_in_eval_alone(peer):
    with pytest.raises(AssertionError):
        peer.ResidualVQ(dim=4, **BASE, eval_beam_size=4)
    ours = lucidrains.ResidualVQ(dim=4, **BASE, eval_beam_size=4)
    x = torch.randn(2, 20, 4)
    torch.testing.assert_close(ours.eval()(x)[0], ours(x, beam_size=4)[0])
