"""Perceptual losses where something is zero, NaN, of the least size, or asked for in an unusual way."""

import pytest
import torch
from perceptual_case import KINDS, TAPS, gradient, images, linear, options, relative, stored, trunk

import vaeops
from vaeops import TargetCache, Term
from vaeops.ref import perceptual as ref

ops = torch.ops.vaeops


def loss(x, target, impl=None, **kwargs):
    return vaeops.perceptual_loss(x, target, trunk(), impl=impl, **({"taps": TAPS} | kwargs))


@pytest.mark.parametrize("kind", KINDS)
def test_equal_images(impl, kind):
    x, _ = images(2, 16, 16)
    value, g = gradient(loss, x, x, impl, **options(kind))
    assert value == 0 and not g.any()


def test_pixels_without_features(impl):
    """Where no unit is on, LPIPS divides by 0; its gradient there is 0, not NaN."""
    weights = [w.clone() for w in stored("vgg11")]
    weights[1].fill_(-100.0)  # nothing passes the first ReLU of a dark image
    weights[3].zero_()
    net = vaeops.VGGTrunk("vgg11", weights)
    x, target = images(2, 16, 16)
    target[1] = 50.0
    taps, kwargs = ("relu1_1", "relu2_1"), {"kind": "lpips", "lin": linear(("relu1_1", "relu2_1"))}
    assert not net.features(x, ("relu1_1",))[0].any()
    value, g = gradient(vaeops.perceptual_loss, x, target, net, taps=taps, **kwargs, impl=impl)
    assert value.isfinite() and not g.any()
    value, g = gradient(vaeops.perceptual_loss, target, x, net, taps=taps, **kwargs, impl=impl)
    assert value > 0 and g.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_stays_in_its_image(impl, bad):
    x, target = images(3, 16, 16)
    want = gradient(loss, x, target, impl, reduction="none")
    x[1, 2, 5, 5] = bad
    value, g = gradient(loss, x, target, impl, reduction="none")
    assert torch.equal(value[::2], want[0][::2]) and torch.equal(g[::2], want[1][::2])
    assert value[1].isnan()


def test_several_losses_from_one_run(impl):
    x, target = images(2, 16, 16)
    terms = [
        vaeops.Term("mse", ("relu2_1", "relu3_2"), (1.0, 0.5)),
        vaeops.Term("gram", ("relu1_1", "relu2_1"), weight=30.0),
        vaeops.Term("lpips", TAPS, lin=linear(), weight=2.0),
        vaeops.Term("lpips", ("relu1_1",), lin=linear(("relu1_1",))),
    ]
    ours = gradient(vaeops.perceptual_loss, x, target, trunk(), terms=terms, impl=impl)
    single = [gradient(loss, x, target, impl, taps=t.taps, kind=t.kind, weights=t.weights, lin=t.lin)
              for t in terms]  # fmt: skip
    for got, each in zip(ours, zip(*single)):
        assert relative(got, sum(t.weight * part for t, part in zip(terms, each))) < 1e-5


def test_pools_and_relus_keep_nan_as_pytorch_does(impl):
    """Which elements are NaN; gradients go to the last of several in a window, and pass the ReLU."""
    layers, taps, pixels = (16, 0, 0), (0, 1, 3, 5), (0.0,) * 3 + (1.0,) * 3
    weights = [torch.randn(16, 3, 3, 3), torch.randn(16)]
    x = torch.randn(2, 3, 12, 16)
    for row, column in ((0, 0), (2, 5), (3, 10), (9, 7), (10, 14)):  # NaN there and around it
        x[1, 0, row, column] = torch.nan
    packed = getattr(ops.vgg_pack, impl)(weights, layers, 1)
    maps, saved = getattr(ops.vgg_features_fwd, impl)(x, weights, packed, layers, taps, pixels, 1, True)
    leaf = x.double().requires_grad_()
    want = ref.features(leaf, weights, layers, taps, pixels)
    assert all(torch.equal(a.isnan(), b.isnan()) for a, b in zip(maps, want))
    grads = [torch.randn_like(m) for m in maps]
    got = getattr(ops.vgg_features_bwd, impl)(grads, x, weights, packed, saved, layers, taps, pixels, 1)
    assert relative(got, torch.autograd.grad(want, leaf, [g.double() for g in grads])[0]) < 1e-5


def test_nan_reaches_the_gradient(impl):
    """Where PyTorch's is NaN too: a scaler that looks for it skips the step."""
    x, target = images(2, 16, 16)
    x[1, 2, 5, 5] = torch.nan
    for kind in ("mse", "l1", "lpips"):
        value, g = gradient(loss, x, target, impl, **options(kind, ("relu2_1",)), reduction="none")
        assert value[1].isnan() and g[1].isnan().any() and g[0].isfinite().all() and value[0].isfinite()


# ---- sizes


@pytest.mark.parametrize(
    "size",
    [(1, 1), (1, 2), (2, 1), (1, 5), (4, 1), (2, 2), (2, 5), (3, 3), (4, 4), (5, 5)],
    ids=str,
)
def test_the_least_sizes(impl, size):
    """Against the reference in fp64, as deep as the size allows."""
    taps = ("conv1_1", "relu1_2", "pool1", "relu2_2", "pool2")[: {1: 2, 2: 4, 3: 4}.get(min(size), 5)]
    net, (x, target) = trunk("vgg13"), images(2, *size)
    lin = [torch.rand(net.cut(taps).channels(tap)) for tap in net.cut(taps).taps]
    for kind in KINDS:
        chosen = {"taps": taps, "kind": kind, "lin": lin if kind == "lpips" else None, "reduction": "none"}
        ours = gradient(vaeops.perceptual_loss, x, target, net, **chosen, impl=impl)
        exact = gradient(vaeops.perceptual_loss, x.double(), target.double(), net, **chosen)
        assert relative(ours[0], exact[0]) < 2e-6 and relative(ours[1], exact[1]) < 2e-3


