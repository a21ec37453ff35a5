"""The reference models: sizes, shapes, noise by row, and the same training on fused and on reference ops."""

import math

import pytest
import torch
from budget import assert_within_budget

from vaeops import objectives, rng
from vaeops.models import MLPVAE, MLPVQVAE, CelebAVAEXL, create
from vaeops.nn import VGGTrunk
from vaeops.train import workshop_vq

SEED = torch.tensor([11, 0])

# preset -> its parameters, and overrides that make it small
MODELS = {
    "tiny-2d": (198, {}),
    "ae-mlp": (489_136, {"in_dim": 36, "hidden": (16, 12), "latent": 3}),
    "ae-conv": (442_433, {"side": 7, "widths": (4, 6), "latent": 3}),
    "ae-denoise": (484_944, {"in_dim": 36, "hidden": (16, 12), "latent": 3}),
    "ae-sparse": (484_944, {"in_dim": 36, "hidden": (16, 12), "latent": 3}),
    "vae-mlp": (549_688, {"in_dim": 36, "hidden": (16, 12), "latent": 3}),
    "vae-mlp-10": (541_988, {"in_dim": 36, "hidden": (16, 12), "latent": 3}),
    "vae-mlp-50": (1_105_780, {"in_dim": 36, "hidden": (16, 12), "latent": 3}),
    "vae-conv": (384_577, {"side": 12, "widths": (4, 6, 8), "latent": 3}),
    "vae-conv-small": (1_662_249, {"side": 7, "widths": (4, 6), "hidden": 12, "latent": 3}),
    "cvae": (554_808, {"in_dim": 36, "hidden": (16, 12), "latent": 3, "classes": 4}),
    "workshop-ae": (825_124, {"in_dim": 36, "hidden": (16,), "latent": 3}),
    "workshop-vae": (1_082_680, {"in_dim": 36, "latent": 3}),
    "celeba-vae": (7_868_931, {"side": 16, "width": 4, "latent": 6}),
    "celeba-vae-xl": (36_183_363, {"side": 8, "widths": (16, 32), "latent": 6}),
}
VAES = [name for name in MODELS if not name.startswith(("ae", "workshop-ae"))]
AUTOENCODERS = [name for name in MODELS if name not in VAES]


def parameters(name, **overrides):
    with torch.device("meta"):
        return sum(p.numel() for p in create(name, **overrides).parameters())


@pytest.mark.parametrize("name", MODELS)
def test_parameter_counts(name):
    assert parameters(name) == MODELS[name][0]


def test_parameter_counts_of_the_workshop_s_plane():
    assert parameters("workshop-ae", latent=2) == 806_674
    assert parameters("workshop-vae", latent=2) == 1_068_820


def batch(model, n=6):
    """Samples in the model's range, and labels where it takes them."""
    source = torch.Generator().manual_seed(1)
    lo, hi = model.input_range or (-1.0, 1.0)
    x = torch.rand(n, *model.input_shape, generator=source) * (hi - lo) + lo
    label = torch.randint(model.classes, (n,), generator=source) if model.classes else None
    return x, label


def total(model, losses):
    return sum(weight * losses[name].sum() for name, weight in model.weights.items())


