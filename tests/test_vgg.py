"""VGGTrunk: torchvision's nets, batch norm, and being frozen."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import isas
from perceptual_case import gradient, images, normalized, relative, state_dict, stored, trunk
from torch import nn

import vaeops
from bench import peers
from vaeops import VGGTrunk, _native
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


# ---- torchvision's nets


def test_the_copy_is_torchvisions():
    try:
        vgg = peers.torchvision().models.vgg
    except peers.NotInstalled as error:
        pytest.skip(str(error))
    letters = {"vgg11": "A", "vgg13": "B", "vgg16": "D", "vgg19": "E"}
    with torch.device("meta"):
        for arch in ARCHS:
            made = vgg.make_layers(vgg.cfgs[letters[arch.removesuffix("_bn")]], arch.endswith("_bn"))
            assert str(made) == str(torchvision_features(arch))


@pytest.mark.parametrize("arch", ARCHS)
def test_every_layer_of_every_net(arch):
    """Index i is the output of features[i]; a hook there sees the ReLU that follows, which works in place."""
    features = torchvision_features(arch).double().eval().requires_grad_(False)
    result = features.load_state_dict(state_dict(arch, ""), strict=False)
    assert not result.unexpected_keys and all("num_batches" in key for key in result.missing_keys)
    net, codes = trunk(arch, winograd=False), ref.tap_codes(arch)
    indices = [i for i in range(len(features)) if codes[i] is not None]
    assert len(features) - len(indices) == (len(net._folded) // 2 if arch.endswith("_bn") else 0)
    x = torch.rand(1, 3, 32, 40) * 2 - 1
    leaf = x.double().requires_grad_()
    v, wanted = normalized(leaf), {}
    for i, layer in enumerate(features):
        v = wanted[i] = layer(v.clone())
    double = dict(zip(indices, net.features(x.double(), indices)))
    leaf32 = x.requires_grad_()
    found = dict(zip(indices, net.features(leaf32, indices)))
    for i in indices:
        assert relative(double[i], wanted[i]) < (1e-6 if arch.endswith("_bn") else 1e-12), i
        assert relative(found[i], wanted[i]) < 1e-5, i
    cotangents = {i: torch.randn_like(wanted[i]) / wanted[i].detach().norm() for i in indices}
    ours, exact = (sum((cotangents[i] * maps[i]).sum() for i in indices) for maps in (found, wanted))
    assert relative(torch.autograd.grad(ours, leaf32)[0], torch.autograd.grad(exact, leaf)[0]) < 1e-2  # flips

    seen = {}
    for i in indices:
        features[i].register_forward_hook(lambda _, __, output, i=i: seen.update({i: output}))
    features(normalized(x.detach().double()))
    for i in indices:
        assert relative(double[i + 1 if codes[i] % 2 == 0 else i], seen[i]) < 1e-5, i
    assert any(relative(double[i], seen[i]) > 0.1 for i in indices)


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
    packs = net.prepare(TAPS)._packs
    assert net.to("cpu")._packs is packs and packs  # it was there
    assert net.to("meta").device.type == "meta" and stored("vgg11")[0].device.type == "cpu"


def test_a_parent_that_is_emptied_does_not_take_the_weights_with_it():
    """`to_empty` expects a checkpoint to fill what it made, and the trunk is in none."""
    model, (x, target) = Model(), images(1, 8, 8)
    model.to_empty(device="cpu")
    want = vaeops.perceptual_loss(x, target, trunk(), taps=TAPS)
    assert torch.equal(vaeops.perceptual_loss(x, target, model.trunk, taps=TAPS), want)
    loss = vaeops.nn.LPIPS(model.trunk, [torch.rand(64)], taps=TAPS[:1])
    want = loss(x, target)
    assert torch.equal(loss.to_empty(device="cpu")(x, target), want)


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


@pytest.mark.skipif(len(isas()) < 2, reason="needs two instruction sets and _host")
def test_bf16_is_packed_for_the_instruction_set_in_use():
    """What AMX multiplies, the others cannot read."""
    from vaeops import _host

    net, path, (x, target) = (
        VGGTrunk("vgg11", stored("vgg11"), precision="bf16"),
        str(_native.path("_ops_cpu")),
        images(1, 8, 8),
    )
    best = _host.isa(path)
    try:
        for name in reversed(isas()):
            _host.set_isa(path, name)
            fresh = VGGTrunk("vgg11", stored("vgg11"), precision="bf16")
            want = vaeops.perceptual_loss(x, target, fresh, taps=TAPS)
            assert torch.equal(vaeops.perceptual_loss(x, target, net, taps=TAPS), want)
    finally:
        _host.set_isa(path, best)
    assert len(net._packs) == len(isas())


def test_what_inference_mode_packed_and_encoded_serves_training():
    net, (x, target) = VGGTrunk("vgg11", stored("vgg11")), images(1, 8, 8)
    with torch.inference_mode():
        net.features(x, TAPS)
        cache = net.encode(target, TAPS)
    lpips = lambda x, to: vaeops.nn.LPIPS(net, None, taps=TAPS)(x, to, per_layer=True)[0]  # noqa: E731
    assert torch.equal(gradient(lpips, x, cache)[1], gradient(lpips, x, target)[1])
    total = lambda x, net=net: sum(m.sum() for m in net.features(x, TAPS))  # noqa: E731
    assert torch.equal(gradient(total, x)[1], gradient(lambda x: total(x, trunk()), x)[1])


def test_weights_packed_inside_a_transform_outlive_it():
    net, (x, target) = VGGTrunk("vgg11", stored("vgg11")), images(1, 8, 8)
    loss = lambda x: vaeops.perceptual_loss(x, target, net, taps=TAPS)  # noqa: E731
    want = gradient(vaeops.perceptual_loss, x, target, trunk(), taps=TAPS)[1]
    for transform in (torch.func.grad(loss), lambda x: torch.func.vmap(torch.func.grad(loss))(x[None])[0]):
        net._packs.clear()
        assert relative(transform(x), want) < 1e-6
        assert net._packs and all(p.data_ptr() for p in net._packs.values())


@pytest.mark.filterwarnings("error:.*was assigned during export")
def test_an_export_leaves_no_trace():
    """It packs weights too, but what it has then is no tensor to compute with."""

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk = VGGTrunk("vgg11", stored("vgg11"))

        def forward(self, x, target):
            return vaeops.perceptual_loss(x, target, self.trunk, taps=TAPS)

    model, pair = Loss(), images(2, 8, 8)
    exported = torch.export.export(model, pair, strict=False)
    want = vaeops.perceptual_loss(*pair, trunk(), taps=TAPS)
    assert torch.equal(model(*pair), want) and relative(exported.module()(*pair), want) < 1e-6


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
