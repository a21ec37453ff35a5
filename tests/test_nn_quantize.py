"""Quantizer layers: state, updates, modes, tracing, checkpointing, accumulation."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import vaeops
from vaeops.nn import FSQ, LFQ, GroupedResidualVQ, ResidualVQ, SimVQ, VectorQuantize, update_codebooks
from vaeops.nn.codebook import Codebook

STATE = ("embed", "embed_avg", "cluster_size")


def state(layer):
    return {k: v.clone() for k, v in layer.state_dict().items()}


def assert_same_state(a, b, **tolerance):
    assert set(a) == set(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], **tolerance)


def is_row_of(codes, x):
    """bool [K]: codes that are a row of x, bit for bit."""
    return (codes.unsqueeze(1) == x).all(-1).any(1)


def objective(out):
    return out.quantized.square().sum() + out.commit_loss.sum() + out.codebook_loss.sum()


# ---- one call


def test_a_call_is_vector_quantize_then_one_ema_step():
    layer, x = (
        VectorQuantize(4, 8, decay=0.9, estimator="rotation"),
        torch.randn(2, 20, 4, requires_grad=True),
    )
    before = copy.deepcopy(layer)
    out = layer(x)
    expected = vaeops.vector_quantize(x, before.codebook, estimator="rotation", stats=True)
    for name, a, b in zip(out._fields, out, expected):
        assert torch.equal(a, b), name
    (g,) = torch.autograd.grad(objective(out), x)
    assert torch.equal(g, torch.autograd.grad(objective(expected), x)[0])
    size, average, embed = (getattr(before._codebook, n)[0] for n in ("cluster_size", "embed_avg", "embed"))
    vaeops.vq_ema_(size, average, embed, expected.counts, expected.sums, decay=0.9, eps=1e-5)
    assert_same_state(state(layer), state(before), rtol=0, atol=0)


def test_eval_and_freeze_move_nothing():
    for layer in (VectorQuantize(4, 8).eval(), VectorQuantize(4, 8, freeze=True)):
        before = state(layer)
        x = torch.randn(2, 20, 4)
        assert layer(x).counts is None
        assert layer(x, stats=True).counts.sum() == 40
        layer.update()
        assert_same_state(state(layer), before, rtol=0, atol=0)


def test_a_learned_codebook_gets_its_gradient():
    layer, x = VectorQuantize(4, 8, ema=False), torch.randn(2, 20, 4)
    (g,) = torch.autograd.grad(layer(x).codebook_loss, layer._codebook.embed)
    codes = layer.codebook.detach().requires_grad_()
    out = vaeops.vector_quantize(x, codes)
    torch.testing.assert_close(g[0], torch.autograd.grad(out.codebook_loss, codes)[0])
    layer.freeze = True
    assert not layer(x).codebook_loss.requires_grad


def test_heads_are_quantized_alone():
    x = torch.randn(2, 20, 6, requires_grad=True)
    parts = x.detach().unflatten(-1, (2, 3))
    shared, separate = (
        VectorQuantize(6, 8, heads=2),
        VectorQuantize(6, 8, heads=2, separate_codebook_per_head=True),
    )
    assert shared.codebook.shape == (8, 3) and separate.codebook.shape == (2, 8, 3)
    for layer, books in ((shared, [shared.codebook.clone()] * 2), (separate, separate.codebook.clone())):
        out = layer(x)
        each = [vaeops.vector_quantize(parts[:, :, h], books[h], stats=True) for h in range(2)]
        assert torch.equal(out.indices, torch.stack([e.indices for e in each], -1))
        assert torch.equal(out.quantized, torch.cat([e.quantized for e in each], -1))
        torch.testing.assert_close(out.commit_loss, (each[0].commit_loss + each[1].commit_loss) / 2)
        counts = torch.stack([e.counts for e in each])
        assert torch.equal(out.counts, counts if layer is separate else counts.sum(0))
        assert torch.equal(torch.autograd.grad(out.quantized.sum(), x)[0], torch.ones_like(x))


def test_cosine_is_of_directions():
    layer, x = VectorQuantize(4, 8, metric="cosine"), torch.randn(2, 20, 4)
    codes = layer.codebook.clone()
    for scale in (1.0, 1e-3):
        fresh = copy.deepcopy(layer)
        out = fresh(x * scale)
        assert torch.equal(out.indices, vaeops.vq_assign(x, codes, metric="cosine"))
        torch.testing.assert_close(
            out.commit_loss, (F.normalize(x, dim=-1) - codes[out.indices]).square().mean()
        )
        torch.testing.assert_close(fresh.codebook.norm(dim=1), torch.ones(8))


@pytest.mark.parametrize("options", [{}, {"codebook_dim": 3}, {"heads": 2, "codebook_dim": 3},
                                     {"heads": 2, "separate_codebook_per_head": True},
                                     {"metric": "cosine"}], ids=str)  # fmt: skip
@pytest.mark.parametrize("channel_dim", [-1, 1])
def test_masks_and_decoding(options, channel_dim):
    layer = VectorQuantize(4, 8, channel_dim=channel_dim, **options)
    x, mask = torch.randn(2, 9, 4), torch.rand(2, 9) < 0.6
    given = x.movedim(-1, channel_dim).requires_grad_()
    packed = copy.deepcopy(layer)
    out, dense = (
        layer(given, mask),
        packed(x[mask].movedim(-1, channel_dim % 2) if channel_dim < 0 else x[mask][..., None]),
    )
    quantized = out.quantized.movedim(channel_dim, -1)
    assert (
        out.quantized.shape == given.shape and not quantized[~mask].any() and (out.indices[~mask] == -1).all()
    )
    torch.testing.assert_close(out.commit_loss, dense.commit_loss)
    torch.testing.assert_close(state(layer), state(packed))
    assert not torch.autograd.grad(objective(out), given)[0].movedim(channel_dim, -1)[~mask].any()
    layer.eval()
    out = layer(given, mask)
    torch.testing.assert_close(layer.get_output_from_indices(out.indices), out.quantized)
    assert (
        layer.get_codes_from_indices(out.indices).shape[channel_dim] == layer.codebook.shape[-1] * layer.heads
    )


def test_lens_are_masks():
    layer, x = VectorQuantize(4, 8).eval(), torch.randn(3, 5, 4)
    lens = torch.tensor([5, 0, 2])
    out, same = layer(x, lens=lens), layer(x, torch.arange(5) < lens[:, None])
    assert torch.equal(out.indices, same.indices) and torch.equal(out.commit_loss, same.commit_loss)


@pytest.mark.parametrize(
    "mode", [{}, {"kmeans_init": True}, {"revive_below": 1.0}, {"deterministic": "bitwise"}], ids=str
)
def test_empty_and_masked_batches_move_nothing(mode):
    layer = VectorQuantize(4, 8, **mode)
    layer._codebook.started = True
    before = state(layer)
    for x, mask in ((torch.zeros(0, 4), None), (torch.randn(5, 4), torch.zeros(5, dtype=torch.bool))):
        out = layer(x, mask)
        assert out.commit_loss == 0
        assert_same_state(state(layer), before, rtol=0, atol=0)


def test_rows_with_nan_touch_nothing():
    layer = VectorQuantize(4, 8, revive_below=1e6, kmeans_init=True)
    x = torch.randn(30, 4)
    x[3, 1], x[5, 0] = torch.nan, torch.inf
    out = layer(x)
    assert out.quantized[[3, 5]].isnan().all() and out.commit_loss.isnan()
    assert all(v.isfinite().all() for v in layer.state_dict().values())


# ---- state


def test_averages_keep_fp32_in_low_precision_and_fp64_in_fp64():
    for ema in (True, False):
        layer = nn.Sequential(VectorQuantize(4, 8, ema=ema, codebook_dim=3))
        before = state(layer)
        for cast, dtype in (("bfloat16", torch.float32), ("half", torch.float32),
                            ("double", torch.float64), ("half", torch.float64)):  # fmt: skip
            book = getattr(layer, cast)()[0]._codebook
            assert book.embed_avg.dtype is book.cluster_size.dtype is dtype
            if ema:
                assert book.embed.dtype is dtype
                torch.testing.assert_close(book.embed.float(), before["0._codebook.embed"], rtol=0, atol=0)
        assert layer[0].project_in.weight.dtype is torch.float16
        assert layer.to("meta")[0]._codebook.embed_avg.is_meta


def test_low_precision_rows_move_an_fp32_codebook():
    layer = VectorQuantize(4, 8, decay=0.999).bfloat16()
    for _ in range(50):
        out = layer(torch.randn(64, 4, dtype=torch.bfloat16))
    assert out.quantized.dtype is torch.bfloat16 and out.commit_loss.dtype is torch.float32
    kept = 0.999**50
    torch.testing.assert_close(layer._codebook.cluster_size.sum(), torch.tensor(8 * kept + 64 * (1 - kept)))


@pytest.mark.parametrize("make", [
    lambda: VectorQuantize(4, 8, kmeans_init=True, codebook_dim=3),
    lambda: ResidualVQ(4, 8, 2, revive_below=1.0),
    lambda: GroupedResidualVQ(4, 8, 2, groups=2),
    lambda: SimVQ(4, 8), lambda: FSQ([5, 4], 4), lambda: LFQ(3, 4),
])  # fmt: skip
def test_a_run_resumes_from_its_state_bit_for_bit(make):
    layer, x = make(), torch.randn(5, 2, 10, 4)
    for batch in x[:3]:
        layer(batch)
    resumed = make()
    resumed.load_state_dict(layer.state_dict())
    for batch in x[3:]:
        for a, b in zip(layer(batch), resumed(batch)):
            assert (a is None and b is None) or torch.equal(a, b)
    assert_same_state(state(layer), state(resumed), rtol=0, atol=0)
    copy.deepcopy(layer)


# ---- k-means and revival


def clusters(K=6, rows=20):
    centres = 10 * torch.randn(K, 4)
    return centres, centres.repeat_interleave(rows, 0) + 0.01 * torch.randn(K * rows, 4)


@pytest.mark.parametrize("options", [{}, {"deterministic": "bitwise"}], ids=str)
def test_kmeans_starts_from_the_first_batch_in_training(options):
    centres, x = clusters()
    x = x[torch.randperm(len(x))]
    layer = VectorQuantize(4, 24, kmeans_init=True, **options)
    initial = layer.codebook.clone()
    layer.eval()(x)
    assert torch.equal(layer.codebook, initial) and not layer._codebook.initted
    out = layer.train()(x)
    assert layer._codebook.initted and out.commit_loss < 0.01
    assert (torch.cdist(centres, out.quantized).min(1).values < 0.1).all()
    codes = layer.codebook.clone()
    layer(x)
    torch.testing.assert_close(layer.codebook, codes, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("kmeans_init", [True, False])
def test_bad_rows_and_masks_are_named(kmeans_init):
    layer = VectorQuantize(4, 8, kmeans_init=kmeans_init)
    for error, match, args in (
        (ValueError, r"x \[2, 5\] must have the codebook's D = 4", (torch.randn(2, 5),)),
        (TypeError, "x must be float32", (torch.ones(2, 4).long(),)),
        (TypeError, "mask must be bool, got torch.float32", (torch.randn(4, 3, 4), torch.ones(4, 3))),
        (ValueError, "mask must have x's shape", (torch.randn(4, 3, 4), torch.ones(4).bool())),
    ):
        with pytest.raises(error, match="vector_quantize: " + match):
            layer(*args)
    assert layer._codebook.started != kmeans_init


def test_kmeans_of_fewer_rows_than_codes():
    layer, x = VectorQuantize(4, 8, kmeans_init=True), torch.randn(3, 4)
    assert layer(x).commit_loss < 1e-12
    assert layer.codebook.isfinite().all()


def test_kmeans_for_each_head_and_level():
    x = torch.randn(40, 4)
    for layer in (VectorQuantize(4, 8, heads=2, separate_codebook_per_head=True, kmeans_init=True),
                  VectorQuantize(4, 8, heads=2, metric="cosine", kmeans_init=True)):  # fmt: skip
        assert layer(x).commit_loss < 0.3
    levels = ResidualVQ(4, 8, 3, kmeans_init=True)
    losses = levels(x).commit_loss
    assert losses[0] > 1.5 * losses[1] > 2 * losses[2]


def test_dead_codes_become_rows_of_the_batch():
    layer, x = VectorQuantize(4, 64, revive_below=0.5, decay=0.5), torch.randn(100, 4)
    with torch.no_grad():
        layer._codebook.embed[0, 1:] += 100
    for _ in range(3):
        layer(x)
    size = layer._codebook.cluster_size[0]
    assert (size >= 0.5).all() and (layer.codebook[1:].abs() < 10).all()
    revived = size == 0.5
    assert revived.any()
    assert is_row_of(layer.codebook[revived], x).all()
    torch.testing.assert_close(layer._codebook.embed_avg[0][revived] / 0.5, layer.codebook[revived])
    assert layer.codebook.unique(dim=0).shape[0] == 64


def test_revival_takes_used_rows_alone_and_waits_where_they_are_few():
    layer = VectorQuantize(4, 16, revive_below=1e6, decay=0.0)
    x, mask = torch.randn(20, 4), torch.zeros(20, dtype=torch.bool)
    mask[[3, 7, 8]] = True
    x[8, 0] = torch.nan
    layer(x, mask)
    assert is_row_of(layer.codebook, x).sum() == 2 and is_row_of(x[[3, 7]], layer.codebook).all()


def test_a_learned_codebook_can_be_revived():
    layer, x = VectorQuantize(4, 8, ema=False, revive_below=0.2, decay=0.5), torch.randn(50, 4)
    with torch.no_grad():
        layer._codebook.embed[0, 1:] += 100
    for _ in range(4):
        layer.zero_grad()
        objective(layer(x)).backward()
        assert layer._codebook.embed.grad.isfinite().all()
    assert (layer.codebook.abs() < 10).all()


# ---- gradient checkpointing and accumulation


class Block(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.linear, self.vq = nn.Linear(4, 4), VectorQuantize(4, 8, decay=0.5, **options)

    def forward(self, x):
        out = self.vq(self.linear(x).tanh())
        return out.quantized, out.commit_loss + out.codebook_loss


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("options", [{}, {"kmeans_init": True}, {"ema": False}, {"accumulate": True},
                                     {"ema": False, "revive_below": 0.9},
                                     {"deterministic": "bitwise", "revive_below": 0.9}], ids=str)  # fmt: skip
def test_checkpointing_counts_once_and_gives_the_same_gradients(reentrant, options):
    plain = Block(**options)
    kept = copy.deepcopy(plain)
    for step in range(3):
        x = torch.randn(30, 4, requires_grad=True)
        gradients = []
        for block in (plain, kept):
            block.zero_grad()
            if block is plain:
                quantized, loss = block(x)
            else:
                quantized, loss = checkpoint(block, x, use_reentrant=reentrant)
            (g,) = torch.autograd.grad(quantized.square().sum() + loss, x) if not reentrant else [None]
            if reentrant:
                x.grad = None
                (quantized.square().sum() + loss).backward()
                g = x.grad
            gradients.append(g)
        assert torch.equal(*gradients), step
        for block in (plain, kept):
            if options.get("accumulate"):
                block.vq.update()
        assert_same_state(state(plain), state(kept), rtol=0, atol=0)


@pytest.mark.parametrize("make", [
    lambda **o: VectorQuantize(4, 8, **o),
    lambda **o: VectorQuantize(4, 8, heads=2, separate_codebook_per_head=True, **o),
    lambda **o: ResidualVQ(4, 8, 2, **o),
    lambda **o: GroupedResidualVQ(4, 8, 2, groups=2, **o),
])  # fmt: skip
@pytest.mark.parametrize("mode", [None, "bitwise"])
def test_micro_batches_make_the_update_of_the_big_batch(make, mode):
    whole, parts = make(deterministic=mode), make(deterministic=mode, accumulate=True)
    parts.load_state_dict(whole.state_dict())
    for batch in torch.randn(3, 40, 4):
        batch[5] *= 1000
        whole(batch)
        for part in batch.split((7, 3, 0, 30)):
            parts(part)
        parts.update()
    exact = {"rtol": 0, "atol": 0} if mode else {}
    assert_same_state(state(whole), state(parts), **exact)


@pytest.mark.parametrize("options", [{}, {"deterministic": "bitwise"}, {"revive_below": 0.5}], ids=str)
def test_a_loaded_state_forgets_what_was_seen(options):
    layer = VectorQuantize(4, 8, accumulate=True, **options)
    before = state(layer)
    layer(torch.randn(20, 4))
    layer.load_state_dict(before)
    layer.update()
    assert_same_state(state(layer), before, rtol=0, atol=0)


def test_a_pickle_holds_the_codebook_once():
    layer = VectorQuantize(4, 8)
    size = len(pickle.dumps(layer))
    layer(torch.randn(20, 4))
    assert len(pickle.dumps(layer)) == size
    assert_same_state(state(pickle.loads(pickle.dumps(layer))), state(layer), rtol=0, atol=0)


def test_update_codebooks_finds_every_layer_once():
    model = nn.ModuleList([VectorQuantize(4, 8, accumulate=True) for _ in range(3)] + [VectorQuantize(4, 8)])
    model.append(model[0])
    alone = copy.deepcopy(model)
    x = torch.randn(20, 4)
    for layer in (*model[:3], *alone[:3]):
        layer(x)
    update_codebooks(model)
    for layer in alone[:3]:
        layer.update()
    assert_same_state(state(model), state(alone), rtol=0, atol=0)
    before = state(model)
    update_codebooks(model)  # nothing was seen since
    assert_same_state(state(model), before, rtol=0, atol=0)


# ---- residual, scalar, SimVQ


@pytest.mark.parametrize("options", [{}, {"estimator": "rotation"}, {"channel_dim": 1}], ids=str)
def test_residual_layer_is_residual_vq(options):
    layer = ResidualVQ(4, 8, 3, decay=0.9, **options)
    x = torch.randn(2, 9, 4).movedim(-1, options.get("channel_dim", -1)).requires_grad_()
    mask = torch.rand(2, 9) < 0.7
    codebooks = torch.stack([level.codebook for level in layer.layers]).clone()
    expected = vaeops.residual_vq(x, codebooks, mask=mask, stats=True, **options)
    out = layer(x, mask)
    for name, a, b in zip(out._fields, out, expected):
        torch.testing.assert_close(a, b, msg=name)
    torch.testing.assert_close(*(torch.autograd.grad(objective(o), x)[0] for o in (out, expected)))
    layer.eval()
    fewer = layer(x, mask, levels=2)
    expected = vaeops.residual_vq(
        x, torch.stack([level.codebook for level in layer.layers[:2]]), mask=mask, **options
    )
    assert torch.equal(fewer.indices, expected.indices)
    torch.testing.assert_close(layer.get_output_from_indices(fewer.indices), fewer.quantized)


def test_shared_residual_codebook_moves_by_all_levels():
    layer, x = ResidualVQ(4, 8, 3, shared_codebook=True, decay=0.9), torch.randn(30, 4)
    (book,) = {m for m in layer.modules() if isinstance(m, Codebook)}
    before = copy.deepcopy(book)
    out = layer(x)
    before.apply_statistics(out.counts.sum(0, keepdim=True), out.sums.sum(0, keepdim=True))
    assert_same_state(state(book), state(before))


def test_projected_and_uneven_residuals():
    layer, x = ResidualVQ(4, [8, 5], codebook_dim=3), torch.randn(2, 9, 4)
    out = layer(x)
    assert out.indices.shape == (2, 9, 2) and out.counts is None and out.commit_loss.shape == (2,)
    layer.eval()
    mask = torch.rand(2, 9) < 0.5
    out = layer(x, mask)
    torch.testing.assert_close(layer.get_output_from_indices(out.indices), out.quantized)


def test_grouped_residual_is_one_residual_a_group():
    layer, x = GroupedResidualVQ(4, 8, 2, groups=2, channel_dim=1), torch.randn(3, 4, 5)
    each = copy.deepcopy(layer.rvqs)
    out = layer(x)
    for g, part in enumerate(x.chunk(2, 1)):
        each[g].deferred = False
        expected = each[g](part.movedim(1, -1))
        assert torch.equal(out.indices[..., g, :], expected.indices)
        assert torch.equal(out.quantized.chunk(2, 1)[g].movedim(1, -1), expected.quantized)
        assert torch.equal(out.commit_loss[g], expected.commit_loss) and torch.equal(
            out.counts[g], expected.counts
        )
    assert_same_state(state(layer.rvqs), state(each), rtol=0, atol=0)
    layer.eval()
    out = layer(x)
    torch.testing.assert_close(layer.get_output_from_indices(out.indices), out.quantized)
    assert layer.get_codes_from_indices(out.indices).shape == (2, 2, 3, 5, 2)


@pytest.mark.parametrize("channel_dim", [-1, 1])
@pytest.mark.parametrize("make", [lambda **o: FSQ([5, 4, 3], **o), lambda **o: FSQ([5, 4, 3], 4, **o),
                                  lambda **o: LFQ(3, **o), lambda **o: LFQ(3, 4, **o)])  # fmt: skip
def test_scalar_layers(make, channel_dim):
    layer = make(channel_dim=channel_dim)
    dim = 4 if isinstance(layer.project_in, nn.Linear) else 3
    x = torch.randn(2, dim, 7).movedim(1, channel_dim).requires_grad_()
    out = layer(x)
    h = layer.project_in(x.movedim(channel_dim, -1))
    quantized, indices = vaeops.fsq(h, [5, 4, 3]) if isinstance(layer, FSQ) else vaeops.lfq(h)
    assert torch.equal(out.indices, indices)
    torch.testing.assert_close(out.quantized, layer.project_out(quantized).movedim(-1, channel_dim))
    torch.testing.assert_close(layer.get_output_from_indices(indices), out.quantized)
    assert layer.get_codes_from_indices(indices).shape[channel_dim] == 3
    assert torch.autograd.grad(objective(out), x)[0].any()


def test_lfq_entropies_and_commitment():
    layer, x = LFQ(3), torch.randn(50, 3, requires_grad=True)
    torch.testing.assert_close(layer(x).commit_loss, (x - x.sign()).square().mean())
    codes = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    p = (2 * x @ codes.T / 0.5).softmax(1)
    mean = p.mean(0)
    expected = -(p * p.log()).sum(1).mean(), -(mean * mean.log()).sum()
    sample, average = layer.entropy(x, temperature=0.5)
    torch.testing.assert_close(sample, expected[0])
    torch.testing.assert_close(average, expected[1])
    torch.autograd.grad(sample - average, x)


def test_simvq_learns_its_map():
    layer, x = SimVQ(4, 8, frozen_dim=6, channel_dim=1), torch.randn(2, 4, 7, requires_grad=True)
    out = layer(x, stats=True)
    expected = vaeops.vector_quantize(x, layer.codebook, channel_dim=1, stats=True)
    assert torch.equal(out.indices, expected.indices) and torch.equal(out.counts, expected.counts)
    (g,) = torch.autograd.grad(out.codebook_loss, layer.code_transform.weight)
    e = (layer.frozen_codebook @ layer.code_transform.weight.T)[out.indices]
    loss = (x.detach().movedim(1, -1) - e).square().mean()
    torch.testing.assert_close(g, torch.autograd.grad(loss, layer.code_transform.weight)[0])
    torch.testing.assert_close(layer.get_codes_from_indices(out.indices), out.quantized)
    assert set(layer.state_dict()) == {"frozen_codebook", "code_transform.weight"}


# ---- tracing

slow = pytest.mark.slow
LAYERS = [
    lambda: VectorQuantize(4, 8, kmeans_init=True, kmeans_iters=1, revive_below=0.9, channel_dim=1),
    lambda: VectorQuantize(4, 8, accumulate=True),
    lambda: ResidualVQ(4, 8, 2, estimator="rotation"),
    lambda: SimVQ(4, 8),
    lambda: FSQ([5, 4, 3], 4),
    lambda: LFQ(3, 4),
    pytest.param(lambda: VectorQuantize(4, 8, heads=2, separate_codebook_per_head=True, metric="cosine",
                                        deterministic="bitwise"), marks=slow),
    pytest.param(lambda: VectorQuantize(4, 8, ema=False, codebook_dim=3, revive_below=0.9), marks=slow),
    pytest.param(lambda: ResidualVQ(4, 8, 2, kmeans_init=True, kmeans_iters=2), marks=slow),
    pytest.param(lambda: GroupedResidualVQ(4, 8, 2, groups=2), marks=slow),
]  # fmt: skip


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("training", [True, False])
def test_compiles_whole_and_dynamic(make, training):
    """fullgraph raises at a graph break; the k-means start, updates and revival are inside the graph."""
    torch._dynamo.reset()
    layer = make().train(training)
    eager = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (20, 24, 30):
        x = torch.randn(2, 4, rows) if getattr(layer, "channel_dim", -1) == 1 else torch.randn(2, rows, 4)
        results = []
        for call in (compiled, eager):
            leaf = x.clone().requires_grad_()
            out = call(leaf)
            results.append((out, torch.autograd.grad(objective(out), leaf)[0]))
        (a, ga), (b, gb) = results
        assert torch.equal(a.indices, b.indices)
        torch.testing.assert_close(a.quantized, b.quantized)
        torch.testing.assert_close(ga, gb)
        if hasattr(layer, "update") and rows == 24:
            layer.update()
            eager.update()
        assert_same_state(state(layer), state(eager))


def test_the_kmeans_start_compiles_once_more_and_never_again():
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    layer = VectorQuantize(4, 8, kmeans_init=True, kmeans_iters=3)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=count)
    for rows in (20, 24, 30, 36, 50):
        compiled(torch.randn(rows, 4))
    assert len(graphs) == 2
    assigned = [sum("vq_assign" in str(n.target) for n in g.graph.nodes) for g in graphs]
    assert assigned == [4, 1]


def test_no_call_waits_for_the_device():
    """Nothing reads a tensor's value: meta tensors, which have none, go through."""
    layer = VectorQuantize(4, 8, kmeans_init=True, revive_below=1.0).to("meta")
    for _ in range(2):
        out = layer(torch.empty(30, 4, device="meta"))
    assert out.quantized.is_meta


