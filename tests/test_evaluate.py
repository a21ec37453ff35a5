"""`vaeops eval` and `vaeops sample`: every figure against its own definition, then both commands."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

for package in ("torchmetrics", "sklearn", "tqdm", "safetensors"):
    pytest.importorskip(package)

from vaeops import cli, models, perplexity  # noqa: E402
from vaeops.train import data as datasets, evaluate, metrics  # noqa: E402
from vaeops.train.data import Dataset  # noqa: E402

ROOT = Path(os.environ.get("VAEOPS_DATA", "data"))
SMALL = {"in_dim": 64, "hidden": (16,)}


@pytest.fixture(scope="module")
def digits():
    return datasets.load("digits", split="test")


def make(preset, **overrides):
    torch.manual_seed(0)
    return models.create(preset, **overrides).eval()


def scaled(data):
    return torch.as_tensor(data.x).float().flatten(1) / data.peak


@torch.no_grad()
def test_a_vae(digits):
    model = make("vae-mlp", **SMALL, latent=3)
    result = evaluate.evaluate(model, digits, nll_samples=32)
    x = scaled(digits)
    recon = model.reconstruct(x)
    assert result["mse"] == pytest.approx(float((recon - x).square().mean()), rel=1e-5)
    pictures = recon.view(-1, 1, 8, 8), x.view(-1, 1, 8, 8)
    assert result["psnr"] == pytest.approx(float(metrics.psnr(*pictures, (0, 1)).mean()), rel=1e-5)
    assert "ssim" not in result  # 8x8 is smaller than its window
    mu, logvar = model.encode(x)
    kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).mean(0)
    assert result["kl_dim"] == pytest.approx(kl.tolist(), rel=1e-4)
    assert result["loss_kl"] == pytest.approx(float(kl.sum()), rel=1e-4)
    assert result["active_units"] == int((mu.var(0) > 0.01).sum())
    assert result["mean_abs_mu"] == pytest.approx(float(mu.mean(0).abs().mean()), rel=1e-4)
    assert result["mean_logvar"] == pytest.approx(float(logvar.mean()), rel=1e-4)
    assert result["iwae_nll"] < result["loss_recon"] + result["loss_kl"]


def test_neither_the_size_of_a_batch_nor_a_second_run_changes_a_figure(digits):
    model = make("vae-mlp", **SMALL, latent=3)
    whole, parts = (evaluate.evaluate(model, digits, batch=batch) for batch in (1000, 64))
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        assert parts[name] == pytest.approx(value, rel=1e-4), name
    assert evaluate.evaluate(model, digits, batch=64) == parts
    assert evaluate.evaluate(model, digits, batch=64, seed=1)["loss_recon"] != parts["loss_recon"]


def test_an_image_model_has_ssim():
    x = np.random.default_rng(0).integers(0, 256, (20, 1, 28, 28)).astype(np.uint8)
    model = make("vae-conv", latent=2)
    result = evaluate.evaluate(model, Dataset("noise", x), batch=8)
    x = torch.as_tensor(x).float() / 255
    expected = metrics.ssim(model.reconstruct(x), x, (0, 1)).mean()
    assert result["ssim"] == pytest.approx(float(expected), rel=1e-4)


def test_a_conditional_vae_is_told_the_labels(digits):
    model = make("cvae", **SMALL, latent=3)
    right = evaluate.evaluate(model, digits)
    x, label = scaled(digits), torch.as_tensor(digits.labels)
    assert right["mse"] == pytest.approx(float((model.reconstruct(x, label) - x).square().mean()), rel=1e-5)


def test_a_code_book(digits):
    model = make("workshop-vq", **SMALL, dim=4, codes=6)
    result = evaluate.evaluate(model, digits, batch=100)
    counts = torch.bincount(model.encode(scaled(digits)), minlength=6)
    assert result["perplexity"] == pytest.approx(float(perplexity(counts)), rel=1e-5)
    assert result["codes_used"] == int((counts > 0).sum())
    assert "active_units" not in result


def test_points_have_no_pictures():
    result = evaluate.evaluate(make("tiny-2d"), datasets.load("points", split="test"))
    assert {"loss_recon", "loss_kl", "mse", "active_units"} <= result.keys()
    assert not {"psnr", "ssim"} & result.keys()


class Fixed(nn.Module):
    """Ranks the items by their number, whoever asks: item 0 first."""

    input_shape, input_range, classes = (150,), (0.0, 1.0), 0

    def terms(self, x, label=None, *, seed=None, eps=None, row=0):
        return models.Terms({"recon": x.mean()}, {})

    def reconstruct(self, x, label=None):
        return -torch.arange(150.0).expand(len(x), -1)


def test_rankings():
    x, held_out = np.zeros((3, 150), np.uint8), np.zeros((3, 150), np.uint8)
    x[:, :10] = 1
    held_out[0, 10:20] = 1  # right behind what is known
    held_out[1, 149] = 1  # last of all; nothing of the third user
    data = Dataset("users", x, peak=1, extra={"held_out": held_out})
    result = evaluate.evaluate(Fixed(), data, popularity=torch.arange(150), batch=2)
    assert [result[f"recall@{k}"] for k in (20, 50, 100)] == [0.5, 0.5, 0.5]
    assert result["ndcg@20"] == pytest.approx(0.5)
    assert result["popularity_recall@20"] == 0.5  # the second user's
    assert "mse" not in result


def test_what_does_not_apply(digits):
    with pytest.raises(ValueError, match="MLPAutoencoder has no likelihood: nll_samples must be 0, got 5"):
        evaluate.evaluate(make("ae-mlp", **SMALL, latent=4), digits, nll_samples=5)
    with pytest.raises(ValueError, match=r"samples of \(784,\), those of digits are \(1, 8, 8\)"):
        evaluate.evaluate(make("vae-mlp"), digits)


def test_errors_tell_outliers(digits):
    model = make("ae-mlp", **SMALL, latent=4)
    inliers = evaluate.errors(model, digits, batch=100)
    x = scaled(digits)
    np.testing.assert_allclose(inliers, (model.reconstruct(x) - x).square().mean(1), rtol=1e-4)
    with pytest.raises(ValueError, match="CodePrior does not reconstruct"):
        evaluate.errors(make("code-prior", codes=4, length=2, width=8, layers=1, heads=1), digits)


def test_draw():
    model = make("vae-mlp", **SMALL, latent=3)
    many = evaluate.draw(model, 300, seed=1)
    assert many.shape == (300, 64)
    torch.testing.assert_close(evaluate.draw(model, 270, seed=1), many[:270], rtol=0, atol=1e-6)
    assert not torch.allclose(many[:44], many[256:])  # another batch, other noise
    assert not torch.allclose(evaluate.draw(model, 5, seed=2), many[:5])
    with pytest.raises(ValueError, match=r"label must be .* which has no labels, got 0"):
        evaluate.draw(model, 5, label=0)
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        evaluate.draw(model, 0)
    with pytest.raises(ValueError, match="MLPAutoencoder does not sample"):
        evaluate.draw(make("ae-mlp", **SMALL, latent=4), 5)


def test_draw_of_a_label():
    model = make("cvae", **SMALL, latent=3)
    turns, fives = evaluate.draw(model, 12), evaluate.draw(model, 12, label=5)
    same = [bool(torch.allclose(a, b, atol=1e-6)) for a, b in zip(turns, fives)]
    assert same == [i == 5 for i in range(12)]
    with pytest.raises(ValueError, match="labels 0 to 9, got 10"):
        evaluate.draw(model, 12, label=10)


def test_images_and_their_grid():
    x = torch.linspace(-1, 1, 5).view(5, 1, 1, 1).expand(5, 3, 4, 6)
    picture = evaluate.grid(evaluate.as_images(x, (-1, 1)))
    assert picture.shape == (2 * 6, 3 * 8, 3)  # two rows of three, a pixel around each
    assert picture[3::6, 3::8, 0].tolist() == [[0, 64, 128], [191, 255, 255]]
    assert (picture[0] == 255).all() and (picture[:, 0] == 255).all()
    assert evaluate.as_images(torch.rand(2, 64), (0, 1)).shape == (2, 1, 8, 8)
    for bad, shape in ((torch.rand(2, 65), r"\[65\]"), (torch.rand(2, 4, 8, 8), r"\[4, 8, 8\]")):
        with pytest.raises(ValueError, match=rf"samples of shape {shape} are no images"):
            evaluate.as_images(bad, (0, 1))


@pytest.fixture
def saved(tmp_path):
    model = make("vae-mlp", **SMALL, latent=3)
    models.save(model, tmp_path / "vae.safetensors")
    return model, str(tmp_path / "vae.safetensors")


def test_eval_prints_a_table_or_json(saved, digits, capsys):
    model, path = saved
    assert evaluate.main([path, "--data", "digits", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["model"], result["loaded"], result["samples"]) == ("vae-mlp", "saved model", len(digits))
    assert result["mse"] == pytest.approx(evaluate.evaluate(model, digits)["mse"])
    assert evaluate.main([path, "--data", "digits"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0] == f"vae-mlp, saved model; digits, test, {len(digits)} samples"
    names = [line.split()[0] for line in table[1:] if line[0] != " "]
    assert names == [name for name in result if name not in ("model", "loaded", "data", "split", "samples")]


def test_json_has_null_for_what_is_not_finite(saved, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "evaluate", lambda *_, **__: {"psnr": float("inf"), "active_units": 3})
    evaluate.main([saved[1], "--data", "digits", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["psnr"] is None and result["active_units"] == 3


def test_eval_says_what_is_missing(saved, capsys):
    for arguments, error in (([], "does not say what it was trained on: give --data"),
                             (["--data", "digits", "--features", "f.npy"], "needs --extractor"),
                             (["--batch", "0"], "argument --batch: must be at least 1, got 0")):  # fmt: skip
        with pytest.raises(SystemExit):
            evaluate.main([saved[1], *arguments])
        assert error in capsys.readouterr().err


class Halves(nn.Module):
    """Two features of an image: the mean of its upper and of its lower half."""

    def forward(self, x):
        return torch.stack((x[:, :, :4].flatten(1).mean(1), x[:, :, 4:].flatten(1).mean(1)), 1)


def test_the_frechet_distance_of_samples(saved, digits, tmp_path, capsys):
    model, path = saved
    shape = ({0: torch.export.Dim.DYNAMIC},)
    torch.export.save(torch.export.export(Halves(), (torch.rand(4, 1, 8, 8),), dynamic_shapes=shape),
                      tmp_path / "halves.pt2")  # fmt: skip
    of_data = Halves()(scaled(digits).view(-1, 1, 8, 8)).numpy()
    of_samples = Halves()(evaluate.draw(model, 50).view(-1, 1, 8, 8)).numpy()
    expected = metrics.frechet(metrics.moments(of_samples), metrics.moments(of_data))
    np.save(tmp_path / "data.npy", of_data)
    extractor = ["--samples", "50", "--extractor", str(tmp_path / "halves.pt2")]
    for more in ([], ["--features", str(tmp_path / "data.npy")]):
        evaluate.main([path, "--data", "digits", "--json", *extractor, *more])
        assert json.loads(capsys.readouterr().out)["frechet"] == pytest.approx(expected, rel=1e-4)


def test_sample_writes_a_picture_and_an_array(saved, tmp_path, capsys):
    image = pytest.importorskip("PIL.Image")
    model, path = saved
    png, npy = tmp_path / "new" / "s.png", tmp_path / "s.npy"
    assert evaluate.sample_main([path, "--n", "9", "--out", str(png), "--npy", str(npy), "--seed", "3"]) == 0
    assert str(png) in capsys.readouterr().out
    expected = evaluate.draw(model, 9, seed=3)
    np.testing.assert_array_equal(np.load(npy), expected)
    np.testing.assert_array_equal(
        np.asarray(image.open(png)), evaluate.grid(evaluate.as_images(expected, (0, 1)))[..., 0]
    )
    assert image.open(png).size == (30, 30)


def test_what_is_no_picture_needs_an_array(tmp_path):
    model = make("tiny-2d")
    models.save(model, path := tmp_path / "points.safetensors")
    with pytest.raises(ValueError, match=r"samples of shape \[2\] are no images"):
        evaluate.sample_main([str(path), "--out", str(tmp_path / "s.png")])
    assert not (tmp_path / "s.png").exists()
    evaluate.sample_main([str(path), "--npy", str(tmp_path / "s.npy")])
    assert np.load(tmp_path / "s.npy").shape == (64, 2)


def test_a_prior_of_codes_draws_pictures_by_its_decoder(tmp_path):
    image = pytest.importorskip("PIL.Image")
    decoder = make("workshop-vq", **SMALL, dim=4, codes=6)
    prior = make("code-prior", codes=6, length=1, width=8, layers=1, heads=1)
    models.save(decoder, tmp_path / "vq.safetensors")
    models.save(prior, tmp_path / "prior.safetensors")
    picture = tmp_path / "s.png"
    evaluate.sample_main([str(tmp_path / "prior.safetensors"), "--decoder", str(tmp_path / "vq.safetensors"),
                          "--n", "4", "--out", str(picture)])  # fmt: skip
    expected = decoder.decode(evaluate.draw(prior, 4)[:, 0]).detach()
    np.testing.assert_array_equal(
        np.asarray(image.open(picture)), evaluate.grid(evaluate.as_images(expected, (0, 1)))[..., 0]
    )


def test_a_run_of_the_trainer(tmp_path, digits, capsys):
    run = str(tmp_path / "run")
    settings = ["data=digits", "steps=3", "ema=0.5", "grid_every=0", "model.latent=3", "model.hidden=(16,)"]
    assert cli.main(["train", "vae-mlp", *settings, "--out", run]) == 0
    capsys.readouterr()
    assert cli.main(["eval", run, "--json", "--outliers", "digits"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["data"], result["loaded"]) == ("digits", "averaged weights of step 3")
    averaged = models.load(tmp_path / "run" / "model.safetensors")
    assert result["mse"] == pytest.approx(evaluate.evaluate(averaged, digits)["mse"])
    assert result["auroc"] == 0.5  # of a data set against itself
    assert cli.main(["sample", run, "--npy", str(tmp_path / "s.npy"), "--n", "2"]) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "s.npy"), evaluate.draw(averaged, 2))


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "ml-100k").is_dir(), reason=f"no ml-100k/ in {ROOT}: set VAEOPS_DATA")
def test_a_recommender_beats_popularity(tmp_path, capsys):
    run = str(tmp_path / "run")
    settings = ["steps=150", "beta_steps=150", "lr=2e-3", "model.hidden=(100,)", "model.latent=20"]
    assert cli.main(["train", "mult-vae", *settings, "--root", str(ROOT), "--out", run]) == 0
    capsys.readouterr()
    assert cli.main(["eval", run, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    for name in ("recall@20", "recall@50", "ndcg@100"):
        assert result[name] > 1.2 * result[f"popularity_{name}"], name
    assert "mse" not in result


@pytest.mark.parametrize(("name", "error"), [
    ("foo", "torch knows no 'foo'"), ("meta", "torch keeps no tensors on 'meta' here"),
    ("xla", "torch keeps no tensors on 'xla' here"), ("cuda:99", "torch finds "),
])  # fmt: skip
def test_a_device_that_is_not_there(name, error, tmp_path, capsys):
    for command in (["eval"], ["sample"], ["plot", "samples"]):
        with pytest.raises(SystemExit) as stop:
            cli.main([*command, str(tmp_path), "--device", name])
        assert stop.value.code == 2 and f"device: {error}" in capsys.readouterr().err
    assert cli.main(["train", "tiny-2d", f"device={name}", "--out", str(tmp_path / "run")]) == 2
    assert f"device: {error}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_extractor_that_is_none(tmp_path, capsys):
    (tmp_path / "hi.txt").write_text("hi")
    models.save(models.create("vae-mlp", in_dim=64, hidden=(4,), latent=2), tmp_path / "m.safetensors")
    command = ["eval", str(tmp_path / "m.safetensors"), "--data", "digits", "--extractor"]
    assert cli.main([*command, str(tmp_path / "hi.txt")]) == 2
    assert "hi.txt is no program of torch.export" in capsys.readouterr().err
    assert cli.main([*command, str(tmp_path / "none.pt2")]) == 2
    assert "none.pt2" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["eval", "sample"])
def test_a_file_that_is_not_there(command, tmp_path, capsys):
    assert cli.main([command, str(tmp_path / "none.pt")]) == 2
    assert capsys.readouterr().err.startswith(f"vaeops {command}: there is no checkpoint")
