"""Where lucidrains' quantizer is wrong, and the drop-in is not."""

import math

import pytest
import torch
import torch.nn.functional as F
from compat_case import CE, DIVERSE, PER_HEAD, SOFT, lucidrains_pair, peer as peer
from torch import nn

from vaeops.compat import lucidrains


@pytest.mark.parametrize("options", [CE, DIVERSE, {**SOFT, "route_gradients_to_input": False}], ids=str)
def test_backward_reads_the_codes_that_were_looked_up(options):
    """The peer's averages overwrite them first; with a fixed codebook its gradient is another one."""
    package = pytest.importorskip("vector_quantize_pytorch")
    x, grads = torch.randn(2, 20, 4), {}
    for cls in (lucidrains.VectorQuantize, package.VectorQuantize):
        for frozen in (True, False):
            torch.manual_seed(0)
            v, layer = x.clone().requires_grad_(), cls(4, 8, **options)
            quantized, _, loss = layer(v, freeze_codebook=frozen)
            grads[cls, frozen] = torch.autograd.grad(loss + quantized.square().sum(), v)[0]
    fixed = grads[package.VectorQuantize, True]
    torch.testing.assert_close(grads[lucidrains.VectorQuantize, True], fixed)
    torch.testing.assert_close(grads[lucidrains.VectorQuantize, False], fixed)
    assert not torch.allclose(grads[package.VectorQuantize, False], fixed, rtol=1e-2)


def test_diversity_leaves_out_what_is_masked(peer):
    ours, theirs = lucidrains_pair(peer, 4, 8, **DIVERSE, commitment_weight=0.0, freeze_codebook=True)
    x, mask = torch.randn(3, 20, 4, dtype=torch.float64), torch.rand(3, 20) < 0.6
    mask[:, 7] = False
    other = torch.where(mask.unsqueeze(-1), x, 5.0)
    torch.testing.assert_close(ours(x, mask=mask)[2], ours(other, mask=mask)[2])
    assert not torch.isclose(theirs(x, mask=mask)[2], theirs(other, mask=mask)[2])
    torch.testing.assert_close(ours(x)[2], theirs(x)[2])


def test_diversity_of_each_codebook_by_itself(peer):
    """The peer mixes the shares of code k of all heads: heads that each use one code alone look diverse."""
    options = {**PER_HEAD, **DIVERSE, "codebook_diversity_temperature": 100.0, "commitment_weight": 0.0}
    ours, theirs = lucidrains_pair(peer, 6, 8, **options, freeze_codebook=True)
    codes = torch.full((2, 8, 3), 50.0, dtype=torch.float64)
    codes[0, 1] = codes[1, 2] = 0.0
    with torch.no_grad():
        ours._codebook.embed.copy_(codes), theirs._codebook.embed.copy_(codes)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    assert abs(ours(x)[2]) < 1e-6
    torch.testing.assert_close(theirs(x)[2] / 0.3, torch.tensor(-math.log(2), dtype=torch.float64))


def test_cross_entropy_in_any_layout(peer):
    """The peer raises for images and single rows, and does not project what it returns."""
    layer = lucidrains.VectorQuantize(4, 8, codebook_dim=3, accept_image_fmap=True, freeze_codebook=True)
    x, given = torch.randn(2, 4, 3, 5), torch.randint(8, (2, 3, 5))
    quantized, loss = layer(x, indices=given)
    torch.testing.assert_close(quantized, layer(x)[0])
    rows = layer.project_in(x.movedim(1, -1))
    expected = F.cross_entropy(-torch.cdist(rows.flatten(0, 2), layer.codebook), given.flatten())
    torch.testing.assert_close(loss, expected)
    theirs = peer.VectorQuantize(4, 8, accept_image_fmap=True)
    with pytest.raises((ValueError, RuntimeError)):
        theirs(x, indices=given)
    ours, theirs = lucidrains_pair(peer, 4, 8)
    one = torch.randn(9, 4, dtype=torch.float64)
    assert ours(one, indices=torch.arange(9) % 8)[1].isfinite()
    with pytest.raises((ValueError, RuntimeError)):
        theirs(one, indices=torch.arange(9) % 8)
    mask, given = torch.rand(1, 9) < 0.5, torch.arange(9).unsqueeze(0) % 8
    torch.testing.assert_close(
        ours.eval()(one[None], indices=given, mask=mask)[1],
        ours(one[None], indices=given.masked_fill(~mask, -1))[1],
    )


def test_affine_codes_hold_in_eval_and_decode(peer):
    """The peer's moments move in eval too, its states do not load, and its decoder looks up other codes."""
    ours, theirs = lucidrains_pair(peer, 4, 8, affine_param=True)
    x = 3 * torch.randn(2, 20, 4, dtype=torch.float64) + 1
    ours(x), theirs(x)
    with pytest.raises(RuntimeError, match="batch_mean"):
        peer.VectorQuantize(4, 8, affine_param=True).load_state_dict(theirs.state_dict())
    fresh = lucidrains.VectorQuantize(4, 8, affine_param=True).double()
    fresh.load_state_dict(theirs.state_dict())
    quantized, indices, _ = fresh.eval()(x[:1])
    torch.testing.assert_close(fresh(x[:1])[0], quantized, rtol=0, atol=0)
    torch.testing.assert_close(fresh.get_output_from_indices(indices), quantized)
    theirs.eval()
    moved = theirs(x[:1])[0], theirs(x[:1])[0]
    assert not torch.equal(*moved)
    assert not torch.allclose(theirs.get_output_from_indices(theirs(x[:1])[1]), moved[1])


def test_affine_revival_puts_the_code_on_the_row():
    layer = lucidrains.VectorQuantize(4, 60, affine_param=True, threshold_ema_dead_code=1, decay=0.0).double()
    x = 3 * torch.randn(1, 50, 4, dtype=torch.float64) + 1
    layer(x)
    quantized, _, _ = layer.eval()(x)
    assert ((quantized - x).norm(dim=-1) < 1e-6).sum() > 20


def test_a_bridged_codebook_decodes_what_it_encodes(peer):
    """The peer's decoder leaves the bridge out."""
    torch.manual_seed(0)
    ours, theirs = (c.VectorQuantize(4, 8, vq_bridge=nn.Linear(4, 4)).eval() for c in (lucidrains, peer))
    x = torch.randn(2, 20, 4)
    for layer, same in ((ours, True), (theirs, False)):
        quantized, indices, _ = layer(x)
        assert torch.allclose(layer.get_output_from_indices(indices), quantized) == same


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
