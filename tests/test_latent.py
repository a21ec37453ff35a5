"""The tools of a latent space, each against its formula, an exact case or a planted structure."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

for package in ("sklearn", "tqdm", "safetensors"):
    pytest.importorskip(package)

from vaeops import latent, models, objectives  # noqa: E402
from vaeops.train import data as datasets  # noqa: E402
from vaeops.train.data import Dataset  # noqa: E402

SMALL = {"in_dim": 64, "hidden": (16,)}


@pytest.fixture(scope="module")
def digits():
    return datasets.load("digits", split="test")


def make(preset, **overrides):
    torch.manual_seed(0)
    return models.create(preset, **overrides).eval()


def scaled(data):
    return torch.as_tensor(data.x).float().flatten(1) / data.peak


# ---- codes


@torch.no_grad()
def test_codes_of_a_data_set(digits):
    x, label = scaled(digits), torch.as_tensor(digits.labels)
    vae, ae = make("vae-mlp", **SMALL, latent=3), make("ae-mlp", **SMALL, latent=4)
    conditional = make("cvae", **SMALL, latent=2)
    for model, mu in (
        (vae, vae.encode(x)[0]),
        (ae, ae.encode(x)),
        (conditional, conditional.encode(x, label)[0]),
    ):
        for batch in (100, 1000):
            z = latent.encode(model, digits, batch=batch)
            torch.testing.assert_close(z, mu, rtol=1e-5, atol=1e-6)
            assert z.dtype is torch.float32 and not z.requires_grad


@torch.no_grad()
def test_samples_of_codes():
    z = torch.randn(3, 4, 3)
    vae, ae = make("vae-mlp", **SMALL, latent=3), make("ae-mlp", **SMALL, latent=3)
    torch.testing.assert_close(
        latent.decode(vae, z, batch=5), vae.decode(z.view(12, 3)).sigmoid().view(3, 4, 64)
    )
    torch.testing.assert_close(latent.decode(ae, z), ae.decode(z.view(12, 3)).view(3, 4, 64))
    assert latent.decode(ae, z[0, 0]).shape == (64,) and latent.decode(ae, z[:0]).shape == (0, 4, 64)
    face = make("celeba-vae", latent=2, side=16, width=4)
    torch.testing.assert_close(latent.decode(face, z[..., :2])[1, 2], face.decode(z[1, 2:3, :2])[0])


def test_models_without_what_is_needed(digits):
    with pytest.raises(ValueError, match="model must have floating codes, those of MLPVQVAE are integers"):
        latent.encode(make("workshop-vq", **SMALL, dim=4, codes=6), digits)
    with pytest.raises(ValueError, match=r"encode: model must have encode\(\), and TinyDDPM has none"):
        latent.encode(make("ddpm-tiny"), digits)
    with pytest.raises(ValueError, match="decode: model must be in eval mode, the MLPVAE is in training"):
        latent.decode(make("vae-mlp", **SMALL, latent=3).train(), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"samples of \(784,\), those of digits are \(1, 8, 8\)"):
        latent.encode(make("vae-mlp"), digits)
    with pytest.raises(ValueError, match="dataset must have samples, nothing has none"):
        latent.encode(make("vae-mlp"), Dataset("nothing", np.zeros((0, 1, 28, 28), np.uint8)))
    with pytest.raises(ValueError, match=r"decode: z must be floating, \[\*B, D\], got torch.int64 \[2, 3\]"):
        latent.decode(make("vae-mlp", **SMALL, latent=3), torch.zeros(2, 3).long())


# ---- lines


@pytest.mark.parametrize("method", latent.METHODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_paths_begin_and_end_exactly(method, dtype):
    a, b = torch.randn(2, 3, 5).to(dtype)
    path = latent.interpolate(a, b, 7, method)
    assert path.shape == (7, 3, 5) and path.dtype is dtype
    assert torch.equal(path[0], a) and torch.equal(path[-1], b)
    assert torch.equal(latent.interpolate(a, b, 2, method), torch.stack((a, b)))
    assert torch.equal(latent.interpolate(a, a, 3, method), a.expand(3, 3, 5))


def test_linear_and_spherical():
    a, b = torch.tensor([2.0, 0, 0]).double(), torch.tensor([0.0, 2, 0]).double()
    torch.testing.assert_close(latent.interpolate(a, b, 3)[1], torch.tensor([1.0, 1, 0]).double())
    arc = latent.interpolate(a, b, 4, "spherical")
    angle = torch.linspace(0, math.pi / 2, 4).double()
    torch.testing.assert_close(arc, 2 * torch.stack((angle.cos(), angle.sin(), 0 * angle), 1))
    u, v = torch.randn(2, 1000).double()
    middle = latent.interpolate(u, v, 3, "spherical")[1].norm()
    assert middle == pytest.approx(math.sqrt(1000), rel=0.1)
    assert latent.interpolate(u, v, 3)[1].norm() == pytest.approx(math.sqrt(500), rel=0.1)


def test_a_short_arc_is_a_line():
    """Where an arc cosine in fp32 would give the angle 0, or NaN."""
    a = torch.randn(64)
    b = a + 1e-4 * torch.randn(64)
    arc, line = latent.interpolate(a, b, 5, "spherical"), latent.interpolate(a, b, 5)
    torch.testing.assert_close(arc, line, rtol=0, atol=1e-6)
    assert (arc[2] - a).norm() > 1e-4


# ---- directions


def test_a_planted_direction_is_found():
    planted = torch.tensor([0.0, 3.0, -4.0, 0.0])
    has = torch.rand(4000) < 0.3
    z = torch.randn(4000, 4) + has[:, None] * planted
    found = latent.direction(z, has)
    torch.testing.assert_close(found, planted, rtol=0, atol=0.2)
    assert torch.equal(latent.direction(z, has.numpy()), found)
    torch.testing.assert_close(latent.direction(z, ~has), -found)


def test_recipes():
    z = torch.randn(5, 3)
    old = {"Young": torch.tensor([1.0, 0, 0]), "Eyeglasses": torch.tensor([0.0, 1, 0]),
           "5_o_Clock_Shadow": torch.tensor([0.0, 0, 1])}  # fmt: skip
    for recipe, moved in {
        "Eyeglasses": (0, 1, 0),
        "Eyeglasses - Young": (-1, 1, 0),
        "- Young + Eyeglasses": (-1, 1, 0),
        "−Young": (-1, 0, 0),
        "2.5*Eyeglasses+.5 * Young": (0.5, 2.5, 0),
        " 2*5_o_Clock_Shadow - 5_o_Clock_Shadow ": (0, 0, 1),
    }.items():
        torch.testing.assert_close(latent.move(z, old, recipe) - z, torch.tensor(moved).expand(5, 3).float())
    torch.testing.assert_close(latent.move(z[0], old, {"Young": -1e-1}), z[0] - 0.1 * old["Young"])
    assert torch.equal(latent.move(z, old, {}), z)
    assert latent.move(z.bfloat16(), old, "Young").dtype is torch.bfloat16


@pytest.mark.parametrize(
    "recipe", ["", "Young Eyeglasses", "Young -", "1e5*Young", "*Young", "Young / 2", "+ - Young"]
)
def test_recipes_that_cannot_be_read(recipe):
    with pytest.raises(ValueError, match=r"recipe must be terms such as .* got '"):
        latent.move(torch.zeros(2), {"Young": torch.ones(2), "Eyeglasses": torch.ones(2)}, recipe)


def test_an_unknown_attribute_names_the_nearest():
    directions = {"Eyeglasses": torch.ones(2), "Young": torch.ones(2)}
    with pytest.raises(ValueError, match="direction 'eyeglases' is unknown: did you mean 'Eyeglasses'"):
        latent.move(torch.zeros(2), directions, "eyeglases")
    with pytest.raises(ValueError, match="direction 'Hat' is unknown; it is one of Eyeglasses, Young"):
        latent.move(torch.zeros(2), directions, {"Hat": 1.0})


# ---- planes


def test_a_plane():
    origin, a, b = torch.randn(3, 6)
    found = latent.plane(origin, a, b, 5, 2.0)
    assert found.shape == (5, 5, 6)
    torch.testing.assert_close(found[2, 2], origin)
    torch.testing.assert_close(found[2, 4], origin + 2 * a)
    torch.testing.assert_close(found[0, 3], origin + a - 2 * b)


def test_the_manifold_s_cells_have_one_share_of_the_prior():
    grid = latent.manifold(19, 0.05, 0.95)
    assert grid.shape == (19, 19, 2) and grid.dtype is torch.float32
    quantiles = torch.special.ndtr(grid.double())
    expected = torch.linspace(0.05, 0.95, 19).double()
    torch.testing.assert_close(quantiles[4, :, 0], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(quantiles[:, 7, 1], expected, rtol=0, atol=1e-6)
    assert (grid[:, 0, 0] == grid[0, 0, 0]).all()


# ---- projections


def test_principal_components():
    z = torch.randn(500, 4) * torch.tensor([0.1, 3.0, 0.1, 1.0]) + 5
    found = latent.pca(z, 2)
    assert found.points.shape == (500, 2) and found.points.dtype is torch.float32
    torch.testing.assert_close(found.points.mean(0), torch.zeros(2), rtol=0, atol=1e-5)
    values = torch.linalg.eigvalsh(torch.cov(z.T.double())).flip(0)
    torch.testing.assert_close(found.share.double(), values[:2] / values.sum(), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.points.var(0).double(), values[:2], rtol=1e-4, atol=0)
    equal = latent.pca(torch.full((5, 3), 0.1), 2)
    assert equal.share.tolist() == [0, 0] and not equal.points.any()


def test_neighbours_stay_neighbours_in_t_sne():
    labels = torch.arange(90) % 3
    z = torch.randn(90, 5) + 20 * torch.eye(5)[labels]
    points = latent.tsne(z, perplexity=10.0)
    assert points.shape == (90, 2) and points.dtype is torch.float32
    near = torch.cdist(points, points).fill_diagonal_(math.inf).argmin(1)
    assert (labels[near] == labels).all()
    assert torch.equal(latent.tsne(z, perplexity=10.0), points)


# ---- probes


def test_a_probe_of_a_planted_attribute():
    has = torch.rand(1200) < 0.25
    z = torch.randn(1200, 6) + has[:, None] * torch.tensor([3.0, 0, 0, 0, 0, 0])
    found = latent.probe(z[:1000], has[:1000])
    assert found.classes == (0, 1)
    assert found.majority == pytest.approx(float((~has[:1000]).double().mean()), abs=0.005)
    assert found.accuracy > 0.9 and found.score(z[1000:], has[1000:]) > 0.9
    probability = found.probability(z[1000:])
    torch.testing.assert_close(probability.sum(1), torch.ones(200))
    assert torch.equal(found.confidence(z[1000:]), probability.amax(1))
    moved = latent.move(z[1000:], {"it": latent.direction(z, has)}, "it")
    assert (found.probability(moved)[:, 1] > probability[:, 1]).all()
    nothing = latent.probe(torch.randn(1000, 6), has[:1000])
    assert nothing.accuracy < nothing.majority + 0.03


def test_a_probe_of_digits(digits):
    labels = torch.as_tensor(digits.labels)
    found = latent.probe(scaled(digits), digits.labels)
    assert found.classes == tuple(range(10)) and found.accuracy > 0.85 and found.majority < 0.2
    assert found.score(scaled(digits), labels) == pytest.approx(
        float((found.probability(scaled(digits)).argmax(1) == labels).double().mean())
    )
    again = latent.probe(scaled(digits), labels + 100)
    assert again.classes[0] == 100 and again.score(scaled(digits), labels + 100) > 0.9


# ---- the package


def test_active_units_is_that_of_objectives():
    assert latent.active_units is objectives.active_units


def test_scikit_learn_and_the_trainer_are_imported_only_when_needed():
    code = """
