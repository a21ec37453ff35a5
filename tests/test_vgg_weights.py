"""Where a trunk's weights come from: dicts and files of torchvision's, Keras' and NumPy's names, strictly."""

import hashlib
import logging
import pickle
import sys

import numpy as np
import pytest
import torch
from perceptual_case import state_dict, stored, trunk

from vaeops import VGGTrunk
from vaeops.ref import perceptual as ref


@pytest.mark.parametrize("arch", ["vgg11", "vgg11_bn"])
def test_state_dict(arch):
    found = state_dict(arch) | {"classifier.0.weight": torch.zeros(3), "classifier.0.bias": torch.zeros(3)}
    if arch.endswith("_bn"):
        found["features.1.num_batches_tracked"] = torch.tensor(7)
    for entries in (found, state_dict(arch, "")):
        net = VGGTrunk.from_state_dict(entries, arch)
        assert net.checksum == trunk(arch).checksum
    assert VGGTrunk.random(arch, 0).checksum == trunk(arch).checksum != VGGTrunk.random(arch, 1).checksum
    if arch == "vgg11":
        data = b"".join(w.numpy().tobytes() for w in stored(arch))
        assert trunk(arch).checksum == hashlib.sha256(data).hexdigest()


def test_a_trunk_does_not_follow_the_model_it_came_from():
    entries = {key: w.clone() for key, w in state_dict("vgg11").items()}
    net = VGGTrunk.from_state_dict(entries, "vgg11")
    entries["features.0.weight"].zero_()
    assert net.checksum == trunk().checksum


def test_everything_wrong_is_in_one_error():
    found = state_dict("vgg11")
    del found["features.0.bias"], found["features.8.weight"]
    found |= {"features.0.weight": torch.zeros(64, 1, 3, 3), "features.1.weight": torch.zeros(2)}
    found |= {
        "fc.weight": 0,
        "features.3.bias": torch.zeros(128, dtype=torch.int32),
        "features.3.weight": [1],
    }
    with pytest.raises(ValueError, match="weights do not fit vgg11") as error:
        VGGTrunk.from_state_dict(found, "vgg11")
    shape = "0.weight has shape [64, 1, 3, 3] instead of [64, 3, 3, 3]"
    for text in ("missing 0.bias", "missing 8.weight", shape, "extra 1.weight", "extra fc.weight",
                 "3.bias is torch.int32", "3.weight is a list"):  # fmt: skip
        assert text in str(error.value)


@pytest.mark.parametrize(
    ("have", "wanted"), [("vgg11", "vgg13"), ("vgg11", "vgg11_bn"), ("vgg11_bn", "vgg11")]
)
def test_weights_of_another_net(have, wanted):
    with pytest.raises(ValueError, match=f"weights do not fit {wanted}: .*(missing|extra|shape)"):
        VGGTrunk.from_state_dict(state_dict(have), wanted)


def to_blocks(arch):
    """The weights by block: {(1, 1): (kernel [3, 3, C, K], bias)}."""
    names = [name for name in ref.tap_codes(arch) if str(name).startswith("conv")]
    pairs = zip(*[iter(w.numpy() for w in stored(arch))] * 2)
    return {name[4:]: (w.transpose(2, 3, 1, 0), b) for name, (w, b) in zip(names, pairs)}


def test_files(tmp_path, caplog):
    entries = state_dict("vgg11")
    torch.save(entries, tmp_path / "a.pth")
    np.savez(tmp_path / "b.npz", **{key: w.numpy() for key, w in entries.items()})
    blocks = {
        f"conv{at}_{part}": array
        for at, pair in to_blocks("vgg11").items()
        for part, array in zip("Wb", pair)
    }
    np.savez(tmp_path / "c.npz", **blocks, fc6_W=np.zeros((2, 2)), fc6_b=np.zeros(2))
    with caplog.at_level(logging.INFO, "vaeops"):
        for name in ("a.pth", "b.npz", "c.npz"):
            assert VGGTrunk.from_file(tmp_path / name, "vgg11").checksum == trunk().checksum
    assert caplog.text.count(trunk().checksum) == 3
    np.savez(tmp_path / "d.npz", **blocks, conv9_1_W=np.zeros(2))
    with pytest.raises(ValueError, match="extra conv9_1_W"):
        VGGTrunk.from_file(tmp_path / "d.npz", "vgg11")


