"""From a VQ-VAE's run to new images by `vaeops train code-prior` and `vaeops sample`; and `--cache`."""

import json
import shutil

import numpy as np
import pytest
import torch

for package in ("sklearn", "tqdm", "matplotlib", "safetensors"):
    pytest.importorskip(package)
image = pytest.importorskip("PIL.Image")

from vaeops import cli, models  # noqa: E402
from vaeops.models import decode_codes, encode_dataset  # noqa: E402
from vaeops.train import checkpoint, data, evaluate  # noqa: E402

VQ = {
    "workshop-vq": ["model.hidden=(8,)", "model.dim=4", "model.codes=6"],
    "vq-vae": ["model.hidden=8", "model.inner=4", "model.blocks=1", "model.dim=4", "model.codes=7"],
}
SMALL = ["steps=2", "batch=64", "grid_every=0"]
PRIOR = [*SMALL, "model.width=8", "model.layers=1", "model.heads=1"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The runs of two VQ-VAEs on digits, split by another seed than the default."""
    folder = tmp_path_factory.mktemp("runs")
    common = [*SMALL, "split=train", "split_seed=3", "ema=0.5", "data=digits"]
    for preset, settings in VQ.items():
        assert cli.main(["train", preset, *common, *settings, "--out", str(folder / preset)]) == 0
    return folder


def scaled(split, input_range, shape):
    digits = data.load("digits", split=split, seed=3)
    return data.scale(torch.as_tensor(digits.x), digits.peak, input_range).reshape(-1, *shape)


@pytest.mark.parametrize(("preset", "length", "codes"), [("workshop-vq", 1, 6), ("vq-vae", 4, 7)])
def test_codes_are_those_of_the_training_s_images(runs, preset, length, codes):
    model = checkpoint.load_model(runs / preset)[0]
    for split in ("train", "test"):
        found = data.load("codes", runs / preset, split=split)
        expected = encode_dataset(model, [scaled(split, model.input_range, model.input_shape)])
        assert found.x.shape == (len(expected), length) and found.x.dtype == np.int32
        np.testing.assert_array_equal(found.x, expected)
        np.testing.assert_array_equal(found.labels, data.load("digits", split=split, seed=3).labels)
        assert found.extra == {"codes": codes, "source": data.codes.checksum(model)} and found.peak == 0
    newest = checkpoint.found(runs / preset / "checkpoints")[-1]
    assert np.array_equal(data.load("codes", newest, split="test").x, found.x)


def test_new_images_from_the_command_line(runs, tmp_path, capsys):
    vq, prior, picture = str(runs / "vq-vae"), str(tmp_path / "prior"), tmp_path / "samples.png"
    assert cli.main(["train", "code-prior", "--root", vq, *PRIOR, "model.classes=10", "--out", prior]) == 0
    assert json.loads((tmp_path / "prior" / "config.json").read_text())["config"]["model"] == {
        "width": 8, "layers": 1, "heads": 1, "classes": 10, "codes": 7, "length": 4,
        "source": data.codes.checksum(checkpoint.load_model(runs / "vq-vae")[0])}  # fmt: skip
    capsys.readouterr()
    assert cli.main(["eval", prior, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    model, held_out = checkpoint.load_model(tmp_path / "prior")[0], data.load("codes", vq, split="test")
    nll = model.terms(torch.as_tensor(held_out.x), torch.as_tensor(held_out.labels)).losses["nll"]
    assert result["data"] == "codes" and result["samples"] == 297
    assert result["loss_nll"] == pytest.approx(nll.item(), rel=1e-5)
    sample = ["sample", prior, "--decoder", vq, "--n", "5", "--label", "3"]
    assert cli.main([*sample, "--out", str(picture)]) == 0
    decoder = checkpoint.load_model(runs / "vq-vae")[0]
    expected = decode_codes(decoder, evaluate.draw(model, 5, label=3))
    np.testing.assert_array_equal(
        np.asarray(image.open(picture)), evaluate.grid(evaluate.as_images(expected, (-1, 1)))[..., 0]
    )


def test_the_codes_of_other_weights_are_refused(runs, tmp_path, capsys):
    """A VQ-VAE that is trained further gives its images other codes."""
    vq, prior, run = str(tmp_path / "vq"), str(tmp_path / "prior"), runs / "vq-vae"
    shutil.copytree(run, vq)
    assert cli.main(["train", "code-prior", "--root", vq, *PRIOR, "--out", prior]) == 0
    before = (tmp_path / "prior" / "config.json").read_bytes()
    assert cli.main(["train", "--resume", vq, "steps=3"]) == 0
    capsys.readouterr()
    sample = ["sample", f"{prior}/model.safetensors", "--out", str(tmp_path / "s.png"), "--decoder"]
    plot = ["plot", "samples", prior, "--out", str(tmp_path / "p.png"), "--decoder"]
    for command in (["train", "--resume", prior, "steps=3"], ["eval", prior], [*sample, vq], [*plot, vq]):
        assert cli.main(command) == 2, command
        assert "learned the codes of a VQ-VAE with other weights" in capsys.readouterr().err
    assert (tmp_path / "prior" / "config.json").read_bytes() == before
    assert cli.main([*sample, str(run)]) == 0
    assert cli.main(["eval", prior, "--root", str(run)]) == 0
    # A prior of before the checksum was kept learns on, and keeps it from then on.
    path = checkpoint.resolve(prior)
    state = checkpoint.load(path)
    del state["config"]["model"]["source"]
    checkpoint.save(path, state, keep=3)
    assert cli.main(["train", "--resume", prior, "--root", str(run), "steps=3"]) == 0
    assert "source" in checkpoint.load(prior)["config"]["model"]


def test_what_does_not_fit(runs, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    torch.manual_seed(0)
    saved = {"vae": models.create("vae-mlp", in_dim=64, hidden=(8,), latent=2),
             "vq": models.create("workshop-vq", in_dim=64, hidden=(8,), dim=4, codes=6),
             "prior": models.create("code-prior", codes=7, length=1, width=8, layers=1, heads=1)}  # fmt: skip
    file = {name: str(tmp_path / f"{name}.safetensors") for name in saved}
    for name, model in saved.items():
        models.save(model, file[name])
    vq, other = str(runs / "workshop-vq"), str(runs / "vq-vae")
    train, out = ["train", "code-prior", *PRIOR, "--out", str(tmp_path / "run")], str(tmp_path / "s.png")
    for command, error in (
        (train, "codes: root must be the folder of a VQ-VAE's run, or a checkpoint of it, got None"),
        ([*train, "--root", str(tmp_path / "empty")], "there is no checkpoint in"),
        ([*train, "--root", file["vae"]], "vae.safetensors holds no VQ-VAE but a MLPVAE"),
        ([*train, "--root", file["vq"]], "does not say what it was trained on: give the folder"),
        ([*train, "--root", vq, "model.codes=9"], "CodePrior has 9 codes, the data set has 6"),
        ([*train, "--root", vq, "model.length=2"], "takes samples of (2,), those of codes are (1,)"),
        ([*train, "--root", vq, "cache=X"], "digits takes no cache; celeba and images do"),
        ([*train, "--root", vq, "size=8"], "codes takes no size"),
        (["train", "vae-mlp", "data=codes", *SMALL, "--root", vq], "those of codes are (1,)"),
        (["train", "vae-mlp", "data=codes", *SMALL, "--root", vq, "model.in_dim=1"],
         "MLPVAE has no codes, the data set has 6"),
        (["eval", file["prior"], "--data", "codes", "--root", vq], "has 7 codes, the data set has 6"),
        (["sample", file["prior"], "--decoder", vq, "--out", out], "CodePrior has 7 codes, the model of"),
        (["sample", file["prior"], "--decoder", file["vae"], "--out", out], "holds no VQ-VAE but a MLPVAE"),
        (["sample", file["prior"], "--out", out], "samples of code-prior are codes: give the --decoder"),
        (["sample", file["vae"], "--out", out.replace("png", "jpg")], "must end in .png, got"),
        (["sample", file["vae"], "--decoder", vq, "--out", out], "MLPVAE has no codes, the model of"),
        (["sample", file["prior"], "--decoder", other, "--out", out], "codes must be [n, 4], got [64, 1]"),
    ):  # fmt: skip
        assert cli.main(command) == 2
        assert error in capsys.readouterr().err, command
    assert not (tmp_path / "run" / "log.jsonl").exists()
    assert not [*tmp_path.glob("s.*")]


@pytest.fixture
def pictures(tmp_path):
    """Grey images of 8x8 in a folder where no cache can be made."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (20, 8, 8)).astype(np.uint8)):
        image.fromarray(pixels).save(folder / f"{i:02d}.png")
    (folder / "vaeops-cache").write_text("a file where the folder should be")
    return str(folder)


def test_a_root_that_cannot_be_written(pictures, tmp_path, capsys):
    """Of `images` and of codes of them: the cache is elsewhere, and is the training's unless one is named."""
    run, cache, vq = (str(tmp_path / name) for name in ("run", "cache", "vq"))
    refusal = "--cache names another folder"
    train = ["train", "vae-mlp", "data=images", "steps=1", "batch=8", "grid_every=0", "model.hidden=(4,)"]
    train += ["split=train", "--root", pictures, "--out", run]
    assert cli.main(train) == 2 and refusal in capsys.readouterr().err
    assert cli.main([*train, f"cache={cache}"]) == 0
    capsys.readouterr()
    assert cli.main(["eval", run, "--split", "valid", "--json"]) == 0
    expected = json.loads(capsys.readouterr().out)
    saved = ["eval", f"{run}/model.safetensors", "--data", "images", "--root", pictures, "--split", "valid"]
    assert cli.main([*saved, "--json"]) == 2 and refusal in capsys.readouterr().err
    assert cli.main([*saved, "--json", "--cache", cache]) == 0
    assert json.loads(capsys.readouterr().out)["mse"] == expected["mse"]
    assert cli.main([*saved, "--json", "--cache", cache, "--outliers", "digits"]) == 0
    assert "auroc" in json.loads(capsys.readouterr().out)
    with pytest.raises(SystemExit):
        cli.main(["eval", run, "--data", "digits", "--cache", cache])
    assert "--cache is of celeba, codes, images; digits has none" in capsys.readouterr().err

    settings = [
        "data=images",
        "steps=1",
        "batch=8",
        "grid_every=0",
        f"cache={cache}",
        "model.side=8",
        *VQ["vq-vae"],
    ]
    assert cli.main(["train", "vq-vae", *settings, "--root", pictures, "--out", vq]) == 0
    assert data.load("codes", vq).x.shape == (16, 4)
    (tmp_path / "cache").rename(tmp_path / "moved")
    (tmp_path / "cache").write_text("no folder any more")
    with pytest.raises(OSError, match=refusal):
        data.load("codes", vq)
    assert data.load("codes", vq, cache=tmp_path / "moved").x.shape == (16, 4)
