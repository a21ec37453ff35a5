"""lucidrains' VectorQuantize: the peer's values in fp64, its state_dict."""

import copy
import inspect
import math
from functools import partial

import pytest
import torch
from compat_case import (
    CE,
    DIVERSE,
    HEADS,
    LEARNED,
    PER_HEAD,
    RANDOM,
    SGD,
    SOFT,
    assert_same_training,
    lucidrains_pair,
    peer as peer,
    twins,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from vaeops.compat import lucidrains
from vaeops.compat.lucidrains import search

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


ALL_CODES = [
    CE,
    {**CE, **LEARNED},
    {**CE, **HEADS, "use_cosine_sim": True},
    {**CE, **PER_HEAD},
    DIVERSE,
    {**DIVERSE, **HEADS},
    {**DIVERSE, **LEARNED, **CE},
    {**DIVERSE, "use_cosine_sim": True},
    {**DIVERSE, "orthogonal_reg_weight": 1.0, **CE, "manual_ema_update": True},
    RANDOM,
    {**RANDOM, "sample_codebook_temp": 0.3, **LEARNED},
    {**RANDOM, **PER_HEAD, "use_cosine_sim": True, "sample_codebook_temp": 0.0},
    {**RANDOM, **PER_HEAD},
    {**SOFT, "route_gradients_to_input": False},
    {**SOFT, **RANDOM, "route_gradients_to_input": False, "sample_codebook_temp": 0.5},
    {**SOFT, **RANDOM},
    {"affine_param": True},
    {"affine_param": True, "affine_param_batch_decay": 0.5, "affine_param_codebook_decay": 0.6, **LEARNED},
    {"affine_param": True, **PER_HEAD},
    {"in_place_codebook_optimizer": SGD, **LEARNED},
    {"in_place_codebook_optimizer": SGD, **LEARNED, **PER_HEAD, "rotation_trick": False},
    {"in_place_codebook_optimizer": SGD, **LEARNED, **RANDOM, **CE, "threshold_ema_dead_code": 1e-9},
    {"in_place_codebook_optimizer": SGD, "orthogonal_reg_weight": 1.0},
    {"in_place_codebook_optimizer": SGD, **LEARNED, "freeze_codebook": True},
    {"layernorm_after_project_in": True},
]


@pytest.mark.parametrize("options", ALL_CODES, ids=str)
def test_all_codes_and_other_updates_train_as_the_peer(peer, options):
    """Random codes too: the noise comes from the same generator in the same order."""
    ours, theirs = lucidrains_pair(peer, 4, 8, **options)
    assert_same_training(ours, theirs, steps=30)
    theirs.load_state_dict(ours.state_dict())


def test_random_codes_follow_the_softmax():
    """Heads that share a codebook draw in another order than the peer's; the shares are those of softmax."""
    layer = lucidrains.VectorQuantize(4, 5, **RANDOM, **HEADS, sample_codebook_temp=0.5, freeze_codebook=True)
    x = torch.randn(1, 1, 4)
    drawn = layer(x.expand(1, 20000, 4))[1]
    rows = layer.project_in(x).view(2, 3)
    for head in range(2):
        p = (-torch.cdist(rows, layer.codebook) / 0.5).softmax(-1)[head].detach()
        share = drawn[0, :, head].bincount(minlength=5) / 20000
        assert ((share - p).abs() < 5 * (p * (1 - p) / 20000).sqrt()).all()
    assert (layer.eval()(x.expand(1, 50, 4))[1][0] == layer(x)[1][0]).all()


def test_soft_codes_gradient(peer):
    """As with the peer, an output that is routed straight to the input has no other gradient."""
    x, kept = torch.randn(2, 20, 4, dtype=torch.float64), {}
    for routed in (True, False):
        ours, theirs = lucidrains_pair(peer, 4, 8, **SOFT, route_gradients_to_input=routed)
        grads = []
        for layer in (ours, theirs):
            v = x.clone().requires_grad_()
            grads.append(torch.autograd.grad(layer(v, sample_codebook_temp=0.7)[0].square().sum(), v)[0])
        torch.testing.assert_close(*grads)
        kept[routed] = grads[0]
    assert not torch.allclose(kept[True], kept[False])


def test_loss_terms_and_temperature_of_the_call(peer):
    options = {**DIVERSE, **CE, **LEARNED, **RANDOM, "orthogonal_reg_weight": 1.0}
    ours, theirs = lucidrains_pair(peer, 4, 8, **options, in_place_codebook_optimizer=SGD)

    def call(layer, x):
        quantized, indices, loss, terms = layer(x, sample_codebook_temp=0.2, return_loss_breakdown=True)
        return quantized, indices, torch.stack([loss, *terms[:3], terms[3].detach()])

    assert_same_training(ours, theirs, steps=10, call=call)


@pytest.mark.parametrize(
    "options", [CE, {**CE, **LEARNED}, {**LEARNED, "in_place_codebook_optimizer": SGD}, RANDOM,
                {**SOFT, **RANDOM}, {"affine_param": True}],
    ids=str,
)  # fmt: skip
def test_masks_of_all_codes_and_other_updates(peer, options):
    mask = torch.rand(2, 20) < 0.7
    ours, theirs = lucidrains_pair(peer, 4, 8, **options)
    assert_same_training(ours, theirs, steps=10, call=lambda m, x: m(x, mask=mask))


@pytest.mark.parametrize("options", [{**CE, **DIVERSE}, {**RANDOM, **SOFT}, {"affine_param": True}], ids=str)
def test_without_rows_and_in_bfloat16(options):
    layer = lucidrains.VectorQuantize(4, 8, **options)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    for x, mask in (
        (torch.zeros(0, 5, 4), None),
        (torch.randn(2, 5, 4), torch.zeros(2, 5, dtype=torch.bool)),
    ):
        assert layer(x, mask=mask)[2] == 0
        assert layer(x, mask=mask, indices=torch.zeros(x.shape[:-1], dtype=torch.int64))[1] == 0
    for name in ("embed", "embed_avg", "cluster_size"):
        assert torch.equal(layer.state_dict()["_codebook." + name], before["_codebook." + name])
    x = torch.randn(2, 20, 4).bfloat16().requires_grad_()
    quantized, _, loss = layer(x)
    (quantized.square().sum() + loss).backward()
    assert quantized.dtype is torch.bfloat16 and x.grad.isfinite().all() and loss.isfinite()


@pytest.mark.parametrize("options", [{"affine_param": True}, {**CE, **DIVERSE, **RANDOM}], ids=str)
def test_a_checkpointed_forward_counts_once(options):
    layer = lucidrains.VectorQuantize(4, 8, **options)
    again, seen = copy.deepcopy(layer), []
    for module, call in ((layer, layer), (again, partial(checkpoint, again, use_reentrant=False))):
        torch.manual_seed(1)
        x = torch.randn(2, 20, 4, requires_grad=True)
        for _ in range(2):
            quantized, _, loss = call(x)
            (quantized.square().sum() + loss).backward()
        seen.append((x.grad, module.state_dict()))
    torch.testing.assert_close(*seen)


def test_manual_steps_of_the_codebooks_optimizer(peer):
    options = {**LEARNED, "in_place_codebook_optimizer": SGD, "manual_in_place_optimizer_update": True}
    ours, theirs = lucidrains_pair(peer, 4, 8, **options)

    def call(layer, x):
        layer(x)
        result = layer(x + 1)
        layer.update_in_place_optimizer()
        return result

    x = torch.randn(2, 20, 4, dtype=torch.float64)
    for _ in range(5):
        a, b = call(ours, x), call(theirs, x)
        for one, other in zip(a, b):
            torch.testing.assert_close(one, other)
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("options", [{}, HEADS, PER_HEAD, {"use_cosine_sim": True}, LEARNED], ids=str)
def test_cross_entropy_against_given_indices(peer, options):
    ours, theirs = lucidrains_pair(peer, 6, 8, **options)
    shape = (2, 20, 2) if "heads" in options else (2, 20)
    given = torch.randint(-1, 8, shape)
    for _ in range(5):
        results = []
        for layer in (ours, theirs):
            torch.manual_seed(2)
            x = torch.randn(2, 20, 6, dtype=torch.float64, requires_grad=True)
            quantized, loss = layer(x, indices=given)
            results.append((loss, *torch.autograd.grad(loss, x), quantized))
        for a, b in zip(*(r if "heads" not in options else r[:2] for r in results)):
            torch.testing.assert_close(a, b)
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


TOPK = [{}, LEARNED, {"use_cosine_sim": True, "rotation_trick": False}, {"codebook_dim": 3}, RANDOM,
        {**DIVERSE, "commitment_weight": 0.5}, {"accept_image_fmap": True}, {"channel_last": False},
        {"commitment_weight": 0.0}]  # fmt: skip


@pytest.mark.parametrize("options", TOPK, ids=str)
def test_topk(peer, options):
    ours, theirs = lucidrains_pair(peer, 4, 8, **options)
    first = "accept_image_fmap" in options or "channel_last" in options
    shape = (2, 3, 5) if "accept_image_fmap" in options else (2, 15)
    x = torch.randn(*shape, 4, dtype=torch.float64)
    x = x.movedim(-1, 1) if first else x
    plain = not first and "codebook_dim" not in options and "codebook_diversity_loss_weight" not in options
    mask = torch.rand(2, 15) < 0.7 if plain else None
    for train in (True, False):
        for k in (1, 3, 20):
            seen = []
            for layer in (ours.train(train), theirs.train(train)):
                torch.manual_seed(3)
                v = x.clone().requires_grad_()
                quantized, indices, loss = layer(v, topk=k, mask=mask)
                gradient = torch.autograd.grad((quantized**2).sum() + loss.sum(), v, allow_unused=True)[0]
                seen.append((quantized, indices, loss, gradient if train else loss))
            for a, b in zip(*seen):
                torch.testing.assert_close(a, b, check_dtype=False)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


class PerRow(nn.Module):
    """Codes [H, K, D] as those of B x N rows."""

    def __init__(self, rows):
        super().__init__()
        self.rows, self.scale = rows, nn.Parameter(torch.ones(4, dtype=torch.float64))

    def forward(self, codes):
        move = torch.sin(torch.arange(math.prod(self.rows), dtype=torch.float64)).view(1, *self.rows, 1, 1)
        return (codes * self.scale)[:, None, None] + move


@pytest.mark.parametrize(
    "options",
    [{}, LEARNED, {"use_cosine_sim": True}, {**RANDOM, **LEARNED}, {**CE, **DIVERSE}, {"heads": 2, **CE},
     {"in_place_codebook_optimizer": SGD, **LEARNED}, {**SOFT, "route_gradients_to_input": False}],
    ids=str,
)  # fmt: skip
def test_transformed_codes(peer, options):
    width = 4 * options.get("heads", 1)
    ours, theirs = lucidrains_pair(peer, width, 8, codebook_dim=4, **options)
    transforms = {m: PerRow((2 * options.get("heads", 1), 20)) for m in (ours, theirs)}

    def call(layer, x):
        result = layer(x, codebook_transform_fn=transforms[layer])
        layer(x.detach(), topk=2, codebook_transform_fn=transforms[layer]) if options == {} else None
        return result

    assert_same_training(ours, theirs, steps=10, dim=width, call=call)
    if "in_place_codebook_optimizer" not in options:  # the peer adds that loss's gradients to the function's
        torch.testing.assert_close(*(t.scale.grad for t in transforms.values()))
    x = torch.randn(2, 20, width, dtype=torch.float64)
    for a, b in zip(call(ours.eval(), x), call(theirs.eval(), x)):
        torch.testing.assert_close(a, b, check_dtype=False)


@pytest.mark.parametrize("per_row", [False, True])
def test_chunks_change_nothing(monkeypatch, per_row):
    def both(chunk):
        monkeypatch.setattr(search, "_CHUNK", chunk)
        torch.manual_seed(0)
        layer = lucidrains.VectorQuantize(4, 8, **CE, **DIVERSE, **RANDOM, **SOFT).double()
        layer.route_gradients_to_input = False
        x = torch.randn(2, 20, 4, dtype=torch.float64, requires_grad=True)
        quantized, indices, loss = layer(x, codebook_transform_fn=PerRow((2, 20)) if per_row else None)
        return indices, loss, *torch.autograd.grad(loss + quantized.square().sum(), x)

    for a, b in zip(both(1 << 22), both(100)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"use_cosine_sim": True, "learnable_codebook": True, "ema_update": False}, "use_cosine_sim"),
        ({"learnable_codebook": True}, "ema_update"),
        ({"rotation_trick": True, "directional_reparam": True}, "rotation_trick"),
        ({"directional_reparam": True}, "threshold_ema_dead_code"),
        ({"straight_through": True}, "straight_through"),
        ({**SOFT, **LEARNED}, "straight_through"),
        ({"sync_update_v": 0.5}, "learnable_codebook"),
        ({"sync_update_v": 2.0}, "sync_update_v"),
        ({"vq_bridge": nn.Identity(), "learnable_codebook": False}, "vq_bridge"),
        ({"affine_param": True, "use_cosine_sim": True}, "affine_param"),
        ({"in_place_codebook_optimizer": SGD}, "in_place_codebook_optimizer"),
    ],
    ids=str,
)
def test_it_refuses_what_the_peer_refuses(peer, options, name):
    with pytest.raises(ValueError, match=f"VectorQuantize: .*{name}"):
        lucidrains.VectorQuantize(4, 8, **options)
    with pytest.raises((AssertionError, ValueError)):
        peer.VectorQuantize(4, 8, **options)


@pytest.mark.parametrize(
    ("options", "k", "match"),
    [({}, 0, "topk must be >= 1"), (HEADS, 2, "heads"), (CE, 2, "cross_entropy"),
     ({**LEARNED, "in_place_codebook_optimizer": SGD}, 2, "in_place")],
)  # fmt: skip
def test_it_refuses_topk_where_the_peer_does(peer, options, k, match):
    for cls, error in ((lucidrains.VectorQuantize, ValueError), (peer.VectorQuantize, AssertionError)):
        with pytest.raises(error, match=match if error is ValueError else "topk"):
            cls(6, 8, **options)(torch.zeros(1, 2, 6), topk=k)


def test_it_knows_every_argument_of_the_peer(peer):
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
