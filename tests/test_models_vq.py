"""VQ-VAEs: sizes, losses, when codebooks move, the same training on fused and on reference ops."""

import model_case as case
import pytest
import torch
import torch.nn.functional as F

from vaeops.models import MLPVQVAE, VQVAE, VQVAE2, create

SMALL = {"hidden": 16, "inner": 8, "blocks": 1, "dim": 4, "codes": 8}
MODELS = {
    "one code": lambda **o: MLPVQVAE(12, (16,), 6, 8, **o),
    "one level": lambda **o: VQVAE(1, 8, **SMALL, **o),
    "two levels": lambda **o: VQVAE2(1, 8, **SMALL, **o),
}


@pytest.fixture(params=MODELS)
def make(request):
    return MODELS[request.param]


def batch(model, n=5):
    """In the model's range, whatever that is."""
    lo, hi = model.input_range
    return torch.rand(n, *model.input_shape) * (hi - lo) + lo


def tuple_of(codes):
    return codes if isinstance(codes, tuple) else (codes,)


def codebooks(model):
    names = ("codebook",) if isinstance(model, MLPVQVAE) else ("embed", "embed_avg", "cluster_size")
    return {k: v.clone() for k, v in model.state_dict().items() if k.split(".")[-1] in names}


@pytest.mark.parametrize(
    ("name", "overrides", "parameters"),
    [
        ("workshop-vq", {"codes": 10}, 1_069_584),
        ("workshop-vq", {}, 1_075_216),
        ("vq-vae", {}, 662_595),
        ("vq-vae", {"channels": 1, "side": 28}, 658_497),
        ("vq-vae-2", {}, 1_921_155),
    ],
)
def test_parameter_counts(name, overrides, parameters):
    """An averaged codebook is no parameter."""
    assert case.count(create(name, **overrides)) == parameters


def test_terms(make):
    model = make()
    model.eval()
    x = batch(model)
    out, (losses, monitors) = model(x), model.terms(x, seed=case.SEED)
    assert list(losses) == list(model.weights)
    torch.testing.assert_close(losses["recon"], F.mse_loss(out.recon, x))
    assert losses["commit"] == out.commit_loss > 0
    assert all(value.shape == () and not value.requires_grad for value in monitors.values())
    assert len(monitors) == 2 * len(model.grids)
    codes = tuple_of(out.indices)
    for i, (indices, grid) in enumerate(zip(codes, model.grids)):
        assert indices.shape == (5, *grid) and indices.dtype is torch.int64
        used = torch.bincount(indices.flatten(), minlength=model.codes)
        assert torch.equal(out.counts.view(-1, model.codes)[i], used.float())
        p = used / used.sum()
        level = "" if len(codes) == 1 else ("_top", "_bottom")[i]
        torch.testing.assert_close(monitors[f"perplexity{level}"], torch.special.entr(p).sum().exp())
        torch.testing.assert_close(monitors[f"usage{level}"], (used > 0).float().mean())


def test_reconstruction_is_the_decoded_codes(make):
    model = make()
    x = batch(model)
    out = model.eval()(x)
    lo, hi = model.input_range
    for a, b in zip(tuple_of(model.encode(x)), tuple_of(out.indices)):
        assert torch.equal(a, b)
    shown = model.reconstruct(x)
    assert shown.shape == x.shape and shown.min() >= lo and shown.max() <= hi
    torch.testing.assert_close(shown, out.recon.clamp(lo, hi))
    assert torch.equal(shown, model.decode(out.indices))


def test_codebooks_move_in_training_alone(make):
    model = make()
    x = batch(model)
    before = codebooks(model)
    model.reconstruct(x)
    model.eval().terms(x)
    assert all(torch.equal(v, before[k]) for k, v in codebooks(model).items())
    model.train().terms(batch(model))
    moved = [not torch.equal(v, before[k]) for k, v in codebooks(model).items()]
    assert not any(moved) if isinstance(model, MLPVQVAE) else all(moved)


def test_losses_reach_what_they_train(make):
    model = make()
    losses = model.terms(batch(model)).losses
    encoder, decoder = (next(iter(part.parameters())) for part in (model.encoder, model.decoder))
    for name, reached in {"recon": (True, True), "commit": (True, False), "codebook": (False, False)}.items():
        if name in losses:
            grads = torch.autograd.grad(
                losses[name], (encoder, decoder), retain_graph=True, allow_unused=True
            )
            assert tuple(g is not None and bool(g.any()) for g in grads) == reached, name
    if "codebook" in losses:
        (grad,) = torch.autograd.grad(losses["codebook"], model.codebook)
        assert bool(grad.any())


def test_training_agrees_with_the_reference(make):
    case.assert_ops_agree(make, batch(make()))


def test_one_graph_and_fp32_losses(make):
    model = make()
    case.assert_traces_and_autocasts(model, batch(model))


@pytest.mark.parametrize("name", ["workshop-vq", "vq-vae", "vq-vae-2"])
def test_a_trained_codebook_survives_its_file(name, tmp_path):
    model = create(name, **({"hidden": (8,)} if name == "workshop-vq" else {"side": 8, **SMALL}))
    model.terms(batch(model))
    case.assert_survives_its_file(model, tmp_path / "model.safetensors")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("cls", "factor"), [(VQVAE, 4), (VQVAE2, 8)])
def test_any_size_that_halves(cls, factor, channels):
    model = cls(channels, (3 * factor, 2 * factor), **SMALL)
    assert model.input_shape == (channels, 3 * factor, 2 * factor)
    assert model.reconstruct(batch(model, 2)).shape == (2, *model.input_shape)
    for size in (0, 2 * factor + 1, (factor, factor + 2), -factor):
        with pytest.raises(ValueError, match=f"side must hold positive multiples of {factor}, got"):
            cls(channels, size, **SMALL)


def test_both_levels_reach_the_image():
    model = VQVAE2(1, 8, **SMALL)
    top, bottom = model.encode(batch(model, 1))
    image = model.decode((top, bottom))
    assert not torch.equal(model.decode(((top + 1) % 8, bottom)), image)
    assert not torch.equal(model.decode((top, (bottom + 1) % 8)), image)


def test_bad_input(make):
    model = make()
    shape = ", ".join(map(str, model.input_shape))
    for call in (model, model.terms, model.encode, model.reconstruct):
        with pytest.raises(ValueError, match=rf"x must be \[B, {shape}\], got \[5, 4, 4\]"):
            call(torch.zeros(5, 4, 4))
    floats = tuple(torch.zeros(1, *grid) for grid in model.grids)
    with pytest.raises(TypeError, match="indices must be int64 or int32"):
        model.decode(floats if len(floats) > 1 else floats[0])


@pytest.mark.slow
@pytest.mark.parametrize("cls", [VQVAE, VQVAE2])
def test_training_on_digits(cls):
    images, _ = case.digits()
    torch.manual_seed(0)
    model = cls(1, 8, hidden=64, dim=16, codes=64)
    x = images * 2 - 1
    history = case.train(model, case.drawer(x), 300, lr=2e-3)
    first, last = (case.mean_of(history, "recon", part) for part in (slice(1), slice(-20, None)))
    model.eval()
    monitors = model.terms(x).monitors
    print(cls.__name__, first, last, {k: float(v) for k, v in monitors.items()})
    assert last < first / 4
    for name, value in monitors.items():
        if name.startswith("perplexity"):
            used = monitors[name.replace("perplexity", "usage")] * model.codes
            assert used > model.codes / 2 and value > used / 2