def three_steps(model, x, label):
    """The losses of each step, and step 1's gradients, of a training that follows from constants alone."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    history, gradients = [], {}
    for step in range(3):
        losses, monitors = model.terms(x.to(next(model.parameters()).dtype), label, seed=SEED + 64 * step)
        assert set(losses) == set(model.weights)
        assert not any(value.requires_grad or value.dim() for value in monitors.values())
        optimizer.zero_grad()
        total(model, losses).backward()
        gradients = gradients or {key: p.grad.clone() for key, p in model.named_parameters()}
        optimizer.step()
        history.append({key: value.detach() for key, value in losses.items()})
    return history, gradients


def assert_agreement(name, overrides):
    ours, theirs, exact = (create(name, **overrides, ops=ops) for ops in ("fused", "ref", "ref"))
    theirs.load_state_dict(ours.state_dict())
    exact.load_state_dict(ours.state_dict())
    x, label = batch(ours)
    fused, gradients = three_steps(ours, x, label)
    eager, eager_gradients = three_steps(theirs, x, label)
    right, right_gradients = three_steps(exact.double(), x, label)
    for key, value in fused[0].items():
        assert value.dtype is torch.float32
        assert_within_budget(value, right[0][key], eager[0][key], key)
    largest = max(float(g.abs().max()) for g in right_gradients.values())
    for key, value in gradients.items():
        # A bias before batch norm has none: what is there is rounding.
        if float(right_gradients[key].abs().max()) < 1e-10 * largest:
            assert float(value.abs().max()) < 1e-5 * largest
        else:
            assert_within_budget(value, right_gradients[key], eager_gradients[key], key, factor=3)
    for mine, reference in zip(fused, eager):
        for key, value in mine.items():
            torch.testing.assert_close(value, reference[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_training_agrees_with_the_reference(name):
    assert_agreement(name, MODELS[name][1])


def test_training_of_a_linear_autoencoder_agrees_with_the_reference():
    assert_agreement("ae-mlp", {"in_dim": 36, "hidden": (), "latent": 3, "sigmoid": False})


def test_training_with_uniform_noise_agrees_with_the_reference():
    assert_agreement("workshop-vae", MODELS["workshop-vae"][1] | {"noise": "uniform"})


def test_a_perceptual_loss_agrees_with_the_reference():
    small = MODELS["celeba-vae"][1]
    trunk = VGGTrunk.random("vgg16", 0, input_range=(-1.0, 1.0))
    models = [create("celeba-vae", **small, trunk=trunk, perceptual=0.5, ops=ops) for ops in ("fused", "ref")]
    models[1].load_state_dict(models[0].state_dict())
    assert models[0].weights == {"recon": 1.0, "kl": 1.0, "perceptual": 0.5}
    x, _ = batch(models[0], 3)
    fused, eager = (three_steps(model, x, None)[0] for model in models)
    for ours, theirs in zip(fused, eager):
        for key, value in ours.items():
            torch.testing.assert_close(value, theirs[key], rtol=1e-3, atol=1e-6)
    trunk.input_range = (0.0, 1.0)
    with pytest.raises(ValueError, match=r"trunk must take images in \(-1.0, 1.0\)"):
        create("celeba-vae", **small, trunk=trunk)


@pytest.mark.parametrize("name", [*VAES, "ae-denoise"])
def test_parts_of_a_batch_draw_what_the_whole_does(name):
    """Without batch norm, the losses of the parts are then the whole's."""
    model = create(name, **MODELS[name][1])
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    x, label = batch(model, 7)
    whole = model.terms(x, label, seed=SEED).losses
    parts = [
        model.terms(x[i:j], None if label is None else label[i:j], seed=SEED, row=i).losses
        for i, j in ((0, 3), (3, 7))
    ]
    for key, value in whole.items():
        torch.testing.assert_close(value, (3 * parts[0][key] + 4 * parts[1][key]) / 7, rtol=1e-5, atol=1e-6)
    other = model.terms(x, label, seed=SEED + 1).losses["recon"]
    assert not torch.equal(other, whole["recon"])
    assert not torch.equal(model.terms(x, label, seed=SEED, row=1).losses["recon"], whole["recon"])


@pytest.mark.parametrize("name", ["ae-denoise", "cvae", "workshop-vae"])
def test_terms_trace_as_one_graph(name):
    options = {"noise": "uniform"} if name == "workshop-vae" else {}
    model = create(name, **MODELS[name][1], **options)
    x, label = batch(model)
    torch._dynamo.reset()
    traced = torch.compile(model.terms, fullgraph=True, backend="eager")(x, label, seed=SEED, row=2)
    for key, value in model.terms(x, label, seed=SEED, row=2).losses.items():
        assert torch.equal(value, traced.losses[key])


@pytest.mark.parametrize("name", ["ae-sparse", "vae-conv", "celeba-vae-xl"])
def test_losses_stay_fp32_under_autocast(name):
    model = create(name, **MODELS[name][1])
    x, label = batch(model)
    full = model.terms(x, label, seed=SEED).losses
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.terms(x, label, seed=SEED).losses
    for key, value in losses.items():
        assert value.dtype is torch.float32
        torch.testing.assert_close(value, full[key], rtol=0.1, atol=0.02)