import sys, vaeops, torch
assert vaeops.latent.interpolate(torch.zeros(2), torch.ones(2), 3).shape == (3, 2)
assert not {"sklearn", "vaeops.train", "vaeops.models"} & set(sys.modules)
sys.modules["sklearn"] = None
from vaeops.latent import pca, probe, tsne
for call in (pca, lambda z: tsne(z, perplexity=2.0), lambda z: probe(z, z[:, 0] > 0)):
    try: call(torch.randn(40, 3))
    except ImportError as error: print(error)
"""
    root = Path(__file__).parent.parent
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for name, line in zip(("pca", "tsne", "probe"), result.stdout.splitlines(), strict=True):
        assert line.startswith(f"{name} needs the package scikit-learn: ")


class Flat(nn.Module):
    """A model of one's own with the protocol's names alone, its codes of two dims."""

    input_shape, input_range, classes = (1, 8, 8), None, 0

    def encode(self, x):
        return x[:, 0, :4, :2].float()


def test_any_model_with_encode(digits):
    z = latent.encode(Flat().eval(), digits)
    assert torch.equal(z, torch.as_tensor(digits.x)[:, 0, :4, :2].flatten(1).float())


@pytest.mark.parametrize(
    ("match", "call"),
    [
        (r"a and b .* torch.float32 \[2\] and torch.float32 \[3\]",
         lambda: latent.interpolate(torch.ones(2), torch.ones(3), 4)),
        (r"a and b must be floating.*torch.int64", lambda: latent.interpolate(*torch.ones(2, 2).long(), 4)),
        ("steps must be at least 2, got 1", lambda: latent.interpolate(*torch.ones(2, 2), 1)),
        (r"method must be one of \('linear', 'spherical'\), got 'cubic'",
         lambda: latent.interpolate(*torch.ones(2, 2), 3, "cubic")),
        ("must not be zero", lambda: latent.interpolate(torch.zeros(3), torch.ones(3), 3, "spherical")),
        ("opposite directions",
         lambda: latent.interpolate(torch.ones(3), -2 * torch.ones(3), 3, "spherical")),
        (r"direction: z must be a floating tensor \[N, D\], got torch.float32 \[8\]",
         lambda: latent.direction(torch.ones(8), torch.ones(8).bool())),
        (r"has must be bool \[8\], got torch.float32 \[8\]",
         lambda: latent.direction(torch.ones(8, 2), torch.ones(8))),
        (r"has must be bool \[8\], got torch.bool \[7\]",
         lambda: latent.direction(torch.ones(8, 2), torch.ones(7).bool())),
        ("true of at least 10 samples and false of as many, got 9 and 31",
         lambda: latent.direction(torch.ones(40, 2), torch.arange(40) < 9)),
        ("at least 1 samples and false of as many, got 40 and 0",
         lambda: latent.direction(torch.ones(40, 2), torch.arange(40) < 40, least=0)),
        (r"got \[3\], \[3\], \[2\]", lambda: latent.plane(torch.ones(3), torch.ones(3), torch.ones(2))),
        ("n must be at least 2 and extent positive, got 1 and 2.0",
         lambda: latent.plane(*torch.ones(3, 3), n=1)),
        ("0 < low < high < 1, got 25, 0.5 and 1.0", lambda: latent.manifold(low=0.5, high=1.0)),
        (r"pca: dims must be in \[1, 3\] for z \[9, 3\], got 4", lambda: latent.pca(torch.ones(9, 3), 4)),
        (r"tsne: dims must be in \[1, 3\] for z \[9, 5\], got 4", lambda: latent.tsne(torch.ones(9, 5), 4)),
        (r"perplexity must be in \(0, 9\), the number of rows, got 30.0",
         lambda: latent.tsne(torch.ones(9, 5))),
        ("pca: z must be finite, 1 of its rows are not",
         lambda: latent.pca(torch.tensor([[0.0, math.nan], [1, 2], [2, 1]]))),
        ("probe: z must be a floating tensor.* got list", lambda: latent.probe([[1.0]], [1])),
        (r"labels must be bool or integer \[9\], got torch.float32 \[9\]",
         lambda: latent.probe(torch.ones(9, 2), torch.ones(9))),
        ("each of at least 4 rows, got 7 of 0, 2 of 1",
         lambda: latent.probe(torch.ones(9, 2), torch.arange(9) > 6)),
        ("got 9 of 1", lambda: latent.probe(torch.ones(9, 2), torch.ones(9).bool())),
    ],
)  # fmt: skip
def test_bad_arguments(match, call):
    with pytest.raises(ValueError, match=match):
        call()