@pytest.mark.parametrize(
    ("error", "match", "make"),
    [
        (ValueError, "metric must be one of .* got 'dot'", lambda: VectorQuantize(4, 8, metric="dot")),
        (ValueError, "deterministic must be", lambda: VectorQuantize(4, 8, deterministic="yes")),
        (ValueError, "dim 5 must be a multiple of heads", lambda: VectorQuantize(5, 8, heads=2)),
        (ValueError, "VectorQuantize: estimator must be one of", lambda: VectorQuantize(4, 8, estimator="x")),
        (ValueError, "VectorQuantize: precision must be", lambda: VectorQuantize(4, 8, precision="half")),
        (ValueError, "VectorQuantize: impl must be one of", lambda: VectorQuantize(4, 8, impl="gpu")),
        (ValueError, "VectorQuantize: decay must be in .* got 2", lambda: VectorQuantize(4, 8, decay=2.0)),
        (TypeError, "VectorQuantize: decay must be a float", lambda: VectorQuantize(4, 8, decay="x")),
        (ValueError, "VectorQuantize: eps must be in", lambda: VectorQuantize(4, 8, eps=-1)),
        (ValueError, "VectorQuantize: revive_below must be", lambda: VectorQuantize(4, 8, revive_below=-1.0)),
        (ValueError, "VectorQuantize: kmeans_iters must be at least 1",
         lambda: VectorQuantize(4, 8, kmeans_init=True, kmeans_iters=0)),
        (ValueError, "VectorQuantize: codebook_size must be at least 1", lambda: VectorQuantize(4, 0)),
        (ValueError, "VectorQuantize: heads must be at least 1", lambda: VectorQuantize(4, 8, heads=0)),
        (TypeError, "VectorQuantize: codebook_dim must be an int",
         lambda: VectorQuantize(4, 8, codebook_dim=2.0)),
        (ValueError, "VectorQuantize: dim must be at least 1", lambda: VectorQuantize(0, 8)),
        (ValueError, "ResidualVQ: estimator must be one of", lambda: ResidualVQ(4, 8, 2, estimator="x")),
        (ValueError, "GroupedResidualVQ: groups must be at least 1",
         lambda: GroupedResidualVQ(4, 8, 2, groups=0)),
        (ValueError, r"LFQ: bits must be in \[1, 63\], got 64", lambda: LFQ(64)),
        (ValueError, "SimVQ: metric must be one of", lambda: SimVQ(4, 8, metric="l1")),
        (ValueError, "mask or lens, not both",
         lambda: VectorQuantize(4, 8)(torch.zeros(1, 1, 4), torch.ones(1, 1).bool(), torch.ones(1))),
        (ValueError, r"lens must be \[B\]",
         lambda: VectorQuantize(4, 8)(torch.zeros(2, 4), lens=torch.ones(2))),
        (ValueError, "mask must have x's shape",
         lambda: VectorQuantize(4, 8)(torch.zeros(2, 4), torch.ones(3).bool())),
        (TypeError, "num_quantizers is needed", lambda: ResidualVQ(4, 8)),
        (ValueError, "num_quantizers must be the length", lambda: ResidualVQ(4, [8, 8], 3)),
        (ValueError, "shared_codebook needs one", lambda: ResidualVQ(4, [8, 4], shared_codebook=True)),
        (TypeError, "heads is no option", lambda: ResidualVQ(4, 8, 2, heads=2)),
        (ValueError, r"levels must be in \[1, 2\]", lambda: ResidualVQ(4, 8, 2)(torch.zeros(1, 4), levels=3)),
        (ValueError, "dim 5 must be a multiple of groups", lambda: GroupedResidualVQ(5, 8, 2, groups=2)),
        (ValueError, "levels must each be at least 2", lambda: FSQ([5, 1])),
    ],
)  # fmt: skip
def test_refuses(error, match, make):
    with pytest.raises(error, match=match):
        make()
