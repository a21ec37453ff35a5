"""The drop-in for the lpips package, against the package: values, gradients, files, and where it is wrong."""

import copy
import functools
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from bench import peers
from vaeops import VGGTrunk
from vaeops.compat.lpips import LPIPS
from vaeops.compat.lpips_nets import Slices

# One ReLU that rounding flips moves the gradient of a small image by about 2e-3; the package's own is as far
# from fp64. So formulas are compared in fp64, to the last digits, and fp32 with room for a few of them.
FLIPS = 1e-2
SIZES = {"vgg": (32, 40), "alex": (64, 70), "squeeze": (48, 41)}


@pytest.fixture(scope="module")
def package():
    try:
        peers.lpips()
    except peers.NotInstalled as error:
        pytest.skip(str(error))
    return peers.lpips_module


@functools.cache
def module_of(net, version="0.1", lpips=True):
    """The package's module; all of a net have the same weights in it."""
    torch.manual_seed(3)
    return peers.lpips_module(net=net, version=version, lpips=lpips)


@pytest.fixture
def theirs(package):
    return module_of


def weights_of(module):
    """torchvision's state_dict of the package's net."""
    state = module.net.state_dict()
    return {f"features.{name.partition('.')[2]}": w for name, w in state.items()}


def ours_of(module, **options):
    options = {
        "net": module.pnet_type,
        "version": module.version,
        "lpips": module.lpips,
        "verbose": False,
    } | options
    if module.pnet_type == "vgg" and not options.get("pnet_tune"):
        options.setdefault("trunk", trunk(module.version))
    options.setdefault("trunk", weights_of(module))
    return LPIPS(**options)


@functools.cache
def trunk(version):
    """Ours of the one VGG that `theirs` has, shared by the tests. Packing for Winograd takes time: once."""
    normal = version == "0.1"
    weights = weights_of(module_of("vgg", version))
    return VGGTrunk.from_state_dict(
        weights, "vgg16", normalize="imagenet" if normal else None, winograd=normal
    )


def images(net, count=2, dtype=torch.float32):
    torch.manual_seed(7)
    first = torch.rand(count, 3, *SIZES[net], dtype=dtype) * 2 - 1
    second = (first + 0.3 * torch.randn_like(first)).clamp(-1, 1)
    return first.requires_grad_(), second.requires_grad_()


def relative(ours, theirs):
    return float((ours.detach() - theirs.detach()).norm() / theirs.detach().norm())


def compare(ours, theirs, net, dtype, **call):
    """Values, and the gradients of both images under weights that differ from image to image."""
    a, b = images(net, dtype=dtype)
    found, wanted = ours(a, b, **call), theirs(a, b, **call)
    if call.get("retPerLayer"):
        assert len(found[1]) == len(wanted[1]) == theirs.L
        for one, other in zip(found[1], wanted[1]):
            assert one.shape == other.shape
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        found, wanted = found[0], wanted[0]
    assert found.shape == wanted.shape and found.dtype is wanted.dtype
    assert relative(found, wanted) < (1e-5 if dtype is torch.float32 else 1e-12)
    weight = torch.linspace(-1, 2, wanted.numel(), dtype=dtype).view_as(wanted)
    for one, other in zip(
        torch.autograd.grad(found, (a, b), weight), torch.autograd.grad(wanted, (a, b), weight)
    ):
        assert relative(one, other) < (FLIPS if dtype is torch.float32 else 1e-10)


CALLS = [{}, {"retPerLayer": True}, {"normalize": True}]


@pytest.mark.parametrize("call", CALLS, ids=["plain", "per layer", "normalize"])
@pytest.mark.parametrize("spatial", [False, True], ids=["mean", "spatial"])
@pytest.mark.parametrize("version", ["0.1", "0.0"])
@pytest.mark.parametrize("net", SIZES)
def test_values_and_gradients(theirs, net, version, spatial, call, monkeypatch):
    module = theirs(net, version)
    monkeypatch.setattr(module, "spatial", spatial)
    compare(ours_of(module, spatial=spatial), module, net, torch.float32, **call)


@pytest.mark.parametrize("spatial", [False, True], ids=["mean", "spatial"])
@pytest.mark.parametrize("net", SIZES)
def test_without_linear_layers(theirs, net, spatial, monkeypatch):
    module = theirs(net, lpips=False)
    monkeypatch.setattr(module, "spatial", spatial)
    compare(ours_of(module, spatial=spatial), module, net, torch.float32)


