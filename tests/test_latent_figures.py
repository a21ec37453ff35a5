"""The experiments on latent spaces: on models of which the answer is known, then as commands."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

for package in ("sklearn", "tqdm", "safetensors", "torchmetrics", "PIL"):
    pytest.importorskip(package)

from test_data_celeba import celeba_files, write  # noqa: E402

from vaeops import cli, models  # noqa: E402
from vaeops.train import config, data as datasets, latent_figures, loop  # noqa: E402
from vaeops.train.data import Dataset  # noqa: E402

ROOT = Path(os.environ.get("VAEOPS_DATA", "data"))
NAMES = ("Smiling", "Eyeglasses", "Young")


class Planes(nn.Module):
    """Images 1x4x4 whose code is their projection on six orthonormal ones; heard: 0 where decode is deaf."""

    input_shape, input_range, classes = (1, 4, 4), None, 0

    def __init__(self):
        super().__init__()
        self.basis = torch.linalg.qr(torch.randn(16, 16))[0][:6]
        self.heard = torch.ones(6)

    def encode(self, x):
        return x.flatten(1) @ self.basis.T

    def decode(self, z):
        return (z * self.heard @ self.basis).view(-1, 1, 4, 4)


def planted(model, n, seed):
    """Faces whose first three codes are 4 where they have an attribute, and normal noise."""
    drawn = torch.Generator().manual_seed(seed)
    has = torch.rand(n, 3, generator=drawn) < torch.tensor([0.5, 0.2, 0.7])
    z = torch.randn(n, 6, generator=drawn)
    z[:, :3] += 4 * has
    return Dataset(
        "planted", (z @ model.basis).view(n, 1, 4, 4), peak=0, attributes=has.numpy(), attribute_names=NAMES
    )


def test_directions_give_a_planted_attribute():
    model = Planes().eval()
    train, test = planted(model, 1000, 0), planted(model, 400, 1)
    told, shifts = latent_figures.faces(model, train, test)
    for name, share in zip(NAMES, (0.5, 0.2, 0.7)):
        assert told[name].majority == pytest.approx(max(share, 1 - share), abs=0.08)
        assert told[name].probe > 0.95 > told[name].majority and told[name].auroc > 0.98
    assert list(shifts) == list(latent_figures.RECIPES)
    smile = shifts["Smiling"]["Smiling"]
    assert smile.faces == int((~test.attribute("Smiling")).sum())
    assert smile.before < 0.1 and smile.after > 0.9 and smile.crossed > 0.9 and smile.other < 0.5
    assert shifts["2*Smiling"]["Smiling"].after > smile.after
    less = shifts["-Smiling"]["Smiling"]
    assert less.before > 0.9 and less.after < 0.1 and less.crossed > 0.9
    both = shifts["Eyeglasses - Young"]
    assert both["Eyeglasses"].after > 0.9 and both["Young"].after < 0.1 and both["Young"].before > 0.9
    start = test.attribute("Young") & ~test.attribute("Eyeglasses")
    assert both["Young"].faces == both["Eyeglasses"].faces == int(start.sum())


def test_directions_that_the_decoder_does_not_hear():
    """A probe of the moved code itself would be deceived; that of the decoded and encoded face is not."""
    model = Planes().eval()
    model.heard[0] = 0
    told, shifts = latent_figures.faces(model, planted(model, 1000, 0), planted(model, 400, 1), ["Smiling"])
    smile = shifts["Smiling"]["Smiling"]
    assert told["Smiling"].probe > 0.95
    assert smile.crossed < 0.1 and abs(smile.after - smile.before) < 0.1


def test_attributes_that_do_not_serve():
    model = Planes().eval()
    train, test = planted(model, 200, 0), planted(model, 100, 1)
    with pytest.raises(ValueError, match="attribute 'Smilling' is unknown: did you mean 'Smiling'"):
        latent_figures.faces(model, train, test, ["Smilling"])
    test.attributes[:, 1] = test.attributes[:, 2]
    with pytest.raises(ValueError, match="planted: 'Eyeglasses - Young' has no test face to begin with"):
        latent_figures.faces(model, train, test, ["Eyeglasses - Young"])
    test.attributes[:, 0] = True
    with pytest.raises(ValueError, match="planted: Smiling must be true of some test faces and false of"):
        latent_figures.faces(model, train, test, ["Smiling"])
    train.attributes[9:, 0] = False
    with pytest.raises(ValueError, match="true of at least 10 samples"):
        latent_figures.faces(model, train, test, ["Smiling"])


class Curve(Planes):
    """Decodes to a straight line, or with `jump` to one of two ends."""

    input_range = (0.0, 1.0)

    def __init__(self, jump):
        super().__init__()
        self.jump = jump

    def decode(self, z):
        x = super().decode(z)
        return (x > 0).float() if self.jump else x


@pytest.fixture(scope="module")
def digits():
    return [datasets.load("digits", split=split) for split in ("train", "test")]


@pytest.fixture(scope="module")
def judge(digits):
    return latent_figures.classifier(*digits)


def test_the_classifier(digits, judge):
    assert 0.9 < judge.accuracy < 1
    x = torch.as_tensor(digits[1].x).float() / 16
    confidence = judge.confidence(x)
    assert confidence.shape == (len(x),) and confidence.mean() > 0.6
    assert judge.confidence(torch.rand(500, 64)).mean() < confidence.mean()


def test_smoothness_of_lines():
    x = np.random.default_rng(0).random((60, 1, 4, 4), dtype=np.float32)
    data = Dataset("noise", x, np.arange(60) % 3, peak=0)

    class Half:
        def confidence(self, images):
            assert images.shape[1:] == (1, 4, 4)
            return torch.full((len(images),), 0.5)

    straight = latent_figures.smoothness(Curve(False).eval(), data, Half(), pairs=20)
    assert (
        straight.step == pytest.approx(1, abs=1e-4) and straight.error < 1e-4 and straight.confidence == 0.5
    )
    jumps = latent_figures.smoothness(Curve(True).eval(), data, Half(), pairs=20)
    assert 2 < jumps.step <= 10 and jumps.error > 0


def test_holes(digits, judge):
    torch.manual_seed(0)
    ae = models.create("ae-mlp", in_dim=64, hidden=(16,), latent=4).eval()
    vae = models.create("vae-mlp", in_dim=64, hidden=(16,), latent=3).eval()
    found = latent_figures.holes(ae, vae, digits[1], judge, samples=50)
    x = torch.as_tensor(digits[1].x[:50]).float().flatten(1) / 16
    assert found["the data"].confidence == pytest.approx(float(judge.confidence(x).mean()))
    assert found["the data"].share == float((judge.confidence(x) >= 0.9).double().mean())
    drawn = judge.confidence(ae.reconstruct(x)).mean()
    assert found["reconstructed, autoencoder"].confidence == pytest.approx(float(drawn))
    assert len(found) == 6 and all(0 <= sure.share <= 1 for sure in found.values())
    assert latent_figures.holes(ae, vae, digits[1], judge, samples=50) == found


def test_the_command_on_digits(tmp_path, capsys):
    torch.manual_seed(0)
    for preset in ("ae-mlp", "vae-mlp"):
        models.save(
            models.create(preset, in_dim=64, hidden=(16,), latent=3), tmp_path / f"{preset}.safetensors"
        )
    files = [str(tmp_path / f"{preset}.safetensors") for preset in ("ae-mlp", "vae-mlp")]
    assert cli.main(["experiment", "latent-digits", *files, "--data", "digits"]) == 0
    printed = capsys.readouterr().out
    assert re.search(
        r"^ae-mlp, saved model; vae-mlp, saved model; digits, test; .* about 0\.9\d+ of it$", printed, re.M
    )
    for line in ("of the autoencoder", "of the VAE"):
        assert re.search(rf"^{line} +\d+\.\d+ +\d\.\d+ +0\.\d+$", printed, re.M)
    assert len(re.findall(r"^z of .* +[01]\.\d+ +[01]\.\d+$", printed, re.M)) == 3
    with pytest.raises(SystemExit):
        cli.main(["experiment", "latent-digits", *files[::-1], "--data", "digits"])
    assert "MLPAutoencoder does not sample" in capsys.readouterr().err


def test_the_command_on_faces(tmp_path, capsys):
    write(celeba_files([(16, 16)] * 60, [0] * 40 + [2] * 20), tmp_path / "celeba")
    torch.manual_seed(0)
    models.save(models.create("celeba-vae", latent=2, side=16, width=2), tmp_path / "m.safetensors")
    command = ["experiment", "latent-faces", str(tmp_path / "m.safetensors"), "--root", str(tmp_path)]
    assert cli.main([*command, "--recipe", "Smiling", "--recipe=-Smiling + Eyeglasses"]) == 0
    printed = capsys.readouterr().out
    assert "directions and probes of 40 training faces, figures of 20 test faces" in printed
    assert re.search(r"^Smiling +Smiling +\d+( +[01]\.\d+){3} +(nan|[01]\.\d+)$", printed, re.M)
    assert len(re.findall(r"^-Smiling \+ Eyeglasses ", printed, re.M)) == 2
    with pytest.raises(SystemExit):
        cli.main(command)  # there is no Young here
    assert "attribute 'Young' is unknown" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "celeba_64.tar").exists(),
                    reason=f"no celeba_64.tar in {ROOT}: set VAEOPS_DATA")  # fmt: skip
def test_directions_of_real_faces(tmp_path):
    """A small VAE, trained for a short while, already gives smiles and glasses that its probe sees again."""
    settings = {"root": str(ROOT / "celeba_64.tar"), "cache": str(tmp_path), "size": 32, "steps": 300,
                "model": {"side": 32, "width": 8, "latent": 64}, "beta": 0.2, "lr_schedule": "cosine",
                "grid_every": 0, "checkpoint_every": 0, "out": str(tmp_path / "run")}  # fmt: skip
    model = loop.train(config.make("celeba-vae", **settings)).model
    train, test = (datasets.load("celeba", settings["root"], split=split, size=32, cache=tmp_path)
                   for split in ("train", "test"))  # fmt: skip
    told, shifts = latent_figures.faces(model, train, test)
    print(told, shifts)
    assert told["Smiling"].probe > told["Smiling"].majority
    for name in ("Smiling", "Eyeglasses"):
        assert told[name].auroc > 0.6
        once, twice = shifts[name][name], shifts[f"2*{name}"][name]
        assert twice.before + 0.05 < twice.after and once.before < once.after < twice.after
        assert twice.after - twice.before > 5 * abs(twice.other - twice.before)
    both = shifts["2*Eyeglasses - 2*Young"]
    assert both["Eyeglasses"].after > both["Eyeglasses"].before + 0.05
    assert both["Young"].after < both["Young"].before - 0.05
