"""The prior over codes: causality, sampling, and new images from a trained VQ-VAE."""

import math

import model_case as case
import pytest
import torch

from vaeops.models import MLPVQVAE, VQVAE, VQVAE2, CodePrior, create, decode_codes, encode_dataset

SMALL = {"width": 16, "layers": 2, "heads": 2}
VQ = {"hidden": 16, "inner": 8, "blocks": 1, "dim": 4, "codes": 8}


def test_parameter_count():
    assert case.count(create("code-prior")) == 931_328


@pytest.mark.parametrize("classes", [0, 3])
def test_a_code_changes_no_logits_up_to_its_own(classes):
    model = CodePrior(7, 6, classes=classes, **SMALL)
    torch.nn.init.normal_(model.position)
    x = torch.randint(7, (2, 6))
    label = torch.tensor([0, 2]) if classes else None
    logits = model(x, label)
    assert logits.shape == (2, 6, 7)
    for i in range(6):
        other = x.clone()
        other[:, i] = (x[:, i] + 1) % 7
        changed = (model(other, label) != logits).any(-1)
        assert not changed[:, : i + 1].any() and changed[:, i + 1 :].all(), i
    if classes:
        assert (model(x, torch.tensor([1, 2])) != logits).any(-1).tolist() == [[True] * 6, [False] * 6]


def test_nll_is_the_likelihood_of_the_chain():
    """exp(-T nll) over all sequences adds up to 1."""
    model = CodePrior(3, 4, **SMALL)
    everything = torch.cartesian_prod(*[torch.arange(3)] * 4)
    log_p = torch.stack([-4 * model.terms(x.unsqueeze(0)).losses["nll"] for x in everything])
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-5)
    terms = model.terms(everything)
    torch.testing.assert_close(terms.losses["nll"], -log_p.mean() / 4)
    assert terms.monitors["perplexity"] == terms.losses["nll"].exp()


def test_samples_follow_the_chain():
    """One code after another from the cache, against probabilities of whole sequences."""
    torch.manual_seed(1)
    model = CodePrior(3, 3, **SMALL)
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.5)
    n = 20_000
    drawn = model.sample(n, case.SEED)
    assert drawn.shape == (n, 3) and drawn.dtype is torch.int64
    everything = torch.cartesian_prod(*[torch.arange(3)] * 3)
    p = torch.stack([(-3 * model.terms(x.unsqueeze(0)).losses["nll"]).exp() for x in everything]).detach()
    found = torch.bincount(drawn @ torch.tensor([9, 3, 1]), minlength=27) / n
    assert ((found - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 1e-4).all()
    assert torch.equal(drawn, model.sample(n, case.SEED))
    assert torch.equal(drawn[:10], model.sample(10, case.SEED))
    assert not torch.equal(drawn, model.sample(n, case.SEED + 1))


def test_a_constant_grid_comes_back():
    grid = torch.tensor([3, 1, 4, 1, 5, 0])
    x = torch.stack((grid, 5 - grid))
    label = torch.tensor([0, 1])
    model = CodePrior(6, 6, classes=2, **SMALL)
    history = case.train(model, lambda step: (x, label), 80, lr=1e-2)
    assert history[-1].losses["nll"] < 0.01
    assert torch.equal(model.sample(2, case.SEED, label), x)
    assert torch.equal(model.sample(3, case.SEED, torch.tensor([1, 1, 0])), x[[1, 1, 0]])


def test_training_agrees_with_the_reference():
    case.assert_ops_agree(lambda **o: CodePrior(7, 6, **SMALL, **o), torch.randint(7, (4, 6)))
    models = [CodePrior(7, 6, **SMALL, ops=ops) for ops in ("fused", "ref")]
    models[1].load_state_dict(models[0].state_dict())
    assert torch.equal(*(model.sample(4, case.SEED) for model in models))


def test_one_graph_and_fp32_losses(tmp_path):
    model = create("code-prior", codes=7, length=6, classes=3, **SMALL)
    case.assert_traces_and_autocasts(model, torch.randint(7, (4, 6)), torch.tensor([0, 2, 1, 1]))
    case.assert_survives_its_file(model, tmp_path / "model.safetensors")


def test_small_codes_are_taken():
    model = CodePrior(7, 6, **SMALL)
    x = torch.randint(7, (4, 6))
    assert torch.equal(model.terms(x.to(torch.uint8)).losses["nll"], model.terms(x).losses["nll"])


@pytest.mark.parametrize(
    "vqvae",
    [lambda: MLPVQVAE(12, (16,), 6, 8), lambda: VQVAE(1, (8, 12), **VQ), lambda: VQVAE2(1, (8, 16), **VQ)],
)
def test_codes_of_a_data_set_and_back(vqvae):
    model = vqvae().eval()
    x = torch.rand(5, *model.input_shape)
    codes = encode_dataset(model, x.split(2))
    length = sum(math.prod(grid) for grid in model.grids)
    assert codes.shape == (5, length) and codes.dtype is torch.int64 and not codes.is_floating_point()
    assert torch.equal(decode_codes(model, codes), model.reconstruct(x).detach())
    with pytest.raises(ValueError, match=rf"codes must be \[n, {length}\], got \[5, {length - 1}\]"):
        decode_codes(model, codes[:, 1:])


def test_bad_input():
    model = CodePrior(7, 6, classes=3, **SMALL)
    x, label = torch.zeros(2, 6, dtype=torch.int64), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"x must be \[B, 6\], got \[2, 5\]"):
        model.terms(x[:, 1:], label)
    with pytest.raises(TypeError, match=r"x must hold codes of an integer dtype, got torch\.float32"):
        model.terms(x.float(), label)
    with pytest.raises(ValueError, match=r"label must be given, int64 \[B\] below 3"):
        model.terms(x)
    with pytest.raises(ValueError, match=r"label must be \[2\], got \[1\]"):
        model.terms(x, label[:1])
    with pytest.raises(TypeError, match=r"label must be int64, got torch\.int32"):
        model.sample(2, case.SEED, label.int())
    with pytest.raises(ValueError, match="width 16 must be a multiple of heads, got 3"):
        CodePrior(7, 6, width=16, heads=3)


@pytest.mark.slow
def test_new_digits():
    """VQ-VAE, its codes, a conditional prior over them, images: a classifier knows the digits asked for."""
    images, labels = case.digits()
    torch.manual_seed(0)
    vqvae = VQVAE(1, 8, hidden=64, dim=16, codes=32)
    case.train(vqvae, case.drawer(images * 2 - 1), 300, lr=2e-3)
    codes = encode_dataset(vqvae.eval(), (images * 2 - 1).split(256))
    prior = CodePrior(32, codes.shape[1], width=64, layers=2, classes=10)
    history = case.train(prior, case.drawer(codes, labels), 400, lr=2e-3)
    first, last = (case.mean_of(history, "nll", part) for part in (slice(1), slice(-20, None)))
    wanted = torch.arange(10).repeat(20)
    made = decode_codes(vqvae, prior.sample(len(wanted), case.SEED, wanted))
    linear_model = pytest.importorskip("sklearn.linear_model")
    classifier = linear_model.LogisticRegression(max_iter=500).fit(images.flatten(1).numpy(), labels.numpy())
    hits = (classifier.predict((made.flatten(1) / 2 + 0.5).numpy()) == wanted.numpy()).mean()
    print("nll", first, last, "recognised", hits)
    assert last < 0.7 * first and hits > 0.6