def test_maps_of_nothing_are_an_error():
    for shape in ((2, 0, 3, 3), (2, 4, 0, 3), (2, 4, 3, 0)):
        with pytest.raises(ValueError, match="a must have channels and pixels, got shape"):
            vaeops.feature_distance(torch.rand(shape), torch.rand(shape))


def test_as_many_distances_as_fit_in_a_call(impl):
    x, target = images(1, 4, 4)
    terms = [Term("mse", ("relu1_1",), weight=0.25)] * 64
    want = loss(x, target, impl, taps=("relu1_1",))
    assert relative(vaeops.perceptual_loss(x, target, trunk(), terms=terms, impl=impl), 16 * want) < 1e-6
    with pytest.raises(ValueError, match="terms: at most 64 distances in one call, got 65"):
        vaeops.perceptual_loss(x, target, trunk(), terms=[*terms, terms[0]], impl=impl)


# ---- half precision


def test_small_gradients_of_fp16_images_survive_until_they_are_scaled(impl):
    """A scaler's factor comes with backward: what is kept for it must not be rounded to fp16 before."""
    x, target = (t.half() for t in images(1, 32, 32))
    scaled = lambda x: loss(x, target, impl, weights=(1e-6,) * 3) * 2.0**20  # noqa: E731
    ours, want = gradient(scaled, x)[1], gradient(scaled, x.float())[1]
    assert ours.dtype is torch.float16 and relative(ours, want) < 1e-3
    value, g = loss(x, target, impl, return_grad=True)
    assert value.dtype is torch.float32 and g.dtype is torch.float16


# ---- forward mode


def test_no_tangent_is_lost_without_a_word():
    """Forward mode serves x; what it does not serve is an error, never a derivative of 0."""
    x, target = images(1, 8, 8)
    lin, t = linear(("relu1_1",)), torch.randn(1, 3, 8, 8)
    chosen = {"taps": ("relu1_1",), "kind": "lpips"}
    with pytest.raises(NotImplementedError, match="forward mode serves x alone"):
        torch.func.jvp(lambda target: loss(x, target), (target,), (t,))
    with pytest.raises(NotImplementedError, match="forward mode serves x alone"):
        torch.func.jvp(lambda both: loss(both, 0.5 * both), (x,), (t,))
    with pytest.raises(NotImplementedError, match="forward mode serves x alone"):
        torch.func.jvp(lambda w: loss(x, target, lin=[w], **chosen), (lin[0],), (torch.rand(64),))
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda x: trunk().features(x, TAPS)[0].sum(), (x,), (t,))


# ---- cached targets


def test_a_cache_of_another_trunk_is_refused():
    x, target = images(2, 8, 8)
    net, other = trunk(), vaeops.VGGTrunk.random("vgg11", 1)
    for trunk_of_cache in (other, trunk(normalize=None), trunk(input_range=(0, 1))):
        cache = trunk_of_cache.encode(target, TAPS)
        with pytest.raises(ValueError, match="perceptual_loss: target was encoded by another trunk"):
            vaeops.perceptual_loss(x, cache, net, taps=TAPS)
        with pytest.raises(ValueError, match="LPIPS: target was encoded by another trunk"):
            vaeops.nn.LPIPS(net, None, taps=TAPS)(x, cache, per_layer=True)
    same = vaeops.VGGTrunk("vgg11", stored("vgg11"), winograd=False)
    want = vaeops.perceptual_loss(x, target, net, taps=TAPS)
    assert relative(vaeops.perceptual_loss(x, same.encode(target, TAPS), net, taps=TAPS), want) < 1e-5
    double = vaeops.VGGTrunk("vgg11", stored("vgg11"), precision="bf16").double()
    assert net.identity == same.identity == double.identity != other.identity


def test_maps_of_a_cache_are_found_by_their_taps():
    """Also for LPIPS by layers and by pixels, with more of them in the cache than are asked for."""
    x, target = images(2, 8, 8)
    cache = trunk().encode(target, ("conv1_1", "relu1_1", "conv2_1", "relu2_1"))
    per_layer = vaeops.nn.LPIPS(trunk(), None, taps=("relu1_1", "relu2_1"))
    spatial = vaeops.nn.LPIPS(trunk(), None, taps=("relu1_1", "relu2_1"), spatial=True)
    assert torch.equal(per_layer(x, cache, per_layer=True)[0], per_layer(x, target, per_layer=True)[0])
    assert torch.equal(spatial(x, cache), spatial(x, target))
    with pytest.raises(ValueError, match=r"LPIPS: target was encoded at .*, relu3_1 is missing"):
        vaeops.nn.LPIPS(trunk(), None, taps=("relu1_1", "relu3_1"))(x, cache, per_layer=True)
    with pytest.raises(ValueError, match="LPIPS: target must have x's shape"):
        spatial(x, target[:1])


def test_a_cache_ends():
    cache = trunk().encode(images(3, 4, 4)[0], ("relu1_1",))
    assert [len(each) for each in cache] == [1, 1, 1]
    for which in (3, -4):
        with pytest.raises(IndexError, match=f"image {which} of 3"):
            cache[which]
    assert isinstance(cache[-3], TargetCache)