@pytest.mark.parametrize("net", SIZES)
def test_in_double_precision_to_the_last_digits(theirs, net):
    """So what fp32 leaves is rounding and ReLUs that flip. The package's constants are rounded to fp32."""
    module = copy.deepcopy(theirs(net, "0.0")).double()
    compare(copy.deepcopy(ours_of(theirs(net, "0.0"))).double(), module, net, torch.float64)


@pytest.mark.parametrize("which", [0, 1])
def test_gradient_to_one_of_the_images(theirs, which):
    module = theirs("vgg")
    ours, pair = ours_of(module), images("vgg")
    fixed = [p if i == which else p.detach() for i, p in enumerate(pair)]
    found = torch.autograd.grad(ours(*fixed).sum(), pair[which])[0]
    assert relative(found, torch.autograd.grad(module(*fixed).sum(), pair[which])[0]) < FLIPS


def test_one_image_against_many(theirs):
    module = theirs("vgg")
    ours, (a, b) = ours_of(module), images("vgg", 3)
    torch.testing.assert_close(ours(a, b[:1]), module(a, b[:1]), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ours(a[:1], b), module(a[:1], b), rtol=1e-5, atol=1e-7)


def test_equal_images_are_at_distance_zero(theirs):
    a, _ = images("vgg")
    value = ours_of(theirs("vgg"))(a, a.detach())
    assert torch.equal(value, torch.zeros(2, 1, 1, 1))
    assert not torch.autograd.grad(value.sum(), a)[0].any()


# ---- state


def test_the_packages_checkpoint_loads_and_ours_goes_back(theirs):
    """Net and linear layers; strict both ways, but for the net, which ours does not save."""
    module = theirs("vgg")
    ours = LPIPS(net="vgg", pnet_rand=True, verbose=False, impl="ref")
    a, b = images("vgg")
    assert relative(ours(a, b), module(a, b)) > 0.01
    assert str(ours.load_state_dict(module.state_dict())) == "<All keys matched successfully>"
    assert relative(ours(a, b), module(a, b)) < 1e-5
    state = ours.state_dict()
    assert set(state) == {k for k in module.state_dict() if k.startswith("lin")}
    assert sum(w.numel() for w in state.values()) == 2 * 1472
    left = module.load_state_dict(state, strict=False)
    assert not left.unexpected_keys and all(
        k.startswith(("net.", "scaling_layer.")) for k in left.missing_keys
    )


@pytest.mark.parametrize("net", ["alex", "squeeze"])
def test_other_nets_load_the_packages_checkpoint(theirs, net):
    ours = LPIPS(net=net, pnet_rand=True, verbose=False)
    ours.load_state_dict(theirs(net).state_dict())
    a, b = images(net)
    assert relative(ours(a, b), theirs(net)(a, b)) < 1e-5


def test_inside_a_model_the_checkpoint_of_a_model_with_the_package_loads(theirs):
    model = nn.ModuleDict({"loss": LPIPS(net="vgg", pnet_rand=True, verbose=False, impl="ref")})
    state = {f"loss.{k}": v for k, v in theirs("vgg").state_dict().items()}
    model.load_state_dict(state)
    a, b = images("vgg")
    assert relative(model["loss"](a, b), theirs("vgg")(a, b)) < 1e-5
    state["loss.lin0.model.2.weight"] = state.pop("loss.lin0.model.1.weight")
    with pytest.raises(RuntimeError, match=r"Unexpected.*lin0\.model\.2\.weight"):
        model.load_state_dict(state)


@pytest.mark.parametrize("change", ["missing", "scaling", "lins"])
def test_a_checkpoint_that_does_not_fit_is_refused(theirs, change):
    ours = LPIPS(net="vgg", pnet_rand=True, verbose=False)
    state = dict(theirs("vgg").state_dict())
    if change == "missing":
        del state["net.slice3.10.bias"]
        message = r"missing 10\.bias"
    elif change == "scaling":
        state["scaling_layer.shift"] = state["scaling_layer.shift"] + 1
        message = r"scaling_layer\.shift: must be"
    else:
        del state["lin2.model.1.weight"], state["lins.2.model.1.weight"]
        message = r"Missing.*lins\.2\.model\.1\.weight"
    with pytest.raises(RuntimeError, match=message):
        ours.load_state_dict(state)


