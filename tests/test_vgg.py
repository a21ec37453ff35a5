"""VGGTrunk: torchvision's nets, reading weights, batch norm, and being frozen."""

import copy
import hashlib
import io
import logging
import pickle
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from perceptual_case import gradient, images, relative, stored, trunk
from torch import nn

import vaeops
from vaeops import VGGTrunk
from vaeops.nn import vgg_weights
from vaeops.ref import perceptual as ref

ARCHS = [name + suffix for name in ref.ARCHS for suffix in ("", "_bn")]
TAPS = ("relu1_1", "conv2_1", "relu3_2")


def torchvision_features(arch: str) -> nn.Sequential:
    """torchvision's `features`, written down here: it does not import next to a CPU torch."""
    numbers = {"11": [1, 1, 2, 2, 2], "13": [2] * 5, "16": [2, 2, 3, 3, 3], "19": [2, 2, 4, 4, 4]}[arch[3:5]]
    layers, channels = [], 3
    for out, count in zip((64, 128, 256, 512, 512), numbers):
        for _ in range(count):
            layers.append(nn.Conv2d(channels, out, kernel_size=3, padding=1))
            layers += [nn.BatchNorm2d(out)] if arch.endswith("_bn") else []
            layers.append(nn.ReLU(inplace=True))
            channels = out
        layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
    return nn.Sequential(*layers)


def state_dict(arch: str, prefix: str = "features.") -> dict[str, torch.Tensor]:
    return {prefix + name: w for (name, _), w in zip(vgg_weights.layout(arch), stored(arch))}


# ---- torchvision's nets


@pytest.mark.parametrize("arch", ARCHS)
def test_every_layer_of_every_net(arch):
    """Each output of torchvision's features, in fp64."""
    features = torchvision_features(arch).double().eval()
    result = features.load_state_dict(state_dict(arch, ""), strict=False)
    assert not result.unexpected_keys and all("num_batches" in key for key in result.missing_keys)
    net = trunk(arch)
    codes = ref.tap_codes(arch)
    indices = [i for i in range(len(features)) if codes[i] is not None]
    assert len(features) - len(indices) == (len(net._folded) // 2 if arch.endswith("_bn") else 0)
    x = torch.rand(1, 3, 32, 32, dtype=torch.float64) * 2 - 1
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1)
                 for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))  # fmt: skip
    v, maps = ((x + 1) / 2 - mean) / std, iter(net.features(x, indices))
    with torch.no_grad():
        for i, layer in enumerate(features):
            v = layer(v.clone())
            if i in indices:
                assert relative(next(maps), v) < (1e-6 if arch.endswith("_bn") else 1e-12), i


def test_names_are_indices():
    x, _ = images(1, 8, 8)
    names = ["conv1_1", "relu1_1", "pool1", "conv2_1", "relu2_1", "pool2", "conv3_1", "relu3_1", "conv3_2"]
    for a, b in zip(trunk().features(x, names), trunk().features(x, range(len(names)))):
        assert torch.equal(a, b)
    codes = ref.tap_codes("vgg16_bn")  # convolution, batch norm, ReLU
    for name, index in {"conv1_1": 1, "relu1_1": 2, "conv1_2": 4, "relu1_2": 5, "pool1": 6, "conv3_1": 15,
                        "relu3_1": 16, "pool5": 43}.items():  # fmt: skip
        assert codes[name] == codes[index]
    assert codes[0] is codes[3] is codes[14] is None


@pytest.mark.parametrize("arch", ["vgg11", "vgg11_bn"])
def test_sequential(arch):
    net = trunk(arch)
    layers = net.sequential()
    assert [str(m) for m in layers] == [str(m) for m in torchvision_features(arch)]
    assert not layers.training and not any(p.requires_grad for p in layers.parameters())
    copied = [t for name, t in layers.state_dict().items() if "num_batches" not in name]
    assert len(copied) == len(stored(arch)) and all(map(torch.equal, copied, stored(arch)))
    layers[0].weight.data.zero_()
    assert stored(arch)[0].any()  # copies


# ---- reading


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


# ---- batch norm


def test_folding_is_the_running_statistics():
    x, target = images(2, 16, 16)
    net, layers = trunk("vgg11_bn", normalize=None), trunk("vgg11_bn").sequential().double()
    exact = layers[:7](x.double())
    assert relative(net.features(x, ("relu2_1",))[0], exact) < 2e-5
    ours = gradient(vaeops.perceptual_loss, x, target, net, taps=("relu2_1",))
    want = gradient(lambda x: F.mse_loss(layers[:7](x), layers[:7](target.double())), x.double())
    assert relative(ours[0], want[0]) < 1e-6 and relative(ours[1], want[1]) < 2e-3