def in_range(samples, input_range):
    lo, hi = input_range or (-float("inf"), float("inf"))
    return bool(((samples >= lo) & (samples <= hi)).all()) and not samples.requires_grad


@pytest.mark.parametrize("name", MODELS)
def test_reconstructions_and_samples(name):
    model = create(name, **MODELS[name][1])
    model.eval()
    x, label = batch(model)
    again = model.reconstruct(x, label)
    assert again.shape == x.shape and in_range(again, model.input_range)
    assert torch.equal(again, model.reconstruct(x, label))
    if name in AUTOENCODERS:
        assert model.encode(x).shape == (6, 3) and model.decode(model.encode(x)).shape == x.shape
        return
    mu, logvar = model.encode(x, label)
    assert mu.shape == logvar.shape == (6, model.latent_dim)
    samples = model.sample(6, SEED, label)
    assert samples.shape == x.shape and in_range(samples, model.input_range)
    assert torch.equal(samples, model.sample(6, SEED, label))
    assert not torch.equal(samples, model.sample(6, SEED + 1, label))


@pytest.mark.parametrize("name", ["vae-mlp", "vae-conv", "celeba-vae", "workshop-vae"])
def test_noise_in_training_and_in_eval(name):
    model = create(name, **MODELS[name][1])
    x, _ = batch(model)
    assert not torch.equal(model(x).z, model(x).z)
    given = torch.randn(6, model.latent_dim)
    out = model(x, eps=given)
    torch.testing.assert_close(out.z, out.mu + given * (out.logvar / 2).exp())
    model.eval()
    out = model(x)
    assert torch.equal(out.z, out.mu) and torch.equal(out.pred, model.decode(model.encode(x)[0]))
    assert not torch.equal(model(x, seed=SEED).z, out.mu)


def test_the_workshop_s_noise_is_uniform():
    model = create("workshop-vae", in_dim=36, latent=2, noise="uniform")
    x = torch.rand(2000, 36)
    out = model(x, seed=SEED)
    eps = ((out.z - out.mu) / (out.logvar / 2).exp()).flatten().sort().values
    steps = (torch.arange(4000) + 0.5) / 4000
    assert (eps - steps).abs().max() < 1.63 / 4000**0.5  # Kolmogorov and Smirnov, 1 %


def test_denoising_noise_and_dropout():
    model = create("ae-denoise", in_dim=64, hidden=(32, 8), latent=4, noise=0.1, dropout=0.25)
    x = torch.full((500, 64), 0.5)
    noise = model.noisy(x, SEED) - x
    assert abs(float(noise.std()) - 0.1) < 0.002 and model.noisy(x, SEED + 1).max() <= 1
    seen = {}
    model.encoder[2].register_forward_hook(lambda _, inputs, __: seen.update(h=inputs[0]))
    model.terms(x, seed=SEED)
    hidden = model.encoder[:2](model.noisy(x, SEED))
    kept = seen["h"] != 0
    torch.testing.assert_close(seen["h"][kept], hidden[kept] / 0.75)
    assert abs(float(kept[hidden != 0].float().mean()) - 0.75) < 0.02
    model.eval()
    model.terms(x, seed=SEED)
    assert torch.equal(seen["h"], hidden)
    clean = ((model.reconstruct(x) - x) ** 2).mean()
    torch.testing.assert_close(model.terms(x).losses["recon"], clean)
    assert not torch.equal(model.terms(x, seed=SEED).losses["recon"], model.terms(x).losses["recon"])


def test_a_cost_of_the_code_empties_it():
    zeros = []
    for sparsity in (0.0, 0.3):
        torch.manual_seed(0)
        model = create("ae-sparse", in_dim=36, hidden=(16,), latent=8, sparsity=sparsity)
        x, _ = batch(model, 64)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(60):
            losses, monitors = model.terms(x)
            optimizer.zero_grad()
            total(model, losses).backward()
            optimizer.step()
        torch.testing.assert_close(losses["sparsity"], model.encode(x).abs().mean(), rtol=0.2, atol=1e-3)
        zeros.append(float(monitors["zeros"]))
    assert zeros[1] > zeros[0] + 0.2


