"""Perceptual losses: maps, masks, codes, gradients and distances against the reference."""

import pytest
import torch
from budget import assert_within_budget
from triton import next_power_of_2

import vaeops
from vaeops.kernels import perceptual
from vaeops.kernels.perceptual import conv, distance, pool, trunk
from vaeops.ref import perceptual as ref

PIXELS = (-0.03, -0.088, -0.188, 1 / 0.458, 1 / 0.448, 1 / 0.45)
MSE, L1, SMOOTH_L1, LPIPS, GRAM = range(5)
FP32, DIRECT, BF16 = range(3)


@pytest.fixture(autouse=True)
def _large_programs(monkeypatch):
    """The interpreter's time goes by operations, whatever their size."""
    whole = lambda channels: max(16, next_power_of_2(channels))  # noqa: E731
    monkeypatch.setattr(conv, "settings", lambda dtype: (16, 16, 256, 256, 4, 1))
    monkeypatch.setattr(pool, "settings", lambda channels: (16, 16, whole(channels), 4))
    monkeypatch.setattr(distance, "settings", lambda channels, dtype: (128, whole(channels), 4))


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weights_of(layers):
    """He normal weights and small biases."""
    found, C = [], 3
    for seed, K in enumerate(layers):
        if K:
            found += [normal(K, C, 3, 3, seed=seed) * (2 / (9 * C)) ** 0.5, 0.1 * normal(K, seed=100 + seed)]
            C = K
    return found


# layers, taps, size. vgg16 cut early; the others are small nets with all that a cut can have:
# taps before a ReLU, behind one, behind a pool, a pool behind a pool, layers that ATen makes, few channels.
NETS = {
    "vgg16": (ref.ARCHS["vgg16"][:4], (3, 5, 7), (9, 7)),
    "taps": ((16, 24, 0, 40, 40), (0, 1, 2, 3, 5, 7, 8), (13, 16)),
    "pools": ((8, 0, 16, 0, 0, 24), (1, 7, 9, 11), (18, 16)),
    "wide": ((16, 136, 0, 136, 16, 136), (3, 6, 9, 10), (6, 9)),
}


@pytest.fixture(params=NETS)
def net(request):
    layers, taps, size = NETS[request.param]
    return layers, taps, normal(2, 3, *size, seed=7).clamp(-1, 1), weights_of(layers)


def run(x, weights, layers, taps, algorithm=FP32, keep=True):
    packed = perceptual.vgg_pack(weights, layers, algorithm)
    return packed, *perceptual.vgg_features_fwd(x, weights, packed, layers, taps, PIXELS, algorithm, keep)


def relative(ours, want):
    return float((ours.double() - want.double()).norm() / want.double().norm())