def test_batch_statistics(impl):
    """As torchvision's net in training mode, each of the two batches by itself."""
    net = trunk("vgg11_bn", bn="batch", normalize=None)
    layers = trunk("vgg11_bn").sequential().double().train()
    x, target = images(3, 16, 20)
    taps, indices = ("relu1_1", "conv2_1", "pool2", "relu3_2"), (2, 5, 7, 13)

    def maps(v):
        found = []
        for i, layer in enumerate(layers[:14]):
            v = layer(v.clone())
            if i in indices:
                found.append(v)
        return found

    for ours, exact in zip(net.features(x, taps, impl=impl), maps(x.double())):
        assert relative(ours, exact) < 2e-5
    with torch.no_grad():
        theirs = maps(target.double())
    for reduction in ("mean", "sum"):
        ours = gradient(vaeops.perceptual_loss, x, target, net, taps=taps, reduction=reduction, impl=impl)
        eager = lambda x, r=reduction: sum(  # noqa: E731
            F.mse_loss(a, b, reduction=r) for a, b in zip(maps(x), theirs)
        )
        want = gradient(eager, x.double())
        assert relative(ours[0], want[0]) < 1e-5 and relative(ours[1], want[1]) < 5e-3
    cache = net.encode(target, taps, impl=impl)
    again = gradient(vaeops.perceptual_loss, x, cache, net, taps=taps, reduction="sum", impl=impl)
    assert relative(again[0], ours[0]) < 1e-6 and relative(again[1], ours[1]) < 1e-6


def test_batch_statistics_of_no_images(impl):
    net, x = trunk("vgg11_bn", bn="batch"), torch.zeros(0, 3, 16, 16)
    value, g = gradient(vaeops.perceptual_loss, x, x, net, taps=TAPS, impl=impl)
    assert value == 0 and g.shape == x.shape


def test_batch_statistics_compile():
    torch._dynamo.reset()
    net = trunk("vgg11_bn", bn="batch").prepare(TAPS)
    x, target = images(2, 16, 16)
    f = torch.compile(lambda x: vaeops.perceptual_loss(x, target, net, taps=TAPS), fullgraph=True,
                      backend="aot_eager")  # fmt: skip
    for a, b in zip(gradient(f, x), gradient(vaeops.perceptual_loss, x, target, net, taps=TAPS)):
        assert relative(a, b) < 1e-5


# ---- a frozen module


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.decoder = nn.Conv2d(3, 3, 1)
        self.trunk = VGGTrunk("vgg11", stored("vgg11"))


def test_optimizers_checkpoints_and_training_mode_do_not_see_it():
    model = Model()
    assert len(list(model.parameters())) == 2 and not list(model.buffers())
    assert list(model.state_dict()) == ["decoder.weight", "decoder.bias"]
    x, target = images(2, 16, 16)
    want = vaeops.perceptual_loss(x, target, model.trunk, taps=TAPS)
    for change in (lambda: model.train(), lambda: model.eval(), lambda: model.requires_grad_(True),
                   lambda: model.load_state_dict(model.state_dict()), lambda: model.half(),
                   lambda: model.bfloat16(), lambda: model.to(torch.float16)):  # fmt: skip
        change()
        assert model.trunk.dtype is torch.float32
        assert torch.equal(vaeops.perceptual_loss(x, target, model.trunk, taps=TAPS), want)


def test_it_moves():
    net = VGGTrunk("vgg11", stored("vgg11")).prepare(TAPS)
    assert net.double().dtype is torch.float64 and not net._packs and net.device.type == "cpu"
    assert net.float().dtype is torch.float32 and net.checksum == trunk().checksum
    assert net.to("meta").device.type == "meta" and stored("vgg11")[0].device.type == "cpu"


def test_copies_share_the_weights():
    net = VGGTrunk("vgg11_bn", stored("vgg11_bn")).prepare(TAPS)
    twin, model = copy.deepcopy(net), Model()
    assert all(a is b for a, b in zip(twin._weights + twin._folded, net._weights + net._folded))
    ema = copy.deepcopy(model)
    assert ema.trunk._weights[0] is model.trunk._weights[0] and ema.decoder.weight is not model.decoder.weight
    twin.double()
    assert net.dtype is torch.float32
    x, target = images(1, 16, 16)
    assert torch.equal(*(vaeops.perceptual_loss(x, target, t, taps=TAPS) for t in (net, copy.deepcopy(net))))