def test_labels_reach_encoder_and_decoder():
    model = create("cvae", **MODELS["cvae"][1]).eval()
    x, label = batch(model)
    other = (label + 1) % 4
    assert not torch.equal(model.encode(x, label)[0], model.encode(x, other)[0])
    z = torch.zeros(6, 3)
    assert not torch.equal(model.decode(z, label), model.decode(z, other))


@pytest.mark.parametrize("name", ["vae-mlp", "cvae", "vae-mlp-50", "celeba-vae"])
def test_log_weights_bound_the_likelihood(name):
    model = create(name, **MODELS[name][1]).eval()
    x, label = batch(model)
    k = 64
    weights = model.log_weights(x, k, SEED, label)
    assert weights.shape == (k, 6) and weights.dtype is torch.float32
    # By torch.distributions, from the same z.
    mu, logvar = model.encode(x, label)
    sigma = (logvar / 2).exp()
    z = mu + sigma * rng.normal((k, *mu.shape), SEED)
    many = None if label is None else label.repeat(k)
    pred = model.decode(z.flatten(0, 1), many).unflatten(0, (k, 6))
    if model.recon == "bce_logits":
        log_px = -torch.nn.functional.binary_cross_entropy_with_logits(
            pred, x.expand_as(pred), reduction="none"
        )
    else:
        normal = model.recon == "mse"
        density = (
            torch.distributions.Normal(pred, 0.5**0.5) if normal else torch.distributions.Laplace(pred, 1.0)
        )
        log_px = density.log_prob(x)
    prior, posterior = torch.distributions.Normal(0.0, 1.0), torch.distributions.Normal(mu, sigma)
    parts = log_px.flatten(2).sum(2), prior.log_prob(z).sum(2), posterior.log_prob(z).sum(2)
    torch.testing.assert_close(weights, parts[0] + parts[1] - parts[2], rtol=1e-4, atol=1e-3)
    bound = weights.logsumexp(0) - torch.tensor(k).log()
    torch.testing.assert_close(bound, objectives.iwae_bound(*parts), rtol=1e-4, atol=1e-3)
    assert (bound >= weights.mean(0)).all()


def test_running_blocks_again_in_backward_changes_no_bit():
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = CelebAVAEXL(6, side=8, widths=(16, 32), checkpointing=checkpointing)
        x, _ = batch(model)
        total(model, model.terms(x, seed=SEED).losses).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