def test_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(state_dict("vgg11_bn"), tmp_path / "a.safetensors")
    assert VGGTrunk.from_file(tmp_path / "a.safetensors", "vgg11_bn").checksum == trunk("vgg11_bn").checksum


@pytest.mark.parametrize("naming", ["{0}/{0}_{1}_1:0", "{0}/{0}/{2}:0"])
def test_keras(tmp_path, naming):
    """Kernels are [3, 3, C, K]; the first one takes BGR."""
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for at, (kernel, bias) in to_blocks("vgg16").items():
            first = kernel[:, :, ::-1] if at == "1_1" else kernel
            layer = f"block{at[0]}_conv{at[2]}"
            file[naming.format(layer, "W", "kernel")] = first
            file[naming.format(layer, "b", "bias")] = bias
        file["fc1/fc1_W_1:0"] = np.zeros((2, 2))
        file["predictions/predictions_b_1:0"] = np.zeros(2)
    assert VGGTrunk.from_file(tmp_path / "a.h5", "vgg16").checksum == trunk("vgg16").checksum


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        VGGTrunk.from_file(tmp_path / "none.pth", "vgg11")
    (tmp_path / "a.onnx").touch()
    with pytest.raises(ValueError, match=r"path must end in .pth, .* got a.onnx"):
        VGGTrunk.from_file(tmp_path / "a.onnx", "vgg11")
    for module, name in (("h5py", "a.h5"), ("safetensors.torch", "a.safetensors")):
        (tmp_path / name).touch()
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match=f"reading {name} needs the package {module.partition('.')[0]}"):
            VGGTrunk.from_file(tmp_path / name, "vgg11")
    torch.save({"features.0.weight": Opens(tmp_path / "owned")}, tmp_path / "a.pth")
    with pytest.raises(pickle.UnpicklingError):
        VGGTrunk.from_file(tmp_path / "a.pth", "vgg11")
    assert not (tmp_path / "owned").exists()


class Opens:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_nothing_is_fetched_unasked(monkeypatch):
    with pytest.raises(ValueError, match="path is None; give a file, or download=True"):
        VGGTrunk.from_file(None, "vgg11")
    with pytest.raises(ValueError, match="give path=None with download=True"):
        VGGTrunk.from_file("a.pth", "vgg11", download=True)
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(
        ImportError, match="download=True goes through torchvision, which does not import here"
    ):
        VGGTrunk.from_file(None, "vgg11", download=True)

    class Models:
        class DEFAULT:
            @staticmethod
            def get_state_dict(progress, check_hash):
                assert check_hash
                return state_dict("vgg11")

        @staticmethod
        def get_model_weights(arch):
            assert arch == "vgg11"
            return Models

    monkeypatch.setitem(sys.modules, "torchvision.models", Models)
    assert VGGTrunk.from_file(None, "vgg11", download=True).checksum == trunk().checksum


def test_bad_weights():
    with pytest.raises(ValueError, match=r"missing 18\.weight; missing 18\.bias"):
        VGGTrunk("vgg11", stored("vgg11")[:-2])
    with pytest.raises(ValueError, match=r"extra weights\[16\]"):
        VGGTrunk("vgg11", [*stored("vgg11"), torch.zeros(2)])
    with pytest.raises(TypeError, match="state_dict must be a dict of tensors, got list"):
        VGGTrunk.from_state_dict(stored("vgg11"), "vgg11")