def unpacked(saved, layers, x):
    """Each layer's mask or codes, [B, K, h, w]."""
    found, at, (K, h, w) = [], 0, x.shape[1:]
    for out in layers:
        K, h, w, each = out or K, *((h, w) if out else (h // 2, w // 2)), 8 if out else 4
        count = len(x) * h * w * K // each
        byte = saved[at : at + count].view(len(x), h, w, K // each, 1).int()
        bits = byte >> torch.arange(0, 8, 8 // each) & (1 if out else 3)
        found.append(bits.flatten(3).permute(0, 3, 1, 2))
        at += count
    assert at == saved.numel() == ref.saved_bytes(x, layers)
    return found


def check_trunk(layers, taps, x, weights):
    packed, maps, saved = run(x, weights, layers, taps)
    reference = ref._run(x, weights, layers, PIXELS, FP32)
    for tap, ours in zip(taps, maps):
        want = reference[tap // 2][tap % 2]
        assert ours.dtype is torch.float32
        assert ours.stride() == ref._channels_last(want, want.dtype).stride()
        assert relative(ours, want) < 1e-6
    for kept, (before, _), K in zip(unpacked(saved, layers, x), reference, layers):
        if K:
            assert torch.equal(kept, (before > 0).int())
        else:
            at = torch.nn.functional.max_pool2d(before, 2, return_indices=True)[1]
            width = before.shape[3]
            assert torch.equal(kept, (at // width % 2 * 2 + at % width % 2).int())
    grads = [normal(*m.shape, seed=tap) for tap, m in zip(taps, maps)]
    for given in (grads, [*grads[:-1], None]):
        arguments = given, x, weights, packed, saved, layers, taps, PIXELS, FP32
        ours, want = perceptual.vgg_features_bwd(*arguments), ref.vgg_features_bwd(*arguments)
        assert ours.dtype is x.dtype and ours.is_contiguous()
        assert relative(ours, want) < 2e-6
    none = perceptual.vgg_features_bwd([None] * len(taps), *arguments[1:])
    assert none.shape == x.shape and not none.any()
    assert run(x, weights, layers, taps, keep=False)[2].numel() == 0


def test_trunk(net):
    check_trunk(*net)


@pytest.mark.parametrize("everything", [True, False], ids=["Triton", "ATen"])
def test_whatever_makes_a_layer(everything, monkeypatch):
    monkeypatch.setattr(trunk, "by_triton", lambda C, K: everything)
    layers, taps, size = NETS["taps"]
    check_trunk(layers, taps, normal(2, 3, *size, seed=7), weights_of(layers))


def test_the_tiles_of_a_gpu(monkeypatch):
    """Several tiles of pixels and channels, and several steps."""
    monkeypatch.undo()
    layers = (16, 72, 0, 16)
    check_trunk(layers, (3, 5, 7), normal(1, 3, 6, 17, seed=7), weights_of(layers))


@pytest.mark.parametrize("name", ["taps", "wide"])
def test_trunk_in_bf16(name):
    layers, taps, size = NETS[name]
    x, weights = normal(2, 3, *size), weights_of(layers)
    packed, maps, saved = run(x, weights, layers, taps, BF16)
    want = ref.vgg_features_fwd(x, weights, None, layers, taps, PIXELS, BF16, True)[0]
    exact = ref.features(x.double(), weights, layers, taps, PIXELS)
    for ours, same, true in zip(maps, want, exact):
        assert ours.dtype is torch.bfloat16
        assert relative(ours, true) <= 1.5 * relative(same, true)
    grads = [normal(*m.shape, seed=3).to(m) for m in maps]
    arguments = grads, x, weights, packed, saved, layers, taps, PIXELS, BF16
    ours, want = perceptual.vgg_features_bwd(*arguments), ref.vgg_features_bwd(*arguments)
    assert torch.nn.functional.cosine_similarity(ours.flatten(), want.flatten(), dim=0) > 0.995


def images():
    x = normal(2, 3, 9, 14)
    yield "channels_last", x.contiguous(memory_format=torch.channels_last)
    yield "strided", normal(2, 6, 9, 30)[:, ::2, :, 1:29:2]
    yield "expanded", x[:1].expand_as(x)
    yield "flipped batch", normal(9, 14, 2, 3).permute(2, 3, 0, 1)
    yield "bf16", x.bfloat16()
    yield "fp16", x.half()
    yield "uint8", (x * 60 + 128).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("x", [pytest.param(x, id=name) for name, x in images()])
def test_images(x):
    layers, taps = (16, 16), (0, 3)
    weights = weights_of(layers)
    packed, maps, saved = run(x, weights, layers, taps)
    for ours, want in zip(maps, ref.features(x, weights, layers, taps, PIXELS)):
        assert relative(ours, want) < 1e-6
    if x.dtype is not torch.uint8:
        grads = [normal(*m.shape) for m in maps]
        arguments = grads, x, weights, packed, saved, layers, taps, PIXELS, FP32
        ours, want = perceptual.vgg_features_bwd(*arguments), ref.vgg_features_bwd(*arguments)
        assert ours.dtype is x.dtype
        torch.testing.assert_close(ours, want)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (2, 3), (9, 17)])
def test_sizes(size):
    layers, taps = (16, 16) if min(size) < 2 else (16, 16, 0, 136, 8), (3,) if min(size) < 2 else (3, 9)
    x, weights = normal(2, 3, *size), weights_of(layers)
    packed, maps, saved = run(x, weights, layers, taps)
    for ours, want in zip(maps, ref.features(x, weights, layers, taps, PIXELS)):
        assert relative(ours, want) < 1e-6
    arguments = maps, x, weights, packed, saved, layers, taps, PIXELS, FP32
    ours, want = perceptual.vgg_features_bwd(*arguments), ref.vgg_features_bwd(*arguments)
    assert relative(ours, want) < 2e-6
    nothing = run(x[:0], weights, layers, taps)
    assert [m.shape[0] for m in nothing[1]] == [0] * len(taps)


def test_ties_take_the_first_and_masked_gradients_vanish():
    """Equal pixels, zeros behind the ReLU, and a tap whose gradient is NaN where the mask is 0."""
    layers, taps = (16, 16, 0), (2, 3, 5)
    weights = weights_of(layers)
    x = torch.zeros(1, 3, 12, 12)
    packed, maps, saved = run(x, weights, layers, taps)
    off = maps[1] == 0
    assert off.any() and not off.all()
    grads = [torch.zeros_like(maps[0]), torch.where(off, torch.nan, 1.0), torch.ones_like(maps[2])]
    arguments = grads, x, weights, packed, saved, layers, taps, PIXELS, FP32
    ours, want = perceptual.vgg_features_bwd(*arguments), ref.vgg_features_bwd(*arguments)
    assert ours.isfinite().all()
    torch.testing.assert_close(ours, want)


def test_nan_stays_in_its_image():
    layers, taps, size = NETS["pools"]
    x, weights = normal(2, 3, *size), weights_of(layers)
    x[1, 0, 2, 3] = torch.nan
    packed, maps, saved = run(x, weights, layers, taps)
    for ours, want in zip(maps, ref.features(x, weights, layers, taps, PIXELS)):
        assert torch.equal(ours.isnan(), want.isnan()) and ours[1].isnan().any() and not ours[0].isnan().any()
    grads = [normal(*m.shape, seed=tap) for tap, m in zip(taps, maps)]
    arguments = grads, x, weights, packed, saved, layers, taps, PIXELS, FP32
    ours, want = perceptual.vgg_features_bwd(*arguments), ref.vgg_features_bwd(*arguments)
    assert relative(ours, want) < 2e-6  # through ReLUs and pools of NaN


HEADS = {
    "mse and l1": ((0, 1, 1), (MSE, L1, MSE), (1.0, 0.5, 2.0)),
    "all": ((1, 0, 1, 0, 0, 1), (GRAM, LPIPS, LPIPS, GRAM, SMOOTH_L1, MSE), (30.0, 1.0, 0.3, 50.0, 1.0, 1.0)),
}
LOSS = (16, 16, 0, 24), (3, 7)  # layers, taps
LPIPS_AND_GRAM = ((0, 1), (GRAM, LPIPS), (3.0, 1.0))


def loss(module, x, target, maps, heads, algorithm=FP32, mean=True, want_grad=True):
    layers, taps, weights = *LOSS, weights_of(LOSS[0])
    tap, kind, weight = heads
    lin = [normal(layers[taps[t] // 2], seed=t).abs() for t, k in zip(tap, kind) if k == LPIPS]
    packed = module.vgg_pack(weights, layers, algorithm)
    return module.perceptual_fwd(
        x, target, maps, weights, packed, lin, layers, taps, PIXELS, PIXELS, tap, kind, weight, mean,
        algorithm, want_grad,
    )  # fmt: skip


@pytest.mark.parametrize("heads, mean", [*((name, True) for name in HEADS), ("all", False)])
def test_perceptual(heads, mean):
    x, target = normal(2, 3, 10, 13), normal(2, 3, 10, 13, seed=1)
    arguments = x, target, [], HEADS[heads], FP32, mean
    (losses, gx), (want, want_gx) = loss(perceptual, *arguments), loss(ref, *arguments)
    exact = loss(ref, x.double(), target.double(), *arguments[2:])
    assert losses.dtype is torch.float32
    assert relative(losses, exact[0]) < 1e-6
    torch.testing.assert_close(losses, want, rtol=1e-5, atol=0)
    assert relative(gx, want_gx) < 1e-5
    assert loss(perceptual, *arguments, want_grad=False)[1] is None


def test_target_maps_of_any_strides_and_uint8_targets():
    layers, taps, weights = *LOSS, weights_of(LOSS[0])
    x = normal(1, 3, 9, 8)
    target = (normal(1, 3, 9, 8, seed=1) * 60 + 128).clamp(0, 255).to(torch.uint8)
    whole = loss(perceptual, x, target, [], HEADS["all"])
    maps = ref.features(target, weights, layers, taps, PIXELS)
    for ours, want in zip(loss(perceptual, x, None, maps, HEADS["all"]), whole):
        assert relative(ours, want) < 1e-5
    half = loss(perceptual, x, None, [m.bfloat16() for m in maps], HEADS["mse and l1"])
    want = loss(ref, x, None, [m.bfloat16() for m in maps], HEADS["mse and l1"])
    assert all(relative(a, b) < 1e-5 for a, b in zip(half, want))


def test_perceptual_in_bf16():
    x, target = normal(2, 3, 10, 13, dtype=torch.bfloat16), normal(2, 3, 10, 13, seed=1)
    (losses, gx), (want, want_gx) = (loss(m, x, target, [], HEADS["all"], BF16) for m in (perceptual, ref))
    assert losses.dtype is torch.float32 and gx.dtype is torch.bfloat16
    assert relative(losses, want) < 2e-2
    assert (
        torch.nn.functional.cosine_similarity(gx.flatten().float(), want_gx.flatten().float(), dim=0) > 0.99
    )


def test_an_image_alone_in_any_chunk_and_under_autocast(monkeypatch):
    """Bit-equal. (Here all convolutions are Triton's: ATen may choose another algorithm.)"""
    monkeypatch.setattr(trunk, "by_triton", lambda C, K: True)
    x, target = normal(2, 3, 9, 10), normal(2, 3, 9, 10, seed=1)
    together = loss(perceptual, x, target, [], LPIPS_AND_GRAM)
    alone = loss(perceptual, x[1:2], target[1:2], [], LPIPS_AND_GRAM)
    assert torch.equal(alone[0], together[0][:, 1:2]) and torch.equal(alone[1], together[1][1:2])
    monkeypatch.setattr(trunk, "CHUNK_BYTES", 9 * 10 * 16 * 4)  # one image
    with torch.autocast("cpu", dtype=torch.bfloat16):
        apart = loss(perceptual, x, target, [], LPIPS_AND_GRAM)
    assert all(torch.equal(a, b) for a, b in zip(apart, together))


@pytest.mark.parametrize("name", ["taps", "wide"])
def test_features_in_chunks(name, monkeypatch):
    layers, taps, size = NETS[name]
    x, weights = normal(2, 3, *size), weights_of(layers)
    packed, maps, saved = run(x, weights, layers, taps)
    grads = [normal(*m.shape, seed=tap) for tap, m in zip(taps, maps)]
    gx = perceptual.vgg_features_bwd(grads, x, weights, packed, saved, layers, taps, PIXELS, FP32)
    monkeypatch.setattr(trunk, "CHUNK_BYTES", 1)
    _, again, kept = run(x, weights, layers, taps)
    assert torch.equal(kept, saved)
    for ours, want in zip(again, maps):
        torch.testing.assert_close(ours, want)
    parts = perceptual.vgg_features_bwd(grads, x, weights, packed, kept, layers, taps, PIXELS, FP32)
    assert relative(parts, gx) < 2e-6


def test_equal_images():
    x = normal(2, 3, 8, 9)
    losses, gx = loss(perceptual, x, x.clone(), [], HEADS["all"])
    assert not losses.any() and not gx.any()


@pytest.mark.parametrize("algorithm", [FP32, BF16])
def test_batch_statistics(algorithm):
    """Layers that Triton makes and layers that ATen makes; taps before and behind a ReLU, and a pool."""
    layers, taps = (16, 40, 0, 136, 24), (1, 2, 5, 7, 9)
    x, weights = normal(2, 3, 9, 14, seed=7).clamp(-1, 1), weights_of(layers)
    norms = [t for b in weights[1::2] for t in (b.exp(), 0.3 * b)]
    options = layers, taps, PIXELS, 1e-5, algorithm
    packed, near = perceptual.vgg_pack(weights, layers, algorithm), 2e-6 if algorithm == FP32 else 2e-2
    ours, want = (f.vgg_batchnorm_fwd(x, weights, norms, packed, *options, True) for f in (perceptual, ref))
    for a, b in zip((*ours[0], *ours[1]), (*want[0], *want[1]), strict=True):
        assert a.dtype is torch.float32 and a.stride() == b.stride() and relative(a, b) < near
    assert relative(ours[2], want[2]) < near
    grads = [None, *(normal(*m.shape, seed=tap) for tap, m in zip(taps[1:], want[0][1:]))]
    ours, want = (
        f.vgg_batchnorm_bwd(grads, x, weights, norms, packed, *want[1:], *options) for f in (perceptual, ref)
    )
    assert ours.is_contiguous() and relative(ours, want) < near
    none = perceptual.vgg_batchnorm_fwd(x[:0], weights, norms, packed, *options, False)
    assert [len(m) for m in none[0]] == [0] * len(taps) and none[1] == []


def test_what_it_refuses():
    layers, weights = (16, 16), weights_of((16, 16))
    x = normal(1, 3, 4, 4)
    packed = perceptual.vgg_pack(weights, layers, FP32)
    with pytest.raises(ValueError, match="another impl"):
        perceptual.vgg_features_fwd(x, weights, packed[:-16], layers, (3,), PIXELS, FP32, False)
    with pytest.raises(ValueError, match="multiples of 8"):
        perceptual.vgg_features_fwd(x, weights_of((12,)), packed, (12,), (1,), PIXELS, FP32, False)
    with pytest.raises(ValueError, match="impl='ref'"):
        perceptual.vgg_features_fwd(x.double(), weights, packed, layers, (3,), PIXELS, FP32, False)


def maps(dtype=torch.float32, C=37):
    a, b = (normal(2, C, 6, 9, seed=seed, dtype=dtype) * 2 for seed in (0, 1))
    a[0, :, 2, 3], b[1, :, 0, 0], a[:, 3, 1, 1] = 0, 0, b[:, 3, 1, 1]
    a[0, :, 5, 5] = b[0, :, 5, 5] = 0
    return a, b


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", range(5), ids=ref.DISTANCES)
def test_distance(kind, dtype):
    a, b = maps(dtype)
    lin = normal(37, seed=4).abs() if kind == LPIPS else None
    wide = None if lin is None else lin.double()
    for mean in (True, False):
        for spatial in (False, True)[: 1 if kind == GRAM else 2]:
            options = kind, mean, spatial
            ours, eager = (f(a, b, lin, *options) for f in (perceptual.feature_distance_fwd, ref.distance))
            exact = ref.distance(a.double(), b.double(), wide, *options)
            assert (ours.shape, ours.dtype) == (eager.shape, eager.dtype)
            assert_within_budget(ours, exact, eager, "distance", factor=4)
            g = normal(*ours.shape, seed=3).to(ours.dtype)
            ours, eager = (f.feature_distance_bwd(g, a, b, lin, *options) for f in (perceptual, ref))
            exact = ref.distance_bwd(g.double(), a.double(), b.double(), wide, *options)
            for one, same, true in zip(ours, eager, exact):
                assert one.dtype is dtype and one.isfinite().all()
                if dtype is torch.float64:
                    torch.testing.assert_close(one, true, rtol=1e-9, atol=1e-12)
                else:
                    assert relative(one, true) <= 2 * relative(same, true) + 1e-6


def strided(t):
    yield t
    yield t.contiguous(memory_format=torch.channels_last)
    yield t.transpose(2, 3).contiguous().transpose(2, 3)
    yield torch.stack([t, t], -1).flatten(3)[..., ::2]
    yield t[:1].expand_as(t)
    yield t[:, :, :1]
    yield t[..., :1]
    yield t[:, :1]


@pytest.mark.parametrize("kind", [SMOOTH_L1, LPIPS, GRAM])
def test_distance_layouts(kind, monkeypatch):
    monkeypatch.setattr(distance, "settings", lambda channels, dtype: (32, 16, 4))  # several steps and tiles
    for a, b in zip(strided(maps(C=19)[0]), strided(maps(C=19)[1])):
        lin = normal(2 * a.shape[1])[::2] if kind == LPIPS else None
        for spatial in (False, True)[: 1 if kind == GRAM else 2]:
            options = kind, True, spatial
            ours, want = (f(a, b, lin, *options) for f in (perceptual.feature_distance_fwd, ref.distance))
            torch.testing.assert_close(ours, want)
            g = torch.ones_like(want).expand_as(want)
            ours, want = (f.feature_distance_bwd(g, a, b, lin, *options) for f in (perceptual, ref))
            for one, same in zip(ours, want):
                assert one.stride() == same.stride()
                torch.testing.assert_close(one, same)


def test_the_public_functions_take_it():
    net = vaeops.VGGTrunk.random("vgg11", seed=0)
    x, target = normal(2, 3, 4, 6).clamp(-1, 1), normal(2, 3, 4, 6, seed=1).clamp(-1, 1)
    lin = [torch.rand(64), torch.rand(128)]
    terms = [
        vaeops.Term("lpips", ("relu1_1", "conv2_1"), lin=lin),
        vaeops.Term("gram", ("pool1",), weight=9.0),
    ]
    found = []
    for impl in ("triton", "ref"):
        x, target = (t.detach().requires_grad_() for t in (x, target))
        loss = vaeops.perceptual_loss(x, target.detach(), net, terms=terms, reduction="none", impl=impl)
        gradients = torch.autograd.grad(loss, x, torch.tensor([1.0, -2.0]))
        both = vaeops.perceptual_loss(x, target, net, terms=terms, impl=impl)  # by way of the maps
        gradients += torch.autograd.grad(both, (x, target))
        distance = vaeops.feature_distance(
            x, target, kind="lpips", lin=torch.ones(3), spatial=True, impl=impl
        )
        gradients += torch.autograd.grad(distance.sin().sum(), (x, target))
        found.append([loss, both, distance, *gradients])
    for ours, want in zip(*found):
        assert relative(ours.detach(), want.detach()) < 1e-5