def linear_file(net="vgg", version="0.1"):
    found = importlib.util.find_spec("lpips")
    if found is None:
        pytest.skip("lpips is not installed")
    return Path(found.submodule_search_locations[0], "weights", f"v{version}", f"{net}.pth")


def test_files(theirs, tmp_path):
    """trunk_path, model_path, and a trunk of ours that several losses share."""
    module = theirs("vgg")
    torch.save(weights_of(module) | {"classifier.0.weight": torch.zeros(1)}, tmp_path / "vgg16.pth")
    a, b = images("vgg")
    one = LPIPS(net="vgg16", trunk_path=tmp_path / "vgg16.pth", model_path=linear_file(), verbose=False,
                impl="ref")  # fmt: skip
    trunk = VGGTrunk.from_file(tmp_path / "vgg16.pth", "vgg16")
    other = LPIPS(net="vgg", trunk=trunk, verbose=False, impl="ref")
    assert torch.equal(one(a, b), other(a, b)) and relative(one(a, b), module(a, b)) < 1e-5
    assert other.net is trunk


def test_torchvisions_own_file_is_found_where_torch_hub_keeps_it(theirs, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ValueError, match=r"no weights of net 'alex'.*nothing is downloaded"):
        LPIPS(verbose=False)
    (tmp_path / "checkpoints").mkdir()
    torch.save(weights_of(theirs("alex")), tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth")
    a, b = images("alex")
    assert relative(LPIPS(verbose=False)(a, b), theirs("alex")(a, b)) < 1e-5


def test_linear_files_load_strictly(tmp_path):
    weights = torch.load(linear_file(), map_location="cpu", weights_only=True)
    weights["lin5.model.1.weight"] = weights.pop("lin4.model.1.weight")
    torch.save(weights, tmp_path / "vgg.pth")
    with pytest.raises(
        ValueError, match=r"missing \['lin4.model.1.weight'\], unknown \['lin5.model.1.weight'\]"
    ):
        LPIPS(net="vgg", pnet_rand=True, model_path=tmp_path / "vgg.pth", verbose=False)
    with pytest.raises(
        ValueError, match=r"lin1.model.1.weight must be \[1, 128, 1, 1\], got \[1, 192, 1, 1\]"
    ):
        LPIPS(net="vgg", pnet_rand=True, model_path=linear_file("alex"), verbose=False)


def test_composed_nets_load_strictly():
    state = {f"features.{k.partition('.')[2]}": v for k, v in Slices("squeeze").state_dict().items()}
    state["features.4.odd"] = state.pop("features.3.squeeze.bias")
    with pytest.raises(
        ValueError, match=r"missing \['features.3.squeeze.bias'\], unknown \['features.4.odd'\]"
    ):
        LPIPS(net="squeeze", trunk=state, verbose=False)


def test_copies_share_the_trunk_and_frozen_losses_have_nothing_to_train(theirs):
    ours = ours_of(theirs("vgg"))
    twin = copy.deepcopy(ours)
    a, b = images("vgg")
    assert torch.equal(ours(a, b), twin(a, b))
    assert [p.data_ptr() for p in twin.net.cut(["relu5_3"]).weights] == [
        p.data_ptr() for p in ours.net.cut(["relu5_3"]).weights
    ]
    assert not any(p.requires_grad for p in ours.parameters()) and not list(ours.buffers())
    assert sum(p.numel() for p in ours.parameters()) == 1472


# ---- where the package is wrong


def test_without_dropout_the_package_goes_on_with_random_weights(package, theirs):
    module = theirs("vgg")
    broken = package(net="vgg", use_dropout=False)
    assert broken.lin0.model[0].weight.min() < 0 <= module.lin0.model[1].weight.min()
    ours = ours_of(module, use_dropout=False)
    for i in range(5):
        assert torch.equal(getattr(ours, f"lin{i}").weight, module.lins[i].model[1].weight)
    a, b = images("vgg")
    broken.net.load_state_dict(module.net.state_dict())
    assert relative(ours(a, b), module(a, b)) < 1e-5 < 0.1 < relative(broken(a, b), module(a, b))


def test_a_parent_in_training_wakes_no_dropout(theirs):
    a, b = images("vgg")
    module = copy.deepcopy(theirs("vgg"))
    ours = ours_of(module)
    nn.ModuleDict({"theirs": module, "ours": ours}).train()
    assert not torch.equal(module(a, b), module(a, b))
    assert torch.equal(ours(a, b), ours(a, b))
    assert relative(ours(a, b), theirs("vgg")(a, b)) < 1e-5


def test_an_optimizer_does_not_move_the_linear_layers(theirs):
    a, b = images("vgg")
    module = copy.deepcopy(theirs("vgg"))
    ours = ours_of(module)
    before = ours(a, b).detach()
    for loss in (module, ours):
        optimizer = torch.optim.SGD([*loss.parameters(), a], lr=1.0)
        (loss(a, b).sum() + 0).backward()
        optimizer.step()
        optimizer.zero_grad()
    a, b = images("vgg")
    assert relative(module(a, b), before) > 0.01
    assert torch.equal(ours(a, b), before)


@pytest.mark.filterwarnings("ignore:(Anomaly|Error)")
def test_zero_features_make_no_nan(theirs):
    """The package's gradient at the map is NaN, which anomaly mode reports."""
    module = copy.deepcopy(theirs("vgg"))
    for p in module.net.parameters():
        p.data.zero_()
    trunk, (a, b) = VGGTrunk.from_state_dict(weights_of(module), "vgg16", winograd=False), images("vgg")
    ours = ours_of(module, trunk=trunk)
    with torch.autograd.detect_anomaly(check_nan=True):
        with pytest.raises(RuntimeError, match="nan"):
            module(a, b).sum().backward()
        for loss in (ours, ours_of(module, trunk=trunk, eval_mode=False, use_dropout=False)):
            assert not any(g.any() for g in torch.autograd.grad(loss(a, b).sum(), (a, b)))


# ---- learning


@pytest.mark.parametrize("net", ["vgg", "squeeze"])
def test_linear_layers_learn_with_eval_mode_off(theirs, net):
    module, (a, b) = theirs(net), images(net)
    ours = ours_of(module, eval_mode=False)
    assert not torch.equal(ours(a, b), ours(a, b))  # the dropout
    ours.eval()
    found = torch.autograd.grad(ours(a, b).sum(), list(ours.lins.parameters()))
    wanted = torch.autograd.grad(module(a, b).sum(), list(module.lins.parameters()))
    for one, other in zip(found, wanted):
        assert relative(one, other) < 1e-4


@pytest.mark.parametrize("net", SIZES)
def test_a_net_learns_with_pnet_tune(package, theirs, net):
    torch.manual_seed(3)
    module, (a, b) = package(net=net, pnet_tune=True), images(net)
    ours = ours_of(module, pnet_tune=True)
    found = torch.autograd.grad(ours(a, b).sum(), list(ours.net.parameters()))
    wanted = torch.autograd.grad(module(a, b).sum(), list(module.net.parameters()))
    for one, other in zip(found, wanted):
        assert relative(one, other) < 1e-4


def test_under_autocast_the_same(theirs):
    ours, (a, b) = ours_of(theirs("vgg")), images("vgg")
    alex, (c, d) = ours_of(theirs("alex")), images("alex")
    with torch.autocast("cpu", torch.bfloat16):
        one, other = ours(a, b), alex(c, d)
    assert torch.equal(one, ours(a, b)) and torch.equal(other, alex(c, d))


# ---- bad arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"net": "resnet"}, "net must be one of .*got 'resnet'"),
        ({"version": "v0.1"}, "version must be one of .*got 'v0.1'"),
        ({"net": "vgg", "pnet_rand": True, "trunk": {}}, "give one of trunk, trunk_path and pnet_rand"),
        ({"net": "alex", "trunk": "ours"}, "a VGGTrunk is for net 'vgg' with pnet_tune=False, got 'alex'"),
        (
            {"net": "vgg", "version": "0.0", "trunk": "ours"},
            "version 0.0 needs a trunk of 'vgg16' with .*None",
        ),
    ],
)
def test_bad_options(options, message):
    if options.get("trunk") == "ours":
        options = options | {"trunk": VGGTrunk.random("vgg16", 0)}
    with pytest.raises(ValueError, match=message):
        LPIPS(verbose=False, **options)


def test_bytes_with_normalize():
    loss = LPIPS(net="vgg", pnet_rand=True, verbose=False)
    x = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(TypeError, match="in0 must be floating point for normalize=True"):
        loss(x, x, normalize=True)


def test_it_says_what_it_sets_up(capsys):
    LPIPS(net="vgg", pnet_rand=True)
    assert "trunk [vgg], v[0.1]" in capsys.readouterr().out
