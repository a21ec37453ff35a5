"""Perceptual losses: values, gradients, opcheck, layouts, on every implementation. Bounds are the design's:
relative errors of 1e-6 (loss), 2e-3 (image gradient, in L2; a ReLU that flips costs that) and 1e-5 (with the
ReLUs and pools of the run itself)."""

import pytest
import torch
from conftest import isas
from perceptual_case import (
    KINDS,
    TAPS,
    gradient,
    images,
    linear,
    options,
    relative,
    stored,
    textbook_loss,
    textbook_maps,
    trunk,
)

import vaeops
from vaeops.ref import perceptual as ref

ops = torch.ops.vaeops
LOSS, GRADIENT, SAME_MASKS = 1e-6, 2e-3, 1e-5
# Edges of Winograd's 4 x 4 tiles and of the pools.
SHAPES = [(1, 16, 16), (2, 8, 12), (3, 17, 9), (4, 4, 30), (5, 23, 21)]
ALL = (
    "conv1_1",
    "relu1_1",
    "pool1",
    "conv2_1",
    "relu2_1",
    "pool2",
    "conv3_1",
    "relu3_1",
    "conv3_2",
    "relu3_2",
)


def loss(x, target, impl=None, **kwargs):
    return vaeops.perceptual_loss(x, target, trunk(), impl=impl, **({"taps": TAPS} | kwargs))


def arguments(taps=ALL, x=None, **changed):
    """Of the low-level ops: (weights, packed, layers, taps, pixels, algorithm)."""
    cut = trunk(**changed).cut(taps)
    return cut.weights, lambda impl: cut.packed(impl), cut.layers, cut.taps, cut.pixels, cut.algorithm


def exactly(impl):
    """The kernels give the same bits; PyTorch's convolutions nearly so."""
    return (
        torch.equal
        if impl == "cpp"
        else (lambda a, b: relative(a, b) < (1e-5 if a.dtype is torch.float32 else 1e-3))
    )


def border(x, width=2):
    """The pixels at the border, flat."""
    inside = torch.zeros_like(x, dtype=torch.bool)
    inside[..., width:-width, width:-width] = True
    return x[~inside]


# ---- values