LATENT = ("vae-mlp", "vae-conv", "workshop-vae", "celeba-vae", "ae-mlp", "ae-conv", "mult-vae")


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("vae-mlp", {"ops": "eager"}, "ops must be one of"),
        ("ae-conv", {"ops": "eager"}, "ops must be one of"),
        ("vae-mlp", {"recon": "bce"}, "recon must be one of"),
        ("vae-mlp", {"input_range": (-1, 1)}, r"input_range must be \(0.0, 1.0\) or None"),
        ("tiny-2d", {"recon": "bce_logits"}, "needs input_range"),
        ("vae-mlp", {"reduction": "sum"}, "reduction must be 'batchmean' or 'mean'"),
        ("workshop-vae", {"noise": "cauchy"}, "noise must be one of"),
        ("workshop-ae", {"init": "xavier"}, "init must be 'torch' or 'he'"),
        ("ae-denoise", {"dropout": 1.0}, r"dropout in \[0, 1\)"),
        ("celeba-vae", {"side": 20}, "side must be a multiple of 8, got 20"),
        ("celeba-vae-xl", {"widths": (24, 32)}, "widths must be multiples of 16"),
        *((name, {"latent": 0}, "latent must be an integer of at least 1, got 0") for name in LATENT),
        ("vae-mlp", {"latent": 2.0}, r"MLPVAE: latent must be an integer of at least 1, got 2\.0"),
        ("vae-mlp", {"in_dim": 0}, "in_dim must be"),
        ("vae-mlp", {"hidden": 5}, "hidden must be a sequence of positive integers, got 5"),
        ("vae-mlp", {"hidden": "no"}, "hidden must be a sequence"),
        ("vae-mlp", {"classes": -1}, "classes must be an integer of at least 0, got -1"),
        ("vae-mlp", {"beta": -1.0}, r"beta must be finite and at least 0, got -1\.0"),
        ("vae-mlp", {"beta": math.nan}, "beta must be finite"),
        ("vae-conv", {"widths": ()}, "widths must be a sequence of at least one positive integer"),
        ("vae-conv", {"channels": 0}, "channels must be"),
        ("vae-conv-small", {"hidden": 0}, "hidden must be"),
        ("celeba-vae", {"width": 0}, "width must be"),
        ("celeba-vae", {"perceptual": "much"}, "perceptual must be finite"),
        ("celeba-vae-xl", {"widths": (16, 0)}, "widths must be"),
        ("ae-mlp", {"hidden": (0,)}, "MLPAutoencoder: hidden must be"),
        ("ae-conv", {"side": 0}, "side must be"),
        ("ae-sparse", {"sparsity": -1}, "sparsity must be"),
        ("workshop-vq", {"codes": 0}, "MLPVQVAE: codes must be"),
        ("vq-vae", {"codes": 0}, "VQVAE: codes must be"),
        ("vq-vae", {"side": (8,)}, "side must hold positive multiples of 4"),
        ("vq-vae-2", {"hidden": 1}, "hidden must be an integer of at least 2"),
        ("vq-vae-2", {"blocks": -1}, "blocks must be"),
        ("code-prior", {"length": 0}, "CodePrior: length must be"),
        ("code-prior", {"heads": 0}, "heads must be"),
        ("mult-vae", {"items": 0}, "items must be"),
        ("mult-vae", {"hidden": 5}, "hidden must be"),
        ("ddpm-tiny", {"channels": 0}, "channels must be"),
    ],
)
def test_refuses_bad_options(name, overrides, message):
    with pytest.raises(ValueError, match=message):
        create(name, **overrides)


def test_refuses_bad_input():
    model, conditional = MLPVAE(12, (8,), 3), MLPVAE(12, (8,), 3, classes=4)
    x = torch.rand(5, 12)
    with pytest.raises(ValueError, match=r"x must be \[B, 12\], got \[5, 3, 4\]"):
        model.terms(x.view(5, 3, 4))
    with pytest.raises(ValueError, match=r"x must be \[B, 1, 28, 28\]"):
        create("ae-conv").terms(x)
    with pytest.raises(ValueError, match="give one of seed, generator and eps"):
        model.terms(x, seed=SEED, eps=torch.randn(5, 3))
    with pytest.raises(ValueError, match="label must be given"):
        conditional.terms(x)
    with pytest.raises(ValueError, match=r"label must be \[2\]"):
        conditional.sample(2, SEED, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="label must be int64"):
        conditional.encode(x, torch.zeros(5))
    with pytest.raises(IndexError):
        conditional.encode(x, torch.full((5,), 4))
    with pytest.raises(ValueError, match="k must be at least 1"):
        model.log_weights(x, 0, SEED)


@pytest.mark.parametrize(("codes", "parameters"), [(10, 1_069_584), (32, 1_075_216)])
def test_parameter_counts_with_a_codebook(codes, parameters):
    assert sum(p.numel() for p in MLPVQVAE(784, (512,), 256, codes).parameters()) == parameters


def test_training_with_a_codebook_agrees_with_the_reference():
    images = torch.rand(256, 5, 5, generator=torch.Generator().manual_seed(2))
    options = {"codes": 8, "dim": 6, "hidden": (16,), "commitment": 1.0, "steps": workshop_vq.TAIL, "seed": 5}
    ours, theirs = (workshop_vq.train(images, **options, ops=ops) for ops in ("fused", "ref"))
    assert ours.recon == pytest.approx(theirs.recon, rel=1e-4)
    assert ours.perplexity == pytest.approx(theirs.perplexity, rel=1e-4)
    with pytest.raises(ValueError, match="ops must be one of"):
        MLPVQVAE(4, (4,), 2, 3, ops="eager")
