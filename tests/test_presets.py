"""Models by name, and their files."""

import os

import pytest
import torch

from vaeops.models import MLPVAE, create, load, presets, save
from vaeops.nn import VGGTrunk

SMALL = {"in_dim": 12, "hidden": [8], "latent": 3}


def test_presets_are_listed_and_remembered():
    assert {"tiny-2d", "vae-mlp", "workshop-vq", "celeba-vae-xl"} <= set(presets())
    model = create("vae-mlp", **SMALL, ops="ref")
    assert isinstance(model, MLPVAE) and model.input_shape == (12,)
    assert model.preset == "vae-mlp" and model.overrides == SMALL | {"ops": "ref"}
    assert create("vae-mlp-10", **SMALL).weights["kl"] == 4 and create("tiny-2d").weights["kl"] == 0.025


def test_names_the_nearest():
    with pytest.raises(ValueError, match=r"create: preset 'vea-mlp' is unknown: did you mean 'vae-mlp'"):
        create("vea-mlp")
    with pytest.raises(ValueError, match="is unknown; it is one of tiny-2d, "):
        create("?")
    with pytest.raises(ValueError, match=r"argument 'latnet' is unknown: did you mean 'latent'"):
        create("vae-mlp", latnet=3)


@pytest.fixture
def path(tmp_path):
    pytest.importorskip("safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize(
    ("preset", "overrides"),
    [("vae-mlp", SMALL), ("tiny-2d", {}), ("celeba-vae", {"side": 8, "width": 4, "latent": 3})],
)
def test_a_saved_model_comes_back(path, preset, overrides):
    model = create(preset, **overrides).to(memory_format=torch.channels_last)
    x = torch.rand(4, *model.input_shape)
    model.terms(x)  # moves the running statistics of batch norm
    save(model, path)
    again = load(path)
    assert (again.preset, again.overrides) == (preset, overrides) and not again.training
    torch.testing.assert_close(again.reconstruct(x), model.eval().reconstruct(x))
    state = again.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert os.listdir(path.parent) == [path.name]
    assert load(path, ops="ref").overrides == overrides | {"ops": "ref"}


def test_a_trunk_stays_out_of_the_file(path):
    trunk = VGGTrunk.random("vgg11", 0, input_range=(-1.0, 1.0))
    save(create("celeba-vae", side=8, width=4, latent=3, trunk=trunk), path)
    assert path.stat().st_size < 200_000
    assert load(path).trunk is None
    assert load(path, trunk=trunk).weights["perceptual"] == 0.01


def test_a_failed_save_keeps_the_old_file(path, monkeypatch):
    save(create("vae-mlp", **SMALL), path)
    before = path.read_bytes()

    def full(_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        save(create("vae-mlp", **SMALL), path)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_refuses_to_save_what_create_did_not_make(path):
    with pytest.raises(ValueError, match=r"must come from create\(\), got a MLPVAE"):
        save(MLPVAE(12, (8,), 3), path)
    model = create("vae-mlp", **SMALL)
    model.overrides["beta"] = torch.tensor(1.0)
    with pytest.raises(TypeError, match="overrides must be plain values"):
        save(model, path)
    assert not path.exists()


def test_refuses_wrong_files(path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load(path)
    save(create("vae-mlp", **SMALL), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors is no safetensors file, or is damaged"):
        load(path)
    path.write_bytes(b"not at all")
    with pytest.raises(ValueError, match="is no safetensors file"):
        load(path)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"was not written by save\(\)"):
        load(path)
    save_file({"a": torch.zeros(2)}, path, {"preset": "vae-mlp", "overrides": "{}"})
    with pytest.raises(ValueError, match=r"does not fit the preset 'vae-mlp': (?s:.*)Missing key"):
        load(path)
    save_file({"a": torch.zeros(2)}, path, {"preset": "vea-mlp", "overrides": "{}"})
    with pytest.raises(ValueError, match=r"model.safetensors does not fit .* did you mean 'vae-mlp'"):
        load(path)