def test_it_pickles():
    net = VGGTrunk("vgg11", stored("vgg11"), input_range=(0, 1), normalize=None).prepare(TAPS)
    file = io.BytesIO()
    pickle.dump(net, file)
    assert file.tell() < 1.01 * 4 * sum(w.numel() for w in stored("vgg11"))  # nothing packed
    file.seek(0)
    x, target = images(1, 16, 16)
    again = pickle.load(file)
    assert again.checksum == net.checksum and repr(again) == repr(net)
    assert torch.equal(*(vaeops.perceptual_loss(x, target, t, taps=TAPS) for t in (net, again)))


def test_each_depth_is_packed_once():
    net = VGGTrunk("vgg11", stored("vgg11"))
    x, target = images(1, 16, 16)
    for taps in (TAPS, ("relu3_2",), ("conv1_1", "relu3_2"), ("relu1_1",)):
        vaeops.perceptual_loss(x, target, net, taps=taps)
        net.features(x, taps)
    assert len(net._packs) == 2


def test_target_cache(impl):
    x, target = images(4, 16, 16)
    cache = trunk().encode(target.requires_grad_(), TAPS, impl=impl)
    assert len(cache) == 4 and cache.taps == TAPS and not any(m.requires_grad for m in cache.maps)
    want = vaeops.perceptual_loss(x, target.detach(), trunk(), taps=TAPS, reduction="none", impl=impl)
    for which in (slice(1, 3), [0, 3], torch.tensor([True, False, True, True]), 2, -1):
        part = cache[which]
        pick = [which] if isinstance(which, int) else which
        options = {"taps": TAPS[1:], "reduction": "none", "impl": impl}
        got = vaeops.perceptual_loss(x[pick], part, trunk(), **options)
        direct = vaeops.perceptual_loss(x[pick], target.detach()[pick], trunk(), **options)
        assert relative(got, direct) < 1e-6 and len(part) == len(got)
    half = cache.to(torch.bfloat16)
    got = vaeops.perceptual_loss(x, half, trunk(), taps=TAPS, reduction="none", impl=impl)
    assert half.maps[0].dtype is torch.bfloat16 and 0 < relative(got, want) < 1e-2
    again = pickle.loads(pickle.dumps(cache))
    assert torch.equal(again.maps[2], cache.maps[2]) and "4 images" in repr(again)


# ---- bad arguments


@pytest.mark.parametrize(
    ("arch", "options", "error", "text"),
    [
        ("vgg12", {}, ValueError, "arch must be one of .* got 'vgg12'"),
        ("vgg11", {"bn": "fold"}, ValueError, "bn='fold', but vgg11 has no batch norm"),
        ("vgg11_bn", {"bn": "eval"}, ValueError, "bn must be 'fold' or 'batch', got 'eval'"),
        ("vgg11", {"input_range": "-1,1"}, TypeError, "input_range must be two numbers"),
        ("vgg11", {"input_range": (1, 0)}, ValueError, "input_range must have lo < hi"),
        ("vgg11", {"input_range": ("a", 1)}, TypeError, "input_range must be a float, got str"),
        ("vgg11", {"normalize": "cifar"}, ValueError, "normalize must be 'imagenet', None or .* got 'cifar'"),
        ("vgg11", {"normalize": (0.5, 0.5)}, ValueError, "normalize must hold three means and three stds"),
        ("vgg11", {"normalize": ((0, 0, 0), (1, 0, 1))}, ValueError, "normalize: stds must be > 0"),
        ("vgg11", {"precision": "fp16"}, ValueError, "precision must be one of .* got 'fp16'"),
    ],
)  # fmt: skip
def test_bad_options(arch, options, error, text):
    with pytest.raises(error, match="^VGGTrunk: " + text):
        VGGTrunk.random(arch, 0, **options)


def test_bad_weights():
    with pytest.raises(ValueError, match=r"missing 18\.weight; missing 18\.bias"):
        VGGTrunk("vgg11", stored("vgg11")[:-2])
    with pytest.raises(ValueError, match=r"extra weights\[16\]"):
        VGGTrunk("vgg11", [*stored("vgg11"), torch.zeros(2)])
    with pytest.raises(TypeError, match="state_dict must be a dict of tensors, got list"):
        VGGTrunk.from_state_dict(stored("vgg11"), "vgg11")