@pytest.mark.parametrize("winograd", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_maps(impl, shape, winograd):
    x, _ = images(*shape)
    maps = trunk(winograd=winograd).features(x, ALL, impl=impl)
    for tap, ours, exact in zip(ALL, maps, textbook_maps(x.double(), ALL)):
        assert ours.dtype is torch.float32 and ours.is_contiguous(memory_format=torch.channels_last)
        assert relative(ours, exact) < 1e-5 and relative(border(ours, 1), border(exact, 1)) < 1e-5, tap


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradient(impl, kind, shape):
    x, target = images(*shape)
    ours = gradient(loss, x, target, impl, **options(kind))
    exact = gradient(textbook_loss, x.double(), target, **options(kind))
    assert relative(ours[0], exact[0]) < LOSS
    assert relative(ours[1], exact[1]) < GRADIENT and relative(border(ours[1]), border(exact[1])) < GRADIENT


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("kind", KINDS)
def test_reductions_and_cotangents(impl, kind, reduction):
    """Each image's loss has a gradient of its own to scale."""
    x, target = images(3, 16, 16)
    chosen = {**options(kind), "weights": (0.5, 0.0, -2.0), "reduction": reduction}
    g = torch.randn(3 if reduction == "none" else ())
    ours = gradient(loss, x, target, impl, **chosen, cotangent=g)
    exact = gradient(textbook_loss, x.double(), target, **chosen, cotangent=g)
    assert relative(ours[0], exact[0]) < LOSS * 10  # weights of both signs cancel
    assert relative(ours[1], exact[1]) < GRADIENT


def test_direct_convolutions(impl):
    x, target = images(2, 19, 22)
    direct = gradient(vaeops.perceptual_loss, x, target, trunk(winograd=False), taps=TAPS, impl=impl)
    exact = gradient(textbook_loss, x.double(), target)
    assert relative(direct[0], exact[0]) < LOSS and relative(direct[1], exact[1]) < GRADIENT


def test_bf16_products(impl):
    x, target = images(2, 32, 32)
    bf16 = trunk(precision="bf16")
    ours = gradient(vaeops.perceptual_loss, x, target, bf16, taps=TAPS, impl=impl)
    exact = gradient(textbook_loss, x.double(), target)
    assert relative(ours[0], exact[0]) < 2e-2
    assert torch.cosine_similarity(ours[1].double().flatten(), exact[1].flatten(), 0) > 0.995
    maps = bf16.features(x, TAPS, impl=impl)
    for got, want in zip(maps, textbook_maps(x.double())):
        assert got.dtype is torch.bfloat16 and relative(got, want) < 2e-2


@pytest.mark.parametrize("shape", SHAPES)
def test_backward_with_the_masks_of_the_run(impl, shape):
    """What flipped ReLUs cost left out: the fp64 gradient takes ReLUs and maxima as the run had them."""
    x, _ = images(*shape)
    weights, packed, layers, taps, pixels, algorithm = arguments()
    run_options = (weights, packed(impl), layers, taps, pixels(x.dtype), algorithm)
    forward, backward = getattr(ops.vgg_features_fwd, impl), getattr(ops.vgg_features_bwd, impl)
    maps, saved = forward(x, *run_options, True)
    grads = [torch.randn_like(m) for m in maps]
    grads[3] = grads[6] = None
    ours = backward(grads, x, weights, packed(impl), saved, *run_options[2:])
    at = dict(zip(taps, maps))
    run = [(at[2 * i] if out else at[2 * i - 1], at[2 * i + 1].double()) for i, out in enumerate(layers)]
    exact = ref._run_back(grads, run, weights, layers, taps, pixels(x.dtype), 0)
    assert ours.is_contiguous() and relative(ours, exact) < SAME_MASKS
    assert relative(border(ours), border(exact)) < SAME_MASKS


def test_an_image_depends_on_itself_alone(impl):
    """Same bits for any batch, chunk and number of threads, with and without a gradient, cached or not."""
    x, target = images(5, 10, 13)
    threads = torch.get_num_threads()
    same = exactly(impl)
    terms = [vaeops.Term(kind, TAPS, lin=linear() if kind == "lpips" else None) for kind in KINDS]
    call = lambda x, t: vaeops.perceptual_loss(  # noqa: E731
        x, t, trunk(), terms=terms, reduction="none", return_grad=True, impl=impl
    )
    try:
        torch.set_num_threads(1)
        want = call(x, target)
        for count in (2, 3) if impl == "cpp" else ():
            torch.set_num_threads(count)
            assert all(map(same, call(x, target), want))
        for i in range(5):
            assert all(same(a, b[i : i + 1]) for a, b in zip(call(x[i : i + 1], target[i : i + 1]), want))
    finally:
        torch.set_num_threads(threads)
    cache = trunk().encode(target, TAPS, impl=impl)
    assert all(map(same, call(x, cache), want))
    assert same(vaeops.perceptual_loss(x, target, trunk(), terms=terms, reduction="none", impl=impl), want[0])
    alone = [trunk().features(x[i : i + 1], TAPS, impl=impl) for i in range(5)]
    for ours, each in zip(trunk().features(x, TAPS, impl=impl), zip(*alone)):
        assert same(ours, torch.cat(each))


@pytest.mark.parametrize("count", [0, 1, 9])
def test_batches_of_any_size(impl, count):
    x, target = images(count, 12, 12)
    value, g = gradient(loss, x, target, impl, reduction="none")
    assert value.shape == (count,) and g.shape == x.shape
    mean, g = gradient(loss, x, target, impl)
    assert mean == (value.sum() / max(count, 1)) and g.shape == x.shape


# ---- pixels


@pytest.mark.parametrize("normalize", ["imagenet", None, ((0.1, 0.2, 0.3), (0.5, 0.25, 2.0))])
@pytest.mark.parametrize("input_range", [(-1.0, 1.0), (0.0, 1.0), (0.0, 255.0)])
def test_normalisation_is_exact_at_the_borders(impl, input_range, normalize):
    """By hand, then a trunk that does not normalise."""
    lo, hi = input_range
    whole = torch.randint(0, 256, (2, 3, 13, 11), dtype=torch.uint8)
    x = whole / 255 * (hi - lo) + lo
    mean, std = {"imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), None: ((0,) * 3, (1,) * 3)}.get(
        normalize, normalize
    )
    by_hand = ((whole.double() / 255) - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    if normalize is None:
        by_hand = whole.double() / 255 * (hi - lo) + lo
    exact = trunk(normalize=None).features(by_hand, TAPS)
    net = vaeops.VGGTrunk("vgg11", stored("vgg11"), input_range=input_range, normalize=normalize)
    for image in (x, whole):
        for ours, want in zip(net.features(image, TAPS, impl=impl), exact):
            assert relative(ours, want) < 2e-6 and relative(border(ours, 1), border(want, 1)) < 2e-6


def test_uint8_images(impl):
    x, _ = images(2, 16, 16)
    whole = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    ours = gradient(loss, x, whole, impl)
    exact = gradient(textbook_loss, x.double(), whole.double() / 127.5 - 1)
    assert relative(ours[0], exact[0]) < LOSS and relative(ours[1], exact[1]) < GRADIENT
    assert relative(loss(whole, x, impl), exact[0]) < LOSS
    # The image that has a gradient is the target.
    ours = gradient(lambda t: loss(whole, t, impl), x)
    assert relative(ours[0], exact[0]) < LOSS and relative(ours[1], exact[1]) < GRADIENT


# ---- gradients


def test_gradient_of_the_target(impl):
    """Alone, and of both images."""
    x, target = images(2, 16, 16)
    for kind in KINDS:
        a, b = (t.double().requires_grad_() for t in (x, target))
        exact = torch.autograd.grad(textbook_loss(a, b, **options(kind)), (a, b))
        alone = gradient(lambda t, kind=kind: loss(x, t, impl, **options(kind)), target)[1]
        a, b = (t.clone().requires_grad_() for t in (x, target))
        both = torch.autograd.grad(loss(a, b, impl, **options(kind)), (a, b))
        for got, want in zip((alone, *both), (exact[1], *exact)):
            assert relative(got, want) < GRADIENT


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_the_gradient_is_handed_out(impl, reduction):
    x, target = images(3, 16, 16)
    want = gradient(loss, x, target, impl, reduction=reduction)
    leaf, other = x.clone().requires_grad_(), target.clone().requires_grad_()
    for a, b in ((x, target), (leaf, target), (x, other), (leaf, other)):
        value, g = loss(a, b, impl, reduction=reduction, return_grad=True)
        assert not g.requires_grad and relative(g, want[1]) < 1e-6 and relative(value, want[0]) < 1e-6
        assert value.requires_grad == (a.requires_grad or b.requires_grad)


def test_features_are_differentiable(impl):
    x, _ = images(2, 17, 14)
    cotangents = [torch.randn_like(m) for m in trunk().features(x, ALL)]

    def total(maps):
        return sum((m * g).sum() for m, g in zip(maps, cotangents))

    ours = gradient(lambda x: total(trunk().features(x, ALL, impl=impl)), x)
    exact = gradient(lambda x: total(textbook_maps(x, ALL)), x.double())
    assert relative(ours[1], exact[1]) < GRADIENT
    one = gradient(lambda x: trunk().features(x, ALL, impl=impl)[4].square().sum(), x)
    exact = gradient(lambda x: textbook_maps(x, ALL)[4].square().sum(), x.double())
    assert relative(one[1], exact[1]) < GRADIENT


def test_fp64_runs_the_reference():
    x, target = images(2, 12, 12, torch.float64)
    exact = gradient(textbook_loss, x, target)
    ours = gradient(loss, x, target)
    assert ours[0].dtype is ours[1].dtype is torch.float64
    assert relative(ours[0], exact[0]) < 1e-13 and relative(ours[1], exact[1]) < 1e-12
    double = vaeops.VGGTrunk.random("vgg11", 0).double()
    assert relative(vaeops.perceptual_loss(x.float(), target.float(), double, taps=TAPS), exact[0]) < 1e-6
    with pytest.raises(ValueError, match="impl='cpp' computes in fp32"):
        loss(x, target, "cpp")


def test_the_reference_has_the_gradients_of_autograd():
    x, _ = images(2, 13, 10, torch.float64)
    net = trunk().cut(ALL)
    arguments = (net.weights, net.layers, net.taps, net.pixels(x.dtype))
    leaf = x.clone().requires_grad_()
    maps = ref.features(leaf, *arguments)
    grads = [torch.randn_like(m) for m in maps]
    want = torch.autograd.grad(maps, leaf, grads)[0]
    got = ref.vgg_features_bwd(
        grads, x, net.weights, None, None, net.layers, net.taps, net.pixels(x.dtype), 0
    )
    assert relative(got, want) < 1e-14


# ---- opcheck


@pytest.mark.parametrize("impl", ["ref", *(["cpp"] if isas() else [])])
def test_opcheck(impl):
    x, target = images(2, 9, 6)
    weights, packed, layers, taps, pixels, algorithm = arguments(("relu1_1", "conv2_1"))
    packed, pixels = packed(impl), pixels(x.dtype)
    lins, maps = linear(("relu1_1",)), trunk().features(target, ("relu1_1", "conv2_1"))
    a, b = (torch.randn(2, 5, 3, 4, requires_grad=True) for _ in range(2))
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")

    def check(name, args):
        torch.library.opcheck(getattr(getattr(ops, name), impl), args, test_utils=tests)

    check("vgg_pack", (weights, layers, algorithm))
    for keep in (True, False):
        check("vgg_features_fwd", (x, weights, packed, layers, taps, pixels, algorithm, keep))
    made, saved = getattr(ops.vgg_features_fwd, impl)(
        x, weights, packed, layers, taps, pixels, algorithm, True
    )
    check("vgg_features_bwd", ([made[0], None], x, weights, packed, saved, layers, taps, pixels, algorithm))
    heads = (0, 1, 0), (3, 0, 4), (1.0, 2.0, 0.5)
    for image, cached in ((target, []), (None, maps)):
        for want_grad in (True, False):
            check("perceptual_fwd", (x, image, cached, weights, packed, lins, layers, taps, pixels, pixels,
                                     *heads, True, algorithm, want_grad))  # fmt: skip
    for kind in range(5):
        lin = torch.rand(5) if kind == 3 else None
        check("feature_distance_fwd", (a.detach(), b.detach(), lin, kind, True, kind != 4))
        check("feature_distance_bwd", (torch.rand(2), a.detach(), b.detach(), lin, kind, False, False))
    norms = [t for w in weights[1::2] for t in (torch.rand_like(w), torch.randn_like(w))]
    for keep in (True, False):
        check("vgg_batchnorm_fwd", (x, weights, norms, packed, layers, taps, pixels, 1e-5, algorithm, keep))
    made, kept, stats = getattr(ops.vgg_batchnorm_fwd, impl)(
        x, weights, norms, packed, layers, taps, pixels, 1e-5, algorithm, True
    )
    check("vgg_batchnorm_bwd", ([made[0], None], x, weights, norms, packed, kept, stats, layers, taps, pixels,
                                1e-5, algorithm))  # fmt: skip


def test_the_saved_bits_are_few(impl):
    """A bit an element, two a pooled one: what the fake kernel says too."""
    x, _ = images(2, 16, 16)
    weights, packed, layers, taps, pixels, algorithm = arguments()
    saved = getattr(ops.vgg_features_fwd, impl)(
        x, weights, packed(impl), layers, taps, pixels(x.dtype), algorithm, True
    )[1]
    elements = 64 * 256 + 2 * 64 * 64 + 128 * 64 + 2 * 128 * 16 + 2 * 256 * 16
    assert saved.dtype is torch.uint8 and saved.numel() == 2 * elements // 8


# ---- layouts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["channels_last", "strided", "expanded", "transposed"])
def test_images_of_any_layout(impl, layout, dtype):
    if layout == "strided":
        x, target = (t[:, :, ::2, 1:17] for t in images(2, 32, 20, dtype))
    else:
        x, target = images(2, 16, 16, dtype)
    if layout == "channels_last":
        x, target = (t.to(memory_format=torch.channels_last) for t in (x, target))
    elif layout == "expanded":
        target = target[:1].expand(2, -1, -1, -1)
    elif layout == "transposed":
        x, target = (t.transpose(2, 3) for t in (x, target))
    leaf = x.detach().requires_grad_()
    value = loss(leaf, target, impl)
    (g,) = torch.autograd.grad(value, leaf)
    want = gradient(loss, x.contiguous(), target.contiguous(), impl)
    assert value.dtype is torch.float32 and g.dtype is dtype
    assert exactly(impl)(value, want[0]) and exactly(impl)(g, want[1])
    exact = gradient(textbook_loss, x.double(), target)
    assert relative(value, exact[0]) < LOSS
    assert relative(g, exact[1]) < (GRADIENT if dtype is torch.float32 else 1e-2)
